"""``gm-mlx info``."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest

from gm_mlx import __version__, hub
from gm_mlx.cli.info import LABELS
from gm_mlx.cli.main import main
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
