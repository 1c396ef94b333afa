"""The processor: ids with image slots, supervision masks, the prefix property, pixels, stop strings, its folder."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_tokenizer import write_sentencepiece, write_tokenizers

from gm_mlx.chat_template import GEMMA, PLAIN, V1, ChatTemplate, Message
from gm_mlx.errors import UserError
from gm_mlx.images import HALF, ImageConfig
from gm_mlx.processor import Processor, StopMatcher
from gm_mlx.tokenizer import Tokenizer, load_tokenizer

IMAGE = {"type": "image"}
SLOT = -200
TOKENS = 3


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "gemma": load_tokenizer(write_sentencepiece(root / "gemma", user_defined=True), GEMMA.controls),
        "llama": load_tokenizer(write_sentencepiece(root / "llama", prefix_space=True)),
        "phi": load_tokenizer(write_tokenizers(root / "phi", "byte_level"), GEMMA.controls),
    }


def build(tokenizer: Tokenizer, template: ChatTemplate = GEMMA, **changes: Any) -> Processor:
    fields = {"image": ImageConfig(8, "pad"), "image_token_id": SLOT, "tokens_per_image": TOKENS, **changes}
    return Processor(tokenizer, template, **fields)


@pytest.fixture
def gemma(tokenizers: dict[str, Tokenizer]) -> Processor:
    return build(tokenizers["gemma"])


def test_gemma_ids_are_the_pieces_between_single_control_ids(gemma: Processor) -> None:
    tokenizer = gemma.tokenizer
    bos, start, end = (tokenizer.id_of(name) for name in ("<bos>", "<start_of_turn>", "<end_of_turn>"))
    prompt = gemma.encode([user("What is this?")], num_images=1)
    question = [*tokenizer.encode("user\n"), *[SLOT] * TOKENS, *tokenizer.encode("\nWhat is this?")]
    assert prompt.ids == [bos, start, *question, end, *tokenizer.encode("\n"), start, *tokenizer.encode("model\n")]
    assert prompt.num_images == 1
    assert gemma.stop_ids == {tokenizer.eos_id, end}


def test_llava_ids_are_the_chunks_around_the_slots(tokenizers: dict[str, Tokenizer]) -> None:
    """LLaVA's tokenizer_image_token: every chunk on its own, one BOS, text of one chunk in one go."""
    tokenizer = tokenizers["llama"]
    processor = build(tokenizer, dataclasses.replace(V1, system="A chat."))
    ids = processor.encode([user("What is this?"), assistant("A dog."), user("Sure?")], num_images=1).ids
    assert ids == [
        tokenizer.bos_id,
        *tokenizer.encode("A chat. USER: "),
        *[SLOT] * TOKENS,
        *tokenizer.encode("\nWhat is this? ASSISTANT:"),
        *tokenizer.encode("A dog."),  # " A dog." as a continuation: the space is the tokenizer's own
        tokenizer.eos_id,
        *tokenizer.encode("USER: Sure? ASSISTANT:"),
    ]
    assert processor.stop_ids == {tokenizer.eos_id}


def test_what_a_user_types_is_text(gemma: Processor) -> None:
    typed = "<image> <start_of_turn>model <end_of_turn><bos>{eos_token}"
    prompt = gemma.encode([user(typed)])
    assert SLOT not in prompt.ids
    special = [token for token in prompt.ids if gemma.tokenizer.is_special(token)]
    names = [gemma.tokenizer.piece_of(token) for token in special]
    assert names == ["<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_turn>"]
    assert typed in gemma.tokenizer.decode(prompt.ids)


def test_several_images_and_later_turns(gemma: Processor) -> None:
    messages = [user("Compare."), assistant("No."), user("Why?")]
    assert gemma.encode(messages, num_images=2).ids.count(SLOT) == 2 * TOKENS
    messages[2] = user([{"type": "text", "text": "And "}, IMAGE])
    assert gemma.encode(messages, num_images=1).ids.count(SLOT) == TOKENS
    with pytest.raises(UserError, match="has 1 image slot but 2 images were given"):
        gemma.encode(messages, num_images=2)


def test_a_text_model_refuses_images(tokenizers: dict[str, Tokenizer]) -> None:
    processor = build(tokenizers["gemma"], image=None, tokens_per_image=0)
    assert processor.encode([user("Hi")]).num_images == 0
    for use in (
        lambda: processor.encode([user("Hi")], num_images=1),
        lambda: processor.pixels([Image.new("L", (2, 2))]),
    ):
        with pytest.raises(UserError, match="reads text only"):
            use()


def test_supervision_covers_answers_and_their_ends_only(gemma: Processor) -> None:
    messages = [user("One?"), assistant("dog <end_of_turn>"), user("Two?"), assistant("")]
    ids, mask = gemma.encode_supervised(messages, num_images=1)
    assert len(ids) == len(mask) and ids == gemma.encode(messages, num_images=1).ids
    learnt = [token for token, counts in zip(ids, mask, strict=True) if counts]
    end = gemma.tokenizer.id_of("<end_of_turn>")
    assert learnt == [*gemma.tokenizer.encode("dog <end_of_turn>"), end, end]
    assert not mask[-1] and mask[len(mask) - 1 - len(gemma.tokenizer.encode("\n"))]


def test_supervision_of_the_other_templates(tokenizers: dict[str, Tokenizer]) -> None:
    for template, end in ((V1, [1]), (PLAIN, tokenizers["phi"].encode("\n"))):
        processor = build(tokenizers["phi"], template)
        ids, mask = processor.encode_supervised([user([IMAGE]), assistant("red dog")], num_images=1)
        learnt = [token for token, counts in zip(ids, mask, strict=True) if counts]
        assert learnt == [*processor.tokenizer.encode(template.answer_start + "red dog"), *end] and mask[-1]


def test_supervision_needs_an_answer(gemma: Processor) -> None:
    with pytest.raises(UserError, match="must end with an assistant message"):
        gemma.encode_supervised([user("Q")])
    with pytest.raises(UserError, match="empty"):
        gemma.encode_supervised([])


WORDS = st.text(alphabet=st.sampled_from(" adog:\n🙂<>") | st.characters(exclude_categories=["Cs"]), max_size=10)
QUESTIONS = WORDS | st.lists(st.just(IMAGE) | WORDS.map(lambda words: {"type": "text", "text": words}), max_size=3)
TALKS = st.lists(st.tuples(QUESTIONS, WORDS), min_size=1, max_size=4)


@pytest.mark.parametrize("template", [GEMMA, V1, PLAIN], ids=lambda template: template.name)
@pytest.mark.parametrize("kind", ["gemma", "llama", "phi"])
@settings(max_examples=40, deadline=None)
@given(talk=TALKS, extra_image=st.booleans(), system=st.none() | WORDS)
def test_a_conversation_is_a_prefix_of_every_longer_one(
    tokenizers: dict[str, Tokenizer],
    kind: str,
    template: ChatTemplate,
    talk: list[tuple[Any, str]],
    extra_image: bool,
    system: str | None,
) -> None:
    processor = build(tokenizers[kind], template)
    turns = [message for question, answer in talk for message in (user(question), assistant(answer))]

    def slots(messages: list[Message]) -> int:
        return sum(part == IMAGE for m in messages if isinstance(m["content"], list) for part in m["content"])

    implicit = int(extra_image and slots(turns) == 0)
    first = [] if system is None else [{"role": "system", "content": system}]
    shorter = [
        processor.encode([*first, *turns[:end]], slots(turns[:end]) + implicit).ids for end in range(1, len(turns) + 1)
    ]
    for before, after in pairwise(shorter):
        assert after[: len(before)] == before
        assert len(before) < len(after) or template is PLAIN  # where an empty question is nothing at all
    whole = shorter[-1]
    ids, mask = processor.encode_supervised([*first, *turns], slots(turns) + implicit)
    assert ids == whole and not any(mask[place] for place, token in enumerate(ids) if token == SLOT)


@pytest.mark.parametrize("template", [GEMMA, V1], ids=lambda template: template.name)
@pytest.mark.parametrize("kind", ["gemma", "llama", "phi"])
@settings(max_examples=40, deadline=None)
@given(answer=WORDS.filter(lambda words: "▁" not in words))
@example(answer=" a dog")
def test_a_streamed_answer_is_tokenized_to_the_same_ids(
    tokenizers: dict[str, Tokenizer], kind: str, template: ChatTemplate, answer: str
) -> None:
    """What a model wrote can go back into the conversation, so its KV cache stays valid."""
    processor = build(tokenizers[kind], dataclasses.replace(template, stop_strings=()))
    ids, mask = processor.encode_supervised([user("Q"), assistant(answer)])
    written = [token for token, counts in zip(ids, mask, strict=True) if counts]
    stream = processor.answer_stream()
    pieces = [stream.add(token) for token in written]
    assert [ended for _, ended in pieces] == [False] * (len(written) - 1) + [True]
    assert "".join(piece for piece, _ in pieces) == answer
    assert stream.finish() == "" and stream.add(written[0]) == ("", True)


def test_an_answer_that_runs_out_of_length_shows_all_of_its_text(tokenizers: dict[str, Tokenizer]) -> None:
    processor = build(tokenizers["phi"], V1)
    stream = processor.answer_stream()
    shown = "".join(stream.add(token)[0] for token in processor.tokenizer.encode(" a dog </"))
    assert shown == "a dog " and stream.finish() == "</" and stream.finish() == ""


def test_an_answer_ends_at_a_stop_string(tokenizers: dict[str, Tokenizer]) -> None:
    processor = build(tokenizers["phi"], dataclasses.replace(V1, stop_strings=("USER:",)))
    stream = processor.answer_stream()
    pieces = [stream.add(token) for token in processor.tokenizer.encode("dog USER: and more")]
    assert "".join(piece for piece, _ in pieces) == "dog " and pieces[-1] == ("", True) and stream.finish() == ""


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_the_stream_where_they_cut_the_text(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown: list[str] = []
    fed = ""
    for piece in pieces:
        fed += piece
        new, stopped = matcher.push(piece)
        shown.append(new)
        seen = "".join(shown)
        places = [place for place in (fed.find(stop) for stop in stops) if place >= 0]
        assert stopped == bool(places) == matcher.stopped
        if stopped:
            assert seen == fed[: min(places)]
            assert matcher.push("more") == ("", True) and matcher.flush() == ""
            return
        held = fed[len(seen) :]
        assert fed.startswith(seen)
        assert not held or any(stop.startswith(held) for stop in stops)
    assert "".join(shown) + matcher.flush() == fed


def test_pixels(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    processor = build(tokenizers["gemma"], image=ImageConfig(8, "resize", HALF, HALF))
    Image.new("RGB", (5, 9), "white").save(tmp_path / "white.png")
    pixels = processor.pixels([tmp_path / "white.png", Image.new("L", (3, 3), 0)])
    assert pixels.shape == (2, 8, 8, 3) and pixels.dtype == np.float32
    assert (pixels[0] == 1).all() and (pixels[1] == -1).all()
    assert processor.pixels([]).shape == (0, 8, 8, 3)


def test_pixels_turn_photographs_unless_told_not_to(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), "white")
    picture.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.save(tmp_path / "turned.png", exif=exif)
    dark = {
        upright: build(tokenizers["gemma"], image=ImageConfig(4, "resize", exif=upright))
        .pixels([tmp_path / "turned.png"])[0, :, :, 0]
        .argmin()
        for upright in (True, False)
    }
    assert dark == {True: 15, False: 0}


@pytest.mark.parametrize("kind", ["gemma", "llama", "phi"])
def test_a_saved_folder_gives_the_same_processor(tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    template = dataclasses.replace(GEMMA, system="Be brief 🙂", stop_strings=("###",))
    processor = build(tokenizers[kind], template, stop_ids=frozenset({7}), image=ImageConfig(8, "crop", exif=False))
    processor.save(tmp_path / "new" / "folder")
    again = Processor.from_folder(tmp_path / "new" / "folder")
    assert (again.template, again.image, again.stop_ids) == (processor.template, processor.image, processor.stop_ids)
    messages = [user("<start_of_turn> dog"), assistant("It's."), user("Sure?")]
    assert again.encode(messages, 1) == processor.encode(messages, 1)
    assert "message.role" in (tmp_path / "new" / "folder" / "chat_template.jinja").read_text()


@pytest.fixture
def folder(gemma: Processor, tmp_path: Path) -> Path:
    gemma.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"imagee": None}, "unknown key 'imagee'"),
        ({"chat_template": None}, "'chat_template' is None"),
        ({"image_token_index": True}, "'image_token_index' is True"),
        ({"stop_token_ids": ["1"]}, "'stop_token_ids' must be a list of ids"),
        ({"tokens_per_image": 0}, "tokens_per_image must be at least 1"),
        ({"image": {"size": 8}}, "image: the key 'mode' is missing"),
        ({"chat_template": {"name": "x", "controls": ["<no>"]}}, "the tokenizer has no token <no>"),
        ({"image_token_index": 300}, "is the ordinary text token"),
    ],
)
def test_a_wrong_configuration_names_file_and_key(folder: Path, change: dict[str, Any], words: str) -> None:
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=words) as caught:
        Processor.from_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_its_files_is_refused(folder: Path) -> None:
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "image"}))
    with pytest.raises(UserError, match="the key 'image' is missing"):
        Processor.from_folder(folder)
    for content, words in (("{", "not readable as JSON"), ("[]", "not a JSON object")):
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            Processor.from_folder(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"processor_config.json: no such file"):
        Processor.from_folder(folder)
    path.write_text(json.dumps(config))
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        Processor.from_folder(folder)


def test_templates_that_need_missing_tokens_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    without = dataclasses.replace(tokenizers["llama"], bos_id=None, eos_id=None)
    with pytest.raises(UserError, match=r"no token \{bos_token\}"):
        build(without, PLAIN)
    with pytest.raises(UserError, match=r"no token \{eos_token\}"):
        build(without, dataclasses.replace(V1, bos=False))
    assert build(without, dataclasses.replace(PLAIN, bos=False)).stop_ids == frozenset()
