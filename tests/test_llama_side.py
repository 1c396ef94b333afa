"""``gm-mlx verify`` with GGUF files: both engines on the same questions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from gguf_files import gguf_folder
from tiny_gguf import write_mmproj, write_text

from gm_mlx.cli.main import main
from gm_mlx.config import MoEConfig
from gm_mlx.llama.probe import needed_layout


def verify(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any], str]:
    code = main(["verify", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {}, captured.err


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture(1, (30, 50)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize("scaled, moe", [(False, MoEConfig()), (True, MoEConfig(top_k=4)), (True, None)])
def test_a_folder_and_its_files_agree(
    scaled: bool, moe: MoEConfig | None, tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(tiny_config(moe=moe, tie_word_embeddings=moe is None), scale_image_features=scaled)
    model = tiny_model(config=config)
    folder, files = tiny_folder(tmp_path / "mlx", model=model), gguf_folder(tmp_path / "gguf", model)
    code, facts, _ = verify(capsys, folder, files / "model.gguf", "-i", image, "-p", "What is this?")
    assert code == 0 and facts["agrees"], facts
    stages = {stage["stage"]: stage for stage in facts["stages"]}
    assert list(stages) == ["pixels", "ids", "projector", "logits"]
    assert stages["pixels"]["error"] == stages["ids"]["error"] == 0
    assert stages["projector"]["error"] < 2e-3 and stages["logits"]["error"] < 2e-2
    assert facts["answers"][0]["common_tokens"] == facts["answers"][0]["tokens"]
    assert "not compared" in facts["skipped"]["what lies between"]
    # The other way round, by the folder's name.
    code, facts, _ = verify(capsys, files, folder, "-i", image, "-p", "What is this?")
    assert code == 0 and facts["agrees"]


def test_another_model_differs(tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, files = tiny_folder(tmp_path / "mlx"), gguf_folder(tmp_path / "gguf", tiny_model(1))
    code, facts, _ = verify(capsys, folder, files, "-i", image)
    assert code == 1 and facts["parts_at"] == "projector"


def test_a_quantized_file_is_judged_by_its_logits(
    tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(config=tiny_config(moe=MoEConfig(top_k=4)))
    folder, files = tiny_folder(tmp_path / "mlx", model=model), gguf_folder(tmp_path / "gguf", model, "Q8_0")
    _, facts, _ = verify(capsys, folder, files, "-i", image)
    limits = {stage["stage"]: stage["limit"] for stage in facts["stages"]}
    assert limits["projector"] is None and limits["logits"] == 0.2


def test_llama_cpps_defect_is_named_and_not_judged(
    tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(config=tiny_config("clip"))
    layout = needed_layout()
    folder, files = tiny_folder(tmp_path / "mlx", model=model), gguf_folder(tmp_path / "gguf", model, layout=layout)
    code, facts, _ = verify(capsys, folder, files, "-i", image)
    assert code == 0
    assert ("25814" in facts["skipped"].get("logits", "")) == (layout == "cls_last")


def test_features_without_their_mean_are_not_judged(
    tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As StableLM with experts gets them, and needs them."""
    stablelm: dict[str, Any] = {
        "norm": "layer",
        "attention_bias": "qkv",
        "partial_rotary_factor": 0.5,
        "norm_plus_one": False,
        "scale_embeddings": False,
        "hidden_act": "silu",
    }
    model = tiny_model(config=tiny_config(moe=MoEConfig(top_k=4), **stablelm))
    model.multi_modal_projector.linear_2.bias = model.multi_modal_projector.linear_2.bias + 5
    folder, files = tiny_folder(tmp_path / "mlx", model=model), gguf_folder(tmp_path / "gguf", model)
    code, facts, _ = verify(capsys, folder, files, "-i", image)
    stages = {stage["stage"]: stage for stage in facts["stages"]}
    assert code == 0 and "LayerNorms" in facts["skipped"]["projector"]
    assert stages["projector"]["error"] > 0.1 and stages["projector"]["limit"] is None
    assert stages["logits"]["error"] < 1e-2 and stages["logits"]["limit"] is not None


def test_a_file_of_another_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "mlx")
    (tmp_path / "foreign").mkdir()
    write_text(tmp_path / "foreign" / "model.gguf")
    code, _, err = verify(capsys, folder, tmp_path / "foreign" / "model.gguf")
    assert code == 2 and "no vision model" in err
    write_mmproj(tmp_path / "foreign" / "mmproj.gguf")
    code, _, err = verify(capsys, folder, tmp_path / "foreign" / "model.gguf")
    assert code == 2 and "not written by gm-mlx" in err and err.count("\n") == 1
