from typing_extensions import Buffer

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
        self, operation: Buffer, *, opcode: int, inode: int, payload: Buffer = b""
    ) -> tuple[str, int, bytes]: ...
