from typing_extensions import Buffer

def pin_ends() -> tuple[int, int]: ...
def known_of(fd: int) -> tuple[int, int, int, int]: ...

class Tally:
    pins: int
    mappings: int
    mapped_bytes: int

class PinEnd:
    def __init__(self, fd: int, tally: Tally, *, speaks: bool) -> None: ...
    def end(self) -> None: ...
    def taint(self) -> None: ...
    def fileno(self) -> int: ...

class Descriptor:
    number: int
    def __init__(self, number: int) -> None: ...
    @staticmethod
    def opened(path: str, flags: int, permissions: int = 0o666) -> Descriptor: ...
    def close(self) -> None: ...

class Words:
    def __init__(self, fd: int) -> None: ...
    def read(self, place: int) -> int: ...

class Addresses:
    length: int
    about: object
    def __init__(
        self,
        fd: int,
        pieces: list[tuple[int, int, int]],
        *,
        lead: int,
        length: int,
        unit: int,
        shift: int,
        prot: int,
        flags: int,
        held: PinEnd | None,
        tally: Tally,
        about: object,
    ) -> None: ...
    @property
    def is_shown(self) -> bool: ...
    def force(self) -> None: ...

class Shown(Buffer):
    memory: Addresses
    def __init__(self, memory: Addresses) -> None: ...
