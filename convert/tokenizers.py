"""Tokenizers that come without a ``tokenizer.json``, written as one.

MoE-LLaVA's Phi-2 has the files of GPT-2's kind (``vocab.json``, ``merges.txt``, ``added_tokens.json``); its Qwen and
StableLM have tiktoken's (``qwen.tiktoken``, ``arcade100k.tiktoken``) and Python code beside them that gives the rest:
how text is cut into words, and the special tokens. What that code says is in tables here; nothing of it is run.

Sources: ``tokenization_qwen.py`` and ``tokenization_arcade100k.py`` in MoE-LLaVA (moellava/model/language_model), and
``CodeGenTokenizer``, ``GPT2Tokenizer`` and ``Qwen2Tokenizer`` of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gm_mlx.convert.rank_files import bounded, merges, read_ranks
from gm_mlx.convert.values import Values
from gm_mlx.errors import UserError
from gm_mlx.tokenizer import BYTE_OF_CHAR

CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}
# How Qwen and StableLM cut text into words: cl100k's pattern, but one digit a word where that has up to three.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
END, TURN_END = "<|endoftext|>", "<|im_end|>"


@dataclass(frozen=True)
class RankFamily:
    """A tokenizer whose ordinary tokens are in a rank file.

    Attributes:
        file: the file's name.
        special: the special tokens, whose ids follow each other.
        unused: ids between the last rank and the first special token.
        padding: what MoE-LLaVA pads with when the folder does not say.
    """

    file: str
    special: tuple[str, ...]
    unused: int
    padding: str


RANK_FAMILIES = (
    RankFamily(
        file="qwen.tiktoken",  # <|endoftext|> is 151643
        special=(END, "<|im_start|>", TURN_END, *(f"<|extra_{number}|>" for number in range(205))),
        unused=0,
        padding="<|extra_0|>",
    ),
    RankFamily(
        file="arcade100k.tiktoken",  # <|endoftext|> is 100257, as in cl100k, which leaves 100256 free
        special=(
            *(END, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
            *("<gh_stars>", "<filename>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
            *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
            *("<commit_before>", "<commit_msg>", "<commit_after>", "<reponame>", "<|endofprompt|>"),
            *("<|im_start|>", TURN_END, "<|pause|>", *(f"<|reg{number}|>" for number in range(8)), "<|extra0|>"),
        ),
        unused=1,
        padding="<|reg0|>",
    ),
)
# ``tokenizer_class`` of folders with vocab.json and merges.txt, and whether text is read as Qwen reads it or as GPT-2.
LIKE_QWEN = {"CodeGenTokenizer": False, "GPT2Tokenizer": False, "Qwen2Tokenizer": True}


def converted_files(folder: Path) -> dict[str, bytes]:
    """The content of ``tokenizer.json`` and ``tokenizer_config.json``, made of a folder's other tokenizer files.

    Both are new: of the folder's own ``tokenizer_config.json`` the names of tokens are kept, and nothing that would
    make another program run the folder's code.

    Returns:
        Content by file name; nothing if the folder has no such files.

    Raises:
        UserError: a file is damaged, or means a tokenizer that cannot be written.
    """
    family = next((each for each in RANK_FAMILIES if (folder / each.file).is_file()), None)
    if family is not None:
        names = {"eos": END, "pad": family.padding} | _names(folder)
        spec = _from_ranks(folder, family)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        names = {"eos": END} | _names(folder)
        spec = _from_vocabulary(folder, set(names.values()))
    else:
        return {}
    known = {token["content"] for token in spec["added_tokens"]}
    for key, name in names.items():
        if name not in known:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: {key}_token is {name!r}, which the tokenizer does not have; "
                "fetch the tokenizer's files again"
            )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{key}_token": name for key, name in names.items()}
    return {
        "tokenizer.json": json.dumps(spec, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _from_ranks(folder: Path, family: RankFamily) -> dict[str, Any]:
    file = folder / family.file
    ranks = read_ranks(file)
    special = {name: len(ranks) + family.unused + index for index, name in enumerate(family.special)}
    for name in ("config.json", "generation_config.json"):
        # Nothing in a rank file tells where it ends, and without its last lines all special tokens would be wrong.
        end = Values.read(folder / name).table.get("eos_token_id")
        if type(end) is int and end >= len(ranks) and end not in (special[END], special[TURN_END]):
            raise UserError(
                f"{file}: its {len(ranks)} tokens put {END} at {special[END]}, where {name} has {end} as eos_token_id; "
                "fetch the file again"
            )
    spelled = {_spelled(token): rank for token, rank in ranks.items()}
    if both := spelled.keys() & special.keys():
        raise UserError(f"{file}: {min(both)} is a special token and cannot be an ordinary one too; fetch it again")
    # The library counts added tokens on from the vocabulary's size. Those of its vocabulary keep their ids.
    return _spec(
        spelled | special,
        [f"{_spelled(left)} {_spelled(right)}" for left, right in merges(ranks)],
        [_added(name, token, special=True) for name, token in special.items()],
        like_qwen=True,
        whole_words=True,
    )


def _from_vocabulary(folder: Path, special: set[str]) -> dict[str, Any]:
    config = _table(folder / "tokenizer_config.json")
    kind = config.get("tokenizer_class", str, "missing").removesuffix("Fast")
    if kind not in LIKE_QWEN:
        raise config.error("tokenizer_class", f"is {kind}; of vocab.json this version converts {', '.join(LIKE_QWEN)}")
    config.refuse({"add_prefix_space": (None, False)})
    tokens = _vocabulary(folder / "vocab.json")
    return _spec(
        tokens,
        _merges(folder / "merges.txt", tokens),
        _added_tokens(folder, config, tokens, special),
        like_qwen=LIKE_QWEN[kind],
        whole_words=False,
    )


def _spec(
    tokens: Mapping[str, int], pairs: list[str], added: list[dict[str, Any]], *, like_qwen: bool, whole_words: bool
) -> dict[str, Any]:
    """The content of ``tokenizer.json``: byte-level BPE.

    Args:
        tokens: ids by spelling.
        pairs: merges, both spellings with a space between them.
        added: the entries for added tokens.
        like_qwen: text is normalized to NFC and cut by ``WORDS``; otherwise it is cut by GPT-2's pattern, which
            the library has built in.
        whole_words: a word that is a token becomes that token, whatever its merges give, as in tiktoken.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    words = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if like_qwen else None,
        "pre_tokenizer": words if like_qwen else {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_words,
            "vocab": tokens,
            "merges": pairs,
        },
    }


def _spelled(token: bytes) -> str:
    """A token as byte-level BPE writes it: a printable character for every byte."""
    return "".join([CHAR_OF_BYTE[byte] for byte in token])


def _vocabulary(file: Path) -> dict[str, int]:
    """The ids of ``vocab.json``: 0, 1, 2 and so on, with a token for every byte."""
    tokens = dict(_table(file).table)
    if not all(type(token) is int for token in tokens.values()) or sorted(tokens.values()) != list(range(len(tokens))):
        raise UserError(f"{file}: its ids are not 0, 1, 2 and so on; fetch the file again")
    strange = next((name for name in tokens if not name or not BYTE_OF_CHAR.keys() >= set(name)), None)
    if strange is not None:
        raise UserError(f"{file}: {strange!r} is no spelling of bytes, so this is no byte-level BPE; fetch it again")
    if missing := BYTE_OF_CHAR.keys() - tokens.keys():
        raise UserError(f"{file}: {min(missing)!r} is missing, so not all text can be read; fetch the file again")
    return tokens


def _merges(file: Path, tokens: Mapping[str, int]) -> list[str]:
    lines = bounded(file).read_bytes().decode("utf-8", errors="replace").split("\n")
    pairs: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not {*parts, "".join(parts)} <= tokens.keys() or line in pairs:
            raise UserError(f"{file}: line {number} is not two tokens that make a new one; fetch the file again")
        pairs[line] = None
    return list(pairs)


def _added_tokens(folder: Path, config: Values, tokens: Mapping[str, int], special: set[str]) -> list[dict[str, Any]]:
    """Tokens beside the vocabulary, and those of it that are special, in the order of their ids."""
    older, newer = _table(folder / "added_tokens.json"), config.inner("added_tokens_decoder")
    found = {name: _added(name, tokens[name], special=True) for name in special & tokens.keys()}
    found |= {name: _added(name, older.get(name, int, -1), special=name in special) for name in older.table}
    for key in newer.table:
        entry = newer.inner(key)
        name = entry.get("content", str, "")
        token = _added(name, int(key) if key.isdecimal() else -1, special=entry.get("special", bool, name in special))
        if found.get(name, token)["id"] != token["id"]:
            raise newer.error(
                key, f"is {name!r}, which is {found[name]['id']} in {older.file.name}; correct one of them"
            )
        found[name] = token | {flag: entry.get(flag, bool, False) for flag in STRIPS}
    added = sorted(found.values(), key=lambda token: token["id"])
    beside = [token["id"] for token in added if token["content"] not in tokens]
    moved = any(tokens.get(token["content"], token["id"]) != token["id"] for token in added)
    # The library numbers added tokens by itself, one after the other.
    if moved or beside != list(range(len(tokens), len(tokens) + len(beside))):
        raise UserError(
            f"{older.file if older.table else config.file}: added tokens must have the ids after the vocabulary's "
            f"{len(tokens)}, without a gap; fetch the tokenizer's files again"
        )
    return added


STRIPS = ("single_word", "lstrip", "rstrip")


def _added(name: str, token: int, *, special: bool) -> dict[str, Any]:
    """The entry of an added token; transformers normalizes text before it looks for those that are not special."""
    flags = dict.fromkeys(STRIPS, False)
    return {"id": token, "content": name, **flags, "normalized": not special, "special": special}


def _names(folder: Path) -> dict[str, str]:
    """The names of special tokens, from the two files where transformers has kept them.

    BOS is left out unless the tokenizer says that it puts one before a text: MoE-LLaVA's prompts then have none.
    """
    names = {}
    config = _table(folder / "tokenizer_config.json")
    for table in (_table(folder / "special_tokens_map.json").table, config.table):
        for key in ("bos", "eos", "pad", "unk"):
            value = table.get(f"{key}_token")
            name = value.get("content") if isinstance(value, dict) else value
            if isinstance(name, str) and name:
                names[key] = name
    if not config.get("add_bos_token", bool, False):
        names.pop("bos", None)
    return names


def _table(file: Path) -> Values:
    """A JSON object; an empty one if there is no such file."""
    return Values.read(bounded(file))
