"""The examples of docs/training-data.md are what it says they are."""

from __future__ import annotations

import re
from pathlib import Path

from training_data import images_in, rows_of

from gm_mlx.train.check import checked_images
from gm_mlx.train.sources import read_rows

TEXT = (Path(__file__).parents[1] / "docs" / "training-data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- data: (\S+) -->\n```\w+\n(.*?)```", TEXT, re.DOTALL)


def test_the_examples_are_good_data(tmp_path: Path) -> None:
    images_in(tmp_path, 3)
    counts = {}
    for name, content in EXAMPLES:
        (tmp_path / name).write_text(content, encoding="utf-8")
        rows = rows_of(list(checked_images(read_rows(tmp_path / name))))
        counts[name] = (len(rows), sum(len(row.images) for row in rows))
    assert counts == {"llava.jsonl": (3, 3), "messages.jsonl": (2, 2), "pairs.csv": (2, 2)}
