"""LoRA merged into a base model, against the same sums in PyTorch in float64."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from gm_mlx.convert.lora import merge_lora
from gm_mlx.errors import UserError
from gm_mlx.tensors import Tensor

FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
CONFIG = {"peft_type": "LORA", "lora_alpha": 6, "r": 3}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + math.prod(shape))).to(dtype)


def wrap(tensors: dict[str, torch.Tensor]) -> dict[str, Tensor]:
    def tensor(value: torch.Tensor) -> Tensor:
        def read() -> mx.array:
            array = mx.array(value.float().numpy())
            return array.astype({"F16": mx.float16, "BF16": mx.bfloat16}.get(FLOATS[value.dtype], array.dtype))

        return Tensor(FLOATS[value.dtype], tuple(value.shape), read)

    return {name: tensor(value) for name, value in tensors.items()}


def values(tensor: Tensor) -> np.ndarray:
    array = tensor.read()
    assert array.shape == tensor.shape
    return np.array(array.astype(mx.float32))


BASE = {
    "model.embed_tokens.weight": random(8, 4),
    "model.layers.0.self_attn.q_proj.weight": random(5, 4),
    "model.layers.0.self_attn.o_proj.weight": random(4, 5),
    "model.layers.0.self_attn.o_proj.bias": random(4),
    "model.norm.weight": random(4),
}
A, B = random(3, 4, seed=1), random(5, 3, seed=2)
Q = "model.layers.0.self_attn.q_proj"


def factors(module: str = Q, prefix: str = "base_model.model.", adapter: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{module}.lora_A{adapter}.weight": A, f"{prefix}{module}.lora_B{adapter}.weight": B}


def expected(scale: float = 2.0) -> np.ndarray:
    return (BASE[f"{Q}.weight"].double() + scale * B.double() @ A.double()).numpy()


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 6 / 3),
        ({"use_rslora": True}, 6 / math.sqrt(3)),
        ({"alpha_pattern": {"q_proj": 12}}, 12 / 3),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 12, "q_proj": 24}}, 12 / 3),
        ({"alpha_pattern": {"layers.1.*q_proj": 12, "proj": 24}}, 6 / 3),  # whole names, as peft matches them
        ({"alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 12}, "use_rslora": True}, 12 / math.sqrt(3)),
        ({"rank_pattern": {"q_proj": 3}, "r": 64}, 6 / 3),  # the rank is the factors' own
        ({"lora_alpha": 1.5}, 0.5),
    ],
)
@pytest.mark.parametrize("adapter", ["", ".default"])
def test_the_scale(config: dict[str, Any], scale: float, adapter: str) -> None:
    merged = merge_lora(wrap(BASE), wrap(factors(adapter=adapter)), CONFIG | config, {})
    assert merged.keys() == BASE.keys()
    np.testing.assert_allclose(values(merged[f"{Q}.weight"]), expected(scale), rtol=1e-5, atol=1e-6)
    for name in BASE.keys() - {f"{Q}.weight"}:
        np.testing.assert_array_equal(values(merged[name]), BASE[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computed_in_float32_with_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    base = {f"{Q}.weight": BASE[f"{Q}.weight"].to(dtype)}
    lora = {name: (value * 1e-2).to(dtype) for name, value in factors().items()}
    merged = merge_lora(wrap(base), wrap(lora), CONFIG, {})[f"{Q}.weight"]
    assert merged.dtype == FLOATS[dtype]
    a, b = lora.values()
    exact = (base[f"{Q}.weight"].float() + 2 * b.float() @ a.float()).to(dtype)
    np.testing.assert_allclose(values(merged), exact.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-3)
    assert (values(merged) == exact.float().numpy()).mean() > 0.9  # at most a last bit differs, here and there


def test_nothing_is_read_before_it_is_asked_for() -> None:
    def fail() -> mx.array:
        raise AssertionError

    lazy = {name: Tensor(t.dtype, t.shape, fail) for name, t in wrap(BASE | factors(prefix="")).items()}
    assert merge_lora(lazy, {}, CONFIG, {}).keys() == BASE.keys()


def test_embeddings_and_transposed_weights() -> None:
    a, b = random(3, 8), random(4, 3)
    lora = {"base_model.model.model.embed_tokens.lora_embedding_A": a}
    lora["base_model.model.model.embed_tokens.lora_embedding_B"] = b
    merged = merge_lora(wrap(BASE), wrap(lora), CONFIG, {})
    exact = BASE["model.embed_tokens.weight"] + 2 * (b @ a).T
    np.testing.assert_allclose(values(merged["model.embed_tokens.weight"]), exact, rtol=1e-5, atol=1e-5)

    base = {f"{Q}.weight": BASE[f"{Q}.weight"].T}
    merged = merge_lora(wrap(base), wrap(factors()), CONFIG | {"fan_in_fan_out": True}, {})
    np.testing.assert_allclose(values(merged[f"{Q}.weight"]), expected().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_dora(transposed: bool) -> None:
    lengths = random(5).abs()
    lora = factors() | {f"base_model.model.{Q}.lora_magnitude_vector": lengths}
    weight = BASE[f"{Q}.weight"]
    base = {f"{Q}.weight": weight.T if transposed else weight}
    merged = merge_lora(wrap(base), wrap(lora), CONFIG | {"fan_in_fan_out": transposed, "use_dora": True}, {})
    exact = torch.nn.functional.normalize(weight + 2 * B @ A, dim=1) * lengths[:, None]
    np.testing.assert_allclose(values(merged[f"{Q}.weight"]), exact.T if transposed else exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.", ""])
def test_what_was_trained_beside_lora(prefix: str) -> None:
    """LLaVA's ``non_lora_trainables.bin``: names with one ``model.`` more than the model's own, in any wrapper."""
    inner = "" if prefix == "base_model.model." else "model."
    non_lora = {
        f"{prefix}{inner}model.mm_projector.0.weight": random(4, 6),
        f"{prefix}{inner}model.norm.weight": random(4, seed=7),
    }
    merged = merge_lora(wrap(BASE), wrap(factors()), CONFIG, wrap(non_lora))
    assert merged.keys() == BASE.keys() | {"model.mm_projector.0.weight"}
    np.testing.assert_array_equal(values(merged["model.norm.weight"]), random(4, seed=7))
    np.testing.assert_allclose(values(merged[f"{Q}.weight"]), expected(), rtol=1e-5, atol=1e-5)


def test_qwens_prefix_stays() -> None:
    non_lora = {"base_model.model.transformer.mm_projector.0.weight": random(4, 6)}
    assert "transformer.mm_projector.0.weight" in merge_lora(wrap(BASE), {}, {}, wrap(non_lora))


def test_modules_that_were_trained_whole() -> None:
    head = random(9, 4)
    adapter = factors() | {
        "base_model.model.model.embed_tokens.modules_to_save.default.weight": random(9, 4, seed=3),
        "base_model.model.lm_head.weight": head,
        "base_model.model.model.layers.0.self_attn.o_proj.bias": random(4, seed=4),
        "base_model.model.model.mm_projector.modules_to_save.2.weight": random(2, 2),
    }
    merged = merge_lora(wrap(BASE), wrap(adapter), CONFIG, {})
    np.testing.assert_array_equal(values(merged["model.embed_tokens.weight"]), random(9, 4, seed=3))
    np.testing.assert_array_equal(values(merged["lm_head.weight"]), head)
    np.testing.assert_array_equal(values(merged["model.layers.0.self_attn.o_proj.bias"]), random(4, seed=4))
    assert merged.keys() - BASE.keys() == {"lm_head.weight", "model.mm_projector.2.weight"}


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("base_layer", ["", ".base_layer"])
def test_lora_inside_the_model(prefix: str, base_layer: str) -> None:
    """MoE-LLaVA saves the wrapped model: factors beside each expert's weights."""
    wrapped = {prefix + name: value for name, value in BASE.items() if not name.startswith(Q)}
    wrapped[f"{prefix}{Q}{base_layer}.weight"] = BASE[f"{Q}.weight"]
    wrapped[f"{prefix}{Q}{base_layer}.bias"] = random(5)
    wrapped |= factors(prefix=prefix, adapter=".default")
    wrapped[f"{prefix}lm_head.original_module.weight"] = random(8, 4)
    wrapped[f"{prefix}lm_head.modules_to_save.default.weight"] = random(8, 4, seed=5)
    merged = merge_lora(wrap(wrapped), {}, {"lora_alpha": 6}, {})
    assert merged.keys() == BASE.keys() | {f"{Q}.bias", "lm_head.weight"}
    np.testing.assert_allclose(values(merged[f"{Q}.weight"]), expected(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(values(merged["lm_head.weight"]), random(8, 4, seed=5))


@pytest.mark.parametrize(
    ("base", "lora"),
    [
        ("language_model.model.layers.0.q_proj", "model.language_model.layers.0.q_proj"),
        ("model.language_model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
        ("vision_tower.vision_model.q_proj", "model.vision_tower.vision_model.q_proj"),
        ("language_model.lm_head", "lm_head"),
    ],
)
def test_base_and_adapter_of_two_versions_of_transformers(base: str, lora: str) -> None:
    merged = merge_lora(wrap({f"{base}.weight": BASE[f"{Q}.weight"]}), wrap(factors(lora)), CONFIG, {})
    assert list(merged) == [f"{base}.weight"]
    np.testing.assert_allclose(values(merged[f"{base}.weight"]), expected(), rtol=1e-5, atol=1e-5)


FIRST = f"base_model.model.{Q}.lora_A.weight"


@pytest.mark.parametrize(
    ("adapter", "config", "message"),
    [
        (
            factors("model.layers.7.q_proj"),
            CONFIG,
            r"layers\.7\.q_proj\.lora_A.*has no model\.layers\.7\.q_proj\.weight",
        ),
        ({FIRST: A}, CONFIG, r"q_proj\.lora_A.*the other LoRA factor is missing"),
        (factors() | {FIRST: A.T}, CONFIG, r"factors \[5, 3\] and \[4, 3\] do not fit the base model's \[5, 4\]"),
        (factors("model.layers.0.self_attn.o_proj"), CONFIG, r"do not fit the base model's \[4, 5\]"),
        (factors() | {FIRST: A[:0], FIRST.replace("_A", "_B"): B[:, :0]}, CONFIG, "do not fit"),
        (factors(), {}, r"adapter_config\.json has no lora_alpha; add it"),
        (factors(), {"lora_alpha": "6"}, r"lora_alpha '6' is not a number"),
        (factors(), CONFIG | {"alpha_pattern": {"(": 1}}, "alpha_pattern is not a table"),
        (factors(), CONFIG | {"alpha_pattern": [1]}, "alpha_pattern is not a table"),
        (factors(), CONFIG | {"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        (factors() | factors(adapter=".other"), CONFIG, r"lora_A\.other\.weight': a second adapter"),
        (factors() | {f"{Q}.lora_B.bias": random(5)}, CONFIG, "LoRA with biases of its own"),
        (factors() | {f"{Q}.lora_alphas.a.b.c": random(5)}, CONFIG, "a kind of LoRA that is not supported"),
        (factors() | {f"{Q}.lora_magnitude_vector": random(4)}, CONFIG, r"DoRA's lengths are \[4\]"),
        ({"base_model.model.model.embed_tokens.weight": random(8, 5)}, CONFIG, r"is \[8, 5\] where .* has \[8, 4\]"),
    ],
)
def test_adapters_that_do_not_fit(adapter: dict[str, torch.Tensor], config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        merge_lora(wrap(BASE), wrap(adapter), config, {})
    assert "\n" not in str(error.value)


def test_a_quantized_base() -> None:
    base = {f"{Q}.weight": torch.ones(5, 4, dtype=torch.uint8)}
    with pytest.raises(UserError, match="its base has dtype U8; name an unquantized base model"):
        merge_lora(wrap(base), wrap(factors()), CONFIG, {})


def test_lora_inside_the_model_without_its_strength() -> None:
    with pytest.raises(UserError, match=r"config\.json has no lora\.lora_alpha; add it as it was in training"):
        merge_lora(wrap(BASE | factors(prefix="", adapter=".default")), {}, {}, {})


def test_an_adapter_on_a_base_with_lora_of_its_own() -> None:
    base = wrap(BASE | factors(prefix=""))
    with pytest.raises(UserError, match="the base model has LoRA of its own"):
        merge_lora(base, wrap(factors()), CONFIG, {})
