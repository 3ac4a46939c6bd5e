"""QEMU's command line, the NVDIMM behind it and the accelerator under it.

Holds:
- the guest changes nothing of the host but the NVDIMM: the host's root is exported read-only;
- an NVDIMM file belongs to one guest at a time, even when the process that started it is dead;
- no QEMU outlives the process that started it, and none leaves a file behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from bootfiles import BootFiles, cache_folder, locked, write_whole
from failures import GuestError, Status, say, unavailable
from packages import find_program

MIB = 1 << 20
NVDIMM_STEP_BYTES = 16 * MIB
NVDIMM_EXTRA_BYTES = 2 * MIB
NVDIMM_DEFAULT_BYTES = 1026 * MIB
# Of the NVDIMM's last bytes, so kept with it.
LABEL_BYTES = 128 << 10
PROBE_SECONDS = 10


def machine_arguments(
    boot: BootFiles, accelerator: str, memory_bytes: int, nvdimm_bytes: int = 0, cpus: int = 1
) -> list[str]:
    """QEMU and the machine it emulates, without the devices that carry work."""
    memory_mib = memory_bytes // MIB
    most_mib = memory_mib + nvdimm_bytes // MIB + 1024
    return [
        # QEMU dies with this process, however that dies.
        *("setpriv", "--pdeathsig", "KILL"),
        find_program("qemu-system-x86_64") or "qemu-system-x86_64",
        *("-accel", "tcg,thread=multi" if accelerator == "tcg" else "kvm"),
        *("-machine", "q35,nvdimm=on", "-cpu", "max", "-smp", str(cpus)),
        *("-m", f"{memory_mib}M,slots=2,maxmem={most_mib}M"),
        *("-display", "none", "-nodefaults", "-no-reboot"),
        *("-kernel", str(boot.kernel.image), "-initrd", str(boot.initramfs)),
    ]


def kernel_arguments(*more: str) -> list[str]:
    """A kernel that stops when it fails, rather than hang.

    mitigations=off: nobody hostile runs in the guest, and emulated mitigations are slow.
    """
    arguments = ("console=ttyS0", "panic=-1", "oops=panic", "mitigations=off", *more)
    return ["-append", " ".join(arguments)]


def nvdimm_arguments(descriptor: int, size_bytes: int) -> list[str]:
    """An NVDIMM on an open file, by descriptor: a memfd has no path, and a path needs quoting."""
    backend = f"memory-backend-file,id=nvdimm,share=on,mem-path=/dev/fd/{descriptor}"
    return [
        *("-object", f"{backend},size={size_bytes},align=2M"),
        *("-device", f"nvdimm,memdev=nvdimm,label-size={LABEL_BYTES}"),
    ]


def share_arguments(job_descriptor: int) -> list[str]:
    """The host's root, and the job that `inside` reads."""
    share = "local,path=/,mount_tag=hostroot,security_model=none,readonly=on,multidevs=remap"
    return [
        *("-virtfs", share),
        *("-fw_cfg", f"name=opt/pmemfs/job,file=/dev/fd/{job_descriptor}"),
    ]


def port_arguments(ports: Mapping[str, socket.socket]) -> list[str]:
    """Virtio ports on sockets, by name."""
    arguments = ["-device", "virtio-serial-pci"]
    for name, port in ports.items():
        arguments += ["-chardev", f"socket,id={name},fd={port.fileno()}"]
        arguments += ["-device", f"virtserialport,chardev={name},name={name}"]
    return arguments


@contextlib.contextmanager
def opened_nvdimm(path: Path | None, wanted_bytes: int | None) -> Iterator[tuple[int, int]]:
    """The NVDIMM's open file and its size; without a path, memory that nobody else sees.

    Refused are, in this order: a size that makes no NVDIMM, before a file is made; a file that
    can't be opened; a file another guest has; a file of another size.
    """
    if wanted_bytes is not None:
        check_nvdimm_size(wanted_bytes)
    descriptor = os.memfd_create("nvdimm") if path is None else open_nvdimm_file(path)
    try:
        found_bytes = os.fstat(descriptor).st_size
        if found_bytes and wanted_bytes not in (None, found_bytes):
            raise GuestError(
                Status.USAGE, f"{path} is {found_bytes} bytes, and --size says {wanted_bytes}"
            )
        size_bytes = found_bytes or wanted_bytes or NVDIMM_DEFAULT_BYTES
        check_nvdimm_size(size_bytes)
        os.truncate(descriptor, size_bytes)
        yield descriptor, size_bytes
    finally:
        os.close(descriptor)


def open_nvdimm_file(path: Path) -> int:
    """Open and lock the file, empty if it was not there.

    QEMU inherits the lock with the descriptor, and so holds it as long as it lives.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise GuestError(Status.USAGE, f"{path} can't be opened: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise GuestError(Status.USAGE, f"{path} is in use by another guest") from None
    return descriptor


def check_nvdimm_size(size_bytes: int) -> None:
    """Of other sizes ndctl says `misaligned`, and ext4 `DAX unsupported`."""
    steps, rest_bytes = divmod(size_bytes - NVDIMM_EXTRA_BYTES, NVDIMM_STEP_BYTES)
    if steps < 1 or rest_bytes:
        near_mib = (max(steps, 1) * NVDIMM_STEP_BYTES + NVDIMM_EXTRA_BYTES) // MIB
        raise GuestError(
            Status.USAGE,
            f"an NVDIMM's size is a multiple of 16M, plus 2M, not {size_bytes} bytes:"
            f" {near_mib}M would do",
        )


def choose_accelerator(wanted: str, boot: BootFiles) -> str:
    """`kvm` or `tcg`. What `auto` finds is remembered until this machine boots again."""
    if wanted == "tcg":
        return "tcg"
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    if wanted == "kvm":
        if not usable:
            raise unavailable("/dev/kvm is not there, or this user may not use it")
        return "kvm"
    return probed_accelerator(boot) if usable else "tcg"


def probed_accelerator(boot: BootFiles) -> str:
    """`kvm` if this kernel boots with it. /dev/kvm alone proves little on a nested machine."""
    cache = cache_folder()
    remembered = cache / "accelerator.json"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    asked = {"boot_id": boot_id, "kernel": boot.kernel.version}
    with locked(cache):
        with contextlib.suppress(OSError, ValueError):
            answer: dict[str, str] = json.loads(remembered.read_text())
            if asked.items() <= answer.items():
                return answer["accelerator"]
        accelerator = "kvm" if boots_with_kvm(boot) else "tcg"
        write_whole(remembered, json.dumps({**asked, "accelerator": accelerator}).encode())
    return accelerator


def boots_with_kvm(boot: BootFiles) -> bool:
    """Boot the kernel to its first program, which says so and stops."""
    say("trying whether a guest boots with KVM here; remembered until this machine boots again")
    command = machine_arguments(boot, "kvm", memory_bytes=512 * MIB)
    command += ["-serial", "stdio", *kernel_arguments("pmemfs-guest=probe")]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return b"guest: the kernel boots" in result.stdout
