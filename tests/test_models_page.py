"""docs/models.md has the tables that its script writes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import models_table  # noqa: E402

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_page_is_current() -> None:
    """If this fails, run `python examples/models_table.py`."""
    assert models_table.written(PAGE) == PAGE


def test_every_preset_and_every_decoder_has_a_row() -> None:
    for name in models_table.MODELS:
        assert PAGE.count(f"| `{name}` |") == 2
    for decoder in models_table.DECODERS:
        assert f"\n| {decoder.title} | `" in PAGE


@pytest.mark.parametrize("rows", [table() for table in models_table.TABLES.values()], ids=list(models_table.TABLES))
def test_rows_are_as_long_as_their_head(rows: list[tuple[str, ...]]) -> None:
    assert len({len(row) for row in rows}) == 1
    assert not any("|" in cell for row in rows for cell in row)


def test_the_tables_of_the_papers_are_whole() -> None:
    papers = PAGE.split("## What the papers measured")[1]
    for table in re.findall(r"(?:^\|.*\n)+", papers, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
