"""Checkpoints that must be refused, in one line that says what is wrong and where."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import LLAVA, MOE_LLAVA, llava_json, moe_llava_json, state_of
from checkpoints import convert, edit_config, model_config, reference, write, write_hf

from gm_mlx.config import MoEConfig
from gm_mlx.errors import UserError

SPARSE = MoEConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="paligemma"), r'config.json: model_type is "paligemma"'),
        (
            lambda c: c.update(vision_feature_layer=[-2, -5]),
            r"vision_feature_layer is \[-2, -5\] and not a whole number",
        ),
        (lambda c: c.update(multimodal_projector_bias=False), "multimodal_projector_bias is false"),
        (
            lambda c: c["text_config"].update(model_type="gemma2"),
            "text_config.model_type is 'gemma2', which is not supported",
        ),
        (lambda c: c["text_config"].update(mlp_bias=True), "text_config.mlp_bias is true"),
        (lambda c: c["text_config"].update(vocab_size=80), "text_config.vocab_size is 80 where"),
        (
            lambda c: c["text_config"]["rope_parameters"].update(rope_type="llama3"),
            "text_config.rope_parameters is of type 'llama3'",
        ),
        (
            lambda c: c["text_config"].pop("num_hidden_layers"),
            "num_hidden_layers is 32 where the tensors are those of 3",
        ),
        (lambda c: c["vision_config"].update(model_type="pixtral"), "vision_config.model_type is 'pixtral', a tower"),
        (lambda c: c["vision_config"].update(patch_size=7), r"wrong \(vision_tower.*position_embedding"),
        (lambda c: c.update(text_config=[]), r"text_config is \[\] and not a table"),
        (lambda c: c.update(projector_hidden_act="relu"), "projector_hidden_act: activation 'relu'"),
    ],
)
def test_a_hugging_face_config_that_cannot_be_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    model = hugging_face_llama()
    write_hf(tmp_path, model)
    edit_config(tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        convert(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@functools.cache
def hugging_face_llama() -> Any:
    return reference(model_config("llama"), "llama")


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    config = model_config("llama")
    settings, state = llava_json(config, "llama"), state_of(hugging_face_llama(), LLAVA)
    del settings["tie_word_embeddings"], state["lm_head.weight"]
    write(tmp_path, settings, state)
    with pytest.raises(UserError, match=r"tie_word_embeddings is false but the checkpoint has no lm_head.weight"):
        convert(tmp_path)


def rename_in(state: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in list(state):
        if old in name:
            state[name.replace(old, new)] = state.pop(name)


WG = "model.layers.2.mlp.deepspeed_moe.gate.wg.weight"
EXPERTS = "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts"
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]
BROKEN: dict[str, tuple[Change, str]] = {
    "no router": (lambda c, s: s.pop(WG), r"config.json: moe.num_experts is 4 but layer 2 has no router"),
    "router of another size": (
        lambda c, s: s.update({WG: torch.zeros(3, 32)}),
        "moe.num_experts is 4 where the router of layer 2 has 3 rows",
    ),
    "one expert too few": (
        lambda c, s: [s.pop(f"{EXPERTS}.3.{part}_proj.weight") for part in ("gate", "up", "down")],
        r"moe.num_experts is 4 where layer 0 has .*_proj.weight of experts \[0, 1, 2\]",
    ),
    "half an expert": (
        lambda c, s: s.pop(f"{EXPERTS}.1.up_proj.weight"),
        r"moe.num_experts is 4 where layer 0 has up_proj.weight of experts \[0, 2, 3\]",
    ),
    "a router and no experts": (
        lambda c, s: [s.pop(name) for name in list(s) if EXPERTS in name],
        "layer 0 has a router and no experts",
    ),
    "other number of experts": (
        lambda c, s: c["moe"].update(num_experts=[8, 8]),
        "moe.num_experts is 8 where the router of layer 0 has 4 rows",
    ),
    "differing numbers of experts": (lambda c, s: c["moe"].update(num_experts=[4, 2]), r"num_experts is \[4, 2\]"),
    "a number too many": (lambda c, s: c["moe"].update(num_experts=[4, 4, 4]), "num_experts has 3 entries for 2"),
    "not a number": (lambda c, s: c["moe"].update(num_experts="four"), "num_experts is 'four' and not a list"),
    "DynMoE": (lambda c, s: c["moe"].update(top_k_experts=-1), "moe.top_k_experts is -1: DynMoE"),
    "more than there are": (lambda c, s: c["moe"].update(top_k_experts=5), "moe.top_k_experts is 5 of 4 experts"),
    "other layers": (
        lambda c, s: c["moe"].update(moe_layers_idx=[0, 1]),
        r"moe_layers_idx is \[0, 1\] where .*\[0, 2\]",
    ),
    "residual without": (
        lambda c, s: c["moe"].update(use_residual=True),
        "use_residual is true but layer 0 has no coeff",
    ),
    "no table moe": (lambda c, s: c.pop("moe"), "moe is missing, with num_experts and top_k_experts"),
    "moe without experts": (
        lambda c, s: [s.pop(name) for name in list(s) if "deepspeed_moe" in name],
        "moe.moe_enable is true but the checkpoint has no experts",
    ),
    "projector of three": (
        lambda c, s: c.update(image_projector_type="mlp3x_gelu"),
        r'image_projector_type is "mlp3x_gelu", which this version cannot convert; it converts "mlp2x_gelu"',
    ),
    "image markers": (lambda c, s: c.update(mm_use_im_start_end=True), "mm_use_im_start_end is true"),
    "any resolution": (lambda c, s: c.update(image_aspect_ratio="anyres"), 'image_aspect_ratio is "anyres"'),
    "LLaVA-1.6": (lambda c, s: s.update({"model.image_newline": torch.zeros(32)}), r"LLaVA-1.6 .* is not supported by"),
    "unknown tensor": (
        lambda c, s: s.update({"model.layers.1.mlp.extra.weight": torch.zeros(2, 2)}),
        r"1 not part of the model \(language_model.model.layers.1.mlp.extra.weight\)",
    ),
    "unknown part": (lambda c, s: s.update({"my.adapter": torch.zeros(2)}), r"1 tensors are not part of .*my.adapter"),
    "missing tensor": (
        lambda c, s: s.pop("model.layers.1.mlp.up_proj.weight"),
        r"1 missing \(language_model.model.layers.1.mlp.up_proj.weight\)",
    ),
    "missing layer of the tower": (
        lambda c, s: s.pop("model.image_tower.image_tower.vision_model.encoder.layers.1.mlp.fc1.weight"),
        r"1 missing \(vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight\)",
    ),
    "no projector": (
        lambda c, s: [s.pop(name) for name in list(s) if "mm_projector" in name],
        "4 missing .multi_modal_projector.linear_1.bias",
    ),
    "a language model": (
        lambda c, s: [s.pop(name) for name in list(s) if "layers.1." not in name or "tower" in name],
        "no tensor in it is a projector's",
    ),
    "vocabulary": (lambda c, s: c.update(vocab_size=80), r"vocab_size is 80 where .*embed_tokens.weight has 512 rows"),
    "hidden size": (lambda c, s: c.update(hidden_size=64), r"hidden_size is 64 where .* has 32 columns"),
    "FFN": (lambda c, s: c.update(intermediate_size=8), r"intermediate_size is 8 where .*gate_proj.weight has 64 rows"),
    "heads": (lambda c, s: c.update(num_attention_heads=8), r"num_attention_heads x head_dim is 128 .* has 64 rows"),
    "key heads": (lambda c, s: c.update(num_key_value_heads=4), r"num_key_value_heads x head_dim is 64 .* has 32 rows"),
    "layers": (lambda c, s: c.update(num_hidden_layers=4), "num_hidden_layers is 4 where the tensors are those of 3"),
    "type of a value": (
        lambda c, s: c.update(num_hidden_layers="3"),
        "num_hidden_layers is '3' and not a whole number",
    ),
    "scaled RoPE": (
        lambda c, s: c.update(rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_scaling is of type 'linear'",
    ),
    "another head": (
        lambda c, s: s.update({"lm_head.weight": torch.zeros(512, 32)}),
        "tie_word_embeddings is true but lm_head.weight is not the embedding",
    ),
    "no head": (
        lambda c, s: c.update(tie_word_embeddings=False),
        "tie_word_embeddings is false but the checkpoint has no lm_head.weight",
    ),
    "twice": (
        lambda c, s: s.update({"mm_projector.image_spatial_proj.0.bias": torch.zeros(32)}),
        "are the same part of a model",
    ),
    "selected feature": (lambda c, s: c.update(mm_vision_select_feature="cls"), "mm_vision_select_feature is 'cls'"),
    "selected layer": (lambda c, s: c.update(mm_vision_select_layer=-9), "vision_feature_layer: -9 is outside"),
    "tower of another size": (
        lambda c, s: c.update(mm_image_tower="openai/clip-vit-large-patch14-336"),
        "mm_image_tower is 'openai/clip-vit-large-patch14-336', but the stored tower",
    ),
    "a Qwen that is none": (lambda c, s: c.update(model_type="moe_llava_qwen"), "are not part of a Qwen in the layout"),
    "a StableLM that is none": (lambda c, s: c.update(model_type="moe_llava_stablelm"), "do not fit config.json"),
    "a Phi without its share of rotation": (
        lambda c, s: c.update(model_type="moe_llava_phi"),
        "partial_rotary_factor is missing, and Phi models differ in it",
    ),
    "Phi-3": (lambda c, s: c.update(model_type="llava_phi3"), "Phi-3 is not supported"),
    "MiniCPM by its scales": (lambda c, s: c.update(model_type="llava_llama", scale_emb=12), "scale_emb is 12"),
    "MiniCPM": (lambda c, s: c.update(model_type="moe_llava_minicpm"), "MiniCPM is not supported"),
    "a PanGu-pi that is none": (lambda c, s: c.update(model_type="moe_llava_zhizi"), "do not fit config.json"),
    "MPT": (lambda c, s: c.update(model_type="llava_mpt"), "MPT is not supported"),
    "Phi by its tensors": (lambda c, s: rename_in(s, "self_attn.o_proj", "self_attn.dense"), "do not fit config.json"),
    "Qwen by its tensors": (
        lambda c, s: [rename_in(s, "self_attn.q_proj", "attn.c_attn"), rename_in(s, "model.layers", "transformer.h")],
        "are not part of a Gemma",
    ),
    "a projector of another kind": (
        lambda c, s: s.update({"model.mm_projector.image_spatial_proj.peg.peg.0.bias": torch.zeros(32)}),
        r"1 not part of the model \(multi_modal_projector.peg.bias\)",
    ),
    "never heard of": (
        lambda c, s: c.update(model_type="llava_mamba"),
        "'llava_mamba', which is not supported by this",
    ),
    "ours": (lambda c, s: c.update(model_type="llava_gm"), "it is a gm-mlx model already"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_gives_one_line(tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    config = model_config(moe=SPARSE)
    settings, state = moe_llava_json(config, "gemma"), state_of(broken_model(), MOE_LLAVA)
    change(settings, state)
    write(tmp_path, settings, state)
    with pytest.raises(UserError) as error:
        convert(tmp_path)
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@functools.cache
def broken_model() -> Any:
    """One model for all the tests that break a copy of it."""
    return reference(model_config(moe=SPARSE))


def test_a_base_for_a_whole_model_is_refused(tmp_path: Path) -> None:
    config = model_config(moe=SPARSE)
    write(tmp_path, moe_llava_json(config, "gemma"), state_of(broken_model(), MOE_LLAVA))
    with pytest.raises(UserError, match="needs no --base"):
        convert(tmp_path, base=tmp_path)


def test_a_small_capacity_is_noted(tmp_path: Path) -> None:
    """With its class defaults DeepSpeed would drop tokens; with the published configs it does not."""
    config = model_config(moe=SPARSE)
    write(tmp_path, moe_llava_json(config, "gemma", eval_capacity_factor=1.0), state_of(broken_model(), MOE_LLAVA))
    assert any("eval_capacity_factor 1" in note for note in convert(tmp_path).notes)
