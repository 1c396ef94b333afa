"""The script that asks several engines the same questions."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, text_of
from PIL.Image import Image

from gm_mlx.cli.console import Progress
from gm_mlx.engine import GREEDY, Piece, Sampling, Stats
from gm_mlx.errors import UserError
from gm_mlx.hub import find_model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "train_gm_tiny"))

import engines  # noqa: E402
from easy_vqa import EasyVQA, load_easy_vqa  # noqa: E402

DATA = ROOT / "tests" / "data" / "easy_vqa_300"
FORMS = ("what shape is it?", "is there a red thing?", "what colour is it?")


def several_each(images: int = 12) -> EasyVQA:
    """Three questions about each image, no two about one image in a row; the sample in ``tests`` has one each."""
    pictures = load_easy_vqa(DATA, None).images[:images]
    questions = [(form, f"{number}{row}", row) for number, form in enumerate(FORMS) for row in range(images)]
    return EasyVQA(pictures, questions)


class Knowing(FakeEngine):
    """An engine that gives the right answer, but a wrong one to every question with a certain word in it."""

    opened: list[Knowing] = []  # noqa: RUF012

    def __init__(self, model: str | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.name = "llama.cpp" if self.model.endswith(".gguf") else "mlx"
        self.blind_to = " red" if self.model.endswith(".gguf") else "no such word"
        easy = several_each()
        self.right = {(question, easy.images[row].tobytes()): answer for question, answer, row in easy.questions}
        self.images: list[bytes] = []
        assert all(each.closed for each in self.opened), "two models in memory"
        self.opened.append(self)

    def stream(
        self, messages: Sequence[Any], images: Sequence[Image] = (), sampling: Sampling = GREEDY
    ) -> Iterator[Piece]:
        assert sampling.temperature == 0 and [part["type"] for part in messages[0]["content"]] == ["image", "text"]
        self.images.append(images[0].tobytes())
        question = text_of(messages[0])
        answer = "perhaps" if self.blind_to in question else self.right[question, images[0].tobytes()]
        stats = Stats(prompt_tokens=80, cached_tokens=20)
        yield Piece(answer[:2], stats)
        yield Piece(answer[2:] + "\n", stats)


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch) -> type[Knowing]:
    fake = type("Fresh", (Knowing,), {"opened": []})
    monkeypatch.setattr(engines, "open_engine", fake)
    monkeypatch.setattr(engines, "load_easy_vqa", lambda path, split: several_each())
    return fake


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """The table's rows by their label, without the seconds."""
    monkeypatch.setattr(sys, "argv", ["engines.py", *arguments, "--easy-vqa", str(DATA), "--split", ""])
    engines.main()
    text, table = capsys.readouterr().out.split("\n\n")
    assert text.endswith("test questions of easy-VQA.")
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert header == ["", "engine", "size", "right", "as the first", "prompt reused", "seconds"]
    assert all(float(row[-1]) >= 0 for row in rows)
    return {label: cells[:-1] for label, *cells in rows}


def test_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], knowing: type[Knowing]
) -> None:
    for name in ("model.gguf", "mmproj.gguf"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    rows = run(monkeypatch, capsys, "gm-tiny", f"Q4_0={tmp_path / 'model.gguf'}")
    box = (find_model() / "model.safetensors").stat().st_size / (1 << 20)
    assert rows == {
        "gm-tiny": ["mlx", f"{box:.3g} MB", "100.00%", "–", "25%"],
        "Q4_0": ["llama.cpp", "2 MB", "66.67%", "66.67%", "25%"],
    }
    assert all(engine.closed for engine in knowing.opened)
    assert [engine.options for engine in knowing.opened] == [{}, {"mmproj": tmp_path / "mmproj.gguf"}]


def test_questions_about_one_image_come_together(monkeypatch: pytest.MonkeyPatch, knowing: type[Knowing]) -> None:
    easy = several_each()
    engine = knowing()
    outcome = engines.ask(engine, easy, engines.pick(easy, None), Progress())
    assert engine.images == [image.tobytes() for image in easy.images for _ in FORMS]
    assert sorted(outcome.answers) == sorted(answer for _, answer, _ in easy.questions)


def test_an_image_is_read_once() -> None:
    """By the real engine: its image and what stands before it are in the cache for the second and third question."""
    easy = several_each(4)
    engine = engines.open_engine("gm-tiny")
    outcome = engines.ask(engine, easy, engines.pick(easy, None), Progress())
    assert 2 / 3 * 0.8 < outcome.reused < 2 / 3 + 0.1


@pytest.mark.parametrize(("limit", "count"), [(None, 300), (100, 100), (7, 8), (1000, 300)])
def test_questions_are_spread_over_the_split(limit: int | None, count: int) -> None:
    easy = load_easy_vqa(DATA, None)
    picked = engines.pick(easy, limit)
    assert len(picked) == count and [row for *_, row in picked] == sorted(row for *_, row in picked)
    assert set(picked) <= set(easy.questions)
    assert len({row for *_, row in picked}) >= min(count, len(easy.images)) / 2


def test_models_that_are_not_there_are_told_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], knowing: type[Knowing]
) -> None:
    alone = tmp_path / "model.gguf"
    with pytest.raises(UserError, match=r"model\.gguf: not there"):
        engines.find_form(str(alone))
    alone.write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["engines.py", "gm-tiny", str(alone), "--easy-vqa", str(DATA), "--split", ""])
    with pytest.raises(SystemExit) as caught:
        engines.main()
    assert str(caught.value) == (
        f"engines.py: {tmp_path / 'mmproj.gguf'}: not there; `gm-mlx convert --to gguf` writes a model with its "
        "mmproj.gguf"
    )
    assert not knowing.opened


def test_labels() -> None:
    plain = engines.find_form("gm-tiny")
    assert engines.find_form("4 bits=gm-tiny") == engines.Form("4 bits", "gm-tiny", {}, plain.bytes)
    with pytest.raises(UserError, match=r"^\./a=b: no such folder"):
        engines.find_form("./a=b")  # a path, and no label


@pytest.mark.slow
def test_the_model_in_the_box(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(monkeypatch, capsys, "gm-tiny", "again=gm-tiny", "--limit", "20")
    assert rows["again"] == [*rows["gm-tiny"][:3], "100.00%", rows["gm-tiny"][4]]
    assert float(rows["gm-tiny"][2].rstrip("%")) > 90
