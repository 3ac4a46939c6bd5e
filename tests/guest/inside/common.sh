# What the scripts of this folder share. They run in a guest, as root, and stop at the first failure.
set -eu
PATH=$PWD/.venv/bin:$PATH
mnt=/mnt/pmemfs
mkdir -p "$mnt"

step() { echo "== $*"; }

# Runs what a user would against a mounted pool: use_pool SOURCE DURABILITY
use_pool() {
    step "mount $1"
    pmemfs mount "$1" "$mnt"
    device=$mnt/$(ls "$mnt")
    pmemfs info "$mnt" | tee /tmp/info
    grep -q "durable by $2" /tmp/info

    step "fio with verification"
    fio --name=v --filename="$device" --direct=1 --rw=randwrite --bs=4k --size=4m --fsync=64 \
        --verify=crc32c --verify_state_save=0 --output=/tmp/fio.log || { cat /tmp/fio.log; exit 1; }

    step "dd, there and back"
    head -c 8M /dev/urandom >/tmp/random
    dd if=/tmp/random of="$device" bs=1M seek=16 oflag=direct conv=notrunc,fsync status=none
    dd if="$device" bs=1M skip=16 count=8 iflag=direct status=none | cmp - /tmp/random
    pmemfs umount "$mnt"
}

# Looks for what use_pool has left: come_back SOURCE
come_back() {
    step "mount again, everything is there"
    pmemfs mount "$1" "$mnt"
    device=$mnt/$(ls "$mnt")
    dd if="$device" bs=1M skip=16 count=8 iflag=direct status=none | cmp - /tmp/random
    pmemfs umount "$mnt"
}
