#!/bin/sh
# Two halves of a test that pulls the plug: power.sh before|after SOURCE [RECORD]
#   before  makes a pool on SOURCE, and writes records until the machine is killed, while fio writes
#   after   mounts it again, and looks for every record up to RECORD, the last that was fsynced
# SOURCE is /dev/pmem0, /dev/dax0.0, or `ext4` for a file on an ext4 with DAX.
. "$(dirname "$0")/common.sh"

when=$1 source=$2
if [ "$source" = ext4 ]; then
    [ "$when" = after ] || mkfs.ext4 -q -F -b 4096 /dev/pmem0
    mkdir -p /mnt/dax
    mount -o dax=always /dev/pmem0 /mnt/dax
    source=/mnt/dax/pool
    [ "$when" = after ] || pmemfs create "$source" --size 256M
elif [ "$when" = before ]; then
    # A pool of what ran before lies there.
    pmemfs create --force "$source"
fi
pmemfs mount "$source" "$mnt"
device=$mnt/$(ls "$mnt")

case $when in
    before)
        fio --name=load --filename="$device" --direct=1 --rw=randwrite --bs=4k --offset=64m \
            --size=64m --time_based --runtime=600 --output=/dev/null &
        exec python "$(dirname "$0")/records.py" write "$device"
        ;;
    after)
        python "$(dirname "$0")/records.py" verify "$device" "$3"
        pmemfs umount "$mnt"
        pmemfs check "$source"
        ;;
esac
