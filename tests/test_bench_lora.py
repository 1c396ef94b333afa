"""The benchmark of LoRA steps runs on a small shape, against mlx-vlm itself, which is in the test extra."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "hidden": 128, "ffn": 256, "heads": 4, "layers": 2, "vocab": 512, "tower": 64, "tower-layers": 2, "image": 56,
    "text": 24, "answer": 8,
}  # fmt: skip


def run(script: str, *options: str) -> list[list[str]]:
    """The cells of the table that a script prints."""
    command = [sys.executable, str(EXAMPLES / script), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_speed_against_mlx_vlm(tmp_path: Path) -> None:
    shape = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    file = tmp_path / "found.json"
    header, _, *rows = run("bench_lora.py", *shape, "--rounds", "2", "--as-shipped", "--json", str(file))
    names = ["gm-mlx", "mlx-vlm", "mlx-vlm, as shipped", "gm-mlx, sparse"]
    assert [row[:3] for row in rows] == [
        [weights, f"{count} × 40", name] for weights in ("4 bits", "float32") for count in (1, 4) for name in names
    ]
    assert header[-1] == "first loss"
    for ours, *theirs, _ in (rows[i : i + 4] for i in range(0, len(rows), 4)):
        assert all(abs(float(row[-1]) - float(ours[-1])) < 1e-3 * float(ours[-1]) for row in theirs)
    cases = json.loads(file.read_text())["cases"]
    assert [case["tokens"] for case in cases] == [40, 160, 40, 160]
    for case in cases:
        assert all(len(rounds) == 2 for rounds in case["sides"].values())
        # All learn: the same batch again and again.
        for name, rounds in case["sides"].items():
            assert rounds[-1]["losses"][0] < case["first_losses"][name], name
