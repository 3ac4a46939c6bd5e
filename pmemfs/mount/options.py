"""Mount options: what follows `-o`, and the columns of fstab."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pmemfs.clock import AccessTimes
from pmemfs.errors import BadMountOption, BadSize
from pmemfs.media.label import Mode
from pmemfs.text import did_you_mean
from pmemfs.units import KIB, MIB, format_size, parse_size

EngineName = Literal["native", "python"]
TransportName = Literal["auto", "uring", "fd"]
ENGINES: tuple[EngineName, ...] = ("native", "python")
TRANSPORTS: tuple[TransportName, ...] = ("auto", "uring", "fd")
"""The first of each is what a mount gets that asks for none."""

_ONE_FILE = (Mode.BLOCK, Mode.CACHE)
_OF_MODE = {
    "uid": _ONE_FILE, "gid": _ONE_FILE, "mode": _ONE_FILE, "cached": (Mode.FS,),
    "degraded": (Mode.CACHE,), "cold_seconds": (Mode.FS,),
    "names_memory": (Mode.FS,),
}  # fmt: skip
"""Options of ours that mean nothing in other modes. What mount(8) knows is for all."""

_KERNEL_OPTIONS = frozenset(
    ("nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime", "sync", "async",
     "dirsync")
)  # fmt: skip
"""Passed on to the kernel's mount as they are."""

ROOTS_OWN = ("suid", "dev", "nosymfollow")
"""What fusermount3 would drop in silence for anybody but root."""

LATE = frozenset(("nosymfollow", "symfollow"))
"""For the kernel, too, but fusermount3 does not know them."""

_OPPOSITES = {
    "nosuid": "suid", "suid": "nosuid", "nodev": "dev", "dev": "nodev", "noexec": "exec",
    "exec": "noexec", "noatime": "atime", "atime": "noatime", "sync": "async", "async": "sync",
    "nosymfollow": "symfollow", "symfollow": "nosymfollow",
}  # fmt: skip

_TIMES_OF_ACCESS = {
    "strictatime": {"strictatime": True}, "nostrictatime": {"strictatime": False},
    "relatime": {"strictatime": False}, "norelatime": {}, "nodiratime": {"nodiratime": True},
    "diratime": {"nodiratime": False},
}  # fmt: skip
"""For us alone: the kernel leaves times of access to the daemon, and fusermount3 knows no such
word. `relatime` is what happens anyway."""

_FOR_OTHERS = frozenset(
    ("defaults", "auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner",
     "group", "nogroup", "nofail", "_netdev", "comment")
)  # fmt: skip
"""Said to mount(8), which takes care of it."""

_KEEPING = {
    "keeper": {"keeper": True}, "no_keeper": {"keeper": False}, "standby": {"standby": True},
    "no_standby": {"standby": False},
}  # fmt: skip
_FLAGS = ("allow_other", "populate", "huge_pages", "cached", "degraded")
_WITH_VALUE = ("uid", "gid", "mode", "engine", "transport", "hang_timeout", "cold_seconds",
               "names_memory")  # fmt: skip
_KNOWN = (
    "ro", "rw", *_FLAGS, *_WITH_VALUE, *_KEEPING, *_KERNEL_OPTIONS, *_TIMES_OF_ACCESS, *_FOR_OTHERS,
)  # fmt: skip
WORDS = (
    "ro", "rw", *_FLAGS, "uid=", "gid=", "mode=", *(f"engine={name}" for name in ENGINES),
    *(f"transport={name}" for name in TRANSPORTS), *_KEEPING, "hang_timeout=",
    "cold_seconds=", "names_memory=",
    *sorted(_KERNEL_OPTIONS | LATE), *_TIMES_OF_ACCESS,
)  # fmt: skip
"""What a shell proposes: all that means something here."""
_ELSEWHERE = {
    "readonly": "ro", "read-only": "ro", "read_only": "ro", "rdonly": "ro",
    "readwrite": "rw", "read-write": "rw", "umask": "mode", "fmask": "mode", "perm": "mode",
    "owner_uid": "uid", "hugepages": "huge_pages", "huge": "huge_pages",
    "allow_root": "allow_other",
    "allow-other": "allow_other", "kernel_cache": "cached", "auto_cache": "cached",
    "prefault": "populate",
}  # fmt: skip
"""What other tools, or other words, call an option of ours."""

_TRUE_ANYWAY = frozenset(
    ("default_permissions", "lazytime", "nolazytime", "iversion", "noiversion", "mand", "nomand",
     "silent", "loud")
)  # fmt: skip
"""Times of access are lazy, whatever is said; the others mean nothing to a FUSE mount, and the
kernel would refuse `mand`, which no kernel obeys since Linux 5.15."""

_IGNORED_PREFIXES = (
    "x-", "X-", "comment=", "user_id=", "group_id=", "rootmode=", "fd=", "max_read=", "blksize=",
)  # fmt: skip
"""Also what /proc/mounts shows of each FUSE mount: who copies it from there has not chosen it."""

_CONTEXTS = ("context", "fscontext", "defcontext", "rootcontext")
"""For SELinux, where it is enabled."""
_SELINUX = "/sys/fs/selinux/enforce"
_WORD = re.compile(r'(?:[^,"]|"[^"]*"|")+')


_ID, _OCTAL = "a number, as 'id' shows it", "an octal number, such as 600"
_LONGEST_SECONDS = 24 * 60 * 60
_LONGEST_COLD_SECONDS = 366 * _LONGEST_SECONDS
_COLD_SECONDS = 600
_NAMES_MEMORY = 64 * MIB
_LEAST_NAMES_MEMORY = 64 * KIB
"""With less, workers read inodes again and again, and then hand the requests over."""
_MOST_BYTES = 4000
"""Of the text of all options: the kernel's page for them, and room for what the mount adds. The
shared memory of the planes has as much."""

_FIXED = (
    "uid", "gid", "mode", "allow_other", "populate", "huge_pages", "cached", "degraded", "engine",
    "transport", "keeper", "standby", "hang_timeout",
)  # fmt: skip
"""What can't change while it is mounted."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How a pool is to be mounted."""

    read_only: bool = False
    allow_other: bool = False
    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    mode: int = 0o600
    populate: bool = False
    """Touch all of the data zone at mount, so that no first access has to wait for a page fault."""
    huge_pages: bool = False
    """Ask for huge pages behind the mapping."""
    cached: bool = False
    """Keep what was read in the page cache; mode `fs` only."""
    degraded: bool = False
    """Serve without the origin what the pool has; mode `cache` only."""
    strictatime: bool = False
    """Each access counts, not only the first after a change."""
    nodiratime: bool = False
    """Listing a directory is no access."""
    engine: EngineName = ENGINES[0]
    transport: TransportName = TRANSPORTS[0]
    keeper: bool | None = None
    """Start again what dies of the mount's processes; None: if the engine is the native one."""
    standby: bool = True
    """Have a process wait to take the daemon's place; with a keeper only."""
    hang_timeout: int = 0
    """End a process of the mount that has made no progress for so many seconds; 0: never."""
    cold_seconds: int = _COLD_SECONDS
    """Compress what nobody has touched for so many seconds, of files with a compression; 0: only
    what is rewritten. Mode `fs` only."""
    names_memory: int = _NAMES_MEMORY
    """How many bytes workers may use for what they know of names; 0: the daemon serves all that has
    to do with names. Mode `fs` only."""
    kernel: tuple[str, ...] = ()
    said: frozenset[str] = field(default=frozenset(), compare=False)
    """Which of `_OF_MODE` somebody has asked for."""

    @property
    def access_times(self) -> AccessTimes:
        """Which accesses of files are noted."""
        if "noatime" in self.kernel:
            return AccessTimes.NEVER
        return AccessTimes.STRICT if self.strictatime else AccessTimes.RELATIVE

    @classmethod
    def parse(cls, text: str) -> MountOptions:
        """The options in a comma-separated text. Raises BadMountOption."""
        options = cls()
        for word in split_words(text):
            options = options._with(word)
            said = {word.partition("=")[0]} & _OF_MODE.keys()
            options = replace(options, said=options.said | said)
        if options.engine == "python" and options.transport != TRANSPORTS[0]:
            raise BadMountOption(
                option=f"transport={options.transport}", why="only the native engine has transports"
            )
        options._check_keeping()
        options._check_names()
        options._check_length()
        return options

    def _check_names(self) -> None:
        if not self.names_memory or self.names_memory == _NAMES_MEMORY:
            return
        why = ""
        if self.engine == "python":
            why = "only the native engine serves names without the daemon"
        elif self.names_memory < _LEAST_NAMES_MEMORY:
            least = format_size(_LEAST_NAMES_MEMORY)
            why = f"it takes {least} at least; with 0 the daemon serves all names"
        if why:
            raise BadMountOption(option=f"names_memory={self.names_memory}", why=why)

    def _check_keeping(self) -> None:
        if self.engine == "python" and self.keeper:
            why = "a mount of the python engine ends with its daemon"
            raise BadMountOption(option="keeper", why=why)
        if self.hang_timeout and not self.is_kept:
            why = "only a keeper starts again what hangs, and this mount has none"
            if self.engine == "python":
                why = "a mount of the python engine has no keeper, which would start it again"
            raise BadMountOption(option=f"hang_timeout={self.hang_timeout}", why=why)

    @property
    def is_kept(self) -> bool:
        """Whether the mount outlives its processes."""
        return self.keeper is not False and self.engine == "native"

    def check_mode(self, mode: Mode) -> None:
        """Raise BadMountOption where something was asked for that a pool of this mode has not."""
        for name in sorted(self.said):
            if mode not in _OF_MODE[name]:
                raise BadMountOption(option=name, why=f"it has no meaning in mode {mode.word}: "
                                     "leave it out")  # fmt: skip

    def as_text(self, *, only_said: bool = False) -> str:
        """The text that `parse` makes these options of; with `only_said` without the owner and mode
        that nobody asked for."""
        owner = {"uid": self.uid, "gid": self.gid, "mode": f"{self.mode:o}"}
        words = [f"{name}={value}" for name, value in owner.items()
                 if name in self.said or not only_said]  # fmt: skip
        words += self.kernel
        if self.engine != ENGINES[0]:
            words.append(f"engine={self.engine}")
        if self.transport != TRANSPORTS[0]:
            words.append(f"transport={self.transport}")
        if self.keeper is not None:
            words.append("keeper" if self.keeper else "no_keeper")
        if not self.standby:
            words.append("no_standby")
        if self.hang_timeout:
            words.append(f"hang_timeout={self.hang_timeout}")
        if self.cold_seconds != _COLD_SECONDS:
            words.append(f"cold_seconds={self.cold_seconds}")
        if self.names_memory != _NAMES_MEMORY:
            words.append(f"names_memory={self.names_memory}")
        flags = {"ro": self.read_only, "allow_other": self.allow_other,
                 "populate": self.populate, "huge_pages": self.huge_pages,
                 "cached": self.cached, "degraded": self.degraded,
                 "strictatime": self.strictatime,
                 "nodiratime": self.nodiratime}  # fmt: skip
        return ",".join([word for word, is_set in flags.items() if is_set] + words)

    def remounted(self, words: Iterable[str]) -> MountOptions:
        """These options after a remount that asks for some words. Raises BadMountOption."""
        options = self
        for word in words:
            options = options._with(word)
            if any(getattr(options, name) != getattr(self, name) for name in _FIXED):
                why = "it can't change while it is mounted: unmount, and mount again"
                raise BadMountOption(option=word, why=why)
            said = {word.partition("=")[0]} & _OF_MODE.keys()
            options = replace(options, said=options.said | said)
        options._check_names()
        options._check_length()
        return options

    def changed_as(self, other: MountOptions) -> MountOptions:
        """These, with what may change while it is mounted as others have it."""
        return replace(
            self, read_only=other.read_only, kernel=other.kernel, strictatime=other.strictatime,
            nodiratime=other.nodiratime, cold_seconds=other.cold_seconds,
            names_memory=other.names_memory,
        )  # fmt: skip

    def _check_length(self) -> None:
        if len(os.fsencode(self.as_text())) > _MOST_BYTES:
            longest = max(self.kernel, key=len)
            why = f"all options together have room for {_MOST_BYTES} bytes"
            raise BadMountOption(option=f"{longest[:40]}…", why=why)

    def _with(self, word: str) -> MountOptions:
        name, equals, value = word.partition("=")
        if word == "rw":
            return replace(self, read_only=False)
        if word == "ro":
            return replace(self, read_only=True)
        if word in _FLAGS:
            return self._replaced(**{word: True})
        if equals and name in ("uid", "gid"):
            return self._replaced(**{name: _number(word, value, 10, (1 << 32) - 2, _ID)})
        if equals and name == "mode":
            return replace(self, mode=_number(word, value, 8, 0o7777, _OCTAL))
        if equals and name == "engine":
            return self._replaced(engine=_one_of(word, value, ENGINES))
        if equals and name == "transport":
            return self._replaced(transport=_one_of(word, value, TRANSPORTS))
        if equals and name == "hang_timeout":
            seconds = _number(word, value, 10, _LONGEST_SECONDS, "a number of seconds")
            return self._replaced(hang_timeout=seconds)
        if equals and name == "cold_seconds":
            seconds = _number(word, value, 10, _LONGEST_COLD_SECONDS, "a number of seconds")
            return self._replaced(cold_seconds=seconds)
        if equals and name == "names_memory":
            return self._replaced(names_memory=_size(word, value))
        if word in _KEEPING:
            return self._replaced(**_KEEPING[word])
        if word in _TIMES_OF_ACCESS:
            options = self._replaced(**_TIMES_OF_ACCESS[word])
            # The later of two that contradict each other counts, here and below.
            is_later = word in ("strictatime", "relatime") and "noatime" in self.kernel
            return options._with("atime") if is_later else options
        if word in _KERNEL_OPTIONS | LATE:
            # The later of two that contradict each other counts, as for mount(8).
            kept = (other for other in self.kernel if other not in (word, _OPPOSITES.get(word)))
            return replace(self, kernel=(*kept, word))
        if equals and is_context(word):
            kept = (other for other in self.kernel if not other.startswith(f"{name}="))
            return replace(self, kernel=(*kept, word))
        if word in _FOR_OTHERS | _TRUE_ANYWAY or word.startswith(_IGNORED_PREFIXES):
            return self
        if word in _WITH_VALUE:
            raise BadMountOption(option=word, why=f"it needs a value, as in {word}=…")
        meant = did_you_mean(name, _KNOWN, _ELSEWHERE)
        advice = meant or "; 'pmemfs mount --help' lists those that it does"
        raise BadMountOption(option=word, why=f"pmemfs does not know it{advice}")

    def _replaced(self, **changes: Any) -> MountOptions:
        return replace(self, **changes)


def is_context(word: str) -> bool:
    """Whether a word is for SELinux."""
    return word.partition("=")[0] in _CONTEXTS


def selinux_is_enabled() -> bool:
    """Whether this kernel knows what to do with contexts; mount(8) drops them where it doesn't."""
    return os.path.exists(_SELINUX)


def late_words(options: MountOptions) -> list[str]:
    """The flags of the kernel that fusermount3 does not know, as words."""
    words = [word for word in options.kernel if word in LATE]
    words += ["strictatime"] if options.access_times is AccessTimes.STRICT else []
    return words + (["nodiratime"] if options.nodiratime else [])


def split_words(text: str) -> list[str]:
    """The words between commas, but for commas in quotation marks. Raises BadMountOption."""
    words = _WORD.findall(text)
    for word in words:
        if word.count('"') % 2:
            raise BadMountOption(option=word, why="a quotation mark is missing")
    return words


def _size(word: str, value: str) -> int:
    try:
        return parse_size(value, may_be_zero=True)
    except BadSize as error:
        raise BadMountOption(option=word, why=error.facts["why"]) from None


def _one_of(word: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        meant = did_you_mean(value, choices)
        raise BadMountOption(option=word, why=f"{value!r} is none of {', '.join(choices)}{meant}")
    return value


def _number(word: str, text: str, base: int, most: int, kind: str) -> int:
    try:
        number = int(text, base)
    except ValueError:
        raise BadMountOption(option=word, why=f"{text!r} is not {kind}") from None
    if not 0 <= number <= most:
        limit = f"{most:o}" if base == 8 else f"{most}"
        raise BadMountOption(option=word, why=f"the number is not between 0 and {limit}")
    return number
