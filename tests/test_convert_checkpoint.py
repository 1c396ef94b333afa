"""Which files of a checkpoint's folder count, with files that PyTorch and safetensors write themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gm_mlx.convert.checkpoint import Checkpoint, open_checkpoint
from gm_mlx.errors import UserError

NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]


def state(names: list[str] = NAMES, value: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 3), value + i) for i, name in enumerate(names)}


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"model_type": "llava"})
    return tmp_path


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def save_shards(folder: Path, stem: str, suffix: str, tensors: dict[str, torch.Tensor], index: bool = True) -> None:
    """Two shards, and their index."""
    names = list(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{i:05d}-of-00002{suffix}"
        save(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    if index:
        write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def first(checkpoint: Checkpoint) -> float:
    return checkpoint.tensors[NAMES[0]].read()[0, 0].item()


def used(checkpoint: Checkpoint) -> list[str]:
    return [file.name for file in checkpoint.files]


STEMS = [("model", ".safetensors"), ("pytorch_model", ".bin")]


@pytest.mark.parametrize(("stem", "suffix"), STEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_file(folder: Path, stem: str, suffix: str, dtype: torch.dtype) -> None:
    save(folder / f"{stem}{suffix}", {name: tensor.to(dtype) for name, tensor in state().items()})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == {"model_type": "llava"}
    assert used(checkpoint) == [f"{stem}{suffix}"]
    assert sorted(checkpoint.tensors) == NAMES
    for name, tensor in state().items():
        np.testing.assert_array_equal(np.array(checkpoint.tensors[name].read().astype(mx.float32)), tensor)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(("stem", "suffix"), STEMS)
def test_shards(folder: Path, stem: str, suffix: str, index: bool) -> None:
    save_shards(folder, stem, suffix, state(), index)
    checkpoint = open_checkpoint(folder)
    assert used(checkpoint) == [f"{stem}-00001-of-00002{suffix}", f"{stem}-00002-of-00002{suffix}"]
    assert sorted(checkpoint.tensors) == NAMES


@pytest.mark.parametrize(("stem", "suffix"), STEMS)
def test_shards_with_an_index_win_over_a_single_file(folder: Path, stem: str, suffix: str) -> None:
    save_shards(folder, stem, suffix, state())
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "lm_head.weight": torch.ones(2)}
    save(folder / f"{stem}{suffix}", state(value=9) | buffers)
    checkpoint = open_checkpoint(folder)
    assert first(checkpoint) == 1
    assert len(used(checkpoint)) == 2
    save(folder / f"{stem}{suffix}", state([*NAMES[1:], "x.weight"]))
    with pytest.raises(UserError, match=re.escape(f"{stem}{suffix}: holds other tensors than") + ".* is not in it"):
        open_checkpoint(folder)


def test_safetensors_win_over_pickles(folder: Path) -> None:
    save(folder / "model.safetensors", state(value=9))
    save(folder / "pytorch_model.bin", state())
    assert first(open_checkpoint(folder)) == 9
    save(folder / "pytorch_model.bin", state() | {"x.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"pytorch_model\.bin: holds other tensors .*'x\.weight' is only in it"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")  # of no use, and not used
    assert first(open_checkpoint(folder)) == 9


def test_an_old_projector_beside_full_weights_is_ignored(folder: Path) -> None:
    save(folder / "model.safetensors", state())
    torch.save({"model.mm_projector.0.weight": torch.ones(1)}, folder / "mm_projector.bin")
    torch.save({"model.mm_projector.0.weight": torch.ones(1)}, folder / "non_lora_trainables.bin")
    checkpoint = open_checkpoint(folder)
    assert used(checkpoint) == ["model.safetensors"]
    assert checkpoint.projector == checkpoint.non_lora == checkpoint.adapter == {}


def test_stage_1(folder: Path) -> None:
    torch.save({"model.mm_projector.0.weight": torch.ones(2, 3).bfloat16()}, folder / "mm_projector.bin")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors == {}
    assert list(checkpoint.projector) == ["model.mm_projector.0.weight"]
    assert used(checkpoint) == ["mm_projector.bin"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_lora(folder: Path, name: str) -> None:
    factors = {f"base_model.model.model.x.lora_{kind}.weight": torch.ones(2, 2) for kind in "AB"}
    save(folder / name, factors)
    if name.endswith(".safetensors"):
        (folder / "adapter_model.bin").write_bytes(b"not read")
    with pytest.raises(UserError, match=r"adapter_config\.json: not found; an adapter has one"):
        open_checkpoint(folder)
    write_json(folder / "adapter_config.json", {"lora_alpha": 16, "r": 2})
    torch.save({"model.mm_projector.0.weight": torch.ones(1)}, folder / "mm_projector.bin")
    assert list(open_checkpoint(folder).projector) == ["model.mm_projector.0.weight"]
    non_lora = {"base_model.model.model.mm_projector.0.weight": torch.ones(1)}
    torch.save(non_lora, folder / "non_lora_trainables.bin")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.adapter.keys() == factors.keys()
    assert checkpoint.adapter_config == {"lora_alpha": 16, "r": 2}
    assert checkpoint.non_lora.keys() == non_lora.keys()
    assert checkpoint.projector == {}  # older than the one that was trained beside LoRA
    assert used(checkpoint) == [name, "non_lora_trainables.bin"]
    save(folder / "model.safetensors", state())
    with pytest.raises(UserError, match=rf"{re.escape(name)}: an adapter beside full weights"):
        open_checkpoint(folder)


def test_lora_inside_the_weights(folder: Path) -> None:
    names = [f"model.layers.0.mlp.fc1.{part}" for part in ("weight", "lora_A.default.weight", "lora_B.default.weight")]
    save(folder / "pytorch_model.bin", state(names))
    lora = {"lora_enable": True, "lora_alpha": 256, "lora_r": 128, "lora_bias": "none"}
    write_json(folder / "config.json", {"lora": lora})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.adapter == {}
    assert checkpoint.adapter_config == {"lora_alpha": 256, "r": 128, "bias": "none"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": None}, r"config\.json: not found; a checkpoint has a config\.json"),
        ({"config.json": ""}, r"config\.json: not valid JSON; fetch it again"),
        ({"config.json": "[" * 100_000}, r"config\.json: not valid JSON; fetch it again"),
        ({"config.json": "[1]"}, r"config\.json: not a JSON object"),
        ({}, "has no weights; a checkpoint has model.safetensors, pytorch_model.bin or shards"),
        ({"model.safetensors": ""}, r"model\.safetensors: has 0 bytes and is not a safetensors file"),
        ({"pytorch_model.bin": ""}, r"pytorch_model\.bin: has 0 bytes and is not a PyTorch file"),
        ({"mm_projector.bin": ""}, r"mm_projector\.bin: has 0 bytes and is not a PyTorch file"),
        ({"llava-q4_k.gguf": ""}, r"has no weights but llava-q4_k\.gguf: GGUF files, which cannot be converted back"),
        ({"mp_rank_00_model_states.pt": ""}, "a DeepSpeed training state; run `python zero_to_fp32.py"),
        ({"consolidated.00.pth": ""}, "weights in their maker's own layout"),
        ({"flax_model.msgpack": ""}, "Flax or TensorFlow weights"),
        ({"model.ckpt": ""}, r"save its state_dict as pytorch_model\.bin"),
        ({"weights.safetensors": ""}, r"rename them to model\.safetensors"),
        (
            {"layer_0_expert_3_mp_rank_00_model_states.pt": ""},
            "layer_0_expert_3_mp_rank.*save the model with ep_size 1",
        ),
        ({"expert_3_mp_rank_00_model_states.pt": "", "model.safetensors": ""}, "expert parallelism of DeepSpeed"),
        ({"model-00001-of-00002.safetensors": ""}, "is there without shard 2 of 2; fetch the checkpoint again"),
        (
            {"pytorch_model-00001-of-00001.bin": "", "pytorch_model-00002-of-00002.bin": ""},
            "is there without an index that says which shards belong together",
        ),
        ({"model.safetensors.index.json": "{}"}, r"index\.json: has no weight_map; fetch"),
        ({"model.safetensors.index.json": '{"weight_map": []}'}, r"index\.json: has no weight_map; fetch"),
        ({"pytorch_model.bin.index.json": "x"}, r"index\.json: not valid JSON; fetch it again"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "../b"}}'}, r"'\.\./b' is not a file name inside"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "/etc/passwd"}}'}, "is not a file name inside"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "..\\\\b"}}'}, "is not a file name inside"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": ".."}}'}, "is not a file name inside"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": 3}}'}, "3 is not a file name inside"),
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": "x", "b": "y", "c": "x"}}'},
            r"index\.json: names x and 1 more, not there; fetch the checkpoint again",
        ),
    ],
)
def test_folders_that_are_no_checkpoint(folder: Path, files: dict[str, str | None], message: str) -> None:
    for name, text in files.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_not_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=f"{path.name}: not a folder"):
            open_checkpoint(path)


@pytest.mark.parametrize(("stem", "suffix"), STEMS)
def test_a_tensor_that_no_shard_has(folder: Path, stem: str, suffix: str) -> None:
    save_shards(folder, stem, suffix, state())
    save(folder / f"{stem}-00001-of-00002{suffix}", {"other": torch.ones(1)})
    message = rf"index\.json: tensor '{NAMES[0]}' and 1 more is in none of the shards"
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(("stem", "suffix"), STEMS)
def test_a_tensor_in_two_shards(folder: Path, stem: str, suffix: str) -> None:
    save_shards(folder, stem, suffix, state())
    save(folder / f"{stem}-00002-of-00002{suffix}", state())
    with pytest.raises(UserError, match="is in another shard too"):
        open_checkpoint(folder)


QUANTIZED = [
    ("x.weight.absmax", r"4-bit \(bitsandbytes\)"),
    ("x.weight.quant_map", r"4-bit \(bitsandbytes\)"),
    ("x.weight.quant_state.bitsandbytes__nf4", r"4-bit \(bitsandbytes\)"),
    ("x.SCB", r"8-bit \(bitsandbytes\)"),
    ("x.qweight", r"quantized \(GPTQ or AWQ\)"),
    ("x.weight_packed", r"quantized \(compressed-tensors\)"),
]


@pytest.mark.parametrize(("stem", "suffix"), STEMS)
@pytest.mark.parametrize(("name", "what"), QUANTIZED)
def test_quantized_weights(folder: Path, stem: str, suffix: str, name: str, what: str) -> None:
    save(folder / f"{stem}{suffix}", {"x.weight": torch.zeros(2, 3, dtype=torch.uint8), name: torch.ones(2)})
    with pytest.raises(UserError, match=rf"tensor '{name}' .* {what}; convert the unquantized checkpoint"):
        open_checkpoint(folder)


def test_a_config_that_says_quantized(folder: Path) -> None:
    write_json(folder / "config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    save(folder / "model.safetensors", state())
    with pytest.raises(UserError, match=r"config\.json: quantization_config .* \(gptq\); convert the unquantized"):
        open_checkpoint(folder)
    # What was trained on a quantized base is not quantized itself.
    (folder / "model.safetensors").unlink()
    torch.save({"model.mm_projector.0.weight": torch.ones(1)}, folder / "mm_projector.bin")
    assert open_checkpoint(folder).projector


@pytest.mark.parametrize(("stem", "suffix"), STEMS)
def test_8_bit_floats(folder: Path, stem: str, suffix: str) -> None:
    save(folder / f"{stem}{suffix}", {"x.weight": torch.ones(2, 3).to(torch.float8_e4m3fn)})
    with pytest.raises(
        UserError, match=rf"{stem}\{suffix}: tensor 'x.weight' has dtype .*(?i:f(loat)?8_e4m3)"
    ) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)
