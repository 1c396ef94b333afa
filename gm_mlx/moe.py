"""Feed-forward networks of the decoder: dense, and as a mixture of experts.

The experts are mlx-lm's ``SwitchGLU`` (``SwitchMLP`` where there is no gate): weights stacked [E, out, in], tokens
sorted by expert from 64 assignments up so that each expert's weights are read once. Everything stays lazy: no index
ever comes to the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from gm_mlx._mlx_lm import SwitchGLU, SwitchMLP
from gm_mlx.activations import ACTIVATIONS
from gm_mlx.config import MoEConfig, TextConfig, VisionConfig
from gm_mlx.pangu import SeriesMLP
from gm_mlx.router import Positions, Routing, choose, make_router, weigh

if TYPE_CHECKING:
    from gm_mlx.capacity import Capacity


class GLU:
    """``activation(gate) * up`` in the argument order that ``SwitchGLU`` calls."""

    def __init__(self, activation: str) -> None:
        self.activation = ACTIVATIONS[activation]

    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        return self.activation(gate) * up


class MLP(nn.Module):
    """Gated feed-forward network (GemmaMLP: GeGLU with the tanh GELU; LlamaMLP: SwiGLU)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.activation = GLU(config.hidden_act)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.activation(self.up_proj(x), self.gate_proj(x)))


class PlainMLP(nn.Module):
    """Feed-forward network without a gate, with biases (PhiMLP; in towers CLIPMLP, SiglipMLP)."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


def make_mlp(config: TextConfig, layer: int) -> MLP | SeriesMLP | PlainMLP:
    """The dense feed-forward network that the config asks for in a layer."""
    if layer < config.series_layers:
        return SeriesMLP(config)
    return MLP(config) if config.gated else PlainMLP(config)


def make_experts(config: TextConfig, moe: MoEConfig) -> SwitchGLU | SwitchMLP:
    """The stacked experts that the config asks for."""
    sizes = (config.hidden_size, moe.expert_size or config.intermediate_size, moe.num_experts)
    if config.gated:
        return SwitchGLU(*sizes, activation=GLU(config.hidden_act))
    return SwitchMLP(*sizes, activation=ACTIVATIONS[config.hidden_act], bias=True)


class Coefficient(nn.Module):
    """Shares of the experts and of the dense FFN in residual mode; raw arrays for the reason that routers are."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((2, hidden_size))
        self.bias = mx.zeros((2,))

    def __call__(self, x: mx.array) -> mx.array:
        """Shares float32 [..., 2] of x [..., D]."""
        return mx.softmax(x.astype(mx.float32) @ self.weight.astype(mx.float32).T + self.bias, axis=-1)


class SparseMLP(nn.Module):
    """A mixture of experts in the place of an MLP (deepspeed.moe.layer.MoE).

    With ``use_residual`` a dense FFN runs beside the experts and ``softmax(coefficient(x))`` mixes the two.

    Attributes:
        capacity: how many tokens an expert takes; None for all. See ``set_capacity``.
        gumbel: all experts of a token but its first are drawn, as in DeepSpeed, and not picked. See ``set_gumbel``.
        gumbel_in_eval: also when the layer is not in training mode.
    """

    def __init__(self, config: TextConfig, moe: MoEConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.top_k = moe.top_k
        self.norm_topk_prob = moe.norm_topk_prob
        self.capacity: Capacity | None = None
        self.gumbel = self.gumbel_in_eval = False
        self.gate = make_router(moe, config.hidden_size)
        self.switch_mlp = make_experts(config, moe)
        if moe.use_residual:
            self.mlp = make_mlp(config, layer)
            self.coefficient = Coefficient(config.hidden_size)

    def __call__(self, x: mx.array, trace: list[Routing] | None = None, positions: Positions | None = None) -> mx.array:
        """[B, L, D] to [B, L, D]; appends this layer's ``Routing`` to ``trace`` when one is given."""
        routing = self.route(x, positions or Positions())
        if trace is not None:
            trace.append(routing)
        y = self.combine(x, routing.experts, routing.weights)
        if "mlp" not in self:
            return y
        mix = self.coefficient(x).astype(y.dtype)  # [B, L, 2]
        return y * mix[..., :1] + self.mlp(x) * mix[..., 1:]

    def route(self, x: mx.array, positions: Positions) -> Routing:
        """Where the tokens of x [B, L, D] go."""
        logits = self.gate(x)
        drawn = self.gumbel and (self.training or self.gumbel_in_eval)
        noise = mx.random.gumbel(logits.shape) if drawn else None
        probabilities, experts, weights = choose(logits, self.top_k, self.norm_topk_prob, noise)
        if self.capacity is None or not (self.training or self.capacity.in_eval):
            return Routing(self.layer, probabilities, experts, weights, logits)
        kept = self.capacity.deal(probabilities, experts, positions.real)
        weights = weigh(probabilities, experts, self.norm_topk_prob, kept)
        return Routing(self.layer, probabilities, experts, weights, logits, kept)

    def combine(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """The weighted sum [B, L, D] of what the chosen experts [B, L, k] make of x [B, L, D]."""
        y = self.switch_mlp(x, experts)  # [B, L, k, D]
        return (y * weights[..., None].astype(y.dtype)).sum(axis=-2)


def set_gumbel(model: nn.Module, gumbel: bool, *, in_eval: bool = True) -> None:
    """Draw the second experts of all sparse layers of a model, or pick them; in place.

    DeepSpeed 0.9.5 draws them, in training and evaluation. The draws are MLX's: ``mx.random.seed`` repeats them.

    Args:
        model: any module.
        gumbel: whether they are drawn.
        in_eval: also when a layer is not in training mode, where the same question then has many answers.
    """
    for module in model.modules():
        if isinstance(module, SparseMLP):
            module.gumbel, module.gumbel_in_eval = gumbel, in_eval
