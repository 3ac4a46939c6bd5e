from collections.abc import Sequence
from typing import Any

class Vectors:
    count: int
    length_bytes: int
    waiter: Any
    is_done: bool
    result: int
    def __init__(self, views: Sequence[memoryview], is_writable: bool, unit: int) -> None: ...
    def advance(self, done_bytes: int) -> None: ...
