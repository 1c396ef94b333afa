"""The figures as a picture: a panel for each measure, a bar for each form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from gm_mlx.bench.report import LETTERS, MEASURES, SPEED, Row, number, scaled
from gm_mlx.errors import UserError
from gm_mlx.figure import COLOURS, INSTALL, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOFTWARE = "gm-mlx bench"  # in the file, so that only a plot is ever replaced by another
COLUMNS = 3
# What is left out: how long a file takes to load says more about the disk.
SHOWN = tuple(measure for measure in MEASURES if measure != "load")
LONGER_IS = {SPEED: "longer is faster", "s": "shorter is faster", "bytes": "shorter is less"}


def check_plot(path: Path) -> None:
    """Refuse what cannot be drawn, before anything is measured.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written or is something else.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--plot {path}: writes PNG files; give it a name that ends with .png")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.absolute().parent}; make it first")
    if path.exists() and not _is_ours(path):
        raise UserError(f"--plot {path}: exists and is no plot of gm-mlx bench; choose another name")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError(f"--plot needs matplotlib, which is not installed here; {INSTALL}") from None


def write_plot(path: Path, measured: Sequence[Row], names: Sequence[str], title: str) -> None:
    """Draw a PNG file.

    Args:
        path: the file; it appears when it is complete.
        measured: from ``gm_mlx.bench.report.rows``.
        names: of the forms, by number.
        title: what was measured on.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(measured)
    forms = sorted({row.form for row in measured})
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    height = 0.9 + 0.38 * len(forms)
    figure = Figure(figsize=(3.9 * columns + 0.4, height * lines + 0.7 + 0.24 * len(forms)), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (name, own) in zip(grid.flat, panels.items(), strict=False):
        _draw(axes, name, own, forms)
    figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    handles = [_handle(form) for form in forms]
    labels = [f"{LETTERS[form]}  {names[form]}" for form in forms]
    figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=9)
    try:
        save_png(figure, path, SOFTWARE)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written ({error.strerror}); write elsewhere") from None


def _panels(measured: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each panel, by its title; forms whose pictures differ in tokens share one."""
    panels: dict[str, list[Row]] = {}
    for measure in SHOWN:
        own = [row for row in measured if row.measure == measure]
        if own:
            tests = {row.test: None for row in own}
            panels[", ".join(tests)] = own
    return panels


def _draw(axes: Axes, name: str, own: Sequence[Row], forms: Sequence[int]) -> None:
    unit, divisor = scaled(own[0].unit, max(row.median for row in own))
    longest = max(row.high for row in own) / divisor
    for row in own:
        y = forms.index(row.form)
        low, middle, high = row.low / divisor, row.median / divisor, row.high / divisor
        axes.barh(y, middle, height=0.62, color=_colour(row.form))
        if len(row.values) > 1:
            axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color="#333333", capsize=3, linewidth=1)
        axes.text(high + 0.02 * longest, y, number(middle), va="center", fontsize=8)
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel(f"{unit}; {LONGER_IS[own[0].unit]}", fontsize=8)
    axes.set_xlim(0, 1.22 * longest)
    axes.set_ylim(len(forms) - 0.4, -0.6)  # the first form on top
    axes.set_yticks(range(len(forms)), [LETTERS[form] for form in forms])
    axes.tick_params(labelsize=8, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def _handle(form: int) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=_colour(form))


def _colour(form: int) -> str:
    return COLOURS[form % len(COLOURS)]


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError):
        return False
