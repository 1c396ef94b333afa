"""What must be true of GGUF files before llama.cpp gets them, so that a wrong file is one line and not a crash.

llama.cpp reports much of what can be wrong with a file. But numbers out of range, values of another type than it asks
for and lists of another length run into its assertions, which abort the whole process. The rules below are those that
it was seen to abort at, and the mistakes that people make: a vision file given as the model, half of a split file, the
mmproj of another model. What they cannot know is found by trying a file in another process (``gm_mlx.llama.trial``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.gguf_file import AGAIN, GGUFHeader, read_header

MAX_LAYERS, MAX_EXPERTS = 512, 1024  # llama.cpp's own
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
# Keys of an architecture, behind its name: what they may be, and whether they must be there.
LENGTHS = {
    "context_length": (1, 1 << 31, True),
    "embedding_length": (1, 1 << 20, True),
    "block_count": (1, MAX_LAYERS, True),
    "vocab_size": (1, 1 << 24, False),
    "expert_count": (0, MAX_EXPERTS, False),
    "rope.dimension_count": (0, 1 << 16, False),
    "attention.key_length": (1, 1 << 16, False),
    "attention.value_length": (1, 1 << 16, False),
}
# The same for keys that may have one value for all layers or a list.
PER_LAYER = {
    "feed_forward_length": (0, 1 << 24),
    "attention.head_count": (0, 1 << 16),
    "attention.head_count_kv": (0, 1 << 16),
    "expert_used_count": (0, MAX_EXPERTS),
    "expert_feed_forward_length": (0, 1 << 24),
    "attention.sliding_window_pattern": (0, MAX_LAYERS),
}
SLIDING = ("gemma4", "step35")  # llama.cpp stops at an assertion if no layer of these has a sliding window
TOKEN_IDS = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask")  # as llama.cpp spells them
VISION = "clip.vision."
# Keys of a vision file and their kinds; llama.cpp asks for exactly these and aborts at others.
VISION_KEYS = {
    f"{VISION}{name}": "uint32"
    for name in (
        "image_size", "patch_size", "embedding_length", "feed_forward_length", "projection_dim", "block_count",
        "attention.head_count",
    )
} | {f"{VISION}attention.layer_norm_epsilon": "float32"}  # fmt: skip
MAY_BE_ZERO = (f"{VISION}projection_dim", f"{VISION}feed_forward_length")
VISION_OPTIONS = {
    "clip.use_gelu": "bool", "clip.use_silu": "bool", "clip.has_audio_encoder": "bool",
    "clip.projector_type": "string", f"{VISION}projector_type": "string",
    f"{VISION}image_mean": "array of float32", f"{VISION}image_std": "array of float32",
    f"{VISION}feature_layer": "array of int32", f"{VISION}image_grid_pinpoints": "array of int32",
}  # fmt: skip
# Tensors that llama.cpp takes for granted where the projector is LLaVA's.
LLAVA_TENSORS = ("v.patch_embd.weight", "v.position_embd.weight", "mm.0.weight", "mm.0.bias")
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def check_text_model(path: str | Path) -> GGUFHeader:
    """Read the header of a text model and check it.

    Raises:
        UserError: the file is damaged or none of a text model. The message names the key and the remedy.
    """
    header = read_header(path)
    kind, arch = header.metadata.get("general.type"), _need(header, "general.architecture", "string")
    if arch == "clip" or kind == "mmproj":
        raise UserError(f"{path}: a vision model; name the text model with --model, and this one with --mmproj")
    if kind in ("adapter", "imatrix") or arch == "imatrix":
        raise UserError(f"{path}: no model but a file of type {kind or arch!r}; name the model that it is for")
    _check_parts(header)
    _check_shape(header, arch)
    _check_tokens(header)
    template = "tokenizer.chat_template"
    if header.kinds.get(template, "string") != "string":
        _fail(header, template, f"is {header.kinds[template]} and not a text")
    for name, form in (("gm.processor", "string"), ("gm.pair", "string"), ("gm.version", "uint32")):
        if header.kinds.get(name, form) != form:
            _fail(header, name, f"is {header.kinds[name]} and not {form}")
    return header


def check_mmproj(path: str | Path) -> GGUFHeader:
    """Read the header of a vision file (mmproj) and check it.

    Raises:
        UserError: the file is damaged or none of vision. The message names the key and the remedy.
    """
    header = read_header(path)
    arch = _need(header, "general.architecture", "string")
    if arch != "clip":
        raise UserError(f"{path}: no vision model but one of type {arch!r}; name the mmproj file of the model")
    if not header.metadata.get("clip.has_vision_encoder", False):
        raise UserError(f"{path}: reads no images; name the mmproj file of a vision model")
    _need(header, "clip.has_vision_encoder", "bool")
    for key, kind in VISION_KEYS.items():
        value = _need(header, key, kind)
        if kind == "uint32" and (value >= 1 << 20 or (not value and key not in MAY_BE_ZERO)):
            _fail(header, key, f"is {value}")
    for key, kind in VISION_OPTIONS.items():
        if header.kinds.get(key, kind) != kind:
            _fail(header, key, f"is {header.kinds[key]} and not {kind}")
    size, patch = header.metadata[f"{VISION}image_size"], header.metadata[f"{VISION}patch_size"]
    if not patch <= size <= 8192:
        _fail(header, f"{VISION}image_size", f"is {size} with patches of {patch}")
    if header.metadata.get("clip.projector_type") == "mlp":
        for name in LLAVA_TENSORS:
            if name not in header.tensors:
                raise UserError(f"{path}: tensor {name!r} is missing; {AGAIN} or convert the model again")
        width, kernel = header.metadata[f"{VISION}embedding_length"], header.tensors[LLAVA_TENSORS[0]].shape
        if kernel[0] != width:
            _fail(header, f"{VISION}embedding_length", f"is {width}, and patches are embedded into {kernel[0]}")
    return header


def check_pair(text: GGUFHeader, mmproj: GGUFHeader) -> None:
    """Refuse a vision file of another model; raises ``UserError``."""
    arch = text.metadata["general.architecture"]
    mine, theirs = text.metadata[f"{arch}.embedding_length"], mmproj.metadata[f"{VISION}projection_dim"]
    pairs = [text.metadata.get("gm.pair"), mmproj.metadata.get("gm.pair")]
    other = pairs[0] != pairs[1] and None not in pairs
    if other or ("gm.pair" in text.metadata and mine != theirs):
        reason = (
            "it was written with another model" if other else f"its features have {theirs} values, and {mine} are due"
        )
        raise UserError(f"{mmproj.path}: does not belong to {text.path} ({reason}); name the mmproj file that does")


def _check_shape(header: GGUFHeader, arch: str) -> None:
    layers = _number(header, f"{arch}.block_count", *LENGTHS["block_count"])
    for name, (low, high, needed) in LENGTHS.items():
        _number(header, f"{arch}.{name}", low, high, needed)
    for name, (low, high) in PER_LAYER.items():
        key = f"{arch}.{name}"
        value = header.metadata.get(key)
        if value is None:
            continue
        if isinstance(value, list) and len(value) != layers and "pattern" not in name:
            _fail(header, key, f"has {len(value)} values for {layers} layers")
        if not all(
            isinstance(item, int) and low <= item <= high for item in (value if isinstance(value, list) else [value])
        ):
            _fail(header, key, f"is {_short(value)}")
    experts = header.metadata.get(f"{arch}.expert_count", 0)
    used = max(_list(header.metadata.get(f"{arch}.expert_used_count", 0)))
    if used > experts or (experts and not used):
        _fail(header, f"{arch}.expert_used_count", f"is {used} of {experts} experts")
    scaling = header.metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling not in ROPE_SCALINGS:
        _fail(header, f"{arch}.rope.scaling.type", f"is {scaling!r}")
    if arch in SLIDING:
        key = f"{arch}.attention.sliding_window_pattern"
        pattern = _list(header.metadata.get(key, []))
        if len(pattern) < (layers or 0) or not any(pattern):
            _fail(header, key, f"names no sliding-window layer among {layers}, and llama.cpp needs one")


def _check_tokens(header: GGUFHeader) -> None:
    tokens = _need(header, "tokenizer.ggml.tokens", "array of string")
    model = _need(header, "tokenizer.ggml.model", "string")
    if not tokens or model in ("none", "no_vocab"):
        raise UserError(f"{header.path}: has no vocabulary, so it cannot read text; name another file")
    # Texts that are not Unicode all look the same here, so only others can be told to be there twice.
    known = [token for token in tokens if token and "\ufffd" not in token]
    if len(set(known)) != len(known):
        _fail(header, "tokenizer.ggml.tokens", "has the same token twice")
    lists = {"scores": ("float32", "int32"), "token_type": ("int32",)}
    for name, kinds in lists.items():
        key = f"tokenizer.ggml.{name}"
        if key not in header.kinds:
            continue
        if header.kinds[key] not in [f"array of {kind}" for kind in kinds]:
            _fail(header, key, f"is {header.kinds[key]}")
        if len(header.metadata[key]) != len(tokens):
            _fail(header, key, f"has {len(header.metadata[key])} values for {len(tokens)} tokens")
    for name in TOKEN_IDS:
        key = f"tokenizer.ggml.{name}_token_id"
        value = header.metadata.get(key, 0)
        if type(value) is not int or not (0 <= value < len(tokens) or value >= (1 << 32) - 2):
            _fail(header, key, f"is {_short(value)}, and there are {len(tokens)} tokens")
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if header.kinds.get(f"tokenizer.ggml.{key}", "bool") != "bool":
            _fail(header, f"tokenizer.ggml.{key}", "is neither true nor false")
    rows = header.tensors.get("token_embd.weight")
    if rows is not None and len(rows.shape) == 2 and rows.shape[0] != len(tokens):
        _fail(header, "tokenizer.ggml.tokens", f"has {len(tokens)} tokens for {rows.shape[0]} embeddings")


def _check_parts(header: GGUFHeader) -> None:
    """Of a model in several files, the first is named and the others are read by llama.cpp; they must be there."""
    count = header.metadata.get("split.count", 0)
    if type(count) is not int or not 0 <= count < 1 << 16:
        _fail(header, "split.count", f"is {_short(count)}")
    if count < 2:
        return
    name = SPLIT_NAME.fullmatch(header.path.name)
    if header.metadata.get("split.no", 0) or not name or int(name[2]) != 1 or int(name[3]) != count:
        raise UserError(
            f"{header.path}: part of a model in {count} files; name the first, which ends in -00001-of-{count:05}.gguf"
        )
    for number in range(2, count + 1):
        read_header(header.path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf"))


def _need(header: GGUFHeader, key: str, kind: str) -> Any:
    if key not in header.metadata:
        raise UserError(f"{header.path}: the key {key} is missing; {AGAIN} or convert the model again")
    if header.kinds[key] != kind:
        _fail(header, key, f"is {header.kinds[key]} and not {kind}")
    return header.metadata[key]


def _number(header: GGUFHeader, key: str, low: int, high: int, needed: bool) -> int | None:
    value = _need(header, key, "uint32") if needed else header.metadata.get(key)
    if value is not None and (type(value) is not int or not low <= value <= high):
        _fail(header, key, f"is {_short(value)}")
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) and value else [value]


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def _fail(header: GGUFHeader, key: str, what: str) -> None:
    raise UserError(f"{header.path}: {key} {what}; {AGAIN} or convert the model again")


def part_paths(path: Path) -> Iterable[Path]:
    """All files of a model: the file itself, or all parts of one that is split."""
    name = SPLIT_NAME.fullmatch(path.name)
    if name is None:
        return [path]
    return [path.with_name(f"{name[1]}-{number:05}-of-{name[3]}.gguf") for number in range(1, int(name[3]) + 1)]
