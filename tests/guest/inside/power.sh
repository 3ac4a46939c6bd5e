#!/bin/sh
# Two halves of a test that pulls the plug: power.sh before|after SOURCE [RECORD]
#   before  writes records to the pool that is mounted, until the machine is killed, while fio writes
#   after   mounts it again, and looks for every record up to RECORD, the last that was fsynced
# SOURCE is /dev/pmem0, /dev/dax0.0, or `ext4` for a file on an ext4 with DAX.
. "$(dirname "$0")/common.sh"

when=$1 source=$2
case $when in
    before)
        device=$mnt/$(ls "$mnt")
        # The rate leaves the records most of the processor.
        fio --name=load --filename="$device" --direct=1 --rw=randwrite --bs=4k --offset=64m \
            --size=64m --rate_iops=50 --time_based --runtime=600 --output=/dev/null &
        exec python "$(dirname "$0")/records.py" write "$device"
        ;;
    after)
        if [ "$source" = ext4 ]; then
            mkdir -p /mnt/dax
            mount -o dax=always /dev/pmem0 /mnt/dax
            source=/mnt/dax/pool
        fi
        pmemfs mount "$source" "$mnt"
        device=$mnt/$(ls "$mnt")
        python "$(dirname "$0")/records.py" verify "$device" "$3"
        pmemfs umount "$mnt"
        pmemfs check "$source"
        ;;
esac
