"""What PanGu-pi's layers have beside a Llama's (Wang et al. 2023; the decoder of Eve).

The first layers, "Vanilla" in Eve's code, have a *series-informed activation*: two gates with an activation each, added
up, in a sum over activations that makes a thin network more nonlinear. The layers behind them, "Aug", have an
*augmented shortcut*: a second, narrow and nonlinear path around attention, against features that grow alike with depth.

Both use the quick GELU x * sigmoid(1.702 x). Eve's code writes it as x * sigmoid(1.702 |x|) * exp(0.851 (x - |x|)),
which is the same number.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from gm_mlx.activations import ACTIVATIONS
from gm_mlx.config import TextConfig


class SeriesMLP(nn.Module):
    """``down((act(gate x) + quick_gelu(gate2 x)) * up x)`` (InternLMMLPVanilla in Eve)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate_proj2 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gates = self.activation(self.gate_proj(x)) + ACTIVATIONS["quick_gelu"](self.gate_proj2(x))
        return self.down_proj(gates * self.up_proj(x))


class AugmentedShortcut(nn.Module):
    """``W2 quick_gelu(W1 a)`` of what attention gives, added beside it (``attn_linear`` in Eve)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.hidden_size, config.shortcut_size, bias=False)
        self.linear_2 = nn.Linear(config.shortcut_size, config.hidden_size, bias=False)

    def __call__(self, attended: mx.array) -> mx.array:
        """[B, L, D] to [B, L, D]."""
        return self.linear_2(ACTIVATIONS["quick_gelu"](self.linear_1(attended)))
