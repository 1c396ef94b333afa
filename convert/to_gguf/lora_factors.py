"""A LoRA adapter's factors as llama.cpp adds them to the matrices of a GGUF file while it runs.

llama.cpp computes W x + scale * alpha / r * B (A x): the scale is the user's, alpha the file's, and r the rank of this
pair (``llama_adapter_lora_weight::get_scale``). The factors of ``blk.0.attn_q.weight`` are called
``blk.0.attn_q.weight.lora_a`` [r, in] and ``.lora_b`` [out, r]. So an adapter must be told in the terms of its base's
file (see ``text``), and what the formula has no place for goes into the factors.

**Places.** Factors go where their matrix went: layer i of a re-expressed model is ``blk.{i+1}``.

**Strength.** With ``alpha_pattern`` or rank-stabilised LoRA a module's strength is not the file's alpha / r. B is
multiplied by the ratio.

**Values.** W_v is 16 times as large in a ``gemma4``, so B is too.

**Rotary positions.** Where rows of W_q and W_k have changed places (``llama``), those of B do.

**Routers.** In a ``gemma4`` their columns hold the weights w of the norm before them, and (W + B A) diag(w) is
W diag(w) + B (A diag(w)): the columns of A are multiplied by w.

**Experts.** Each has factors of its own, stacked like the matrices: [E, r, in] and [E, out, r], with the largest rank.
Zeros fill up the others and stand for an expert without LoRA.

**Embeddings.** llama.cpp looks up rows of A, so A is stored as [V, r]. Where the embedding is the head as well it takes
the same factors for both, the wrong way round for one of them, and breaks down; that is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gm_mlx.config import TextConfig
from gm_mlx.convert.checkpoint import Checkpoint
from gm_mlx.convert.to_gguf.blocks import EMBEDDING, HEAD, LAYERS, expert_width
from gm_mlx.convert.to_gguf.gemma4 import VALUE_FACTOR
from gm_mlx.convert.to_gguf.native import NATIVES, neighbours
from gm_mlx.convert.to_gguf.pieces import GGUFModel, Piece, changed
from gm_mlx.convert.to_gguf.text import find_architecture, matrix_names
from gm_mlx.errors import UserError
from gm_mlx.lora.pairs import OTHER_BASE, Pair, pairs_by_path, stacked, times
from gm_mlx.lora.peft import Factors, lora_alone, unwrap
from gm_mlx.tensors import Tensor

MERGE = (
    "merge the adapter instead: gm-mlx convert ADAPTER --base BASE --to gguf -o OUT, or where the base is a model of "
    "gm-mlx, gm-mlx fuse MODEL ADAPTER -o OUT"
)

TIED = f"the embedding is the head too, and there llama.cpp cannot have LoRA; {MERGE}"
# Our paths, and why llama.cpp puts no LoRA on them in any model or in this one.
NO_TARGETS = {
    r"vision_tower\..*": f"is of the vision tower, and llama.cpp has LoRA for the text model only; {MERGE}",
    r"multi_modal_projector\..*": f"is of the projector, and llama.cpp has LoRA for the text model only; {MERGE}",
    re.escape(EMBEDDING.removesuffix(".weight")): TIED,
    re.escape(HEAD.removesuffix(".weight")): TIED,
    r".*\.mlp\.((gate|up|down)_proj|fc1|fc2)": (
        "is of a dense network where the base has experts; merge the adapter into the dense model before experts are "
        "made of it: gm-mlx convert ADAPTER --base BASE --upcycle 4x2 --to gguf -o OUT"
    ),
    r".*\.mlp\.(switch_mlp\..*|gate)": f"is of experts where the base has a dense network; {OTHER_BASE}",
    r".*": f"the base has no such matrix; {OTHER_BASE}",
}


@dataclass(frozen=True)
class Base:
    """What must be known of the model that an adapter is for.

    Attributes:
        text: the decoder's config.
        norms: for each sparse layer: what the norm before the router multiplies by, float32 [D].
    """

    text: TextConfig
    norms: Mapping[int, Tensor]


@dataclass(frozen=True)
class LoraTarget:
    """A matrix of a GGUF file that llama.cpp can have LoRA for.

    Attributes:
        name: its name in the file.
        shape: [out, in], of stacked experts [E, out, in]; of an embedding [D, V], as its factors multiply.
        factor: how many times as large as the model's own it is.
        norm: of a router: its layer, whose norm's weights are in its columns.
        head_dim: of W_q and W_k whose rows have changed places: the size of a head; see ``native``.
    """

    name: str
    shape: tuple[int, ...]
    factor: float = 1.0
    norm: int | None = None
    head_dim: int | None = None


def lora_model(adapter: Checkpoint, base: Base) -> GGUFModel:
    """An adapter in the terms of its base's GGUF file.

    Args:
        adapter: what ``open_checkpoint`` found in its folder.
        base: the model that the file is of.

    Raises:
        UserError: the adapter is not LoRA alone, does not fit the base, or has LoRA where llama.cpp cannot.
    """
    arch = find_architecture(base.text)
    if arch.centred:
        raise UserError(
            f"{adapter.folder}: is for a model that {arch.name!r} re-expresses by changing matrices; {MERGE}"
        )
    factors = _factors(adapter)
    targets = lora_targets(base.text)
    shapes = {path: target.shape for path, target in targets.items()}
    pairs = pairs_by_path(factors, adapter.adapter_config, shapes, lambda path: _why_not(path, base.text))
    # llama.cpp takes zero for "not given".
    alpha = float(adapter.adapter_config["lora_alpha"]) or 1.0
    pieces = []
    for path, target in targets.items():
        if path in pairs:
            down, up = _joined(pairs[path], target, alpha, base)
            stored = "F32" if "ffn_gate_inp" in target.name else None  # as the router itself
            pieces += [Piece(f"{target.name}.lora_a", down, stored), Piece(f"{target.name}.lora_b", up, stored)]
    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
    return GGUFModel(arch.name, metadata, pieces)


def lora_targets(text: TextConfig) -> dict[str, LoraTarget]:
    """All that llama.cpp can have LoRA for, by our path of the module."""
    size, moe = text.hidden_size, text.moe
    queries, keys = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj": (queries, size),
        "k_proj": (keys, size),
        "v_proj": (keys, size),
        "o_proj": (size, queries),
        **_network(size, text.intermediate_size),
    }
    arch, experts = find_architecture(text).name, {}
    gemma4 = arch == "gemma4"
    if moe is not None:
        experts = {name: (moe.num_experts, *shape) for name, shape in _network(size, expert_width(text)).items()}
    targets = {}
    for path, name in matrix_names(text).items():
        *_, part, last = path.split(".")
        shape = experts[last] if part == "switch_mlp" else shapes[last]
        factor = VALUE_FACTOR if gemma4 and last == "v_proj" else 1.0
        turned = arch in NATIVES and NATIVES[arch].neighbours and last in ("q_proj", "k_proj")
        targets[path] = LoraTarget(name, shape, factor, head_dim=text.head_dim if turned else None)
    for i in text.sparse_layers:
        assert moe is not None
        name, norm = f"blk.{i + gemma4}.ffn_gate_inp.weight", i if gemma4 else None
        targets[f"{LAYERS}.{i}.mlp.gate"] = LoraTarget(name, (moe.num_experts, size), norm=norm)
    if not text.tie_word_embeddings:
        targets[EMBEDDING.removesuffix(".weight")] = LoraTarget("token_embd.weight", (size, text.vocab_size))
        targets[HEAD.removesuffix(".weight")] = LoraTarget("output.weight", (text.vocab_size, size))
    return targets


def _network(size: int, width: int) -> dict[str, tuple[int, ...]]:
    down_and_up = {"down_proj": (size, width), "up_proj": (width, size)}
    return {**down_and_up, "gate_proj": (width, size), "fc1": (width, size), "fc2": (size, width)}


def _factors(adapter: Checkpoint) -> dict[str, Factors]:
    """The factors by module, of an adapter that is nothing else."""
    if adapter.tensors:
        raise UserError(f"{adapter.folder}: holds a whole model and no adapter; convert it with --to gguf")
    beside = unwrap(adapter.non_lora) | adapter.projector
    factors = lora_alone(adapter.folder, adapter.adapter, adapter.adapter_config, beside, MERGE)
    for found in factors.values():
        if "magnitude_vector" in found.tensors:
            raise UserError(f"tensor {found.name!r}: DoRA is more than a sum of matrices; {MERGE}")
    return factors


def _why_not(path: str, text: TextConfig) -> str:
    """The reason and remedy for a module that is no target."""
    layer = re.match(re.escape(LAYERS) + r"\.(\d+)\.", path)
    if layer and int(layer[1]) >= text.num_hidden_layers:
        return f"the base has {text.num_hidden_layers} layers; {OTHER_BASE}"
    return next(reason for pattern, reason in NO_TARGETS.items() if re.fullmatch(pattern, path))


def _joined(pairs: Mapping[int, Pair], target: LoraTarget, alpha: float, base: Base) -> tuple[Tensor, Tensor]:
    """The factors of a matrix as they are stored, float32."""
    rank = max(pair.rank for pair in pairs.values())
    downs = {i: pair.down for i, pair in pairs.items()}
    ups = {i: times(pair.up, pair.strength * target.factor * rank / alpha) for i, pair in pairs.items()}
    if len(target.shape) == 3:
        experts, rows, columns = target.shape
        return stacked(downs, (experts, rank, columns)), stacked(ups, (experts, rows, rank))
    down, up = downs[0], ups[0]
    if target.name == "token_embd.weight":
        down = Tensor("F32", down.shape[::-1], lambda: downs[0].read().T)  # [V, r]
    if target.head_dim is not None:
        up = neighbours(up, target.head_dim)
    if target.norm is not None:
        norm = base.norms[target.norm]
        down = changed(down, lambda a: a * norm.read())
    return down, up
