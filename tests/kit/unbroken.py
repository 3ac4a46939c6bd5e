"""Programs that go on using a directory of mode `fs`, and know what each of their calls answers.

Nobody else touches what a program works on. So there is one right answer to each call, also to
those that fail: a call that was carried out twice answers ENOENT, EEXIST or ENODATA, or leaves a
name, a link or bytes that are too many; one that was lost shows in the names and contents, which
are compared with what the program believes.

Run as `python unbroken.py WORK PLACE SEED [cancels]`, a program works until its standard input
ends, and answers with one line of JSON. With `cancels` a call may also answer ECANCELED. It must
not have been carried out then.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import select
import sqlite3
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

PLACES = ("a", "b")
NAMES = [f"{place}/n{number}" for place in PLACES for number in range(9)]
LABELS = ("user.one", "user.two")
LISTED = 400
"""Names in a directory that nobody changes."""
READ_BYTES = 1 << 20
SLOW_SECONDS = 0.01
_MOST_WRONG = 10
_ACCOUNTS, _MONEY = 20, 1000
NO_REPLACE, EXCHANGE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Thing:
    """What a name leads to."""

    kind: str
    mode: int = 0
    content: bytes = b""
    labels: tuple[tuple[str, bytes], ...] = ()


class State(NamedTuple):
    """All names of a program's directories; links to one thing have the same number."""

    names: dict[str, int]
    things: dict[int, Thing]

    def thing(self, name: str) -> Thing | None:
        """What a name leads to; None if there is no such name."""
        return self.things[self.names[name]] if name in self.names else None

    def with_name(self, name: str, number: int, thing: Thing) -> State:
        """With one more name."""
        return State({**self.names, name: number}, {**self.things, number: thing})

    def without(self, name: str) -> State:
        """With one name less."""
        return State({other: it for other, it in self.names.items() if other != name}, self.things)

    def seen(self) -> dict[str, tuple[Any, ...]]:
        """As `look` sees it."""
        return {
            name: (self.things[number], *self._links(number)) for name, number in self.names.items()
        }

    def _links(self, number: int) -> tuple[str, ...]:
        return tuple(sorted(name for name, other in self.names.items() if other == number))


class Step(NamedTuple):
    """A call that changes something, and what it has to do: another state, or an error."""

    call: Callable[[], object]
    after: State
    error: int = 0


@dataclass
class Program:
    """One program at work."""

    place: Path
    seed: int
    cancels: bool
    tally: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slow: list[tuple[str, float, float]] = field(default_factory=list)
    """What was called, when (monotonic, seconds) and how long it took."""

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def prepare(self) -> None:
        """Make what it works on."""

    def work(self) -> None:
        """Work until told to end."""

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Note a call, and how long it takes if it is slow."""
        begin = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - begin
            self.tally[what] += 1
            if took > SLOW_SECONDS:
                self.slow.append((what, begin, took))

    def note(self, what: str) -> None:
        """Something is wrong."""
        self.wrong.append(f"{time.monotonic():.3f} {what}")

    def run(self, step: Callable[[], None]) -> None:
        """Work until the standard input ends."""
        while not select.select([sys.stdin], [], [], 0)[0] and len(self.wrong) < _MOST_WRONG:
            try:
                step()
            except OSError as failure:
                if not (self.cancels and failure.errno == errno.ECANCELED):
                    raise
                self.tally["cancelled"] += 1

    def answer(self) -> dict[str, Any]:
        """What it has to say."""
        return {"wrong": self.wrong, "tally": self.tally, "slow": self.slow}


class Names(Program):
    """Makes, changes and takes away names, and compares all with what it believes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.state = State({}, {})
        self.count = 0
        self.held: list[tuple[int, int, str]] = []
        """Files that are open, by descriptor and number, with the name they had."""

    def prepare(self) -> None:
        self.place.mkdir()
        for place in PLACES:
            (self.place / place).mkdir()

    def at(self, name: str) -> str:
        """The path of a name."""
        return f"{self.place}/{name}"

    # -- one step --------------------------------------------------------------------------------

    def step(self) -> None:
        """Change something and see that it answers as it must; sometimes compare everything."""
        kinds = [
            *[self.create] * 4, *[self.write] * 3, self.append, self.truncate, *[self.rename] * 4,
            *[self.link] * 2, *[self.unlink] * 4, self.mkdir, self.rmdir, self.symlink,
            *[self.set_label] * 2, self.drop_label, self.chmod, self.unnamed, self.copy,
            self.reserve,
        ]  # fmt: skip
        kind = self.chance.choice(kinds)
        if step := kind():
            self.take(kind.__name__, step)
        match self.chance.randrange(12):
            case 0:
                self.compare()
            case 1 | 2:
                self.hold()
            case 3 | 4:
                self.use_held()
            case 5:
                self.list_names()

    def take(self, what: str, step: Step) -> None:
        """Call it; its answer must be the right one."""
        got = 0
        try:
            with self.timed(what):
                step.call()
        except OSError as failure:
            got = failure.errno or 0
        if got == errno.ECANCELED and self.cancels:
            self.tally["cancelled"] += 1
            self.was_cancelled(what, step)
        elif got != step.error:
            names = {0: "success"} | errno.errorcode
            self.note(f"{what}: {names[got]} where {names[step.error]} is right")
            self.adopt(self.again(self.look))
        elif not got:
            self.state = step.after
            self.forget_unused()

    def adopt(self, found: State) -> None:
        """Go on with what is there, whatever it should have been."""
        self.state = found
        for fd, _, _ in self.held:
            os.close(fd)
        self.held = []

    def forget_unused(self) -> None:
        """Forget things that have no name and are not open."""
        if len(self.state.things) > 4 * len(NAMES):
            used = {*self.state.names.values(), *(number for _, number, _ in self.held)}
            things = {number: it for number, it in self.state.things.items() if number in used}
            self.state = State(self.state.names, things)

    def was_cancelled(self, what: str, step: Step) -> None:
        """See whether a call that was cancelled was carried out."""
        found = self.again(self.look).seen()
        if found == self.state.seen():
            return
        if found == step.after.seen():
            self.tally["cancelled and carried out"] += 1
            self.state = step.after
        else:
            self.note(f"{what} was cancelled and left {difference(found, self.state.seen())}")
            self.adopt(self.again(self.look))

    def again(self, look: Callable[[], State]) -> State:
        """Look until it is not cancelled."""
        while True:
            try:
                return look()
            except OSError as failure:
                if not (self.cancels and failure.errno == errno.ECANCELED):
                    raise
                self.tally["cancelled"] += 1

    # -- what changes something ------------------------------------------------------------------

    def free_number(self) -> int:
        self.count += 1
        return self.count

    def some(self, kind: str) -> str | None:
        """A name of something of a kind."""
        names = [name for name, it in self.state.names.items()
                 if self.state.things[it].kind == kind]  # fmt: skip
        return self.chance.choice(names) if names else None

    def made(self, name: str, call: Callable[[], object], thing: Thing) -> Step:
        """A call that makes a name, or fails because there is one."""
        if name in self.state.names:
            return Step(call, self.state, errno.EEXIST)
        return Step(call, self.state.with_name(name, self.free_number(), thing))

    def changed(self, name: str, call: Callable[[], object], **changes: Any) -> Step:
        """A call that changes what a name leads to."""
        number = self.state.names[name]
        thing = replace(self.state.things[number], **changes)
        return Step(call, State(self.state.names, {**self.state.things, number: thing}))

    def create(self) -> Step:
        name = self.chance.choice(NAMES)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        return self.made(name, lambda: with_open(self.at(name), flags), Thing("file", 0o644))

    def mkdir(self) -> Step:
        name = self.chance.choice(NAMES)
        return self.made(name, lambda: os.mkdir(self.at(name), 0o755), Thing("dir", 0o755))

    def symlink(self) -> Step:
        name, target = self.chance.choice(NAMES), f"to-{self.count}"
        thing = Thing("link", 0o777, target.encode())
        return self.made(name, lambda: os.symlink(target, self.at(name)), thing)

    def unnamed(self) -> Step:
        """A file that gets its name when it has been written."""
        name, content = self.chance.choice(NAMES), self.bytes()

        def call() -> None:
            fd = os.open(self.at(PLACES[0]), os.O_TMPFILE | os.O_RDWR, 0o644)
            try:
                os.pwrite(fd, content, 0)
                # Only with a descriptor of a directory does Python follow the link of /proc.
                os.link(f"/proc/self/fd/{fd}", self.at(name), src_dir_fd=fd, follow_symlinks=True)
            finally:
                os.close(fd)

        return self.made(name, call, Thing("file", 0o644, content))

    def bytes(self) -> bytes:
        """Some content that no other call writes."""
        start = f"{self.seed}:{self.free_number()};".encode()
        return start * (self.chance.choice([1, 200, 1200]))

    def write(self) -> Step | None:
        if not (name := self.some("file")):
            return None
        data, thing = self.bytes(), self.state.thing(name)
        assert thing is not None
        content = data + thing.content[len(data) :]
        call = lambda: with_open(self.at(name), os.O_WRONLY, lambda fd: os.pwrite(fd, data, 0))  # noqa: E731
        return self.changed(name, call, content=content)

    def append(self) -> Step | None:
        if not (name := self.some("file")):
            return None
        data, thing = self.bytes(), self.state.thing(name)
        assert thing is not None
        flags = os.O_WRONLY | os.O_APPEND
        return self.changed(
            name,
            lambda: with_open(self.at(name), flags, lambda fd: os.write(fd, data)),
            content=(thing.content + data),
        )

    def truncate(self) -> Step | None:
        if not (name := self.some("file")):
            return None
        size, thing = self.chance.randrange(6000), self.state.thing(name)
        assert thing is not None
        content = thing.content[:size].ljust(size, b"\0")
        return self.changed(name, lambda: os.truncate(self.at(name), size), content=content)

    def reserve(self) -> Step | None:
        if not (name := self.some("file")):
            return None
        size, thing = self.chance.randrange(1, 20_000), self.state.thing(name)
        assert thing is not None
        call = lambda: with_open(  # noqa: E731
            self.at(name), os.O_WRONLY, lambda fd: os.posix_fallocate(fd, 0, size)
        )
        return self.changed(name, call, content=thing.content.ljust(size, b"\0"))

    def copy(self) -> Step | None:
        source, name = self.some("file"), self.some("file")
        if not source or not name or self.state.names[source] == self.state.names[name]:
            return None
        old, new = self.state.thing(name), self.state.thing(source)
        assert old is not None
        assert new is not None

        def call() -> None:
            with (
                opened(self.at(source), os.O_RDONLY) as one,
                opened(self.at(name), os.O_WRONLY) as other,
            ):
                count = os.copy_file_range(one, other, len(new.content), 0, 0)
                assert count == len(new.content)

        content = new.content + old.content[len(new.content) :]
        return self.changed(name, call, content=content) if new.content else None

    def chmod(self) -> Step | None:
        name, mode = self.some("file"), self.chance.choice([0o600, 0o644, 0o640])
        return (
            self.changed(name, lambda: os.chmod(self.at(name), mode), mode=mode) if name else None
        )

    def set_label(self) -> Step | None:
        if not (name := self.some("file")):
            return None
        label, value, thing = self.chance.choice(LABELS), self.bytes()[:100], self.state.thing(name)
        assert thing is not None
        labels = dict(thing.labels)
        flags = self.chance.choice([os.XATTR_CREATE, os.XATTR_REPLACE])
        call = lambda: os.setxattr(self.at(name), label, value, flags)  # noqa: E731
        if flags == os.XATTR_CREATE and label in labels:
            return Step(call, self.state, errno.EEXIST)
        if flags == os.XATTR_REPLACE and label not in labels:
            return Step(call, self.state, errno.ENODATA)
        return self.changed(name, call, labels=tuple(sorted((labels | {label: value}).items())))

    def drop_label(self) -> Step | None:
        if not (name := self.some("file")):
            return None
        label, thing = self.chance.choice(LABELS), self.state.thing(name)
        assert thing is not None
        labels = dict(thing.labels)
        call = lambda: os.removexattr(self.at(name), label)  # noqa: E731
        if labels.pop(label, None) is None:
            return Step(call, self.state, errno.ENODATA)
        return self.changed(name, call, labels=tuple(sorted(labels.items())))

    def link(self) -> Step | None:
        source, name = self.some("file"), self.chance.choice(NAMES)
        if not source:
            return None
        call = lambda: os.link(self.at(source), self.at(name))  # noqa: E731
        if name in self.state.names:
            return Step(call, self.state, errno.EEXIST)
        number = self.state.names[source]
        return Step(call, self.state.with_name(name, number, self.state.things[number]))

    def unlink(self) -> Step:
        name = self.chance.choice(NAMES)
        thing = self.state.thing(name)
        call = lambda: os.unlink(self.at(name))  # noqa: E731
        if thing is None or thing.kind == "dir":
            return Step(call, self.state, errno.EISDIR if thing else errno.ENOENT)
        return Step(call, self.state.without(name))

    def rmdir(self) -> Step:
        name = self.some("dir") if self.chance.random() < 0.7 else self.chance.choice(PLACES)
        name = name or self.chance.choice(NAMES)
        thing = self.state.thing(name)
        call = lambda: os.rmdir(self.at(name))  # noqa: E731
        if name in PLACES:
            # An empty one must stay, too.
            is_empty = not any(other.startswith(name) for other in self.state.names)
            call = (lambda: os.rmdir(self.at("none"))) if is_empty else call
            return Step(call, self.state, errno.ENOENT if is_empty else errno.ENOTEMPTY)
        if thing is None or thing.kind != "dir":
            return Step(call, self.state, errno.ENOTDIR if thing else errno.ENOENT)
        return Step(call, self.state.without(name))

    def rename(self) -> Step:
        old, new = self.chance.choice(NAMES), self.chance.choice(NAMES)
        flags = self.chance.choice([0, 0, NO_REPLACE, EXCHANGE])
        call = lambda: rename(self.at(old), self.at(new), flags)  # noqa: E731
        error = self.error_of_rename(old, new, flags)
        if error:
            return Step(call, self.state, error)
        names = self.state.names
        if old == new or names[old] == names.get(new):
            return Step(call, self.state)
        if flags == EXCHANGE:
            changed = {old: names[new], new: names[old]}
            return Step(call, State(names | changed, self.state.things))
        return Step(call, State(names | {new: names[old]}, self.state.things).without(old))

    def error_of_rename(self, old: str, new: str, flags: int) -> int:
        """The error that it gives in this state."""
        one, other = self.state.thing(old), self.state.thing(new)
        if one is None:
            return errno.ENOENT
        if flags == NO_REPLACE:
            return errno.EEXIST if other else 0
        if flags == EXCHANGE:
            return 0 if other else errno.ENOENT
        if other is None or (one.kind == "dir") == (other.kind == "dir"):
            return 0
        return errno.ENOTDIR if one.kind == "dir" else errno.EISDIR

    # -- what only looks -------------------------------------------------------------------------

    def look(self) -> State:
        """What is there."""
        names, things = {}, {}
        for place in PLACES:
            with self.timed("list"):
                listed = os.listdir(self.at(place))
            if len(set(listed)) != len(listed):
                self.note(f"{place} lists a name twice: {sorted(listed)}")
            for name in (f"{place}/{it}" for it in listed):
                status = os.lstat(self.at(name))
                names[name] = status.st_ino
                things[status.st_ino] = self.look_at(self.at(name), status)
        found = State(names, things)
        for name, number in names.items():
            links, told = list(names.values()).count(number), os.lstat(self.at(name)).st_nlink
            if things[number].kind == "file" and links != told:
                self.note(f"{name} has {links} names and says {told}")
        return found

    def look_at(self, path: str, status: os.stat_result) -> Thing:
        """One thing with all that belongs to it."""
        mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISLNK(status.st_mode):
            return Thing("link", mode, os.readlink(path).encode())
        if stat.S_ISDIR(status.st_mode):
            return Thing("dir", mode)
        with opened(path, os.O_RDONLY) as fd:
            content = os.read(fd, 1 << 24)
        labels = [(it, os.getxattr(path, it)) for it in sorted(os.listxattr(path))]
        return Thing("file", mode, content, tuple(labels))

    def compare(self) -> None:
        """See that everything is as it should be."""
        found = self.look()
        if found.seen() != self.state.seen():
            self.note(f"found {difference(found.seen(), self.state.seen())}")
            self.adopt(found)

    def hold(self) -> None:
        """Keep a file open, whatever becomes of its name."""
        if len(self.held) > 4:
            fd, _, _ = self.held.pop(0)
            with self.timed("close"):
                os.close(fd)
        if name := self.some("file"):
            fd = os.open(self.at(name), os.O_RDWR)
            self.held.append((fd, self.state.names[name], name))

    def use_held(self) -> None:
        """An open file is what it was, and can be written."""
        if not self.held:
            return
        fd, number, name = self.chance.choice(self.held)
        thing = self.state.things[number]
        links = sum(other == number for other in self.state.names.values())
        with self.timed("fstat"):
            status = os.fstat(fd)
        if (status.st_nlink, status.st_size) != (links, len(thing.content)):
            self.note(f"held {name}: {status.st_nlink} links, {status.st_size} bytes, "
                      f"not {links}, {len(thing.content)}")  # fmt: skip
        with self.timed("read"):
            content = os.pread(fd, 1 << 24, 0)
        if content != thing.content:
            self.note(f"held {name} has other content")
        data = self.bytes()
        changed = replace(thing, content=data + thing.content[len(data) :])
        after = State(self.state.names, {**self.state.things, number: changed})
        self.take("write held", Step(lambda: os.pwrite(fd, data, 0), after))

    def list_names(self) -> None:
        """A directory that nobody changes is listed as it is."""
        with self.timed("list many"):
            listed = os.listdir(self.place.parent / "listed")
        if sorted(listed) != sorted(f"name-{number}" for number in range(LISTED)):
            self.note(f"{len(set(listed))} names, {len(listed)} entries where there are {LISTED}")

    def work(self) -> None:
        self.run(self.step)
        found = self.again(self.look).seen()
        if found != self.state.seen():
            self.note(f"in the end {difference(found, self.state.seen())}")


class Reader(Program):
    """Opens, reads and looks, and notes how long it waits."""

    def prepare(self) -> None:
        with opened(str(self.place), os.O_WRONLY | os.O_CREAT) as fd:
            os.pwrite(fd, pattern(), 0)

    def work(self) -> None:
        self.expected = pattern()
        with opened(str(self.place), os.O_RDONLY) as self.fd:
            self.size = os.fstat(self.fd).st_size
            self.run(self.step)

    def step(self) -> None:
        time.sleep(0.001)
        at = self.chance.randrange(READ_BYTES // 4096) * 4096
        with self.timed("read"):
            data = os.pread(self.fd, 4096, at)
        if data != self.expected[at : at + 4096]:
            self.note(f"other bytes at {at}")
        with self.timed("open"):
            fd = os.open(self.place, os.O_RDONLY)
        try:
            with self.timed("fstat"):
                size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        with self.timed("statfs"):
            os.statvfs(self.place)
        if size != self.size:
            self.note(f"it has {size} bytes, and had {self.size}")


class Bank(Program):
    """Moves money between accounts in a database."""

    def prepare(self) -> None:
        self.place.mkdir()
        with contextlib.closing(self.connect()) as bank:
            bank.execute("create table account (number integer primary key, money integer)")
            bank.execute("create table moved (number integer primary key)")
            bank.executemany("insert into account values (?, ?)",
                             [(number, _MONEY) for number in range(_ACCOUNTS)])  # fmt: skip
            bank.commit()

    def connect(self) -> sqlite3.Connection:
        bank = sqlite3.connect(self.place / "bank.db", timeout=60)
        bank.execute(f"pragma journal_mode = {('delete', 'truncate', 'wal')[self.seed % 3]}")
        return bank

    def work(self) -> None:
        self.moved = 0
        self.bank = self.connect()
        self.run(self.step)
        self.bank.close()
        self.check()

    def step(self) -> None:
        one, other = self.chance.sample(range(_ACCOUNTS), 2)
        try:
            with self.timed("transaction"), self.bank:
                change = "update account set money = money + ? where number = ?"
                self.bank.execute(change, (-7, one))
                self.bank.execute(change, (7, other))
                self.bank.execute("insert into moved values (?)", (self.moved,))
            self.moved += 1
        except sqlite3.OperationalError as failure:
            if not self.cancels:
                self.note(f"sqlite: {failure}")
            self.tally["cancelled"] += 1
            self.bank.close()
            self.bank = self.connect()
            # Whether a commit that failed has taken effect is for the database to say.
            self.moved = self.bank.execute("select count(*) from moved").fetchone()[0]

    def check(self) -> None:
        """No money is lost, and each transaction is there once."""
        with contextlib.closing(self.connect()) as bank:
            said = bank.execute("pragma integrity_check").fetchone()[0]
            money = bank.execute("select sum(money) from account").fetchone()[0]
            moved = bank.execute("select count(*) from moved").fetchone()[0]
        if (said, money, moved) != ("ok", _ACCOUNTS * _MONEY, self.moved):
            self.note(f"{said}, {money} of {_ACCOUNTS * _MONEY}, {moved} of {self.moved}")


def pattern() -> bytes:
    """What the reader's file holds."""
    return random.Random(1).randbytes(READ_BYTES)


def prepare_common(directory: Path) -> None:
    """What the programs find in their parent directory."""
    (directory / "listed").mkdir()
    for number in range(LISTED):
        (directory / "listed" / f"name-{number}").touch()


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between two states, in a few words."""
    return "; ".join(
        f"{name}: {found.get(name)!s:.300} where {wanted.get(name)!s:.300} was expected"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    )


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def with_open(path: str, flags: int, call: Callable[[int], object] = lambda fd: None) -> None:
    """Open, call, close."""
    with opened(path, flags) as fd:
        call(fd)


def rename(old: str, new: str, flags: int) -> None:
    """renameat2."""
    if _libc.renameat2(-100, old.encode(), -100, new.encode(), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


PROGRAMS = {"names": Names, "reader": Reader, "bank": Bank}


def main() -> None:
    work, place, seed, *more = sys.argv[1:]
    os.umask(0o022)
    program = PROGRAMS[work](Path(place), int(seed), "cancels" in more)
    print("ready", flush=True)
    program.work()
    print(json.dumps(program.answer()))


if __name__ == "__main__":
    main()
