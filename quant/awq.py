"""Activation-aware scaling before quantization (AWQ, Lin et al. 2023), for dense networks and for experts.

Quantization errs by the same amount on every weight of a group, so a channel whose activations are large suffers most.
Such a channel's weights are made larger before they are quantized and its activations smaller by the same factor, which
is folded into what produces them (``gm_mlx.quant.folding``): in exact arithmetic nothing changes.

How strong the factors are, s = (mean |x|) ^ alpha, is found by trying: the alpha wins with which the quantized network
is nearest to the original on the calibration's tokens. Alpha 0 is no scaling, so it is never worse on these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from gm_mlx.activations import ACTIVATIONS
from gm_mlx.config import ModelConfig, MoEConfig, TextConfig
from gm_mlx.errors import UserError
from gm_mlx.quant.calibration import LAYERS, Activations, Calibration, experts_path
from gm_mlx.quant.folding import INTO, OUT_OF, Factors, apply_factors, fold_hidden, fold_input, read
from gm_mlx.quant.low_rank import router_weight
from gm_mlx.router import choose
from gm_mlx.tensors import Tensor

NUM_ALPHAS = 20
ROWS = 256  # tokens of a network on which the alphas are compared
FEWEST_ROWS = 8  # an expert that saw fewer is left alone: scales made for them could harm all others
LIMITS = (1e-2, 1e3)  # of a channel's mean activation against that of all: dead channels must not make scales explode
NEAR_LOSSLESS_BITS = 8  # from here up there is nothing to gain
FLOAT32_TINY = float(np.finfo(np.float32).tiny)

Settings = dict[str, Any]  # group_size, bits and mode


@dataclass(frozen=True)
class Scaling:
    """One choice of channel scales.

    Attributes:
        layer: index of the decoder layer.
        path: module path of the network.
        part: "input" for the channels that a layer's networks share, "hidden" for those inside of one network.
        expert: index of the expert, or None for a dense network and for what experts share.
        tokens: tokens of the calibration that it saw.
        alpha: the exponent; 0 is no scaling.
        error_before: relative error |y' - y| / |y| of the output when quantized as it is, or None.
        error_after: the same with the scales.
        note: why there is no scaling, when it was not the search that said so.
    """

    layer: int
    path: str
    part: Literal["input", "hidden"]
    expert: int | None
    tokens: int
    alpha: float = 0.0
    error_before: float | None = None
    error_after: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ScaleReport:
    """What ``awq_scale`` did: its choices, and what kept it from choosing."""

    scalings: list[Scaling] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def unused_experts(self) -> list[tuple[int, int]]:
        """Layer and index of the experts that saw no token."""
        return [(s.layer, s.expert) for s in self.scalings if s.expert is not None and not s.tokens]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "scalings": [dataclasses.asdict(scaling) for scaling in self.scalings],
            "unused_experts": [list(pair) for pair in self.unused_experts],
            "notes": self.notes,
        }


def awq_scale(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    calibration: Calibration,
    table: Mapping[str, Any],
    progress: Callable[[str, int, int], None] | None = None,
    *,
    num_alphas: int = NUM_ALPHAS,
) -> tuple[dict[str, Tensor], ScaleReport]:
    """Scale the channels of a model's feed-forward networks so that quantizing them loses less.

    One layer's networks are in memory at a time, in their own dtype, and one network in float32.

    Args:
        config: the model's config.
        tensors: its tensors, not quantized.
        calibration: statistics of this model.
        table: the quantization that follows, in mlx-lm's layout; see ``gm_mlx.weights.apply_quantization``.
        progress: told ("scale", layers done, layers) after each.
        num_alphas: exponents 0, 1/n, 2/n, ... to try.

    Returns:
        All tensors, which make the same model up to rounding, and the report. Dtypes are kept, but what decides where
        tokens go is float32.

    Raises:
        UserError: the model is quantized already, or the calibration is another model's.
    """
    text = config.text_config
    if not text.gated:
        note = "networks without a gate are not scaled: what stands between their projections is not linear"
        return dict(tensors), ScaleReport(notes=[note])
    factors: Factors = {}
    replaced: dict[str, Tensor] = {}
    report = ScaleReport(notes=["inputs are not scaled: attention reads the same norm"] if text.parallel_block else [])
    elastic = text.sparse_layers if text.moe and text.moe.kind == "evf" else []
    unscaled = sorted({*range(text.series_layers), *elastic})
    if unscaled:
        report.notes.append(f"layers {unscaled} are not scaled: they have second gates or vision networks")
    for layer in range(text.num_hidden_layers):
        if layer in unscaled:
            continue
        networks = _networks(text, tensors, calibration, layer)
        found = _search(text, tensors, networks, table, layer, calibration.num_tokens, num_alphas)
        for path, scales in found.hidden.items():
            if np.any(scales != 1):
                fold_hidden(factors, path, scales)
        if found.input is not None:
            replaced |= fold_input(factors, text, tensors, layer, found.hidden, found.input)
        report.scalings.extend(found.scalings)
        if progress is not None:
            progress("scale", layer + 1, text.num_hidden_layers)
    out = {name: replaced.get(name, tensor) for name, tensor in tensors.items()}
    return out | apply_factors(tensors, factors), report


def channel_scales(means: np.ndarray, alpha: float) -> np.ndarray:
    """Factors of a weight's columns, float32 [C]: mean activations [C] to the power of alpha, around one."""
    if not means.any():
        return np.ones(len(means), np.float32)
    scales = np.clip(means / means.mean(), *LIMITS) ** alpha
    return (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)


@dataclass(frozen=True)
class Network:
    """A dense network or one expert, with some of the calibration's tokens that it sees.

    Attributes:
        path: module path of its projections.
        expert: its index in the stack, or None.
        tokens: how many tokens it saw.
        input_means: of |x| per channel, over these tokens, [D].
        hidden_means: of |h| per channel, [F].
        x: some of its inputs, [n, D].
        share: what of its output for them counts in the layer's, [n, 1].
    """

    path: str
    expert: int | None
    tokens: int
    input_means: np.ndarray
    hidden_means: np.ndarray
    x: mx.array
    share: mx.array


@dataclass(frozen=True)
class Found:
    """The best scales of one layer.

    Attributes:
        input: of the channels that its networks read, float32 [D]; None when they stay as they are.
        hidden: by module path: of the channels inside, float32 [F], or [E, F] for stacked experts.
        scalings: the report.
    """

    input: np.ndarray | None
    hidden: dict[str, np.ndarray]
    scalings: list[Scaling]


def _search(
    text: TextConfig,
    tensors: Mapping[str, Tensor],
    networks: Sequence[Network],
    table: Mapping[str, Any],
    layer: int,
    num_tokens: int,
    num_alphas: int,
) -> Found:
    """Try all alphas: the input's on all networks of a layer together, the hidden channels' on each network."""
    alphas = np.arange(num_alphas) / num_alphas
    # Each network weighs in the statistic of what they share by the tokens that it saw.
    seen = max(sum(network.tokens for network in networks), 1)
    input_means = np.sum([network.tokens * network.input_means for network in networks], axis=0) / seen  # [D]
    input_errors, input_size = np.zeros(num_alphas), 0.0
    stacks: dict[str, mx.array] = {}
    hidden: dict[str, list[np.ndarray]] = {}
    inside: list[Scaling] = []
    for network in networks:
        bits = [_settings(table, f"{network.path}.{part}") for part in (*INTO, OUT_OF)]
        scaling = Scaling(layer, network.path, "hidden", network.expert, network.tokens)
        scales = np.ones_like(network.hidden_means, np.float32)
        if any(bits) and len(network.x) >= FEWEST_ROWS:
            trial = Trial(network, text.hidden_act, [_matrix(stacks, tensors, network, p) for p in (*INTO, OUT_OF)])
            if (bits[0] or bits[1]) and not text.parallel_block:
                input_errors += [trial.input_error(channel_scales(input_means, alpha), *bits[:2]) for alpha in alphas]
                input_size += trial.size
            if bits[2]:
                candidates = [channel_scales(network.hidden_means, alpha) for alpha in alphas]
                errors = np.array([trial.hidden_error(scales, bits[2]) for scales in candidates])
                scales = candidates[np.argmin(errors)]
                scaling = _measured(scaling, alphas, errors, trial.size)
        if scaling.error_before is None:
            scaling = dataclasses.replace(scaling, note=_why_not(network, quantized=bits[2] is not None))
        hidden.setdefault(network.path, []).append(scales)
        inside.append(scaling)

    shared = Scaling(layer, f"{LAYERS}.{layer}.mlp", "input", None, num_tokens)
    if input_size:
        shared = _measured(shared, alphas, input_errors, input_size)
    else:
        shared = dataclasses.replace(shared, note="no network is quantized that saw enough tokens")
    return Found(
        channel_scales(input_means, shared.alpha) if shared.alpha else None,
        {path: np.stack(all_) if path == experts_path(layer) else all_[0] for path, all_ in hidden.items()},
        inside if text.parallel_block else [shared, *inside],
    )


class Trial:
    """A network in float32, and how far its output moves when it is quantized with some scales or others."""

    def __init__(self, network: Network, activation: str, matrices: Sequence[mx.array]) -> None:
        self.x, self.share = network.x, network.share
        self.gate, self.up, self.down = matrices
        self.activation = ACTIVATIONS[activation]
        self.hidden = self._glu(self.x, self.gate, self.up)
        self.y = self.share * (self.hidden @ self.down.T)  # [n, D]
        mx.eval(self.hidden, self.y)
        self.size = max(_squares(self.y), FLOAT32_TINY)

    def input_error(self, scales: np.ndarray, gate: Settings | None, up: Settings | None) -> float:
        """Squared error of the output with gate and up quantized, their columns scaled by [D]."""
        s = mx.array(scales)
        hidden = self._glu(self.x / s, _rounded(self.gate * s, gate), _rounded(self.up * s, up))
        return self._error(hidden @ self.down.T)

    def hidden_error(self, scales: np.ndarray, down: Settings) -> float:
        """Squared error of the output with down quantized, its columns scaled by [F]."""
        s = mx.array(scales)
        return self._error((self.hidden / s) @ _rounded(self.down * s, down).T)

    def _glu(self, x: mx.array, gate: mx.array, up: mx.array) -> mx.array:
        return self.activation(x @ gate.T) * (x @ up.T)  # [n, F]

    def _error(self, y: mx.array) -> float:
        error = _squares(self.share * y - self.y)
        return error if np.isfinite(error) else np.inf


def _squares(x: mx.array) -> float:
    return float(np.array(mx.square(x).sum()))


def _measured(scaling: Scaling, alphas: np.ndarray, errors: np.ndarray, size: float) -> Scaling:
    best = int(np.argmin(errors))
    before, after = np.sqrt(errors[[0, best]] / size).tolist()
    return dataclasses.replace(scaling, alpha=float(alphas[best]), error_before=before, error_after=after)


def _why_not(network: Network, quantized: bool) -> str:
    if not network.tokens:
        return "saw no token"
    if len(network.x) < FEWEST_ROWS:
        return f"{len(network.x)} of its tokens were kept, too few to judge by"
    return "" if quantized else "not quantized, or to 8 bits"


def _networks(text: TextConfig, tensors: Mapping[str, Tensor], calibration: Calibration, layer: int) -> list[Network]:
    """The networks of a layer: one, or the experts and the dense network that may stand beside them."""
    mlp, experts = f"{LAYERS}.{layer}.mlp", experts_path(layer)
    moe = text.moe if layer in text.sparse_layers else None
    rows = calibration.rows.get(layer, np.zeros((0, 0)))
    for path in [mlp] if moe is None else [experts, f"{mlp}.mlp"] if moe.use_residual else [experts]:
        seen = calibration.networks.get(path)
        size = moe.num_experts if moe and path == experts else 1
        if seen is None or seen.inputs.shape != (size, text.hidden_size) or rows.shape[1] != text.hidden_size:
            raise UserError(f"{path}: the calibration is not of this model; calibrate the model that is quantized")
    x = mx.array(rows)
    if moe is None:
        return [_network(mlp, None, calibration.networks[mlp], x, mx.ones((len(rows), 1)))]
    chosen, weights, dense = _routing(moe, tensors, mlp, x)
    networks = []
    for expert in range(moe.num_experts):
        tokens, places = (mx.array(index) for index in np.nonzero(chosen == expert))
        share = weights[tokens, places][:, None]
        networks.append(_network(experts, expert, calibration.networks[experts], x[tokens], share))
    if moe.use_residual:
        networks.append(_network(f"{mlp}.mlp", None, calibration.networks[f"{mlp}.mlp"], x, dense))
    return networks


def _routing(
    moe: MoEConfig, tensors: Mapping[str, Tensor], mlp: str, x: mx.array
) -> tuple[np.ndarray, mx.array, mx.array]:
    """For inputs [n, D]: chosen experts [n, k], their shares in the output [n, k], the dense network's [n, 1]."""
    logits = x @ mx.array(router_weight(tensors, f"{mlp}.gate").astype(np.float32)).T
    _, experts, weights = choose(logits, moe.top_k, moe.norm_topk_prob)
    if not moe.use_residual:
        return np.array(experts), weights, mx.zeros((len(x), 1))
    weight, bias = (read(tensors, f"{mlp}.coefficient.{part}").astype(mx.float32) for part in ("weight", "bias"))
    mix = mx.softmax(x @ weight.T + bias, axis=-1)  # [n, 2]: of the experts, of the dense network
    return np.array(experts), weights * mix[:, :1], mix[:, 1:]


def _network(path: str, expert: int | None, seen: Activations, x: mx.array, share: mx.array) -> Network:
    """A network with no more than ``ROWS`` of its tokens, evenly spread."""
    if len(x) > ROWS:
        spread = mx.array(np.arange(ROWS) * len(x) // ROWS)
        x, share = x[spread], share[spread]
    index = expert or 0
    return Network(path, expert, int(seen.tokens[index]), seen.inputs[index], seen.hidden[index], x, share)


def _matrix(stacks: dict[str, mx.array], tensors: Mapping[str, Tensor], network: Network, part: str) -> mx.array:
    """A projection of a network in float32; ``stacks`` keeps what was read for the other experts."""
    name = f"{network.path}.{part}.weight"
    if name not in stacks:
        stacks[name] = read(tensors, name)
    return (stacks[name] if network.expert is None else stacks[name][network.expert]).astype(mx.float32)


def _settings(table: Mapping[str, Any], path: str) -> Settings | None:
    """How a layer will be quantized, as ``mx.quantize`` takes it; None when it will not be or need not be scaled."""
    value = table.get(path, True)
    entry = table if value is True else value
    if not entry or "bits" not in entry or entry["bits"] >= NEAR_LOSSLESS_BITS:
        return None
    return {"group_size": entry["group_size"], "bits": entry["bits"], "mode": entry.get("mode", "affine")}


def _rounded(weight: mx.array, settings: Settings | None) -> mx.array:
    """A float32 matrix as it will be after quantization."""
    if settings is None:
        return weight
    return mx.dequantize(*mx.quantize(weight, **settings), **settings).astype(mx.float32)
