"""Training data of every format, read into rows; and what is said of data that is none."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import tracemalloc
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from training_data import data_url, images_in, llava, png, rows_of, write_lines

from gm_mlx.chat_template import checked_turns
from gm_mlx.errors import UserError
from gm_mlx.train import records
from gm_mlx.train.check import checked_images, num_duplicates
from gm_mlx.train.conversations import KINDS, conversation
from gm_mlx.train.rows import Problem, Row, Stored, Where, image_key, image_source, listing
from gm_mlx.train.sources import read_rows


def read(source: Path | str, **options: Any) -> list[Row | Problem]:
    return list(read_rows(source, **options))


def one(tmp_path: Path, record: Any, **options: Any) -> Row:
    (found,) = rows_of(read(write_lines(tmp_path / "one.jsonl", [record]), **options))
    return found


def reason(tmp_path: Path, good: Any, record: Any) -> str:
    """Why a record, behind a good one, is no row."""
    first, found = read(write_lines(tmp_path / "bad.jsonl", [good, record]))
    assert isinstance(first, Row) and isinstance(found, Problem)
    assert found.where == Where(str(tmp_path / "bad.jsonl"), "line", 2)
    return found.reason


# --- LLaVA ---


def test_llava_rows(tmp_path: Path) -> None:
    records_ = [
        llava("<image>\nWhat is this?", "A dog.", image="a/1.jpg"),
        llava("Compare <image> and\n<image>", "No.", image=["1.jpg", "/elsewhere/2.jpg"]),
        llava("Hello", "Hi."),
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "What?\n<image>"},
                {"from": "gpt", "value": "A cat."},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
            "image": "3.jpg",
        },
    ]
    as_lines = write_lines(tmp_path / "data.jsonl", records_)
    as_list = tmp_path / "data.json"
    as_list.write_text(json.dumps(records_, indent=1))
    for file, unit in ((as_lines, "line"), (as_list, "record")):
        first, second, third, fourth = rows_of(read(file, images="/pictures"))
        assert first.turns == [[None, "\nWhat is this?"], "A dog."]
        assert first.images == ("/pictures/a/1.jpg",)
        assert second.turns == [["Compare ", None, " and\n", None], "No."]
        assert second.images == ("/pictures/1.jpg", "/elsewhere/2.jpg")
        assert (third.turns, third.images) == (["Hello", "Hi."], ())
        assert fourth.turns == [["What?\n", None], "A cat.", "Sure?", "Yes."]
        assert fourth.messages == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What?\n"}, {"type": "image"}]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
        assert (fourth.where.unit, fourth.where.number) == (unit, 4)
    assert str(rows_of(read(as_list))[1].where) == f"{as_list}: record 2 (line 16)"


def test_images_start_from_the_folder_of_the_file(tmp_path: Path) -> None:
    assert one(tmp_path, llava("<image>", "A", image="x.png")).images == (str(tmp_path / "x.png"),)


def test_an_image_without_a_slot_stands_in_front(tmp_path: Path) -> None:
    assert one(tmp_path, llava("What?", "A", image=["1.png", "2.png"])).turns == [[None, None, "What?"], "A"]


# --- messages ---


def test_messages_with_parts(tmp_path: Path) -> None:
    content = [
        {"type": "text", "text": "Is <image> this"},
        {"type": "image_url", "image_url": {"url": "1.png"}},
        {"type": "text", "text": "or this?"},
        {"type": "image_url", "image_url": f"file://{tmp_path}/2%20.png"},
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "This."}]}
    row = one(tmp_path, {"messages": [{"role": "user", "content": content}, answer]})
    assert row.turns == [["Is <image> this", None, "or this?", None], "This."]
    assert row.images == (str(tmp_path / "1.png"), f"{tmp_path}/2 .png")


def test_messages_with_a_list_of_images(tmp_path: Path) -> None:
    """TRL's form (image parts, or none at all), and ``<image>`` in the text, as others write it."""
    answer = {"role": "assistant", "content": "A"}
    contents: dict[str, Any] = {
        "parts": [{"type": "image", "text": None}, {"type": "text", "text": "Q"}, {"type": "image"}],
        "none": "Q",
        "text": "<image>Q<image>",
    }
    turns = {"parts": [None, "Q", None], "none": [None, None, "Q"], "text": [None, "Q", None]}
    for name, content in contents.items():
        record = {"messages": [{"role": "user", "content": content}, answer], "images": ["1.png", {"path": "2.png"}]}
        row = one(tmp_path, record)
        assert row.turns == [turns[name], "A"]
        assert row.images == (str(tmp_path / "1.png"), str(tmp_path / "2.png"))


def test_images_in_the_data_are_read_again_when_needed(tmp_path: Path) -> None:
    def record(seed: int) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": data_url(n)}} for n in (seed, seed + 1)]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "é"}]}

    many = [record(seed) for seed in range(5)]
    as_list = tmp_path / "data.json"
    as_list.write_text(json.dumps(many, indent=2), encoding="utf-8-sig")  # with a byte order mark
    for file in (write_lines(tmp_path / "data.jsonl", many), as_list):
        rows = rows_of(read(file))
        for seed, row in enumerate(rows):
            assert all(isinstance(image, Stored) for image in row.images)
            assert [image_source(image) for image in row.images] == [png(seed), png(seed + 1)]
        assert image_key(rows[0].images[1]) == image_key(rows[1].images[0])
        file.write_text("{}")
        with pytest.raises(UserError, match=r"has changed since training began|the key 'messages' is missing"):
            image_source(rows[1].images[0])


# --- pairs: CSV ---


def table(path: Path, lines: list[list[str]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_in_a_folder_of_images(tmp_path: Path, delimiter: str) -> None:
    lines = [
        ["Answer", "image", "Question", "more"],
        ["two, or\nthree", "1.png", "How many?", ""],
        ["yes", "", "Is it?", "x"],
    ]
    table(tmp_path / "set" / "labels.csv", lines, delimiter, "utf-8-sig")
    images_in(tmp_path / "set", 2)
    first, second = rows_of(read(tmp_path / "set"))
    assert first.turns == [[None, "How many?"], "two, or\nthree"]
    assert first.images == (str(tmp_path / "set" / "1.png"),)
    assert (second.turns, second.images) == (["Is it?", "yes"], ())
    assert str(second.where).endswith("labels.csv: line 4")  # the first row takes two lines


def test_csv_columns_by_other_names(tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", [["file_name", "Frage", "answer"], ["1.png", "Was?", "Hund"]])
    columns = {"image": "file_name", "question": "frage"}
    assert one_row(read(file, columns=columns)).turns == [[None, "Was?"], "Hund"]
    assert one_row(read(file, columns={**columns, "image": ""})).images == ()
    # A picture's column that is not found must not become a data set without pictures.
    with pytest.raises(UserError, match=r"no column 'image' in its first line \(file_name, Frage, answer\)"):
        read(file, columns={"question": "Frage"})
    with pytest.raises(UserError, match="column 'picture': unknown"):
        read(file, columns={"picture": "x"})


def one_row(found: list[Row | Problem]) -> Row:
    (row,) = rows_of(found)
    return row


def test_csv_that_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("image,question,answer\n1.png,What, now?,yes\n\n2.png,Q,A\n")
    bad, good = read(file)
    assert str(bad) == f"{file}: line 2: 4 cells where the first line has 3; check its quotes"
    assert isinstance(good, Row) and good.where.number == 4
    file.write_text('image,question,answer\n1.png,Q,A\n2.png,"Q,A\n3.png,Q,A\n')
    with pytest.raises(UserError, match="not CSV from line 3 on"):
        read(file)
    file.write_bytes("image,question,answer\n1.png,Größe?,A\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read(file)


# --- Hugging Face ---


class Table(list):
    """Stands for ``datasets.Dataset``, which decodes images unless it is asked for Arrow's own values."""

    def with_format(self, name: str) -> Any:
        assert name == "arrow"
        rows = list(self)

        class Arrow:
            def __len__(self) -> int:
                return len(rows)

            def __getitem__(self, index: int) -> Any:
                return SimpleNamespace(to_pylist=lambda: [rows[index]])

        return Arrow()


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A fake ``datasets`` library with the data sets in this table."""
    found: dict[str, Any] = {}
    module = ModuleType("datasets")

    def load(name: str) -> Any:
        if name not in found:
            raise ConnectionError(f"cannot reach the hub for {name}\nmore")
        return found[name]

    module.load_dataset = module.load_from_disk = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return found


def test_a_table_of_the_hub(hugging_face: dict[str, Any]) -> None:
    pairs = [{"image": {"bytes": png(n), "path": "x"}, "question": f"Q{n}", "answer": "A"} for n in range(2)]
    hugging_face["org/pairs"] = {"train": Table(pairs), "test": Table(pairs[:1])}
    rows = rows_of(read("org/pairs"))
    assert [row.turns for row in rows] == [[[None, f"Q{n}"], "A"] for n in range(2)]
    assert [image_source(row.images[0]) for row in rows] == [png(0), png(1)]
    assert str(rows[1].where) == "org/pairs: row 2"
    assert len(read("org/pairs", split="test")) == 1
    with pytest.raises(UserError, match="has no split 'val'; choose one of train, test"):
        read("org/pairs", split="val")
    with pytest.raises(UserError, match=r"org/other: cannot be read .*\(cannot reach the hub for org/other\)"):
        read("org/other")


def test_a_saved_table_with_conversations(hugging_face: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    message = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Q"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    cauldron = {"images": [{"bytes": png(1), "path": None}], "texts": [{"user": "Q", "assistant": "A", "source": "s"}]}
    for record in ({"messages": [message, answer], "images": [{"bytes": png(1), "path": None}]}, cauldron):
        hugging_face[str(tmp_path / "saved")] = Table([record])
        row = one_row(read(tmp_path / "saved"))
        assert row.turns == [[None, "Q"], "A"] and image_source(row.images[0]) == png(1)


def test_tables_of_the_library_itself(tmp_path: Path) -> None:
    """Saved to disk, with images in the files, and with a split that is asked for."""
    pictures = [Image.open(io.BytesIO(png(n))) for n in range(3)]
    rows = {"image": pictures, "question": ["Q0", "Q1", "Q2"], "answer": ["A", "B", "C"]}
    table = datasets.Dataset.from_dict(rows, datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
    ))  # fmt: skip
    table.save_to_disk(tmp_path / "table")
    datasets.DatasetDict(train=table, test=table.select([2])).save_to_disk(tmp_path / "splits")
    for folder, split, wanted in (
        ("table", "train", [0, 1, 2]),
        ("splits", "train", [0, 1, 2]),
        ("splits", "test", [2]),
    ):
        found = rows_of(read(tmp_path / folder, split=split))
        assert [row.turns for row in found] == [[[None, f"Q{n}"], "ABC"[n]] for n in wanted]
        for row, n in zip(found, wanted, strict=True):
            source = image_source(row.images[0])
            assert isinstance(source, bytes)
            assert Image.open(io.BytesIO(source)).tobytes() == pictures[n].tobytes()
    with pytest.raises(UserError, match="has no split 'val'; choose one of train, test"):
        read(tmp_path / "splits", split="val")


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        read("org/name")


# --- what is wrong with a row ---

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{not json", r"not JSON \("),
        ("[" * 20_000, "not JSON|where an object is due"),
        (3, "3 where an object is due"),
        ({"image": "x.png"}, "the key 'conversations' is missing"),
        ({"conversations": "text"}, "'conversations' is 'text'; it must be a list"),
        ({"conversations": ["text"]}, "turn 1: 'text' where an object is due"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 1: 'value' is 3; it must be a text"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "message 1: unknown role 'bot'; known are human"),
        ({"conversations": []}, "the conversation is empty"),
        ({"conversations": [{"from": "human", "value": "Q"}]}, "there is no answer to learn"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "its role is 'assistant' where 'user' is due"),
        (llava("Q", " \n"), "message 2: the answer is empty"),
        (llava("<image> <image>", "A", image="x.png"), "2 times <image> but 1 image; give one"),
        (llava("<image>", "A"), "1 times <image> but 0 images"),
        (llava("Q", "<image>", image="x.png"), "message 2: an image in a message that is not the user's"),
        (llava("<image>", "A", image=3), "the image is 3; it must be the path of a file or a data URL"),
        (llava("<image>", "A", image="https://x.org/1.png"), "not fetched from the network"),
        (llava("<image>", "A", image="data:image/png;base64,!!"), "not valid base64"),
        (llava("<image>", "A", image="data:image/png,abc"), "not valid base64"),
        (llava("<video>", "A", video="x.mp4"), "has a video"),
    ],
)
def test_a_bad_row_says_why(tmp_path: Path, record: Any, words: str) -> None:
    found = reason(tmp_path, llava("Q", "A"), record)
    assert re.search(words, found), found
    assert "\n" not in found and len(found) < 300


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([USER, ANSWER, USER], "ends with a question; add the answer"),
        ([USER, ANSWER, ANSWER], "message 3: its role is 'assistant' where 'user' is due"),
        ([{"role": "system", "content": "S"}], "a system message only"),
        ([USER, {**ANSWER, "weight": 0}], "message 2: weight 0"),
        ([USER, {"role": "assistant", "tool_calls": [{}], "content": None}], "message 2: calls a tool"),
        ([USER, {"role": "tool", "content": "x"}], "message 2: unknown role 'tool'"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}, ANSWER], "message 1: .* is no part of a message"),
        ([{"role": "user", "content": ["x"]}, ANSWER], "message 1: 'x' is no part"),
        ([{"role": "user"}, ANSWER], "message 1: the key 'content' is missing"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "1 times <image> but 0 images"),
    ],
)
def test_bad_messages_say_why(tmp_path: Path, messages: list[Any], words: str) -> None:
    found = reason(tmp_path, {"messages": [USER, ANSWER]}, {"messages": messages})
    assert re.search(words, found), found


def test_bad_rows_are_passed_over_and_good_ones_kept(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", ['{"a', llava("Q1", "A"), "", llava("Q2", ""), llava("Q3", "A")])
    found = read(file)
    assert [item.where.number for item in found] == [1, 2, 4, 5]
    assert [isinstance(item, Problem) for item in found] == [True, False, True, False]


KEYS = st.sampled_from(
    [
        *("conversations", "messages", "texts", "from", "value", "role", "content", "type", "text", "weight"),
        *("image", "images", "image_url", "url", "path", "bytes", "question", "answer", "user", "assistant", "video"),
    ]
)
VALUES = st.sampled_from(
    [
        *("human", "gpt", "user", "assistant", "system", "text", "image", "image_url", "<image>", " ", "\0\n.png"),
        *("data:image/png;base64,AAAA", "data:é", "file://[x", "http://x", "\ud800"),
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(0, 1) | VALUES,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(KEYS, values, max_size=5),
    max_leaves=10,
)


def almost(value: Any) -> st.SearchStrategy[Any]:
    """A value, or anything else in its place or in that of one of its parts."""
    if isinstance(value, dict):
        inside: Any = st.fixed_dictionaries({key: almost(part) for key, part in value.items()})
    elif isinstance(value, list):
        inside = st.tuples(*map(almost, value)).map(list)
    else:
        inside = st.just(value)
    return st.integers(0, 19).flatmap(lambda choice: inside if choice else ANYTHING)


GOOD: dict[str, Any] = {
    "llava": llava("<image> Q", "A", image="1.png"),
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "1.png"}}, {"type": "image"}]},
            {"role": "assistant", "content": "A"},
        ],
        "images": [{"path": "2.png"}],
    },
    "texts": {"images": ["1.png"], "texts": [{"user": "Q", "assistant": "A"}]},
    "pairs": {"image": "1.png", "question": "Q", "answer": "A"},
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(data=st.data())
def test_whatever_a_record_holds_there_is_a_row_or_a_reason(kind: str, data: st.DataObject) -> None:
    try:
        found = conversation(data.draw(almost(GOOD[kind])), kind)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert sum(part is None for turn in found.turns if isinstance(turn, list) for part in turn) == len(found.images)
    row = Row.of(Where("d", "line", 1), found.system, found.turns, ["x"] * len(found.images))
    assert row.turns == found.turns and len(found.turns) % 2 == 0
    checked_turns(row.messages)


# --- what is wrong with a file ---


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; add rows"),
        (b" [ ] ", "has no rows"),
        (b'{\n  "a": 1\n}', "one JSON object over several lines"),
        (b'{"a": 1, "b": 2}', r"line 1: a row has .*; this one has a, b; name the columns"),
        (b"PAR1\0\0", "neither JSON nor CSV"),
        (b'[{"a": 1}, {"b"', r"record 2 \(line 1\): not JSON"),
        (b'[{"a": 1}\n{"b": 1}]', "'{' where ',' is due on line 2"),
        (b'[{"a": 1},\n', r"record 2 \(line 2\): not JSON"),
        (b'[{"a": 1}', "the file ends too early"),
        (b'[{"a": "\xff"}]', "not UTF-8 text"),
        (b"{not json}", r"line 1: not JSON .*no row can be read"),
    ],
)
def test_a_bad_file_says_why(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "data"
    file.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    for name in ("data/train.json", tmp_path / "missing", "no such thing"):
        with pytest.raises(UserError, match="no such file or folder"):
            read(name)
    with pytest.raises(UserError, match=r"needs one file of .* but has none"):
        read(tmp_path)
    write_lines(tmp_path / "a.jsonl", [llava("Q", "A")])
    assert len(read(tmp_path)) == 1
    write_lines(tmp_path / "b.json", [])
    with pytest.raises(UserError, match=r"but has a\.jsonl, b\.json; name the file"):
        read(tmp_path)
    with pytest.raises(UserError, match="format 'coco': unknown; known are llava, messages, texts, pairs"):
        read(tmp_path / "a.jsonl", kind="coco")


# --- streaming ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(values=st.lists(JSON, max_size=6), indent=st.sampled_from([None, 0, 3]), plain=st.booleans())
def test_a_list_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, plain: bool
) -> None:
    """With a window of few characters, so that records lie across its edges."""
    file = tmp_path_factory.mktemp("list") / "data.json"
    file.write_text(json.dumps(values, indent=indent, ensure_ascii=plain), encoding="utf-8", errors="replace")
    expected = json.loads(file.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", 3)
        found = list(records.read_json_list(file))
    assert [record.value for record in found] == expected
    assert [record.again() for record in found] == expected
    lines = file.read_text(encoding="utf-8").split("\n")
    for record in found:
        assert record.where.line is not None and lines[record.where.line - 1].strip()


def test_memory_holds_a_record_and_not_the_file(tmp_path: Path) -> None:
    file = tmp_path / "big.json"
    record = json.dumps(llava("<image>\n" + "word " * 200, "answer " * 20, image="x.png"))
    with file.open("w") as out:
        out.write("[" + ",\n".join([record] * 12_000) + "]")
    assert file.stat().st_size > 14_000_000
    tracemalloc.start()
    count = sum(isinstance(item, Row) for item in read_rows(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 12_000
    assert peak < 8_000_000


def test_a_broken_record_does_not_read_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "d.json"
    file.write_text('[{"a": 1}, {"b": oops}' + ", 1" * 100_000 + "]")
    monkeypatch.setattr(records, "CHUNK", 10)
    monkeypatch.setattr(records, "LONGEST", 100)
    sizes: list[int] = []
    with pytest.raises(UserError, match=r"record 2 \(line 1\): not JSON \(Expecting value\)"):
        sizes.extend(len(str(record.value)) for record in records.read_json_list(file))
    assert len(sizes) == 1


# --- images, duplicates, lists of problems ---


def test_images_are_checked_by_their_headers(tmp_path: Path) -> None:
    images_in(tmp_path, 1)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_text("")
    bomb = bytearray(png())
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2  # width and height in the header,
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")  # and its checksum
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "cut.png").write_bytes(png()[:60])  # the header is whole: found when it is decoded
    names = ["0.png", "missing.png", "text.png", "empty.png", "bomb.png", "cut.png", ".", "missing.png"]
    records_ = [llava("<image>", "A", image=name) for name in names]
    records_.append(llava("<image>", "A", image=data_url().replace("iVBOR", "AAAAA")))
    records_.append(llava("<image>", "A", image="two\nlines" + "x" * 500))
    found = list(checked_images(read_rows(write_lines(tmp_path / "d.jsonl", records_))))
    assert all("\n" not in str(item) and len(str(item)) < 600 for item in found if isinstance(item, Problem))
    words = [
        None, "no such image; check its name, or name the folder", "not an image", "0 bytes", "more than 120 million",
        None, "a folder", "no such image", "image data: not an image",
        "no such image",
    ]  # fmt: skip
    assert len(found) == len(words)
    for number, (item, expected) in enumerate(zip(found, words, strict=True), 1):
        assert item.where.number == number
        assert isinstance(item, Row) if expected is None else expected in str(item), str(item)


def test_duplicates_are_counted(tmp_path: Path) -> None:
    same = llava("<image>", "A", image="1.png")
    records_ = [
        same,
        same,
        llava("<image>", "A", image="2.png"),
        llava("<image>", "A", image="./1.png"),
        llava("Q", "A"),
    ]
    assert num_duplicates(rows_of(read(write_lines(tmp_path / "d.jsonl", records_)))) == 2


def test_a_list_of_problems_says_how_many_more() -> None:
    problems = [Problem(Where("d", "line", n), "bad") for n in range(1, 6)]
    assert listing(problems, 2) == ["d: line 1: bad", "d: line 2: bad", "... and 3 more"]
    assert listing(problems[:2], 2) == ["d: line 1: bad", "d: line 2: bad"]
