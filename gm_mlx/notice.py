"""What a model folder wants to tell about images: ``gm.json``, "notice"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class ImageNotice:
    """A line for a user who shows an image of a certain size.

    Attributes:
        text: the line; None for a folder that has nothing to say, and after it was said.
        side: of images whose longer side has at least so many pixels.
    """

    text: str | None = None
    side: int = 0

    @classmethod
    def from_folder(cls, folder: Path) -> ImageNotice:
        """Read a folder's notice; raises ``UserError`` for one without its two fields."""
        path = folder / "gm.json"
        if not path.is_file():
            return cls()
        try:
            notice = json.loads(path.read_bytes()).get("notice")
            return cls(str(notice["text"]), int(notice["min_image_side"])) if notice else cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: notice: needs text and min_image_side; correct it or take it out") from None

    def lines(self, images: Sequence[Image]) -> list[str]:
        """The line with the first image that it is about, and nothing after that."""
        if self.text is None or not any(max(image.size) >= self.side for image in images):
            return []
        text, self.text = self.text, None
        return [text]
