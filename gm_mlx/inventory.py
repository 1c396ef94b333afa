"""The inventory of a model: every layer that ``gm_mlx.model.Model`` has, with its shapes, counted without an array.

Plain integers from the config, so that asking what a 7B model is made of costs a millisecond and no memory.

A parameter is active when a token's answer depends on it: with k of E experts per token, k/E of the experts' weights
and all of everything else, embeddings included (MoE-LLaVA, eq. 12).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gm_mlx.config import LDPV2_GRID, ModelConfig, TextConfig, squeezed_size

COMPONENTS = ("tower", "projector", "embeddings", "attention", "dense_ffn", "experts", "routers", "norms")


@dataclass(frozen=True)
class Layer:
    """One layer of the model, or a few loose arrays of one.

    Attributes:
        path: its path in the model, such as "language_model.model.layers.0.self_attn.q_proj".
        component: one of ``COMPONENTS``.
        arrays: the shape of each of its arrays, by name.
        chosen: how many of how many experts a token uses; (1, 1) for everything else.
        multiplied: a product with ``weight`` is computed at every position.
        quantizable: a quantization table applies to it.
        per_image: of a projector's layer, how often it is computed for an image; None for once per feature.
    """

    path: str
    component: str
    arrays: Mapping[str, tuple[int, ...]]
    chosen: tuple[int, int] = (1, 1)
    multiplied: bool = False
    quantizable: bool = False
    per_image: int | None = None

    @property
    def total(self) -> int:
        return sum(math.prod(shape) for shape in self.arrays.values())

    @property
    def active(self) -> int:
        return self.total * self.chosen[0] // self.chosen[1]

    @property
    def flops(self) -> int:
        """FLOPs of its products at one position, a multiply-add being two."""
        sizes = [math.prod(shape) for shape in self.arrays.values() if len(shape) > 1]
        return 2 * sum(sizes) * self.chosen[0] // self.chosen[1] if self.multiplied else 0


def model_layers(config: ModelConfig) -> list[Layer]:
    """All layers of ``Model(config)``, in its order."""
    return [*_tower_layers(config), *_projector_layers(config), *_decoder_layers(config.text_config)]


def _linear(path: str, component: str, inputs: int, outputs: int, bias: bool, **more: Any) -> Layer:
    arrays = {"weight": (outputs, inputs), **({"bias": (outputs,)} if bias else {})}
    return Layer(path, component, arrays, multiplied=True, quantizable=True, **more)


def _tower_layers(config: ModelConfig) -> list[Layer]:
    vision, part, root = config.vision_config, "tower", "vision_tower.vision_model"
    size, patch = vision.hidden_size, vision.patch_size
    norm = {"weight": (size,), "bias": (size,)}
    patches: dict[str, tuple[int, ...]] = {"weight": (size, patch, patch, 3)}
    if not vision.is_clip:
        patches["bias"] = (size,)
    layers = [
        Layer(f"{root}.embeddings.patch_embedding", part, patches, multiplied=True),
        Layer(f"{root}.embeddings.position_embedding", part, {"weight": (vision.num_patches + vision.is_clip, size)}),
    ]
    if vision.is_clip:
        layers.append(Layer(f"{root}.embeddings", part, {"class_embedding": (size,)}))
        layers.append(Layer(f"{root}.pre_layrnorm", part, norm))
    for i in range(config.num_vision_layers_used):
        layer = f"{root}.encoder.layers.{i}"
        layers += [Layer(f"{layer}.{name}", part, norm) for name in ("layer_norm1", "layer_norm2")]
        layers += [
            _linear(f"{layer}.self_attn.{name}", part, size, size, bias=True)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        ]
        layers.append(_linear(f"{layer}.mlp.fc1", part, size, vision.intermediate_size, bias=True))
        layers.append(_linear(f"{layer}.mlp.fc2", part, vision.intermediate_size, size, bias=True))
    if vision.post_norm:
        layers.append(Layer(f"{root}.post_layernorm", part, norm))
    return layers


def _projector_layers(config: ModelConfig) -> list[Layer]:
    size, root, part = config.text_config.hidden_size, "multi_modal_projector", "projector"
    layers = [
        _linear(f"{root}.linear_1", part, config.vision_config.hidden_size, size, bias=True),
        _linear(f"{root}.linear_2", part, size, size, bias=True),
    ]
    if config.projector_type == "ldpnet":
        for i, positions in enumerate((config.num_image_features, config.num_image_tokens)):
            layers += _inverted_residual(f"{root}.blocks.{i}", size, positions)
    if config.projector_type == "ldpnetv2":
        arrays = {"weight": (size, 3, 3, 1), "bias": (size,)}
        layers.append(Layer(f"{root}.peg", part, arrays, multiplied=True, per_image=LDPV2_GRID**2))
    return layers


def _inverted_residual(path: str, size: int, positions: int) -> list[Layer]:
    """A block of LDP that computes so many positions of an image."""
    part, inside, norm = "projector", squeezed_size(size), {"weight": (size,), "bias": (size,)}
    return [
        Layer(f"{path}.depthwise", part, {"weight": (size, 3, 3, 1)}, multiplied=True, per_image=positions),
        Layer(f"{path}.norm_1", part, norm),
        _linear(f"{path}.squeeze.fc1", part, size, inside, bias=True, per_image=1),
        _linear(f"{path}.squeeze.fc2", part, inside, size, bias=True, per_image=1),
        _linear(f"{path}.pointwise", part, size, size, bias=False, per_image=positions),
        Layer(f"{path}.norm_2", part, norm),
    ]


def _decoder_layers(text: TextConfig) -> list[Layer]:
    size, root = text.hidden_size, "language_model.model"
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    norm = {"weight": (size,), **({"bias": (size,)} if text.norm == "layer" else {})}
    qkv_bias, out_bias = text.attention_bias != "none", text.attention_bias == "all"
    layers = [Layer(f"{root}.embed_tokens", "embeddings", {"weight": (text.vocab_size, size)}, quantizable=True)]
    for i in range(text.num_hidden_layers):
        layer = f"{root}.layers.{i}"
        layers.append(Layer(f"{layer}.input_layernorm", "norms", norm))
        layers += [
            _linear(f"{layer}.self_attn.{name}", "attention", inputs, outputs, bias)
            for name, inputs, outputs, bias in (
                ("q_proj", size, queries, qkv_bias),
                ("k_proj", size, keys, qkv_bias),
                ("v_proj", size, keys, qkv_bias),
                ("o_proj", queries, size, out_bias),
            )
        ]
        if not text.parallel_block:
            layers.append(Layer(f"{layer}.post_attention_layernorm", "norms", norm))
        if text.shortcut_size and i >= text.series_layers:
            layers.append(_linear(f"{layer}.attn_linear.linear_1", "attention", size, text.shortcut_size, bias=False))
            layers.append(_linear(f"{layer}.attn_linear.linear_2", "attention", text.shortcut_size, size, bias=False))
        network = _sparse_ffn if i in text.sparse_layers else _dense_ffn
        layers += network(text, f"{layer}.mlp", i)
    layers.append(Layer(f"{root}.norm", "norms", norm))
    if not text.tie_word_embeddings:
        head = {"weight": (text.vocab_size, size)}
        layers.append(Layer("language_model.lm_head", "embeddings", head, quantizable=True))
    return layers


def _ffn_shapes(text: TextConfig, width: int, index: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linears of a feed-forward network in a layer."""
    up, down = (width, text.hidden_size), (text.hidden_size, width)
    if not text.gated:
        return {"fc1": up, "fc2": down}
    second = {"gate_proj2": up} if index < text.series_layers else {}
    return {"gate_proj": up, **second, "up_proj": up, "down_proj": down}


def _dense_ffn(
    text: TextConfig, path: str, index: int, component: str = "dense_ffn", chosen: tuple[int, int] = (1, 1)
) -> list[Layer]:
    shapes = _ffn_shapes(text, text.intermediate_size, index)
    return [
        _linear(f"{path}.{name}", component, inputs, outputs, bias=not text.gated, chosen=chosen)
        for name, (outputs, inputs) in shapes.items()
    ]


def _sparse_ffn(text: TextConfig, path: str, index: int) -> list[Layer]:
    moe = text.moe
    assert moe is not None
    size, experts = text.hidden_size, moe.num_experts
    gate: dict[str, tuple[int, ...]] = {"weight": (experts, size)}
    if moe.router_rank:
        gate = {"u": (size, moe.router_rank), "v": (moe.router_rank, experts)}
    layers = [Layer(f"{path}.gate", "routers", gate, multiplied=True)]
    if moe.kind == "evf":
        layers += _dense_ffn(text, f"{path}.language_ffn", index, chosen=(1, 2))
        return layers + _dense_ffn(text, f"{path}.vision_ffn", index, "experts", chosen=(1, 2))
    for name, (outputs, inputs) in _ffn_shapes(text, moe.expert_size or text.intermediate_size, index).items():
        arrays: dict[str, tuple[int, ...]] = {"weight": (experts, outputs, inputs)}
        if not text.gated:
            arrays["bias"] = (experts, outputs)
        layers.append(
            Layer(
                f"{path}.switch_mlp.{name}", "experts", arrays, (moe.top_k, experts), multiplied=True, quantizable=True
            )
        )
    if moe.use_residual:
        layers += _dense_ffn(text, f"{path}.mlp", index)
        layers.append(Layer(f"{path}.coefficient", "routers", {"weight": (2, size), "bias": (2,)}, multiplied=True))
    return layers
