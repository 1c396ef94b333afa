"""Upcycling: a dense decoder's FFNs become mixtures of experts, tensor by tensor (Sparse Upcycling; MoE-LLaVA, 3.3).

Two ways. *Copying* makes every expert the dense FFN: the model says what it said, and training then tells the experts
apart. It grows by E - 1 FFNs per sparse layer. *Splitting* deals the F neurons of an FFN out to E experts of F / E: the
model keeps its size, computes k / E of the FFN per token, and loses what the experts left out would have added.

A gated FFN is a sum over its neurons, ``sum_n down_n * act(gate_n x) * (up_n x)``, so experts that share them out add
up to it. The chosen experts are summed with weights that add up to 1; to count each chosen expert fully, k is folded
into ``down_proj``. With k = E and equal weights this is the dense FFN again.

Which neurons belong together: those that fire together, hence those with similar gate rows (MoEfication, 4.1). They are
clustered by balanced k-means. An expert's row in the router is the mean of its gate rows, so that a token goes to the
experts whose neurons it drives the most on average; all rows of a layer are scaled down together, which keeps their
order and makes the weights nearly equal, as the fold of k wants them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import mlx.core as mx
import numpy as np

from gm_mlx.balanced_clusters import balanced_clusters
from gm_mlx.config import LAYER_MODES, ModelConfig, MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.presets import EVF
from gm_mlx.router import low_rank
from gm_mlx.safetensors_writer import MLX_DTYPES
from gm_mlx.tensors import Tensor

SEED = 0x6D6C78
LOGIT_SCALE = 0.1  # of a split model's logits, for inputs of unit variance: weights within a few percent of 1 / k

OPTION = re.compile(
    r"(?:(?P<evf>evf)|(?P<experts>\d{1,4})\s*[x×]\s*(?P<top_k>\d{1,4}))(?:@(?P<where>[\w,]+))?", re.IGNORECASE
)

# An FFN's tensors: the axis that counts its neurons, or None for one that every expert needs whole.
NEURON_AXIS = {
    "gate_proj.weight": 0,
    "gate_proj2.weight": 0,
    "up_proj.weight": 0,
    "down_proj.weight": 1,
    "fc1.weight": 0,
    "fc1.bias": 0,
    "fc2.weight": 1,
    "fc2.bias": None,
}
OUTPUTS = ("down_proj.weight", "fc2.weight")  # k is folded into these; the bias is in each expert, and weights sum to 1


def parse_upcycle(text: str) -> MoEConfig:
    """The experts that ``--upcycle`` asks for: ``4x2``, ``4x2@second_half`` or ``4x2@0,2,5``; or ``evf``.

    Args:
        text: experts × experts per token, or "evf" for Eve's vision FFNs, and which layers: a key of ``LAYER_MODES`` or
            a list; "sparse" when missing.

    Raises:
        UserError: the text is none of this.
    """
    match = OPTION.fullmatch(text.strip())
    if match is None:
        raise UserError(
            f"--upcycle {text!r}: not EXPERTSxTOP_K[@LAYERS], such as 4x2, 4x2@second_half or 4x2@0,2,5, and not evf"
        )
    moe, where = EVF, match["where"] or "sparse"
    if not match["evf"]:
        experts, top_k = int(match["experts"]), int(match["top_k"])
        if experts < 2 or not 1 <= top_k <= experts:
            raise UserError(
                f"--upcycle {text!r}: needs at least 2 experts, and 1 to {max(experts, 2)} of them per token"
            )
        moe = MoEConfig(num_experts=experts, top_k=top_k)
    if where in LAYER_MODES:
        return replace(moe, mode=where)  # type: ignore[arg-type]
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", where):
        raise UserError(f"--upcycle {text!r}: {where!r} is not one of {list(LAYER_MODES)} and not a list of layers")
    layers = tuple(sorted({int(layer) for layer in where.split(",")}))
    return replace(moe, mode="custom", layers_idx=layers)


def upcycle(
    config: ModelConfig, tensors: Mapping[str, Tensor], moe: MoEConfig, *, split: bool = False, seed: int = 0
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Turn dense FFNs into mixtures of experts.

    Args:
        config: of a model without experts.
        tensors: its tensors by their names in a model folder, not quantized.
        moe: the experts to make. ``router_rank`` makes low-rank routers; ``use_residual`` keeps the dense FFN beside
            them (copying only). Of kind "evf", the dense FFN becomes the language FFN, and the vision FFN its copy.
        split: deal the neurons out to the experts instead of copying all of them.
        seed: of the routers of copies, which are drawn as MoE-LLaVA leaves them to torch: uniformly within 1 / sqrt(D).
            No noise is put on the copies.

    Returns:
        The config and the tensors of the sparse model. Copied, it computes the same as the dense one; of kind "evf",
        for requests without images, while in others the router's probability weighs each FFN's output. Split, only
        with all experts and equal weights; ``config.text_config.moe.expert_size`` is F / E then. Nothing is read before
        a tensor of a sparse layer is, and then no more than that layer.

    Raises:
        UserError: the model is sparse or quantized, no layer is chosen, or its neurons cannot be split evenly.
    """
    text = config.text_config
    if text.moe is not None:
        raise UserError("--upcycle: the model has experts already; name a dense one")
    if split and moe.kind == "evf":
        raise UserError("--upcycle-split: a vision FFN is a copy; leave one of them out")
    if split and moe.use_residual:
        raise UserError("--upcycle-split: cannot be combined with a residual FFN; leave one of them out")
    if split and text.intermediate_size % moe.num_experts:
        raise UserError(
            f"--upcycle-split: {text.intermediate_size} neurons cannot be dealt out to {moe.num_experts} experts; "
            "choose a number of experts that divides them"
        )
    if moe.router_rank >= moe.num_experts:
        raise UserError(f"--router-rank: {moe.router_rank} is not below the number of experts, {moe.num_experts}")
    if moe.kind == "experts":
        # With weights that do not add up to 1, the copies would be a share of the dense FFN.
        moe = replace(moe, norm_topk_prob=True, expert_size=text.intermediate_size // moe.num_experts if split else 0)
    try:
        layers = moe.layers(text.num_hidden_layers)
    except UserError:
        raise UserError(
            f"--upcycle: layers {list(moe.layers_idx)} are not all among the model's {text.num_hidden_layers}, 0 to "
            f"{text.num_hidden_layers - 1}"
        ) from None
    if not layers:
        raise UserError(f"--upcycle: {moe.mode!r} chooses none of the model's {text.num_hidden_layers} layers")

    result = dict(tensors)
    for layer in layers:
        prefix = f"language_model.model.layers.{layer}.mlp."
        ffn = {name.removeprefix(prefix): result.pop(name) for name in tensors if name.startswith(prefix)}
        if unknown := sorted(ffn.keys() - NEURON_AXIS.keys()):
            raise UserError(f"--upcycle: tensor {prefix + unknown[0]!r} is not of a dense FFN that is not quantized")
        if not ffn:
            raise UserError(f"--upcycle: the model has no {prefix}*; convert it again")
        sparse = _split_ffn(ffn, moe, layer) if split else _copy_ffn(ffn, moe, [SEED, seed, layer], text.hidden_size)
        result |= {prefix + name: tensor for name, tensor in sparse.items()}
    return replace(config, text_config=replace(text, moe=moe)), result


def _copy_ffn(ffn: Mapping[str, Tensor], moe: MoEConfig, seed: list[int], hidden_size: int) -> dict[str, Tensor]:
    def stacked(tensor: Tensor) -> Tensor:
        shape = (moe.num_experts, *tensor.shape)  # [E, out, in]
        return Tensor(tensor.dtype, shape, lambda: mx.broadcast_to(tensor.read(), shape))

    def router() -> np.ndarray:
        bound = hidden_size**-0.5
        return np.random.default_rng(seed).uniform(-bound, bound, (moe.num_experts, hidden_size))

    if moe.kind == "evf":
        networks = {f"{part}.{name}": ffn[name] for part in ("language_ffn", "vision_ffn") for name in ffn}
        return networks | _router(moe, hidden_size, router)
    result = {f"switch_mlp.{name}": stacked(tensor) for name, tensor in ffn.items()}
    if moe.use_residual:
        # A softmax over zeros: half of the experts, which all are the dense FFN, and half of the dense FFN.
        result |= {f"mlp.{name}": tensor for name, tensor in ffn.items()}
        result["coefficient.weight"] = _float32((2, hidden_size), lambda: np.zeros((2, hidden_size)))
        result["coefficient.bias"] = _float32((2,), lambda: np.zeros(2))
    return result | _router(moe, hidden_size, router)


def _split_ffn(ffn: Mapping[str, Tensor], moe: MoEConfig, layer: int) -> dict[str, Tensor]:
    gate = ffn["gate_proj.weight" if "gate_proj.weight" in ffn else "fc1.weight"]
    size, hidden_size = gate.shape

    @functools.cache  # one list of neurons and E rows per layer: small beside the weights
    def clusters() -> tuple[np.ndarray, np.ndarray]:
        """Neurons in the order of their experts [F], and the router's rows [E, D]."""
        rows = np.array(gate.read().astype(mx.float32))  # [F, D]
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.maximum(length, 1e-12)  # the direction of a row says when a neuron fires; its length does not
        labels = balanced_clusters(rows, moe.num_experts, seed=SEED + layer)
        order = np.argsort(labels, kind="stable")
        means = np.stack([(length[n].T @ rows[n])[0] / len(n) for n in order.reshape(moe.num_experts, -1)])  # [E, D]
        means -= means.mean(axis=0)  # softmax does not see what all have in common
        scale = LOGIT_SCALE / max(float(np.linalg.norm(means, axis=1).max()), 1e-12)
        return order, means * scale

    def dealt(name: str, tensor: Tensor) -> Tensor:
        axis = NEURON_AXIS[name]
        if axis is None:
            shape = (moe.num_experts, *tensor.shape)
            return Tensor(tensor.dtype, shape, lambda: mx.broadcast_to(tensor.read(), shape))
        parts = (*tensor.shape[:axis], moe.num_experts, size // moe.num_experts, *tensor.shape[axis + 1 :])
        shape = (moe.num_experts, *(n for i, n in enumerate(parts) if i != axis))

        def read() -> mx.array:
            order = mx.array(clusters()[0])
            experts = mx.take(tensor.read(), order, axis=axis).reshape(parts)
            experts = mx.moveaxis(experts, axis, 0)  # [E, out, in]
            if name in OUTPUTS:
                experts = (experts.astype(mx.float32) * moe.top_k).astype(MLX_DTYPES[tensor.dtype])
            return experts

        return Tensor(tensor.dtype, shape, read)

    result = {f"switch_mlp.{name}": dealt(name, tensor) for name, tensor in ffn.items()}
    return result | _router(moe, hidden_size, lambda: clusters()[1])


def _router(moe: MoEConfig, hidden_size: int, weight: Callable[[], np.ndarray]) -> dict[str, Tensor]:
    """The router's tensors, whole or in factors, made when they are read."""
    if not moe.router_rank:
        return {"gate.weight": _float32((moe.num_experts, hidden_size), weight)}
    u, v = (hidden_size, moe.router_rank), (moe.router_rank, moe.num_experts)
    return {
        "gate.u": _float32(u, lambda: low_rank(weight(), moe.router_rank)[0]),
        "gate.v": _float32(v, lambda: low_rank(weight(), moe.router_rank)[1]),
    }


def _float32(shape: tuple[int, ...], values: Callable[[], np.ndarray]) -> Tensor:
    return Tensor("F32", shape, lambda: mx.array(values().astype(np.float32)))
