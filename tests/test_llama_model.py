"""How many processors llama.cpp gets, and models that are no chat models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tiny_gguf import write, write_text

from gm_mlx.errors import UserError
from gm_mlx.gguf_file import read_header
from gm_mlx.llama import model as module
from gm_mlx.llama.model import LlamaModel, physical_cores
from gm_mlx.llama.worker import Worker


def test_some_cores() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="macOS counts its cores itself")
@pytest.mark.parametrize(
    ("allowed", "siblings", "quota", "cores"),
    [
        ({0, 1, 2, 3}, {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, "max 100000", 2),
        ({0, 2}, {0: "0-1", 2: "2-3"}, "", 2),
        ({0, 1, 2, 3}, {}, "", 4),
        ({0, 1, 2, 3}, {}, "150000 100000", 2),
        ({5}, {5: "1,5"}, "20000 100000", 1),
    ],
)
def test_cores_and_not_hyperthreads(
    monkeypatch: pytest.MonkeyPatch, allowed: set[int], siblings: dict[int, str], quota: str, cores: int
) -> None:
    files = {f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()}
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed)
    monkeypatch.setattr(module, "_read", lambda path: files.get(path, quota if path.endswith("cpu.max") else ""))
    assert physical_cores() == cores


def test_a_file_that_llama_cpp_refuses_gives_its_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", "no-such-architecture", {}, {})
    with pytest.raises(
        UserError, match=r"x\.gguf: llama\.cpp cannot load it: unknown model architecture: 'no-such-arch"
    ):
        LlamaModel(read_header(path), worker=Worker())


def test_closing_twice(tmp_path: Path) -> None:
    model = LlamaModel(read_header(write_text(tmp_path / "x.gguf")), worker=Worker())
    model.close()
    model.close()
