from typing_extensions import Buffer

class StoredInodes:
    def __init__(self, memory: Buffer, first_pfn: int, sparse_fd: int = -1) -> None: ...
    def pack(
        self,
        directory: int,
        words: dict[bytes, int],
        names: list[bytes],
        start: int,
        answer: bytearray,
        room: int,
        valid_seconds: int,
    ) -> tuple[int, bool]: ...
    def look_up(
        self, directory: int, words: dict[bytes, int], name: bytes, valid_seconds: int
    ) -> bytes | None: ...

def hold_listed(counts: Buffer, notes: Buffer | None, answer: bytearray, start: int) -> None: ...
