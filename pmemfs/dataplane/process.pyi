def stay_in_memory() -> int: ...
def run(
    fuse_fd: int,
    shared_fd: int,
    pool_fd: int,
    forward_fd: int,
    raw_fds: list[int],
    *,
    map_flags: int,
    max_write: int,
    max_background: int,
    queue_count: int,
    depth: int,
    reader_count: int,
    dont_mask: bool,
) -> int: ...
