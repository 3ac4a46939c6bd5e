#!/bin/sh
# Pools on files of an ext4 that is mounted with -o dax. The one of mode block stays mounted.
. "$(dirname "$0")/common.sh"
load_program

step "a file on ext4 with DAX"
mkfs.ext4 -q -F -b 4096 /dev/pmem0
mkdir -p /mnt/dax
mount -o dax=always /dev/pmem0 /mnt/dax
must_fail pmemfs create /dev/pmem0 --force
pmemfs create /mnt/dax/files --size 256M --mode fs
use_pages /mnt/dax/files /mnt/dax/outside
pmemfs create /mnt/dax/pool --size 256M
use_pool /mnt/dax/pool "cache lines"
