"""What all our pictures have in common: colours, and a file that appears when it is complete."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from gm_mlx.files import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSTALL = "pip install 'gm-mlx[plot]'"
COLOURS = ("#3b6fb6", "#e08214", "#4d9a51", "#b2477f", "#7a6bb0", "#8c6d46")


def save_png(figure: Figure, path: Path, software: str) -> None:
    """Write a PNG file.

    Args:
        figure: what to draw.
        path: the file; what was there stays until it is replaced.
        software: what drew it, as the file says.

    Raises:
        OSError: the file cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, metadata={"Software": software})
    with new_file(path) as partial:
        partial.write_bytes(drawn.getvalue())
