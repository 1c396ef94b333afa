"""Which GGUF files a name stands for: a file, a folder of files, or a repository on Hugging Face.

A model that reads images is two files: the text model, and the vision model that llama.cpp's people call mmproj. And
repositories hold one model in a dozen quantizations, of which one is taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from gm_mlx.errors import UserError
from gm_mlx.gguf_file import GGUFHeader, read_header
from gm_mlx.hub import BUILT_IN, BUILT_IN_GGUF, REPO_ID, built_in, fetch, find_model, repository_files

SUFFIX = ".gguf"
MODEL_FILE = "model.gguf"  # in folders that gm-mlx writes
MMPROJ = "mmproj"  # part of the name of every vision model's file
# Of several quantizations the first that is there; what is not named here comes last.
QUANTIZATIONS = ("Q4_K_M", "Q4_0", "Q4_K_S", "IQ4_XS", "Q5_K_M", "Q8_0", "Q6_K", "F16", "BF16", "F32")
# Vision models lose more by quantization, and are small.
MMPROJ_QUANTIZATIONS = ("F16", "BF16", "Q8_0", "F32")
NOT_MODELS = (MMPROJ, "imatrix", "mtp-", "draft")


@dataclass(frozen=True)
class GGUFFiles:
    """A model in GGUF.

    Attributes:
        model: the text model's file, or the first part of it.
        mmproj: the vision model's file, or None.
    """

    model: Path
    mmproj: Path | None


def find_gguf(name: str | None, mmproj: str | None = None, pattern: str | None = None) -> GGUFFiles | None:
    """The GGUF files of a model.

    Args:
        name: as a user names a model: a ``.gguf`` file, a folder with such files, a repository ``org/name``, or
            "gm-tiny-gguf" for the one that ships with the package.
        mmproj: the vision model's file; without it, one that fits and lies beside the text model.
        pattern: which of several files to take, such as "Q8_0" or "*-it-Q4_0.gguf".

    Returns:
        The files, or None where the name stands for a model folder of gm-mlx (see ``find_model``).

    Raises:
        UserError: there is no such file, or it cannot be fetched.
    """
    path = Path(os.path.expanduser(name or ""))
    if name is None or name == BUILT_IN:
        files = None
    elif name == BUILT_IN_GGUF and not path.is_dir():
        files = _in_folder(built_in(name), mmproj, pattern)
    elif path.suffix == SUFFIX and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{name}: no such file; check the path")
        files = _with_mmproj(path, mmproj)
    elif path.is_dir():
        files = _in_folder(path, mmproj, pattern)
    elif REPO_ID.fullmatch(name):
        files = _in_repository(name, mmproj, pattern)
    else:
        files = None
    if files is None and (mmproj or pattern):
        option = "--mmproj" if mmproj else "--gguf-file"
        raise UserError(
            f"{option} is for GGUF files, and {name or BUILT_IN} is none; leave it out or name a .gguf file"
        )
    return files


def _in_folder(folder: Path, mmproj: str | None, pattern: str | None) -> GGUFFiles | None:
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(SUFFIX)]
    if not names or (any(folder.glob("*.safetensors")) and not pattern):
        return None
    return _with_mmproj(folder / choose_model(names, pattern, str(folder)), mmproj)


def _in_repository(repo: str, mmproj: str | None, pattern: str | None) -> GGUFFiles | None:
    if not pattern and any(find_model(repo).glob("*.safetensors")):
        return None
    names = [name for name in repository_files(repo) if name.endswith(SUFFIX)]
    if not names:
        return None
    chosen = choose_model(names, pattern, repo)
    vision = choose_mmproj(names, beside=chosen)
    folder = fetch(repo, (*_parts(chosen, names), *([vision] if vision and not mmproj else [])))
    if not (folder / chosen).is_file():
        raise UserError(f"{repo}: {chosen} is not in the local cache, and HF_HUB_OFFLINE is set; unset it to fetch it")
    if mmproj:
        return _with_mmproj(folder / chosen, mmproj)
    return GGUFFiles(folder / chosen, folder / vision if vision and (folder / vision).is_file() else None)


def choose_model(names: Iterable[str], pattern: str | None, place: str) -> str:
    """One text model of several files; raises ``UserError`` where none is one or fits the pattern."""
    firsts = [
        name
        for name in sorted(names)
        if not any(word in PurePosixPath(name).name.lower() for word in NOT_MODELS) and _parts(name, names)[0] == name
    ]
    if not firsts:
        raise UserError(f"{place}: has no text model among its GGUF files; name the folder or repository that has")
    if pattern:
        wanted = (pattern if any(char in pattern for char in "*?[") else f"*{pattern}*").lower()
        found = [name for name in firsts if any(fnmatch(text, wanted) for text in _spellings(name))]
        if not found:
            raise UserError(f"{place}: no GGUF file fits --gguf-file {pattern}; there are {', '.join(firsts[:12])}")
        firsts = found
    elif MODEL_FILE in firsts:
        return MODEL_FILE
    return min(firsts, key=lambda name: (_rank(name, QUANTIZATIONS), name))


def choose_mmproj(names: Iterable[str], beside: str = "") -> str | None:
    """One vision model of several files, rather from the folder of the text model; None where there is none."""
    found = [name for name in sorted(names) if MMPROJ in PurePosixPath(name).name.lower()]
    folder = PurePosixPath(beside).parent

    def order(name: str) -> tuple[bool, int, str]:
        return PurePosixPath(name).parent != folder, _rank(name, MMPROJ_QUANTIZATIONS), name

    return min(found, key=order, default=None)


def _with_mmproj(model: Path, named: str | None) -> GGUFFiles:
    """A text model and its vision model, which is the named one or one beside it that fits."""
    if named is not None:
        path = Path(os.path.expanduser(named))
        if not path.is_file():
            raise UserError(f"{named}: no such file; check the path of --mmproj")
        return GGUFFiles(model, path)
    names = [
        entry.name for entry in model.parent.iterdir() if entry.name.endswith(SUFFIX) and MMPROJ in entry.name.lower()
    ]
    if not names or not (text := _header(model)):
        return GGUFFiles(model, None)
    fitting = [name for name in names if (other := _header(model.parent / name)) and fits(text, other)]
    chosen = choose_mmproj(fitting)
    return GGUFFiles(model, model.parent / chosen if chosen else None)


def fits(text: GGUFHeader, mmproj: GGUFHeader) -> bool:
    """Whether a vision model may belong to a text model: of ours, only its own; of others, one as wide."""
    pair = text.metadata.get("gm.pair")
    if pair is not None or "gm.pair" in mmproj.metadata:
        return pair == mmproj.metadata.get("gm.pair")
    width = text.metadata.get(f"{text.metadata.get('general.architecture')}.embedding_length")
    return mmproj.metadata.get("clip.vision.projection_dim") in (0, None, width)


def _header(path: Path) -> GGUFHeader | None:
    try:
        return read_header(path)
    except UserError:  # the engine says so where it matters
        return None


def _parts(name: str, names: Iterable[str]) -> Sequence[str]:
    """All files of a model that is split, or the one that it is."""
    stem, mark, count = name.removesuffix(SUFFIX).rpartition("-of-")
    if not mark or not count.isdigit() or not stem[-5:].isdigit():
        return [name]
    return [part for part in sorted(names) if part.startswith(stem[:-5]) and part.endswith(f"-of-{count}{SUFFIX}")]


def _spellings(name: str) -> tuple[str, str]:
    return name.lower(), PurePosixPath(name).name.lower()


def _rank(name: str, order: Sequence[str]) -> int:
    """The place of a file's quantization in an order. Longer names first: BF16 has F16 in it."""
    upper = name.upper()
    found = [word for word in sorted(order, key=len, reverse=True) if word in upper]
    return order.index(found[0]) if found else len(order)
