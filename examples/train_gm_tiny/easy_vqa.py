"""Read the easy-VQA data set (github.com/vzhou842/easy-VQA, MIT) from its archive or from a folder."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gm_mlx.errors import UserError

SPLITS = ("train", "test")


@dataclass(frozen=True)
class EasyVQA:
    """One split.

    Attributes:
        images: uint8 ``[N, 64, 64, 3]``; the published splits have one row per image id.
        questions: ``(question, answer, row of images)``.
    """

    images: NDArray[np.uint8]
    questions: list[tuple[str, str, int]]


def load_easy_vqa(source: Path, split: str | None) -> EasyVQA:
    """Read a published split of easy-VQA, or a selection of one.

    Args:
        source: ``easy_vqa.tar.gz``, or the folder in it that holds ``train`` and ``test``.
        split: ``"train"`` (4,000 images, 38,575 questions) or ``"test"`` (1,000 images, 9,673 questions); None when
            ``source`` is itself a folder with ``questions.json`` and ``images``.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"unknown split {split!r} of easy-VQA: use one of {', '.join(SPLITS)}")
    read = open_source(source)
    folder = f"{split}/" if split else ""
    try:
        questions = [(str(q), str(a), int(i)) for q, a, i in json.loads(read(f"{folder}questions.json"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: {folder}questions.json is no list of [question, answer, image id]") from error
    ids = sorted({image_id for _, _, image_id in questions})
    if not ids:
        raise UserError(f"{source}: {folder}questions.json is empty")
    names = [f"{folder}images/{image_id}.png" for image_id in ids]
    images = np.stack([_decode(read(name), f"{source}: {name}") for name in names])
    rows = {image_id: row for row, image_id in enumerate(ids)}
    return EasyVQA(images, [(question, answer, rows[image_id]) for question, answer, image_id in questions])


def open_source(source: Path) -> Callable[[str], bytes]:
    """A function that reads a file of the archive or folder by its path below the top, ``"test/images/7.png"``.

    Raises:
        UserError: here when ``source`` cannot be opened, and from the function when it holds no such file.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist: give easy_vqa.tar.gz or the folder unpacked from it")
    return _folder_reader(source) if source.is_dir() else _archive_reader(source)


def _folder_reader(folder: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: give easy_vqa.tar.gz or its unpacked folder") from error

    return read


def _archive_reader(archive: Path) -> Callable[[str], bytes]:
    """Unpack everything into memory (5 MB): a gzip stream is slow to read in any order but its own."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    contents[member.name.partition("/")[2]] = file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{archive} is not a whole tar archive: fetch it again") from error

    def read(name: str) -> bytes:
        if name not in contents:
            raise UserError(f"{archive} holds no {name}: give easy-VQA's own archive")
        return contents[name]

    return read


def _decode(data: bytes, name: str) -> NDArray[np.uint8]:
    try:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNG chunks
        raise UserError(f"{name} is not a readable image: fetch the data again") from error
    if pixels.shape != (64, 64, 3):
        raise UserError(f"{name} is {pixels.shape[1]} x {pixels.shape[0]} pixels instead of 64 x 64")
    return pixels
