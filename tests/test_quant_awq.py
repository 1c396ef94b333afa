"""Activation-aware scaling: the same model before quantization, a better one after it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from tensor_tables import model_of, tensors_of

from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.quant.awq import FEWEST_ROWS, awq_scale, channel_scales
from gm_mlx.quant.calibration import LAYERS, Calibration, Sample, calibrate, encode
from gm_mlx.quant.folding import fold_into_norm
from gm_mlx.router import Routing
from gm_mlx.weights import apply_quantization

TABLE = {"group_size": 32, "bits": 3}
SAMPLES = [
    Sample("What colour is the shape in the picture? It is a red circle.", [picture(0)]),
    Sample("Hello world, how many small blue squares are there? " * 2, [picture(1), picture(2)]),
    Sample("A chat between a curious user and an artificial intelligence assistant."),
]
CONFIGS: dict[str, ModelConfig] = {
    "gemma": tiny_config(),
    "gemma, dense": tiny_config(moe=None),
    "gemma, low rank, top-1": tiny_config(moe=MoEConfig(mode="dense", router_rank=2, top_k=1)),
    "gemma, residual": tiny_config(moe=MoEConfig(use_residual=True, norm_topk_prob=False)),
    "llama": tiny_config(norm_plus_one=False, scale_embeddings=False, hidden_act="silu"),
    "stablelm": tiny_config(norm="layer", hidden_act="silu", partial_rotary_factor=0.25, attention_bias="qkv"),
    "parallel": tiny_config(parallel_block=True),
}


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.from_folder(tiny_folder(tmp_path_factory.mktemp("model")))


def outlier_model(config: ModelConfig) -> Model:
    """A model some of whose channels are far louder than others, as those of large language models are."""
    model = tiny_model(config=config)
    text = config.text_config
    random = np.random.default_rng(7)
    for block in model.layers:
        if not text.parallel_block:
            norm = block.post_attention_layernorm
            loud = np.ones(64, np.float32)
            loud[random.choice(64, 5, replace=False)] = 12
            offset = 1 if text.norm == "rms" and text.norm_plus_one else 0
            norm.weight = (offset + norm.weight + (0 if offset else 1)) * mx.array(loud) - offset
        network = block.mlp.switch_mlp if "switch_mlp" in block.mlp else block.mlp
        rows = np.ones(128, np.float32)
        rows[random.choice(128, 6, replace=False)] = 25
        network.up_proj.weight = network.up_proj.weight * mx.array(rows[:, None])
        # What reads loud channels was trained to be quieter about them.
        network.down_proj.weight = network.down_proj.weight / mx.array(rows) ** 0.5
    return model


def read_all(model: Model, processor: Processor) -> tuple[np.ndarray, list[Routing]]:
    """Logits of all samples, [T, V], and where their tokens went."""
    logits, trace = [], []
    for sample in SAMPLES:
        ids, pixels = encode(processor, sample)
        x = model.embed(ids, None if pixels is None else model.encode_images(pixels))
        logits.append(np.array(model.logits(model.hidden(x, trace=trace)))[0])
    return np.concatenate(logits), trace


@pytest.mark.parametrize("name", CONFIGS)
def test_scaled_weights_make_the_same_model(name: str, processor: Processor) -> None:
    model = outlier_model(CONFIGS[name])
    before = tensors_of(model)
    after, report = awq_scale(model.config, before, calibrate(model, processor, SAMPLES), TABLE, num_alphas=6)
    chosen = {(s.part, s.alpha > 0) for s in report.scalings}
    assert ("hidden", True) in chosen
    assert (("input", True) in chosen) == (name != "parallel")
    assert list(after) == list(before)
    changed = {key for key in before if after[key] is not before[key]}
    assert changed
    assert all(".mlp." in key or "post_attention_layernorm" in key for key in changed)
    old, old_trace = read_all(model, processor)
    new, new_trace = read_all(model_of(model.config, after), processor)
    assert np.abs(new - old).max() < 1e-5 * np.abs(old).max()
    for a, b in zip(old_trace, new_trace, strict=True):
        assert np.array_equal(np.array(a.experts), np.array(b.experts))


@pytest.mark.parametrize("name", ["gemma", "gemma, dense", "gemma, residual", "llama", "parallel"])
def test_quantizing_after_scaling_loses_less(name: str, processor: Processor) -> None:
    model = outlier_model(CONFIGS[name])
    tensors = tensors_of(model)
    scaled, report = awq_scale(model.config, tensors, calibrate(model, processor, SAMPLES), TABLE, num_alphas=10)
    for s in report.scalings:
        if s.error_before is not None and s.error_after is not None:
            assert s.error_after <= s.error_before
            assert (s.error_after < s.error_before) == (s.alpha > 0)
    gained = [s.error_after / s.error_before for s in report.scalings if s.error_before and s.error_after]
    assert np.mean(gained) < 0.9
    wanted, _ = read_all(model, processor)
    errors = []
    for weights in (tensors, scaled):
        quantized = model_of(model.config, weights)
        apply_quantization(quantized, TABLE, lambda path: ".mlp." in path)
        errors.append(np.square(read_all(quantized, processor)[0] - wanted).mean())
    assert errors[1] < 0.9 * errors[0]


def test_half_precision_weights_keep_their_dtype_and_the_model_nearly_its_logits(processor: Processor) -> None:
    model = outlier_model(CONFIGS["gemma"])
    before = tensors_of(model, mx.bfloat16)
    after, _ = awq_scale(model.config, before, calibrate(model, processor, SAMPLES), TABLE, num_alphas=6)
    for name, tensor in after.items():
        assert tensor.dtype == ("F32" if name.endswith("mlp.gate.weight") and tensor is not before[name] else "BF16")
    old, _ = read_all(model_of(model.config, before), processor)
    new, _ = read_all(model_of(model.config, after), processor)
    assert np.linalg.norm(new - old) < 0.02 * np.linalg.norm(old)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_and_its_scales_stay_a_product(dtype: mx.Dtype, offset: float) -> None:
    random = np.random.default_rng(0)
    weight = mx.array(random.normal(size=64) * 0.3 + 1 - offset).astype(dtype)
    weight[3] = -offset  # a channel that is switched off
    scales = np.exp(random.normal(size=64)).astype(np.float32)
    folded, true = fold_into_norm(weight, offset, scales)
    assert folded.dtype == dtype
    product = (offset + np.array(folded.astype(mx.float32)).astype(np.float64)) * true
    assert np.allclose(product, offset + np.array(weight.astype(mx.float32)).astype(np.float64), rtol=1e-6, atol=1e-7)
    assert true[3] == 1
    near = np.delete(np.abs(true / scales - 1), 3)
    assert np.median(near) < 0.01


def test_scales_grow_with_the_activations() -> None:
    means = np.array([0.0, 0.01, 1, 1, 50])
    assert np.array_equal(channel_scales(means, 0), np.ones(5))
    scales = channel_scales(means, 0.5)
    assert scales.dtype == np.float32
    assert scales[0] <= scales[1] < scales[2] == scales[3] < scales[4]
    assert scales.max() * scales.min() == pytest.approx(1)
    assert scales[4] / scales[2] == pytest.approx(50**0.5)
    assert np.array_equal(channel_scales(np.zeros(4), 0.7), np.ones(4))


def idle_expert(processor: Processor) -> tuple[Model, Calibration]:
    """A model whose expert 2 in layer 0 never gets a token, and its calibration."""
    model = outlier_model(tiny_config(moe=MoEConfig(top_k=1)))
    weight = np.random.default_rng(1).normal(size=(4, 64))
    weight[2] = weight[[0, 1, 3]].mean(axis=0)  # its logit is between those of the others
    model.layers[0].mlp.gate.weight = mx.array(weight.astype(np.float32))
    calibration = calibrate(model, processor, SAMPLES)
    return model, calibration


def test_an_expert_without_tokens_is_reported_and_left_alone(processor: Processor) -> None:
    model, calibration = idle_expert(processor)
    before = tensors_of(model)
    after, report = awq_scale(model.config, before, calibration, TABLE, num_alphas=4)
    assert report.unused_experts == [(0, 2)]
    assert report.to_dict()["unused_experts"] == [[0, 2]]
    idle = next(s for s in report.scalings if s.expert == 2)
    assert (idle.tokens, idle.alpha, idle.error_before, idle.note) == (0, 0.0, None, "saw no token")
    down = f"{LAYERS}.0.mlp.switch_mlp.down_proj.weight"
    assert mx.array_equal(after[down].read()[2], before[down].read()[2])
    assert not mx.array_equal(after[down].read(), before[down].read())
    # It shares the inputs' scales all the same, and is what it was.
    x = np.random.default_rng(3).normal(size=(9, 64))
    norm = f"{LAYERS}.0.post_attention_layernorm.weight"
    outputs = []
    for tensors in (before, after):
        h = mx.array(x.astype(np.float32)) * (1 + tensors[norm].read())
        gate, up, out = (
            tensors[f"{LAYERS}.0.mlp.switch_mlp.{p}_proj.weight"].read()[2] for p in ("gate", "up", "down")
        )
        outputs.append(np.array((mx.tanh(h @ gate.T) * (h @ up.T)) @ out.T))
    assert np.abs(outputs[1] - outputs[0]).max() < 1e-5 * np.abs(outputs[0]).max()


def test_an_expert_with_few_tokens_is_left_alone(processor: Processor) -> None:
    model = outlier_model(tiny_config())
    calibration = calibrate(model, processor, SAMPLES, max_rows=FEWEST_ROWS - 1)
    before = tensors_of(model)
    after, report = awq_scale(model.config, before, calibration, TABLE)
    assert {s.alpha for s in report.scalings} == {0.0}
    assert all("too few" in s.note or s.note == "saw no token" for s in report.scalings if s.part == "hidden")
    assert all(mx.array_equal(after[name].read(), before[name].read()) for name in before)


def test_layers_that_are_not_quantized_are_not_even_read(processor: Processor) -> None:
    model = outlier_model(tiny_config())
    calibration = calibrate(model, processor, SAMPLES)

    def refuse() -> mx.array:
        raise AssertionError("read")

    tensors = {
        name: tensor if "layers.0" in name else dataclasses.replace(tensor, read=refuse)
        for name, tensor in tensors_of(model).items()
    }
    table: dict[str, Any] = {**TABLE, **{f"{LAYERS}.1.mlp.{p}_proj": False for p in ("gate", "up")}}
    table[f"{LAYERS}.1.mlp.down_proj"] = {"group_size": 64, "bits": 8}
    after, report = awq_scale(model.config, tensors, calibration, table, num_alphas=3)
    assert all(after[name] is tensors[name] for name in tensors if "layers.0" not in name)
    assert {s.note for s in report.scalings if s.layer == 1 and s.part == "hidden"} == {"not quantized, or to 8 bits"}
    json.dumps(report.to_dict())


def test_networks_without_a_gate_are_left_alone(processor: Processor) -> None:
    model = tiny_model(config=tiny_config(gated=False, parallel_block=True, norm="layer"))
    before = tensors_of(model)
    after, report = awq_scale(model.config, before, calibrate(model, processor, SAMPLES), TABLE)
    assert after == before
    assert (report.scalings, len(report.notes)) == ([], 1)


def test_progress_is_told(processor: Processor) -> None:
    model = tiny_model()
    told: list[tuple[str, int, int]] = []
    calibration = calibrate(model, processor, SAMPLES)
    awq_scale(model.config, tensors_of(model), calibration, TABLE, lambda *args: told.append(args), num_alphas=2)
    assert told == [("scale", 1, 2), ("scale", 2, 2)]


def test_a_quantized_model_is_refused(processor: Processor) -> None:
    model = tiny_model()
    calibration = calibrate(model, processor, SAMPLES)
    apply_quantization(model, TABLE)
    with pytest.raises(UserError, match=r"gate_proj\.weight: quantized already"):
        awq_scale(model.config, tensors_of(model), calibration, TABLE)


@pytest.mark.parametrize("config", [tiny_config(moe=None), tiny_config(hidden_size=96)])
def test_another_models_calibration_is_refused(config: ModelConfig, processor: Processor) -> None:
    calibration = calibrate(tiny_model(config=config), processor, SAMPLES[2:])
    model = tiny_model()
    with pytest.raises(UserError, match="the calibration is not of this model"):
        awq_scale(model.config, tensors_of(model), calibration, TABLE)
