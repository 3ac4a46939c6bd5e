# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Memory that others write meanwhile, and memory that may not be there.

Seqlocks: one writer makes a sequence odd, writes the words behind it, and makes it even; a reader
that found it even, and the same before and after, has words that belong together.

Guards: run a function, and survive the SIGBUS of a touch in it.

Poison, a truncated file and a full file system under a hole are all SIGBUS. Invariants: a guarded
function holds no lock and owns nothing when it touches such memory that its caller couldn't put
right; guards don't nest; a SIGBUS outside of a guard kills, as it should. Only a touch ends a guarded
function: the kernel also tells of damage that nobody has touched yet (BUS_MCEERR_AO), and whoever
runs just then is innocent.
Source: sigaction(2), sigsetjmp(3); the mask is not saved, so the handler leaves it alone.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

from pmemfs.medium cimport sigbus

cdef extern from * nogil:
    """
    #include <setjmp.h>
    #include <signal.h>
    #include <stddef.h>

    static __thread sigjmp_buf pmemfs_way_out;
    static __thread volatile sig_atomic_t pmemfs_guarded;
    static __thread void *volatile pmemfs_fault;
    static int pmemfs_catches;

    static void pmemfs_on_fault(int number, siginfo_t *info, void *context) {
        if (pmemfs_is_news(info)) return;
        if (!pmemfs_guarded || !pmemfs_is_touch(info)) {
            pmemfs_pass_on(number, info, context);
            return;
        }
        pmemfs_guarded = 0;
        pmemfs_fault = info->si_addr;
        siglongjmp(pmemfs_way_out, 1);
    }

    static int pmemfs_catch_faults(void) {
        if (pmemfs_catches) return 0;
        pmemfs_catches = 1;
        return pmemfs_handle_sigbus(pmemfs_on_fault);
    }

    __attribute__((noinline))
    static int pmemfs_run_guarded(void (*function)(void *), void *argument) {
        if (sigsetjmp(pmemfs_way_out, 0)) return 0;
        pmemfs_guarded = 1;
        function(argument);
        pmemfs_guarded = 0;
        return 1;
    }

    static size_t pmemfs_fault_address(void) { return (size_t)pmemfs_fault; }
    """
    int pmemfs_catch_faults()
    bint pmemfs_run_guarded(guarded_t function, void *argument)
    size_t pmemfs_fault_address()


cdef bint run_guarded(guarded_t function, void *argument) noexcept nogil:
    """Whether `function(argument)` came to its end; if not, see `fault_address`."""
    return pmemfs_run_guarded(function, argument)


cdef size_t fault_address() noexcept nogil:
    """The address whose touch ended this thread's latest guarded function."""
    return pmemfs_fault_address()


cdef int catch_faults() noexcept nogil:
    """Make guards work in this process; 0, or -1 with errno."""
    return pmemfs_catch_faults()


def load_word(const unsigned char[::1] buffer not None, size_t offset) -> int:
    """A word that another process may be writing; `offset` in bytes, a multiple of eight."""
    if offset % 8 or offset + 8 > <size_t>buffer.shape[0]:
        raise IndexError(offset)
    return load(<const uint64_t *>&buffer[offset])


def fence() -> None:
    """What this thread wrote before is seen by whoever does not see what it reads after."""
    full_fence()


def store_word(unsigned char[::1] buffer not None, size_t offset, uint64_t value) -> None:
    """Write a word that another process may be reading, before anything that is read later."""
    if offset % 8 or offset + 8 > <size_t>buffer.shape[0]:
        raise IndexError(offset)
    store(<uint64_t *>&buffer[offset], value)
    full_fence()


def write_seqlocked(unsigned char[::1] buffer not None, size_t offset,
                    const unsigned char[::1] data not None) -> None:
    """Write what is behind the sequence at `offset`, as its only writer. `offset` in bytes, and the
    length of `data`, are multiples of eight."""
    cdef size_t count = <size_t>data.shape[0] // 8
    cdef size_t position
    cdef uint64_t word
    cdef uint64_t *sequence
    if offset % 8 or data.shape[0] % 8 or offset + 8 + count * 8 > <size_t>buffer.shape[0]:
        raise IndexError(offset)
    sequence = <uint64_t *>&buffer[offset]
    # Odd it is already where a writer was killed.
    put(sequence, sequence[0] | 1)
    full_fence()
    for position in range(count):
        memcpy(&word, &data[position * 8], 8)
        put(&sequence[1 + position], word)
    store(sequence, sequence[0] + 1)


cdef bint read_seqlocked(const uint64_t *sequence, uint64_t *words, size_t count) noexcept nogil:
    """Read what is behind a sequence; False where it is being written, and `words` are of no use."""
    cdef uint64_t before = load(sequence)
    cdef size_t position
    if before & 1:
        return False
    for position in range(count):
        words[position] = peek(&sequence[1 + position])
    full_fence()
    return peek(sequence) == before


def odd_words(const unsigned char[::1] buffer not None, size_t offset, size_t stride,
              size_t count) -> tuple[tuple[int, int], ...]:
    """The odd ones of `count` words that others may be writing, each with its number, as they are
    after a `fence`. `offset` of the first and `stride` in bytes, multiples of eight."""
    cdef size_t number
    cdef uint64_t word
    cdef list found = []
    if offset % 8 or stride % 8 or (count and offset + (count - 1) * stride + 8
                                    > <size_t>buffer.shape[0]):
        raise IndexError(offset)
    full_fence()
    for number in range(count):
        word = load(<const uint64_t *>&buffer[offset + number * stride])
        if word & 1:
            found.append((number, word))
    return tuple(found)
