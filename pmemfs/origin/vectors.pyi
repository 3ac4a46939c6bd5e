from collections.abc import Sequence
from typing import Any

class Vectors:
    count: int
    length_bytes: int
    address: int
    first_address: int
    waiter: Any
    is_done: bool
    result: int
    def __init__(self, views: Sequence[memoryview], is_writable: bool, unit: int) -> None: ...
    def advance(self, done_bytes: int) -> None: ...
    def gather(self, address: int) -> None: ...
    def scatter(self, address: int) -> None: ...
