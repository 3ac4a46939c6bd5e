"""Each operation of the kernel, once: who asks, on what, with what; and what is answered, typed.

    names  attributes  xattrs  directories  openfiles  ranges  ioctls     the handlers, by subject
    newinode  acl  privileges  flags  patience                            what several of them need

No bytes of the protocol here, no pyfuse3, no descriptors: doors decode and encode (`wiredoor`,
`pyfuse3door`), and decide nothing. What is published and what the kernel is told to forget is done
here, so it is the same whoever called. Invariants:
- each entry that is answered holds its inode once, until the kernel forgets it;
- a handler that answers at once awaits nothing between looking and answering, so no other request
  comes between; one that has to wait answers with a coroutine, and costs a task only then;
- reading an attribute or a name stores nothing; reading a directory, a link or a file at most when
  it was accessed.
"""
