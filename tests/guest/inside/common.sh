# What the scripts of this folder share. They run in a guest, as root, and stop at the first failure.
set -eu
PATH=$PWD/.venv/bin:$PATH
mnt=/mnt/pmemfs
mkdir -p "$mnt"

# Says what comes next, and how long the machine has been up.
step() {
    read -r uptime _ </proc/uptime
    echo "== $* ($uptime s)"
}

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

# Looks at arrays over pages of files, and copies without a buffer: use_pages SOURCE DISK
# SOURCE has a pool of mode fs. DISK is a file or device that allows O_DIRECT; it loses what it has.
use_pages() {
    step "arrays over pages of files on $1"
    pmemfs mount "$1" "$mnt"
    python tests/guest/inside/arrays.py fs "$mnt"

    step "copies between pages and $2, without a buffer"
    head -c 3M /dev/urandom >/tmp/random3
    dd if=/tmp/random3 of="$2" bs=1M oflag=direct conv=fsync status=none
    pmemfs copy --direct --json "$2" "$mnt/copy" | tee /tmp/copied
    grep -q '"path": "pages"' /tmp/copied
    cmp -n 3145728 "$mnt/copy" /tmp/random3
    dd if=/dev/zero of="$2" bs=1M count=3 oflag=direct conv=fsync status=none
    pmemfs copy --direct --json "$mnt/copy" "$2" | tee /tmp/copied
    grep -q '"path": "pages"' /tmp/copied
    dd if="$2" bs=1M count=3 iflag=direct status=none | cmp - /tmp/random3
    pmemfs umount "$mnt"
    pmemfs check "$1"
}

# Prints a disk of 4 MiB that is no persistent memory.
make_disk() {
    truncate -s 4M /dev/shm/disk
    losetup --show -f /dev/shm/disk
}
