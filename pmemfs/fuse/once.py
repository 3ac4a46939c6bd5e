"""No request is carried out twice, though some are given to the daemon twice.

Requests come again after the data plane or the daemon has died: all that had no answer then. The
kernel gives a request another form of its number (RESENT is set), and takes an answer only in the
latest form. Invariants:
- a request that has a record is answered from it;
- a request that is under way is not begun again; its answer has the latest form of the number;
- an operation of `RECORDED` is recorded before its answer is sent, a failure as well: once the
  caller has seen EEXIST, nobody may make that file for it.

A listing with attributes is an operation of `RECORDED`: it counts its entries as looked up, and the
kernel may have taken the first answer. What only reads, and FORGET, which the kernel never gives
again, have no records.
"""

from __future__ import annotations

from pmemfs.dataplane.answers import Answers, operation_under_way
from pmemfs.dataplane.layouts import AnswerRecord
from pmemfs.fuse.wire import Opcode
from pmemfs.medium.base import Medium
from pmemfs.volume.fs.commits import Commits, Decides

RESENT = 1 << 63
"""FUSE_UNIQUE_RESEND: the bit of a number that is not part of it. Source: fs/fuse/dev.c of
Linux."""
NUMBER = RESENT - 1

_RECORDED = (
    Opcode.LOOKUP, Opcode.SETATTR, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.UNLINK,
    Opcode.RMDIR, Opcode.RENAME, Opcode.LINK, Opcode.OPEN, Opcode.WRITE, Opcode.RELEASE,
    Opcode.SETXATTR, Opcode.REMOVEXATTR, Opcode.OPENDIR, Opcode.RELEASEDIR, Opcode.CREATE,
    Opcode.IOCTL, Opcode.FALLOCATE, Opcode.RENAME2, Opcode.COPY_FILE_RANGE, Opcode.TMPFILE,
    Opcode.COPY_FILE_RANGE_64, Opcode.READDIRPLUS,
)  # fmt: skip
RECORDED = sum(1 << opcode for opcode in _RECORDED)
"""The operations that change something, or count something, as a bitmap of opcodes."""


_DECIDED_BY: dict[int, Decides] = {
    **dict.fromkeys(
        (Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK, Opcode.UNLINK, Opcode.RMDIR,
         Opcode.RENAME, Opcode.RENAME2, Opcode.CREATE, Opcode.TMPFILE),
        Decides.NAMES,
    ),
    Opcode.SETATTR: Decides.ATTRIBUTES,
    Opcode.OPEN: Decides.ATTRIBUTES,
    Opcode.SETXATTR: Decides.XATTRS,
    Opcode.REMOVEXATTR: Decides.XATTRS,
    Opcode.FALLOCATE: Decides.RANGE,
}  # fmt: skip
"""Which commit carries an operation out. Of the others no commit does: begun anew, they come to the
same."""


class Once(Commits):
    """The requests that are under way or were answered, by their numbers (without RESENT)."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.answered = answers.places
        """Whatever is in here has come before."""
        self.waiting: dict[int, int] = {}
        """The latest form of the number of each request that waits."""
        self.begin = operation_under_way.set
        """Is told the number and opcode of an operation of `RECORDED` before it begins."""
        self.record = answers.record
        """Is told the answer of an operation of `RECORDED` before it is sent."""

    def answer_of(self, record: AnswerRecord) -> bytes:
        """The answer in a record."""
        return self.answers.answer_of(record)

    def find(self, number: int) -> AnswerRecord:
        """The record of a request in `answered`."""
        return self.answers.find(number)

    def decides(self, what: Decides, offset: int, value: int) -> None:
        number, opcode = operation_under_way.get()
        if number and _DECIDED_BY.get(opcode) is what:
            self.answers.decide(number, opcode, offset, value)

    def settle(self, medium: Medium) -> list[AnswerRecord]:
        """What an earlier daemon has carried out and not answered. Nothing may have changed in the
        pool since it died, other than by the journal."""
        return self.answers.settle(lambda at: int.from_bytes(medium.read(at, 8), "little"))
