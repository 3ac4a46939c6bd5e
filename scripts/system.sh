# shellcheck shell=bash
# What scripts/setup and scripts/install share: to find a Python, and to install what is missing of
# the system's packages on Debian or Ubuntu. It is sourced.

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { say "$*"; exit 1; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# The first Python that is new enough, or nothing. Its arguments are put before each that is tried.
find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" /usr/bin/python3 python3.13 python3.12 python3.11; do
        candidate=$(command -v "$candidate") || continue
        if "$@" "$candidate" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

# Its name since times have 64 bits on all architectures, or its name before.
libcrypto_package() {
    if apt-cache show libssl3t64 >/dev/null 2>&1; then echo libssl3t64; else echo libssl3; fi
}

# What it takes to build pmemfs for a Python, and to mount.
packages_to_build() {
    local python=$1
    command -v gcc >/dev/null || echo gcc libc6-dev
    command -v pkg-config >/dev/null || echo pkg-config
    { command -v pkg-config >/dev/null && pkg-config --exists fuse3; } || echo libfuse3-dev
    { command -v pkg-config >/dev/null && pkg-config --exists liburing; } || echo liburing-dev
    command -v fusermount3 >/dev/null || echo fuse3
    # Loaded when the first key of an encrypted directory is used; its headers aren't needed.
    # Not grep -q, which ends at the first line: ldconfig would fail for what it could not say.
    PATH=$PATH:/sbin ldconfig -p | grep 'libcrypto\.so\.3 ' >/dev/null || libcrypto_package
    if [ -z "$python" ]; then
        # Debian 12 and Ubuntu 24.04 have 3.11 or newer as python3; Ubuntu 22.04 has it beside.
        if apt-cache show python3.11 >/dev/null 2>&1; then
            echo python3.11 python3.11-venv python3.11-dev
        else
            echo python3 python3-venv python3-dev
        fi
        return
    fi
    "$python" -I -c 'import ensurepip, venv' 2>/dev/null || echo "$(basename "$python")-venv"
    "$python" -I -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        echo "$(basename "$python")-dev"
}

# What the tour and the tests run.
packages_to_try() {
    command -v fio >/dev/null || echo fio
    command -v rsync >/dev/null || echo rsync
    command -v setfacl >/dev/null || echo acl
    PATH=$PATH:/usr/sbin:/sbin
    command -v blkid >/dev/null || echo util-linux
    command -v losetup >/dev/null || echo mount
    command -v mkfs.ext4 >/dev/null || echo e2fsprogs
}

# Install the packages whose names come in.
install_packages() {
    local packages log
    packages=$(tr '\n' ' ')
    [ -n "${packages// /}" ] || return 0
    command -v apt-get >/dev/null ||
        die "these packages are missing, and there is no apt-get to install them: $packages"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null ||
        die "these packages are missing, and without sudo only root can install them: $packages"
    say "installing missing packages: $packages"
    log=$(mktemp)
    # apt has much to say of a system without a terminal, none of which matters unless it fails.
    # shellcheck disable=SC2086  # a list of words
    if ! { as_root apt-get update -qq &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            $packages; } >"$log" 2>&1 </dev/null; then
        tail -n 40 "$log" >&2
        die "apt-get failed; all of its output is in $log"
    fi
    rm "$log"
}
