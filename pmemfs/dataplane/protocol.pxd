# The kernel's protocol: from linux/fuse.h, and what the oldest header that we build with lacks.
# Source: include/uapi/linux/fuse.h of Linux 6.18.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "linux/fuse.h" nogil:
    cdef struct fuse_in_header:
        uint32_t len
        uint32_t opcode
        uint64_t unique
        uint64_t nodeid
        uint32_t uid
        uint32_t gid
        uint32_t pid

    cdef struct fuse_out_header:
        uint32_t len
        int32_t error
        uint64_t unique

    cdef struct fuse_attr:
        uint64_t ino
        uint64_t size
        uint64_t blocks
        uint64_t atime
        uint64_t mtime
        uint64_t ctime
        uint32_t atimensec
        uint32_t mtimensec
        uint32_t ctimensec
        uint32_t mode
        uint32_t nlink
        uint32_t uid
        uint32_t gid
        uint32_t rdev
        uint32_t blksize

    cdef struct fuse_attr_out:
        uint64_t attr_valid
        fuse_attr attr

    cdef struct fuse_entry_out:
        uint64_t nodeid
        uint64_t generation
        uint64_t entry_valid
        uint64_t attr_valid
        fuse_attr attr

    cdef struct fuse_create_in:
        uint32_t flags
        uint32_t mode
        uint32_t umask

    cdef struct fuse_mkdir_in:
        uint32_t mode
        uint32_t umask

    cdef struct fuse_rename_in:
        uint64_t newdir

    cdef struct fuse_rename2_in:
        uint64_t newdir
        uint32_t flags

    cdef struct fuse_setattr_in:
        uint32_t valid
        uint64_t atime
        uint64_t mtime
        uint64_t ctime
        uint32_t atimensec
        uint32_t mtimensec
        uint32_t ctimensec
        uint32_t mode
        uint32_t uid
        uint32_t gid

    cdef struct fuse_open_in:
        uint32_t flags

    cdef struct fuse_release_in:
        uint64_t fh

    cdef struct fuse_forget_in:
        uint64_t nlookup

    cdef struct fuse_forget_one:
        uint64_t nodeid
        uint64_t nlookup

    cdef struct fuse_batch_forget_in:
        uint32_t count
        uint32_t dummy

    cdef struct fuse_open_out:
        uint64_t fh
        uint32_t open_flags

    cdef struct fuse_dirent:
        uint64_t ino
        uint64_t off
        uint32_t namelen
        uint32_t type

    cdef struct fuse_direntplus:
        fuse_entry_out entry_out
        fuse_dirent dirent

    cdef struct fuse_read_in:
        uint64_t fh
        uint64_t offset
        uint32_t size
        uint32_t flags

    cdef struct fuse_write_in:
        uint64_t fh
        uint64_t offset
        uint32_t size
        uint32_t write_flags
        uint32_t flags

    cdef struct fuse_write_out:
        uint32_t size

    cdef struct fuse_getxattr_in:
        uint32_t size

    cdef struct fuse_lseek_in:
        uint64_t fh
        uint64_t offset
        uint32_t whence

    cdef struct fuse_lseek_out:
        uint64_t offset

    enum:
        FATTR_MODE
        FATTR_UID
        FATTR_GID
        FATTR_SIZE
        FATTR_ATIME
        FATTR_MTIME
        FATTR_CTIME
        FUSE_WRITE_CACHE
        FUSE_LOOKUP
        FUSE_SETATTR
        FUSE_GETXATTR
        FUSE_OPEN
        FUSE_RELEASE
        FUSE_OPENDIR
        FUSE_READDIR
        FUSE_READDIRPLUS
        FUSE_RELEASEDIR
        FUSE_FORGET
        FUSE_MKDIR
        FUSE_UNLINK
        FUSE_RMDIR
        FUSE_RENAME
        FUSE_CREATE
        FUSE_RENAME2
        FUSE_GETATTR
        FUSE_READ
        FUSE_WRITE
        FUSE_FSYNC
        FUSE_FLUSH
        FUSE_INIT
        FUSE_INTERRUPT
        FUSE_BATCH_FORGET
        FUSE_FALLOCATE
        FUSE_LSEEK
        FUSE_SYNCFS

cdef extern from "protocol.h" nogil:
    cdef struct uring_entry_t "pmemfs_uring_entry":
        uint64_t flags
        uint64_t commit_id
        uint32_t payload_sz

    cdef struct uring_header_t "pmemfs_uring_header":
        char in_out[128]
        char op_in[128]
        uring_entry_t entry

    cdef struct uring_command_t "pmemfs_uring_command":
        uint64_t flags
        uint64_t commit_id
        uint16_t qid

    enum:
        NOTIFY_RESEND "PMEMFS_NOTIFY_RESEND"
        URING_REGISTER "PMEMFS_URING_REGISTER"
        URING_COMMIT_AND_FETCH "PMEMFS_URING_COMMIT_AND_FETCH"
