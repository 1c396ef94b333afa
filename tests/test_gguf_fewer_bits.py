"""Fewer bits for Llama, Qwen and StableLM with experts: ``step35`` and ``phimoe`` from llama.cpp's quantizer.

What is rounded is known from the file, unpacked by gguf-py: float64 says what a model with these weights answers. And a
model whose experts are all alike is a dense one, which llama.cpp has as it is: as much is lost in both of its forms.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import mlx.core as mx
import numpy as np
import pytest
import raw_llama
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from test_gguf_families import FAMILIES, entering, prompt, reference, weights_of, zero_matrices

from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.convert.to_gguf.imatrix import Entry, read_imatrix
from gm_mlx.convert.to_gguf.quantize import estimate_bytes, quantize_gguf
from gm_mlx.convert.to_gguf.text import find_architecture, matrix_names
from gm_mlx.convert.to_gguf.types import component_of, find_target
from gm_mlx.gguf_file import GGUFTensor, read_header
from gm_mlx.quant.recipes import RECIPES

pytestmark = pytest.mark.slow

RECIPE_TABLE = {name: recipe.precisions for name, recipe in RECIPES.items()}
EMBEDDING, HEAD = "language_model.model.embed_tokens", "language_model.lm_head"
ALL = MoEConfig(top_k=4)  # all experts are at work: rounding cannot choose another
# The types of a file's matrices.
FILE_TYPES = {
    "Q8_0": {"Q8_0"},
    "Q6_K": {"Q6_K"},
    "Q4_K_M": {"Q4_K", "Q6_K"},
    "Q3_K_M": {"Q3_K", "Q4_K", "Q5_K", "Q6_K"},
    "q4": {"Q4_K", "Q8_0"},
}
ARITHMETIC = 0.08  # llama.cpp rounds what it multiplies with packed matrices to 8 bits


class Source(NamedTuple):
    """A model folder whose rows divide into blocks of 256, and the weights in it."""

    config: ModelConfig
    weights: dict[str, np.ndarray]
    folder: Path


def wide(family: str, moe: MoEConfig | None = ALL) -> ModelConfig:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}
    return tiny_config(moe=moe, num_attention_heads=4, num_key_value_heads=2, **sizes, **FAMILIES[family][0])


def write(folder: Path, config: ModelConfig, weights: dict[str, np.ndarray]) -> Source:
    model = tiny_model(config=config)
    model.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    return Source(config, weights, tiny_folder(folder, model=model))


@pytest.fixture(scope="module", params=["step35 with biases", "phimoe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    config = wide(request.param)
    return write(tmp_path_factory.mktemp("model") / "model", config, weights_of(config))


@pytest.fixture(scope="module")
def plain(source: Source) -> Path:
    return converted(source, source.folder.with_name("plain"), "F32")


def converted(source: Source, out: Path, name: str, *options: str) -> Path:
    """The decoder's file."""
    arguments = ["convert", str(source.folder), "-o", str(out), "--to", "gguf", "--quantize", name, *options]
    assert main(arguments) == 0
    return out / "model.gguf"


def unpacked(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file in floats, by gguf-py."""
    return {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in gguf.GGUFReader(path).tensors}


def matrices(path: Path, config: ModelConfig) -> dict[str, GGUFTensor]:
    """The matrices that the model has, too."""
    fillers = {name for name, _ in zero_matrices(config.text_config)}
    return {n: each for n, each in read_header(path).tensors.items() if component_of(n) and n not in fillers}


def rounded(source: Source, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model's weights with a file's matrices in their places."""
    names = {**matrix_names(source.config.text_config), EMBEDDING: "token_embd.weight", HEAD: "output.weight"}
    weights = dict(source.weights)
    for path, name in names.items():
        matrix = tensors[name]
        if matrix.ndim > weights[f"{path}.weight"].ndim:  # a dense network as experts
            assert (matrix == matrix[:1]).all()
            matrix = matrix[0]
        weights[f"{path}.weight"] = matrix
    return weights


def change(found: np.ndarray, wanted: np.ndarray) -> float:
    """The error as a share of what is wanted, both root mean square."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def logits(path: Path, config: ModelConfig) -> np.ndarray:
    return raw_llama.logits(path, entering(config.text_config, prompt(config.text_config, 0)))


@pytest.mark.parametrize("name", FILE_TYPES)
def test_file_types(name: str, source: Source, plain: Path, tmp_path: Path) -> None:
    path, text = converted(source, tmp_path / "out", name), source.config.text_config
    made = matrices(path, source.config)
    assert {tensor.type for tensor in made.values()} == FILE_TYPES[name]
    assert {t.type for n, t in read_header(path).tensors.items() if component_of(n) is None} == {"F32"}
    tensors, exact = unpacked(path), unpacked(plain)
    assert not any(tensors[zero].any() for zero, _ in zero_matrices(text))
    # Roundings are independent of each other, so their squares add up: those of two embeddings, and seven matrices a
    # layer. Norms and softmax may enlarge them, which a factor of two is for.
    share = max(change(tensors[matrix], exact[matrix]) for matrix in made)
    parts = prompt(text, 0)
    expected, truth = (reference(text, weights, parts) for weights in (rounded(source, tensors), source.weights))
    assert change(expected, truth) < 2 * share * (2 + 7 * text.num_hidden_layers) ** 0.5
    assert change(logits(path, source.config), expected) < ARITHMETIC


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "Q4_K_M"])
@pytest.mark.parametrize(("family", "carrier"), [("llama", "step35"), ("stablelm", "phimoe")])
def test_no_more_is_lost_than_in_an_architecture_of_llama_cpps_own(
    family: str, carrier: str, name: str, tmp_path: Path
) -> None:
    dense, sparse = wide(family, None), wide(family)
    assert (find_architecture(dense.text_config).name, find_architecture(sparse.text_config).name) == (family, carrier)
    weights = weights_of(dense)
    copies = weights_of(sparse)
    for path in copies:
        same = weights.get(path.replace("switch_mlp.", ""))
        if same is not None:
            copies[path] = np.broadcast_to(same, copies[path].shape).copy()
    truth = reference(dense.text_config, weights, prompt(dense.text_config, 0))
    lost = {}
    for config, own in ((dense, weights), (sparse, copies)):
        arch = find_architecture(config.text_config).name
        made = converted(write(tmp_path / arch / "model", config, own), tmp_path / arch / "gguf", name)
        lost[arch] = change(logits(made, config), truth)
    print(f"{name}: {lost}")
    assert lost[carrier] < 1.2 * lost[family]


@pytest.mark.parametrize("name", FILE_TYPES)
def test_sizes(name: str, source: Source, plain: Path, tmp_path: Path) -> None:
    """As many bits for a weight as its types have, and no fewer bytes than were said to be needed."""
    done = quantize_gguf(plain, tmp_path / "out.gguf", find_target(name, RECIPE_TABLE))
    made = matrices(tmp_path / "out.gguf", source.config)
    sizes = [gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] for kind in FILE_TYPES[name]]
    bits = [8 * num_bytes / block for block, num_bytes in sizes]
    stored = sum(tensor.nbytes for tensor in made.values())
    assert min(bits) <= 8 * stored / sum(np.prod(tensor.shape) for tensor in made.values()) <= max(bits)
    tensors = read_header(plain).tensors
    overhead = min(tensor.offset for tensor in tensors.values())
    estimate = estimate_bytes({n: tensor.shape for n, tensor in tensors.items()}, find_target(name, RECIPE_TABLE))
    assert 0.97 < (estimate + overhead) / done.num_bytes < 1.35


def test_importance(source: Source, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two bits, which llama.cpp makes if it knows of every matrix what matters, zeros too."""
    matrix = tmp_path / "i.gguf"
    assert main(["imatrix", str(source.folder), "-o", str(matrix), "--samples", "1"]) == 0
    capsys.readouterr()
    path = converted(source, tmp_path / "out", "IQ2_XS", "--imatrix", str(matrix))
    assert "importance" not in capsys.readouterr().err
    assert read_header(path).tensors["blk.2.ffn_up_exps.weight"].type == "IQ2_XS"
    tensors = unpacked(path)
    assert not any(tensors[name].any() for name, _ in zero_matrices(source.config.text_config))
    assert np.isfinite(logits(path, source.config)).all()
    # Layers are counted as in the model.
    known, name = read_imatrix(matrix), "blk.2.ffn_up_exps.weight"
    sums, counts = (array.copy() for array in known.entries[name])
    sums[1], counts[1] = 0, 0
    known = replace(known, entries={**known.entries, name: Entry(sums, counts)})
    done = quantize_gguf(plain, tmp_path / "q.gguf", find_target("Q4_K_M", RECIPE_TABLE), imatrix=known)
    assert done.notes() == ["layer 2: no token that the importance matrix is from reached expert 1"]


def test_a_question_about_a_picture(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture().save(tmp_path / "picture.png")
    model = converted(source, tmp_path / "out", "Q4_K_M")
    ask = ["--image", str(tmp_path / "picture.png"), "--prompt", "What is it?", "--max-tokens", "4"]
    capsys.readouterr()
    assert main(["chat", "--model", str(model), *ask]) == 0
    assert capsys.readouterr().out.strip()
