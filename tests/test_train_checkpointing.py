"""Gradient checkpointing: the same gradients to the last bit, from less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures import tiny_config, tiny_model
from mlx.utils import tree_flatten
from train_runs import batches, losses, reader, run

from gm_mlx import cpu
from gm_mlx.config import MoEConfig
from gm_mlx.cpu import released
from gm_mlx.decoder import DecoderStack
from gm_mlx.lora.attach import add_lora
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.train import checkpointing
from gm_mlx.train.checkpointing import checkpointed_blocks
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.data import Batch
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.stages import select_stage
from gm_mlx.weights import apply_quantization

Q4 = {"group_size": 32, "bits": 4}
MOE = MoEConfig(aux_loss_coef=0.5)
LORA = LoRAConfig(rank=2, dropout=0.2, router=True)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return reader(tmp_path_factory.mktemp("model"))


def learner(kind: str, **text: Any) -> Model:
    model = tiny_model(config=tiny_config(moe=None if "dense" in kind else MOE, **text))
    if "4 bits" in kind:
        apply_quantization(model, Q4)
    if "fast" in kind:
        cpu.speed_up(model)  # as models on MLX's CPU backend are, which then evaluate as they go
    if "LoRA" in kind or "DoRA" in kind:
        add_lora(model, LoRAConfig(rank=2, dropout=0.2, dora=True) if "DoRA" in kind else LORA)
        for name, array in tree_flatten(model.trainable_parameters()):
            if name.endswith("lora_b"):  # zero at first, so that no gradient would reach A
                _set(model, name, mx.random.normal(array.shape, key=mx.random.key(len(name))) / 8)
    else:
        select_stage(model, 3 if kind == "experts" else 2)
    model.train()
    mx.eval(model.parameters())
    return model


def _set(model: nn.Module, name: str, array: mx.array) -> None:
    model.load_weights([(name, array)], strict=False)


def gradient(model: Model, batch: Batch, on: bool) -> tuple[dict[str, np.ndarray], float]:
    """Gradients and figures of a loss, and the bytes that it took at most."""
    mx.random.seed(5)
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with checkpointed_blocks(model, on):
        (total, _, figures), gradients = nn.value_and_grad(model, AnswerLoss(z_loss_coef=0.1))(model, batch)
        mx.eval(total, figures, gradients)
    found = {f"gradient {name}": np.array(array) for name, array in tree_flatten(gradients)}
    return found | {name: np.array(value) for name, value in figures.items()}, mx.get_peak_memory() - before


@pytest.mark.parametrize(
    "kind",
    [
        "dense",
        "sparse",
        "experts",
        "LoRA",
        "LoRA on 4 bits",
        "fast dense",
        "fast sparse",
        "fast LoRA on 4 bits",
        "fast DoRA on 4 bits",
    ],
)
def test_gradients_are_the_same_bit_for_bit(processor: Processor, kind: str) -> None:
    model = learner(kind)
    batch = batches(processor, rows=6)(0, 0, 1)
    plain, _ = gradient(model, batch, on=False)
    found, _ = gradient(model, batch, on=True)
    assert found.keys() == plain.keys() and any("gradient" in name for name in found)
    assert ("balance" in found) == ("dense" not in kind)
    for name, array in found.items():
        np.testing.assert_array_equal(array, plain[name], err_msg=name)
    routers = [array for name, array in found.items() if ".mlp.gate." in name]
    assert bool(routers) == ("dense" not in kind and "DoRA" not in kind)
    assert all(np.abs(array).max() > 0 for array in routers)


def test_dropout_is_at_work(processor: Processor) -> None:
    """Otherwise the test above would not see that the same inputs are dropped twice."""
    batch = batches(processor)(0, 0, 1)
    model = learner("LoRA")
    dropped, _ = gradient(model, batch, on=True)
    model.eval()
    model.language_model.model.layers[0].train()
    assert any((gradient(model, batch, on=True)[0][name] != array).any() for name, array in dropped.items())


@pytest.mark.parametrize(
    ("kind", "on_cpu", "share"),
    [("dense", False, 0.6), ("sparse", False, 0.6), ("fast dense", True, 0.6), ("fast LoRA on 4 bits", True, 0.6)],
)
def test_takes_less_memory(
    processor: Processor, monkeypatch: pytest.MonkeyPatch, kind: str, on_cpu: bool, share: float
) -> None:
    """Of eight layers; MLX's own count of bytes. A CPU without fast layers stands in for a GPU: all is lazy there."""
    monkeypatch.setattr(checkpointing, "runs_on_cpu", lambda: on_cpu)
    model = learner(kind, num_hidden_layers=8)
    batch = batches(processor, rows=8)(0, 0, 1)
    plain, most = gradient(model, batch, on=False)
    found, less = gradient(model, batch, on=True)
    assert less < share * most
    for name, array in found.items():
        np.testing.assert_array_equal(array, plain[name], err_msg=name)


def test_a_run_is_the_same_run(processor: Processor, tmp_path: Path) -> None:
    for on in (False, True):
        config = TrainConfig(steps=4, learning_rate=1e-2, checkpoint=on, accumulate=2, log_every=1)
        run(learner("fast LoRA on 4 bits"), batches(processor, parts=2), config, tmp_path / str(on))
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_is_on_while_training_only(processor: Processor, tmp_path: Path) -> None:
    model = learner("LoRA")
    stack = model.language_model.model
    usual = DecoderStack.call_block
    with checkpointed_blocks(model):
        assert stack.call_block is not usual
    assert stack.call_block is usual

    def validate(model: Model) -> dict[str, float]:
        model(mx.array([[5, 6, 7]]))  # evaluation mode: nothing to differentiate, nothing to save
        return {"loss": 1.0}

    config = TrainConfig(steps=1, learning_rate=1e-2, checkpoint=True)
    run(model, batches(processor), config, tmp_path, validate=validate)
    assert stack.call_block is usual


def test_released_arrays_are_equal() -> None:
    for dtype in (mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.bool_):
        array = (100 * mx.random.uniform(shape=(3, 5), key=mx.random.key(1)) - 50 * (dtype != mx.uint32)).astype(dtype)
        (found,) = released([array])
        assert found.dtype == dtype and found is not array
        assert mx.array_equal(found, array).item()
