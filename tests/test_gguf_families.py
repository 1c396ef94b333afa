"""Decoders of all families as GGUF, in an unmodified llama.cpp: against float64, and against our own model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy_families
import pytest
import raw_llama
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from gguf_files import MODES, as_tensors, gguf_folder, tiny_processor
from llama_products import Products, watched
from lora_adapters import IDS, PARTS, draw

from gm_mlx.config import ModelConfig, MoEConfig, TextConfig
from gm_mlx.convert.to_gguf.folder import gguf_pair
from gm_mlx.convert.to_gguf.imatrix import matrix_from_sums
from gm_mlx.convert.to_gguf.lora import convert_adapter
from gm_mlx.convert.to_gguf.native import neighbours
from gm_mlx.convert.to_gguf.quantize import _is_filler
from gm_mlx.convert.to_gguf.text import find_architecture, first_block, matrix_names, text_model
from gm_mlx.convert.to_gguf.types import find_target
from gm_mlx.convert.to_gguf.vision import check_vision
from gm_mlx.convert.to_gguf.write import write_gguf
from gm_mlx.errors import UserError
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.mlx_engine import MLXEngine
from gm_mlx.processor import Message
from gm_mlx.tensors import Tensor
from gm_mlx.weights import named_arrays

LLAMA: dict[str, Any] = {"norm_plus_one": False, "scale_embeddings": False, "hidden_act": "silu"}
QWEN: dict[str, Any] = {**LLAMA, "attention_bias": "qkv"}
STABLELM: dict[str, Any] = {**QWEN, "norm": "layer", "partial_rotary_factor": 0.25}
PHI2: dict[str, Any] = {
    **LLAMA,
    "norm": "layer",
    "attention_bias": "all",
    "partial_rotary_factor": 0.5,
    "parallel_block": True,
    "gated": False,
    "hidden_act": "gelu_pytorch_tanh",
}
# The architecture that each must become, dense and with experts.
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": (LLAMA, False),
    "qwen2": (QWEN, False),
    "stablelm": (STABLELM, False),
    "phi2": (PHI2, False),
    "step35": (LLAMA, True),
    "step35 with biases": (QWEN, True),
    "phimoe": (STABLELM, True),
}
HEADS = [(4, 1), (4, 2), (4, 4), (2, 2), (8, 2), (6, 3)]  # multi-query, grouped and one for each
PER_FAMILY = 10


def random_config(family: str, seed: int) -> ModelConfig:
    """Layers 2 to 5, heads of all kinds of sharing, 2 to 8 experts of which 1 to 3 are at work."""
    values, sparse = FAMILIES[family]
    random = np.random.default_rng([seed, len(family)])
    heads, kv_heads = HEADS[seed % len(HEADS)]
    dim, experts = int(random.choice([32, 64])) if heads < 6 else 32, int(random.integers(2, 9))
    moe = MoEConfig(
        num_experts=experts,
        top_k=1 + seed % min(3, experts),
        router_rank=int(random.integers(0, experts)),
        norm_topk_prob=bool(seed % 4) or family == "phimoe",
        expert_size=int(random.choice([0, 96])) if family != "phimoe" else 0,
        **MODES[seed % len(MODES)],
    )
    free = family.startswith(("llama", "step35"))  # the others want heads that fill the stream
    return tiny_config(
        moe=moe if sparse else None,
        hidden_size=int(random.choice([64, 128])) if free else heads * dim,
        intermediate_size=int(random.choice([128, 256])),
        num_hidden_layers=int(random.integers(2, 6)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=1024,
        rope_theta=float(random.choice([1e4, 1e6])),
        rms_norm_eps=float(random.choice([1e-6, 1e-5])),
        tie_word_embeddings=not seed % 5,
        **values,
    )


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by name: norms around one, routers with logits of about one, biases that matter."""
    weights = {name: np.array(array) for name, array in named_arrays(tiny_model(seed, config)).items()}
    for name, array in weights.items():
        random = np.random.default_rng([seed, len(name)])
        if ".gate." in name:  # weight [E, D], u [D, r] or v [r, E]
            inputs = array.shape[1 if name.endswith("weight") else 0]
            array[:] = random.uniform(-1, 1, array.shape) * inputs**-0.5
        elif "norm" in name and name.endswith("weight"):
            array += 1
        elif "embed_tokens" in name:
            array += 0.05  # a mean that is not zero
    return weights


def write(folder: Path, config: ModelConfig, weights: dict[str, np.ndarray], file_type: str = "F32") -> Path:
    pair = gguf_pair(config, as_tensors(weights), tiny_processor(config, folder), name="tiny")
    path = folder / "model.gguf"
    path.unlink(missing_ok=True)
    write_gguf(path, pair.text, find_target(file_type, {}))
    return path


def prompt(text: TextConfig, seed: int, length: int = 60) -> list[list[int] | np.ndarray]:
    """Text around 16 image features, which have a mean as an image's own have."""
    random = np.random.default_rng(seed)
    ids = random.integers(4, 390, length).tolist()
    features = (random.normal(size=(16, text.hidden_size)) + 0.3).astype(np.float32)
    return [ids[:10], features, ids[26:]]


def reference(text: TextConfig, weights: dict[str, np.ndarray], parts: list[list[int] | np.ndarray]) -> np.ndarray:
    return numpy_families.logits(text, weights, np.concatenate([embedded(text, weights, part) for part in parts]))


def embedded(text: TextConfig, weights: dict[str, np.ndarray], part: list[int] | np.ndarray) -> np.ndarray:
    if isinstance(part, np.ndarray):
        return part.astype(np.float64)
    return np.stack([numpy_families.token_embedding(text, weights, token) for token in part])


def entering(text: TextConfig, parts: list[list[int] | np.ndarray]) -> list[list[int] | np.ndarray]:
    """The parts as the file's projector gives them: without their mean, where the stream must have none."""
    if not find_architecture(text).centred:
        return parts
    return [part - part.mean(-1, keepdims=True) if isinstance(part, np.ndarray) else part for part in parts]


def errors(measured: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Errors of logits by position, relative to the largest logit."""
    return np.abs(measured - expected).max(-1) / np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(PER_FAMILY))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, seed: int, tmp_path: Path) -> None:
    config = random_config(family, seed)
    text, weights = config.text_config, weights_of(config, seed)
    assert find_architecture(text).name == family.split()[0]
    parts = prompt(text, seed)
    expected = reference(text, weights, parts)
    measured = raw_llama.logits(write(tmp_path, config, weights), entering(text, parts))
    found = errors(measured, expected)
    print(f"{family} {seed}: median {np.median(found):.1e}, worst {found.max():.1e}")
    assert np.median(found) < 3e-3
    assert (measured.argmax(-1) != expected.argmax(-1)).mean() <= 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_model_is_the_reference(family: str) -> None:
    """What float64 says is what MLX computes, image features among the tokens."""
    config = random_config(family, 1)
    text, weights = config.text_config, weights_of(config, 1)
    model = tiny_model(1, config)
    model.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    parts = prompt(text, 1, 40)
    entered = mx.array(np.concatenate([embedded(text, weights, part) for part in parts]), mx.float32)
    found = np.array(model.logits(model.hidden(entered[None])))[0]
    assert np.median(errors(found, reference(text, weights, parts))) < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi2", "step35 with biases", "phimoe"])
def test_the_engine_answers_as_mlx_does(family: str, tmp_path: Path) -> None:
    """Both files at work, tower and projector too: a question about a picture."""
    config = random_config(family, 2)
    model = tiny_model(2, config)
    model.load_weights([(name, mx.array(array)) for name, array in weights_of(config, 2).items()])
    folder = gguf_folder(tmp_path / "gguf", model)
    mlx_engine = MLXEngine(tiny_folder(tmp_path / "mlx", model=model))
    engine = LlamaCppEngine(folder / "model.gguf", folder / "mmproj.gguf", threads=1)
    message: Message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    ids = mlx_engine.processor.encode([message], 1).ids
    features = model.encode_images(mx.array(mlx_engine.processor.pixels([picture()])))
    wanted = np.array(model.logits(model.hidden(model.embed(np.array([ids]), features)))[0, -1])
    found = engine.prompt_logits([message], [picture()])
    engine.close()
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.02


@pytest.mark.parametrize("family", ["step35", "step35 with biases", "phimoe"])
def test_an_importance_matrix_has_what_llama_cpp_multiplies(family: str, tmp_path: Path) -> None:
    config = random_config(family, 5)
    text, weights = config.text_config, weights_of(config, 5)
    assert first_block(text) == 0
    products = Products()
    with watched(products):
        raw_llama.logits(write(tmp_path, config, weights), [[5, 6, 7, 8]])
    sums, counts = {}, {}
    for path in matrix_names(text):
        shape = weights[f"{path}.weight"].shape
        experts = shape[0] if len(shape) == 3 else 1
        sums[path], counts[path] = np.ones((experts, shape[-1])), np.ones(experts)
    matrix = matrix_from_sums(text, sums, counts, dataset="", num_samples=1, num_tokens=4)
    seen = {name: each.shape for name, each in products.sums.items() if "ffn_gate_inp" not in name}
    assert {name: entry.sums.shape for name, entry in matrix.entries.items()} == seen
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert {name for name in seen if _is_filler(name, names)} == {name for name, _ in zero_matrices(text)}


def zero_matrices(text: TextConfig) -> list[tuple[str, int]]:
    return list(find_architecture(text).zero_matrices(text))


@pytest.mark.parametrize("part", ["attention", "everything"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "stablelm", "step35", "step35 with biases"])
def test_lora(family: str, part: str, tmp_path: Path) -> None:
    """Base and adapter together are as near to float64 as a file of the merged weights."""
    config = random_config(family, 1)
    text, weights = config.text_config, weights_of(config, 1)
    adapter = draw(config, weights, PARTS[part], seed=1)
    base = write(tmp_path, config, weights)
    convert_adapter(adapter.write(tmp_path / "adapter"), base, tmp_path / "lora.gguf")
    wanted = reference(text, {**weights, **adapter.merged}, [IDS])
    found = errors(raw_llama.logits(base, [IDS], [(tmp_path / "lora.gguf", 1.0)]), wanted)
    without = errors(raw_llama.logits(base, [IDS]), wanted)
    assert np.median(found) < 2e-3 and np.median(without) > 20 * np.median(found)


def test_no_lora_where_matrices_were_changed(tmp_path: Path) -> None:
    config = random_config("phimoe", 1)
    weights = weights_of(config, 1)
    adapter = draw(config, weights, PARTS["attention"], seed=1).write(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"re-expresses by changing matrices; merge the adapter"):
        convert_adapter(adapter, write(tmp_path, config, weights), tmp_path / "lora.gguf")


@pytest.mark.parametrize("file_type, worst", [("Q8_0", 0.1), ("Q4_0", 1.0)])
@pytest.mark.parametrize("family", ["llama", "step35", "phimoe"])
def test_file_types(family: str, file_type: str, worst: float, tmp_path: Path) -> None:
    values, sparse = FAMILIES[family]
    moe = MoEConfig(top_k=4) if sparse else None  # all experts: rounding cannot choose another
    config = tiny_config(moe=moe, **values)
    weights = weights_of(config)
    path = write(tmp_path, config, weights, file_type)
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert stored["blk.0.attn_q.weight"] == file_type and stored["blk.0.attn_norm.weight"] == "F32"
    parts = prompt(config.text_config, 0)
    found = errors(
        raw_llama.logits(path, entering(config.text_config, parts)), reference(config.text_config, weights, parts)
    )
    assert np.median(found) < worst


def test_neighbours() -> None:
    rows = mx.arange(8)[:, None] * mx.ones((8, 3))
    moved = neighbours(Tensor("F32", (8, 3), lambda: rows), 4)
    assert moved.read()[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_values_keep_their_bits() -> None:
    """All but phimoe change no value: a bfloat16 model stays exact in a bfloat16 file."""
    for family in ("llama", "step35 with biases"):
        config = random_config(family, 3)
        weights = weights_of(config, 3)
        half = {name: mx.array(array).astype(mx.bfloat16) for name, array in weights.items()}
        tensors = {name: Tensor("BF16", a.shape, lambda a=a: a) for name, a in half.items()}  # type: ignore[misc]
        pieces = {piece.name: piece for piece in text_model(config, tensors).pieces}
        for path, name in matrix_names(config.text_config).items():
            made = pieces[name].tensor.read()
            assert made.dtype == mx.bfloat16
            assert np.array_equal(
                *(np.sort(np.array(a.astype(mx.float32)), None) for a in (made, half[f"{path}.weight"]))
            )


def test_phimoes_stream_has_no_mean() -> None:
    config = random_config("phimoe", 0)
    pieces = {each.name: each for each in text_model(config, as_tensors(weights_of(config))).pieces}
    assert np.abs(np.array(pieces["token_embd.weight"].tensor.read()).mean(-1)).max() < 1e-6
    assert np.abs(np.array(pieces["blk.0.attn_output.weight"].tensor.read()).mean(0)).max() < 1e-6
    assert np.abs(np.array(pieces["blk.1.ffn_down_exps.weight"].tensor.read()).mean(1)).max() < 1e-6
    copies = np.array(pieces["blk.1.ffn_up_exps.weight"].tensor.read())  # a dense layer
    assert (copies == copies[:1]).all() and len(copies) == config.text_config.moe.num_experts  # type: ignore[union-attr]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("step35", {"moe": MoEConfig(use_residual=True)}, "moe.use_residual: True .*'step35' comes nearest"),
    ("step35", {"moe": MoEConfig(kind="evf", num_experts=2, top_k=1)}, "moe.kind: 'evf'"),
    ("step35", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
    ("llama", {"series_layers": 1}, "series_layers: 1"),
    ("llama", {"shortcut_size": 8}, "shortcut_size: 8"),
    ("phimoe", {"moe": MoEConfig(norm_topk_prob=False)}, "moe.norm_topk_prob: False .*'phimoe' comes nearest"),
    ("phimoe", {"moe": MoEConfig(expert_size=96)}, "moe.expert_size: 96"),
    ("stablelm", {"head_dim": 64}, "head_dim: 64 .*'stablelm' comes nearest"),
    ("phi2", {"moe": MoEConfig()}, "moe: 'experts' .*'phi2' comes nearest, and it has None there"),
]


@pytest.mark.parametrize("family, values, message", REFUSED)
def test_refuses_what_no_architecture_is(family: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_architecture(
            tiny_config(
                **{"moe": MoEConfig() if FAMILIES[family][1] else None, **FAMILIES[family][0], **values}
            ).text_config
        )


def test_an_ldp_projector_gives_features_with_a_mean() -> None:
    config = random_config("phimoe", 0)
    vision = dataclasses.replace(config.vision_config, image_size=24 * config.vision_config.patch_size)
    with pytest.raises(UserError, match="mean of zero, and 'ldpnetv2' does not give that"):
        check_vision(dataclasses.replace(config, vision_config=vision, projector_type="ldpnetv2"))
