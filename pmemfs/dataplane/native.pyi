from typing_extensions import Buffer

def fence() -> None: ...
def load_word(buffer: Buffer, offset: int) -> int: ...
def odd_words(
    buffer: Buffer, offset: int, stride: int, count: int
) -> tuple[tuple[int, int], ...]: ...
def write_seqlocked(buffer: Buffer, offset: int, data: bytes) -> None: ...
def store_word(buffer: Buffer, offset: int, value: int) -> None: ...

class PageAccountant:
    def __init__(self, shared: Buffer, memory: Buffer, sections: Buffer, pool_fd: int) -> None: ...
    def get(
        self,
        pfn: int,
        frame_count: int,
        access: int,
        mapping: int,
        index: int,
        now_ns: int,
    ) -> int: ...
    def put(self, pfn: int, frame_count: int, is_write: bool = False) -> bool: ...
    def enter(self, page: int, page_count: int) -> int: ...
    def clean(self, pfn: int, frame_count: int) -> None: ...
    def begin_persist(self) -> int: ...
    def end_persist(self, epoch: int) -> None: ...
    def begin_drop(self, section: int) -> bool: ...
    def end_drop(self, section: int, is_idle: bool, shared_fd: int) -> bool: ...

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
    has_files: bool,
) -> int: ...

class Responder:
    def __init__(
        self,
        shared_fd: int,
        pool_fd: int,
        map_flags: int,
        max_write: int,
        *,
        number: int = 0,
        points: bool = False,
    ) -> None: ...
    def answer(
        self, operation: bytes, *, opcode: int, inode: int, payload: bytes = b""
    ) -> tuple[str, int, bytes]: ...
