"""Vision towers from folders of their own, and towers that are missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_layouts import LLAVA, MOE_LLAVA, TOWER_IDS, llava_json, moe_llava_json, state_of
from checkpoints import TOLERANCE, convert, largest_error, model_config, reference, write, write_tower

from gm_mlx.config import MoEConfig
from gm_mlx.convert.checkpoint import open_checkpoint
from gm_mlx.convert.towers import missing_tower
from gm_mlx.errors import UserError

SPARSE = MoEConfig()


@pytest.mark.parametrize(("tower", "whole"), [("clip", True), ("clip", False), ("siglip", True)])
def test_a_tower_from_a_folder(tmp_path: Path, tower: str, whole: bool) -> None:
    config = model_config("llama", tower, moe=SPARSE)
    model = reference(config, "llama")
    folder = write(tmp_path / "model", moe_llava_json(config, "llama", tower), state_of(model, MOE_LLAVA, tower=False))
    assert missing_tower(open_checkpoint(folder)) == TOWER_IDS[tower]
    vision = write_tower(tmp_path / "tower", model, whole)
    translation = convert(folder, vision=vision)
    assert translation.config.vision_config == config.vision_config
    assert translation.provenance["vision_source"] == "folder"
    assert translation.files == [folder / "model.safetensors", vision / "model.safetensors"]
    assert largest_error(translation, model) <= TOLERANCE


def test_a_tower_from_a_folder_wins_over_the_stored_one(tmp_path: Path) -> None:
    config = model_config()
    model, other = reference(config), reference(config, seed=1)
    folder = write(tmp_path / "model", llava_json(config, "gemma"), state_of(model, LLAVA))
    assert missing_tower(open_checkpoint(folder)) is None
    model.model.vision_tower.load_state_dict(other.model.vision_tower.state_dict())
    translation = convert(folder, vision=write_tower(tmp_path / "tower", other, whole=False))
    assert largest_error(translation, model) <= TOLERANCE


def test_a_missing_tower_is_named(tmp_path: Path) -> None:
    config = model_config()
    write(tmp_path, llava_json(config, "gemma"), state_of(reference(config), LLAVA, tower=False))
    with pytest.raises(UserError, match=f"no vision tower; give the folder of {TOWER_IDS['clip']} with --vision"):
        convert(tmp_path)


def test_a_tower_of_an_unknown_name_needs_its_folder(tmp_path: Path) -> None:
    config = model_config()
    model = reference(config)
    folder = write(tmp_path / "model", llava_json(config, "gemma", mm_vision_tower="me/tower"), state_of(model, LLAVA))
    with pytest.raises(UserError, match=r"mm_vision_tower is 'me/tower'.*--vision"):
        convert(folder)
    assert largest_error(convert(folder, vision=write_tower(tmp_path / "t", model, False)), model) <= TOLERANCE
