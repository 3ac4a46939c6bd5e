#!/bin/sh
# Pools on files of ext4 and xfs that are mounted with -o dax.
. "$(dirname "$0")/common.sh"

export DM_DISABLE_UDEV=1
for fs in ext4 xfs; do
    step "a file on $fs with DAX"
    case $fs in
        ext4) mkfs.ext4 -q -F -b 4096 /dev/pmem0 ;;
        xfs) mkfs.xfs -q -f -m reflink=0 /dev/pmem0 ;;
    esac
    mkdir -p /mnt/dax
    mount -o dax=always /dev/pmem0 /mnt/dax
    if pmemfs create /dev/pmem0 --force; then
        echo "a device that the kernel has mounted was overwritten"
        exit 1
    fi
    pmemfs create /mnt/dax/pool --size 256M
    use_pool /mnt/dax/pool "cache lines"
    if [ "$fs" = ext4 ]; then
        pmemfs create /mnt/dax/files --size 256M --mode fs
        use_pages /mnt/dax/files /mnt/dax/outside
    fi
    umount /mnt/dax
done
step "an xfs is not overwritten unasked"
! pmemfs create /dev/pmem0
