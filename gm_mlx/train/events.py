"""What a training run tells those who watch it, and what it says at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Event(NamedTuple):
    """Something that happened in a run. Rank 0 tells it; the others are silent.

    ==============  ===========================================================================================
    kind            figures
    ==============  ===========================================================================================
    ``resumed``     ``path``: the checkpoint that it goes on from; ``damaged``: newer ones, which are not whole;
                    ``changed``: by key of ``TrainConfig`` the value before and the one now
    ``step``        ``loss``, ``rate``, ``gradient_norm``, ``learnt`` (terms of the loss), ``positions``, ``seconds``
    ``log``         what a line of ``log.jsonl`` says of the steps since the last one, ``step`` and ``kind`` left out:
                    ``loss``, ``rate``, ``gradient_norm``, ``learnt``, ``positions``, ``seconds``,
                    ``tokens_per_second``, ``peak_memory_bytes`` and what the loss's ``describe`` has to say
    ``validation``  what ``validate`` returned, ``best``: whether its loss is the lowest so far, and ``seconds``
    ``saved``       ``path``: of a checkpoint, now complete
    ``stopped``     ``best_step`` and ``best_loss``: there was nothing better for ``patience`` validations
    ``finished``    ``loss``, ``best_step``, ``best_loss``, as in ``Finished``
    ==============  ===========================================================================================

    Attributes:
        kind: as above.
        step: steps that are done.
        steps: steps of the whole run.
        figures: as above; numbers are Python's own.
    """

    kind: str
    step: int
    steps: int
    figures: dict[str, Any]


Watch = Callable[[Event], object]


class Finished(NamedTuple):
    """How a run ended.

    Attributes:
        step: steps that were done; fewer than ``TrainConfig.steps`` when it stopped early.
        loss: the mean that was logged last.
        best_step: the step of the best validation; None without one.
        best_loss: its loss.
        stopped_early: whether ``patience`` ended it.
        restored_best: whether the model was given back the weights of the best validation.
        checkpoint: the last checkpoint; None on other ranks than 0.
    """

    step: int
    loss: float
    best_step: int | None
    best_loss: float | None
    stopped_early: bool
    restored_best: bool
    checkpoint: Path | None
