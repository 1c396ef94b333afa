"""Tokenizers without a tokenizer.json: byte for byte what tiktoken, transformers and GPT-2's own procedure give."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_byte_pairs import RUNS, TEXTS, nfc, rank_lines, ranks, trained, write_ranks, write_vocabulary
from tiny_tokenizer import write_sentencepiece

from gm_mlx.chat_template import OPENCHAT, OPENCHAT_END, PHI, PLAIN, TEMPLATES, V1, ChatTemplate
from gm_mlx.convert.layouts.decoders import LLAMA, MISTRAL
from gm_mlx.convert.preparation import choose_template, find_tokenizer
from gm_mlx.convert.rank_files import last_merge, merges
from gm_mlx.convert.tokenizers import RANK_FAMILIES, WORDS, converted_files
from gm_mlx.errors import UserError
from gm_mlx.images import ImageConfig
from gm_mlx.processor import Processor
from gm_mlx.tokenizer import BYTE_OF_CHAR, Detokenizer, Tokenizer, load_tokenizer, make_tokenizer

QWEN, STABLELM = RANK_FAMILIES
FILES = [family.file for family in RANK_FAMILIES]
# tokenization_qwen.py and tokenization_arcade100k.py have the same pattern.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

SPACES = [
    " ",
    "  ",
    "     ",
    " " * 40,
    "\n",
    "\r\n",
    "\r",
    "\t",
    "\t\t\t",
    "\v",
    "\f",
    "\x85",
    "\xa0",
    "\u2028",
    "\u3000",
]
ODD = [
    *("'s", "'S", "'LL", "'re", "'Ve", "'ſ", "’s", "''t", "it's", "IT'S", "'", "0", "2024", "1234567", "²", "Ⅷ", "٣४"),
    *("中文", "日本語", "한국어", "e\u0301", "a\u0308\u0323", "\u0301", "Ǆ", "ﬁ", "ß", "K", "क्षि", "ก็", "ﷺ", "Å", "각"),
    *("🙂", "👩‍👩‍👧", "🇨🇭", "❤️", "\x00", "\x1b", "\x7f", "\u200b", "\u200d", "\ufeff", "\ufffd", "\U0010ffff"),
    *("<|endoftext|>", "<|im_start|>", "<|extra_0|>", "<|reg0|>", "<gh_stars>", "<image>", "</s>", "<|endof", "text|>"),
    *("the", " picture", "Was ist das", "круг", "!?", "...\n\n", "x_y", "(a)", "\\", "\ue000"),
]
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
FUZZ = st.lists(st.sampled_from(SPACES) | st.sampled_from(ODD) | ANY_TEXT, max_size=12).map("".join)


def encoding(tokens: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=tokens, special_tokens={})


TRAINED = encoding(ranks())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    found = {file: find_tokenizer([write_ranks(root / file, file)]) for file in FILES}
    return found | {kind: find_tokenizer([write_vocabulary(root / kind, kind)]) for kind in KINDS}


KINDS = ["CodeGenTokenizer", "Qwen2Tokenizer"]
ALL = [*FILES, *KINDS]
NORMALIZED = [*FILES, "Qwen2Tokenizer"]


# Against tiktoken


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=400, deadline=None)
@given(text=FUZZ)
def test_byte_for_byte_what_tiktoken_gives(tokenizers: dict[str, Tokenizer], file: str, text: str) -> None:
    assert tokenizers[file].encode(text) == TRAINED.encode_ordinary(nfc(text))


@pytest.mark.parametrize("file", FILES)
def test_long_texts(tokenizers: dict[str, Tokenizer], file: str) -> None:
    # Beyond a hundred bytes tiktoken joins with another procedure, and words may be that long.
    for text in (
        *TEXTS,
        "".join(TEXTS) * 20,
        "quick" * 200,
        " " * 1000,
        "\n" * 300,
        "é" * 500,
        "!" * 5000,
        "中文" * 300,
    ):
        assert tokenizers[file].encode(text) == TRAINED.encode_ordinary(nfc(text))


@pytest.mark.slow
def test_every_character_is_of_the_same_kind_as_in_tiktoken(tmp_path: Path) -> None:
    """All of Unicode but its empty planes: each regex engine has its own tables of letters, numbers and spaces."""
    tokens = {bytes([byte]): byte for byte in range(256)}
    for byte in range(256):  # joined exactly if both are in one word
        for pair in (b"a" + bytes([byte]), bytes([byte]) + b"a", b"!" + bytes([byte])):
            tokens.setdefault(pair, len(tokens))
    spec = json.loads(converted_files(write_ranks(tmp_path, QWEN.file, tokens))["tokenizer.json"])
    # What normalization does to a character is the next test's.
    files = {"tokenizer.json": json.dumps({**spec, "normalizer": None}).encode()}
    tokenizer, reference = make_tokenizer(files, tmp_path), encoding(tokens)
    used = [*range(0xD800), *range(0xE000, 0x3_2400), *range(0xE_0000, 0xE_0200), 0xF_0000, 0x10_FFFF]
    for start in range(0, len(used), 4096):
        text = "".join(f"a{chr(code)}\n{chr(code)}a\n!{chr(code)}\n" for code in used[start : start + 4096])
        assert tokenizer.encode(text) == reference.encode_ordinary(text), f"from U+{used[start]:04X}"
    assert len(tokenizer.encode("aé\né1")) == 6  # the probe tells letters (3 + LF + 2) ...
    assert len(tokenizer.encode("a٣\n")) == 4  # ... from numbers


def test_every_character_is_normalized_as_python_does(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, reference = tokenizers[QWEN.file], TRAINED
    for start in range(0, 0x3_0000, 4096):
        codes = [code for code in range(start, start + 4096) if not 0xD800 <= code < 0xE000]
        text = "\n".join(map(chr, codes))
        assert tokenizer.encode(text) == reference.encode_ordinary(nfc(text)), f"from U+{start:04X}"


# Files that no training made: tokens that cannot be reached, parts with higher ranks than the whole.
TOKENS = st.lists(st.text(alphabet="abc", min_size=2, max_size=7), max_size=30, unique=True)


@settings(max_examples=150, deadline=None)
@given(names=TOKENS, text=st.text(alphabet="abc", max_size=60), repeat=st.sampled_from([1, 4]))
def test_any_ranks_give_what_tiktoken_gives(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], text: str, repeat: int
) -> None:
    tokens = {bytes([byte]): byte for byte in range(256)}
    tokens |= {name.encode(): 256 + index for index, name in enumerate(names)}
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = find_tokenizer([write_ranks(folder, QWEN.file, tokens)])
    for each in (text * repeat, *names):
        assert tokenizer.encode(each) == encoding(tokens).encode_ordinary(each)


def test_merges_are_those_that_made_the_ranks() -> None:
    spelled = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    found = [" ".join("".join(spelled[byte] for byte in part) for part in pair) for pair in merges(ranks())]
    assert found == trained()[1]


def test_a_token_that_no_merges_reach() -> None:
    tokens = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bcd": 257, b"abcd": 258}
    assert last_merge(b"abcd", tokens) is None and last_merge(b"bcd", tokens) is None
    assert last_merge(b"ab", tokens) == (b"a", b"b")


# Special tokens


def of_size(size: int) -> dict[bytes, int]:
    """As many tokens as a published file has; what they are does not matter."""
    tokens = {bytes([byte]): byte for byte in range(256)}
    return tokens | {rank.to_bytes(3, "big"): rank for rank in range(256, size)}


@pytest.mark.parametrize(
    ("file", "size", "length", "ids"),
    [
        (
            QWEN.file,
            151643,
            151851,
            {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|extra_0|>": 151646}
            | {"<|extra_204|>": 151850},
        ),
        (
            STABLELM.file,
            100256,
            100289,
            {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_pad|>": 100261, "<gh_stars>": 100262}
            | {"<reponame>": 100275, "<|endofprompt|>": 100276, "<|im_start|>": 100277, "<|pause|>": 100279}
            | {"<|reg0|>": 100280, "<|reg7|>": 100287, "<|extra0|>": 100288},
        ),
    ],
)
def test_special_tokens_have_the_published_ids(
    tmp_path: Path, file: str, size: int, length: int, ids: dict[str, int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ids["<|endoftext|>"]}))
    tokenizer = find_tokenizer([write_ranks(tmp_path, file, of_size(size))])
    assert tokenizer.vocab_size == length
    assert {name: tokenizer.id_of(name) for name in ids} == ids
    assert all(tokenizer.is_special(token) for token in ids.values())
    assert tokenizer.bos_id is None and tokenizer.eos_id == ids["<|endoftext|>"]
    assert tokenizer.piece_of(size - 1) and not tokenizer.is_special(size - 1)


def test_the_id_between_ranks_and_special_tokens_is_nothing(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[STABLELM.file]
    assert tokenizer.id_of("<|endoftext|>") == len(ranks()) + 1
    assert tokenizer.token_bytes(len(ranks())) == b"" and not tokenizer.is_special(len(ranks()))


def test_phi_has_the_length_to_which_the_embedding_is_cut(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["CodeGenTokenizer"]
    size = len(trained(None)[0])
    # Phi-2: 50257 tokens with <|endoftext|>, 38 runs of spaces and tabs, MoE-LLaVA's <|extra_0|>; 50296 in all.
    assert tokenizer.vocab_size == size + 1 + len(RUNS) + 1 and len(RUNS) == 38
    assert tokenizer.eos_id == size and tokenizer.pad_id == tokenizer.id_of("<|extra_0|>") == tokenizer.vocab_size - 1
    assert tokenizer.bos_id is None  # MoE-LLaVA's prompts for Phi begin without one


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=150, deadline=None)
@given(text=FUZZ)
def test_text_comes_back_and_never_makes_control_ids(tokenizers: dict[str, Tokenizer], name: str, text: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text)
    assert not any(tokenizer.is_special(token) for token in ids)
    assert tokenizer.decode(ids) == (nfc(text) if name in NORMALIZED else text)
    stream = Detokenizer(tokenizer)
    pieces = [*(stream.add(token) for token in ids), stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ALL)
def test_half_a_character_is_never_shown(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("𓂀")
    assert len(ids) == 4  # it was not in the training text
    stream = Detokenizer(tokenizer)
    assert [*(stream.add(token) for token in ids), stream.finish()] == ["", "", "", "𓂀", ""]
    stream = Detokenizer(tokenizer)
    assert [stream.add(ids[0]), stream.add(ids[1]), stream.finish()] == ["", "", "\ufffd"]


# Against transformers and GPT-2's own procedure


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(text=FUZZ)
def test_equal_to_transformers(
    tokenizers: dict[str, Tokenizer], references: dict[str, Any], kind: str, text: str
) -> None:
    for name in ("<|endoftext|>", "<|extra_0|>"):  # these it would recognize in a user's text
        text = text.replace(name, "")
    assert tokenizers[kind].encode(text) == references[kind](text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    import transformers

    found = {}
    for kind in KINDS:
        folder = write_vocabulary(tmp_path_factory.mktemp(kind), kind)
        pairs = [tuple(line.split(" ")) for line in trained(None if kind == "CodeGenTokenizer" else WORDS)[1]]
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        found[kind] = getattr(transformers, kind)(vocab=vocabulary, merges=pairs)
        found[kind].add_tokens([transformers.AddedToken(run, normalized=True) for run in RUNS])
        found[kind].add_tokens("<|extra_0|>", special_tokens=True)
    return found


@settings(max_examples=200, deadline=None)
@given(text=FUZZ)
def test_codegen_equals_the_procedure_of_its_paper_in_plain_python(tokenizers: dict[str, Tokenizer], text: str) -> None:
    # MoE-LLaVA loads Phi's tokenizer with use_fast=False, whose procedure this is.
    vocabulary, pairs = trained(None)
    order = {tuple(line.split(" ")): rank for rank, line in enumerate(pairs)}
    spelled = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    expected = []
    for stretch in regex.split("(" + "|".join(map(regex.escape, RUNS)) + ")", text):
        if stretch in RUNS:
            expected.append(len(vocabulary) + 1 + RUNS.index(stretch))
            continue
        for word in regex.findall(GPT2_PATTERN, stretch):
            parts = [spelled[byte] for byte in word.encode()]
            while len(parts) > 1:
                best = min(itertools.pairwise(parts), key=lambda pair: order.get(pair, len(order)))
                if best not in order:
                    break
                at = 0
                while at + 1 < len(parts):
                    if (parts[at], parts[at + 1]) == best:
                        parts[at : at + 2] = ["".join(best)]
                    at += 1
            expected += [vocabulary[part] for part in parts]
    assert tokenizers["CodeGenTokenizer"].encode(text) == expected


def test_newer_folders_have_added_tokens_in_tokenizer_config(tmp_path: Path) -> None:
    older = find_tokenizer([write_vocabulary(tmp_path / "older")])
    folder = write_vocabulary(tmp_path / "newer")
    added = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": False}
    change(folder, "tokenizer_config.json", added_tokens_decoder={v: {"content": k, **flags} for k, v in added.items()})
    both = find_tokenizer([folder])
    (folder / "added_tokens.json").unlink()
    newer = find_tokenizer([folder])
    assert newer.files["tokenizer.json"] == both.files["tokenizer.json"]
    assert newer.encode("a   b\t\tc") == older.encode("a   b\t\tc")
    assert newer.vocab_size == older.vocab_size and newer.is_special(newer.vocab_size - 1)


# Templates


FAMILIES = {
    "qwen": (QWEN.file, PHI),
    "stablelm": (STABLELM.file, PHI),
    "phi": ("CodeGenTokenizer", PHI),
}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TALK = [
    {"role": "user", "content": "What is this? <|endoftext|>"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "Sure?"},
]


def processor(tokenizer: Tokenizer, template: ChatTemplate) -> Processor:
    return Processor(tokenizer, template, ImageConfig(8, "pad"), -200, 4)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_prompts_of_moe_llava(tokenizers: dict[str, Tokenizer], tmp_path: Path, family: str) -> None:
    name, expected = FAMILIES[family]
    tokenizer = tokenizers[name]
    template, notes = choose_template(None, LLAMA, tokenizer, [tmp_path], plain=False, own_jinja=False)
    assert (template, notes) == (expected, [])
    assert TEMPLATES[family].to_dict() == {**expected.to_dict(), "name": family}
    ids = processor(tokenizer, template).encode(TALK, 1).ids
    before, after = ids[: ids.index(-200)], ids[ids.index(-200) + 4 :]
    assert tokenizer.decode(before, skip_special=False) == f"{SYSTEM} USER: "
    assert tokenizer.decode(after, skip_special=False) == (
        "\nWhat is this? <|endoftext|> ASSISTANT: A dog.<|endoftext|>USER: Sure? ASSISTANT:"
    )
    assert ids.count(tokenizer.eos_id) == 1  # what the user typed is text
    assert before == tokenizer.encode(f"{SYSTEM} USER: ")  # no BOS, and tokenized in one go
    ids, learnt = processor(tokenizer, template).encode_supervised(TALK[:2], 0)
    answer = [token for token, mark in zip(ids, learnt, strict=True) if mark]
    assert tokenizer.decode(answer, skip_special=False) == " A dog.<|endoftext|>"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_answers_end_at_the_token_and_at_its_spelling(tokenizers: dict[str, Tokenizer], family: str) -> None:
    tokenizer = tokenizers[FAMILIES[family][0]]
    own = processor(tokenizer, PHI)
    for end in ([tokenizer.eos_id], tokenizer.encode("<|endoftext|> more")):
        stream = own.answer_stream()
        shown = [stream.add(token) for token in [*tokenizer.encode(" A dog."), *end]]
        assert "".join(text for text, _ in shown) == "A dog." and shown[-1][1]


@pytest.mark.parametrize(("added", "expected"), [(OPENCHAT_END, OPENCHAT), (None, V1)])
def test_openchat_and_mistral(tmp_path: Path, added: str | None, expected: ChatTemplate) -> None:
    write_sentencepiece(tmp_path, prefix_space=True)
    size = load_tokenizer(tmp_path).vocab_size
    # Before transformers 4.34 added tokens were in this file only.
    (tmp_path / "added_tokens.json").write_text(json.dumps({added: size, "<|pad_0|>": size + 1} if added else {}))
    tokenizer = find_tokenizer([tmp_path])
    assert tokenizer.vocab_size == size + (2 if added else 0)
    template, _ = choose_template(None, MISTRAL, tokenizer, [tmp_path], plain=False, own_jinja=False)
    assert template == expected
    ids = processor(tokenizer, template).encode(TALK, 1).ids
    before, after = ids[: ids.index(-200)], ids[ids.index(-200) + 4 :]
    assert tokenizer.decode(before, skip_special=False) == f"<bos> {SYSTEM} USER: "
    # Llama's tokenizer puts a space before every stretch of text, behind control tokens too.
    assert tokenizer.decode(after, skip_special=False, continues=True) == (
        f" \nWhat is this? <|endoftext|> ASSISTANT: A dog.{added or '<eos>'} USER: Sure? ASSISTANT:"
    )
    again = tmp_path / "again"
    processor(tokenizer, template).save(again)
    assert Processor.from_folder(again).encode(TALK, 1).ids == ids


def test_families_that_are_written_as_vicuna() -> None:
    for name in ("vicuna", "mistral", "eve"):
        assert TEMPLATES[name].to_dict() == {**V1.to_dict(), "name": name}
    assert V1.system == SYSTEM and V1.stop_strings == ("</s>",)


def test_captions_of_stage_1_begin_without_bos(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers[QWEN.file]
    template, _ = choose_template(None, LLAMA, tokenizer, [tmp_path], plain=True, own_jinja=False)
    assert template.name == PLAIN.name
    assert processor(tokenizer, template).encode([{"role": "user", "content": ""}], 1).ids == [-200] * 4


# Folders


@pytest.mark.parametrize("name", ALL)
def test_the_converted_files_are_all_that_a_model_needs(
    tokenizers: dict[str, Tokenizer], tmp_path: Path, name: str
) -> None:
    processor(tokenizers[name], PHI).save(tmp_path)
    files = {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"}
    assert {file.name for file in tmp_path.iterdir()} == files
    again = Processor.from_folder(tmp_path).tokenizer
    for text in TEXTS:
        assert again.encode(text) == tokenizers[name].encode(text)
    assert (again.vocab_size, again.eos_id, again.pad_id) == (
        tokenizers[name].vocab_size,
        tokenizers[name].eos_id,
        tokenizers[name].pad_id,
    )


@pytest.mark.parametrize("name", ALL)
def test_other_programs_read_them_too(tokenizers: dict[str, Tokenizer], tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizers[name].save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert len(other) == tokenizers[name].vocab_size - (name == STABLELM.file)  # one id is nobody's
    assert other.eos_token_id == tokenizers[name].eos_id and other.pad_token_id == tokenizers[name].pad_id
    for text in TEXTS:
        assert other(text, add_special_tokens=False)["input_ids"] == tokenizers[name].encode(text)


def test_no_code_of_the_folder_is_run_or_passed_on(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path)
    marker = tmp_path / "was run"
    (folder / "tokenization_qwen.py").write_text(f"open({str(marker)!r}, 'w')\n")
    auto = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    config = {"tokenizer_class": "QWenTokenizer", "auto_map": auto, "unk_token": "<|extra_1|>", "bos_token": "x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = find_tokenizer([folder])
    assert not marker.exists()
    assert json.loads(tokenizer.files["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|extra_0|>",
        "unk_token": "<|extra_1|>",
    }


def test_a_tokenizer_json_wins(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path)
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer"):
        find_tokenizer([folder])


def test_names_come_from_either_file_and_bos_only_where_it_is_used(tmp_path: Path) -> None:
    folder = write_vocabulary(tmp_path)
    change(folder, "tokenizer_config.json", pad_token=None, add_bos_token=True)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<|endoftext|>"}}))
    tokenizer = find_tokenizer([folder])
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.bos_id


def test_the_first_folder_with_any_tokenizer_counts(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    base = write_ranks(tmp_path / "base", STABLELM.file)
    other = write_sentencepiece(tmp_path / "other")
    assert find_tokenizer([tmp_path / "own", base, other]).eos_id == len(ranks()) + 1
    assert find_tokenizer([tmp_path / "own", other, base]).files.keys() == {"tokenizer.model"}


# Damaged files


def change(folder: Path, file: str, **values: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    path = folder / file
    table = (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}) | values
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}), encoding="utf-8")


LINES = rank_lines(ranks())
LAST = len(ranks()) - 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the byte 0x00 is no token"),
        (LINES[:-8], r"line 828 is not a token in base64 and its rank|its 827 ranks are not|its 828 ranks are not"),
        (LINES + b"!!!! 828\n", "line 829 is not a token in base64 and its rank; fetch the file again"),
        (LINES + b"eHl6\n", "line 829 is not"),
        (LINES + b"eHl6 -1\n", "line 829 is not"),
        (LINES + b"eHl6 828 1\n", "line 829 is not"),
        (LINES + "eHl6 ٣\n".encode(), "line 829 is not"),
        (LINES + b"eHl6 " + b"9" * 5000, "line 829 is not"),
        (LINES + b" 828\n", "line 829 is not"),
        (LINES + base64.b64encode(b"x" * 513) + b" 828\n", "line 829 is not"),
        (LINES + b"IQ== 828\n", "line 829 repeats the token b'!'"),
        (LINES + b"eHl6cXo= 900\n", "its 829 ranks are not 0, 1, 2 and so on"),
        (LINES + b"eHl6cXo= 7\n", "its 829 ranks are not 0, 1, 2 and so on"),
        (LINES.replace(b"AA== ", b"AAA= ", 1), "the byte 0x00 is no token, so not all text can be read"),
        (LINES + base64.b64encode(b"<|im_end|>") + b" 828\n", r"<\|im_end\|> is a special token and cannot be"),
        (b"\0" * (33 << 20), "larger than 32 MB, so no rank file"),
    ],
)
def test_damaged_rank_files(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / QWEN.file).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        find_tokenizer([tmp_path])
    assert str(tmp_path / QWEN.file) in str(error.value) and "\n" not in str(error.value)


def test_line_ends_of_windows_and_empty_lines_are_read(tmp_path: Path) -> None:
    expected = converted_files(write_ranks(tmp_path))
    (tmp_path / QWEN.file).write_bytes(LINES.replace(b"\n", b"\r\n") + b"\r\n\n")
    assert converted_files(tmp_path) == expected


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_rank_file_that_is_cut_short_is_noticed(tmp_path: Path, file: str) -> None:
    tokens = ranks()
    (tmp_path / file).write_text(json.dumps({"eos_token_id": len(tokens)}))
    assert find_tokenizer([write_ranks(tmp_path)]).eos_id == len(tokens)
    tokens.popitem()
    with pytest.raises(UserError, match=rf"its 827 tokens put <\|endoftext\|> at 827, where {file} has 828 as"):
        find_tokenizer([write_ranks(tmp_path, tokens=tokens)])


@pytest.mark.parametrize("end", [2, len(ranks()) + 2, [len(ranks()) + 9], None])
def test_a_class_s_own_default_and_the_end_of_a_turn_are_no_sign_of_a_cut(tmp_path: Path, end: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": end}))
    assert find_tokenizer([write_ranks(tmp_path)]).eos_id == len(ranks())


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("tokenizer_config.json", {"tokenizer_class": None}, "tokenizer_class is missing; of vocab.json this version"),
        ("tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class is RobertaTokenizer"),
        ("tokenizer_config.json", {"tokenizer_class": 1}, "tokenizer_class is 1 and not a text"),
        ("tokenizer_config.json", {"add_prefix_space": True}, "add_prefix_space is true, which this version cannot"),
        ("tokenizer_config.json", {"eos_token": "<|end|>"}, r"eos_token is '<\|end\|>', which the tokenizer does not"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"900": {"content": "<x>"}}}, "without a gap"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<x>"}}}, "without a gap"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"900": {"content": "\t\t"}}},
            r"900 is '\\t\\t', which is 8",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"900": 1}},
            "added_tokens_decoder.900 is 1 and not a table",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": "<x>"}}}, "without a gap"),
        ("added_tokens.json", {"<x>": 900}, "added_tokens.json: added tokens must have the ids after"),
        ("added_tokens.json", {"<x>": "900"}, "<x> is '900' and not a whole number"),
        ("added_tokens.json", {"<x>": True}, "<x> is True and not a whole number"),
        ("added_tokens.json", {"a": 869}, "without a gap"),
        ("vocab.json", {"<x>": 831}, "its ids are not 0, 1, 2 and so on"),
        ("vocab.json", {"<x>": "830"}, "its ids are not 0, 1, 2 and so on"),
        ("vocab.json", {"Ġ": None}, "its ids are not 0, 1, 2 and so on"),
        ("vocab.json", {"": 830}, "'' is no spelling of bytes"),
        ("vocab.json", {"▁the": 830}, "'▁the' is no spelling of bytes, so this is no byte-level BPE"),
    ],
)
def test_damaged_vocabularies(tmp_path: Path, file: str, values: dict[str, Any], words: str) -> None:
    folder = write_vocabulary(tmp_path)
    change(folder, file, **values)
    with pytest.raises(UserError, match=words) as error:
        find_tokenizer([folder])
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_vocabulary_without_all_bytes(tmp_path: Path) -> None:
    folder = write_vocabulary(tmp_path)
    tokens = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokens["Ġ~~~"] = tokens.pop("Ġ")
    (folder / "vocab.json").write_text(json.dumps(tokens))
    with pytest.raises(UserError, match=r"vocab.json: 'Ġ' is missing, so not all text can be read"):
        find_tokenizer([folder])


@pytest.mark.parametrize("line", ["t", "t h e", "t 😀", "no such", "\udcff", " "])
def test_damaged_merges(tmp_path: Path, line: str) -> None:
    folder = write_vocabulary(tmp_path)
    file = folder / "merges.txt"
    file.write_bytes(file.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(UserError, match=r"merges.txt: line 575 is not two tokens that make a new one"):
        find_tokenizer([folder])


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"])
def test_files_of_any_size_are_not_read(tmp_path: Path, file: str) -> None:
    folder = write_vocabulary(tmp_path)
    with open(folder / file, "r+b") as opened:
        opened.truncate(33 << 20)
    with pytest.raises(UserError, match=rf"{file}: larger than 32 MB"):
        find_tokenizer([folder])


@pytest.mark.parametrize("content", ["[]", "{", '{"<x>": []}', '{"<x>": null}', '{"<x>": Infinity}'])
def test_added_tokens_of_a_sentencepiece_model_that_are_none(tmp_path: Path, content: str) -> None:
    (write_sentencepiece(tmp_path) / "added_tokens.json").write_text(content)
    with pytest.raises(UserError, match=r"added_tokens.json: not a table of tokens and their ids"):
        find_tokenizer([tmp_path])


SOURCES = ["vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", *FILES]


@pytest.mark.parametrize("file", SOURCES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_one_line_or_another_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    if file in FILES:
        write_ranks(folder, file)
    else:
        write_vocabulary(folder)
    content = bytearray((folder / file).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.sampled_from([0, 1, 1, 40]))] = data.draw(
            st.binary(max_size=2) | st.sampled_from([b'"', b"{}", b"null", b" ", b"\n", b"1e999", b"-1", b"[[["])
        )
    (folder / file).write_bytes(content)
    try:
        tokenizer = find_tokenizer([folder])
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
    else:
        assert tokenizer.decode(tokenizer.encode("What is this?")) == "What is this?"
