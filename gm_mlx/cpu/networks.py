"""Gated feed-forward networks as one function: dense ones and mixtures of experts, with and without LoRA.

Of all that is computed on the way, only what the matrices up and gate give is kept for the gradient. The matrices
themselves are made ready once more: scales that were in half precision would be in memory in float32, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from gm_mlx._mlx_lm import SwitchGLU
from gm_mlx.cpu.activations import NUMPY_ACTIVATIONS, gated, gated_back
from gm_mlx.cpu.cores import is_known, numpy_function
from gm_mlx.cpu.linears import Layer, Linear
from gm_mlx.cpu.matrix import pays
from gm_mlx.moe import GLU, MLP, SparseMLP


class FastMLP(MLP):
    def __call__(self, x: mx.array) -> mx.array:
        layers = Layers.read(self)
        if layers is None or not pays(x, layers.up.base):
            return super().__call__(x)

        def forward(x: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, Any]:
            rows = x.reshape(-1, x.shape[-1])
            y, hidden = layers.network(arrays).forward(rows, keep=self.training)
            return y.reshape(x.shape), (arrays, rows, hidden)

        def backward(dy: np.ndarray, kept: Any) -> list[np.ndarray]:
            arrays, rows, hidden = kept
            dx, _, of_arrays = layers.network(arrays).backward(dy.reshape(rows.shape), rows, hidden)
            return [dx.reshape(dy.shape), *of_arrays]

        return numpy_function(forward, backward, x, *layers.arrays)


class FastSparseMLP(SparseMLP):
    def combine(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        layers = Layers.read(self.switch_mlp) if isinstance(self.switch_mlp, SwitchGLU) else None
        if layers is None or not pays(x, layers.up.base) or not is_known(experts, weights):
            return super().combine(x, experts, weights)
        top_k = experts.shape[-1]
        chosen = np.asarray(experts).reshape(-1, top_k)  # [T, k]
        kept_choices = np.asarray(weights).reshape(-1, top_k) != 0  # the others were dropped
        # Of each expert its tokens, and which choice of the token it is.
        choices = {int(e): np.nonzero((chosen == e) & kept_choices) for e in np.unique(chosen[kept_choices])}

        def forward(x: np.ndarray, weights: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, Any]:
            rows, shares = x.reshape(-1, x.shape[-1]), weights.reshape(-1, top_k)
            y, hiddens = np.zeros_like(rows), {}
            for expert, (tokens, slots) in choices.items():
                own, hiddens[expert] = layers.network(arrays, expert).forward(rows[tokens], keep=self.training)
                y[tokens] += shares[tokens, slots, None] * own
            return y.reshape(x.shape), (arrays, rows, shares, hiddens)

        def backward(dy: np.ndarray, kept: Any) -> list[np.ndarray]:
            arrays, rows, shares, hiddens = kept
            of_y = dy.reshape(rows.shape)
            of_rows, of_shares = np.zeros_like(rows), np.zeros_like(shares)
            of_arrays = [np.zeros(array.shape, np.float32) for array in layers.arrays]
            for expert, (tokens, slots) in choices.items():
                own, share = rows[tokens], shares[tokens, slots]
                network = layers.network(arrays, expert)
                of_own, of_share, found = network.backward(of_y[tokens], own, hiddens[expert], share)
                of_rows[tokens] += of_own
                of_shares[tokens, slots] = of_share
                for whole, part in zip(of_arrays, found, strict=True):
                    whole[expert] = part
            return [of_rows.reshape(dy.shape), of_shares.reshape(weights.shape), *of_arrays]

        return numpy_function(forward, backward, x, weights, *layers.arrays)


class Layers(NamedTuple):
    """The layers of a network, or of a stack of them."""

    glu: GLU
    up: Layer
    gate: Layer
    down: Layer

    @classmethod
    def read(cls, network: MLP | SwitchGLU) -> Layers | None:
        """The layers, if NumPy can compute all of them and the activation."""
        up, gate, down = (Layer.read(layer) for layer in (network.up_proj, network.gate_proj, network.down_proj))
        if up is None or gate is None or down is None or network.activation.activation not in NUMPY_ACTIVATIONS:
            return None
        return cls(network.activation, up, gate, down)

    @property
    def arrays(self) -> list[mx.array]:
        """All that has a gradient, of all three layers."""
        return [*self.up.arrays, *self.gate.arrays, *self.down.arrays]

    def network(self, arrays: Sequence[np.ndarray], expert: int | None = None) -> Network:
        """The network, or that of an expert, with these values of ``arrays``."""
        given = iter(arrays)
        layers = self.up, self.gate, self.down
        return Network(self.glu, *(layer.linear([next(given) for _ in layer.arrays], expert) for layer in layers))


class Hidden(NamedTuple):
    """What is kept of a network's way from x [T, D] to y.

    Attributes:
        up: [T, F].
        gate: [T, F].
        lows: what the three linears need for their gradients.
    """

    up: np.ndarray
    gate: np.ndarray
    lows: tuple[list[np.ndarray], ...]


class Network(NamedTuple):
    """``down(activation(gate x) * up x)``."""

    glu: GLU
    up: Linear
    gate: Linear
    down: Linear

    def forward(self, x: np.ndarray, keep: bool) -> tuple[np.ndarray, Hidden | None]:
        """y [T, D] of x [T, D]; and what ``backward`` will need, or None if it is to compute it again."""
        (up, up_low), (gate, gate_low) = self.up.times(x), self.gate.times(x)
        y, down_low = self.down.times(gated(self.glu, up, gate, np.empty_like(gate) if keep else gate))
        return y, Hidden(up, gate, (up_low, gate_low, down_low)) if keep else None

    def backward(
        self, dy: np.ndarray, x: np.ndarray, hidden: Hidden | None, shares: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, list[np.ndarray]]:
        """Gradients of ``y``, or of ``shares * y``.

        Args:
            dy: of the result [T, D].
            x: [T, D].
            hidden: what ``forward`` left.
            shares: none of them zero, [T].

        Returns:
            Those of x [T, D], of the shares [T] and of ``Layers.arrays``, for one expert.
        """
        up, gate, lows = hidden or self.forward(x, keep=True)[1]  # type: ignore[misc]
        if shares is not None:
            dy = dy * shares[:, None]
        h = gated(self.glu, up, gate, np.empty_like(gate))
        dh, of_down = self.down.back(dy, h, lows[2])
        # A share's gradient is dy y / share, and dy y is dh h: both are dy W h.
        of_shares = None if shares is None else np.einsum("tf,tf->t", dh, h) / shares
        dup, dgate = gated_back(self.glu, dh, up, gate, out=dh)
        of_x, of_up = self.up.back(dup, x, lows[0])
        more, of_gate = self.gate.back(dgate, x, lows[1])
        of_x += more
        return of_x, of_shares, [*of_up, *of_gate, *of_down]
