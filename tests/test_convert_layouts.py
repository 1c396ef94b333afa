"""The tables of names, apart from any checkpoint."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gm_mlx.convert.layouts import LAYOUTS
from gm_mlx.convert.layouts.decoders import DECODERS, PHI, QWEN, STABLELM, UNSUPPORTED, Decoder
from gm_mlx.convert.layouts.eve import EVE
from gm_mlx.convert.layouts.hf_llava import HF_LLAVA
from gm_mlx.convert.layouts.llava import LLAVA
from gm_mlx.convert.layouts.moe_llava import MOE_LLAVA
from gm_mlx.convert.layouts.towers import KNOWN_TOWERS, NAMES, STORED
from gm_mlx.source_names import renamed

EMBEDDING = "language_model.model.embed_tokens.weight"
UP = "language_model.model.layers.7.mlp.up_proj.weight"
HEAD = "language_model.lm_head.weight"
PATCHES = f"{STORED}embeddings.patch_embedding.weight"
LINEAR = "multi_modal_projector.linear_2.bias"
BLOCK = "multi_modal_projector.blocks"


@pytest.mark.parametrize(
    ("layout", "name", "new"),
    [
        (HF_LLAVA, "language_model.model.embed_tokens.weight", EMBEDDING),
        (HF_LLAVA, "model.language_model.embed_tokens.weight", EMBEDDING),
        (HF_LLAVA, "language_model.model.layers.7.mlp.up_proj.weight", UP),
        (HF_LLAVA, "model.language_model.layers.7.mlp.up_proj.weight", UP),
        (HF_LLAVA, "language_model.lm_head.weight", HEAD),
        (HF_LLAVA, "model.language_model.lm_head.weight", HEAD),
        (HF_LLAVA, "lm_head.weight", HEAD),
        (HF_LLAVA, "vision_tower.vision_model.embeddings.patch_embedding.weight", PATCHES),
        (HF_LLAVA, "vision_tower.embeddings.patch_embedding.weight", PATCHES),
        (HF_LLAVA, "model.vision_tower.vision_model.embeddings.patch_embedding.weight", PATCHES),
        (HF_LLAVA, "model.vision_tower.embeddings.patch_embedding.weight", PATCHES),
        (HF_LLAVA, "multi_modal_projector.linear_2.bias", LINEAR),
        (HF_LLAVA, "model.multi_modal_projector.linear_2.bias", LINEAR),
        (HF_LLAVA, "vision_tower.vision_model.embeddings.position_ids", None),
        (LLAVA, "model.embed_tokens.weight", EMBEDDING),
        (LLAVA, "model.layers.7.mlp.up_proj.weight", UP),
        (LLAVA, "lm_head.weight", HEAD),
        (LLAVA, "model.mm_projector.2.bias", LINEAR),
        (LLAVA, "mm_projector.2.bias", LINEAR),
        (LLAVA, "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight", PATCHES),
        (LLAVA, "model.mm_projector.model.mlp.3.bias", LINEAR),
        (LLAVA, "model.mm_projector.mlp.mlp.2.bias", LINEAR),
        (LLAVA, "model.mm_projector.model.mb_block.1.block.0.0.weight", f"{BLOCK}.0.depthwise.weight"),
        (LLAVA, "model.mm_projector.model.mb_block.2.block.1.fc2.bias", f"{BLOCK}.1.squeeze.fc2.bias"),
        (LLAVA, "model.mm_projector.peg.peg.0.weight", "multi_modal_projector.peg.weight"),
        (LLAVA, "model.layers.7.self_attn.rotary_emb.inv_freq", None),
        (MOE_LLAVA, "model.mm_projector.image_spatial_proj.2.bias", LINEAR),
        (MOE_LLAVA, "model.image_tower.image_tower.vision_model.embeddings.patch_embedding.weight", PATCHES),
        (MOE_LLAVA, "model.layers.7.mlp.up_proj.weight", UP),
        # Qwen, whose tower and projector are inside its transformer
        (LLAVA, "transformer.mm_projector.2.bias", LINEAR),
        (MOE_LLAVA, "transformer.mm_projector.image_spatial_proj.2.bias", LINEAR),
        (MOE_LLAVA, "transformer.image_tower.image_tower.vision_model.embeddings.patch_embedding.weight", PATCHES),
        (
            MOE_LLAVA,
            "transformer.h.7.mlp.deepspeed_moe.experts.deepspeed_experts.3.w1.weight",
            "language_model.transformer.h.7.mlp.experts.3.w1.weight",
        ),
        (
            MOE_LLAVA,
            "model.layers.7.mlp.deepspeed_moe.gate.wg.weight",
            "language_model.model.layers.7.mlp.gate.weight",
        ),
        (
            MOE_LLAVA,
            "model.layers.7.mlp.deepspeed_moe.experts.deepspeed_experts.3.up_proj.weight",
            "language_model.model.layers.7.mlp.experts.3.up_proj.weight",
        ),
        (EVE, "model.mm_projector.image_spatial_proj.model.mlp.3.bias", LINEAR),
        (
            EVE,
            "model.mm_projector.image_spatial_proj.model.mb_block.2.block.2.1.weight",
            f"{BLOCK}.1.norm_2.weight",
        ),
        (EVE, "model.image_tower.blocks.3.attn.qkv.bias", f"{STORED}encoder.layers.3.self_attn.qkv.bias"),
        (EVE, "model.image_tower.norm.weight", f"{STORED}post_layernorm.weight"),
        (EVE, "model.image_tower.attn_pool.latent", None),
        (EVE, "model.image_tower.image_tower.vision_model.embeddings.patch_embedding.weight", PATCHES),
        (MOE_LLAVA, "model.layers.7.mlp.mlp.up_proj.weight", "language_model.model.layers.7.mlp.mlp.up_proj.weight"),
        (MOE_LLAVA, "model.layers.7.mlp.coefficient.bias", "language_model.model.layers.7.mlp.coefficient.bias"),
    ],
)
def test_names(layout: object, name: str, new: str | None) -> None:
    assert isinstance(layout, type(LLAVA))
    assert renamed(name, layout.names) == new


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.title)
@given(st.text(max_size=60))
def test_a_table_never_fails_otherwise_than_by_not_knowing_a_name(layout: object, name: str) -> None:
    assert isinstance(layout, type(LLAVA))
    try:
        new = renamed(name, layout.names)
    except KeyError:
        return
    assert new is None or new.startswith(("vision_tower.", "multi_modal_projector.", "language_model."))


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["model.multi_modal_projector.linear_1.weight", "lm_head.weight"], HF_LLAVA),
        (["model.mm_projector.0.weight", "model.embed_tokens.weight"], LLAVA),
        (["model.mm_projector.image_spatial_proj.0.weight"], MOE_LLAVA),
        (["transformer.mm_projector.image_spatial_proj.0.weight"], MOE_LLAVA),
        (["transformer.mm_projector.0.weight"], LLAVA),
        # LLaVA's projector with DeepSpeed's experts
        (["model.mm_projector.0.weight", "model.layers.0.mlp.deepspeed_moe.gate.wg.weight"], MOE_LLAVA),
        # MobileVLM
        (["model.mm_projector.model.mlp.1.weight", "model.mm_projector.peg.peg.0.bias"], LLAVA),
        # Eve, whose other names are MoE-LLaVA's
        (["model.layers.0.mlp.gate_proj2.weight", "model.layers.0.mlp.deepspeed_moe.gate.wg.weight"], EVE),
        (["model.layers.20.attn_linear.0.weight", "model.mm_projector.image_spatial_proj.0.weight"], EVE),
        (["model.embed_tokens.weight", "lm_head.weight"], None),
        (["vision_model.embeddings.class_embedding"], None),
    ],
)
def test_layouts_are_told_apart_by_their_tensors(names: list[str], layout: object) -> None:
    assert next((each for each in LAYOUTS if each.matches(names)), None) is layout


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("vision_model.pre_layrnorm.bias", f"{STORED}pre_layrnorm.bias"),
        ("encoder.layers.2.mlp.fc1.bias", f"{STORED}encoder.layers.2.mlp.fc1.bias"),
        ("vision_model.head.probe", f"{STORED}head.probe"),
        ("vision_model.embeddings.position_ids", None),
        ("text_model.embeddings.token_embedding.weight", None),
        ("text_model.embeddings.position_ids", None),
        ("visual_projection.weight", None),
        ("logit_scale", None),
    ],
)
def test_names_in_a_tower_s_own_folder(name: str, new: str | None) -> None:
    assert renamed(name, NAMES) == new


@pytest.mark.parametrize(
    ("decoder", "name", "new"),
    [
        (PHI, "model.layers.7.self_attn.dense.bias", "model.layers.7.self_attn.o_proj.bias"),
        (PHI, "model.final_layernorm.bias", "model.norm.bias"),
        (PHI, "model.layers.7.mlp.experts.3.fc1.bias", "model.layers.7.mlp.experts.3.fc1.bias"),
        (QWEN, "transformer.wte.weight", "model.embed_tokens.weight"),
        (QWEN, "transformer.ln_f.weight", "model.norm.weight"),
        (QWEN, "transformer.h.7.attn.c_attn.bias", "model.layers.7.self_attn.qkv.bias"),
        (QWEN, "transformer.h.7.mlp.w1.weight", "model.layers.7.mlp.up_proj.weight"),
        (QWEN, "transformer.h.7.mlp.w2.weight", "model.layers.7.mlp.gate_proj.weight"),
        (QWEN, "transformer.h.7.mlp.experts.3.w2.weight", "model.layers.7.mlp.experts.3.gate_proj.weight"),
        (QWEN, "transformer.h.7.mlp.mlp.c_proj.weight", "model.layers.7.mlp.mlp.down_proj.weight"),
        (QWEN, "transformer.h.7.mlp.coefficient.bias", "model.layers.7.mlp.coefficient.bias"),
        (QWEN, "lm_head.weight", "lm_head.weight"),
        (STABLELM, "model.layers.7.input_layernorm.bias", "model.layers.7.input_layernorm.bias"),
    ],
)
def test_names_of_decoders(decoder: Decoder, name: str, new: str) -> None:
    assert renamed(f"language_model.{name}", decoder.names) == f"language_model.{new}"


@pytest.mark.parametrize("name", ["transformer.rotary_emb.inv_freq", "transformer.h.0.attn.masked_bias"])
@pytest.mark.parametrize("layout", [LLAVA, MOE_LLAVA], ids=lambda layout: layout.title)
def test_buffers_have_no_place(layout: object, name: str) -> None:
    assert isinstance(layout, type(LLAVA))
    assert renamed(name, layout.names) is None


def test_every_decoder_says_all_that_text_config_needs() -> None:
    for decoder in DECODERS:
        assert decoder.keys.keys() <= decoder.defaults.keys()
        assert (decoder.bias is None) == ("attention_bias" in decoder.fixed)
        assert set(decoder.older) <= set(decoder.keys.values())
        assert not decoder.keys.keys() & decoder.fixed.keys()


@pytest.mark.parametrize(
    ("model_type", "title"),
    [
        ("stablelm", None),
        ("stablelm_epoch", None),
        ("qwen", None),
        ("qwen1_5", None),
        ("qwen2", None),
        ("qwen2_moe", "Qwen3 or a newer Qwen"),
        ("qwen3", "Qwen3 or a newer Qwen"),
        ("phi", None),
        ("phi3", "Phi-3"),
        ("minicpm", "MiniCPM"),
        ("mpt", "MPT"),
        ("next", "LLaVA-1.6 (any resolution)"),
        ("llama", None),
        ("mobilevlm", None),
        ("zhizi", None),
        ("gemma", None),
        ("gemma2", None),
    ],
)
def test_unsupported_families_are_known_by_name(model_type: str, title: str | None) -> None:
    found = next((other.title for other in UNSUPPORTED if re.fullmatch(other.model_type, model_type)), None)
    assert found == title
    assert (title is None and model_type != "gemma2") == any(
        re.fullmatch(each.model_type, model_type) for each in DECODERS
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("clip-vit-large-patch14-336", 336),
        ("clip-vit-large-patch14", 224),
        ("clip-vit-base-patch16", 224),
        ("siglip-so400m-patch14-384", 384),
        ("siglip2-so400m-patch16-512", 512),
        ("siglip-base-patch16-224", 224),
        ("siglip2-so400m-patch16-naflex", None),
        ("CLIP-ViT-H-14-laion2B-s32B-b79K", None),
    ],
)
def test_known_towers(name: str, size: int | None) -> None:
    matches = [(tower, match) for tower in KNOWN_TOWERS if (match := re.fullmatch(tower.name, name))]
    assert len(matches) == (size is not None)
    for tower, match in matches:
        assert (int(match[1]) if match[1] else tower.image_size) == size
