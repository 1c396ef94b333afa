"""Eve's checkpoints: translated, and the model that comes out against PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoint_layouts import LLAVA, llava_json, state_of
from checkpoints import (
    TOLERANCE,
    TOWERS,
    convert,
    edit_config,
    largest_error,
    loaded,
    model_config,
    reference,
    write,
    write_tower,
)
from eve_models import CONFIG, DENSE, eve_json, eve_state, write_eve
from eve_reference import LDP, SQUEEZED, LDPv2, eve
from torch_reference import randomise

from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig
from gm_mlx.convert.layouts import LAYOUTS
from gm_mlx.convert.layouts.eve import EVE
from gm_mlx.errors import UserError
from gm_mlx.gguf_file import read_header

CONFIGS = {"evf": CONFIG, "dense": DENSE, "ldpnetv2": replace(CONFIG, projector_type="ldpnetv2")}


def prompt(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Two prompts with an image each."""
    random = np.random.default_rng(3)
    size = config.vision_config.image_size
    ids = random.integers(3, 300, (2, config.num_image_tokens + 7))
    ids[:, 2 : 2 + config.num_image_tokens] = config.image_token_index
    return ids, random.normal(size=(2, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("file", ["safetensors", "sharded bin"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_equal_pytorch(kind: str, file: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    original = eve(config)
    translation = convert(write_eve(tmp_path, original, file))
    assert translation.config == config
    model = loaded(translation)
    ids, pixels = prompt(config)
    with torch.no_grad():
        theirs = original(ids, pixels).numpy()
        without = original(ids[:, -5:]).numpy()
    positions = model.positions(ids)
    ours = model.logits(model.hidden(model.embed(ids, model.encode_images(mx.array(pixels))), None, None, positions))
    assert np.abs(np.array(ours) - theirs).max() <= TOLERANCE * np.abs(theirs).max()
    plain = np.array(model(mx.array(ids[:, -5:])))
    assert np.abs(plain - without).max() <= TOLERANCE * np.abs(without).max()


def test_what_is_noted(tmp_path: Path) -> None:
    translation = convert(write_eve(tmp_path, eve(CONFIG)))
    assert translation.provenance["layout"] == "Eve" and translation.provenance["decoder"] == "PanGu-pi"
    assert translation.provenance["vision_source"] == "checkpoint"
    assert translation.processor.template.name == "v1"
    assert translation.processor.image is not None and translation.processor.image.mode == "pad"
    assert translation.processor.tokens_per_image == 4


def test_its_layout_is_told_by_its_tensors() -> None:
    assert next(layout for layout in LAYOUTS if layout.matches(eve_state(eve(CONFIG)))) is EVE
    assert next(layout for layout in LAYOUTS if layout.matches(eve_state(eve(DENSE)))) is EVE


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_residual": True}, "moe.use_residual is true, which Eve's paper does not have"),
    ({"top_k_experts": 2}, "moe.top_k_experts is 2, and Eve has"),
    ({"num_experts": [4, 4]}, "moe.num_experts is 4, and Eve has"),
    ({"image_projector_type": "qformer4_36"}, 'image_projector_type is "qformer4_36", which .* "ldpnet"'),
    ({"image_projector_type": "ldpnetv2"}, "do not fit config.json"),
    ({"bias": False}, "do not fit config.json"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_its_paper_does_not_have_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_eve(tmp_path, eve(CONFIG), **changes)
    with pytest.raises(UserError, match=message):
        convert(folder)


def test_layers_of_a_kind_must_be_together(tmp_path: Path) -> None:
    """A second gate in a layer behind those without is no PanGu-pi."""
    state = eve_state(eve(CONFIG))
    state["model.layers.3.mlp.gate_proj2.weight"] = state.pop("model.layers.1.mlp.gate_proj2.weight")
    with pytest.raises(UserError, match=r"layers.1.mlp.gate_proj2.weight"):
        convert(write(tmp_path, eve_json(), state))


def test_a_tower_that_is_not_stored(tmp_path: Path) -> None:
    """A SigLIP in a folder of its own runs as Eve's code runs it: exact GELU, last norm."""
    original = eve(CONFIG)
    whole = convert(write_eve(tmp_path / "whole", original))
    siglip = tmp_path / "siglip"
    vision = CONFIG.vision_config
    fields = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
    state = {}
    for name, tensor in whole.tensors.items():
        if name.startswith("vision_tower."):
            value = torch.from_numpy(np.array(tensor.read()))
            state[name.removeprefix("vision_tower.")] = (
                value.permute(0, 3, 1, 2) if "patch_embedding.weight" in name else value
            )
    write(siglip, {"model_type": "siglip_vision_model", **{name: getattr(vision, name) for name in fields}}, state)
    bare = {name: tensor for name, tensor in eve_state(original).items() if "image_tower" not in name}
    folder = write(tmp_path / "bare", eve_json(), bare)
    with pytest.raises(UserError, match="--vision"):
        convert(folder)
    translation = convert(folder, vision=siglip)
    assert translation.config == CONFIG
    for name, tensor in whole.tensors.items():
        assert np.array_equal(np.array(tensor.read()), np.array(translation.tensors[name].read())), name


def test_another_tower_than_the_one_it_was_trained_with(tmp_path: Path) -> None:
    clip = write_tower(tmp_path / "clip", reference(model_config()), whole=False)
    with pytest.raises(UserError, match=r"vision_tower_type is 'siglip', and .*clip has no SigLIP"):
        convert(write_eve(tmp_path / "eve", eve(CONFIG)), vision=clip)


@pytest.mark.parametrize("missing", ["patch_embed.proj.weight", "pos_embed"])
def test_a_tower_that_is_not_whole(missing: str, tmp_path: Path) -> None:
    state = eve_state(eve(CONFIG))
    del state[f"model.image_tower.{missing}"]
    with pytest.raises(UserError, match="its vision tower is not whole"):
        convert(write(tmp_path, eve_json(), state))


def test_the_config_may_call_it_something_else(tmp_path: Path) -> None:
    folder = write_eve(tmp_path, eve(CONFIG))
    edit_config(folder, lambda config: config.update(model_type="moe_llava_qwen"))
    with pytest.raises(UserError, match="Qwen"):
        convert(folder)


@pytest.mark.parametrize("kind", ["ldpnet", "ldpnetv2"])
def test_mobilevlm_equals_pytorch(kind: str, tmp_path: Path) -> None:
    """LLaVA's layout with a Llama and CLIP, and MobileVLM's projector."""
    config = model_config("llama", "clip", projector_type=kind, image_token_index=400)
    model = reference(config, "llama")
    projector = LDP(128, 32, SQUEEZED[32]) if kind == "ldpnet" else LDPv2(128, 32)
    model.model.multi_modal_projector = randomise(projector)
    table = [(r"model\.multi_modal_projector\.(.*)", r"model.mm_projector.\1"), *LLAVA]
    settings = llava_json(config, "llama", model_type="mobilevlm", mm_projector_type=kind, vision_tower_type="clip")
    translation = convert(write(tmp_path, settings, state_of(model, table)))
    assert translation.config == config
    assert largest_error(translation, model) <= TOLERANCE


def test_llama_cpp_gets_mobilevlm_s_projector_behind_a_gemma(tmp_path: Path) -> None:
    """From a checkpoint to a file: what mtmd reads has the projector's name and all of its tensors."""
    vision = replace(TOWERS["clip"], image_size=336)
    config = replace(model_config("gemma"), vision_config=vision, projector_type="ldpnet", image_token_index=400)
    model = reference(config)
    model.model.multi_modal_projector = randomise(LDP(128, 32, SQUEEZED[32]))
    table = [(r"model\.multi_modal_projector\.(.*)", r"model.mm_projector.\1"), *LLAVA]
    settings = llava_json(
        config, "gemma", mm_projector_type="ldpnet", mm_vision_tower="openai/clip-vit-large-patch14-336"
    )
    write(tmp_path / "source", settings, state_of(model, table))
    assert main(["convert", str(tmp_path / "source"), "-o", str(tmp_path / "out"), "--to", "gguf"]) == 0
    header = read_header(tmp_path / "out" / "mmproj.gguf")
    assert header.metadata["clip.projector_type"] == "ldp" and header.metadata["gm.image_tokens"] == 144
    assert sum(name.startswith("mm.model.mb_block.") for name in header.tensors) == 20
