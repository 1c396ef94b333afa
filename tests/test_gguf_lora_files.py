"""``--to gguf-lora``: the file, what may be its base, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import raw_llama
import torch
from checkpoint_layouts import MOE_LLAVA, moe_llava_json, state_of
from checkpoints import convert, model_config
from checkpoints import reference as torch_model
from checkpoints import write as write_checkpoint
from fixtures import tiny_config, tiny_folder, tiny_model
from gguf_files import gguf_folder
from lora_adapters import IDS, LAYERS, PREFIXES, Adapter, draw
from test_gguf_text import error, reference, weights_of, write

from gm_mlx.config import MoEConfig
from gm_mlx.convert.to_gguf.lora import convert_adapter, open_base
from gm_mlx.convert.to_gguf.lora_factors import lora_targets
from gm_mlx.errors import UserError
from gm_mlx.folder import read_model_folder, write_model_folder
from gm_mlx.quant.recipes import plan


@pytest.mark.parametrize("dtype, given, stored", [
    (torch.float32, None, "F32"), (torch.float16, None, "F16"), (torch.bfloat16, None, "BF16"),
    (torch.float32, "float16", "F16"), (torch.bfloat16, "float32", "F32"),
])  # fmt: skip
def test_file(dtype: torch.dtype, given: str | None, stored: str, tmp_path: Path) -> None:
    config = tiny_config()
    weights = weights_of(config)
    adapter = draw(config, weights, ".*")
    base, out = write(tmp_path / "base", config, weights), tmp_path / "mine.gguf"
    told: list[tuple[str, int, int]] = []
    folder = adapter.write(tmp_path / "adapter", dtype, "bin")
    assert convert_adapter(folder, base, out, dtype=given, progress=lambda *x: told.append(x)) == []
    assert told[-1][1] == told[-1][2] > 0
    reader = gguf.GGUFReader(out)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "gemma4" and fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 6
    assert fields["general.name"] == "mine"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * len(lora_targets(config.text_config)) - 4  # but for embedding and head
    kinds = {tensor.tensor_type.name for name, tensor in tensors.items() if "gate_inp" not in name}
    assert kinds == {stored} and tensors["blk.1.ffn_gate_inp.weight.lora_a"].tensor_type.name == "F32"
    # What is neither a router's nor of values is the adapter's own, bit by bit.
    name = f"{PREFIXES['LLaVA']}0.self_attn.q_proj.lora_B.weight"
    own = torch.tensor(adapter.tensors[name]).to(dtype)
    if stored == "F16":
        assert np.array_equal(tensors["blk.1.attn_q.weight.lora_b"].data, own.half().numpy())
    wanted = reference(config.text_config, adapter.merged, IDS)
    assert error(raw_llama.logits(base, [IDS], [(out, 1.0)]), wanted).typical < 0.02
    assert list(tmp_path.glob(".*")) == []


def test_bases(tmp_path: Path) -> None:
    """A model folder, quantized or not, its GGUF folder and the file in it: the same adapter."""
    model = tiny_model()
    folder = tiny_folder(tmp_path / "model", model=model)
    files = gguf_folder(tmp_path / "gguf", model)
    table = plan(model.config, "q4").table
    tensors = read_model_folder(folder)
    write_model_folder(tmp_path / "small", model.config, tensors, processor=None, gm={}, card="", quantization=table)
    adapter = draw(model.config, weights_of(model.config), ".*").write(tmp_path / "adapter")
    made = []
    for base in (folder, tmp_path / "small", files, files / "model.gguf"):
        convert_adapter(adapter, base, tmp_path / "out.gguf", force=True)
        made.append((tmp_path / "out.gguf").read_bytes())
    assert len(set(made)) == 1


def test_checkpoint_as_base(tmp_path: Path) -> None:
    config = model_config("gemma", moe=MoEConfig())
    state = state_of(torch_model(config), MOE_LLAVA)
    folder = write_checkpoint(tmp_path / "whole", moe_llava_json(config, "gemma"), state)
    base = open_base(folder)
    assert base.text == convert(folder).config.text_config
    for i in base.text.sparse_layers:
        norm = state[f"model.layers.{i}.post_attention_layernorm.weight"].numpy()
        assert np.array_equal(np.array(base.norms[i].read()), 1 + norm)

    towerless = {name: tensor for name, tensor in state.items() if "tower" not in name}
    folder = write_checkpoint(tmp_path / "towerless", moe_llava_json(config, "gemma"), towerless)
    with pytest.raises(UserError, match=r"tower.*; as --base, the .gguf file"):
        open_base(folder)


def test_an_adapter_without_config_json_can_be_merged(tmp_path: Path) -> None:
    """The remedy that many errors name."""
    config = model_config("gemma")
    state = state_of(torch_model(config), MOE_LLAVA)
    base = write_checkpoint(tmp_path / "base", moe_llava_json(config, "gemma"), state)
    adapter = Adapter()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {"A": np.ones((1, 32), np.float32), "B": np.ones((64, 1), np.float32)}
    adapter.tensors = {f"{prefix}{kind}.weight": array for kind, array in factors.items()}
    made = convert(adapter.write(tmp_path / "adapter"), base=base)
    merged = np.array(made.tensors[f"{LAYERS}.0.self_attn.q_proj.weight"].read())
    assert np.allclose(merged, state["model.layers.0.self_attn.q_proj.weight"].numpy() + 6)


A, B = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
FIRST = f"{PREFIXES['LLaVA']}0."
SECOND = f"{PREFIXES['LLaVA']}1."
EXPERT = "mlp.deepspeed_moe.experts.deepspeed_experts."


def factors(module: str, down: np.ndarray = A, up: np.ndarray = B) -> dict[str, np.ndarray]:
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


Q = factors(f"{FIRST}self_attn.q_proj")
REFUSED: list[tuple[dict[str, np.ndarray], dict[str, Any], str]] = [
    (factors("base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"), {},
     r"vision_tower\S*lora_A.*of the vision tower.*merge the adapter instead: gm-mlx convert ADAPTER --base"),
    (factors("base_model.model.model.mm_projector.0"), {}, r"mm_projector\.0\.lora_A.*of the projector.*merge"),
    (factors("base_model.model.model.mm_projector.image_spatial_proj.0"), {}, "of the projector"),
    (Q | {"base_model.model.model.mm_projector.0.weight": A}, {}, r"mm_projector\.0\.weight'.*trained whole.*merge"),
    (Q | {"base_model.model.model.norm.weight": A[0], "base_model.model.lm_head.weight": A}, {},
     r"and 1 more: is no LoRA but was trained whole"),
    (Q | {f"{FIRST}self_attn.q_proj.lora_magnitude_vector": A[0]}, {}, "q_proj.*DoRA is more than a sum"),
    (factors(f"{FIRST}mlp.up_proj"), {},
     r"layers\.0\.mlp\.up_proj.*dense network where the base has experts.*--upcycle"),
    (factors(f"{SECOND}{EXPERT}0.up_proj"), {}, r"layers\.1\S*up_proj.*of experts where the base has a dense"),
    (factors(f"{SECOND}mlp.deepspeed_moe.gate.wg"), {}, r"gate\.wg.*of experts where the base has a dense"),
    (factors(f"{FIRST}{EXPERT}4.up_proj", up=np.ones((128, 2), np.float32)), {}, "the base has 4 experts"),
    (factors(f"{PREFIXES['LLaVA']}2.self_attn.q_proj"), {}, "the base has 2 layers; name the base"),
    (factors(f"{FIRST}self_attn.qkv"), {}, "qkv.*the base has no such matrix; name the base"),
    (factors(f"{FIRST}self_attn.q_proj", up=B[:63]), {}, r"\[63, 2\] and \[2, 64\] do not fit the base's \[64, 64\]"),
    (factors(f"{FIRST}self_attn.q_proj", A[:1]), {}, "do not fit"),
    (factors(f"{FIRST}self_attn.q_proj", A[:0], B[:, :0]), {}, "do not fit"),
    (factors(f"{FIRST}self_attn.q_proj", A[0]), {}, "do not fit"),
    (factors(f"{FIRST}self_attn.q_proj", A * np.nan), {}, "q_proj.*is not finite"),
    ({f"{FIRST}self_attn.q_proj.lora_A.weight": A}, {}, "the other LoRA factor is missing"),
    (Q | factors(f"{PREFIXES['transformers 5']}0.self_attn.q_proj"), {}, "has other factors for language_model"),
    ({"x": A}, {}, "'x'.*trained whole"),
    (Q, {"peft_type": "LOHA"}, "peft_type 'LOHA'"),
    (Q, {"lora_alpha": None}, "lora_alpha None is not a number"),
    (Q, {"lora_alpha": float("nan")}, "lora_alpha nan is not a number"),
    (Q, {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set"),
    (Q, {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "settings", "message"), REFUSED)
def test_refused(tensors: dict[str, np.ndarray], settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = tiny_config()
    base = write(tmp_path / "base", config, weights_of(config))
    adapter = Adapter(tensors)
    adapter.config |= settings
    out = tmp_path / "out" / "lora.gguf"
    out.parent.mkdir()
    with pytest.raises(UserError, match=message):
        convert_adapter(adapter.write(tmp_path / "adapter"), base, out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_an_embedding_that_is_the_head_is_refused(module: str, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    base = write(tmp_path / "base", config, weights_of(config))
    adapter = Adapter(factors(f"base_model.model.{module}")).write(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"{module}.*the embedding is the head too.*merge the adapter"):
        convert_adapter(adapter, base, tmp_path / "lora.gguf")


def test_what_is_no_adapter_or_no_base(tmp_path: Path) -> None:
    config = tiny_config()
    base, out = write(tmp_path / "base", config, weights_of(config)), tmp_path / "lora.gguf"
    good = Adapter(dict(Q)).write(tmp_path / "adapter")
    cut = Adapter(dict(Q)).write(tmp_path / "cut")
    file = cut / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    strengthless = Adapter(dict(Q), {"peft_type": "LORA"}).write(tmp_path / "strengthless")
    empty = tmp_path / "empty"
    empty.mkdir()
    foreign = gguf.GGUFWriter(tmp_path / "foreign.gguf", "gemma")
    foreign.write_header_to_file()
    foreign.write_kv_data_to_file()
    foreign.write_tensors_to_file()
    foreign.close()
    whole = tiny_folder(tmp_path / "whole")
    projector = write_checkpoint(tmp_path / "projector", {}, {})
    (projector / "model.safetensors").unlink()
    torch.save({"model.mm_projector.0.weight": torch.ones(1)}, projector / "mm_projector.bin")
    for adapter, under, message in [
        (cut, base, "adapter_model.safetensors"),
        (strengthless, base, "adapter_config.json: has no lora_alpha.*add it"),
        (empty, base, "config.json: not found"),
        (whole, base, "holds a whole model and no adapter"),
        (projector, base, "mm_projector.*trained whole"),
        (good, tmp_path / "nothing.gguf", "nothing.gguf"),
        (good, tmp_path / "foreign.gguf", "was not written by gm-mlx; llama.cpp's convert_lora_to_gguf.py"),
        (good, empty, "empty.*config.json.*as --base, the .gguf file"),
    ]:
        with pytest.raises(UserError, match=message):
            convert_adapter(adapter, under, out)
        assert not out.exists()


def test_where_it_is_written(tmp_path: Path) -> None:
    config = tiny_config()
    base = write(tmp_path / "base", config, weights_of(config))
    adapter = Adapter(dict(Q)).write(tmp_path / "adapter")
    out = tmp_path / "lora.gguf"
    convert_adapter(adapter, base, out)
    before = out.stat().st_ino
    for place, force, message in [
        (out, False, "exists.*--force"),
        (base, True, "is no adapter, and --force replaces nothing else"),
        (adapter, False, "an adapter is one file; name it adapter.gguf"),
        (tmp_path / "no" / "lora.gguf", False, "there is no folder .*no; make it first"),
    ]:
        with pytest.raises(UserError, match=message):
            convert_adapter(adapter, base, place, force=force)
    assert out.stat().st_ino == before
    convert_adapter(adapter, base, out, force=True)
    assert out.stat().st_ino != before


def test_values_that_float16_cannot_hold(tmp_path: Path) -> None:
    config = tiny_config()
    base = write(tmp_path / "base", config, weights_of(config))
    adapter = Adapter(factors(f"{FIRST}self_attn.v_proj", up=np.full((32, 2), 6e4, np.float32))).write(
        tmp_path / "adapter"
    )
    with pytest.raises(UserError, match=r"attn_v.weight.lora_b.*float16 cannot hold"):
        convert_adapter(adapter, base, tmp_path / "lora.gguf", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
