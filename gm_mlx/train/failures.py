"""What ends a run, in a line that says where, why, what to do and from where it would go on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from gm_mlx.errors import UserError
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.step import Gradient

FEW = 3  # rows that are named

# Of MLX's and NumPy's messages. Metal: "Attempting to allocate N bytes", "Insufficient Memory", "Resource limit"; CUDA
# and NumPy: "Unable to allocate", "out of memory".
NO_MEMORY = re.compile(r"allocate|out of memory|insufficient memory|resource limit", re.IGNORECASE)
LESS_MEMORY = "a smaller --batch-size, a larger --accumulate, which computes the same batch in smaller parts"
LOST = re.compile(r"connection to a peer was lost|\[(ring|jaccl|mpi|nccl)\]", re.IGNORECASE)


def no_number(
    gradient: Gradient, step: int, rate: float, names: Callable[[int], list[str]] | None, go_on: str
) -> UserError:
    """The error for a step that would make the weights something else than numbers.

    Args:
        gradient: the step's.
        step: counted from zero.
        rate: its learning rate.
        names: where the rows of a step come from.
        go_on: from where a run would go on, as the end of a message.
    """
    rows = f" ({_few(names(step))})" if names else ""
    if not gradient.learnt:
        return UserError(f"step {step + 1}: nothing in its rows{rows} is to be learnt; look at their answers{go_on}")
    what = f"the gradient is {gradient.norm}" if math.isfinite(gradient.loss) else f"the loss is {gradient.loss}"
    return UserError(
        f"step {step + 1}: {what}; use a lower --learning-rate (it is {rate:.3g} here), or look at the rows of this "
        f"step{rows}{go_on}"
    )


def explained(error: Exception, step: int, config: TrainConfig, go_on: str) -> UserError | None:
    """An error of MLX or NumPy in words for a user; None for one that is none of theirs."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(text)):
        recompute = "" if config.checkpoint else ", --grad-checkpoint"
        return UserError(
            f"step {step + 1}: not enough memory ({text or 'MemoryError'}); try {LESS_MEMORY}{recompute} or a smaller "
            f"--max-length{go_on}"
        )
    if is_lost(error):
        return UserError(f"step {step + 1}: another of the machines has stopped; what it says is the reason{go_on}")
    return None


def is_lost(error: Exception) -> bool:
    """Whether an error says that another rank has gone."""
    return isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def _few(names: list[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more
