"""``gm-mlx verify``."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from fixtures import picture, tiny_folder, tiny_model

from gm_mlx.cli.main import main
from gm_mlx.weights import apply_quantization, named_arrays

BIAS = "multi_modal_projector.linear_2.bias"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, one that differs from its projector on, and the first one in 8 bits."""
    root = tmp_path_factory.mktemp("models")
    changed, packed = tiny_model(), tiny_model()
    changed.load_weights([(BIAS, named_arrays(changed)[BIAS] + 0.5)], strict=False)
    apply_quantization(packed, {"group_size": 32, "bits": 8})
    return {
        "same": tiny_folder(root / "same"),
        "changed": tiny_folder(root / "changed", model=changed),
        "packed": tiny_folder(root / "packed", model=packed),
    }


def verify(folders: dict[str, Path], other: str, *options: str) -> int:
    return main(["verify", str(folders["same"]), str(folders[other]), "--max-tokens", "3", *options])


def test_equal_models(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folders, "same") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert [line.split()[0] for line in said.out.splitlines()[1:4]] == ["pixels", "ids", "tower"]
    assert "100.00%" in said.out
    assert said.out.count("B: the same") == 2
    assert said.out.endswith("\nThey agree.\n")
    assert "parts here" not in said.out
    assert max(map(len, said.out.splitlines())) < 100


def test_different_models(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folders, "changed", "--samples", "1") == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert [line.split()[0] for line in said.out.splitlines() if "parts here" in line] == ["projector"]
    assert said.out.endswith("\nThey differ: projector is above its limit.\n")


def test_as_json(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folders, "changed", "--json", "--samples", "1") == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["a"], facts["b"]) == (str(folders["same"]), str(folders["changed"]))
    assert (facts["agrees"], facts["parts_at"], facts["tolerance"]) == (False, "projector", 1e-3)
    assert facts["stages"][2] == {"stage": "tower", "error": 0, "cosine": 1, "limit": 1e-3, "passes": True}
    assert facts["routing"][0].keys() == {"layer", "first", "chosen"}
    assert facts["answers"][0].keys() == {"prompt", "a", "b", "common_tokens", "tokens"}


def test_the_tolerance_decides(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folders, "packed", "--samples", "1") == 0
    assert verify(folders, "packed", "--samples", "1", "--tolerance", "1e-9") == 1
    assert verify(folders, "changed", "--samples", "1", "--tolerance", "1000") == 0


def test_own_images_and_prompt(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
        files += ["--image", str(tmp_path / f"{i}.png")]
    assert verify(folders, "same", "--json", "--prompt", "How many?", *files) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [answer["prompt"] for answer in facts["answers"]] == ["How many?", "How many?"]
    assert facts["answers"][0]["a"] != facts["answers"][1]["a"]
    assert verify(folders, "same", "--json", *files[:2]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["prompt"] == "Describe the image in one sentence."
    assert verify(folders, "same", "--json", "--prompt", "How many?", "--samples", "3") == 0
    assert [a["prompt"] for a in json.loads(capsys.readouterr().out)["answers"]] == ["How many?"] * 3


def test_an_error_without_measure_is_null(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tiny_model()
    broken.load_weights([(BIAS, named_arrays(broken)[BIAS] * mx.nan)], strict=False)
    tiny_folder(tmp_path, model=broken)
    assert main(["verify", str(folders["same"]), str(tmp_path), "--json", "--samples", "1"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["parts_at"] == "projector"
    assert facts["stages"][3]["error"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tolerance", "-1"], ["--tolerance", "0 or more"]),
        (["--tolerance", "inf"], ["--tolerance", "0 or more"]),
        (["--tolerance", "nan"], ["--tolerance", "0 or more"]),
        (["--samples", "0"], ["--samples 0"]),
        (["--samples", "1", "--image", "x.png"], ["--samples", "--image"]),
        (["--image", "missing.png"], ["missing.png"]),
        (["--prompt", " "], ["--prompt is empty"]),
        (["--max-tokens", "0"], ["one token"]),
    ],
)
def test_a_wrong_option_is_one_line(
    folders: dict[str, Path], options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(folders["same"]), str(folders["same"]), *options]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert [word for word in words if word not in said.err] == []


def test_a_model_that_is_not_there(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folders["same"]), "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
