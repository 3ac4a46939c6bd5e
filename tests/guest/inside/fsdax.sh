#!/bin/sh
# A pool on /dev/pmem0 itself.
. "$(dirname "$0")/common.sh"

step "/dev/pmem0 as the user calls it"
pmemfs create /dev/pmem0
use_pool /dev/pmem0 msync
come_back /dev/pmem0
pmemfs create --force --mode fs /dev/pmem0
use_pages /dev/pmem0 "$(make_disk)"
