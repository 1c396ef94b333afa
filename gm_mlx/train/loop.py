"""One training loop for every stage: AdamW, warm-up and cosine, clipping, data-parallel ranks, resume.

The loop owns no data and no model: it takes a loss and a function from (step, rank, ranks) to a batch. A batch depends
on nothing else, so where the data stands *is* the step number, and a resumed run sees what an uninterrupted one sees.

Losses are sums and counts, not means. Ranks add up both and divide once, so N ranks with batches of B take the same
step as one rank with a batch of N * B. (A load-balancing loss is the exception: each rank balances its own share, as in
DeepSpeed.)
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from gm_mlx.errors import UserError

Loss = Callable[[Any, Any], tuple[mx.array, mx.array]]  # (model, batch) -> (sum of losses, number of terms)
Batches = Callable[[int, int, int], Any]  # (step, rank, ranks) -> this rank's share of the step's batch


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of one stage.

    ``warmup`` and ``decay`` are shares of ``steps``: the rate rises, stays, and falls to zero along a cosine. A
    ``decay`` of one leaves nothing between.
    """

    steps: int
    learning_rate: float
    warmup: float = 0.03
    decay: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    log_every: int = 20
    save_every: int = 100

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from zero."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        start = max(warmup, self.steps - round(self.decay * self.steps))
        progress = max(0, step - start) / max(1, self.steps - start)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: nn.Module, loss: Loss, batches: Batches, config: TrainConfig, folder: Path) -> None:
    """Train the unfrozen parameters of ``model`` in place.

    Args:
        model: its trainable parameters are what moves.
        loss: the summed loss of a batch and the number of its terms.
        batches: this rank's batch for a step.
        config: hyperparameters.
        folder: gets ``state.safetensors`` (weights, optimizer, step) and ``log.jsonl``. A run that finds a state there
            goes on from it; a finished run returns at once.

    Raises:
        UserError: the state in ``folder`` belongs to another run.
    """
    group = mx.distributed.init()
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = optim.AdamW(learning_rate=0.0, betas=list(config.betas), weight_decay=config.weight_decay)
    optimizer.init(model.trainable_parameters())
    step = _resume(model, optimizer, config, folder)
    gradients = nn.value_and_grad(model, loss)
    started, seen, window = time.perf_counter(), 0, []
    while step < config.steps:
        (total, count), grads = gradients(model, batches(step, group.rank(), group.size()))
        total, count, grads = _sum_over_ranks((total, count.astype(mx.float32), grads), group)
        grads = tree_map(lambda g: g / count, grads)  # noqa: B023 - called within this turn of the loop
        grads, norm = optim.clip_grad_norm(grads, config.clip)
        optimizer.learning_rate = config.rate(step)
        optimizer.update(model, grads)
        mx.eval(model.trainable_parameters(), optimizer.state, total, count)
        step, seen = step + 1, seen + int(count.item())
        window.append(total.item() / count.item())
        if not math.isfinite(window[-1]):
            raise UserError(f"step {step}: the loss is {window[-1]}; lower the learning rate {config.learning_rate}")
        if group.rank() == 0 and (step % config.log_every == 0 or step == config.steps):
            seconds = time.perf_counter() - started
            _log(
                folder,
                step=step,
                loss=round(sum(window) / len(window), 5),
                rate=config.rate(step - 1),
                gradient_norm=round(norm.item(), 4),
                seconds_per_step=round(seconds / len(window), 3),
                terms=seen,
            )
            started, seen, window = time.perf_counter(), 0, []
        if group.rank() == 0 and (step % config.save_every == 0 or step == config.steps):
            _save(model, optimizer, config, folder, step)


def _sum_over_ranks(tree: Any, group: mx.distributed.Group) -> Any:
    if group.size() == 1:
        return tree
    # One message for all: a ring pays its latency per message, and the small gradients are many.
    flat = _named(tree)
    joined = mx.concatenate([value.reshape(-1).astype(mx.float32) for _, value in flat])
    ends = np.cumsum([value.size for _, value in flat])[:-1].tolist()
    parts = mx.split(mx.distributed.all_sum(joined, group=group), ends)
    return tree_unflatten([(name, part.reshape(value.shape)) for (name, value), part in zip(flat, parts, strict=True)])


def _named(tree: Any) -> list[tuple[str, mx.array]]:
    return tree_flatten(tree)  # type: ignore[return-value]


def _save(model: nn.Module, optimizer: optim.Optimizer, config: TrainConfig, folder: Path, step: int) -> None:
    arrays = _named({"model": model.trainable_parameters(), "optimizer": optimizer.state})
    metadata = {"step": str(step), "config": json.dumps(asdict(config), sort_keys=True)}
    partial = folder / "state.partial.safetensors"
    mx.save_safetensors(str(partial), dict(arrays), metadata)
    os.replace(partial, folder / "state.safetensors")


def _resume(model: nn.Module, optimizer: optim.Optimizer, config: TrainConfig, folder: Path) -> int:
    """Restore the last state, if there is one; returns the number of steps done."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    arrays: dict[str, mx.array]
    metadata: dict[str, str]
    arrays, metadata = mx.load(str(path), return_metadata=True)  # type: ignore[assignment,misc]
    if json.loads(metadata["config"]) != json.loads(json.dumps(asdict(config))):
        raise UserError(f"{path}: was made with other hyperparameters; remove {folder} or restore them to go on")
    tree = tree_unflatten(list(arrays.items()))
    wanted = [name for name, _ in _named(model.trainable_parameters())]
    if sorted(wanted) != sorted(name for name, _ in _named(tree["model"])):
        raise UserError(f"{path}: belongs to another model; remove {folder} to start over")
    model.update(tree["model"])
    optimizer.state = tree["optimizer"]
    mx.eval(model.parameters(), optimizer.state)
    return int(metadata["step"])


def _log(folder: Path, **entry: float) -> None:
    line = json.dumps(entry)
    print(f"{folder.name}: {line}", flush=True)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
