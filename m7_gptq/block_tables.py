"""The block tables of all running sequences as one array, brought up to date entry by entry.

A step needs the tables of its batch as an array, and building that from lists costs time for every
block of every sequence. A table only ever changes at its end: a sequence takes one more block, or
copies the one it is about to write to. So each sequence keeps a row here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class BlockTableArray:
    """One row for each row of the sampler.

    Args:
        max_blocks: most blocks of a sequence.
    """

    def __init__(self, max_blocks: int) -> None:
        self._array = np.zeros((64, max_blocks), dtype=np.int32)
        self._lens = np.zeros(64, dtype=np.int64)

    def write(self, row: int, table: Sequence[int]) -> None:
        """Replace a row by a table."""
        while row >= len(self._lens):
            self._array = np.concatenate([self._array, np.zeros_like(self._array)])
            self._lens = np.concatenate([self._lens, np.zeros_like(self._lens)])
        self._array[row, : len(table)] = table
        self._lens[row] = len(table)

    def update(self, row: int, table: Sequence[int]) -> None:
        """Take over what may have changed in a decode step: the last block, or one more."""
        if len(table) != self._lens[row]:
            self._array[row, self._lens[row] : len(table)] = table[self._lens[row] :]
            self._lens[row] = len(table)
        self._array[row, len(table) - 1] = table[-1]

    def update_last(self, rows: np.ndarray, tables: Sequence[Sequence[int]]) -> None:
        """``update`` for many rows at once, if no table has become longer by more than a block."""
        self._lens[rows] = [len(table) for table in tables]
        self._array[rows, self._lens[rows] - 1] = [table[-1] for table in tables]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The tables of some rows, ``[B, longest]`` int32; entries past a table's end are void."""
        return self._array[rows, : self._lens[rows].max()]
