#!/bin/sh
# A pool on /dev/dax0.0: a character device that can only be mapped. It stays mounted.
. "$(dirname "$0")/common.sh"
load_program

DAX_UNIT=$(cat /sys/bus/dax/devices/dax0.0/align)
export DAX_UNIT
pmemfs create --mode fs /dev/dax0.0
use_pages /dev/dax0.0 "$(make_disk)"
step "a pool is not overwritten unasked"
must_fail pmemfs create /dev/dax0.0
pmemfs create --force /dev/dax0.0
use_pool /dev/dax0.0 "cache lines"
step "read-only, and everything is there"
pmemfs umount "$mnt"
pmemfs mount -r /dev/dax0.0 "$mnt"
dd if="$mnt/dax0.0" bs=1M skip=16 count=8 iflag=direct status=none | cmp - /tmp/random
must_fail dd if=/dev/zero of="$mnt/dax0.0" bs=4k count=1 oflag=direct conv=notrunc
pmemfs umount "$mnt"
step "TRIM writes zeroes, since such a device gives nothing back; the rest stays and is served"
pmemfs mount /dev/dax0.0 "$mnt"
fallocate -p -o 16M -l 2M "$mnt/dax0.0"
dd if="$mnt/dax0.0" bs=1M skip=16 count=2 iflag=direct status=none | cmp -n 2097152 - /dev/zero
dd if="$mnt/dax0.0" bs=1M skip=18 count=6 iflag=direct status=none | cmp -i 0:2097152 - /tmp/random
dd if=/tmp/random of="$mnt/dax0.0" bs=1M seek=16 count=2 oflag=direct conv=notrunc,fsync status=none
dd if="$mnt/dax0.0" bs=1M skip=16 count=8 iflag=direct status=none | cmp - /tmp/random
.venv/bin/python -c "
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
assert os.lseek(fd, 5000, os.SEEK_DATA) == 5000
assert os.lseek(fd, 5000, os.SEEK_HOLE) == os.fstat(fd).st_size
" "$mnt/dax0.0"
step "arrays over pages of the device, in units of its own"
python tests/guest/inside/arrays.py block "$mnt/dax0.0"
