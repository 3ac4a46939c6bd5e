#!/bin/sh
# A pool on /dev/dax0.0: a character device that can only be mapped.
. "$(dirname "$0")/common.sh"

pmemfs create /dev/dax0.0
step "a pool is not overwritten unasked"
! pmemfs create /dev/dax0.0
use_pool /dev/dax0.0 "cache lines"
step "read-only"
pmemfs mount -r /dev/dax0.0 "$mnt"
dd if="$mnt/dax0.0" bs=1M skip=16 count=8 iflag=direct status=none | cmp - /tmp/random
! dd if=/dev/zero of="$mnt/dax0.0" bs=4k count=1 oflag=direct conv=notrunc 2>/dev/null
pmemfs umount "$mnt"
