"""Projectors and adapters that are put on their language model: stage 1 and LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import (
    LANGUAGE_MODEL,
    LLAVA,
    MOE_LLAVA,
    TOWER_IDS,
    Table,
    llava_json,
    moe_llava_json,
    state_of,
    text_json,
)
from checkpoints import TOLERANCE, convert, largest_error, model_config, reference, write, write_tower

from gm_mlx.config import MoEConfig
from gm_mlx.convert.checkpoint import open_checkpoint
from gm_mlx.convert.towers import missing_tower
from gm_mlx.errors import UserError


@pytest.mark.parametrize(("family", "table"), [("gemma", LLAVA), ("llama", MOE_LLAVA)])
def test_stage_1(tmp_path: Path, family: str, table: Table) -> None:
    config = model_config(family)
    model = reference(config, family)
    base = write_base(tmp_path, model, family)
    vision = write_tower(tmp_path / "tower", model, whole=True)
    folder = write(tmp_path / "stage1", (llava_json if table is LLAVA else moe_llava_json)(config, family), {})
    (folder / "model.safetensors").unlink()
    projector = {name: tensor for name, tensor in state_of(model, table).items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")
    (folder / "tokenizer.model").unlink()  # the base has one

    translation = convert(folder, base=base, vision=vision)
    assert largest_error(translation, model) <= TOLERANCE
    assert translation.processor.template.name == "plain"
    assert len(translation.files) == 3
    with pytest.raises(UserError, match=r"holds a projector and no language model.*--base"):
        convert(folder, vision=vision)
    assert missing_tower(open_checkpoint(folder)) == TOWER_IDS["clip"]


def test_lora_with_its_projector(tmp_path: Path) -> None:
    """LLaVA's folder: adapter_model, and the projector with peft's prefix in non_lora_trainables."""
    config = model_config("llama")
    model = reference(config, "llama")
    base = write_base(tmp_path, model, "llama")
    vision = write_tower(tmp_path / "tower", model, whole=False)
    folder = write(tmp_path / "llava-lora", llava_json(config, "llama"), {})
    (folder / "model.safetensors").unlink()
    projector = {name: tensor for name, tensor in state_of(model, LLAVA).items() if "mm_projector" in name}
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in projector.items()}
    torch.save(prefixed, folder / "non_lora_trainables.bin")
    adapter = {}
    for layer in range(config.text_config.num_hidden_layers):
        down, up = torch.randn(2, 32), torch.randn(32, 2)
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        adapter |= {f"{prefix}A.weight": down, f"{prefix}B.weight": up}
        with torch.no_grad():
            model.model.language_model.layers[layer].self_attn.q_proj.weight += 8 / 2 * up @ down
    torch.save(adapter, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))

    translation = convert(folder, base=base, vision=vision)
    assert largest_error(translation, model) <= TOLERANCE
    assert translation.processor.template.name == "v1"
    with pytest.raises(UserError, match=r"holds an adapter and no language model.*--base"):
        convert(folder, vision=vision)


def test_lora_inside_the_experts(tmp_path: Path) -> None:
    """MoE-LLaVA saves the model as peft has wrapped it, factors beside the weights."""
    config = model_config("llama", moe=MoEConfig())
    model = reference(config, "llama")
    state = state_of(model, MOE_LLAVA)
    for layer in config.text_config.sparse_layers:
        for expert, ffn in enumerate(model.model.language_model.layers[layer].mlp.experts):
            down, up = torch.randn(2, 32), torch.randn(64, 2)
            prefix = f"model.layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.up_proj."
            state |= {f"{prefix}lora_A.default.weight": down, f"{prefix}lora_B.default.weight": up}
            with torch.no_grad():
                ffn.up_proj.weight += 4 / 2 * up @ down
    lora = {"lora_enable": True, "lora_r": 2, "lora_alpha": 4, "lora_bias": "none"}
    write(tmp_path, moe_llava_json(config, "llama", lora=lora), state, "bin")
    assert largest_error(convert(tmp_path), model) <= TOLERANCE


def write_base(folder: Path, model: Any, family: str) -> Path:
    state = {n: t for n, t in state_of(model, LANGUAGE_MODEL_ONLY).items() if not n.startswith("-")}
    return write(folder / "base", text_json(model_config(family), family), state)


LANGUAGE_MODEL_ONLY: Table = [*LANGUAGE_MODEL, (r"(.*)", r"-\1")]
