"""Two models side by side."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from safetensors.torch import load_file, save_file
from torch_reference import copy_weights, llava
from transformers import LlavaForConditionalGeneration

from gm_mlx import stages
from gm_mlx.chat_template import PLAIN
from gm_mlx.compare import (
    EXACT_TOLERANCE,
    HALF_TOLERANCE,
    QUANTIZED_TOLERANCE,
    Comparison,
    compare,
    default_tolerance,
    difference,
)
from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.stages import FolderSide, Precision, Question
from gm_mlx.torch_side import TorchSide, _pool, open_side
from gm_mlx.weights import apply_quantization, named_arrays

QUESTIONS = [Question("How many objects are there?"), Question("What is in the picture?", [picture(1), picture(2)])]


def run(a: Path, b: Path, **options: Any) -> Comparison:
    return compare(open_side("a", a), open_side("b", b), QUESTIONS, **options)


def changed(folder: Path, name: str, factor: float = 1.5) -> Path:
    """A copy of the tiny model with one array different."""
    model = tiny_model()
    array = named_arrays(model)[name]
    model.load_weights([(name, array * factor + 0.1)], strict=False)
    return tiny_folder(folder, model=model)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("a"))


def test_a_model_equals_itself(original: Path) -> None:
    outcome = run(original, original)
    assert [(d.stage, d.error, d.limit) for d in outcome.stages] == [
        ("pixels", 0.0, EXACT_TOLERANCE),
        ("ids", 0.0, 0.0),
        *((stage, 0.0, EXACT_TOLERANCE) for stage in ("tower", "projector", "embeddings", "layer 0", "layer 1")),
        *((stage, 0.0, EXACT_TOLERANCE) for stage in ("norm", "logits")),
    ]
    assert (outcome.agrees, outcome.parts_at, outcome.skipped) == (True, None, {})
    assert [(r.layer, r.first, r.chosen) for r in outcome.routing] == [(0, 1.0, 1.0)]
    for answer in outcome.answers:
        assert answer.a == answer.b != ""
        assert answer.common_tokens == answer.tokens > 0


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "tower"),
        ("multi_modal_projector.linear_2.bias", "projector"),
        ("language_model.model.embed_tokens.weight", "embeddings"),
        ("language_model.model.layers.0.mlp.switch_mlp.up_proj.weight", "layer 0"),
        ("language_model.model.layers.1.self_attn.v_proj.weight", "layer 1"),
        ("language_model.model.norm.weight", "norm"),
        ("language_model.lm_head.weight", "logits"),
    ],
)
def test_a_changed_weight_shows_in_its_stage(original: Path, tmp_path: Path, name: str, stage: str) -> None:
    outcome = run(original, changed(tmp_path, name))
    assert outcome.parts_at == stage
    assert not outcome.agrees
    before = outcome.stages[: [d.stage for d in outcome.stages].index(stage)]
    if stage != "embeddings":  # the token embeddings come after the image's stages, not before
        assert all(d.error == 0 for d in before)


def test_another_router_shows_in_the_routing(original: Path, tmp_path: Path) -> None:
    outcome = run(original, changed(tmp_path, "language_model.model.layers.0.mlp.gate.weight", factor=-1))
    assert outcome.parts_at == "layer 0"
    assert outcome.routing[0].first < 1
    assert outcome.routing[0].chosen < 1


def test_another_template_shows_in_the_ids_only(original: Path, tmp_path: Path) -> None:
    outcome = run(original, tiny_folder(tmp_path, template=PLAIN))
    assert outcome.parts_at == "ids"
    assert not outcome.agrees
    assert [d.stage for d in outcome.stages if not d.passes] == ["ids"]


def test_quantized_models_are_judged_by_their_logits(original: Path, tmp_path: Path) -> None:
    model = tiny_model()
    apply_quantization(model, {"group_size": 32, "bits": 8})
    outcome = run(original, tiny_folder(tmp_path, model=model))
    assert outcome.tolerance == QUANTIZED_TOLERANCE
    judged = {d.stage: d.limit for d in outcome.stages if d.limit is not None}
    assert judged == {"pixels": EXACT_TOLERANCE, "ids": 0.0, "logits": QUANTIZED_TOLERANCE}
    assert outcome.agrees
    assert all(0 < d.error < QUANTIZED_TOLERANCE for d in outcome.stages if d.stage not in ("pixels", "ids"))
    strict = run(original, tmp_path, tolerance=1e-6)
    assert (strict.agrees, strict.parts_at) == (False, "tower")


def test_a_model_stored_in_half_precision_has_its_own_tolerance(original: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    outcome = run(original, tiny_folder(tmp_path, model=model))
    assert outcome.tolerance == HALF_TOLERANCE
    assert outcome.stages[-1].error > EXACT_TOLERANCE
    assert outcome.agrees


@pytest.mark.parametrize(
    ("a", "b", "tolerance"),
    [
        (Precision("float32", "float32"), Precision("float32", "float32"), EXACT_TOLERANCE),
        (Precision("float16", "float32"), Precision("float16", "float32"), EXACT_TOLERANCE),
        (Precision("float32", "float32"), Precision("float16", "float32"), HALF_TOLERANCE),
        (Precision("float16", "float16"), Precision("float16", "float16"), HALF_TOLERANCE),
        (Precision("float16", "float32", quantized=True), Precision("float16", "float32"), QUANTIZED_TOLERANCE),
    ],
)
def test_default_tolerance(a: Precision, b: Precision, tolerance: float) -> None:
    assert default_tolerance(a, b) == default_tolerance(b, a) == tolerance


def test_difference() -> None:
    a = np.array([3.0, -4.0])
    assert difference(a, a) == (0.0, 1.0)
    assert difference(a, -a) == (2.0, -1.0)
    assert difference(np.zeros(2), a) == (float("inf"), 0.0)
    assert difference(a, np.array([np.nan, 1.0])) == (float("inf"), 0.0)
    assert difference(a, np.zeros(3)) == (float("inf"), 0.0)


def test_models_of_different_shape_are_refused(original: Path, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path, model=tiny_model(config=tiny_config(num_hidden_layers=3)))
    with pytest.raises(UserError, match="b: num_hidden_layers is 3 where a has 2"):
        run(original, other)


def test_a_dense_model_and_its_sparse_form_are_compared(original: Path, tmp_path: Path) -> None:
    outcome = run(original, tiny_folder(tmp_path, model=tiny_model(config=tiny_config(moe=None))))
    assert outcome.routing == []
    assert outcome.parts_at == "layer 0"


def test_one_model_is_let_go_before_the_next_is_loaded(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = []
    load = stages.load_model

    def watched(folder: Path) -> Model:
        mx.clear_cache()
        alive.append(mx.get_active_memory())
        model = load(folder)
        mx.eval(model.parameters())
        return model

    monkeypatch.setattr(stages, "load_model", watched)
    run(original, original)
    size = sum(array.nbytes for array in named_arrays(tiny_model()).values())
    assert alive[1] - alive[0] < size / 2


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"questions": []}])
def test_nothing_to_compare_is_refused(original: Path, options: dict[str, Any]) -> None:
    side = FolderSide("a", original)
    with pytest.raises(UserError, match="nothing to compare"):
        compare(side, side, options.pop("questions", QUESTIONS), **options)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense LLaVA in PyTorch's form and in ours."""
    folder = tmp_path_factory.mktemp("llava")
    config = tiny_config("clip", moe=None, tie_word_embeddings=True)
    reference = llava(config)
    reference.save_pretrained(folder / "torch")
    model = Model(config)
    copy_weights(reference, model, config.num_vision_layers_used)
    return folder / "torch", tiny_folder(folder / "ours", model=model)


def test_hugging_face_and_ours_agree(hugging_face: tuple[Path, Path]) -> None:
    outcome = run(*hugging_face)
    assert outcome.tolerance == EXACT_TOLERANCE
    assert [d.stage for d in outcome.stages] == [
        "tower", "projector", "embeddings", "layer 0", "layer 1", "norm", "logits",
    ]  # fmt: skip
    assert max(d.error for d in outcome.stages) < 1e-4
    assert outcome.skipped.keys() == {"pixels", "ids"}
    assert all(answer.a == answer.b and answer.tokens for answer in outcome.answers)


@pytest.mark.parametrize("turned", [False, True])
def test_a_pooled_model_is_compared_with_pytorch_pooled_as_much(
    hugging_face: tuple[Path, Path], tmp_path: Path, turned: bool
) -> None:
    theirs, ours = hugging_face
    model = Model(replace(ModelConfig.load(ours), spatial_pool_stride=2))
    model.load_weights(str(ours / "model.safetensors"))
    pooled = tiny_folder(tmp_path, model=model)
    outcome = run(*((pooled, theirs) if turned else (theirs, pooled)))
    assert [d.stage for d in outcome.stages][:3] == ["tower", "projector", "embeddings"]
    assert max(d.error for d in outcome.stages) < 1e-4
    assert all(answer.a == answer.b and answer.tokens for answer in outcome.answers)
    with pytest.raises(UserError, match="tokens per image is 1 where a has 4"):
        run(ours, pooled)


@pytest.mark.parametrize(("images", "slots"), [(1, 3), (2, 4), (1, 0), (1, 5), (2, 5), (1, 16)])
def test_slots_that_pytorch_cannot_fill(images: int, slots: int) -> None:
    """A grid of 3 x 3 can be 9 features or 1."""
    with pytest.raises(UserError, match="tokens per image: PyTorch's model has 9 where the other has"):
        _pool(torch.zeros(images, 9, 2), slots)


def test_a_wrong_conversion_shows(hugging_face: tuple[Path, Path], tmp_path: Path) -> None:
    """Here the PyTorch side comes second."""
    theirs, ours = hugging_face
    model = Model(replace(ModelConfig.load(ours), scale_image_features=True))
    model.load_weights(str(ours / "model.safetensors"))
    outcome = run(tiny_folder(tmp_path, model=model), theirs)
    assert (outcome.agrees, outcome.parts_at) == (False, "embeddings")


def test_half_precision_of_a_torch_model_is_noticed(hugging_face: tuple[Path, Path], tmp_path: Path) -> None:
    theirs, ours = hugging_face
    LlavaForConditionalGeneration.from_pretrained(theirs).to(torch.bfloat16).save_pretrained(tmp_path)
    outcome = run(tmp_path, ours)
    assert outcome.tolerance == HALF_TOLERANCE
    assert outcome.stages[-1].error > EXACT_TOLERANCE
    assert outcome.agrees


def test_two_torch_models_are_refused(hugging_face: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="one of the two must be"):
        run(hugging_face[0], hugging_face[0])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "moe_llava_phi"}', ["moe_llava_phi", "gm-mlx convert"]),
        ('{"model_type": "llava", "mm_vision_tower": "x"}', ["'llava'", "gm-mlx convert"]),
        ("[]", ["config.json", "not a JSON object"]),
        ("{", ["config.json", "not a JSON object"]),
        (None, ["config.json", "not found"]),
    ],
)
def test_other_folders_are_refused_with_a_remedy(tmp_path: Path, config: str | None, words: list[str]) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as error:
        open_side("x", tmp_path)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_without_torch_its_models_are_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch transformers"):
        TorchSide("x", tmp_path)


def test_a_damaged_torch_model_is_one_line(hugging_face: tuple[Path, Path], tmp_path: Path) -> None:
    theirs, ours = hugging_face
    shutil.copy(theirs / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="transformers cannot load it") as error:
        run(tmp_path, ours)
    assert "\n" not in str(error.value)


def test_a_torch_model_with_a_tensor_missing_is_refused(hugging_face: tuple[Path, Path], tmp_path: Path) -> None:
    theirs, ours = hugging_face
    shutil.copy(theirs / "config.json", tmp_path)
    tensors = load_file(theirs / "model.safetensors")
    del tensors[next(name for name in tensors if "linear_2.bias" in name)]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"linear_2\.bias.* is missing"):
        run(tmp_path, ours)
