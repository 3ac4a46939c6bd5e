"""How fast requests can come and go: the transport, queues, sockets, CPUs and their idle states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pmemfs.mount.transport import (
    ALLOW_COMMAND,
    ENABLE_URING,
    Offer,
    choose_transport,
    known_problem,
    number,
    promise,
    read_text,
)
from pmemfs.observe.finding import Finding, Setting, State, mounts_below
from pmemfs.units import KIB, MIB, format_size

WANTED_BACKGROUND = 1024
"""How many requests under way a mount asks the kernel for; see `pmemfs.mount.making`."""

LARGEST_REQUEST_BYTES = MIB
SAFE_REQUEST_BYTES = 128 * KIB
"""What fits into a message of a socket with the default size."""
WANTED_WMEM_BYTES = MIB
_SOCKET_OVERHEAD_BYTES = 32
_REQUEST_HEADER_BYTES = 4 * KIB

_PARAMETERS = "sys/module/fuse/parameters"
_WMEM_MAX = "proc/sys/net/core/wmem_max"
_IDLE = "sys/devices/system/cpu/cpuidle"
_HALT_POLL = "sys/module/haltpoll/parameters/guest_halt_poll_ns"
_CPUS = "sys/devices/system/cpu"


def request_findings(root: Path, offer: Offer) -> Iterator[Finding]:
    """All findings of this module."""
    yield _enable_uring(offer)
    yield _io_uring(offer)
    yield _transport(offer)
    yield _keeper(offer)
    yield _background(root, "max_user_bgreq", "under way")
    yield _background(root, "max_user_congthresh", "under way before they count as congested")
    yield _connections(root)
    yield _socket(root)
    yield _open_files(root)
    yield _cpus(root)
    yield _idle(root)


def _enable_uring(offer: Offer) -> Finding:
    name = "enable_uring"
    if offer.uring_parameter is None:
        return Finding(
            name,
            State.MISSING,
            "the fuse module has no such parameter",
            "FUSE over io_uring can't be used",
        )
    if offer.uring_parameter:
        return Finding(name, State.OK, "Y", "FUSE over io_uring can be used")
    if known_problem(offer.kernel_release):
        return Finding(name, State.OK, "N", "off is right, because this kernel has a known bug")
    setting = Setting(ENABLE_URING, "Y")
    return Finding(
        name,
        State.COULD_BE_FASTER,
        "N",
        "FUSE over io_uring can't be used",
        setting.command,
        setting=setting,
    )


def _keeper(offer: Offer) -> Finding:
    release = offer.kernel_release
    by_transport = {name: promise(name, release) for name in ("fd", "uring")}
    said = dict.fromkeys(by_transport.values())
    if len(said) > 1:
        said = dict.fromkeys(f"transport {name}: {what}" for name, what in by_transport.items())
    return Finding("keeper", State.OK, f"Linux {release}", "; ".join(said))


def _io_uring(offer: Offer) -> Finding:
    found = f"kernel.io_uring_disabled is {offer.io_uring_disabled}"
    is_open = offer.io_uring_disabled == 0 or (
        offer.io_uring_disabled == 1 and (offer.is_root or offer.in_io_uring_group)
    )
    if is_open:
        return Finding("io_uring", State.OK, found, "this user may make rings")
    # The administrator closed it for safety, so it is not a setting that pmemfs would change.
    return Finding(
        "io_uring", State.COULD_BE_FASTER, found, "FUSE over io_uring can't be used", ALLOW_COMMAND
    )


def _transport(offer: Offer) -> Finding:
    choice = choose_transport("auto", offer)
    state = State.OK if choice.transport == "uring" else State.COULD_BE_FASTER
    return Finding("transport", state, choice.transport, choice.sentence.partition("; ")[2])


def _background(root: Path, name: str, what: str) -> Finding:
    """A limit of asynchronous requests, which binds ordinary users' mounts and not root's."""
    path = f"{_PARAMETERS}/{name}"
    limit = number(read_text(root / path), -1)
    if limit < 0:
        return Finding(name, State.UNKNOWN, "no such parameter", "the kernel's own limit stays")
    allowed = min(limit, WANTED_BACKGROUND)
    therefore = f"users' mounts may have {allowed} requests {what}"
    if limit >= WANTED_BACKGROUND:
        return Finding(name, State.OK, str(limit), therefore)
    setting = Setting(path, str(WANTED_BACKGROUND))
    return Finding(
        name,
        State.COULD_BE_FASTER,
        str(limit),
        f"{therefore}, and root's {WANTED_BACKGROUND}",
        setting.command,
        setting=setting,
    )


def _connections(root: Path) -> Finding:
    directory = "/sys/fs/fuse/connections"
    is_mounted = any(
        mount.fs_type == "fusectl" and mount.mountpoint == directory for mount in mounts_below(root)
    )
    if is_mounted:
        return Finding(
            "fusectl",
            State.OK,
            f"mounted on {directory}",
            f"the python engine asks for {WANTED_BACKGROUND} requests under way",
        )
    return Finding(
        "fusectl",
        State.COULD_BE_FASTER,
        f"not mounted on {directory}",
        "the python engine keeps the kernel's 12 asynchronous requests under way",
        f"mount -t fusectl fusectl {directory}",
    )


def _socket(root: Path) -> Finding:
    """The kernel doubles what SO_SNDBUF asks for, up to wmem_max, and takes 32 bytes a message."""
    wmem = number(read_text(root / _WMEM_MAX), -1)
    if wmem < 0:
        keep = f"users' mounts keep requests at {format_size(SAFE_REQUEST_BYTES)}"
        return Finding("socket size", State.UNKNOWN, "net.core.wmem_max can't be read", keep)
    message = 2 * wmem - _SOCKET_OVERHEAD_BYTES
    found = f"net.core.wmem_max is {wmem}"
    if message >= LARGEST_REQUEST_BYTES + _REQUEST_HEADER_BYTES:
        return Finding(
            "socket size",
            State.OK,
            found,
            f"requests of {format_size(LARGEST_REQUEST_BYTES)} fit a message, for every user",
        )
    setting = Setting(_WMEM_MAX, str(WANTED_WMEM_BYTES))
    return Finding(
        "socket size",
        State.COULD_BE_FASTER,
        found,
        f"users' mounts keep requests at {format_size(SAFE_REQUEST_BYTES)}; root's don't",
        setting.command,
        setting=setting,
    )


def _open_files(root: Path) -> Finding:
    cpu_count = len(_cpu_list(root, "possible")) or 1
    # A ring and a clone of /dev/fuse for each CPU, and whatever else a daemon has open.
    wanted = 64 + 4 * cpu_count
    limit = soft_limit(root, "Max open files")
    if limit is None:
        return Finding("open files", State.UNKNOWN, "no limit can be read", "mounts may fail")
    if limit < wanted:
        return Finding(
            "open files",
            State.COULD_BE_FASTER,
            str(limit),
            f"too few for threads on {cpu_count} CPUs",
            f"ulimit -n {wanted}",
        )
    return Finding("open files", State.OK, str(limit), f"enough for {cpu_count} CPUs")


def _cpus(root: Path) -> Finding:
    online, possible = _cpu_list(root, "online"), _cpu_list(root, "possible")
    if not online or not possible:
        return Finding("cpus", State.UNKNOWN, "/sys does not say", "one thread has to do")
    found = f"{len(online)} online of {len(possible)} possible"
    spare = len(possible) - len(online)
    therefore = "the native engine has one thread for each CPU" + (
        f"; uring needs rings for {spare} more that may come" if spare else ""
    )
    return Finding("cpus", State.OK, found, therefore)


def _idle(root: Path) -> Finding:
    """Source: Documentation/virt/guest-halt-polling.rst of the kernel."""
    driver = read_text(root / _IDLE / "current_driver").strip() or "none"
    governor = (
        read_text(root / _IDLE / "current_governor").strip()
        or read_text(root / _IDLE / "current_governor_ro").strip()
        or "none"
    )
    found = f"driver {driver}, governor {governor}"
    if "haltpoll" == driver == governor:
        return _guest_polling(found, number(read_text(root / _HALT_POLL), 0))
    # Only x86 has this flag. Elsewhere nothing tells a virtual machine, so nothing is suggested.
    if " hypervisor" not in read_text(root / "proc/cpuinfo"):
        return Finding(
            "cpu idle", State.OK, found, "not a virtual machine, as far as the CPU's flags say"
        )
    command = (
        "echo haltpoll > /sys/devices/system/cpu/cpuidle/current_governor"
        if driver == "haltpoll"
        else "modprobe cpuidle_haltpoll force=1"
    )
    return Finding(
        "cpu idle",
        State.COULD_BE_FASTER,
        found,
        "waking another CPU of this virtual machine costs an exit to its host",
        command,
    )


def _guest_polling(found: str, poll_ns: int) -> Finding:
    """Measured with one caller: 53k requests/s, and 132k if the governor may poll at all."""
    found = f"{found}, which polls up to {poll_ns} ns"
    if poll_ns:
        therefore = "an idle CPU polls a while, so it wakes cheaply"
        return Finding("cpu idle", State.OK, found, therefore)
    therefore = "an idle CPU halts at once, and waking it costs an exit to the host"
    command = f"echo 200000 > /{_HALT_POLL}"
    return Finding("cpu idle", State.COULD_BE_FASTER, found, therefore, command)


def soft_limit(root: Path, name: str) -> int | None:
    """A soft limit of this process, by its name in /proc/self/limits; None if it isn't there."""
    for line in read_text(root / "proc/self/limits").splitlines():
        if line.startswith(name):
            word = (line.removeprefix(name).split() or [""])[0]
            return 1 << 63 if word == "unlimited" else number(word, 0)
    return None


def _cpu_list(root: Path, name: str) -> list[int]:
    """The CPUs of a list such as "0-3,8"; [] if it can't be read."""
    found: list[int] = []
    for part in filter(None, read_text(root / _CPUS / name).strip().split(",")):
        first, _, last = part.partition("-")
        start = number(first, -1)
        if start >= 0:
            found.extend(range(start, number(last, start) + 1))
    return found
