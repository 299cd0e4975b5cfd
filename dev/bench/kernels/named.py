"""Cases of suites with several operations: a name and sizes, like ``linear:16x4096x1024``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NamedCase:
    """One operation at one size."""

    measure: str
    sizes: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, names: Sequence[str], letters: str) -> NamedCase:
        """Read ``name:AxBxC``, as many sizes as there are letters.

        Raises:
            ValueError: it is not one of the names, or the sizes are not that many.
        """
        name, _, numbers = text.partition(":")
        sizes = numbers.split("x")
        if name not in names or len(sizes) != len(letters) or not all(
            size.isdecimal() and int(size) for size in sizes
        ):
            raise ValueError(
                f"give {'x'.join(letters)} behind {', '.join(f'{name}:' for name in names)} "
                f"not {text!r}"
            )
        return cls(name, tuple(int(size) for size in sizes))

    def __str__(self) -> str:
        return "x".join(map(str, self.sizes))
