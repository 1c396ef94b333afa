"""``gm-mlx convert --to gguf`` straight from an original checkpoint of every family.

In an unmodified llama.cpp the files say what the model folder says that comes of the same checkpoint. What llama.cpp
has nothing for is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from families import FAMILIES, write_family
from fixtures import picture
from gguf_files import image_features

from gm_mlx.cli.main import main
from gm_mlx.convert.to_gguf.text import find_architecture
from gm_mlx.gguf_file import read_header
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.llama.probe import needed_layout
from gm_mlx.model import Model
from gm_mlx.processor import Message, Processor
from gm_mlx.weights import load_model

pytestmark = pytest.mark.slow

# The architecture of llama.cpp that carries a kind of checkpoint.
CARRIERS = {
    "llava-gm": "gemma4",
    "llava-gemma": "gemma",
    "llava-1.5": "llama",
    "moe-llava-llama": "step35",
    "moe-llava-openchat": "step35",
    "moe-llava-stablelm": "phimoe",
    "moe-llava-qwen": "step35",
    "moe-llava-qwen1.5": "step35",
    "dense-mistral": "llama",
    "dense-stablelm": "stablelm",
    "dense-qwen1.5": "qwen2",
    "dense-qwen": "qwen2",
    "dense-phi": "phi2",
}
# Why the others are not carried.
REFUSED = {
    "moe-llava-qwen-residual": r"text_config\.moe\.use_residual: True .* 'step35' comes nearest, .* False there",
    "moe-llava-phi": r"text_config\.moe: 'experts' .* 'phi2' comes nearest, .* None there",
    "eve": r"text_config\.series_layers: 2 .* 'step35' comes nearest, .* 0 there",
}
CLOSE = 5e-3  # of the largest logit: keys and values of 11 bits, and a GELU from a table
TEXT: Message = {"role": "user", "content": "What is it?"}
SEEN: Message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}


class Pair(NamedTuple):
    """A kind of checkpoint, and what ``convert`` makes of one: a model folder, and a folder for llama.cpp."""

    name: str
    mlx: Path
    gguf: Path


@pytest.fixture(scope="module", params=CARRIERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp(request.param)
    source = str(write_family(root / "source", FAMILIES[request.param]).folder)
    assert main(["convert", source, "-o", str(root / "mlx")]) == 0
    assert main(["convert", source, "-o", str(root / "gguf"), "--to", "gguf"]) == 0
    return Pair(request.param, root / "mlx", root / "gguf")


def test_every_kind_is_carried_or_refused() -> None:
    assert sorted([*CARRIERS, *REFUSED]) == sorted(FAMILIES)


def test_the_files(pair: Pair) -> None:
    header = read_header(pair.gguf / "model.gguf")
    assert header.metadata["general.architecture"] == CARRIERS[pair.name]
    assert json.loads((pair.gguf / "gm.json").read_text())["layout"] == FAMILIES[pair.name].layout


def test_logits(pair: Pair) -> None:
    """Of a text at every position, and of a question with and without a picture."""
    engine = LlamaCppEngine(pair.gguf / "model.gguf", pair.gguf / "mmproj.gguf")
    model, processor = load_model(pair.mlx), Processor.from_folder(pair.mlx)
    try:
        ids = np.random.default_rng(0).integers(3, 260, (1, 40))
        found, wanted = engine.all_logits(ids[0].tolist()), logits(model, ids)
        assert np.median(errors(found, wanted)) < CLOSE
        assert (found.argmax(-1) != wanted.argmax(-1)).mean() <= 0.05
        pixels = mx.array(processor.pixels([picture()]))
        seen = image_features(model, pixels, rolled=needed_layout() == "cls_last")
        assert errors(engine.encode_image(picture()), entering(model, seen[0])).max() < CLOSE
        for message, image, features in ((TEXT, [], None), (SEEN, [picture()], seen)):
            ids = np.array([processor.encode([message], len(image)).ids])
            assert errors(engine.prompt_logits([message], image)[None], logits(model, ids, features)[-1:]) < CLOSE
    finally:
        engine.close()


def logits(model: Model, ids: np.ndarray, features: mx.array | None = None) -> np.ndarray:
    return np.array(model.logits(model.hidden(model.embed(ids, features))))[0]


def entering(model: Model, features: mx.array) -> np.ndarray:
    """Features [T, D] as the file's projector gives them to the architecture that carries the model."""
    architecture, values = find_architecture(model.config.text_config), np.array(features)
    root = values.shape[-1] ** 0.5
    values *= (root if model.config.scale_image_features else 1) / (root if architecture.scales_inputs else 1)
    return values - values.mean(-1, keepdims=True) if architecture.centred else values


def errors(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Errors of logits [L, V] or features [T, D] by position, relative to the largest value."""
    return np.abs(found - wanted).max(-1) / np.abs(wanted).max()


def test_verify_and_chat(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pixels and tokens are the same, and the file answers."""
    picture().save(tmp_path / "picture.png")
    ask = ("--image", str(tmp_path / "picture.png"), "--prompt", "What is it?", "--max-tokens", "5")
    facts = printed(capsys, "verify", str(pair.mlx), str(pair.gguf), *ask)
    assert facts["agrees"]
    assert {each["stage"]: each["error"] for each in facts["stages"][:2]} == {"pixels": 0, "ids": 0}
    seen = printed(capsys, "chat", "--model", str(pair.gguf / "model.gguf"), *ask)
    assert seen["engine"] == "llama.cpp" and seen["image_tokens"] == 4 and seen["generated_tokens"] > 0


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_family(tmp_path / "source", FAMILIES[name]).folder
    assert main(["convert", str(source), "-o", str(tmp_path / "out"), "--to", "gguf"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert re.search(REFUSED[name], said.err), said.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
