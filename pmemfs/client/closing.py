"""What clients hold until they close it."""

from __future__ import annotations

from typing import Self


class Closing:
    """Something that `with` closes in the end."""

    def close(self) -> None:
        """Let go of it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
