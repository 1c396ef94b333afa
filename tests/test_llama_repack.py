"""When weights are rearranged, and that the answers do not depend on it."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fixtures import tiny_config, tiny_model
from gguf_files import gguf_folder

from gm_mlx.config import MoEConfig
from gm_mlx.gguf_file import read_header
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.llama.repack import should_repack


@pytest.mark.parametrize(
    "machine, kind, wanted", [("x86_64", "Q4_K", False), ("x86_64", "Q4_0", True), ("arm64", "Q4_K", True)]
)
def test_experts_in_k_quants_stay_as_they_are_on_x86(
    machine: str, kind: str, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    header = read_header(gguf_folder(tmp_path / "gguf") / "model.gguf")
    assert should_repack(header)
    changed = {n: replace(t, type=kind) if "_exps" in n else replace(t, type="Q4_K") for n, t in header.tensors.items()}
    assert should_repack(replace(header, tensors=changed)) == wanted


def test_the_logits_are_the_same(tmp_path: Path) -> None:
    config = tiny_config(moe=MoEConfig(top_k=4), hidden_size=256, intermediate_size=256)
    folder = gguf_folder(tmp_path / "gguf", tiny_model(config=config), "Q4_0")
    logits = []
    for repack in (True, False):
        engine = LlamaCppEngine(folder / "model.gguf", repack=repack)
        logits.append(engine.all_logits(list(range(4, 40))))
        engine.close()
    assert np.abs(logits[0] - logits[1]).max() < 0.02 * np.abs(logits[0]).max()
