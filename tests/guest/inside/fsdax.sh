#!/bin/sh
# A pool on /dev/pmem0 itself. It stays mounted.
. "$(dirname "$0")/common.sh"
load_program

step "/dev/pmem0 as the user calls it"
pmemfs create --mode fs /dev/pmem0
use_pages /dev/pmem0 "$(make_disk)"
pmemfs check /dev/pmem0
step "a pool is not overwritten unasked"
must_fail pmemfs create /dev/pmem0
pmemfs create --force /dev/pmem0
use_pool /dev/pmem0 msync
