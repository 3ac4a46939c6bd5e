"""The keeper of a mount: it holds what the mount must not lose when its daemon dies.

The daemon starts it with its end of a socket and a pidfd of the daemon, and then stores descriptors
here, each list under a name. When the daemon dies without having said `end`, the keeper starts a
successor and hands it everything. `fuse/keeping` is the other end. A message is a verb, a name and
data, with NUL in between:

    store NAME DATA   keep these descriptors and data; what had that name is closed
    drop NAME         close them
    get NUMBER        answer with what is stored: `NAME DATA` of the item of that number, or `all`
    replace WORDS     the next end of the daemon is planned: then start these words
    watch MS          kill the daemon if it says nothing for so many milliseconds; 0: never
    pong              the daemon lives: the answer to `ping`, which is all that is said unasked here
    end               the mount has ended: close everything, and end

Invariants:
- the keeper serves nobody but its daemon, and never waits for it: whatever the daemon does or fails
  to do, the keeper notices its death;
- it imports nothing but three small native modules. So its private memory is a few MiB, which are
  the last that the system would want to have back;
- a signal that ends other processes does not end it. It ends when the mount does.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import posix
import select
import sys
import time

_MESSAGE_BYTES = 64 * 1024
_FD_BYTES = 4
_MOST_FDS = 253
"""The kernel passes so many descriptors with one message."""
_MOST_DEATHS = int(posix.environ.get(b"PMEMFS_MOST_DEATHS", 5))
"""What kills daemons on purpose, as tests do, needs more."""
_WITHIN_SECONDS = 60
_OOM = "/proc/self/oom_score_adj"
_NEVER = -1000
_ENDING_SIGNALS = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP)
_NOTHING_STARTED = 127
_ATTEMPTS = 50
_RETRY_SECONDS = 0.1
_FIRST_WORD_MS = 10_000
"""A process that has waited loads nothing before it says something. One that has just been started
may need longer, so it is given any time."""
_PINGS = 4
"""So many in a row without an answer. That they are counted matters after this process itself has
stood still: no time seems to have passed for the daemon then."""


class Keeper:
    """What is kept, and the daemon that it is kept for."""

    def __init__(self, connection: _socket.socket, daemon: int, oom_score: str) -> None:
        self._connection = connection
        self._daemon = daemon
        """A pidfd."""
        self._named = f"the daemon (pid {number_of(daemon)})"
        self._said = posix.memfd_create("pmemfs-said", posix.MFD_CLOEXEC)
        """The standard error of a daemon that was started here, which fails before it has a log if
        its program is incomplete."""
        self._hears = True
        """Whether the daemon may still say something."""
        self._oom_score = oom_score
        self._stored: dict[bytes, tuple[bytes, list[int]]] = {}
        self._items: list[tuple[bytes, tuple[bytes, list[int]]]] = []
        """What a successor is being told of."""
        self._planned: list[bytes] = []
        self._deaths: list[float] = []
        """When daemons died, of late."""
        self._unreported = self._died_ns = 0
        """Deaths that no successor was told of, and when the last one was."""
        self._has_ended = False
        self._hang_ms = self._unanswered = 0
        self._has_spoken = True
        """Whether this daemon has said anything yet."""

    def serve(self) -> None:
        """Keep the mount until it has ended or can't be kept."""
        while not self._has_ended:
            poll = select.poll()
            poll.register(self._daemon, select.POLLIN)
            if self._hears:
                poll.register(self._connection, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(self._hang_ms / _PINGS if self._hang_ms else None)}
            if not ready:
                self._ping()
            # What the daemon said before it died comes first: it may have been `end`.
            while self._hears and self._obey_one():
                pass
            if self._daemon in ready and not self._has_ended:
                self._succeed()
        for name in list(self._stored):
            self._drop(name)
        # The last: the daemon waits for this before it goes on as if nobody else had the pool.
        self._connection.close()

    def _obey_one(self) -> bool:
        """Do what one message says; False if there is none, and none will follow at once."""
        room = _socket.CMSG_SPACE(_MOST_FDS * _FD_BYTES)
        flags = _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
        try:
            message, ancillary, _, _ = self._connection.recvmsg(_MESSAGE_BYTES, room, flags)
        except BlockingIOError:
            return False
        except OSError:
            message, ancillary = b"", []
        if not message:
            # The daemon has closed its end, most likely because it is dying.
            self._hears, self._hang_ms = False, 0
            return False
        fds = [
            int.from_bytes(data[at : at + _FD_BYTES], sys.byteorder)
            for _, _, data in ancillary
            for at in range(0, len(data), _FD_BYTES)
        ]
        verb, _, rest = message.partition(b"\0")
        name, _, data = rest.partition(b"\0")
        self._unanswered = 0
        if not self._has_spoken:
            self._has_spoken, self._hang_ms = True, 0
        if verb == b"store":
            self._drop(name)
            self._stored[name] = (data, fds)
        elif verb == b"drop":
            self._drop(name)
        elif verb == b"get":
            self._answer(int(name))
        elif verb == b"replace":
            self._planned = rest.split(b"\0")
        elif verb == b"watch":
            self._hang_ms = int(rest)
        elif verb == b"end":
            self._has_ended = True
        return not self._has_ended

    def _answer(self, number: int) -> None:
        """Send one of the items to a successor: first what is known here, then what is stored."""
        message, fds = b"all", list[int]()
        if not number:
            # Once, because there may be thousands of pins. A successor stores nothing meanwhile.
            self._items = list(self._stored.items())
            message = b"keeper\0%d %d %d" % (posix.getpid(), self._unreported, self._died_ns)
        elif number <= len(self._items):
            name, (data, fds) = self._items[number - 1]
            message = name + b"\0" + data
        else:
            self._items = []
            self._unreported = 0
        send(self._connection, message, fds)

    def _ping(self) -> None:
        """Nothing was said for a while: ask the daemon whether it lives, or end what does not."""
        if self._unanswered < _PINGS:
            self._unanswered += 1
            # A successor expects nothing before it has asked for what is stored.
            if self._has_spoken:
                send(self._connection, b"ping", [])
            return
        self.say(f"{self._named} has said nothing for {self._hang_ms / 1000:g} s, and is killed")
        self._hang_ms = 0
        _signal.pidfd_send_signal(self._daemon, _signal.SIGKILL)

    def _drop(self, name: bytes) -> None:
        _, fds = self._stored.pop(name, (b"", []))
        for fd in fds:
            posix.close(fd)

    def _succeed(self) -> None:
        """The daemon has died: start its successor, or give up."""
        end = end_of(self._daemon)
        posix.close(self._daemon)
        # What takes over says when it is to be watched.
        self._hang_ms, self._has_spoken = 0, True
        words, self._planned = self._planned, []
        is_planned = bool(words)
        if not is_planned:
            now = time.monotonic()
            self._deaths = [then for then in self._deaths if then > now - _WITHIN_SECONDS] + [now]
            self.say(f"{self._named} {end}{self._last_words()}")
            self._unreported += 1
            self._died_ns = time.time_ns()
            if len(self._deaths) > _MOST_DEATHS:
                self._give_up(f"its daemon has died {len(self._deaths)} times within a minute")
                return
            if b"arguments" not in self._stored:
                self._give_up("its daemon has died while it was still being made")
                return
            words = self._stored[b"arguments"][0].split(b"\0")
        self._connection.close()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._hand_over(words, is_planned=is_planned)
                return
            except OSError as error:
                if attempt == _ATTEMPTS:
                    self._give_up(f"no other daemon could be started: {error.strerror}")
            # Whoever lacks memory or processes now may have them soon, now that a daemon is gone.
            time.sleep(_RETRY_SECONDS)

    def _hand_over(self, words: list[bytes], *, is_planned: bool) -> None:
        """Have another process be the daemon. Raises OSError."""
        self._connection, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        self._hears = True
        posix.ftruncate(self._said, 0)
        posix.lseek(self._said, 0, 0)
        program = ""
        try:
            self._daemon = -1 if is_planned else self._hand_to_standby(theirs)
            if self._daemon < 0:
                self._daemon = self._start(words, theirs.fileno())
                program = f", {words[0].decode(errors='surrogateescape')}"
            else:
                # It may stand still, such as by SIGSTOP. Then nobody would serve, for ever.
                self._has_spoken, self._unanswered, self._hang_ms = False, 0, _FIRST_WORD_MS
        finally:
            theirs.close()
        self._named = f"the daemon (pid {number_of(self._daemon)}{program})"

    def _last_words(self) -> str:
        """The last line that the daemon has said of its end, if it was started here."""
        said = posix.pread(self._said, _MESSAGE_BYTES, 0).decode(errors="replace").split("\n")
        lines = [line.strip() for line in said if line.strip()]
        return f": {lines[-1]}" if lines else ""

    def _hand_to_standby(self, theirs: _socket.socket) -> int:
        """Tell the process that waits to become the daemon; its pidfd, or -1 if none waits."""
        if b"standby" not in self._stored:
            return -1
        _, (standby, pidfd) = self._stored.pop(b"standby")
        end = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, standby)
        has_it = send(end, b"takeover", [theirs.fileno()])
        end.close()
        if has_it:
            return pidfd
        posix.close(pidfd)
        return -1

    def _start(self, words: list[bytes], fd: int) -> int:
        """Start a daemon with these words and its end of the socket; its pidfd. Raises OSError."""
        pid = posix.fork()
        if pid:
            return posix.pidfd_open(pid)
        try:
            with open(_OOM, "w") as file:
                file.write(self._oom_score)
            for number in _ENDING_SIGNALS:
                _signal.signal(number, _signal.SIG_DFL)
            posix.set_inheritable(fd, True)
            posix.dup2(self._said, 2)
            posix.execve(words[0], [*words, b"--takeover", b"%d" % fd], posix.environ)
        finally:
            posix._exit(_NOTHING_STARTED)

    def _give_up(self, why: str) -> None:
        self.say(f"the mount ends: {why}")
        self._has_ended = True

    def say(self, sentence: str) -> None:
        """Write a line to the log of the daemons, if that takes it at once.

        The log may be on a full disk, or a pipe that nobody reads any more. The mount must neither
        end nor wait because of that.
        """
        template, fds = self._stored.get(b"log", (b"", []))
        now = time.time()
        seconds = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        stamp = f"{seconds},{int(now % 1 * 1000):03d}"
        line = template.decode(errors="surrogateescape").format(
            time=stamp, pid=posix.getpid(), message=sentence
        )
        for fd in fds:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            try:
                if poll.poll(0):
                    posix.write(fd, line.encode(errors="backslashreplace"))
            except OSError:
                pass


def send(end: _socket.socket, message: bytes, fds: list[int]) -> bool:
    """Send a message with descriptors; False if nobody is there to take it."""
    packed = b"".join(fd.to_bytes(_FD_BYTES, sys.byteorder) for fd in fds)
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if fds else []
    try:
        end.sendmsg([message], ancillary, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


def number_of(pidfd: int) -> int:
    """The number of a process; -1: it has ended already."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        for line in file:
            if line.startswith("Pid:"):
                return int(line[4:])
    return -1


def end_of(pidfd: int) -> str:
    """How a process has ended, in words, as far as its parent is this one."""
    try:
        end = posix.waitid(posix.P_PIDFD, pidfd, posix.WEXITED)
    except ChildProcessError:
        return "has died"
    if end is None or end.si_code != posix.CLD_EXITED:
        return f"was ended by signal {name_of(end.si_status if end else 0)}"
    return f"has ended with status {end.si_status}"


def name_of(number: int) -> str:
    """What a signal is called."""
    for name, value in vars(_signal).items():
        if name.startswith("SIG") and name[3] != "_" and value == number:
            return str(name)
    return str(number)


def become_unlikely_to_be_killed() -> str:
    """Outlive what ends the daemon; the score for the daemons that are started here."""
    for number in _ENDING_SIGNALS:
        _signal.signal(number, _signal.SIG_IGN)
    # The daemon has blocked them for the time until now.
    _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
    with open(_OOM) as file:
        score = file.read()
    try:
        with open(_OOM, "w") as file:
            file.write(str(_NEVER))
    except OSError:
        # Only root may.
        pass
    return score


def main() -> None:
    """Keep a mount until it ends."""
    # The place of pmemfs comes first, which this process has no use for.
    connection, daemon = map(int, sys.argv[2:])
    posix.set_inheritable(connection, False)
    posix.set_inheritable(daemon, False)
    keeper = Keeper(
        _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, connection),
        daemon,
        become_unlikely_to_be_killed(),
    )
    try:
        keeper.serve()
    except Exception as error:
        keeper.say(f"the keeper failed: {type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()
