"""``gm-mlx bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures import picture, tiny_folder
from PIL import Image

from gm_mlx.bench import machine, process
from gm_mlx.cli.main import main

# Two threads of llama.cpp would wait for each other for ages where another program has a core.
QUICK = ["-p", "8", "-n", "2", "-r", "2", "--threads", "1"]
# A child that crashes where llama.cpp is to be loaded, and works elsewhere.
CRASHES = """
import os, signal
from gm_mlx.bench import child
real = child.load
def load(request):
    if request["engine"] == "llama.cpp":
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(request)
child.load = load
child.main()
"""


def test_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "model")
    assert main(["bench", str(folder), *QUICK, "--image", "none"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 rounds" in out
    for part in ("pp8", "tg2", "tokens/s", "peak memory", "GB/s", "GFLOP/s"):
        assert part in out
    assert "image encode" not in out


@pytest.mark.slow
def test_both_engines_as_json_and_as_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(size=(64, 48)).save(tmp_path / "picture.png")
    plot = tmp_path / "plot.png"
    options = ["--quantize", "Q8_0", "--image", str(tmp_path / "picture.png"), "--plot", str(plot), "--json"]
    assert main(["bench", "gm-tiny", *QUICK, *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    one, two = facts["forms"]
    assert [(form["model"], form["engine"]) for form in (one, two)] == [
        ("gm-tiny", "mlx"),
        ("gm-tiny Q8_0", "llama.cpp"),
    ]
    assert one["prefill_flops"] == two["prefill_flops"] > 0
    assert 0.5 < two["active_bytes"] / one["active_bytes"] < 2
    assert two["peak_memory_bytes"] > two["weight_bytes"] > 0
    results = {(result["form"], result["test"]): result for result in facts["results"]}
    tests = {"load", "image encode", "pp8", "tg2", "tg2 @ d80", "first token, image", "peak memory"}
    assert {test for _, test in results} == tests
    for (form, test), result in results.items():
        assert len(result["values"]) == (1 if test in ("load", "peak memory") else 2)
        assert all(value > 0 for value in result["values"])
        assert (result["ratio"] is None) == (form == "A")
    assert facts["machine"]["versions"]["gm-mlx"]
    with Image.open(plot) as image:
        assert image.format == "PNG"


@pytest.mark.slow
def test_a_preset_in_forms_of_both_engines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--preset", "gm-tiny", *QUICK, "--quantize", "q4", "--quantize", "Q4_0,Q4_K_M"]) == 0
    captured = capsys.readouterr()
    for name in ("gm-tiny q4 ", "gm-tiny Q4_0 ", "gm-tiny Q4_K_M "):
        assert name in captured.out


@pytest.mark.slow
def test_a_crash_is_one_line_and_the_others_are_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-P", "-c", CRASHES))
    assert main(["bench", "gm-tiny", "--quantize", "Q8_0", *QUICK]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error:" in line]
    assert errors == ["gm-mlx: error: B, gm-tiny Q8_0: crashed with SIGSEGV while it was measured"]
    assert "pp8" in captured.out
    assert "not measured" in captured.out


def test_memory_too_small_for_all_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    folder = tiny_folder(tmp_path / "model")
    assert main(["bench", str(folder), "-p", "4", "-n", "0", "-r", "2", "--image", "none", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["settings"]["loaded_together"] is False
    assert [len(result["values"]) for result in facts["results"] if result["test"] == "load"] == [2]
    assert "each was loaded anew" in captured.err


REFUSED: dict[str, tuple[list[str], str]] = {
    "no such model": (["/nowhere/model"], "/nowhere/model"),
    "no such file": (["/nowhere/model.gguf"], "no such file"),
    "no rounds": (["-r", "0"], "-r: 0 is not 1 or more"),
    "prompt below nothing": (["-p", "-1"], "-p: -1 is not 0 or more"),
    "endless": (["--max-minutes", "inf"], "--max-minutes: inf is not 0 or more"),
    "nothing to do": (["-p", "0", "-n", "0", "--image", "none"], "leave nothing to measure"),
    "no such image": (["--image", "/nowhere/cat.png"], "/nowhere/cat.png"),
    "no such preset": (["--preset", "llava-gm-9b"], "choose one of llava-gm-2b"),
    "no such type": (["--quantize", "Q9_K"], "not one of q4"),
    "calibrated": (["--preset", "gm-tiny", "--quantize", "awq"], "looks at calibration data"),
    "twice": (["--preset", "gm-tiny", "--quantize", "q4,q4"], "named twice"),
    "two sources": (["a", "b", "--quantize", "q4"], "of one model or of a --preset"),
    "keep what": (["--keep", "/tmp/kept"], "--keep is for models that are made"),
    "a plot that is none": (["--plot", "plot.pdf"], "ends with .png"),
    "quantized already": (["gm-tiny", "--quantize", "q4"], "is quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_measured(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(process, "Child", never)
    options, message = REFUSED[case]
    assert main(["bench", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
