"""A worker and an entry of a ring without a kernel, to study or test, in this process.

A `Responder` does for its caller what a worker does for a transport. A request that would be
forwarded comes back with that verdict. A `RingEntry` does what the kernel, a worker and whoever
replies do to an entry, and what a data plane does that finds it.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINVAL
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME

from pmemfs.dataplane.entries cimport *
from pmemfs.dataplane.logs cimport *
from pmemfs.dataplane.memory cimport catch_faults, now_ns
from pmemfs.dataplane.names cimport RECORDED_FENCE, RECORDED_FLUSH, known_t, recorder_t
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *

import os

cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

_OUTLOOKS = {REGISTER_ENTRY: "register", COMMIT_AGAIN: "commit again", SERVE_LEFT: "serve",
             HAND_LEFT: "hand over again", FAIL_LEFT: "fail"}
_VERDICTS = {ANSWER: "answer", FORWARD: "forward", SYNC: "sync", DROP: "drop"}


# A request of a series, and what became of it.
cdef struct series_t:
    const uint8_t *operation
    uint32_t operation_bytes
    const uint8_t *payload
    uint32_t payload_bytes
    uint8_t *answer
    uint32_t answer_bytes
    int error
    verdict_t verdict


cdef class Responder:
    """Worker `number` of a data plane. Only one thread at a time may use it.

    `points` says whether an answer may point into the pool itself, as with the transport fd. On the
    socket `forward_fd` it wakes the control plane; with -1 nobody hears that.
    """

    cdef plane_t _plane
    cdef worker_t _worker
    cdef uint8_t *_answer
    cdef bint _points
    cdef recorder_t _recorder
    cdef uint8_t *_recorded

    def __init__(self, int shared_fd, int pool_fd, int map_flags, uint32_t max_write, *,
                 int number=0, bint points=False, int secrets_fd=-1, int forward_fd=-1) -> None:
        cdef int failed
        memset(&self._plane, 0, sizeof(self._plane))
        self._plane.max_write = max_write
        # Aligned as with the transports, because that decides how fast bytes are copied.
        self._answer = <uint8_t *>aligned_alloc(4096, (max_write + 4095) & ~<uint32_t>4095)
        memset(self._answer, 0, max_write)
        self._points = points
        failed = attach(&self._plane, shared_fd, pool_fd, map_flags) or catch_faults()
        if not failed and secrets_fd >= 0:
            failed = have_secrets(&self._plane, secrets_fd)
        if not failed:
            have_packers(&self._plane)
        if failed:
            raise OSError(failed, os.strerror(failed))
        self._worker.plane = &self._plane
        self._worker.slot = slot_of(&self._plane, number)
        self._worker.forward_fd = self._plane.forward_fd = forward_fd

    def __dealloc__(self) -> None:
        free(self._answer)
        free(self._recorded)
        free_crypt(&self._worker)
        free_unpacker(&self._worker)
        detach(&self._plane)

    def answer(self, bytes operation not None, *, uint32_t opcode, unsigned long long inode,
               bytes payload not None=b"", unsigned long long unique=2, uint32_t uid=0,
               uint32_t gid=0, uint32_t pid=0, bint is_left=False) -> tuple[str, int, bytes]:
        """What becomes of a request: the verdict, the errno, and the bytes of the reply."""
        cdef fuse_in_header head
        cdef request_t request
        cdef verdict_t verdict
        cdef unsigned long long since
        memset(&head, 0, sizeof(head))
        memset(&request, 0, sizeof(request))
        head.opcode, head.nodeid, head.unique = opcode, inode, unique
        head.uid, head.gid, head.pid = uid, gid, pid
        head.len = <uint32_t>(sizeof(head) + len(operation) + len(payload))
        request.head = &head
        request.operation, request.operation_bytes = operation, <uint32_t>len(operation)
        request.payload, request.payload_bytes = payload, <uint32_t>len(payload)
        request.answer, request.answer_room = self._answer, self._plane.max_write
        request.may_point = self._points
        request.is_again, request.is_left = False, is_left
        with nogil:
            since = now_ns(CLOCK_REALTIME)
            self._worker.now_ns = since
            verdict = serve(&self._worker, &request)
        data = request.pointed if request.pointed != NULL else request.answer
        replied = bytes(data[:request.answer_bytes]) if verdict == ANSWER else b""
        release(&self._worker, &request)
        forget_keys(&self._worker)
        self._worker.now_ns = now_ns(CLOCK_REALTIME)
        account(&self._worker, &request, verdict, since)
        return _VERDICTS[verdict], request.error, replied

    def record(self, size_t room=1 << 20, *, uint64_t left_out=0, uint64_t killed_before=0) -> None:
        """Record from now on what is stored of names, without the flush or fence of a number (from
        1 on), and kill this process before a step (from 1 on)."""
        free(self._recorded)
        memset(&self._recorder, 0, sizeof(recorder_t))
        self._recorded = self._recorder.buffer = <uint8_t *>malloc(room)
        self._recorder.room = room
        self._recorder.left_out, self._recorder.killed_before = left_out, killed_before
        self._plane.recorder = &self._recorder

    def recorded(self) -> tuple[list, int, int]:
        """What was recorded: stores as their offset and bytes, flushes as offset and length, and
        fences as None; how many flushes and fences there were, and steps."""
        cdef size_t at = 0
        cdef uint64_t *words
        cdef list calls = []
        if self._recorder.length > self._recorder.room:
            raise MemoryError(self._recorder.length)
        while at < self._recorder.length:
            words = <uint64_t *>(self._recorded + at)
            at += 24
            if words[0] == RECORDED_FENCE:
                calls.append(None)
            elif words[0] == RECORDED_FLUSH:
                calls.append((words[1], words[2]))
            else:
                calls.append((words[1], bytes(self._recorded[at:at + words[2]])))
                at += (words[2] + 7) & ~<size_t>7
        return calls, self._recorder.count, self._recorder.steps

    def take_hot(self) -> list[tuple[int, int]]:
        """The inodes and indexes of pieces that were found hot since the last call."""
        cdef unpacker_t *unpacker = self._worker.unpacker
        cdef uint32_t number
        if unpacker == NULL:
            return []
        hot = [(unpacker.hot[number].inode, unpacker.hot[number].index)
               for number in range(unpacker.hot_count)]
        unpacker.hot_count = 0
        return hot

    def answer_series(self, list operations not None, *, uint32_t opcode, unsigned long long inode,
                      list payloads=None, uint32_t room=4096, int turns=1) -> tuple[int, list]:
        """Answer requests of one kind one after another, as fast as a ring's worker does, with no
        interpreter in between, all of them `turns` times. The ns that took, and what `answer` would
        say of each in the last turn. A reply has at most `room` bytes.

        While it runs, other threads run, too.
        """
        cdef size_t count = <size_t>len(operations)
        cdef series_t *series = <series_t *>calloc(count + 1, sizeof(series_t))
        cdef uint8_t *answers = <uint8_t *>aligned_alloc(4096, count * room + 4096)
        cdef size_t number
        cdef uint64_t took
        try:
            # As the memory of transports: no page of it is missing any more.
            memset(answers, 0, count * room)
            for number in range(count):
                series[number].operation = operations[number]
                series[number].operation_bytes = <uint32_t>len(operations[number])
                if payloads is not None:
                    series[number].payload = payloads[number]
                    series[number].payload_bytes = <uint32_t>len(payloads[number])
                series[number].answer = answers + number * room
            with nogil:
                took = now_ns(CLOCK_MONOTONIC)
                for _ in range(turns):
                    self.serve_series(series, count, opcode, inode, room)
                took = now_ns(CLOCK_MONOTONIC) - took
            return took, [
                (_VERDICTS[series[number].verdict], series[number].error,
                 bytes(series[number].answer[:series[number].answer_bytes]))
                for number in range(count)
            ]
        finally:
            free(series)
            free(answers)

    def known(self, unsigned long long inode, *, int pieces=1 << 14) -> tuple | None:
        """What this worker knows of an inode, up to date; None: it would hand over. It reads so
        many pieces of a long log at most."""
        cdef known_t *known = self.look_up(inode, pieces)
        if known == NULL:
            return None
        return (known.generation, known.birth_ns, known.head, known.tail, known.slot_count,
                known.log_frame_count, known.live_slots, known.parent,
                (known.mode, known.link_count, known.uid, known.gid, known.size_bytes,
                 known.accessed_ns, known.modified_ns, known.changed_ns, known.device,
                 known.epoch, known.flags),
                known.target_bytes, (known.key, known.key_before), known.is_plain,
                [(known.extents[at].index, known.extents[at].pfn, known.extents[at].frame_count)
                 for at in range(known.extent_count)],
                known.data_frames, known.index.entry_count, known.index.subdirectory_count,
                known.index.capacity)

    def found(self, unsigned long long inode, list names not None) -> list | None:
        """What names of a directory lead to, each an inode, its type and the offset of its record in
        the pool, or None; -1: it would hand over. None in place of the list if it would hand over
        the directory."""
        cdef known_t *known = self.look_up(inode, 1 << 14)
        cdef found_t found
        cdef list answers = []
        if known == NULL:
            return None
        for name in names:
            state = find_entry(&self._worker, known, name, <uint32_t>len(name), &found)
            answers.append((found.inode, found.type, found.record_offset) if state == NAME_FOUND
                           else None if state == NAME_ABSENT else -1)
        return answers

    def change_index(self, unsigned long long inode, bytes name not None,
                     uint64_t record_offset=0, uint8_t type=0) -> bool:
        """Let a name of a directory lead to an ENTRY in the pool, or (0) nowhere, in what is known;
        whether that was done."""
        cdef known_t *known = self.look_up(inode, 1 << 14)
        cdef found_t found
        if known == NULL:
            return False
        if record_offset:
            return index_add(&self._worker, known, name, <uint32_t>len(name), record_offset, type)
        if find_entry(&self._worker, known, name, <uint32_t>len(name), &found) != NAME_FOUND:
            return False
        index_remove(known, &found)
        return True

    def knowing_takes(self, list inodes not None, bytes name=None, int turns=1) -> float:
        """The ns it takes to know one of these inodes that are known, and to find a name in it."""
        cdef size_t count = <size_t>len(inodes)
        cdef uint64_t *numbers = <uint64_t *>calloc(count, 8)
        cdef found_t found
        cdef known_t *known
        cdef uint64_t took
        cdef const uint8_t *wanted = <const uint8_t *>name if name is not None else NULL
        cdef uint32_t length = <uint32_t>len(name) if name is not None else 0
        cdef size_t at
        for at in range(count):
            numbers[at] = inodes[at]
        with nogil:
            took = now_ns(CLOCK_MONOTONIC)
            for _ in range(turns):
                self._plane.names.takes += 1
                for at in range(count):
                    known = know(&self._worker, numbers[at])
                    if wanted != NULL and known != NULL:
                        find_entry(&self._worker, known, wanted, length, &found)
            took = now_ns(CLOCK_MONOTONIC) - took
        free(numbers)
        return took / (<double>turns * count)

    cdef known_t *look_up(self, uint64_t inode, int pieces) noexcept nogil:
        """As an operation does that takes the lock of names: nobody else is there."""
        cdef known_t *known = NULL
        for _ in range(pieces):
            self._plane.names.takes += 1
            self._worker.reads_on = False
            known = know(&self._worker, inode)
            if not self._worker.reads_on:
                break
        return known

    cdef void serve_series(self, series_t *series, size_t count, uint32_t opcode,
                           uint64_t inode, uint32_t room) noexcept nogil:
        cdef fuse_in_header head
        cdef request_t request
        cdef size_t number
        memset(&head, 0, sizeof(head))
        head.opcode, head.nodeid, head.unique = opcode, inode, 2
        for number in range(count):
            if number + 2 * AHEAD < count:
                expect_soon(&self._worker, &head, series[number + 2 * AHEAD].operation)
            if number + AHEAD < count:
                expect(&self._worker, &head, series[number + AHEAD].operation)
            request.head = &head
            request.operation = series[number].operation
            request.operation_bytes = series[number].operation_bytes
            request.payload = series[number].payload
            request.payload_bytes = series[number].payload_bytes
            request.answer, request.answer_room = series[number].answer, room
            request.may_point = self._points
            request.is_again = request.is_left = False
            self._worker.now_ns = now_ns(CLOCK_REALTIME)
            series[number].verdict = serve(&self._worker, &request)
            if request.pointed != NULL:
                memcpy(series[number].answer, request.pointed, request.answer_bytes)
            release(&self._worker, &request)
            series[number].error, series[number].answer_bytes = request.error, 0
            if series[number].verdict == ANSWER:
                series[number].answer_bytes = request.answer_bytes
        forget_keys(&self._worker)


def checksum(bytes data not None, *, bint by_table=False) -> int:
    """The CRC-32C of bytes, as records have it."""
    if by_table:
        return crc_by_table(0, <const uint8_t *>data, <size_t>len(data))
    return crc32c(0, <const uint8_t *>data, <size_t>len(data))


cdef class RingEntry:
    """The only entry of a ring, in memory that may be what a process has left that was killed.

    `memory` has the bytes that `layouts.entries_bytes` says for one queue of one entry.
    """

    cdef Py_buffer _view
    cdef entry_t _entry
    cdef uint32_t _max_write

    def __init__(self, memory, uint32_t max_write) -> None:
        PyObject_GetBuffer(memory, &self._view, PyBUF_WRITABLE)
        if <size_t>self._view.len < entries_bytes_of(1, 1, max_write):
            raise IndexError(self._view.len)
        self._max_write = max_write
        lay_entry(&self._entry, <uint8_t *>self._view.buf,
                  <uint8_t *>self._view.buf + states_bytes_of(1), 0, max_write)

    def __dealloc__(self) -> None:
        PyBuffer_Release(&self._view)

    def deliver(self, bytes head not None, bytes operation not None,
                bytes payload not None) -> None:
        """Store a request as the kernel does, and in its order."""
        cdef uring_header_t *header = self._entry.header
        if (len(head) != sizeof(fuse_in_header) or len(operation) > sizeof(header.op_in)
                or len(payload) > <Py_ssize_t>self._max_write):
            raise IndexError(len(payload))
        memcpy(header.op_in, <const uint8_t *>operation, <size_t>len(operation))
        memcpy(self._entry.payload, <const uint8_t *>payload, <size_t>len(payload))
        header.entry.payload_sz = <uint32_t>len(payload)
        store(&header.entry.commit_id, (<const fuse_in_header *><const uint8_t *>head).unique)
        memcpy(header.in_out, <const uint8_t *>head, sizeof(fuse_in_header))

    def outlook(self) -> str:
        """What a data plane does that finds the entry."""
        return _OUTLOOKS[outlook_of(&self._entry)]

    def request(self) -> tuple[bytes, bytes, bytes]:
        """Head, operation and payload, as a worker has them to serve the request."""
        cdef fuse_in_header head = (<fuse_in_header *>self._entry.header.in_out)[0]
        cdef request_t request
        take_apart(&self._entry, &head, &request, self._max_write)
        return parts_of(&request)

    def request_again(self) -> tuple[bytes, bytes, bytes]:
        """The same, to hand it over once more."""
        cdef fuse_in_header head = (<fuse_in_header *>self._entry.header.in_out)[0]
        cdef request_t request
        take_again(&self._entry, &head, &request, self._max_write)
        return parts_of(&request)

    def serve(self, bytes answer not None, int error=0) -> None:
        """Answer the request as its worker does."""
        cdef fuse_in_header head = (<fuse_in_header *>self._entry.header.in_out)[0]
        cdef request_t request
        take_apart(&self._entry, &head, &request, self._max_write)
        memcpy(request.answer, <const uint8_t *>answer, <size_t>len(answer))
        request.error, request.answer_bytes = error, <uint32_t>len(answer)
        answer_entry(&self._entry, &request)

    def hand_over(self, uint32_t handed_to) -> None:
        """Let somebody else reply."""
        note_pending(&self._entry, self._entry.header.entry.commit_id, handed_to)

    def reply(self, bytes data not None, int error=0) -> None:
        """Reply as somebody else."""
        fill_entry(&self._entry, self._entry.header.entry.commit_id, -error,
                   <const uint8_t *>data, <uint32_t>len(data), self._max_write)

    def commit(self) -> tuple[int, int, bytes]:
        """Put the reply that was prepared in place: number, errno and bytes that the kernel takes
        then."""
        cdef fuse_out_header *out = <fuse_out_header *>self._entry.header.in_out
        put_reply(&self._entry)
        length = self._entry.header.entry.payload_sz
        assert out.len == sizeof(fuse_out_header) + length
        return out.unique, -out.error, bytes(self._entry.payload[:length])


cdef tuple parts_of(request_t *request):
    return (bytes((<const uint8_t *>request.head)[:sizeof(fuse_in_header)]),
            bytes(request.operation[:request.operation_bytes]),
            bytes(request.payload[:request.payload_bytes]))
