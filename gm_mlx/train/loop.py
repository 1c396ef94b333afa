"""One training loop for every stage: AdamW, warm-up and schedule, clipping, data-parallel ranks, resume.

The loop owns no data and no model: it takes a loss and a function from (number, rank, ranks) to a batch. Batches and
random numbers depend on the seed and on a step's number and on nothing else, so where the data and the dice stand *is*
the step number, and a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.train.checkpointing import checkpointed_blocks
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.events import Event, Finished, Watch
from gm_mlx.train.failures import explained, is_lost, no_number
from gm_mlx.train.interrupts import Interrupts
from gm_mlx.train.precision import Masters
from gm_mlx.train.progress import Progress, Window
from gm_mlx.train.ranks import Ranks
from gm_mlx.train.step import Batches, Loss, make_gradient
from gm_mlx.train.store import Store

Describe = Callable[[dict[str, np.ndarray], float], dict[str, Any]]  # (sums of figures, terms) -> JSON values
Validate = Callable[[Any], dict[str, float]]


def train(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    config: TrainConfig,
    folder: Path,
    *,
    identity: Mapping[str, Any] | None = None,
    describe: Describe | None = None,
    validate: Validate | None = None,
    watch: Watch | None = None,
    names: Callable[[int], list[str]] | None = None,
) -> Finished:
    """Train the unfrozen parameters of ``model`` in place.

    Args:
        model: its trainable parameters are what moves. It is trained in training mode and validated in evaluation mode.
        loss: (total, count, figures) of a batch. All are sums over the batch, so that they can be added up over the
            parts of a step and over ranks; the gradient is divided by the sum of the counts. ``figures["positions"]``
            is the number of real positions that went through the decoder.
        batches: this rank's batch of a number; step s takes the numbers ``s * accumulate`` to
            ``(s + 1) * accumulate - 1``.
        config: hyperparameters.
        folder: gets checkpoints and ``log.jsonl``, from rank 0. A run that finds a checkpoint there goes on from it; a
            finished run returns at once.
        identity: what run this is, a JSON table: data, model, adapter. A folder with another identity is refused.
        describe: what the log says of the sums of figures over some steps, and their count.
        validate: figures of the model as it is, with at least "loss". Called on every rank; rank 0's figures count.
        watch: told on rank 0 what happens; see ``Event``.
        names: where the rows of a step come from, for messages.

    Returns:
        How it ended. With ``validate`` and ``config.patience`` the model has the weights of the best validation.

    Raises:
        UserError: the folder belongs to another run; a loss or gradient is no number; there is not enough memory or
            disk. The last checkpoint is whole in any case.
        KeyboardInterrupt: was pressed; the steps that were done are in a checkpoint.
        SystemExit: the system asked the process to end; the same.
    """
    if config.patience and validate is None:
        raise UserError("patience: there is nothing to validate on; hold rows out, or leave patience away")
    mx.reset_peak_memory()
    ranks = Ranks()
    masters = Masters(model, config.precision)
    # With the correction of its first steps, as in the paper and in PyTorch; MLX leaves it out unless told.
    optimizer = optim.AdamW(0.0, list(config.betas), config.eps, config.weight_decay, bias_correction=True)
    optimizer.init(masters.values)
    gradient_of = make_gradient(model, loss, batches, masters, config, ranks)
    progress, saved = Progress(), 0

    def tell(kind: str, figures: dict[str, Any]) -> None:
        if watch is not None and ranks.rank == 0:
            watch(Event(kind, progress.step, config.steps, figures))

    def is_due(every: int) -> bool:
        return progress.step > 0 and (progress.step == config.steps or (every > 0 and progress.step % every == 0))

    def write_log() -> None:
        window = progress.window
        line = {"rate": config.rate(progress.step - 1), **window.means(), "peak_memory_bytes": mx.get_peak_memory()}
        line |= describe(window.arrays(), window.learnt) if describe else {}
        with interrupts.held_back():
            store.log("log", progress.step, line)
            progress.logged, progress.loss, progress.window = progress.step, line["loss"], Window()
        tell("log", line)

    def run_validation() -> None:
        started = time.perf_counter()
        model.eval()
        figures = ranks.table_of_first(validate(model))  # type: ignore[misc]
        model.train()
        with interrupts.held_back():
            best = progress.has_validated(figures["loss"])
            if best:
                store.save_best(masters, progress)
            figures |= {"best": best, "seconds": time.perf_counter() - started}
            store.log("validation", progress.step, figures)
        tell("validation", figures)

    def save() -> None:
        nonlocal saved
        if saved < progress.step:
            path = store.save(masters, optimizer, progress)
            saved = progress.step
            tell("saved", {"path": path})

    with (
        Interrupts() as interrupts,
        _in_training(model, masters, config),
        Store(folder, identity, config, ranks) as store,
    ):
        try:
            progress, found = store.resume(masters, optimizer)
            saved = progress.step
            if found:
                tell("resumed", found)
            while True:
                # What is due after a step comes first, since an interrupt may have left it to the next run.
                if progress.window.steps and is_due(config.log_every):
                    write_log()
                if validate is not None and progress.validated < progress.step and is_due(config.validate_every):
                    run_validation()
                stopped = 0 < config.patience <= progress.waited
                if stopped and progress.window.steps:
                    write_log()
                if stopped or is_due(config.save_every):
                    save()
                if stopped or progress.step == config.steps:
                    break

                started = time.perf_counter()
                gradient = gradient_of(progress.step)
                rate = config.rate(progress.step)
                if not gradient.is_finite:
                    raise no_number(gradient, progress.step, rate, names, store.go_on)
                with interrupts.held_back():
                    optimizer.learning_rate = rate
                    masters.values = optimizer.apply_gradients(gradient.values, masters.values)
                    masters.put()  # now, so that nothing holds the old weights, whose memory the new ones take
                    mx.eval(masters.values, optimizer.state)
                    seconds = time.perf_counter() - started
                    progress.step += 1
                    progress.window.add(gradient, seconds)
                figures = {"loss": gradient.loss, "rate": rate, "gradient_norm": gradient.norm}
                figures |= {"learnt": int(gradient.learnt), "positions": gradient.positions, "seconds": seconds}
                del gradient  # before the next one is made
                tell("step", figures)
        except (KeyboardInterrupt, SystemExit):
            save()
            raise
        except Exception as error:
            if is_lost(error):
                save()
            if (reason := explained(error, progress.step, config, store.go_on)) is not None:
                raise reason from None
            raise
        best = {"best_step": progress.best_step, "best_loss": progress.best_loss}
        if stopped:
            tell("stopped", best)
        restored = config.patience > 0 and progress.best_step is not None
        if restored and progress.best_step != progress.step:
            store.load_best(masters)
        tell("finished", {"loss": progress.loss, **best})
    assert progress.loss is not None  # the last steps are always logged
    return Finished(progress.step, progress.loss, progress.best_step, progress.best_loss, stopped, restored, store.last)


@contextmanager
def _in_training(model: nn.Module, masters: Masters, config: TrainConfig) -> Iterator[None]:
    """A model in training mode, which gets its trained weights in its own dtypes at the end, whatever that is."""
    was_training = model.training
    model.train()
    try:
        with checkpointed_blocks(model, config.checkpoint):
            yield
    finally:
        model.train(was_training)
        masters.finish()
