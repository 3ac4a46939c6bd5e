# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The native code of the data plane: one unit of compilation, so that what is hot is inlined.

Its rooms, from the ground up. What is C lies in headers beside them, and the structures that rooms
share are declared in `.pxd` files.

    words       words that another process may be writing
    pages       page structures
    plane       the shared memory as the data plane reads it
    content     READ, WRITE and LSEEK
    durability  FSYNC
    route       which of these answers a request, or who else is to
    transport   what the two transports have in common, and the way to the control plane
    classic     the transport fd
    uring       the transport uring
    process     the threads of a data plane
    responder   a worker without a kernel, for whoever studies or tests
"""

include "words.pxi"
include "pages.pxi"
include "plane.pxi"
include "content.pxi"
include "durability.pxi"
include "route.pxi"
include "transport.pxi"
include "classic.pxi"
include "uring.pxi"
include "process.pxi"
include "responder.pxi"
