"""A language model and a tower become a vision-language model whose projector knows nothing yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import convert, loaded, model_config, reference, write_tower
from test_convert_bases import write_base

from gm_mlx.cli.main import main
from gm_mlx.convert.checkpoint import open_checkpoint
from gm_mlx.convert.new_projector import with_new_projector
from gm_mlx.convert.translate import translate
from gm_mlx.errors import UserError
from gm_mlx.processor import Processor
from gm_mlx.weights import load_model, named_arrays


def parts(folder: Path, family: str = "gemma", tower: str = "clip") -> tuple[Any, Path, Path]:
    """A whole model, and the folders of its decoder and of its tower."""
    model = reference(model_config(family, tower), family)
    return model, write_base(folder, model, family), write_tower(folder / "tower", model, whole=tower == "siglip")


@pytest.mark.parametrize(("family", "tower"), [("gemma", "clip"), ("llama", "siglip")])
def test_all_but_the_projector_is_kept(tmp_path: Path, family: str, tower: str) -> None:
    model, base, vision = parts(tmp_path, family, tower)
    made = translate(with_new_projector(open_checkpoint(base), vision), vision=vision)
    config = made.config
    assert (config.vision_feature_layer, config.features_are_grid) == (-2, True)
    assert made.processor.template.name == ("gemma" if family == "gemma" else "v1")
    assert made.processor.image is not None and made.processor.image.mode == "pad"
    ids = np.random.default_rng(0).integers(3, 300, (1, 12))
    ours = np.array(loaded(made)(mx.array(ids)))
    import torch

    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_the_projector_is_drawn_as_torch_draws_linears(tmp_path: Path) -> None:
    _, base, vision = parts(tmp_path)
    checkpoint = open_checkpoint(base)

    def projector(seed: int) -> dict[str, np.ndarray]:
        tensors = with_new_projector(checkpoint, vision, seed).tensors
        return {name: np.array(tensors[name].read()) for name in tensors if "mm_projector" in name}

    first, again, other = projector(0), projector(0), projector(1)
    for name, width in (("0", 128), ("2", 32)):
        weight, bias = first[f"model.mm_projector.{name}.weight"], first[f"model.mm_projector.{name}.bias"]
        assert (weight.shape, bias.shape) == ((32, width), (32,))
        for values in (weight, bias):
            assert 0.7 * width**-0.5 < np.abs(values).max() <= width**-0.5
            assert np.abs(values.mean()) < 0.5 * width**-0.5
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        assert (values != other[name]).all()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, base, vision = parts(tmp_path)
    out = tmp_path / "start"
    assert main(["convert", str(base), "--vision", str(vision), "--new-projector", "-o", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert any("train it by gm-mlx train --stage 1" in note for note in facts["notes"])
    assert set(json.loads((out / "gm.json").read_text())["sources"]) == {"checkpoint", "vision"}
    weights = named_arrays(load_model(out))
    assert mx.abs(weights["multi_modal_projector.linear_1.weight"]).max().item() > 0
    Processor.from_folder(out)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, base, vision = parts(tmp_path)
    whole = with_new_projector(open_checkpoint(base), vision)
    with pytest.raises(UserError, match="has a projector already; leave out --new-projector"):
        with_new_projector(whole, vision)
    with pytest.raises(UserError, match=r"has no model\.embed_tokens\.weight; --new-projector takes a language model"):
        with_new_projector(open_checkpoint(vision), vision)
    with pytest.raises(UserError, match="what --base takes, and --new-projector"):
        convert(base)
    assert main(["convert", str(base), "--new-projector", "-o", str(tmp_path / "out")]) == 2
    assert "and the tower of --vision; give these two" in capsys.readouterr().err
