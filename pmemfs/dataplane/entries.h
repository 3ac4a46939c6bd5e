/* What is missing in the oldest sys/mman.h that this is built with. */
#ifndef PMEMFS_ENTRIES_H
#define PMEMFS_ENTRIES_H

/* Linux 6.1. */
#define PMEMFS_MADV_COLLAPSE 25

#endif
