"""The picture of a run's log: what is in it, of few points and of many, and when there can be none."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from gm_mlx.errors import UserError
from gm_mlx.train import curves
from gm_mlx.train.curves import CURVES, POINTS, draw_curves, thinned


def logged(step: int, **figures: Any) -> dict[str, Any]:
    return {"kind": "log", "step": step, "loss": 4 / step + 0.5, "rate": 1e-3 / step, **figures}


def validated(step: int, loss: float, **figures: Any) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "loss": loss, "rows": 9, **figures}


def write(folder: Path, lines: list[dict[str, Any]], end: str = "") -> Path:
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")
    return folder


def drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, np.ndarray]]:
    """The points of all lines, [N, 2], by the y axis's label and the line's name."""
    figures: list[Figure] = []
    with monkeypatch.context() as patched:
        patched.setattr(curves, "save_png", lambda figure, *_: figures.append(figure))
        draw_curves(folder)
    figures[0].canvas.draw()  # labels that overlap or cannot be drawn would warn
    return {
        axes.get_ylabel(): {str(line.get_label()): np.array(line.get_xydata()) for line in axes.lines}
        for axes in figures[0].axes
    }


def test_five_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = {3: {"0": 0.9, "2": 0.5}}
    lines = [logged(step, load_entropy=loads.get(step, {"0": 0.8, "2": 0.4})) for step in range(1, 6)]
    lines[2:2] = [validated(2, 0.9, exact_match=0.25)]
    lines += [validated(5, 0.7, exact_match=0.75)]
    panels = drawn(write(tmp_path, lines), monkeypatch)
    assert list(panels) == ["loss per token", "exact match, %", "learning rate", "load entropy (1 = even)"]
    losses, matches, rates, entropy = panels.values()
    np.testing.assert_allclose(losses["training"], [(step, 4 / step + 0.5) for step in range(1, 6)])
    np.testing.assert_allclose(losses["validation; best 0.7 at step 5"], [(2, 0.9), (5, 0.7)])
    np.testing.assert_allclose(matches["validation"], [(2, 25), (5, 75)])
    np.testing.assert_allclose(rates["rate"], [(step, 1e-3 / step) for step in range(1, 6)])
    np.testing.assert_allclose(entropy["layer 2"][:, 1], [0.4, 0.4, 0.5, 0.4, 0.4])
    assert list(entropy) == ["layer 0", "layer 2"]


def test_the_loss_of_the_answers_where_it_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels = drawn(write(tmp_path, [logged(step, answer_loss=step / 10) for step in (1, 2)]), monkeypatch)
    np.testing.assert_allclose(panels["loss per token"]["training"], [(1, 0.1), (2, 0.2)])
    assert list(panels) == ["loss per token", "learning rate"]


def test_many_points_become_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [logged(step, load_entropy={str(layer): 0.5 for layer in range(10)}) for step in range(1, 5001)]
    panels = drawn(write(tmp_path, lines), monkeypatch)
    for panel in panels.values():
        assert all(len(points) == POINTS for points in panel.values())
    names = [name for name in panels["load entropy (1 = even)"] if not name.startswith("_")]
    assert len(names) == 6 and names[0] == "layer 0" and names[-1] == "layer 9"  # a legend that can be read


@pytest.mark.parametrize("count", [1, 2, POINTS, POINTS + 1, 3 * POINTS, 100_000])
def test_thinning_keeps_the_mean_and_the_extremes(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    curve = thinned(np.arange(count, dtype=np.float64), values)
    assert len(curve.steps) == min(count, POINTS)
    assert (np.diff(curve.steps) > 0).all()
    assert (curve.low.min(), curve.high.max()) == (values.min(), values.max())
    assert (curve.low <= curve.values).all() and (curve.values <= curve.high).all()
    if count % len(curve.steps) == 0:  # then all points stand for as many
        np.testing.assert_allclose([curve.values.mean(), curve.steps.mean()], [values.mean(), (count - 1) / 2])


def test_a_steep_loss_gets_a_logarithmic_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(curves, "save_png", lambda figure, *_: figures.append(figure))
    draw_curves(write(tmp_path, [logged(step, answer_loss=10.0**-step) for step in range(1, 4)]))
    draw_curves(write(tmp_path, [logged(step) for step in range(1, 4)]))
    assert [figure.axes[0].get_yscale() for figure in figures] == ["log", "linear"]
    assert figures[1].axes[0].get_ylim()[0] == 0


def test_the_file(tmp_path: Path) -> None:
    path = draw_curves(write(tmp_path, [logged(1), validated(1, math.nan)], end='{"kind": "log", "st'))
    assert path == tmp_path / CURVES
    with Image.open(path) as image:
        assert image.size == (1500, 960)
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    draw_curves(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CURVES, "log.jsonl"]


def test_when_there_can_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be read \(No such file or directory\); name the folder"):
        draw_curves(tmp_path)
    with pytest.raises(UserError, match=r"log\.jsonl: has no lines of training; train"):
        draw_curves(write(tmp_path, [validated(1, 0.5)]))
    write(tmp_path, [logged(1)])
    (tmp_path / CURVES).mkdir()
    with pytest.raises(UserError, match=r"curves\.png: cannot be written \(Is a directory\)"):
        draw_curves(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CURVES, "log.jsonl"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'gm-mlx\[plot\]'"):
        draw_curves(tmp_path)
