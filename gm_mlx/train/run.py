"""A run of training, joined up: batches, loss, loop and validation. For ``gm-mlx lora`` and ``train``, and in Python:

model, processor = load_model(folder), Processor.from_folder(folder)
data = prepare(["data.jsonl"], processor, max_length=2048, hold_out=0.05)
add_lora(model, LoRAConfig(rank=8))
config = TrainConfig(steps=num_steps(len(data.train), 8, epochs=3), learning_rate=5e-4)
fit(model, processor, data, config, Path("my-run"), batch_size=8)
save_adapter(model, Path("my-adapter"), base="my-model")
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.events import Finished, Watch
from gm_mlx.train.loader import Loader
from gm_mlx.train.loop import train
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.prepare import Prepared
from gm_mlx.train.validation import Validation


def num_steps(rows: int, batch_size: int, epochs: float) -> int:
    """Steps that take each row so many times."""
    return max(1, math.ceil(epochs * -(-rows // batch_size)))


def fit(
    model: Model,
    processor: Processor,
    prepared: Prepared,
    config: TrainConfig,
    folder: Path,
    *,
    batch_size: int,
    loss: AnswerLoss | None = None,
    identity: Mapping[str, Any] | None = None,
    workers: int = 2,
    limit: int | None = None,
    exact_match: bool = True,
    watch: Watch | None = None,
) -> Finished:
    """Train what of a model is not frozen, in place, on prepared rows; go on where an interrupted run stopped.

    Args:
        model: with LoRA (``lora.attach.add_lora``) or with parts that learn whole (``train.stages.select``).
        processor: the model's.
        prepared: the rows. Those that are held out are validated on, if there are any.
        config: hyperparameters.
        folder: the run's own; see ``loop.train``.
        batch_size: rows of a step. ``config.accumulate`` and several machines share them, and do not add to them.
        loss: by default the answers' loss with the model's own balance of experts.
        identity: what else makes this run what it is, as JSON values, such as the base and the LoRA config. The data,
            the batch size and the loss are in it anyway.
        workers: processes that decode images.
        limit: most rows to validate on.
        exact_match: whether validation lets the model answer, which takes longer than the loss.
        watch: told what happens; see ``events.Event``.

    Returns:
        How it ended.

    Raises:
        UserError, KeyboardInterrupt: as for ``loop.train``.
    """
    loss = loss or AnswerLoss()
    identity = {
        **(identity or {}),
        "data": prepared.train.fingerprint(),
        "held_out": prepared.held_out.fingerprint(),
        "batch_size": batch_size,
        "loss": {"aux_loss_coef": loss.aux_loss_coef, "z_loss_coef": loss.z_loss_coef},
    }
    validate = None
    if len(prepared.held_out):
        validate = Validation(
            prepared.held_out,
            processor,
            batch_size=max(1, batch_size // config.accumulate),
            limit=limit,
            exact_match=exact_match,
            loss=loss,
        )
    with Loader(
        prepared.train, processor, batch_size, parts=config.accumulate, seed=config.seed, workers=workers
    ) as batches:
        return train(
            model,
            loss,
            batches,
            config,
            folder,
            identity=identity,
            describe=loss.describe,
            validate=validate,
            watch=watch,
            names=batches.names,
        )
