"""Images through llama.cpp's vision library, mtmd: where they stand in a prompt, and their features.

mtmd turns parts of a prompt, texts and images, into chunks: token ids, or a number of positions that an image takes.
One image can be several chunks, with ids between them. That needs only the image's size, and so it is done for a whole
conversation each time. Pixels are given, and features computed, only for an image that was not seen lately.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Image

from gm_mlx.errors import UserError
from gm_mlx.images import image_hash
from gm_mlx.llama.binding import LOG, library
from gm_mlx.llama.model import LlamaModel
from gm_mlx.llama.worker import Worker

REMEMBERED_IMAGES = 16


@dataclass(frozen=True)
class Text:
    """A part of a prompt that is text. ``special``: control tokens count by their names in it."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class Picture:
    """A chunk of an image.

    Attributes:
        image: the image's number in the conversation.
        number: the chunk's number in the image.
        rows: input embeddings that it has.
        positions: positions that it takes, which can be fewer.
        chunk: mtmd's description of it, without pixels.
        owner: what keeps the description alive.
    """

    image: int
    number: int
    rows: int
    positions: int
    chunk: Any
    owner: Any


class Chunks:
    """What mtmd made of a prompt; it lives as long as one of its pictures."""

    def __init__(self, c: Any) -> None:
        self._c = c
        self.handle = c.mtmd_input_chunks_init()

    def __del__(self) -> None:
        self._c.mtmd_input_chunks_free(self.handle)

    def parts(self) -> list[list[int] | Picture]:
        """Token ids and pictures, in order."""
        c, out = self._c, []
        counts: dict[int, int] = {}
        for index in range(c.mtmd_input_chunks_size(self.handle)):
            chunk = c.mtmd_input_chunks_get(self.handle, index)
            if c.mtmd_input_chunk_get_type(chunk) == c.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                ids = c.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                out.append(ids[: count.value] if count.value else [])
                continue
            image = int(c.mtmd_input_chunk_get_id(chunk))
            number = counts[image] = counts.get(image, -1) + 1
            rows, positions = c.mtmd_input_chunk_get_n_tokens(chunk), c.mtmd_input_chunk_get_n_pos(chunk)
            out.append(Picture(image, number, rows, positions, chunk, self))
        return out


class Vision:
    """The tower and projector of a model.

    Args:
        model: a model with an mmproj file.
        worker: what llama.cpp runs in.
        fit: what makes the square image that the tower reads, uint8 [size, size, 3]; None where mtmd does that.
    """

    def __init__(self, model: LlamaModel, worker: Worker, fit: Callable[[Image], np.ndarray] | None = None) -> None:
        self._c = library()
        self._model = model
        self._worker = worker
        self._fit = fit
        self._features: OrderedDict[str, list[np.ndarray]] = OrderedDict()

    def chunks(self, parts: Sequence[Text | Image], side: int = 0) -> Chunks:
        """Where the images of a prompt stand, without looking at them.

        Args:
            parts: the prompt.
            side: of the square that images will be made, where they are.
        """
        sizes = [(side, side) if side else part.size for part in parts if not isinstance(part, Text)]
        return self._chunks(parts, sizes, [None] * len(sizes))

    def encode(self, image: Image, digest: str | None = None) -> tuple[list[np.ndarray], bool]:
        """Features of an image.

        Args:
            image: the image.
            digest: its hash, if known already.

        Returns:
            float32 [T, D] for each of its chunks, and whether they were computed now and not remembered.
        """
        digest = digest or image_hash(image)
        fresh = digest not in self._features
        if fresh:
            self._features[digest] = self._compute(image)
        self._features.move_to_end(digest)
        while len(self._features) > REMEMBERED_IMAGES:
            self._features.popitem(last=False)
        return self._features[digest], fresh

    def _compute(self, image: Image) -> list[np.ndarray]:
        pixels = np.ascontiguousarray(self._fit(image) if self._fit else np.asarray(image.convert("RGB")))
        height, width, _ = pixels.shape
        chunks = self._chunks([image], [(width, height)], [pixels])
        out = []
        for part in chunks.parts():
            if not isinstance(part, Picture):
                continue
            LOG.clear()
            if self._worker.run(self._c.mtmd_encode_chunk, self._model.mtmd, part.chunk):
                raise RuntimeError(f"llama.cpp could not read the image: {LOG.reason()}")
            pointer = self._c.mtmd_get_output_embd(self._model.mtmd)
            out.append(np.ctypeslib.as_array(pointer, (part.rows, self._model.width)).copy())
        return out

    def _chunks(
        self, parts: Sequence[Text | Image], sizes: Sequence[tuple[int, int]], pixels: Sequence[np.ndarray | None]
    ) -> Chunks:
        c = self._c
        array = (ctypes.POINTER(c.mtmd_input_part) * len(parts))()
        keep: list[Any] = []  # what C points to, until it has read it
        bitmaps: list[Any] = []
        try:
            for index, part in enumerate(parts):
                entry = c.mtmd_input_part()
                if isinstance(part, Text):
                    content = part.text.encode("utf-8", errors="replace")
                    text = c.mtmd_input_text(content, len(content), False, part.special)
                    entry.text = ctypes.pointer(text)
                    keep += [content, text]
                else:
                    number = len(bitmaps)
                    data = pixels[number]
                    pointer = None if data is None else data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
                    bitmaps.append(c.mtmd_bitmap_init(*sizes[number], pointer))
                    c.mtmd_bitmap_set_id(bitmaps[-1], str(number).encode())
                    entry.bitmap = bitmaps[-1]
                array[index] = ctypes.pointer(entry)
                keep.append(entry)
            out = Chunks(c)
            LOG.clear()
            if self._c.mtmd_tokenize_from_parts(self._model.mtmd, out.handle, array, len(parts), False):
                raise UserError(f"llama.cpp cannot use an image: {LOG.reason()}; try another size of it")
            return out
        finally:
            for bitmap in bitmaps:
                c.mtmd_bitmap_free(bitmap)
