"""Dense models made sparse: copies compute the same, and shares of the neurons add up to the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import SPARSE, tiny_config, tiny_folder, tiny_model

from gm_mlx.config import LAYER_MODES, ModelConfig, MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.moe import MLP
from gm_mlx.router import Routing
from gm_mlx.safetensors_header import check_header
from gm_mlx.tensors import Tensor, open_safetensors
from gm_mlx.upcycle import parse_upcycle, upcycle
from gm_mlx.weights import load_model, named_arrays, save_model

PHI: dict[str, Any] = {"gated": False, "norm": "layer", "attention_bias": "all", "hidden_act": "gelu_pytorch_tanh"}
LLAMA: dict[str, Any] = {"norm_plus_one": False, "scale_embeddings": False, "hidden_act": "silu"}
NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


def dense(layers: int = 3, **text: Any) -> Model:
    return tiny_model(config=tiny_config(moe=None, num_hidden_layers=layers, **text))


def tensors_of(model: Model) -> dict[str, Tensor]:
    return {name: Tensor(NAMES[a.dtype], a.shape, lambda a=a: a) for name, a in named_arrays(model).items()}  # type: ignore[misc]


def build(config: ModelConfig, tensors: dict[str, Tensor]) -> Model:
    """A model of exactly these tensors, each of which is what it says it is."""
    model = Model(config)
    arrays = [(name, tensor.read()) for name, tensor in tensors.items()]
    for name, array in arrays:
        assert array.shape == tensors[name].shape, name
        assert NAMES[array.dtype] == tensors[name].dtype, name
    model.load_weights(arrays)
    model.eval()
    return model


def logits(model: Model) -> tuple[np.ndarray, list[Routing]]:
    trace: list[Routing] = []
    ids = np.random.default_rng(0).integers(3, 400, (2, 9))
    return np.array(model.logits(model.hidden(model.embed(ids), trace=trace))), trace


@pytest.mark.parametrize("text", [{}, LLAMA, PHI], ids=["gemma", "llama", "phi"])
@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (4, 1), (4, 2), (4, 4), (3, 3)])
def test_copies_compute_what_the_dense_model_does(experts: int, top_k: int, text: dict[str, Any]) -> None:
    model = dense(**text)
    moe = MoEConfig(num_experts=experts, top_k=top_k)
    config, tensors = upcycle(model.config, tensors_of(model), moe)
    assert config.text_config.moe == moe
    theirs, _ = logits(model)
    ours, trace = logits(build(config, tensors))
    assert [routing.layer for routing in trace] == [0, 2]
    assert np.abs(theirs - ours).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(
    "moe",
    [MoEConfig(use_residual=True), MoEConfig(router_rank=3), MoEConfig(router_rank=1), MoEConfig(norm_topk_prob=False)],
)
def test_other_kinds_of_copies(moe: MoEConfig) -> None:
    model = dense()
    config, tensors = upcycle(model.config, tensors_of(model), moe)
    assert config.text_config.moe == replace(moe, norm_topk_prob=True)
    theirs, ours = logits(model)[0], logits(build(config, tensors))[0]
    assert np.abs(theirs - ours).max() <= 1e-5 * np.abs(theirs).max()


def test_routers_of_copies_are_random_small_and_the_same_again() -> None:
    model = dense(5)
    routers = [
        {
            name: np.array(t.read())
            for name, t in upcycle(model.config, tensors_of(model), moe)[1].items()
            if "gate.w" in name
        }
        for moe in (MoEConfig(), MoEConfig(top_k=1))
    ]
    assert len(routers[0]) == 3
    for name, weight in routers[0].items():
        np.testing.assert_array_equal(weight, routers[1][name])
        assert 0.1 < np.abs(weight).max() <= 64**-0.5
    first, second, third = routers[0].values()
    assert (first != second).all()
    assert (second != third).all()
    chosen = logits(build(*upcycle(model.config, tensors_of(model), MoEConfig())))[1][0].experts
    assert len(set(np.array(chosen[..., 0]).ravel().tolist())) > 1  # not every token to the same expert


@pytest.mark.parametrize("mode", LAYER_MODES)
def test_layers(mode: str) -> None:
    model = dense(4)
    config, tensors = upcycle(model.config, tensors_of(model), parse_upcycle(f"2x1@{mode}"))
    sparse = {int(name.split(".")[3]) for name in tensors if ".switch_mlp." in name}
    assert sorted(sparse) == config.text_config.sparse_layers == LAYER_MODES[mode](4)
    build(config, tensors)


def test_nothing_is_read_before_it_is_asked_for() -> None:
    def fail() -> mx.array:
        raise AssertionError

    model = dense()
    unread = {name: Tensor(t.dtype, t.shape, fail) for name, t in tensors_of(model).items()}
    for split in (False, True):
        upcycle(model.config, unread, MoEConfig(), split=split)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("split", [False, True])
def test_half_precision_stays(dtype: mx.Dtype, split: bool) -> None:
    model = dense()
    model.set_dtype(dtype)
    _, tensors = upcycle(model.config, tensors_of(model), MoEConfig(), split=split)
    for name, tensor in tensors.items():
        assert tensor.dtype == ("F32" if ".mlp.gate." in name else NAMES[dtype])
        assert (NAMES[tensor.read().dtype], tensor.read().shape) == (tensor.dtype, tensor.shape)


@pytest.mark.parametrize("split", [False, True])
def test_files_and_back(tmp_path: Path, split: bool) -> None:
    folder = tiny_folder(tmp_path / "dense", model=dense())
    config, tensors = upcycle(
        ModelConfig.load(folder), open_safetensors([folder / "model.safetensors"]), MoEConfig(), split=split
    )
    model = build(config, tensors)
    save_model(model, tmp_path / "sparse")
    written, made = logits(load_model(tmp_path / "sparse"))[0], logits(model)[0]
    # Not to the bit: a BLAS may add in another order where an array lies elsewhere in memory.
    assert np.abs(written - made).max() <= 1e-5 * np.abs(made).max()
    header = check_header(tmp_path / "sparse" / "model.safetensors")
    size = 128 // 4 if split else 128
    assert header["language_model.model.layers.0.mlp.switch_mlp.down_proj.weight"].shape == (4, 64, size)


@pytest.mark.parametrize("text", [{}, LLAMA, PHI], ids=["gemma", "llama", "phi"])
@pytest.mark.parametrize("experts", [2, 4, 8])
def test_all_shares_with_equal_weights_are_the_dense_model(experts: int, text: dict[str, Any]) -> None:
    model = dense(**text)
    moe = MoEConfig(num_experts=experts, top_k=experts, mode="dense")
    config, tensors = upcycle(model.config, tensors_of(model), moe, split=True)
    assert config.text_config.intermediate_size == 128
    assert config.text_config.moe == replace(moe, expert_size=128 // experts)
    sparse = build(config, tensors)
    for block in sparse.language_model.model.layers:
        block.mlp.gate.weight = mx.zeros_like(block.mlp.gate.weight)
    theirs, ours = logits(model)[0], logits(sparse)[0]
    assert np.abs(theirs - ours).max() <= 1e-5 * np.abs(theirs).max()


def test_a_split_model_is_as_large_as_the_dense_one() -> None:
    model = dense()
    _, tensors = upcycle(model.config, tensors_of(model), MoEConfig(), split=True)
    routers = sum(np.prod(tensor.shape) for name, tensor in tensors.items() if ".mlp.gate." in name)
    before = sum(array.size for array in named_arrays(model).values())
    assert sum(np.prod(tensor.shape) for tensor in tensors.values()) == before + routers


def grouped_ffn(hidden_size: int, size: int, groups: int) -> tuple[MLP, np.ndarray]:
    """An FFN whose neurons fire in groups, in random order, and the groups' directions [G, D]."""
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.normal(size=(hidden_size, groups)))[0].T  # [G, D]
    group = random.permutation(np.repeat(np.arange(groups), size // groups))
    config = tiny_config(moe=None, hidden_size=hidden_size, intermediate_size=size).text_config
    layer = MLP(config)
    gate = 3 * directions[group] + 0.1 * random.normal(size=(size, hidden_size))
    layer.gate_proj.weight = mx.array(gate.astype(np.float32))
    return layer, directions


def test_a_router_of_a_split_model_sends_tokens_to_the_neurons_that_fire() -> None:
    hidden_size, size, groups = 64, 128, 4
    layer, directions = grouped_ffn(hidden_size, size, groups)
    config = tiny_config(moe=None, num_hidden_layers=1)
    model = tiny_model(config=config)
    prefix = "language_model.model.layers.0.mlp."
    tensors = tensors_of(model)
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = layer[name].weight
        tensors[f"{prefix}{name}.weight"] = Tensor("F32", weight.shape, lambda weight=weight: weight)  # type: ignore[misc]
    new, tensors = upcycle(config, tensors, MoEConfig(num_experts=groups, top_k=2), split=True)
    mlp = build(new, tensors).language_model.model.layers[0].mlp

    # Tokens that drive two groups, one of them more.
    random = np.random.default_rng(1)
    pairs = np.array([random.permutation(groups)[:2] for _ in range(200)])  # [N, 2]
    x = 6 * directions[pairs[:, 0]] + 5 * directions[pairs[:, 1]] + 0.1 * random.normal(size=(200, hidden_size))
    x = mx.array(x.astype(np.float32)[None])
    trace: list[Routing] = []
    ours, theirs = mlp(x, trace), layer(x)

    gates = np.array(mlp.switch_mlp.gate_proj.weight)  # [E, F / E, D]
    own = np.argmax(gates.mean(axis=1) @ directions.T, axis=1)  # the group of each expert
    assert sorted(own.tolist()) == list(range(groups))
    chosen = own[np.array(trace[0].experts[0])]  # [N, 2]
    assert (chosen == pairs).all()
    assert np.array(trace[0].weights).min() > 0.4  # near 1 / k, as the fold of k into down_proj wants them
    error = np.linalg.norm(np.array(ours - theirs)) / np.linalg.norm(np.array(theirs))
    assert error < 0.2

    # Shares that are dealt out like cards lose half of the sum.
    order = np.arange(size).reshape(-1, groups).T.ravel()
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = mx.take(layer[name].weight, mx.array(order), axis=axis)
        shares = mx.stack(mx.split(weight, groups, axis=axis))
        mlp.switch_mlp[name].weight = shares * (2 if name == "down_proj" else 1)
    dealt = np.linalg.norm(np.array(mlp(x) - theirs)) / np.linalg.norm(np.array(theirs))
    assert error < dealt / 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4x2", MoEConfig()),
        (" 4×2 ", MoEConfig()),
        ("8X1@dense", MoEConfig(num_experts=8, top_k=1, mode="dense")),
        ("4x4@second_half", MoEConfig(top_k=4, mode="second_half")),
        ("2x1@5", MoEConfig(num_experts=2, top_k=1, mode="custom", layers_idx=(5,))),
        ("2 x 2@3,0,3", MoEConfig(num_experts=2, top_k=2, mode="custom", layers_idx=(0, 3))),
    ],
)
def test_the_option(text: str, expected: MoEConfig) -> None:
    assert parse_upcycle(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not EXPERTSxTOP_K"),
        ("4", "not EXPERTSxTOP_K"),
        ("4x", "not EXPERTSxTOP_K"),
        ("-4x2", "not EXPERTSxTOP_K"),
        ("4x2@", "not EXPERTSxTOP_K"),
        ("4x2@a b", "not EXPERTSxTOP_K"),
        ("99999x2", "not EXPERTSxTOP_K"),
        ("1x1", "at least 2 experts"),
        ("4x5", "1 to 4 of them per token"),
        ("4x0", "1 to 4 of them per token"),
        ("4x2@odd", "'odd' is not one of .*'sparse'"),
        ("4x2@custom", "'custom' is not one of"),
        ("4x2@1,,2", "not a list of layers"),
    ],
)
def test_options_that_say_nothing(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_upcycle(text)
    assert str(error.value).startswith(f"--upcycle {text!r}: ")


def test_models_that_cannot_be_upcycled() -> None:
    model = dense()
    tensors = tensors_of(model)
    ffn = "language_model.model.layers.0.mlp."

    def refused(message: str, moe: MoEConfig = SPARSE, split: bool = False, config: ModelConfig = model.config) -> None:
        with pytest.raises(UserError, match=message) as error:
            upcycle(config, tensors, moe, split=split)
        assert "\n" not in str(error.value)

    refused("--upcycle: the model has experts already", config=tiny_config())
    refused("--upcycle-split: 128 neurons cannot be dealt out to 3 experts", MoEConfig(num_experts=3), True)
    refused("--upcycle-split: cannot be combined with a residual", MoEConfig(use_residual=True), True)
    refused("--router-rank: 4 is not below the number of experts, 4", MoEConfig(router_rank=4))
    refused(r"--upcycle: layers \[1, 3\] are not all among the model's 3, 0 to 2", parse_upcycle("4x2@1,3"))
    refused("--upcycle: 'custom' chooses none", MoEConfig(mode="custom"))
    tensors[f"{ffn}up_proj.scales"] = tensors[f"{ffn}up_proj.weight"]
    refused(r"up_proj\.scales' is not of a dense FFN that is not quantized")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(ffn)}
    refused(r"--upcycle: the model has no language_model\.model\.layers\.0\.mlp\.\*")
