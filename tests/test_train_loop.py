"""The training loop: its arithmetic, its precision, what it tells, how it validates and how it fails."""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from fixtures import tiny_config, tiny_model
from mlx.utils import tree_flatten
from train_runs import LOSS, assert_same, batches, conversations, files, log, losses, reader, run, weights

from gm_mlx.config import MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.lora.attach import add_lora
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.data import Batch, collate
from gm_mlx.train.events import Event
from gm_mlx.train.stages import select_stage
from gm_mlx.weights import apply_quantization

CONFIG = TrainConfig(steps=6, learning_rate=1e-2, log_every=1, save_every=2)
UNBALANCED = tiny_config(moe=MoEConfig(aux_loss_coef=0.0))
DENSE = tiny_config(moe=None)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return reader(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(processor: Processor) -> Callable[[int, int, int], Batch]:
    """Six different batches, made once."""
    make = batches(processor)
    made = [make(number, 0, 1) for number in range(6)]
    return lambda number, rank, ranks: made[number % 6]


def learner(stage: int = 2, **keys: Any) -> Model:
    model = tiny_model(**keys)
    select_stage(model, stage)
    return model


# Arithmetic.


def test_learns(processor: Processor, tmp_path: Path) -> None:
    same = collate(conversations(processor, 4), pad_id=0)
    config = TrainConfig(steps=15, learning_rate=1e-2, log_every=1)
    finished, _ = run(learner(), lambda *_: same, config, tmp_path)
    found = losses(tmp_path)
    assert found[-1] < 0.3 * found[0]
    assert finished.loss == found[-1]


class Line(nn.Module):
    """A model that needs no images: y = W x + b."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.linear.weight = mx.array(np.random.default_rng(0).normal(size=(2, 3)), mx.float32)
        self.linear.bias = mx.array([0.5, -0.25])


def points(number: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng([7, number])
    rows = 3 + number % 3  # so that counts differ
    return random.normal(size=(rows, 3)).astype(np.float32), random.normal(size=(rows, 2)).astype(np.float32)


def squares(model: Line, batch: Any) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
    x, y = (mx.array(part) for part in batch)
    error = (model.linear(x) - y).square()
    return error.sum(), mx.array(len(x)), {"positions": mx.array(2 * len(x)), "by_output": error.sum(axis=0)}


@pytest.mark.parametrize(("clip", "accumulate"), [(0.7, 1), (0.7, 3), (0.0, 2)])
def test_steps_are_pytorchs(tmp_path: Path, clip: float, accumulate: int) -> None:
    """AdamW, its corrections, clipping, the division by all terms of all parts, against torch."""
    config = TrainConfig(
        steps=8, learning_rate=0.05, schedule="linear", warmup=0.3, weight_decay=0.2, betas=(0.8, 0.95), eps=1e-6,
        clip=clip, accumulate=accumulate, log_every=3,
    )  # fmt: skip
    model = Line()
    theirs = torch.nn.Linear(3, 2)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(np.array(model.linear.weight)))
        theirs.bias.copy_(torch.from_numpy(np.array(model.linear.bias)))
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    totals, counts, norms = [], [], []
    for step in range(8):
        parts = [points(number) for number in range(step * accumulate, (step + 1) * accumulate)]
        x, y = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
        optimizer.zero_grad()
        error = (theirs(x) - y).square()
        (error.sum() / len(x)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf).item())
        optimizer.param_groups[0]["lr"] = config.rate(step)
        optimizer.step()
        totals.append(error.sum(dim=0).detach().numpy())
        counts.append(len(x))

    finished, events = run(
        model,
        lambda number, rank, ranks: points(number),
        config,
        tmp_path,
        loss=squares,
        describe=lambda figures, count: {"by_output": (figures["by_output"] / count).tolist()},
    )
    np.testing.assert_allclose(model.linear.weight, theirs.weight.detach(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.linear.bias, theirs.bias.detach(), rtol=1e-4, atol=1e-6)
    steps = [event.figures for event in events if event.kind == "step"]
    np.testing.assert_allclose([step["gradient_norm"] for step in steps], norms, rtol=1e-4)
    np.testing.assert_allclose(
        [step["loss"] for step in steps], [t.sum() / c for t, c in zip(totals, counts, strict=True)], rtol=1e-4
    )
    assert [step["learnt"] for step in steps] == counts
    assert [step["positions"] for step in steps] == [2 * count for count in counts]
    # A line of the log is of the steps since the last one, and the last line of what is left.
    for line, (begin, end) in zip(log(tmp_path), [(0, 3), (3, 6), (6, 8)], strict=True):
        of_outputs = np.sum(totals[begin:end], axis=0) / sum(counts[begin:end])
        assert (line["step"], line["learnt"], line["positions"]) == (end, *(n * sum(counts[begin:end]) for n in (1, 2)))
        np.testing.assert_allclose(line["by_output"], of_outputs, rtol=1e-4)
        np.testing.assert_allclose(line["loss"], of_outputs.sum(), rtol=1e-4)
        np.testing.assert_allclose(line["gradient_norm"], np.mean(norms[begin:end]), rtol=1e-4)
        assert line["rate"] == config.rate(end - 1)
    assert finished.loss == log(tmp_path)[-1]["loss"]


def test_parts_take_the_step_of_the_whole(processor: Processor, tmp_path: Path) -> None:
    models = [learner(config=UNBALANCED) for _ in range(2)]
    for parts, model in zip((1, 4), models, strict=True):
        config = dataclasses.replace(CONFIG, accumulate=parts)
        run(model, batches(processor, parts=parts), config, tmp_path / str(parts))
    np.testing.assert_allclose(losses(tmp_path / "4"), losses(tmp_path / "1"), rtol=1e-4)
    whole = weights(models[0])
    for name, array in weights(models[1]).items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("stage", "learns"),
    [
        (1, ("multi_modal_projector.",)),
        (2, ("multi_modal_projector.", "language_model.")),
        (3, ("language_model.model.layers.0.mlp.",)),
    ],
)
def test_only_what_is_not_frozen_moves(
    data: Callable[..., Batch], tmp_path: Path, stage: int, learns: tuple[str, ...]
) -> None:
    model = learner(stage)  # layer 0 of 2 is sparse
    before = weights(model)
    run(model, data, TrainConfig(steps=2, learning_rate=1e-2), tmp_path)
    for name, array in weights(model).items():
        moved = not np.array_equal(before[name], array)
        assert moved == any(part in name for part in learns), name


def test_nothing_to_train(data: Callable[..., Batch], tmp_path: Path) -> None:
    model = tiny_model()
    model.freeze()
    with pytest.raises(UserError, match="nothing to train"):
        run(model, data, CONFIG, tmp_path)


def test_seeds(data: Callable[..., Batch], tmp_path: Path) -> None:
    """They decide dropout, and dropout is on while training and off for validation."""

    def trained(name: str, seed: int) -> tuple[Model, list[float]]:
        model = tiny_model()
        add_lora(model, LoRAConfig(rank=2, dropout=0.5))
        modes = []

        def validate(model: Model) -> dict[str, float]:
            modes.append(any(module.training for module in model.modules()))
            mx.random.normal((3,))  # what is drawn here changes nothing
            return {"loss": 1.0}

        def loss(model: Model, batch: Batch) -> Any:
            assert all(module.training for module in model.modules())
            return LOSS(model, batch)

        config = dataclasses.replace(CONFIG, seed=seed, validate_every=(1 if name == "again" else 4))
        run(model, data, config, tmp_path / name, validate=validate, loss=loss)
        assert modes and not any(modes)
        assert not model.training  # as it was
        return model, losses(tmp_path / name)

    first, again, other = trained("first", 0), trained("again", 0), trained("other", 1)
    assert first[1] == again[1]
    assert_same(first[0], again[0])
    assert first[1] != other[1]


# Precision.


def test_half_precision_follows_float32(data: Callable[..., Batch], tmp_path: Path) -> None:
    found = {}
    for precision in ("float32", "bfloat16", "float16"):
        model = learner(config=DENSE)
        run(model, data, dataclasses.replace(CONFIG, precision=precision, steps=12), tmp_path / precision)
        found[precision] = losses(tmp_path / precision)
        assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.float32}  # as they were
    assert found["bfloat16"] != found["float32"]
    np.testing.assert_allclose(found["bfloat16"], found["float32"], rtol=0.05)
    np.testing.assert_allclose(found["float16"], found["float32"], rtol=0.01)


def test_the_model_computes_in_the_precision_asked_for(data: Callable[..., Batch], tmp_path: Path) -> None:
    """All that is a float, but for routers, LoRA's factors and what is packed."""
    model = tiny_model(config=tiny_config())
    apply_quantization(model, {"group_size": 32, "bits": 4, "multi_modal_projector.linear_1": False})
    before = weights(model)
    add_lora(model, LoRAConfig(rank=2, router=True))
    seen: dict[str, mx.Dtype] = {}

    def loss(model: Model, batch: Batch) -> Any:
        seen.update({name: array.dtype for name, array in tree_flatten(model.parameters())})
        return LOSS(model, batch)

    run(model, data, dataclasses.replace(CONFIG, precision="bfloat16", steps=1), tmp_path, loss=loss)
    for name, dtype in seen.items():
        packed = name.endswith((".scales", ".biases")) or dtype == mx.uint32
        kept = ".mlp.gate." in name or "lora_" in name or packed
        assert (dtype == mx.bfloat16) != kept, name
    assert seen["language_model.model.norm.weight"] == mx.bfloat16
    after = {name.replace(".base", ""): array for name, array in weights(model).items() if "lora_" not in name}
    assert after.keys() == before.keys()
    for name, array in after.items():  # frozen weights have lost nothing
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_masters_move_by_less_than_a_half_precision_number_can(tmp_path: Path) -> None:
    """A hundred steps of a ten-thousandth: a bfloat16 weight of one would stand still."""

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = mx.ones((4,), mx.bfloat16)

    def loss(model: Weight, batch: Any) -> Any:
        assert model.weight.dtype == mx.bfloat16
        return model.weight.astype(mx.float32).sum(), mx.array(1), {}

    model = Weight()
    config = TrainConfig(steps=100, learning_rate=1e-4, schedule="constant", warmup=0, weight_decay=0, save_every=100)
    run(model, lambda *_: None, config, tmp_path, loss=loss)
    assert model.weight.dtype == mx.bfloat16
    np.testing.assert_allclose(np.array(model.weight.astype(mx.float32)), 0.99, atol=2**-9)
    saved = mx.load(str(tmp_path / "step-000100.safetensors"))
    np.testing.assert_allclose(saved["weights.weight"], 0.99, atol=1e-5)
    assert {array.dtype for array in saved.values()} == {mx.float32}


# Events and the log.


def test_what_a_run_tells(data: Callable[..., Batch], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=5, log_every=2, save_every=3, validate_every=4)
    found = iter([2.0, 3.0])
    finished, events = run(learner(), data, config, tmp_path, validate=lambda model: {"loss": next(found), "rows": 7})
    assert [(event.kind, event.step) for event in events] == [
        ("step", 1), ("step", 2), ("log", 2), ("step", 3), ("saved", 3), ("step", 4), ("log", 4), ("validation", 4),
        ("step", 5), ("log", 5), ("validation", 5), ("saved", 5), ("finished", 5),
    ]  # fmt: skip
    assert all(event.steps == 5 for event in events)
    by_kind = {event.kind: event.figures for event in events}
    assert by_kind["step"].keys() == {"loss", "rate", "gradient_norm", "learnt", "positions", "seconds"}
    assert by_kind["saved"] == {"path": tmp_path / "step-000005.safetensors"}
    assert by_kind["finished"] == {"loss": finished.loss, "best_step": 4, "best_loss": 2.0}
    assert by_kind["log"]["tokens_per_second"] > 0 and by_kind["log"]["peak_memory_bytes"] > 0
    lines = log(tmp_path)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("log", 2), ("log", 4), ("validation", 4), ("log", 5), ("validation", 5)
    ]  # fmt: skip
    assert lines[2] == {"kind": "validation", "step": 4, "loss": 2.0, "rows": 7, "best": True}
    assert lines[4]["best"] is False
    assert lines[0].keys() >= {"loss", "rate", "gradient_norm", "learnt", "positions", "answer_loss", "load_entropy"}
    assert lines[1]["positions"] == sum(int(data(number, 0, 1).real.sum()) for number in (2, 3))
    assert files(tmp_path) == {"log.jsonl", "best.safetensors", "step-000003.safetensors", "step-000005.safetensors"}


def test_losses_are_logged_to_the_last_bit(data: Callable[..., Batch], tmp_path: Path) -> None:
    _, events = run(learner(), data, CONFIG, tmp_path)
    assert losses(tmp_path) == [event.figures["loss"] for event in events if event.kind == "step"]


# Validation and early stopping.


def curve(*values: float) -> Callable[[Model], dict[str, float]]:
    left = iter(values)
    return lambda model: {"loss": next(left)}


def test_stops_early_with_the_best_weights(data: Callable[..., Batch], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=20, validate_every=2, patience=2, schedule="constant", log_every=3)
    model = learner()
    finished, events = run(model, data, config, tmp_path, validate=curve(3.0, 2.0, 2.5, math.nan, 1.0))
    assert (finished.step, finished.best_step, finished.best_loss) == (8, 4, 2.0)
    assert finished.stopped_early and finished.restored_best
    assert [(e.kind, e.step) for e in events[-4:]] == [("log", 8), ("saved", 8), ("stopped", 8), ("finished", 8)]
    assert events[-2].figures == {"best_step": 4, "best_loss": 2.0}
    assert [line["step"] for line in log(tmp_path) if line["kind"] == "log"] == [3, 6, 8]
    best = learner()
    run(best, data, dataclasses.replace(config, steps=4, validate_every=0, patience=0, warmup=0.15), tmp_path / "best")
    assert_same(model, best)
    # It is over: what comes now returns at once, with the same weights.
    again = learner()
    assert run(again, data, config, tmp_path, validate=curve())[0] == finished
    assert_same(again, model)


def test_the_best_weights_are_kept_and_the_last_used_without_patience(
    data: Callable[..., Batch], tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, validate_every=2)
    model, plain = learner(), learner()
    finished, _ = run(model, data, config, tmp_path / "a", validate=curve(1.0, 2.0, 3.0))
    run(plain, data, CONFIG, tmp_path / "b")
    assert_same(model, plain)
    assert (finished.step, finished.best_step, finished.stopped_early, finished.restored_best) == (6, 2, False, False)
    best = mx.load(str(tmp_path / "a" / "best.safetensors"))
    kept = mx.load(str(tmp_path / "b" / "step-000004.safetensors"))
    assert {f"weights.{name}" for name in best} == {name for name in kept if name.startswith("weights.")}


def test_patience_without_validation_is_refused(data: Callable[..., Batch], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to validate on"):
        run(learner(), data, dataclasses.replace(CONFIG, validate_every=2, patience=1), tmp_path)


# Failures.


def spoiled(at: int, what: Callable[[mx.array], mx.array]) -> Any:
    """The answers' loss, but for one batch."""
    calls = iter(range(1000))

    def loss(model: Model, batch: Batch) -> Any:
        total, count, figures = LOSS(model, batch)
        return (what(total) if next(calls) == at else total), count, figures

    return loss


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda total: total * math.nan, "the loss is nan"),
        (lambda total: total + math.inf, "the loss is inf"),
        (lambda total: total + 0 * mx.sqrt(total - mx.stop_gradient(total)), "the gradient is nan"),
    ],
)
def test_no_number(data: Callable[..., Batch], tmp_path: Path, what: Any, said: str) -> None:
    """The run stops before the weights change, and says where, at what rows, and what to do."""
    model = learner()
    names = lambda step: [f"data.jsonl line {step * 10 + row}" for row in range(5)]  # noqa: E731
    with pytest.raises(UserError) as error:
        run(model, data, CONFIG, tmp_path, loss=spoiled(3, what), names=names)
    message = str(error.value)
    assert message.startswith(f"step 4: {said}; use a lower --learning-rate (it is 0.00")
    assert "rows of this step (data.jsonl line 30, data.jsonl line 31, data.jsonl line 32 and 2 more)" in message
    assert message.endswith(f"the last checkpoint is {tmp_path / 'step-000002.safetensors'}")
    assert "\n" not in message
    assert files(tmp_path) == {"log.jsonl", "step-000002.safetensors"}
    three = learner()  # what it was after three steps
    with pytest.raises(KeyboardInterrupt):
        run(three, data, CONFIG, tmp_path / "three", watch=pressed_at(3))
    assert_same(model, three)
    # With a lower rate it goes on from there.
    lower = dataclasses.replace(CONFIG, learning_rate=1e-3)
    _, events = run(learner(), data, lower, tmp_path)
    assert events[0].figures["changed"] == {"learning_rate": (1e-2, 1e-3)}
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_nothing_to_learn(data: Callable[..., Batch], tmp_path: Path) -> None:
    empty = data(0, 0, 1)._replace(learnt=np.zeros_like(data(0, 0, 1).learnt))
    with pytest.raises(UserError, match=r"step 1: nothing in its rows \(a\) .* there is no checkpoint yet$"):
        run(learner(), lambda *_: empty, CONFIG, tmp_path, names=lambda step: ["a"])
    assert files(tmp_path) == {"log.jsonl"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[metal::malloc] Attempting to allocate 28611722496 bytes which is greater than the maximum\n ..."
        ),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU...OutOfMemory)"),
        RuntimeError("[malloc] Unable to allocate 28611722496 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory(data: Callable[..., Batch], tmp_path: Path, error: Exception) -> None:
    def fails(number: int, rank: int, ranks: int) -> Batch:
        if number == 3:
            raise error
        return data(number, rank, ranks)

    with pytest.raises(UserError) as found:
        run(learner(), fails, CONFIG, tmp_path)
    message = str(found.value)
    assert message.startswith("step 4: not enough memory (") and "\n" not in message
    for remedy in ("--batch-size", "--accumulate", "--grad-checkpoint", "--max-length"):
        assert remedy in message
    assert message.endswith("step-000002.safetensors")
    # The first remedy that changes no result: it goes on.
    assert run(learner(), data, dataclasses.replace(CONFIG, checkpoint=True), tmp_path)[0].step == 6


def test_other_errors_are_not_explained_away(data: Callable[..., Batch], tmp_path: Path) -> None:
    def fails(number: int, rank: int, ranks: int) -> Batch:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(learner(), fails, CONFIG, tmp_path)


def test_a_full_disk(data: Callable[..., Batch], tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that has no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills_up(event: Event) -> None:
        if event.kind == "step" and event.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    try:
        with pytest.raises(UserError, match=r"step-000004.safetensors: cannot be written .* make room") as error:
            run(learner(), data, CONFIG, tmp_path, watch=fills_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == {"log.jsonl", "step-000002.safetensors"}
    whole = learner()
    run(whole, data, CONFIG, tmp_path / "whole")
    resumed = learner()
    run(resumed, data, CONFIG, tmp_path)
    assert_same(resumed, whole)
    assert log(tmp_path) == log(tmp_path / "whole")


def pressed_at(step: int, kind: str = "step") -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if (event.kind, event.step) == (kind, step):
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("signals", [(signal.SIGINT,), (signal.SIGTERM,)])
def test_signals_save_what_was_done(data: Callable[..., Batch], tmp_path: Path, signals: tuple[int, ...]) -> None:
    """Sent while a batch is read, so in the middle of step 4."""

    def sends(number: int, rank: int, ranks: int) -> Batch:
        if number == 3 and left:
            os.kill(os.getpid(), left.pop())
        return data(number, rank, ranks)

    left = list(signals)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    whole, model = learner(), learner()
    run(whole, data, CONFIG, tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)) as error:
        run(model, sends, CONFIG, tmp_path / "parts")
    assert signals == (signal.SIGINT,) or error.value.code == 128 + signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert files(tmp_path / "parts") == {"log.jsonl", "step-000002.safetensors", "step-000003.safetensors"}
    model = learner()
    run(model, sends, CONFIG, tmp_path / "parts")
    assert_same(model, whole)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def test_a_signal_waits_while_weights_change(
    data: Callable[..., Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the middle of the optimizer's work, and that is finished first."""
    import mlx.optimizers as optim

    plain = optim.AdamW.apply_single
    count = iter(range(10_000))

    def interrupted(self: Any, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, gradient, parameter, state)

    model = learner()
    at = 2 * len(tree_flatten(model.trainable_parameters())) + 5  # in step 3
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optim.AdamW, "apply_single", interrupted)
        run(model, data, CONFIG, tmp_path / "parts")
    assert "step-000003.safetensors" in files(tmp_path / "parts")
    whole, model = learner(), learner()
    run(whole, data, CONFIG, tmp_path / "whole")
    run(model, data, CONFIG, tmp_path / "parts")
    assert_same(model, whole)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def test_a_second_interrupt_leaves_at_once(
    data: Callable[..., Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the checkpoint of the first one is written: it is not finished, and nothing of it is left."""

    def sync(handle: int) -> None:
        raise KeyboardInterrupt

    def watch(event: Event) -> None:
        if event.kind == "step" and event.step == 3:
            monkeypatch.setattr("gm_mlx.train.checkpoints.os.fsync", sync)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(learner(), data, CONFIG, tmp_path, watch=watch)
    monkeypatch.undo()
    assert files(tmp_path) == {"log.jsonl", "step-000002.safetensors"}


def test_trains_in_another_thread(data: Callable[..., Batch], tmp_path: Path) -> None:
    """Where Python gives no signals, and MLX counts streams and random numbers for each thread."""
    found: list[Any] = []

    def work() -> None:
        model = learner()
        found.append(run(model, data, CONFIG, tmp_path / "thread")[0].step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [6]
    run(learner(), data, CONFIG, tmp_path / "main")
    assert losses(tmp_path / "thread") == losses(tmp_path / "main")
