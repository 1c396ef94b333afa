"""A run's log as a picture: losses, exact match, learning rate, and how evenly the experts are used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.figure import COLOURS, INSTALL, save_png
from gm_mlx.train.log import LOG

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "curves.png"
SOFTWARE = "gm-mlx training"
TRAINING, VALIDATION = COLOURS[:2]
ABOVE: dict[str, Any] = {"frameon": False, "loc": "lower right", "bbox_to_anchor": (1, 1), "borderpad": 0.1}
POINTS = 400  # that a line has at most: a panel is not many more pixels wide
MARKED = 30  # points up to which each is marked
NAMED = 6  # layers that the legend names at most
MUCH = 20  # highest loss over the lowest, from where on a plain axis would hide how it ends


class Curve(NamedTuple):
    """Values by step, float64 [N] each; where several stand for one point, also their lowest and highest."""

    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray


def draw_curves(folder: Path) -> Path:
    """Draw ``log.jsonl`` as ``curves.png``, in the same folder.

    Args:
        folder: of a run, finished or not.

    Returns:
        The picture, which replaces an older one when it is complete.

    Raises:
        UserError: matplotlib is not installed, there is nothing to draw, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"curves need matplotlib, which is not installed here; {INSTALL}") from None
    lines = _read(folder / LOG)
    logged = [line for line in lines if line.get("kind") == "log"]
    validations = [line for line in lines if line.get("kind") == "validation"]
    if not logged:
        raise UserError(f"{folder / LOG}: has no lines of training; train for some steps first")
    panels: list[tuple[Any, Sequence[dict[str, Any]]]] = [(_draw_rate, logged)]
    if any("exact_match" in line for line in validations):
        panels.insert(0, (_draw_exact_match, validations))
    if any(line.get("load_entropy") for line in logged):
        panels.append((_draw_entropy, logged))
    figure = Figure(figsize=(10, 6.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    small = [str(number) for number in range(len(panels))]
    axes = figure.subplot_mosaic([["loss"] * len(small), small], height_ratios=[1.4, 1])  # type: ignore[list-item]
    _draw_losses(axes["loss"], logged, validations)
    for name, (draw, own) in zip(small, panels, strict=True):
        draw(axes[name], own)
    for name, one in axes.items():
        _tidy(one, max(line["step"] for line in lines), 10 if name == "loss" else 5)
    path = folder / CURVES
    try:
        save_png(figure, path, SOFTWARE)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room, or allow writing there") from None
    return path


def thinned(steps: np.ndarray, values: np.ndarray, most: int = POINTS) -> Curve:
    """A curve of ``most`` points or fewer. Of more, neighbours become one point: their mean, between low and high.

    Args:
        steps: float64 [N], rising.
        values: float64 [N].
        most: points of the curve.
    """
    edges = np.linspace(0, len(steps), min(most, len(steps)) + 1).astype(int)
    starts, sizes = edges[:-1], np.diff(edges)
    mean_steps, means = (np.add.reduceat(array, starts) / sizes for array in (steps, values))
    return Curve(mean_steps, means, np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts))


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that can be drawn: one that was cut by a crash cannot, nor can a loss that is no number."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from None
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and math.isfinite(line.get("loss", math.nan)):
            lines.append(line)
    return lines


def _curve(pairs: Iterable[tuple[int, float]]) -> Curve:
    """A curve of steps and values."""
    return thinned(*np.array([*pairs], np.float64).T)


def _values(lines: Iterable[dict[str, Any]], key: str) -> Curve:
    return _curve((line["step"], line[key]) for line in lines if key in line)


def _line(axes: Axes, curve: Curve, colour: Any, label: str, width: float = 1.5) -> None:
    marker = "o" if len(curve.steps) <= MARKED else None
    axes.plot(curve.steps, curve.values, color=colour, label=label, linewidth=width, marker=marker, markersize=3.5)


def _draw_losses(axes: Axes, logged: Sequence[dict[str, Any]], validations: Sequence[dict[str, Any]]) -> None:
    # The loss of the answers alone, where the log tells it apart: validation has no other.
    training = _values(logged, "answer_loss" if "answer_loss" in logged[0] else "loss")
    lowest, highest = training.low.min(), training.high.max()
    if (training.low < training.high).any():
        axes.fill_between(training.steps, training.low, training.high, color=TRAINING, alpha=0.2, linewidth=0)
    _line(axes, training, TRAINING, "training")
    if validations:
        own = _values(validations, "loss")
        lowest, highest = min(lowest, own.low.min()), max(highest, own.high.max())
        best = min(validations, key=lambda line: line["loss"])
        _line(axes, own, VALIDATION, f"validation; best {best['loss']:.4g} at step {best['step']:,}", width=2)
        axes.plot(best["step"], best["loss"], "o", markersize=9, markerfacecolor="none", color=VALIDATION)
    if 0 < lowest < highest / MUCH:
        _make_logarithmic(axes)
    else:
        axes.set_ylim(0, 1.06 * highest or 1)
    axes.legend(**ABOVE, fontsize=9, ncols=2)
    axes.set_ylabel("loss per token")


def _make_logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _draw_exact_match(axes: Axes, validations: Sequence[dict[str, Any]]) -> None:
    curve = _values(validations, "exact_match")
    _line(axes, curve._replace(values=100 * curve.values), VALIDATION, "validation")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("exact match, %")


def _draw_rate(axes: Axes, logged: Sequence[dict[str, Any]]) -> None:
    curve = _values(logged, "rate")
    _line(axes, curve, COLOURS[2], "rate")
    axes.set_ylim(0, 1.06 * curve.values.max() or 1)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.set_ylabel("learning rate")


def _draw_entropy(axes: Axes, logged: Sequence[dict[str, Any]]) -> None:
    from matplotlib import colormaps

    loads = [(line["step"], line["load_entropy"]) for line in logged if line.get("load_entropy")]
    layers = sorted(loads[0][1], key=int)
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(layers)))
    named = {layers[round(index)] for index in np.linspace(0, len(layers) - 1, min(NAMED, len(layers)))}
    for layer, colour in zip(layers, colours, strict=True):
        curve = _curve((step, load[layer]) for step, load in loads if layer in load)
        # A name that begins with an underscore stays out of the legend.
        _line(axes, curve, colour, f"layer {layer}" if layer in named else f"_{layer}", width=1.2)
    axes.legend(**ABOVE, fontsize=7, ncols=NAMED // 2, handlelength=1, columnspacing=1)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("load entropy (1 = even)")


def _tidy(axes: Axes, last_step: int, ticks: int) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("step", fontsize=9)
    axes.set_xlim(0, last_step * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.label.set_fontsize(9)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=2)
    axes.spines[["top", "right"]].set_visible(False)
