"""The script that measures recipes on gm-tiny prints the README's table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "train_gm_tiny"))

import recipes  # noqa: E402


@pytest.mark.slow
def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(ROOT / "tests" / "data" / "easy_vqa_300")
    options = ["--split", "", "--limit", "20", "--samples", "2", "--recipe", "q8", "--recipe", "q4-all"]
    monkeypatch.setattr(sys, "argv", ["recipes.py", "gm-tiny", "--easy-vqa", data, *options])
    recipes.main()
    text, table = capsys.readouterr().out.split("\n\n")
    assert text.startswith("Exact match on ")
    assert "unpacked from 4 and 8 bits" in text
    header, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert header == ["", "unquantized", "q8", "q4-all"]
    assert set(rule[1:]) == {"---:"}
    cells = {name: values for name, *values in rows}
    assert float(cells["KL divergence"][1]) < float(cells["KL divergence"][2])
    # The model in the box is right about nearly all of them, and 8 bits change nothing that matters.
    assert all(float(cell.rstrip("%")) > 85 for cell in cells["exact match"][:2])
