"""Questions put to an engine: what it is shown, and that answers do not depend on where a run was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import fixtures
import numpy as np
import pytest
from fake_engine import FakeEngine
from PIL import Image

from gm_mlx.errors import UserError
from gm_mlx.evaluate.answers import AnswersFile
from gm_mlx.evaluate.ask import ask
from gm_mlx.evaluate.identity import model_identity, questions_identity
from gm_mlx.evaluate.question import Question
from gm_mlx.images import CLIP_336, HALF, ImageConfig, Mode, preprocess, square
from gm_mlx.train.rows import Where

MODES: tuple[Mode, ...] = get_args(Mode)


class Seeing(FakeEngine):
    """Keeps the images that it is shown."""

    def __init__(self, image_config: ImageConfig | None = None) -> None:
        super().__init__()
        self.image_config = image_config
        self.opened = 0
        self.shown: list[np.ndarray] = []

    def open_image(self, source: Any) -> Image.Image:
        self.opened += 1
        return super().open_image(source)

    def stream(self, messages: Any, images: Any = (), *sampling: Any) -> Any:
        self.shown += [np.asarray(image) for image in images]
        return super().stream(messages, images, *sampling)


def question(number: int, image: Path | None = None) -> Question:
    return Question(Where("q.jsonl", "line", number), number, f"What is {number}?", image and str(image))


def asked(folder: Path, engine: FakeEngine, questions: list[Question], **options: Any) -> list[dict[str, Any]]:
    file = AnswersFile(folder / "a.jsonl", {}, {}, questions, range(len(questions)), force=False)
    file.begin()
    try:
        ask(engine, file, **{"max_tokens": 8, **options})  # type: ignore[arg-type]
    finally:
        file.close()
    return file.lines


def test_an_image_is_opened_once_and_stands_in_front(tmp_path: Path) -> None:
    fixtures.picture(1).save(tmp_path / "1.png")
    fixtures.picture(2).save(tmp_path / "2.png")
    engine = Seeing()
    questions = [
        question(1, tmp_path / "1.png"),
        question(2, tmp_path / "1.png"),
        question(3),
        question(4, tmp_path / "2.png"),
    ]
    done: list[int] = []
    lines = asked(tmp_path, engine, questions, progress=done.append)
    assert [line["text"] for line in lines] == [
        "1 images: What is 1?", "1 images: What is 2?", "0 images: What is 3?", "1 images: What is 4?",
    ]  # fmt: skip
    assert (engine.opened, done) == (2, [1, 2, 3, 4])
    kinds = [[part["type"] for part in messages[0]["content"]] for messages, _, _ in engine.asked]
    assert kinds == [["image", "text"], ["image", "text"], ["text"], ["image", "text"]]
    assert {(sampling.temperature, sampling.max_tokens) for _, _, sampling in engine.asked} == {(0, 8)}
    assert lines[0]["metadata"] == {"finish_reason": "stop"}


@pytest.mark.parametrize("of_model", MODES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(20, 12), (7, 31), (24, 24)])
def test_what_is_square_already_is_read_as_it_is(of_model: Mode, mode: Mode, size: tuple[int, int]) -> None:
    """So --image-mode holds on either engine, whatever the model does with its images itself."""
    for config in (ImageConfig(24, of_model), ImageConfig(24, of_model, HALF, HALF)):
        wanted = replace(config, mode=mode)
        image = fixtures.picture(3, size)
        made = Image.fromarray(square(image, wanted))
        assert np.array_equal(preprocess(made, config), preprocess(image, wanted))


def test_image_mode(tmp_path: Path) -> None:
    fixtures.picture(1).save(tmp_path / "1.png")
    config = ImageConfig(8, "resize")
    engine = Seeing(config)
    asked(tmp_path, engine, [question(1, tmp_path / "1.png")], image_mode="crop")
    assert np.array_equal(engine.shown[0], square(fixtures.picture(1), replace(config, mode="crop")))


def test_image_mode_is_refused_where_llama_cpp_decides(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--image-mode: how gm-tiny reads images cannot be chosen"):
        asked(tmp_path, Seeing(), [question(1)], image_mode="pad", skip_bad=True)


@pytest.mark.parametrize(("exif", "size"), [(True, (6, 8)), (False, (8, 6))])
def test_photographs_are_taken_as_they_are_stored(exif: bool, size: tuple[int, int], tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (8, 6), "red").save(tmp_path / "1.jpg", exif=tags)
    engine = Seeing()
    asked(tmp_path, engine, [question(1, tmp_path / "1.jpg")], exif=exif)
    assert engine.asked[0][1] == [size]


def half_an_image(path: Path) -> Path:
    """A file whose header is sound and whose end is missing."""
    fixtures.picture(1, (64, 64)).save(path, "PNG")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def test_what_cannot_be_asked_ends_the_run_or_is_noted(tmp_path: Path) -> None:
    questions = [question(1), question(2, half_an_image(tmp_path / "2.png")), question(3)]
    with pytest.raises(UserError, match=r"q\.jsonl: line 2: .*2\.png: .*damaged.*--skip-bad"):
        asked(tmp_path, Seeing(), questions)
    engine = Seeing()
    lines = asked(tmp_path, engine, questions, skip_bad=True)
    assert [line["text"] for line in lines] == ["0 images: What is 1?", "", "0 images: What is 3?"]
    assert "damaged" in lines[1]["metadata"]["error"]
    assert len(engine.asked) == 1  # the first was answered before


def test_what_the_engine_wants_to_tell_is_told(tmp_path: Path) -> None:
    engine = Seeing()
    engine.pending = ["slow here"]
    told: list[str] = []
    asked(tmp_path, engine, [question(1), question(2)], notice=told.append)
    assert told == ["slow here"]


def test_a_model_is_known_by_its_content(tmp_path: Path) -> None:
    first = fixtures.tiny_folder(tmp_path / "first")
    same = fixtures.tiny_folder(tmp_path / "same")
    other = fixtures.tiny_folder(tmp_path / "other", model=fixtures.tiny_model(1))
    identity = model_identity(str(first), {})
    assert identity == model_identity(str(same), {}) != model_identity(str(other), {})
    config = same / "processor_config.json"
    config.write_text(config.read_text().replace('"resize"', '"pad"'))
    assert model_identity(str(same), {}) != identity


def test_gguf_files_are_known_by_all_of_their_tensors(tmp_path: Path) -> None:
    from gm_mlx.gguf_file import read_header
    from gm_mlx.hub import built_in

    shipped = built_in("gm-tiny-gguf")
    for name in ("model.gguf", "mmproj.gguf"):
        (tmp_path / name).write_bytes((shipped / name).read_bytes())
    identity = model_identity(str(tmp_path / "model.gguf"), {})
    assert identity == model_identity("gm-tiny-gguf", {})
    for name in ("model.gguf", "mmproj.gguf"):
        before = (tmp_path / name).read_bytes()
        tensor = list(read_header(tmp_path / name).tensors.values())[-1]
        changed = bytearray(before)
        changed[tensor.offset] ^= 1
        (tmp_path / name).write_bytes(changed)
        assert model_identity(str(tmp_path / "model.gguf"), {}) != identity
        (tmp_path / name).write_bytes(before)


def test_questions_are_known_by_all_that_is_asked(tmp_path: Path) -> None:
    questions = [question(1, tmp_path / "a.png"), question(2)]
    identity = questions_identity(questions)
    moved = [replace(questions[0], image=str(tmp_path / "elsewhere" / "a.png")), questions[1]]
    assert questions_identity(moved) == identity
    for other in (
        questions[::-1],
        questions[:1],
        [replace(questions[0], text="Why?"), questions[1]],
        [replace(questions[0], id=3), questions[1]],
        [replace(questions[0], image=str(tmp_path / "b.png")), questions[1]],
    ):
        assert questions_identity(other) != identity


def test_engines_say_how_images_become_pixels() -> None:
    import gm_mlx

    for name in ("gm-tiny", "gm-tiny-gguf"):
        model = gm_mlx.load(name)
        assert model.engine.image_config is not None
        assert model.engine.image_config.size == 64 < CLIP_336.size
        model.close()


def test_adapters_and_their_strength_are_part_of_a_model(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from gm_mlx.lora.folder import ADAPTER_FILE

    folder = str(fixtures.tiny_folder(tmp_path / "model"))
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"x.lora_A.weight": np.full((2, 4), value, np.float32)}, tmp_path / name / ADAPTER_FILE)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    variants = [[], [(a, 1.0)], [(a, 0.5)], [(b, 1.0)], [(a, 1.0), (b, 1.0)]]
    found = [str(model_identity(folder, {"adapters": adapters})) for adapters in variants]
    assert len(set(found)) == len(variants)


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"\x02" + b"\0" * 7 + b"[]", b"\x05" + b"\0" * 7 + b'{"a"}'])
def test_damaged_weights_are_one_line(content: bytes, tmp_path: Path) -> None:
    folder = fixtures.tiny_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read as safetensors"):
        model_identity(str(folder), {})
