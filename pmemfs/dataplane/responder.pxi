"""A worker without a kernel, to study or test: it answers single requests in this process.

It does for its caller what a worker does for a transport. A request that would be forwarded comes
back with that verdict.
"""

from libc.errno cimport EINVAL
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.time cimport CLOCK_REALTIME

from pmemfs.dataplane.memory cimport catch_faults, now_ns
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *

import os

cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

_VERDICTS = {ANSWER: "answer", FORWARD: "forward", SYNC: "sync", DROP: "drop"}


cdef class Responder:
    """Worker `number` of a data plane. Only one thread at a time may use it.

    `points` says whether an answer may point into the pool itself, as with the transport fd.
    """

    cdef plane_t _plane
    cdef worker_t _worker
    cdef uint8_t *_answer
    cdef bint _points

    def __init__(self, int shared_fd, int pool_fd, int map_flags, uint32_t max_write, *,
                 int number=0, bint points=False) -> None:
        cdef int failed
        memset(&self._plane, 0, sizeof(self._plane))
        self._plane.max_write = max_write
        # Aligned as with the transports, because that decides how fast bytes are copied.
        self._answer = <uint8_t *>aligned_alloc(4096, (max_write + 4095) & ~<uint32_t>4095)
        memset(self._answer, 0, max_write)
        self._points = points
        failed = attach(&self._plane, shared_fd, pool_fd, map_flags) or catch_faults()
        if failed:
            raise OSError(failed, os.strerror(failed))
        self._worker.plane = &self._plane
        self._worker.slot = slot_of(&self._plane, number)

    def __dealloc__(self) -> None:
        free(self._answer)
        detach(&self._plane)

    def answer(self, bytes operation not None, *, uint32_t opcode, unsigned long long inode,
               bytes payload not None=b"") -> tuple[str, int, bytes]:
        """What becomes of a request: the verdict, the errno, and the bytes of the reply."""
        cdef fuse_in_header head
        cdef request_t request
        cdef verdict_t verdict
        cdef unsigned long long since
        memset(&head, 0, sizeof(head))
        memset(&request, 0, sizeof(request))
        head.opcode, head.nodeid, head.unique = opcode, inode, 2
        request.head = &head
        request.operation, request.operation_bytes = operation, <uint32_t>len(operation)
        request.payload, request.payload_bytes = payload, <uint32_t>len(payload)
        request.answer, request.answer_room = self._answer, self._plane.max_write
        request.may_point = self._points
        with nogil:
            since = now_ns(CLOCK_REALTIME)
            self._worker.now_ns = since
            verdict = serve(&self._worker, &request)
        data = request.pointed if request.pointed != NULL else request.answer
        replied = bytes(data[:request.answer_bytes]) if verdict == ANSWER else b""
        release(&self._worker, &request)
        self._worker.now_ns = now_ns(CLOCK_REALTIME)
        account(&self._worker, &request, verdict, since)
        return _VERDICTS[verdict], request.error, replied
