"""Whole checkpoints of every layout and file format, from PyTorch's files to the same logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import (
    HF_MIXED,
    HF_OLD,
    LLAVA,
    MOE_LLAVA,
    TOWER_IDS,
    Table,
    llava_json,
    moe_llava_json,
    moe_llava_names,
    state_of,
)
from checkpoints import (
    FAMILIES,
    TOLERANCE,
    convert,
    edit_config,
    largest_error,
    model_config,
    reference,
    write,
    write_hf,
)
from PIL import Image
from tiny_tokenizer import write_sentencepiece

import gm_mlx
from gm_mlx.config import MoEConfig
from gm_mlx.convert.checkpoint import open_checkpoint
from gm_mlx.convert.translate import translate
from gm_mlx.folder import write_model_folder
from gm_mlx.tensors import Tensor

SPARSE = MoEConfig()


# Hugging Face


@pytest.mark.parametrize("original", [True, False], ids=["old names", "new names"])
@pytest.mark.parametrize("family", ["gemma", "llama", "mistral", "qwen1_5", "stablelm", "phi"])
def test_hugging_face_as_transformers_5_writes_it(tmp_path: Path, family: str, original: bool) -> None:
    config = model_config(family)
    model = reference(config, family)
    write_hf(tmp_path, model, save_original_format=original)
    translation = convert(tmp_path)
    assert translation.config == config
    assert largest_error(translation, model) <= TOLERANCE
    assert translation.provenance["vision_source"] == "checkpoint"
    assert translation.files == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("table", [HF_OLD, HF_MIXED], ids=["transformers 4.37", "mixed"])
def test_hugging_face_with_other_prefixes(tmp_path: Path, table: Table) -> None:
    config = model_config("llama")
    model = reference(config, "llama")
    model.config.save_pretrained(tmp_path)
    write(tmp_path, None, state_of(model, table))
    write_sentencepiece(tmp_path)
    assert largest_error(convert(tmp_path), model) <= TOLERANCE


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_hugging_face_with_siglip(tmp_path: Path, strategy: Any) -> None:
    """SigLIP has no class token; "default" drops its first patch, as Hugging Face does."""
    config = model_config(tower="siglip", vision_feature_layer=-1, vision_feature_select_strategy=strategy)
    model = reference(config)
    write_hf(tmp_path, model)
    translation = convert(tmp_path)
    assert translation.config == config
    assert translation.processor.tokens_per_image == (3 if strategy == "default" else 4)
    assert largest_error(translation, model) <= TOLERANCE


def test_a_sparse_config_is_completed_as_transformers_does(tmp_path: Path) -> None:
    config = model_config("gemma")
    model = reference(config)
    write_hf(tmp_path, model)
    edit_config(tmp_path, lambda c: [c["text_config"].pop(key) for key in ("rms_norm_eps", "rope_parameters")])
    edit_config(tmp_path, lambda c: [c["text_config"].pop(key) for key in ("hidden_act", "tie_word_embeddings")])
    edit_config(tmp_path, lambda c: [c["vision_config"].pop(key) for key in ("hidden_act", "layer_norm_eps")])
    assert convert(tmp_path).config.text_config == config.text_config
    assert largest_error(convert(tmp_path), model) <= TOLERANCE


@pytest.mark.parametrize(
    ("version", "scaled", "noted"),
    [
        ("4.38.2", True, False),
        ("5.3.0", True, False),
        ("5.4.0.dev0", False, True),
        ("5.24.0", False, True),
        (None, True, False),
    ],
)
def test_gemma_scales_image_features_as_its_version_did(
    tmp_path: Path, version: str | None, scaled: bool, noted: bool
) -> None:
    write_hf(tmp_path, reference(model_config()))
    edit_config(tmp_path, lambda c: c.update(transformers_version=version))
    translation = convert(tmp_path)
    assert translation.config.scale_image_features is scaled
    assert any("--scale-image-features" in note for note in translation.notes) is noted
    for chosen in (True, False):
        assert convert(tmp_path, scale_image_features=chosen).config.scale_image_features is chosen


def test_gemma_s_gelu_is_the_tanh_one(tmp_path: Path) -> None:
    write_hf(tmp_path, reference(model_config()))
    edit_config(tmp_path, lambda c: c["text_config"].update(hidden_act="gelu", hidden_activation=None))
    translation = convert(tmp_path)
    assert translation.config.text_config.hidden_act == "gelu_pytorch_tanh"
    assert translation.provenance["activation"] == {"config": "gelu", "used": "gelu_pytorch_tanh"}
    assert any("tanh" in note for note in translation.notes)


def test_a_sliding_window_limits_the_context(tmp_path: Path) -> None:
    write_hf(tmp_path, reference(model_config("mistral"), "mistral"))
    edit_config(tmp_path, lambda c: c["text_config"].update(sliding_window=256))
    translation = convert(tmp_path)
    assert translation.config.text_config.max_position_embeddings == 256
    assert any("256" in note for note in translation.notes)


def test_a_llama_with_attention_biases(tmp_path: Path) -> None:
    config = model_config("llama")
    config = replace(config, text_config=replace(config.text_config, attention_bias="all"))
    model = reference(config, "llama")
    write_hf(tmp_path, model)
    assert convert(tmp_path).config == config
    assert largest_error(convert(tmp_path), model) <= TOLERANCE


# LLaVA and MoE-LLaVA


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_original_llava_with_its_tower(tmp_path: Path, family: str) -> None:
    config = model_config(family)
    model = reference(config, family)
    write(tmp_path, llava_json(config, family), state_of(model, LLAVA), "bin")
    translation = convert(tmp_path)
    assert translation.config.text_config == config.text_config
    assert translation.config.vision_config == config.vision_config
    assert translation.config.scale_image_features is (family == "gemma")
    assert translation.provenance["vision_model"] == TOWER_IDS["clip"]
    assert largest_error(translation, model) <= TOLERANCE


def test_a_gemma_that_calls_itself_llama(tmp_path: Path) -> None:
    config = model_config()
    model = reference(config)
    changes = {"architectures": ["LlavaLlamaForCausalLM"], "hidden_act": "gelu", "tie_word_embeddings": True}
    write(tmp_path, llava_json(config, "gemma", model_type="llava_llama", **changes), state_of(model, LLAVA))
    translation = convert(tmp_path)
    assert translation.provenance["decoder"] == "Gemma"
    assert any("Gemma's" in note for note in translation.notes)
    assert largest_error(translation, model) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("moe", [SPARSE, MoEConfig(2, 1, norm_topk_prob=False), MoEConfig(use_residual=True)],
                         ids=["top-2 of 4", "top-1 of 2", "residual"])  # fmt: skip
def test_moe_llava(tmp_path: Path, family: str, moe: MoEConfig) -> None:
    config = model_config(family, moe=moe)
    model = reference(config, family)
    write(tmp_path, moe_llava_json(config, family), state_of(model, moe_llava_names(family)))
    translation = convert(tmp_path)
    assert translation.config.text_config == config.text_config
    assert not translation.notes
    assert largest_error(translation, model) <= TOLERANCE


@pytest.mark.parametrize("mode", ["first_half", "second_half", "dense", "custom"])
def test_moe_llava_finds_the_sparse_layers(tmp_path: Path, mode: Any) -> None:
    config = model_config(moe=MoEConfig(mode=mode, layers_idx=(1,) if mode == "custom" else ()))
    model = reference(config)
    # Whether the list of layers is there or not, the tensors show them.
    write(tmp_path, moe_llava_json(config, "gemma", moe_layers_idx=None), state_of(model, MOE_LLAVA))
    assert convert(tmp_path).config.text_config.sparse_layers == config.text_config.sparse_layers
    assert largest_error(convert(tmp_path), model) <= TOLERANCE


def test_moe_llava_before_its_experts_is_dense(tmp_path: Path) -> None:
    config = model_config("llama")
    model = reference(config, "llama")
    write(tmp_path, moe_llava_json(config, "llama"), state_of(model, MOE_LLAVA))
    assert convert(tmp_path).config.text_config.moe is None
    assert largest_error(convert(tmp_path), model) <= TOLERANCE


@pytest.mark.parametrize(("feature", "tokens"), [("patch", 3), ("cls_patch", 4)])
def test_moe_llava_with_siglip(tmp_path: Path, feature: str, tokens: int) -> None:
    strategy: Any = "default" if feature == "patch" else "full"
    config = model_config(tower="siglip", moe=SPARSE, vision_feature_select_strategy=strategy)
    model = reference(config)
    changes = {"mm_vision_select_feature": feature}
    write(tmp_path, moe_llava_json(config, "gemma", "siglip", **changes), state_of(model, MOE_LLAVA))
    translation = convert(tmp_path)
    assert translation.processor.tokens_per_image == tokens
    assert translation.config.vision_config == config.vision_config
    assert largest_error(translation, model) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_every_file_format_and_dtype(tmp_path: Path, file: str, dtype: torch.dtype) -> None:
    config = model_config(moe=SPARSE)
    model = reference(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    state = {name: tensor.to(dtype) for name, tensor in state_of(model, MOE_LLAVA).items()}
    write(tmp_path, moe_llava_json(config, "gemma"), state, file)
    translation = convert(tmp_path)
    assert {tensor.dtype for tensor in translation.tensors.values()} == {STORED_AS[dtype]}
    assert largest_error(translation, model) <= TOLERANCE


STORED_AS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def test_a_copied_head_is_dropped(tmp_path: Path) -> None:
    config = model_config(moe=SPARSE)
    state = state_of(reference(config), MOE_LLAVA)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    write(tmp_path, moe_llava_json(config, "gemma"), state)
    translation = convert(tmp_path)
    assert translation.config.text_config.tie_word_embeddings
    assert not any("lm_head" in name for name in translation.tensors)


def test_buffers_are_left_out(tmp_path: Path) -> None:
    config = model_config("llama")
    model = reference(config, "llama")
    state = state_of(model, LLAVA)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    write(tmp_path, llava_json(config, "llama"), state, "bin")
    assert largest_error(convert(tmp_path), model) <= TOLERANCE


@pytest.mark.parametrize("layout", ["Hugging Face LLaVA", "LLaVA", "MoE-LLaVA"])
def test_a_converted_model_answers(tmp_path: Path, layout: str) -> None:
    """All the way: translated, written, loaded, asked. Padding and template are those of the checkpoint."""
    config = model_config(moe=SPARSE if layout == "MoE-LLaVA" else None)
    model = reference(config)
    folder = tmp_path / "source"
    if layout == "Hugging Face LLaVA":
        write_hf(folder, model)
    elif layout == "LLaVA":
        write(folder, llava_json(config, "gemma"), state_of(model, LLAVA))
    else:
        write(folder, moe_llava_json(config, "gemma"), state_of(model, MOE_LLAVA))
    translation = convert(folder)
    assert translation.provenance["layout"] == layout
    assert translation.provenance["template"] == "gemma"
    assert translation.provenance["image_mode"] == ("crop" if layout == "Hugging Face LLaVA" else "pad")
    out = tmp_path / "out"
    write_model_folder(
        out,
        translation.config,
        translation.tensors,
        processor=translation.processor,
        gm=translation.provenance,
        card="",
    )
    answer = gm_mlx.load(str(out)).chat("What is it?", images=[Image.new("RGB", (40, 20), "red")], max_tokens=5)
    assert answer.stats.generated_tokens
    assert answer.stats.image_tokens == config.num_image_tokens


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    config = model_config(moe=SPARSE)
    write(tmp_path, moe_llava_json(config, "gemma"), state_of(reference(config), MOE_LLAVA))
    checkpoint = open_checkpoint(tmp_path)
    reads = []

    def counted(name: str, tensor: Tensor) -> Tensor:
        return Tensor(tensor.dtype, tensor.shape, lambda: (reads.append(name), tensor.read())[1])

    checkpoint.tensors = {name: counted(name, tensor) for name, tensor in checkpoint.tensors.items()}
    translation = translate(checkpoint)
    assert not reads
    translation.tensors["language_model.model.layers.0.mlp.switch_mlp.up_proj.weight"].read()
    prefix = "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts"
    assert reads == [f"{prefix}.{expert}.up_proj.weight" for expert in range(4)]
