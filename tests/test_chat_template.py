"""Chat templates: the exact strings of LLaVA and LLaVA-Gemma, image slots, and the jinja text for other tools."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gm_mlx.chat_template import GEMMA, PLAIN, TEMPLATES, V1, ChatTemplate, Message, render, to_jinja, to_text
from gm_mlx.errors import UserError

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Message:
    return {"role": "assistant", "content": content}


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def written(template: ChatTemplate, messages: list[Message], num_images: int = 0, prompt: bool = True) -> str:
    return to_text(render(template, messages, num_images, prompt), "<bos>", "</s>")


TALK = [user("What is this?"), assistant("A dog."), user("Sure?")]


def test_gemma() -> None:
    assert written(GEMMA, TALK, 1) == (
        "<bos><start_of_turn>user\n<image>\nWhat is this?<end_of_turn>\n<start_of_turn>model\nA dog.<end_of_turn>\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert written(GEMMA, [system("Be brief."), user("Hi")]) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_v1() -> None:
    assert written(V1, TALK, 1) == (
        "<bos>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT: A dog.</s>"
        "USER: Sure? ASSISTANT:"
    )
    assert written(dataclasses.replace(V1, bos=False), [system("S"), user("Hi")]) == "S USER: Hi ASSISTANT:"
    assert written(V1, [system(""), user("Hi")]) == "<bos>USER: Hi ASSISTANT:"


def test_plain() -> None:
    assert written(PLAIN, [user([IMAGE]), assistant("a red circle")], 1) == "<bos><image>a red circle\n"


@pytest.mark.parametrize(
    ("content", "num_images", "expected"),
    [
        ("Compare.", 2, "<image><image>\nCompare."),
        ([IMAGE, text("Q")], 1, "<image>\nQ"),
        ([IMAGE, IMAGE, text("Q")], 2, "<image><image>\nQ"),
        ([IMAGE, text("\nQ")], 1, "<image>\nQ"),
        ([text("Q\n"), IMAGE], 1, "Q\n<image>"),
        ([text("Is "), IMAGE, text(" like "), IMAGE, text("?")], 2, "Is <image> like <image>?"),
        ([IMAGE, text("One."), IMAGE, text("Two.")], 2, "<image>\nOne.<image>Two."),
        ([IMAGE], 1, "<image>\n"),
        ([text("Q")], 1, "<image>\nQ"),
        ("literally <image>", 1, "<image>\nliterally <image>"),
        ("literally <image>", 0, "literally <image>"),
    ],
)
def test_where_images_stand(content: Any, num_images: int, expected: str) -> None:
    shown = written(dataclasses.replace(V1, system="", user_end="|"), [user(content)], num_images)
    assert shown == f"<bos>USER: {expected}|ASSISTANT:"


def test_only_our_text_holds_control_tokens() -> None:
    segments = render(GEMMA, [user("<end_of_turn>"), assistant("<start_of_turn>{eos_token}"), user("<image>")], 1)
    ours = "".join(segment.text for segment in segments if segment.kind == "template")
    assert ours.count("<start_of_turn>") == 4 and ours.count("<end_of_turn>") == 3 and "eos_token" not in ours
    assert sum(segment.kind == "image" for segment in segments) == 1
    assert [segment.text for segment in segments if segment.answer] == ["<start_of_turn>{eos_token}", "<end_of_turn>"]


@pytest.mark.parametrize(
    ("messages", "num_images", "words"),
    [
        ([user([IMAGE, IMAGE, text("Q")])], 1, "has 2 image slots but 1 image was given"),
        ([user([IMAGE, text("Q")])], 3, "has 1 image slot but 3 images were given"),
        ([user([IMAGE, text("Q")])], 0, "has 1 image slot but 0 images were given"),
        ([user([IMAGE]), assistant("A"), user([IMAGE])], 1, "has 2 image slots but 1 image"),
        ([], 0, "empty"),
        ([system("S")], 0, "system message only"),
        ([assistant("A")], 0, "message 1: its role is 'assistant' where 'user' is due"),
        ([system("S"), user("Q"), user("Q")], 0, "message 3: its role is 'user' where 'assistant' is due"),
        ([user("Q"), system("S")], 0, "message 2: its role is 'system'"),
        ([user("Q"), {"role": "tool", "content": ""}], 0, "message 2: its role is 'tool'"),
        ([{"role": "user"}], 0, "message 1: not an object"),
        (["Q"], 0, "message 1: not an object"),
        ([user(None)], 0, "must be a text or a list of parts"),
        ([user([{"type": "video"}])], 0, "does not belong there"),
        ([user([text("Q")]), assistant([IMAGE])], 1, "does not belong there"),
        ([system([IMAGE]), user("Q")], 1, "does not belong there"),
        ([user(["Q"])], 0, "does not belong there"),
    ],
)
def test_bad_conversations_are_one_clear_line(messages: list[Any], num_images: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        render(GEMMA, messages, num_images)
    assert words in str(caught.value) and "\n" not in str(caught.value)


WORDS = st.text(alphabet=st.sampled_from("aé🙂 \n{}%<>\"'\\") | st.characters(exclude_categories=["Cs"]), max_size=8)
PARTS = st.lists(st.just(IMAGE) | WORDS.map(text), max_size=5)
TURNS = st.lists(st.tuples(WORDS | PARTS, WORDS | st.lists(WORDS.map(text), max_size=2)), min_size=1, max_size=3)
FIELDS = st.lists(WORDS, min_size=9, max_size=9)


def conversation(turns: list[tuple[Any, Any]], first: str | None, open_end: bool) -> tuple[list[Message], int]:
    messages = [message for question, answer in turns for message in (user(question), assistant(answer))]
    messages = [*([] if first is None else [system(first)]), *messages[: len(messages) - open_end]]
    slots = sum(
        part == IMAGE for message in messages if isinstance(message["content"], list) for part in message["content"]
    )
    return messages, slots


@pytest.mark.parametrize("trim", [False, True], ids=["plain", "as transformers"])
@settings(max_examples=150, deadline=None)
@given(turns=TURNS, first=st.none() | WORDS, open_end=st.booleans(), prompt=st.booleans(), odd=FIELDS, base=st.data())
def test_jinja_renders_the_same_string(
    trim: bool, turns: Any, first: str | None, open_end: bool, prompt: bool, odd: list[str], base: st.DataObject
) -> None:
    keys = ("system", "system_end", "user_start", "image_end", "user_end", "assistant_start", "answer_start")
    values: dict[str, Any] = dict(zip(keys, odd, strict=False))
    values |= {"bos": False, "system_in_user": prompt, "answer_end": odd[7] + "{eos_token}", "answer_after": odd[8]}
    strange = ChatTemplate("strange", **values)
    template = base.draw(st.sampled_from([*TEMPLATES.values(), strange]))
    messages, slots = conversation(turns, first, open_end)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim)
    shown = environment.from_string(to_jinja(template)).render(
        messages=messages, add_generation_prompt=prompt, bos_token="<bos>", eos_token="</s>"
    )
    assert shown == written(template, messages, slots, prompt)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_templates_survive_json(template: ChatTemplate) -> None:
    assert ChatTemplate.from_dict(json.loads(json.dumps(template.to_dict()))) == template


def test_missing_fields_take_their_defaults() -> None:
    assert ChatTemplate.from_dict({"name": "x", "user_start": "Q: "}) == ChatTemplate("x", user_start="Q: ")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "x", "usr_start": ""}, "unknown key 'usr_start'"),
        ({"name": "x", "bos": 1}, "'bos' is 1; it must be a boolean"),
        ({"name": "x", "user_end": None}, "'user_end' is None; it must be a string"),
        ({"name": "x", "controls": "<a>"}, "'controls' is '<a>'; it must be a list of strings"),
        ({"name": "x", "stop_strings": [1]}, "'stop_strings'"),
        ({"bos": True}, "'name' is missing"),
        ({"name": "x", "answer_end": ""}, "answer_end is empty"),
    ],
)
def test_bad_templates_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ChatTemplate.from_dict(values)
