"""easy-VQA's training pictures and questions in LLaVA's format, a conversation for each picture.

    python examples/fewer_tokens/make_data.py easy_vqa.tar.gz easy-vqa-train

With it, a gm-tiny that sees 16 tokens of a picture instead of 64 gets back what it lost: see docs/fine-tuning.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_gm_tiny"))

from easy_vqa import EasyVQA, load_easy_vqa

TURNS = 5  # questions of a conversation; a picture has about ten


def write_rows(easy: EasyVQA, folder: Path) -> int:
    """Write ``rows.jsonl`` and ``images``; returns the number of rows."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in easy.questions:
        asked[image].append((question, answer))
    rng, lines = random.Random(0), []
    for image, found in asked.items():
        Image.fromarray(easy.images[image]).save(folder / "images" / f"{image}.png")
        turns: list[dict[str, str]] = []
        for question, answer in rng.sample(found, min(TURNS, len(found))):
            slot = "" if turns else "<image>\n"
            turns += [{"from": "human", "value": slot + question}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"image": f"images/{image}.png", "conversations": turns}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("easy_vqa", type=Path, help="easy_vqa.tar.gz or the folder in it")
    parser.add_argument("folder", type=Path, help="to write to")
    arguments = parser.parse_args()
    print(f"{arguments.folder}: {write_rows(load_easy_vqa(arguments.easy_vqa, 'train'), arguments.folder)} rows")


if __name__ == "__main__":
    main()
