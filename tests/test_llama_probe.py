"""The probe of the class token's place, and what is remembered of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_model
from tiny_gguf import our_folder

from gm_mlx.errors import UserError
from gm_mlx.llama import memo, probe
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.llama.memo import remembered
from gm_mlx.llama.probe import PATCHES, WIDTH, needed_layout
from gm_mlx.mlx_engine import MLXEngine


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is remembered, in the process or on the disk; returns where it will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    needed_layout.cache_clear()
    return tmp_path / "gm-mlx"


def library(layout: str | None) -> Callable[[Path, Path, object], np.ndarray]:
    """A vision library that computes towers right for one layout and wrong for others."""
    weights = probe._weights()
    pixels = np.random.default_rng(1).integers(0, 256, (probe.SIDE, probe.SIDE, 3), dtype=np.uint8)
    right = probe._reference(weights, pixels)
    moved = np.concatenate([right[1:], np.ones((1, WIDTH))])  # as a library with the defect gives them

    def features(text: Path, mmproj: Path, image: object) -> np.ndarray:
        if mmproj.stem != layout:
            return right[np.random.default_rng(0).permutation(PATCHES)]
        return right if layout == "cls_first" else moved

    return features


def test_the_installed_library_computes_one_of_the_layouts(anew: Path) -> None:
    """Not which: a new llama.cpp may change that. But the answer must be the same each time, and be remembered."""
    layout = needed_layout()
    assert layout in probe.LAYOUTS
    assert [path.read_text() for path in anew.iterdir()] == [layout]
    assert probe._probe() == layout


@pytest.mark.parametrize("layout", probe.LAYOUTS)
def test_what_the_probe_says(anew: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setattr(probe, "_features", library(layout))
    assert needed_layout() == layout
    monkeypatch.setattr(probe, "_features", library(None))
    assert needed_layout() == layout  # remembered in the process
    needed_layout.cache_clear()
    assert needed_layout() == layout  # and on the disk


def test_neither_layout(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_features", library(None))
    with pytest.raises(UserError, match=r"in a way that is not known here; .*--clip-layout"):
        needed_layout()
    assert not anew.exists()


def test_a_converted_tower_is_right_in_the_layout_that_the_probe_finds(tmp_path: Path, anew: Path) -> None:
    model = tiny_model(config=tiny_config("clip"))
    source, folder = our_folder(tmp_path, model=model, layout=needed_layout())
    engine = LlamaCppEngine(folder / "model.gguf", folder / "mmproj.gguf", threads=1)
    assert engine.notices() == []
    mlx_engine, image = MLXEngine(source), picture()
    wanted = np.array(mlx_engine._model.encode_images(mx.array(mlx_engine.processor.pixels([image])))[0])
    features = engine.encode_image(image)
    if needed_layout() == "cls_last":  # the first patch is left out, and the class token comes last
        wanted, features = wanted[1:], features[:-1]
    assert np.linalg.norm(features - wanted) / np.linalg.norm(wanted) < 0.01
    engine.close()


def test_what_is_remembered_depends_on_the_files(anew: Path, tmp_path: Path) -> None:
    file, found = tmp_path / "file", iter("abcdef")

    def find() -> str:
        return next(found)

    file.write_text("1")
    assert remembered("kind", [file], find) == remembered("kind", [file], find) == "a"
    assert remembered("other", [file], find) == "b"
    link = tmp_path / "link"
    link.symlink_to(file)
    assert remembered("kind", [link], find) == "a"
    file.write_text("12")
    assert remembered("kind", [file], find) == "c"
    os.utime(file, (1, 1))
    assert remembered("kind", [file], find) == "d"
    assert not [path for path in anew.iterdir() if path.name.endswith(str(os.getpid()))]


def test_a_home_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(memo, "_folder", lambda: tmp_path / "file")
    assert remembered("kind", [tmp_path / "file"], lambda: "found") == "found"


def test_two_processes_at_once(anew: Path) -> None:
    """Each finds the layout and neither sees half of what the other writes."""
    code = "import gm_mlx, json; from gm_mlx.llama.probe import needed_layout; print(json.dumps(needed_layout()))"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    assert {json.loads(run.communicate()[0]) for run in runs} == {needed_layout()}
