"""Each operation of the kernel, once: who asks, for what, with what; and the typed answer.

    names  attributes  xattrs  directories  openfiles  ranges  ioctls     the handlers, by subject
    newinode  acl  privileges  flags  patience                            what several of them need

No bytes of the protocol appear here, no pyfuse3 and no descriptors. The doors (`wiredoor`,
`pyfuse3door`) decode and encode, and decide nothing. What is published and what the kernel is told
to forget is decided here, so it is the same through either door. Invariants:
- each entry in an answer holds its inode once, until the kernel forgets it;
- a handler that answers at once awaits nothing between looking and answering, so no other request
  comes in between. A handler that has to wait answers with a coroutine, and only then costs a task;
- reading an attribute or a name stores nothing. Reading a directory, a link or a file stores at
  most the time of access.
"""
