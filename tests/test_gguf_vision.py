"""Tower and projector in llama.cpp's vision library, against ours, which PyTorch's are the reference for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_model
from gguf_files import as_tensors, gguf_folder, image_features, tiny_processor

from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.convert.to_gguf.vision import vision_model
from gm_mlx.errors import UserError
from gm_mlx.gguf_file import read_header
from gm_mlx.images import HALF, ImageConfig
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.llama.probe import needed_layout
from gm_mlx.model import Model
from gm_mlx.weights import named_arrays

CLOSE = 2e-3  # float16 tables and a GELU of another kind


def vision_config(kind: Any, text: dict[str, Any] | None = None, **vision: Any) -> ModelConfig:
    config = tiny_config(kind, **(text or {}))
    return replace(config, vision_config=replace(config.vision_config, **vision))


def features(folder: Path) -> np.ndarray:
    engine = LlamaCppEngine(folder / "model.gguf", folder / "mmproj.gguf")
    try:
        return engine.encode_image(engine.open_image(picture(3, (40, 40))))
    finally:
        engine.close()


def expected(model: Model, folder: Path, *, rolled: bool = False) -> np.ndarray:
    """Features as they enter the first layer; ``rolled``: see ``image_features``."""
    config = model.config
    pixels = mx.array(tiny_processor(config, folder).pixels([picture(3, (40, 40))]))
    scale = config.text_config.hidden_size**0.5 if config.scale_image_features else 1
    return np.array(image_features(model, pixels, rolled)[0]) * scale


def entering(given: np.ndarray, config: ModelConfig) -> np.ndarray:
    """llama.cpp multiplies what enters a native Gemma."""
    sparse = bool(config.text_config.sparse_layers) or not config.text_config.tie_word_embeddings
    return given if sparse else given * config.text_config.hidden_size**0.5


def check(model: Model, tmp_path: Path, *, rolled: bool = False) -> None:
    layout = needed_layout() if model.config.vision_config.is_clip else "cls_first"
    folder = gguf_folder(tmp_path / "gguf", model, layout=layout)
    wanted = expected(model, tmp_path / "processor", rolled=rolled)
    given = entering(features(folder), model.config)
    assert given.shape == wanted.shape
    assert np.abs(given - wanted).max() <= CLOSE * np.abs(wanted).max()


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu", "quick_gelu", "silu"])
def test_siglip(act: str, tmp_path: Path) -> None:
    check(tiny_model(config=vision_config("siglip", hidden_act=act)), tmp_path)


def test_siglip_whose_image_is_no_multiple_of_its_patch(tmp_path: Path) -> None:
    check(tiny_model(config=vision_config("siglip", image_size=30, patch_size=7)), tmp_path)


def test_a_network_as_wide_as_its_stream(tmp_path: Path) -> None:
    check(tiny_model(config=vision_config("siglip", intermediate_size=32)), tmp_path)


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_reads_the_hidden_state_that_is_meant(layer: int, tmp_path: Path) -> None:
    config = replace(vision_config("siglip", num_hidden_layers=3), vision_feature_layer=layer)
    check(tiny_model(config=config), tmp_path)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("moe", [MoEConfig(), None])
def test_features_enter_as_large_as_in_the_model(scaled: bool, moe: MoEConfig | None, tmp_path: Path) -> None:
    text = {"moe": moe, "tie_word_embeddings": True}
    config = replace(vision_config("siglip", text), scale_image_features=scaled)
    check(tiny_model(config=config), tmp_path)


def test_clip_as_the_installed_llama_cpp_needs_it(tmp_path: Path) -> None:
    """With llama.cpp's defect all patches but the first are exact, and the class token stands behind the last."""
    check(tiny_model(config=vision_config("clip")), tmp_path, rolled=needed_layout() == "cls_last")


def test_the_other_clip_layout_is_wrong(tmp_path: Path) -> None:
    model = tiny_model(config=vision_config("clip", image_size=32))
    layouts = ("cls_first", "cls_last")
    other = layouts[1 - layouts.index(needed_layout())]
    given = features(gguf_folder(tmp_path / "gguf", model, layout=other))
    for rolled in (True, False):
        wanted = expected(model, tmp_path / "processor", rolled=rolled)
        assert np.abs(given - wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("scaled", [True, False])
def test_pooling(scaled: bool, tmp_path: Path) -> None:
    config = replace(vision_config("siglip", image_size=48, patch_size=2), spatial_pool_stride=2)
    model = tiny_model(config=replace(config, scale_image_features=scaled))
    check(model, tmp_path)
    header = read_header(tmp_path / "gguf" / "mmproj.gguf")
    assert header.metadata["clip.projector_type"] == "ldpv2" and header.metadata["gm.image_tokens"] == 144


def mobile(kind: str, text: dict[str, Any] | None = None, **vision: Any) -> ModelConfig:
    """24 x 24 patches, which is what mtmd's LDP reads."""
    config = vision_config("siglip", text, image_size=48, patch_size=2, **vision)
    return replace(config, projector_type=kind)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("moe", [MoEConfig(), None])
@pytest.mark.parametrize(("kind", "name"), [("ldpnet", "ldp"), ("ldpnetv2", "ldpv2")])
def test_mobilevlm_s_projectors(kind: str, name: str, moe: MoEConfig | None, scaled: bool, tmp_path: Path) -> None:
    config = mobile(kind, {"moe": moe, "tie_word_embeddings": True})
    check(tiny_model(config=replace(config, scale_image_features=scaled)), tmp_path)
    header = read_header(tmp_path / "gguf" / "mmproj.gguf")
    assert header.metadata["clip.projector_type"] == name and header.metadata["gm.image_tokens"] == 144


@pytest.mark.parametrize("kind", ["ldpnet", "ldpnetv2"])
def test_mobilevlm_behind_clip(kind: str, tmp_path: Path) -> None:
    """MobileVLM's own tower is CLIP's. With llama.cpp's defect the projector reads patches that are moved by one."""
    config = replace(vision_config("clip", image_size=48, patch_size=2), projector_type=kind)
    check(tiny_model(config=config), tmp_path, rolled=needed_layout() == "cls_last")


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_ldp_s_norms_keep_their_eps_whatever_the_tower_s_is(eps: float, tmp_path: Path) -> None:
    """Weights so small that the eps decides what comes out."""
    model = tiny_model(config=mobile("ldpnet", layer_norm_eps=eps))
    for block in model.multi_modal_projector.blocks:
        block.depthwise.weight = block.depthwise.weight * 1e-2
        block.pointwise.weight = block.pointwise.weight * 1e-2
    check(model, tmp_path)


def test_the_last_norm_of_a_tower(tmp_path: Path) -> None:
    check(tiny_model(config=vision_config("siglip", post_norm=True)), tmp_path)


REFUSED = [
    (replace(tiny_config("siglip"), projector_type="ldpnet"), "projector_type: is 'ldpnet' for 2 x 2 patches"),
    (replace(tiny_config("siglip"), projector_type="ldpnetv2"), "projector_type: is 'ldpnetv2' for 2 x 2 patches"),
    (replace(tiny_config("siglip"), vision_feature_select_strategy="default"), "vision_feature_select_strategy"),
    (replace(tiny_config("clip"), vision_feature_select_strategy="full"), "vision_feature_select_strategy"),
    (replace(tiny_config("siglip"), projector_hidden_act="silu"), "projector_hidden_act"),
    (replace(tiny_config("siglip"), vision_feature_layer=0), "vision_feature_layer"),
    (replace(tiny_config("siglip"), spatial_pool_stride=2), "spatial_pool_stride"),
]


@pytest.mark.parametrize("config, key", REFUSED)
def test_refuses_what_mtmd_does_not_compute(config: ModelConfig, key: str) -> None:
    tensors = as_tensors(named_arrays(tiny_model(config=config)))
    with pytest.raises(UserError, match=f"{key}.*cannot be written as GGUF"):
        vision_model(config, tensors, ImageConfig(16, "resize", HALF, HALF), "cls_first")
