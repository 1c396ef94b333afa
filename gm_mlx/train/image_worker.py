"""The process that ``image_pool`` starts: reads images and sends their pixels back. It never imports MLX.

Requests and replies are pickles on standard input and output. It ends when its input ends, so it cannot outlive whoever
started it, however that one ended.
"""

from __future__ import annotations

import os
import pickle
import sys

import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.images import ImageConfig, load_image, square


def decode(source: str | bytes, config: ImageConfig) -> np.ndarray:
    """An image as the model's tower reads it, but for its normalization: uint8 [size, size, 3].

    Raises:
        UserError: see ``images.load_image``.
    """
    return square(load_image(source, exif=config.exif, scale_16bit=config.scale_16bit), config)


def main() -> None:
    """Answer requests, each a source and a configuration, with pixels or with the text of a ``UserError``."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder may print must not come between the replies
    while True:
        try:
            source, config = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply: np.ndarray | str = decode(source, config)
        except UserError as error:
            reply = str(error)
        except MemoryError:
            reply = "not enough memory to decode it; use fewer workers"
        pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()


if __name__ == "__main__":
    main()
