"""What a model costs to run: arithmetic and memory for a question about images, from its inventory.

FLOPs count a multiply-add as two and leave out what is not a matrix product (norms, activations, softmax, rotary
positions): a few per mille. Attention counts the pairs that are attended to: all of them in the tower, each position
and those before it in the decoder. The head is computed for one row of the prompt and for each generated token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.inventory import COMPONENTS, Layer, model_layers
from gm_mlx.safetensors_header import DTYPE_BYTES

if TYPE_CHECKING:
    from gm_mlx.tensors import Tensor

HALF, SINGLE = 2, 4  # bytes of a number
DTYPES = {"float16": HALF, "bfloat16": HALF, "float32": SINGLE}
KV_STEP = 256  # positions by which mlx-lm's KVCache grows
CHUNK = 512  # positions that MLXEngine computes at a time
ANSWER = 512  # the longest answer by default
# Python, MLX with its kernels, the tokenizer, and buffers that MLX keeps for reuse. An app without Python needs less.
RUNTIME_BYTES = 300 << 20
# MLX encodes kernels ahead of the one that runs, and what they write stays until they are done.
IN_FLIGHT = 1.5


@dataclass(frozen=True)
class Share:
    """One component of a model: parameters in all, parameters that a token uses, and bytes."""

    total: int
    active: int
    bytes: int


@dataclass(frozen=True)
class Flops:
    """FLOPs of a question: its stages, their sum, and those of one generated token after it."""

    tower: int
    projector: int
    decoder: int
    head: int
    token: int

    @property
    def prefill(self) -> int:
        return self.tower + self.projector + self.decoder + self.head


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak: what is resident, and the largest set of temporaries of a prefill chunk."""

    weights: int
    kv_cache: int
    activations: int
    runtime: int

    @property
    def peak(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.runtime


@dataclass(frozen=True)
class Footprint:
    """What a model costs.

    Attributes:
        components: a ``Share`` for each of ``inventory.COMPONENTS``.
        flops: arithmetic of the question.
        kv_bytes_per_token: bytes of keys and values of one position.
        memory: peak memory with a KV cache of ``context`` positions.
        images: images of the question.
        text_tokens: its other tokens.
        prompt_tokens: positions of the question.
        context: positions of question and answer.
    """

    components: dict[str, Share]
    flops: Flops
    kv_bytes_per_token: int
    memory: Memory
    images: int
    text_tokens: int
    prompt_tokens: int
    context: int

    @property
    def total(self) -> int:
        return sum(share.total for share in self.components.values())

    @property
    def active(self) -> int:
        return sum(share.active for share in self.components.values())

    @property
    def bytes(self) -> int:
        return sum(share.bytes for share in self.components.values())

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON holds them."""
        return {
            "parameters": {"total": self.total, "active": self.active},
            "bytes": self.bytes,
            "bits_per_weight": 8 * self.bytes / self.total,
            "components": {name: asdict(share) for name, share in self.components.items()},
            "images": self.images,
            "text_tokens": self.text_tokens,
            "prompt_tokens": self.prompt_tokens,
            "flops": {**asdict(self.flops), "prefill": self.flops.prefill},
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "context": self.context,
            "memory": {**asdict(self.memory), "peak": self.memory.peak},
        }


def footprint(
    config: ModelConfig,
    *,
    stored: Mapping[str, Tensor] | None = None,
    quantization: Mapping[str, Any] | None = None,
    dtype: str = "float16",
    images: int = 1,
    text_tokens: int = 64,
    context: int | None = None,
) -> Footprint:
    """Count what a model costs.

    Args:
        config: the model.
        stored: the tensors of its folder (``folder.read_model_folder``): they tell the true sizes, and the two
            arguments below are not used.
        quantization: mlx-lm's table (see ``weights.apply_quantization``) for a model that is not there yet.
        dtype: "float16", "bfloat16" or "float32" for what the table leaves out.
        images: images of the question.
        text_tokens: its other tokens, those of the chat template included.
        context: positions of question and answer together; 512 for the answer by default.

    Raises:
        UserError: a number is out of range.
    """
    _check_counts(config, images, text_tokens, context)
    prompt = images * config.num_image_tokens + text_tokens
    if context is None:
        context = min(prompt + ANSWER, config.text_config.max_position_embeddings)
    layers = model_layers(config)
    sizes = planned_bytes(layers, quantization, dtype) if stored is None else stored_bytes(layers, stored)
    number = DTYPES[dtype] if stored is None else DTYPE_BYTES[stored["language_model.model.norm.weight"].dtype]
    components = {}
    for name in COMPONENTS:
        own = [layer for layer in layers if layer.component == name]
        components[name] = Share(
            sum(layer.total for layer in own),
            sum(layer.active for layer in own),
            sum(sizes[layer.path] for layer in own),
        )
    per_token = kv_bytes_per_token(config, number)
    memory = Memory(
        weights=sum(sizes.values()),
        kv_cache=-(-context // KV_STEP) * KV_STEP * per_token,
        activations=activation_bytes(config, images, prompt, context, number),
        runtime=RUNTIME_BYTES,
    )
    flops = count_flops(config, layers, images, prompt)
    return Footprint(components, flops, per_token, memory, images, text_tokens, prompt, context)


def planned_bytes(layers: list[Layer], table: Mapping[str, Any] | None, dtype: str = "float16") -> dict[str, int]:
    """Bytes of each layer by path, if it is stored in ``dtype`` or quantized as a table of mlx-lm's says."""
    defaults = {key: value for key, value in (table or {}).items() if key in ("group_size", "bits", "mode")}
    sizes = {}
    for layer in layers:
        entry = (table or {}).get(layer.path, bool(defaults)) if layer.quantizable else False
        # Routers are float32 in a file and in memory: see gm_mlx.weights.
        number = SINGLE if layer.path.endswith(".mlp.gate") else DTYPES[dtype]
        if entry is False:
            sizes[layer.path] = layer.total * number
            continue
        values = {"mode": "affine", **defaults, **(entry if isinstance(entry, Mapping) else {})}
        weights = prod(layer.arrays["weight"])
        # In affine mode a group has a scale and a bias of the layer's dtype, in the others a scale of one byte.
        group_bytes = 2 * number if values["mode"] == "affine" else 1
        packed = weights * values["bits"] // 8 + weights // values["group_size"] * group_bytes
        sizes[layer.path] = packed + (layer.total - weights) * number
    return sizes


def stored_bytes(layers: list[Layer], stored: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of each layer by path, from the tensors of a model folder (``folder.read_model_folder``)."""
    sizes = {layer.path: 0 for layer in layers}
    for name, tensor in stored.items():
        sizes[name.rpartition(".")[0]] += prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
    return sizes


def kv_bytes_per_token(config: ModelConfig, number: int = HALF) -> int:
    """Bytes of keys and values of one position, with ``number`` bytes for a number."""
    text = config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * number


def count_flops(config: ModelConfig, layers: list[Layer], images: int, prompt: int) -> Flops:
    """FLOPs of a prompt of ``prompt`` positions, ``images`` images among them."""
    vision, text = config.vision_config, config.text_config
    positions = vision.num_patches + vision.is_clip
    tower = projector = decoder = 0
    for layer in layers:
        if layer.component == "tower":
            tower += layer.flops * (vision.num_patches if layer.path.endswith("patch_embedding") else positions)
        elif layer.component == "projector":
            projector += layer.flops * (layer.per_image or config.num_image_features)
        else:
            decoder += layer.flops
    # Each attended pair costs two products of a head's width: query by key, weight by value.
    tower += config.num_vision_layers_used * 4 * vision.hidden_size * positions**2
    pair = text.num_hidden_layers * 4 * text.num_attention_heads * text.head_dim
    head = 2 * text.vocab_size * text.hidden_size
    return Flops(
        tower=images * tower,
        projector=images * projector,
        decoder=prompt * decoder + pair * prompt * (prompt + 1) // 2,
        head=head,
        token=decoder + pair * (prompt + 1) + head,
    )


def activation_bytes(config: ModelConfig, images: int, prompt: int, context: int, number: int = HALF) -> int:
    """Estimate of the largest set of temporaries that is in memory at once.

    The prompt's embeddings and image features are there all the time. Beside them, the widest of these moments counts,
    times ``IN_FLIGHT``: attention and FFN of the tower over one image, and of the decoder over one chunk. Attention
    has its queries, keys, values, scores and probabilities; MLX has fused kernels that never store the scores, but not
    for Gemma's heads of 256. A sparse FFN has a copy of its input and three arrays of the experts' width for each
    expert that a position goes to.
    """
    vision, text = config.vision_config, config.text_config
    positions = vision.num_patches + vision.is_clip
    size, chunk = text.hidden_size, min(CHUNK, prompt)
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    moments = [
        chunk * (3 * size + 2 * queries + 2 * keys + 2 * text.num_attention_heads * context),
        chunk * (4 * size + 3 * text.intermediate_size),
        text.vocab_size,
    ]
    if text.sparse_layers and text.moe and text.moe.kind == "evf":
        moments.append(chunk * (6 * size + 6 * text.intermediate_size))  # both networks
    elif text.sparse_layers and (moe := text.moe):
        moments.append(chunk * (3 * size + moe.top_k * (size + 3 * (moe.expert_size or text.intermediate_size))))
    if images:
        moments += [
            positions * (6 * vision.hidden_size + 2 * vision.num_attention_heads * positions),
            positions * (3 * vision.hidden_size + 2 * vision.intermediate_size),
        ]
    return number * (prompt * size + images * config.num_image_tokens * size) + int(IN_FLIGHT * number * max(moments))


def _check_counts(config: ModelConfig, images: int, text_tokens: int, context: int | None) -> None:
    """Refuse a question that cannot be asked."""
    for name, value, least in (("images", images, 0), ("tokens", text_tokens, 1)):
        if value < least:
            raise UserError(f"{name}: {value} is not {least} or more")
    prompt, limit = images * config.num_image_tokens + text_tokens, config.text_config.max_position_embeddings
    if prompt > limit or (context or 0) > limit:
        raise UserError(f"context: the model has {limit} positions, and {max(prompt, context or 0)} are asked for")
    if context is not None and context < prompt:
        raise UserError(f"context: {context} is less than the prompt's {prompt} tokens; give a larger one")
