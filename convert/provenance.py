"""What ``gm.json`` says about where a model comes from: names and SHA-256 of all files that it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from gm_mlx.errors import UserError

BLOCK_BYTES = 8 << 20
# Files beside the weights that decide what a model does.
SETTINGS = ("*.json", "*.model", "*.jinja", "*.tiktoken", "merges.txt")


def source_files(folders: Iterable[Path | None], tensor_files: Iterable[Path]) -> list[Path]:
    """All files of a model's sources that it depends on: those with its tensors, and settings and tokenizers."""
    files = {file for folder in filter(None, folders) for pattern in SETTINGS for file in folder.glob(pattern)}
    return sorted({file for file in files if file.is_file()} | set(tensor_files))


def sha256(files: Iterable[Path], progress: Callable[[str, int, int], None] | None = None) -> dict[Path, str]:
    """The SHA-256 of files.

    Args:
        files: the files; read block by block.
        progress: called as ``progress("hash", bytes read, bytes in all)``.

    Raises:
        UserError: a file cannot be read.
    """
    hashes: dict[Path, str] = {}
    block = memoryview(bytearray(BLOCK_BYTES))
    try:
        files = list(files)
        total = sum(file.stat().st_size for file in files)
        done = 0
        for file in files:
            digest = hashlib.sha256()
            with open(file, "rb", buffering=0) as opened:
                while size := opened.readinto(block):
                    digest.update(block[:size])
                    done += size
                    if progress:
                        progress("hash", done, total)
            hashes[file] = digest.hexdigest()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror or error})") from None
    return hashes


def sources(
    names: Mapping[str, str | None], folders: Mapping[str, Path | None], hashes: Mapping[Path, str]
) -> dict[str, dict[str, object]]:
    """The entry "sources" of ``gm.json``.

    Args:
        names: what the user called each source, by role: "checkpoint", "vision", "base".
        folders: where each is, by role.
        hashes: SHA-256 of files, each in one of the folders.

    Returns:
        By role: the name, the revision if it is a repository's, and SHA-256 by file name. A path of this machine is
        nobody else's business, so of a local folder's name its last part is kept.
    """
    entries: dict[str, dict[str, object]] = {}
    for role, folder in folders.items():
        if folder is None:
            continue
        entry: dict[str, object] = {"name": folder.resolve().name}
        if folder.parent.name == "snapshots":  # how the hub's client lays its cache out
            entry = {"name": names[role], "revision": folder.name}
        entries[role] = {
            **entry,
            "sha256": {file.name: value for file, value in hashes.items() if file.parent == folder},
        }
    return entries
