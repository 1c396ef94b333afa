"""PyTorch models that gm-mlx is compared with, at tiny random sizes in float32.

The dense parts are Hugging Face's own classes. The mixture of experts is written here, token by token, from DeepSpeed
0.9.5's gate (deepspeed/moe/sharded_moe.py) with the Gumbel draw at zero and no capacity, and put into the place of
Gemma's feed-forward network.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.phi.modeling_phi import PhiMLP

from gm_mlx.config import ModelConfig, MoEConfig, TextConfig, VisionConfig
from gm_mlx.model import Model
from gm_mlx.moe import SparseMLP

IMAGE_TOKEN = 70

TEXT = TextConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=80,
)
CLIP = VisionConfig(
    model_type="clip_vision_model",
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=28,
    patch_size=7,
)
SIGLIP = VisionConfig(
    model_type="siglip_vision_model",
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=30,  # not a multiple of the patch, as in siglip-so400m-patch14-384
    patch_size=7,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)

# transformers 5's names and ours, the first match counts; None is a tensor that gm-mlx has no place for.
NAMES: list[tuple[str, str | None]] = [
    (r"lm_head\.weight", None),  # tied
    (r"(?:model\.vision_tower\.)?post_layernorm\..*", None),
    (r"model\.vision_tower\.(.*)", r"vision_tower.vision_model.\1"),
    (r"model\.multi_modal_projector\.(.*)", r"multi_modal_projector.\1"),
    (r"model\.language_model\.(.*)", r"language_model.model.\1"),
    (r"((?:embeddings|encoder)\..*)", r"vision_model.\1"),  # a tower by itself
    (r"(.*)", r"\1"),
]


class LowRankGate(nn.Module):
    """A router through a bottleneck."""

    def __init__(self, text: TextConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(text.hidden_size, moe.router_rank))
        self.v = nn.Parameter(torch.empty(moe.router_rank, moe.num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.u) @ self.v


class NaiveMoE(nn.Module):
    """A mixture of experts as a loop over tokens; ``trace`` keeps each token's choice of the last call."""

    def __init__(self, text: TextConfig, moe: MoEConfig, ffn: Callable[[TextConfig], nn.Module] | None = None) -> None:
        super().__init__()
        ffn = ffn or network
        self.top_k, self.norm_topk_prob = moe.top_k, moe.norm_topk_prob
        full = nn.Linear(text.hidden_size, moe.num_experts, bias=False)
        self.gate = LowRankGate(text, moe) if moe.router_rank else full
        self.experts = nn.ModuleList(ffn(text) for _ in range(moe.num_experts))
        self.mlp = ffn(text) if moe.use_residual else None
        self.coefficient = nn.Linear(text.hidden_size, 2) if moe.use_residual else None
        self.trace: list[list[int]] = []
        self.logits = self.probabilities = torch.zeros(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        self.logits = self.gate(tokens)
        self.probabilities = torch.softmax(self.logits, dim=-1)
        self.trace, rows = [], []
        for token, p in zip(tokens, self.probabilities, strict=True):
            values = p.tolist()
            chosen = sorted(range(len(values)), key=lambda e: (-values[e], e))[: self.top_k]
            weights = [p[e] for e in chosen]
            if self.norm_topk_prob:
                total = torch.stack(weights).sum().clamp(min=torch.finfo(torch.float32).eps)
                weights = [w / total for w in weights]
            y = sum(w * self.experts[e](token) for w, e in zip(weights, chosen, strict=True))
            if self.mlp is not None and self.coefficient is not None:
                c = torch.softmax(self.coefficient(token), dim=-1)
                y = y * c[0] + self.mlp(token) * c[1]
            self.trace.append(chosen)
            rows.append(y)
        return torch.stack(rows).reshape(x.shape)

    def load_balancing_loss(self, real: torch.Tensor | None = None) -> torch.Tensor:
        """DeepSpeed's l_aux of the last call: E * sum_e mean(p_e) * mean(e comes first), over ``real`` tokens."""
        num_experts = self.probabilities.shape[-1]
        first = torch.nn.functional.one_hot(torch.tensor([t[0] for t in self.trace]), num_experts).float()
        p = self.probabilities
        p, first = (p, first) if real is None else (p[real], first[real])
        return (p.mean(dim=0) * first.mean(dim=0)).sum() * num_experts


def network(text: TextConfig) -> nn.Module:
    """A feed-forward network of transformers: Gemma's, which is Llama's, or Phi's."""
    return GemmaMLP(gemma_config(text)) if text.gated else PhiMLP(gemma_config(text))


def gemma_config(text: TextConfig) -> GemmaConfig:
    return GemmaConfig(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        vocab_size=text.vocab_size,
        hidden_act=text.hidden_act,
    )


def vision_config(vision: VisionConfig) -> Any:
    kind: Any = CLIPVisionConfig if vision.is_clip else SiglipVisionConfig
    return kind(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        **({} if vision.is_clip else {"vision_use_head": False}),
    )


def llava(config: ModelConfig, seed: int = 0) -> Any:
    """Hugging Face's LLaVA with random weights, its sparse layers replaced by ``NaiveMoE``."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=gemma_config(config.text_config),
            vision_config=vision_config(config.vision_config),
            image_token_index=config.image_token_index,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            projector_hidden_act=config.projector_hidden_act,
        )
    )
    for layer in config.text_config.sparse_layers:
        assert config.text_config.moe is not None
        model.model.language_model.layers[layer].mlp = NaiveMoE(config.text_config, config.text_config.moe)
    return randomise(model)


def siglip(vision: VisionConfig, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return randomise(SiglipVisionModel(vision_config(vision)))


def randomise(model: nn.Module) -> nn.Module:
    """Weights large enough that every activation and norm works outside its linear range."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3))
    return model.eval()


def our_name(name: str) -> str | None:
    """gm-mlx's name of one of transformers 5's tensors; None for one that it has no place for."""
    return next(to if to is None else re.sub(at, to, name) for at, to in NAMES if re.fullmatch(at, name))


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    """A PyTorch model's weights under gm-mlx's names and in its layouts."""
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        new = our_name(name)
        if new is not None:
            value = tensor.detach().numpy()
            renamed[new] = value.transpose(0, 2, 3, 1) if "patch_embedding.weight" in new else value
    experts: dict[str, list[str]] = {}
    for name in renamed:
        if "experts." in name:
            experts.setdefault(re.sub(r"experts\.\d+", "switch_mlp", name), []).append(name)
    for stacked, pieces in experts.items():
        renamed[stacked] = np.stack([renamed.pop(name) for name in pieces])  # [E, out, in]
    return renamed


def copy_weights(source: nn.Module, target: mlx_nn.Module, num_vision_layers: int | None = None) -> None:
    """Give ``target`` the weights of ``source``; every tensor must find its place.

    Args:
        source: the PyTorch model.
        target: the gm-mlx model.
        num_vision_layers: tower layers that ``target`` has; those behind are left out.
    """
    named = weights(source)
    if num_vision_layers is not None:
        layer = re.compile(r".*vision_model\.encoder\.layers\.(\d+)\.")
        named = {n: v for n, v in named.items() if not ((m := layer.match(n)) and int(m[1]) >= num_vision_layers)}
    target.load_weights([(name, mx.array(value)) for name, value in named.items()], strict=True)


def model_pair(config: ModelConfig) -> tuple[Model, Any]:
    """Our model and Hugging Face's LLaVA, with the same weights."""
    reference, model = llava(config), Model(config)
    copy_weights(reference, model, config.num_vision_layers_used)
    return model, reference


def moe_pair(**moe: Any) -> tuple[SparseMLP, NaiveMoE]:
    """A sparse layer of ours, in training mode as every new module, and the loop, with the same weights."""
    config = MoEConfig(**moe)
    torch.manual_seed(0)
    reference = NaiveMoE(TEXT, config)
    randomise(reference)
    layer = SparseMLP(TEXT, config, layer=3)
    copy_weights(reference, layer)
    return layer, reference


def tokens(*shape: int) -> np.ndarray:
    """What enters a layer of ``TEXT``, float32 [*shape, D]."""
    return np.random.default_rng(1).normal(size=(*shape, TEXT.hidden_size)).astype(np.float32)


def relative_error(ours: mx.array, theirs: torch.Tensor | np.ndarray) -> float:
    """Largest difference over the largest value."""
    a = np.array(ours.astype(mx.float32))
    b = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())
