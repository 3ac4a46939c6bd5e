"""The commands' side of the socket. It loads no trio, because a command should start at once.

The other side may be another user's program, and root asks it as well. Invariants:
- a command sends nothing to and takes nothing from a process that does not belong to the mount's
  owner, as the kernel says. Otherwise any user who gets hold of a socket's name could speak for the
  mount;
- a question ends in time, whatever the other side does, and its answer has a bounded length;
- a daemon may die, and another one take its place, which goes on with the same socket. Who was not
  answered asks that one. A question may have been carried out before, so all that can be asked may
  be asked again. Only if one daemon dies of it after the other, it is a mistake to ask on;
- many daemons are asked at once, in one thread, and their answers are read one after the other. So
  a daemon that says nothing delays no other, and a hundred that say too much take the memory of
  one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import selectors
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

from pmemfs.control import ANSWER_LIMIT_BYTES, peer_pid, peer_pidfd, peer_uid
from pmemfs.control.places import opened_socket
from pmemfs.control.shape import Malformed, decode
from pmemfs.errors import EXIT_FAILED, NoAnswer, PmemfsError
from pmemfs.version import VERSION

ANSWER_TIMEOUT_SECONDS = 20

MOST_DEATHS = 3
"""A question that so many daemons have died with, one after the other, is not asked again."""
DYING_SECONDS = 3.0
"""What a process that has closed its sockets needs to be dead, at most, on a busy machine. If that
is too short, a question is not asked again that its successor would answer."""
_RETRY_SECONDS = 0.02
_CHUNK_BYTES = 64 * 1024
_SENTENCE_LIMIT = 1000
_VERSION_LIMIT = 40

Answer = TypeVar("Answer")
_Wanted = tuple[socket.socket, int] | None
"""What an exchange waits for: an event of its socket, or (None) just a moment."""
_Exchange = Generator[_Wanted, None, tuple[bytes, int]]
"""Its result is the line that was answered, and the process that answered."""


class RemoteError(PmemfsError):
    """{message}"""

    def __init__(self, message: str, exit_code: int, kind: str = "", errno: int = 0) -> None:
        super().__init__(message=message)
        self.exit_code = exit_code
        self.errno = errno or type(self).errno
        self._kind = kind

    @property
    def kind(self) -> str:
        """As the daemon calls it, where it does."""
        return self._kind or super().kind


class Question(NamedTuple):
    """What to ask, and which daemon."""

    path: str | os.PathLike[str]
    """The daemon's socket."""
    owner_uid: int
    method: str
    params: Mapping[str, Any]


def call(
    path: str | os.PathLike[str],
    method: str,
    shape: Callable[[Any], Answer] | None = None,
    *,
    owner_uid: int | None = None,
    timeout_seconds: float = ANSWER_TIMEOUT_SECONDS,
    **params: Any,
) -> Any:
    """Ask a daemon; it must belong to this user unless `owner_uid` names another.

    Raises RemoteError with the daemon's own sentence, and NoAnswer.
    """
    uid = os.geteuid() if owner_uid is None else owner_uid
    question = Question(path, uid, method, params)
    (answer,) = call_all(
        [question],
        lambda result, _: shape(result) if shape else result,
        timeout_seconds=timeout_seconds,
    )
    if isinstance(answer, PmemfsError):
        raise answer
    return answer


def call_all(
    questions: Sequence[Question],
    read: Callable[[Any, list[str] | None], Answer],
    *,
    warn: Callable[[int, str], None] = lambda position, sentence: None,
    timeout_seconds: float = ANSWER_TIMEOUT_SECONDS,
    limit_bytes: int = ANSWER_LIMIT_BYTES,
) -> list[Answer | PmemfsError]:
    """Ask many daemons at once. For each: what `read` makes of its result, or what went wrong.

    `read` raises Malformed for a result that makes no sense, as `decode` does. A daemon of another
    version may leave out what it doesn't know; `warn` is then called with the question's position.
    """
    answers: list[Answer | PmemfsError] = [
        NoAnswer(path=question.path, why="it timed out") for question in questions
    ]
    exchanges = [_exchange(question, limit_bytes) for question in questions]
    for position, ended in _lines(exchanges, time.monotonic() + timeout_seconds):
        path = questions[position].path
        if isinstance(ended, OSError):
            answers[position] = NoAnswer(path=path, why=reason(ended), number=ended.errno)
            continue
        version = VERSION
        try:
            line, pid = ended
            answer = decoded_answer(line)
            version = _version_in(answer)
            missing: list[str] = []
            answers[position] = read(
                result_of(answer, pid), missing if version != VERSION else None
            )
            if missing:
                warn(position, f"it does not say {', '.join(missing)}{_otherness(version)}")
        except Malformed as error:
            why = f"its answer makes no sense: {error}{_otherness(version)}"
            answers[position] = NoAnswer(path=path, why=why)
        except RemoteError as error:
            answers[position] = error
    return answers


def daemon_pidfd(path: str | os.PathLike[str], *, owner_uid: int | None = None) -> int | None:
    """A pidfd of the daemon that listens on a socket, to wait for its end; None if it is gone."""
    uid = os.geteuid() if owner_uid is None else owner_uid
    deadline = time.monotonic() + ANSWER_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        try:
            connection = connected(path, uid)
        except BlockingIOError:
            # Its queue of connections is full.
            pass
        except OSError:
            return None
        else:
            with connection, contextlib.suppress(OSError):
                pidfd = peer_pidfd(connection)
                if not _is_over(pidfd):
                    return pidfd
                os.close(pidfd)
        # It is dead, and its socket is not: another one is about to take its place.
        time.sleep(_RETRY_SECONDS)
    return None


def has_died(pid: int, seconds: float = 0) -> bool:
    """Whether a process is dead, or dies within that time; of one whose number is unknown (0),
    False."""
    if not pid:
        return False
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        return error.errno == errno.ESRCH
    try:
        return _is_over(pidfd, seconds)
    finally:
        os.close(pidfd)


def living_pid(pid: int, path: str | os.PathLike[str], uid: int) -> int:
    """The process that has answered over a connection to this one.

    It may be another one, which has taken the socket over with those that waited. The kernel names
    to them who listened when they connected.
    """
    if has_died(pid):
        with contextlib.suppress(OSError), connected(path, uid) as connection:
            return peer_pid(connection)
    return pid


def _is_over(pidfd: int, seconds: float = 0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def reason(error: OSError) -> str:
    """Why a system call failed, as a part of a sentence."""
    sentence = error.strerror or str(error) or "it failed"
    return sentence[:1].lower() + sentence[1:]


def _exchange(question: Question, limit_bytes: int) -> _Exchange:
    """Ask one question. Never blocks, and raises OSError."""
    for death in range(1, MOST_DEATHS + 1):
        try:
            line, pid = yield from _asked(question, limit_bytes)
            break
        except _HungUp as end:
            deadline = time.monotonic() + DYING_SECONDS
            while not has_died(end.pid):
                if not end.pid or time.monotonic() > deadline:
                    raise
                yield None
            if death == MOST_DEATHS:
                raise
    return line, living_pid(pid, question.path, question.owner_uid)


class _HungUp(ConnectionError):
    """A daemon has closed a connection without an answer."""

    def __init__(self, pid: int) -> None:
        super().__init__("it closed the connection")
        self.pid = pid


def _asked(question: Question, limit_bytes: int) -> _Exchange:
    """Ask one daemon. Raises OSError, and _HungUp if that daemon has not answered."""
    request = {"method": question.method, "params": question.params, "version": VERSION}
    unsent = memoryview(json.dumps(request).encode() + b"\n")
    while True:
        try:
            connection = connected(question.path, question.owner_uid)
            break
        except BlockingIOError:
            # The daemon's queue of connections is full, and no event says when it has room again.
            yield None
    received = bytearray()
    with connection:
        pid = peer_pid(connection)
        try:
            while unsent:
                yield connection, selectors.EVENT_WRITE
                with contextlib.suppress(BlockingIOError):
                    unsent = unsent[connection.send(unsent) :]
            while True:
                yield connection, selectors.EVENT_READ
                chunk = connection.recv(_CHUNK_BYTES)
                end = chunk.find(b"\n")
                received += chunk if end < 0 else chunk[:end]
                if len(received) > limit_bytes:
                    raise OSError(f"its answer is longer than {limit_bytes} bytes")
                if end >= 0:
                    return bytes(received), pid
                if not chunk:
                    raise _HungUp(pid)
        except (BrokenPipeError, ConnectionResetError):
            raise _HungUp(pid) from None


def connected(path: str | os.PathLike[str], uid: int) -> socket.socket:
    """A connection to a process of this user. Raises PermissionError, and OSError."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        with opened_socket(path, uid) as address:
            connection.connect(address)
        # The file's owner says who made the name. What counts is which user listens behind it.
        if peer_uid(connection) != uid:
            raise PermissionError(f"it is a process of user {peer_uid(connection)}, not of {uid}")
    except BaseException:
        connection.close()
        raise
    return connection


def _lines(
    exchanges: Sequence[_Exchange], deadline: float
) -> Iterator[tuple[int, tuple[bytes, int] | OSError]]:
    """The outcomes of exchanges as they end, each with its position; what is late is left out."""
    ready = list(enumerate(exchanges))
    with contextlib.ExitStack() as opened:
        for exchange in exchanges:
            opened.callback(exchange.close)
        selector = opened.enter_context(selectors.DefaultSelector())
        while True:
            later = []
            for position, exchange in ready:
                try:
                    wanted = next(exchange)
                except StopIteration as end:
                    yield position, end.value
                except OSError as error:
                    yield position, error
                else:
                    if wanted is None:
                        later.append((position, exchange))
                    else:
                        selector.register(*wanted, (position, exchange))
            seconds = deadline - time.monotonic()
            if seconds <= 0 or not (later or selector.get_map()):
                return
            events = selector.select(min(seconds, _RETRY_SECONDS) if later else seconds)
            for key, _ in events:
                selector.unregister(key.fileobj)
            ready = later + [key.data for key, _ in events]


def decoded_answer(line: bytes) -> dict[str, Any]:
    """The answer in a line of JSON. Raises Malformed."""
    try:
        answer = _DECODE(line.decode())
    except (ValueError, RecursionError):
        raise Malformed("it is not JSON") from None
    if not isinstance(answer, dict) or len(answer.keys() & {"result", "error"}) != 1:
        raise Malformed("it has neither result nor error")
    return answer


def _version_in(answer: Mapping[str, Any]) -> str:
    """The version of the program that answers; "" if it does not say one."""
    version = answer.get("version")
    return version[:_VERSION_LIMIT] if isinstance(version, str) else ""


def _otherness(version: str) -> str:
    """What to add to a sentence about an answer of another version."""
    if version == VERSION:
        return ""
    whose = f"pmemfs {version}" if version else "another version of pmemfs"
    return f" (the daemon is of {whose}, this command of {VERSION}; mount again to have them alike)"


def result_of(answer: Mapping[str, Any], pid: int) -> Any:
    """The result in an answer. Raises Malformed, and RemoteError."""
    if "result" in answer:
        result = answer["result"]
        if isinstance(result, dict) and "pid" in result:
            # A user may want to end that process, so the kernel's word counts, not the answer's.
            # It is 0 for a process in another pid namespace, whose numbers mean nothing here.
            result["pid"] = pid or None
            if not pid and "data_plane_pid" in result:
                result["data_plane_pid"] = None
                if isinstance(kept := result.get("kept"), dict) and kept.get("keeper_pid"):
                    kept["keeper_pid"] = 0
        return result
    error = decode(_Failure, answer["error"])
    code = error.exit_code if 0 < error.exit_code < 256 else EXIT_FAILED
    kind = error.kind if error.kind.isidentifier() else ""
    raise RemoteError(error.message[:_SENTENCE_LIMIT], code, kind[:_VERSION_LIMIT], error.errno)


class _Failure(NamedTuple):
    message: str
    exit_code: int
    kind: str = ""
    errno: int = 0


def _refuse(word: str) -> NoReturn:
    """Refuse NaN and infinities, which Python reads and JSON does not have."""
    raise ValueError(word)


_DECODE = json.JSONDecoder(parse_constant=_refuse).decode
"""Made once: to make it takes as long as to decode a short answer."""
