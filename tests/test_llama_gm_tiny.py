"""gm-tiny as GGUF: it knows what it knows, in a conversation, in both engines."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

import gm_mlx
from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig
from gm_mlx.convert.to_gguf.folder import gguf_pair, write_gguf_folder
from gm_mlx.convert.to_gguf.types import find_target
from gm_mlx.hub import BUILT_IN_GGUF, built_in, find_model
from gm_mlx.quant.quantize import open_source

SHAPES = str(Path(__file__).parent.parent / "examples" / "images" / "shapes.png")
QUESTIONS = ("what color is the circle?", "what shape is blue?", "is there a green rectangle?")


@pytest.fixture(scope="module", params=["Q8_0", "Q4_0"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_source(find_model(), requantize=True)
    out = tmp_path_factory.mktemp("gm-tiny") / "gguf"
    pair = gguf_pair(source.config, source.tensors, source.processor, name="gm-tiny")
    write_gguf_folder(out, pair, gm={}, card="", target=find_target(request.param, {}))
    return out


def test_the_command_of_the_readme(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = str(folder / "model.gguf")
    assert main(["chat", "--model", model, "--image", SHAPES, "--prompt", QUESTIONS[0]]) == 0
    assert capfd.readouterr() == ("red\n", "")


def test_a_conversation(folder: Path) -> None:
    """Each turn reads only what is new, and both engines say the same."""
    models = [gm_mlx.load(), gm_mlx.load(str(folder))]
    talks = [model.conversation() for model in models]
    for turn, question in enumerate((*QUESTIONS, QUESTIONS[0])):
        images = [SHAPES] if turn in (0, 3) else []
        answers = [list(talk.ask(question, images)) for talk in talks]
        texts = ["".join(piece.text for piece in pieces) for pieces in answers]
        assert texts[0] == texts[1]
        stats = [pieces[-1].stats for pieces in answers]
        assert stats[0].prompt_tokens == stats[1].prompt_tokens
        assert stats[1].images_encoded == (turn == 0)  # the same picture again is not looked at again
        assert (stats[1].cached_tokens > 64) == (turn > 0)
    for model in models:
        model.close()


def test_the_files_in_the_box_are_gm_tiny(tmp_path: Path) -> None:
    """They are what `gm-mlx convert gm-tiny --to gguf --quantize Q8_0` writes, weight for weight."""
    assert main(["convert", "gm-tiny", "-o", str(tmp_path / "out"), "--to", "gguf", "--quantize", "Q8_0"]) == 0
    shipped = built_in(BUILT_IN_GGUF)
    for name in ("model.gguf", "mmproj.gguf"):
        ours, fresh = gguf.GGUFReader(shipped / name), gguf.GGUFReader(tmp_path / "out" / name)
        pairs = (sorted(reader.tensors, key=lambda tensor: tensor.name) for reader in (ours, fresh))
        for mine, other in zip(*pairs, strict=True):
            assert (mine.name, mine.tensor_type) == (other.name, other.tensor_type)
            # Routers are products: another library may round a last bit the other way.
            assert np.allclose(mine.data, other.data, rtol=1e-6, atol=0)
        keys = [{key: field.contents() for key, field in reader.fields.items()} for reader in (ours, fresh)]
        for table in keys:
            del table["gm.pair"]  # a hash of the config's text, among others, which new keys with defaults change
            if "gm.config" in table:
                table["gm.config"] = ModelConfig.from_dict(json.loads(table["gm.config"]))
        assert keys[0] == keys[1]
    size = sum(file.stat().st_size for folder in (shipped, built_in()) for file in folder.iterdir())
    assert size < 16e6


def test_the_files_in_the_box_answer() -> None:
    model = gm_mlx.load(BUILT_IN_GGUF)
    try:
        assert model.engine.name == "llama.cpp"
        assert str(model.chat("what color is the circle?", [SHAPES])) == "red"
    finally:
        model.close()
