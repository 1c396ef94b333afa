"""The conversation and its commands, fed by a list of lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, text_of
from PIL import Image

from gm_mlx.cli.console import Progress
from gm_mlx.cli.repl import COMMANDS, Repl
from gm_mlx.engine import GREEDY
from gm_mlx.errors import UserError
from gm_mlx.vlm import VLM

Line = str | BaseException
Talk = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def talk(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Talk:
    """Holds a conversation of given lines; returns stdout and the lines of stderr. The working folder is empty."""
    monkeypatch.chdir(tmp_path)

    def run(*lines: Line, images: tuple[str, ...] = (), stats: bool = False, system: str | None = None) -> Any:
        said = iter([*lines, EOFError()])

        def read_line() -> str:
            line = next(said)
            if isinstance(line, BaseException):
                raise line
            return line

        Repl(VLM(engine), system, GREEDY, engine.open_image, Progress(), stats, read_line).run(images)
        shown = capsys.readouterr()
        return shown.out.split("\n", 1)[1], shown.err.splitlines()

    return run


def _picture(name: str, size: tuple[int, int] = (8, 6)) -> str:
    Image.new("RGB", size, "teal").save(name)
    return name


def _interrupt_at(number: int) -> Callable[[int], None]:
    def interrupt(piece: int) -> None:
        if piece == number:
            raise KeyboardInterrupt

    return interrupt


def test_the_greeting_names_the_model(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    def leave() -> str:
        raise EOFError

    Repl(VLM(engine), None, GREEDY, engine.open_image, Progress(), read_line=leave).run()
    assert capsys.readouterr().out.startswith("gm-tiny ")


def test_turns_are_one_conversation(engine: FakeEngine, talk: Talk) -> None:
    assert talk("What is this?", "", "And that?", system="Be brief.") == (
        "0 images: What is this?\n0 images: And that?\n\n",
        [],
    )
    messages, _, sampling = engine.asked[-1]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert [text_of(message) for message in messages[1:]] == ["What is this?", "0 images: What is this?", "And that?"]
    assert sampling == GREEDY


def test_images_go_with_one_message(engine: FakeEngine, talk: Talk) -> None:
    _picture("a.png"), _picture("two words.png", (5, 4)), _picture("c.png", (3, 2))
    _, err = talk("/image 'two words.png' c.png", "first", "second", images=("a.png",))
    assert err == [
        "note: for the next message: a.png (8x6)",
        "note: for the next message: two words.png (5x4), c.png (3x2)",
    ]
    assert [sizes for _, sizes, _ in engine.asked] == [[(8, 6), (5, 4), (3, 2)]] * 2
    slots = [
        [part["type"] for part in message["content"]] for message in engine.asked[-1][0] if message["role"] == "user"
    ]
    assert slots == [["image", "image", "image", "text"], ["text"]]


@pytest.mark.parametrize(
    "line",
    [
        "/image two words.png",
        "/image two\\ words.png",
        '/image "two words.png"',
        "/image   two\\ words.png  ",
        "/image {folder}/two\\ words.png",
        "/image ~/two\\ words.png",
        "{folder}/two\\ words.png ",
        "'{folder}/two words.png'",
        "{folder}/two words.png",
    ],
)
def test_ways_to_name_a_file(
    line: str, engine: FakeEngine, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _picture(str(tmp_path / "two words.png"))
    talk(line.format(folder=tmp_path), "What?")
    assert [sizes for _, sizes, _ in engine.asked] == [[(8, 6)]]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/imgae a.png", "no command /imgae"),
        ("/tmp is a folder, is it not?", "no command /tmp"),
        ("/image", "/image needs a file"),
        ("/image missing.png", "missing.png: no such file"),
        ("/image a.png missing.png", "missing.png"),
        ("/image 'a.png", "quote"),
        ("/stats", "no answer"),
        ("/save", "/save needs one file"),
        ("/save a.md b.md", "/save needs one file"),
        ("/save talk.md", "nothing"),
        ("/image ~nobody-here/a.png", "~nobody-here/a.png"),
        ("/image " + "a" * 5000, "cannot be opened"),
        ("word " * 100, "context"),
        ("caf\udce9", "UTF-8"),
        (" ", "empty"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_end(line: str, words: str, engine: FakeEngine, talk: Talk) -> None:
    _picture("a.png")
    out, err = talk(line, "Still there?")
    assert out == "0 images: Still there?\n\n"
    assert len(err) == 1 and err[0].startswith("error: ") and words in err[0]
    assert os.listdir() == ["a.png"]


def test_a_line_that_is_no_text(talk: Talk) -> None:
    out, err = talk(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "Still there?")
    assert "Still there?" in out and "UTF-8" in err[0]


def test_a_question_with_an_error_leaves_its_images_attached(engine: FakeEngine, talk: Talk) -> None:
    _picture("a.png")
    talk("/image a.png", "word " * 100, "What?")
    assert [sizes for _, sizes, _ in engine.asked] == [[(8, 6)]]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(engine: FakeEngine, talk: Talk) -> None:
    engine.before_piece = _interrupt_at(2)
    out, err = talk("one two three", "four")
    assert out.startswith("0 images: one\n")
    assert err[0] == "note: stopped"
    assert [text_of(message) for message in engine.asked[1][0]] == ["one two three", "0 images: one", "four"]


def test_ctrl_c_between_two_pieces_keeps_what_was_said(
    engine: FakeEngine, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def printable(text: str) -> str:
        if text == " two":
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr("gm_mlx.cli.repl.printable", printable)
    _picture("a.png")
    talk("/image a.png", "one two three", "four")
    messages, sizes, _ = engine.asked[1]
    assert [text_of(message) for message in messages][1:] == ["1 images: one two", "four"]
    assert sizes == [(8, 6)]


def test_ctrl_c_before_the_first_word_takes_the_question_back(engine: FakeEngine, talk: Talk) -> None:
    _picture("a.png")
    engine.before_piece = _interrupt_at(0)
    out, err = talk("/image a.png", "one", stats=True)
    assert out == "\n\n"
    assert err[1:] == ["note: stopped; the images wait for the next message"]

    def ask_again(number: int) -> None:
        if len(engine.asked) < 3:
            _interrupt_at(0)(number)

    engine.before_piece = ask_again
    talk("/image a.png", "one", "two")
    assert [(len(messages), sizes) for messages, sizes, _ in engine.asked[1:]] == [(1, [(8, 6)]), (1, [(8, 6)])]


def test_ctrl_c_at_the_prompt_says_how_to_leave(talk: Talk) -> None:
    out, err = talk(KeyboardInterrupt(), KeyboardInterrupt(), "Still there?")
    assert err == ["note: Ctrl-D or /exit leaves"] * 2
    assert "Still there?" in out


def test_exit_leaves(engine: FakeEngine, talk: Talk) -> None:
    assert talk("/exit", "Still there?") == ("", [])
    assert engine.asked == []


def test_clear_forgets_all_but_the_system_message(engine: FakeEngine, talk: Talk) -> None:
    _picture("a.png")
    talk("/image a.png", "one", "/image a.png", "/clear", "two", system="Be brief.")
    messages, sizes, _ = engine.asked[-1]
    assert [text_of(message) for message in messages] == ["Be brief.", "two"]
    assert sizes == []


def test_stats(engine: FakeEngine, talk: Talk) -> None:
    rates = "first token 0.75 s | prefill 16 tok/s | decode 1.5 tok/s | peak 3 MB"
    out, err = talk("one two", "/stats", stats=True)
    assert err == [rates]
    assert out.splitlines()[1:3] == [rates, "prompt 10 tokens (2 cached) + answer 3 of 64 | images 0"]
    assert talk("one two", stats=False)[1] == []


def test_help_names_all_commands_in_80_columns(talk: Talk) -> None:
    lines = talk("/help")[0].splitlines()
    assert [line.split()[0] for line in lines if line.startswith("/")] == list(COMMANDS)
    assert max(map(len, lines)) <= 80


def test_notices_are_shown_when_they_come_up(engine: FakeEngine, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    _picture("large.png", (500, 500))

    def notices(images: Any = ()) -> list[str]:
        return (
            ["too large"] if any(image.width > 100 for image in images) else engine.pending and [engine.pending.pop()]
        )

    engine.pending = ["slow"]
    monkeypatch.setattr(engine, "notices", notices)
    assert talk("Hi", "/image large.png", "What?")[1] == [
        "note: slow",
        "note: for the next message: large.png (500x500)",
        "note: too large",
    ]


def test_save_as_json(talk: Talk, tmp_path: Path) -> None:
    _picture("a.png")
    _, err = talk("/image a.png", "What?", "And?", "/save talk.json", system="Be brief.")
    assert err[-1] == "note: saved to talk.json"
    saved = json.loads(Path("talk.json").read_text(encoding="utf-8"))
    assert saved["model"] == "gm-tiny"
    assert saved["messages"][:3] == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "1 images: What?"}]},
    ]
    assert sorted(os.listdir()) == ["a.png", "talk.json"]


def test_save_as_markdown(talk: Talk, tmp_path: Path) -> None:
    _picture("two words.png")
    talk("/image two words.png", "Où?", "/save 'my talk.MD'")
    assert Path("my talk.MD").read_text(encoding="utf-8") == (
        "# A conversation with gm-tiny\n\n"
        f"**You**\n\n![two words.png](<{tmp_path}/two words.png>)\n\nOù?\n\n"
        "**gm-tiny**\n\n1 images: Où?\n"
    )


def test_saving_over_a_file_must_be_meant(talk: Talk) -> None:
    Path("talk.md").write_text("old")
    assert "exists already" in talk("Hi", "/save talk.md")[1][0]
    assert Path("talk.md").read_text() == "old"
    talk("Hi", "/save! talk.md")
    assert "Hi" in Path("talk.md").read_text()


@pytest.mark.parametrize("name", ["talk.txt", "talk", "missing/talk.md", "folder.md", "a" * 5000 + ".md"])
@pytest.mark.parametrize("command", ["/save", "/save!"])
def test_what_cannot_be_saved_leaves_nothing_behind(command: str, name: str, talk: Talk) -> None:
    os.mkdir("folder.md")
    _, err = talk("Hi", f"{command} {name}")
    assert len(err) == 1 and err[0].startswith(f"error: {name}: ")
    assert os.listdir() == ["folder.md"]


def test_a_model_that_reads_text_only_refuses_images(
    engine: FakeEngine, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_image(source: Any) -> Any:
        raise UserError("this model reads text only")

    monkeypatch.setattr(engine, "open_image", open_image)
    assert talk("/image a.png")[1] == ["error: this model reads text only"]
