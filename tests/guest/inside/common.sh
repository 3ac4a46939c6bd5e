# What the scripts of this folder share. They run in a guest, as root, and stop at the first failure.
set -eu
PATH=$PWD/.venv/bin:$PATH
mnt=/mnt/pmemfs
mkdir -p "$mnt"

# Lets a process that has loaded the program fork its commands; without it each is started afresh.
load_program() {
    mkfifo /run/commands /run/codes
    PYTHONPATH=$PWD/tests python tests/guest/inside/commands.py /run/commands /run/codes &
    pmemfs() {
        # The shell that runs this may be one of a pipe.
        read -r own _ </proc/self/stat
        echo "$own $PWD $program $*" >/run/commands
        read -r code </run/codes
        return "$code"
    }
}
program=$PWD/.venv/bin/pmemfs

# Says what comes next, and how long the machine has been up.
step() {
    read -r uptime _ </proc/uptime
    echo "== $* ($uptime s)"
}

# Fails if a command succeeds, which `set -e` wouldn't do after a `!`: must_fail COMMAND...
must_fail() {
    if "$@"; then
        echo "this must fail: $*"
        exit 1
    fi
}

# Runs what a user would against a pool, and leaves it mounted: use_pool SOURCE DURABILITY
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
}

# Looks at arrays over pages of files, and copies without a buffer: use_pages SOURCE DISK
# SOURCE has a pool of mode fs. DISK is a file or device that allows O_DIRECT; it loses what it has.
use_pages() {
    step "arrays over pages of files on $1"
    pmemfs mount "$1" "$mnt"
    python tests/guest/inside/arrays.py fs "$mnt" "$2"
    pmemfs umount "$mnt"
}

# Prints a disk of 4 MiB that is no persistent memory.
make_disk() {
    truncate -s 4M /dev/shm/disk
    losetup --show -f /dev/shm/disk
}
