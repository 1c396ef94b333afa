"""The benchmark of a LoRA step's memory runs, and its estimate is that of the library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "bench_lora_memory.py"


def run(*options: str) -> list[list[str]]:
    """The cells of the table that the script prints."""
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_estimates_alone() -> None:
    options = ("--preset", "llava-gm-2b", "gm-tiny", "--rows", "1", "4", "--rank", "8")
    header, _, *rows = run("--estimate", "cpu", *options)
    assert header == ["model", "rows", "rank", "checkpointing", "all, estimated"]
    assert [row[:4] for row in rows[:4]] == [["llava-gm-2b", n, "8", on] for n in ("1", "4") for on in ("off", "on")]
    sizes = [float(row[4].removesuffix(" GB")) for row in rows]
    assert sizes[1] < sizes[0] < sizes[2] and sizes[1] < sizes[3] < sizes[2]
    assert max(sizes[4:]) < 1
    assert sizes != [float(row[4].removesuffix(" GB")) for row in run("--estimate", "gpu", *options)[2:]]


@pytest.mark.slow
def test_measured(tmp_path: Path) -> None:
    """Of gm-tiny nearly all is Python and MLX, in either column."""
    file = tmp_path / "found.json"
    header, _, *rows = run("--preset", "gm-tiny", "--rows", "1", "--rank", "8", "--json", str(file))
    assert header[4:] == ["2 layers", "4 layers", "4, estimated", "all, extrapolated", "all, estimated"]
    assert [row[:4] for row in rows] == [["gm-tiny", "1", "8", "off"], ["gm-tiny", "1", "8", "on"]]
    for case in json.loads(file.read_text()):
        assert case["all"]["peak"] >= case["more"]["peak"] > case["more"]["mlx_peak"] > 0
        assert 0.7 < case["estimate"] / case["all"]["peak"] < 1.5
