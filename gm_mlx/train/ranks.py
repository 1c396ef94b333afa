"""Processes that train together, over MLX's distributed engine; one process is a group of its own.

Rank 0 alone reads and writes the run's folder, and the others get from it what they need. So that on several machines
only one needs the folder, and what all must agree on, such as when to stop, cannot come out differently.
"""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map


class Ranks:
    """The group of processes that this one is part of.

    Attributes:
        rank: this process' number; 0 is the one that writes.
        size: number of processes.
    """

    def __init__(self) -> None:
        self._group = mx.distributed.init()
        self.rank, self.size = self._group.rank(), self._group.size()

    def sum(self, tree: Any) -> Any:
        """The sum of all ranks' trees of arrays, in float32; each rank has a tree of the same form."""
        if self.size == 1:
            return tree
        # One message for all: a ring pays its latency per message, and the small arrays are many.
        flat: list[tuple[str, mx.array]] = tree_flatten(tree)  # type: ignore[assignment]
        arrays = [array for _, array in flat]
        joined = mx.concatenate([array.reshape(-1).astype(mx.float32) for array in arrays])
        ends = np.cumsum([array.size for array in arrays])[:-1].tolist()
        sums = iter(mx.split(mx.distributed.all_sum(joined, group=self._group), ends))
        return tree_map(lambda array: next(sums).reshape(array.shape), tree)

    def arrays_of_first(self, tree: Any) -> Any:
        """Rank 0's tree of float32 arrays; the others' have the same form, and their values do not count."""
        if self.size == 1:
            return tree
        # A float32 is not changed by adding zeros.
        return self.sum(tree if self.rank == 0 else tree_map(mx.zeros_like, tree))

    def table_of_first(self, table: Any) -> Any:
        """Rank 0's JSON value, whatever the others have."""
        if self.size == 1:
            return table
        text = json.dumps(table).encode() if self.rank == 0 else b""
        length: Any = mx.distributed.all_sum(mx.array(len(text)), group=self._group).item()
        codes = mx.array(np.frombuffer(text or bytes(length), np.uint8).astype(np.int32))
        return json.loads(bytes(mx.distributed.all_sum(codes, group=self._group).tolist()))  # type: ignore[arg-type]
