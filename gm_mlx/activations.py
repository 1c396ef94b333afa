"""Activations by Hugging Face's names. The three GELUs differ by up to 2e-2: which one is part of a model."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,  # exact, with erf: LLaVA's projector
    "gelu_pytorch_tanh": nn.gelu_approx,  # Gemma, SigLIP
    "quick_gelu": nn.gelu_fast_approx,  # x * sigmoid(1.702 x): OpenAI's CLIP
    "silu": nn.silu,  # Llama, Mistral, Qwen, StableLM
}
