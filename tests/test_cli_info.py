"""``gm-mlx info``."""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures import tiny_config, tiny_folder, tiny_model

from gm_mlx import __version__, hub
from gm_mlx.cli.main import main
from gm_mlx.cli.system import LABELS
from gm_mlx.errors import UserError


@pytest.mark.parametrize("options", [[], ["--system"]])
def test_facts_as_json(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == list(LABELS)
    assert (facts["version"], facts["python"]) == (__version__, platform.python_version())
    assert facts["memory_bytes"] > 1 << 28
    assert facts["device"].split()[0] in ("CPU", "Apple", "CUDA")


def test_facts_as_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_model", lambda name: Path("/models/gm-tiny"))
    monkeypatch.setattr("gm_mlx._blas.status", lambda: "OpenBLAS 0.0")
    assert main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    facts = {label.strip(): value.strip() for label, value in lines.items()}
    assert facts.keys() | {"Device memory"} == set(LABELS.values())
    assert (facts["gm-tiny"], facts["BLAS"]) == ("/models/gm-tiny", "OpenBLAS 0.0")
    assert facts["Memory"].endswith((" MB", " GB"))


def test_an_installation_without_the_model_in_the_box(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_model(name: str) -> Path:
        raise UserError("this installation lacks the built-in model")

    monkeypatch.setattr(hub, "find_model", find_model)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gm_tiny"] is None
    assert main(["info"]) == 0
    assert "not in this installation" in capsys.readouterr().out


def test_a_broken_mlx_is_what_people_look_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"].startswith("none: mlx cannot be imported")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["info", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = figures(capsys, str(folder))
    assert (facts["model"], facts["folder"], facts["recipe"]) == (str(folder), str(folder), None)
    weights = folder / "model.safetensors"
    assert facts["file_bytes"] == weights.stat().st_size
    assert 0 < facts["file_bytes"] - facts["bytes"] < 20_000  # the header
    assert facts["bits_per_weight"] == 32
    assert (facts["sparse_layers"], facts["experts"], facts["experts_per_token"]) == ([0], 4, 2)
    assert facts["paper"] is None
    assert all(device["fits"] for device in facts["devices"].values())


def test_the_model_in_the_box_is_a_folder_and_quantized(capsys: pytest.CaptureFixture[str]) -> None:
    facts = figures(capsys, "gm-tiny")
    assert facts["folder"].endswith("gm-tiny")
    assert 8 * facts["components"]["experts"]["bytes"] / facts["components"]["experts"]["total"] == 4.5


def test_a_folder_wins_over_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert figures(capsys, "llava-gm-2b")["folder"] is None
    tiny_folder(tmp_path / "llava-gm-2b")
    assert figures(capsys, "llava-gm-2b")["folder"] == "llava-gm-2b"


def test_a_preset_and_what_the_paper_says(capsys: pytest.CaptureFixture[str]) -> None:
    facts = figures(capsys, "llava-gm-2b")
    assert facts["file_bytes"] is None
    assert facts["parameters"] == {"total": 5_521_490_944, "active": 3_709_551_616}
    assert facts["kv_bytes_per_token"] == 18_432
    assert (facts["paper"]["total"], facts["paper"]["gflops"]) == (3.3e9, 3623)
    fits = {name for name, device in facts["devices"].items() if device["fits"]}
    assert fits == {"ipad-16gb", "mac-32gb", "pc-16gb"}


def test_a_preset_with_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    facts = figures(capsys, "llava-gm-2b", "--quantize", "q4")
    assert facts["recipe"] == "q4"
    assert 5 < facts["bits_per_weight"] < 5.5
    assert facts["devices"]["iphone-8gb"]["fits"]
    assert not facts["devices"]["iphone-6gb"]["fits"] or facts["memory"]["peak"] < 4.2 * 2**30


def test_the_question_is_what_the_options_say(capsys: pytest.CaptureFixture[str]) -> None:
    facts = figures(capsys, "llava-gm-2b", "--images", "2", "--tokens", "10", "--context", "2000")
    assert (facts["prompt_tokens"], facts["context"]) == (2 * 576 + 10, 2000)
    assert facts["memory"]["kv_cache"] == 2048 * 18_432
    assert facts["flops"]["tower"] == 2 * figures(capsys, "llava-gm-2b")["flops"]["tower"]


def test_figures_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "llava-gm-2b", "--quantize", "q4", "--device", "iphone-8gb"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0] == "llava-gm-2b (preset, q4)"
    assert "18 layers of width 2048, 9 with 4 experts, 2 per token" in lines[1]
    rows = {line[:18].strip(): line[18:].split("  ") for line in lines if line[:1].isalpha()}
    assert [cell.strip() for cell in rows["All"] if cell] == ["5.52 B", "3.71 B", "3.36 GB", "5.23"]
    assert re.search(r"^iphone-8gb +fits: .* 6 GB of 8 GB", said.out, re.MULTILINE)
    assert re.search(r"^Parameters +5\.52 B +3\.30 B$", said.out, re.MULTILINE)
    assert re.search(r"^GFLOPs +4,101 +3,623$", said.out, re.MULTILINE)
    assert "Gemma-2B has 18 layers" in lines[-1]
    assert max(map(len, lines)) < 140


def test_devices_without_being_asked_for_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "llava-gm-7b"]) == 0
    assert re.search(r"^Fits +none of iphone-6gb, .*pc-16gb$", capsys.readouterr().out, re.MULTILINE)
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^Fits +iphone-6gb, .*pc-16gb$", out, re.MULTILINE)
    assert "paper" not in out
    assert main(["info", "llava-gm-7b", "--device", "mac-16gb"]) == 0
    assert re.search(r"^mac-16gb +does not fit: ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llava-gm-9b"], ["llava-gm-9b", "presets are llava-gm-2b, llava-gm-7b"]),
        (["gm-tiny", "--system"], ["--system", "gm-tiny"]),
        (["gm-tiny", "--quantize", "q4"], ["--quantize", "gm-mlx quantize gm-tiny"]),
        (["llava-gm-2b", "--quantize", "q5"], ["q5", "q4"]),
        (["llava-gm-2b", "--quantize", "mixed"], ["mixed", "gm-mlx quantize"]),
        (["llava-gm-2b", "--device", "toaster"], ["toaster", "iphone-8gb"]),
        (["llava-gm-2b", "--tokens", "0"], ["tokens: 0"]),
        (["llava-gm-2b", "--context", "9000"], ["context", "8192"]),
        (["--device", "mac-16gb"], ["name a model"]),
        (["--quantize", "q4"], ["name a model"]),
        (["--context", "9"], ["name a model"]),
    ],
)
def test_a_wrong_question_is_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", *arguments]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert [word for word in words if word not in said.err] == []


def test_a_model_without_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder(tmp_path, model=tiny_model(config=tiny_config(moe=None)))
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 layers of width 64; 4 tokens per image" in out
    assert "Experts" not in out
    assert "Routers" not in out


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_folder_whose_weights_are_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["info", str(tmp_path)]) == 2
    assert "do not fit config.json" in capsys.readouterr().err
