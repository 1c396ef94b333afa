"""The local cache of Hugging Face's client, filled by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no network: a request that left the machine would be refused at once."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def fill(cache: Path, repo: str, *files: str) -> Path:
    """Put a repository into the cache as the client lays it out: blobs, links to them, and a ref."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "blobs" / "aa").write_text("{}")
    for name in ("config.json", *files):
        (snapshot / name).symlink_to(Path("../../blobs/aa"))
    return snapshot
