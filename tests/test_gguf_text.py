"""The decoder as GGUF, in an unmodified llama.cpp: against float64, and against llama.cpp's own Gemma."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy_decoder
import pytest
import raw_llama
from fixtures import tiny_config, tiny_model
from gguf_files import MODES, as_tensors, tiny_processor

from gm_mlx.config import ModelConfig, MoEConfig, TextConfig
from gm_mlx.convert.to_gguf.folder import gguf_pair
from gm_mlx.convert.to_gguf.gemma4 import residual_scale
from gm_mlx.convert.to_gguf.text import find_architecture, text_model
from gm_mlx.convert.to_gguf.types import find_target
from gm_mlx.convert.to_gguf.write import write_gguf
from gm_mlx.errors import UserError
from gm_mlx.tensors import Tensor
from gm_mlx.weights import named_arrays

Parts = list[list[int] | np.ndarray]

# What is drawn from for the random models.
HEADS = [(4, 1), (4, 2), (4, 4), (1, 1), (8, 1), (6, 3)]  # multi-query, grouped and one for each
LENGTHS = [1, 2, 7, 33, 150, 600]
PROMPT_POSITIONS = 32  # that errors are measured on at least


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by name; routers are drawn as PyTorch draws a new one, whose logits are about one."""
    weights = {name: np.array(array) for name, array in named_arrays(tiny_model(seed, config)).items()}
    for name, array in weights.items():
        if ".gate." in name:  # weight [E, D], u [D, r] or v [r, E]
            inputs = array.shape[1 if name.endswith("weight") else 0]
            array[:] = np.random.default_rng(seed).uniform(-1, 1, array.shape) * inputs**-0.5
    return weights


def write(folder: Path, config: ModelConfig, weights: dict[str, np.ndarray], file_type: str = "F32") -> Path:
    """The decoder's file of a model."""
    folder.mkdir(exist_ok=True, parents=True)
    pair = gguf_pair(config, as_tensors(weights), tiny_processor(config, folder), name="tiny")
    path = folder / "model.gguf"
    path.unlink(missing_ok=True)
    write_gguf(path, pair.text, find_target(file_type, {}))
    return path


def random_config(seed: int) -> ModelConfig:
    random = np.random.default_rng(seed)
    heads, kv_heads = HEADS[seed % len(HEADS)]
    experts = int(random.integers(2, 9))
    moe = MoEConfig(
        num_experts=experts,
        top_k=int(random.integers(1, min(3, experts) + 1)),
        router_rank=int(random.integers(0, experts)),
        expert_size=int(random.choice([0, 96])),
        **MODES[seed % len(MODES)],
    )
    return tiny_config(
        moe=moe,
        hidden_size=int(random.choice([64, 128, 256])),
        intermediate_size=int(random.choice([128, 256])),
        num_hidden_layers=int(random.integers(2, 6)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(random.choice([32, 64, 128])),
        max_position_embeddings=1024,
        rope_theta=float(random.choice([1e4, 1e6])),
        rms_norm_eps=float(random.choice([1e-6, 1e-5])),
        norm_plus_one=bool(seed % 4),
        tie_word_embeddings=True,
    )


def prompt(config: ModelConfig, length: int, seed: int) -> tuple[Parts, list[int | np.ndarray]]:
    """Text, for longer prompts around 64 image features; in runs, and position by position."""
    random = np.random.default_rng(seed)
    ids = random.integers(4, 390, length).tolist()
    if length < 100:
        return [ids], list(ids)
    features = random.normal(size=(64, config.text_config.hidden_size)).astype(np.float32)
    return [ids[:10], features, ids[74:]], [*ids[:10], *features, *ids[74:]]


def reference(text: TextConfig, weights: dict[str, np.ndarray], positions: list[int | np.ndarray]) -> np.ndarray:
    def embedded(position: int | np.ndarray) -> np.ndarray:
        if isinstance(position, int):
            return numpy_decoder.token_embeddings(text, weights, [position])[0]
        return position

    return numpy_decoder.logits(text, weights, np.stack([embedded(position) for position in positions]))


@dataclass
class Error:
    """Relative errors of logits: the typical position's and the worst one's, and how often the best token differs."""

    typical: float
    worst: float
    other_token: float


def error(measured: np.ndarray, expected: np.ndarray) -> Error:
    each = np.abs(measured - expected).max(-1) / np.abs(expected).max()
    return Error(float(np.median(each)), float(each.max()), float((measured.argmax(-1) != expected.argmax(-1)).mean()))


def measure(folder: Path, config: ModelConfig, length: int, seed: int) -> Error:
    """Errors over one long prompt, or over many short ones: of two positions, chance alone makes one twice as bad."""
    text, weights = config.text_config, weights_of(config, seed)
    path = write(folder, config, weights)
    # All that enters a native model is multiplied by sqrt(hidden_size).
    root = np.sqrt(text.hidden_size) if find_architecture(text).scales_inputs else 1
    measured, expected = [], []
    for number in range(max(1, PROMPT_POSITIONS // length)):
        parts, positions = prompt(config, length, seed + 1000 * number)
        entering = [part / root if isinstance(part, np.ndarray) else part for part in parts]
        measured.append(raw_llama.logits(path, entering))
        expected.append(reference(text, weights, positions))
    return error(np.concatenate(measured), np.concatenate(expected))


@pytest.mark.parametrize("seed", range(30))
def test_is_as_exact_as_llama_cpps_own_gemma(seed: int, tmp_path: Path) -> None:
    config = random_config(seed)
    length = LENGTHS[seed % len(LENGTHS)]
    dense = replace(config, text_config=replace(config.text_config, moe=None))
    ours, native = measure(tmp_path, config, length, seed), measure(tmp_path, dense, length, seed)
    assert ours.typical <= 2 * native.typical, (ours, native)
    # One token that rounding sends to another expert is wrong alone: all others are as near as before.
    assert ours.typical < 2e-3 and ours.other_token <= 0.05, (ours, native)


def test_a_dense_model_in_both_architectures(tmp_path: Path) -> None:
    config = tiny_config(moe=None, tie_word_embeddings=True, num_hidden_layers=4)
    weights, ids = weights_of(config), np.random.default_rng(0).integers(4, 390, 200).tolist()
    processor = tiny_processor(config, tmp_path)
    given = []
    for arch in ("gemma", "gemma4"):
        pair = gguf_pair(config, as_tensors(weights), processor, name="tiny")
        other = text_model(config, as_tensors(weights), arch=arch)
        pair.text.arch, pair.text.pieces = arch, other.pieces
        pair.text.metadata |= other.metadata
        write_gguf(tmp_path / f"{arch}.gguf", pair.text, find_target("F32", {}))
        given.append(raw_llama.logits(tmp_path / f"{arch}.gguf", [ids]))
    expected = reference(config.text_config, weights, list(ids))
    native_error, ours = (error(each, expected) for each in given)
    assert ours.typical <= 1.5 * native_error.typical and ours.worst < 1e-2


def test_a_large_logit_is_not_capped(tmp_path: Path) -> None:
    config = tiny_config()
    weights = weights_of(config)
    weights["language_model.lm_head.weight"] *= 40
    ids = list(range(4, 24))
    expected = reference(config.text_config, weights, list(ids))
    assert np.abs(expected).max() > 100
    assert error(raw_llama.logits(write(tmp_path, config, weights), [ids]), expected).worst < 5e-3


@pytest.mark.parametrize("file_type, worst", [("F16", 0.02), ("BF16", 0.1), ("Q8_0", 0.1), ("Q4_0", 1.0)])
def test_file_types(file_type: str, worst: float, tmp_path: Path) -> None:
    config = tiny_config(moe=MoEConfig(top_k=4))  # all experts: rounding cannot choose another
    weights = weights_of(config)
    path = write(tmp_path, config, weights, file_type)
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert stored["blk.1.ffn_up_exps.weight"] == stored["blk.2.ffn_up.weight"] == file_type
    assert stored["token_embd.weight"] == ("Q8_0" if file_type == "Q4_0" else file_type)
    assert {stored["output_norm.weight"], stored["blk.1.ffn_gate_inp.weight"]} == {"F32"}
    ids = list(range(4, 44))
    found = error(raw_llama.logits(path, [ids]), reference(config.text_config, weights, list(ids)))
    assert found.typical < worst

    # What the file holds is exactly what gguf-py's own functions make of the weights.
    tensor = next(each for each in reader.tensors if each.name == "blk.1.ffn_down_exps.weight")
    name = "language_model.model.layers.0.mlp.switch_mlp.down_proj.weight"
    wanted = gguf.quants.quantize(weights[name], gguf.GGMLQuantizationType[file_type])
    assert np.array_equal(np.asarray(tensor.data).view(np.uint8).ravel(), wanted.view(np.uint8).ravel())


def test_file_type_of_rows_that_do_not_divide(tmp_path: Path) -> None:
    config = tiny_config(intermediate_size=100)
    pair = gguf_pair(config, as_tensors(weights_of(config)), tiny_processor(config, tmp_path), name="tiny")
    notes = write_gguf(tmp_path / "model.gguf", pair.text, find_target("Q8_0", {}))
    assert [note.split(" is ")[0] for note in notes] == ["blk.1.ffn_down_exps.weight", "blk.2.ffn_down.weight"]
    assert "F16" in notes[0] and "100" in notes[0]


def test_values_keep_their_bits(tmp_path: Path) -> None:
    """W_v is multiplied by a power of two: a bfloat16 model stays exact in a bfloat16 file."""
    config = tiny_config()
    weights = weights_of(config)
    half = {name: mx.array(array).astype(mx.bfloat16) for name, array in weights.items()}
    tensors = {name: Tensor("BF16", a.shape, lambda a=a: a) for name, a in half.items()}  # type: ignore[misc]
    pieces = {piece.name: piece for piece in text_model(config, tensors).pieces}
    values = np.array(pieces["blk.1.attn_v.weight"].tensor.read().astype(mx.float32))
    original = np.array(half["language_model.model.layers.0.self_attn.v_proj.weight"].astype(mx.float32))
    assert np.array_equal(values, 16 * original)


def test_metadata(tmp_path: Path) -> None:
    config = tiny_config(rms_norm_eps=1e-5)
    path = write(tmp_path, config, weights_of(config))
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "gemma4" and fields["gemma4.block_count"] == 3
    assert fields["gemma4.attention.sliding_window_pattern"] == [True, False, False]
    assert fields["gemma4.attention.sliding_window"] == 32 and fields["gemma4.context_length"] == 512
    assert fields["gemma4.feed_forward_length"] == [32, 32, 128]
    assert fields["gm.residual_scale"] == pytest.approx(residual_scale(config.text_config))
    assert fields["gemma4.attention.layer_norm_rms_epsilon"] / fields["gm.residual_scale"] ** 2 == pytest.approx(1e-5)
    assert fields["gm.sparse_layers"] == [0] and fields["gm.num_hidden_layers"] == 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"moe": MoEConfig(norm_topk_prob=False)}, "moe.norm_topk_prob"),
    ({"moe": MoEConfig(use_residual=True)}, "moe.use_residual"),
    ({"hidden_act": "silu"}, "hidden_act"),
    ({"norm": "layer"}, "text_config.norm"),
    ({"scale_embeddings": False}, "hidden_act"),  # so it is no Gemma, and all others have SwiGLU
    ({"attention_bias": "qkv"}, "attention_bias"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"parallel_block": True}, "parallel_block"),
    ({"gated": False}, "gated"),
]


@pytest.mark.parametrize("values, key", REFUSED)
def test_refuses_what_no_architecture_is(values: dict[str, Any], key: str) -> None:
    config = tiny_config(**values)
    with pytest.raises(UserError, match=key):
        text_model(config, as_tensors(weights_of(config)))


def test_probabilities_that_sum_to_one_need_no_division(tmp_path: Path) -> None:
    config = tiny_config(moe=MoEConfig(top_k=4, norm_topk_prob=False))
    weights, ids = weights_of(config), list(range(4, 24))
    expected = reference(config.text_config, weights, list(ids))
    assert error(raw_llama.logits(write(tmp_path, config, weights), [ids]), expected).worst < 5e-3
