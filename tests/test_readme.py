"""What the README tells a newcomer to type works, and what it says is true."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GM_TINY = ROOT / "gm_mlx" / "models" / "gm-tiny"


def block(after: str, language: str) -> str:
    """The first fenced block of a language behind a text."""
    match = re.search(rf"{re.escape(after)}.*?```{language}\n(.*?)```", README, flags=re.DOTALL)
    assert match, f"README.md has no {language} block after {after}"
    return match[1]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more}


def test_try_command_answers_right() -> None:
    """The last line of the first block, with this interpreter's environment in the place of ``.venv``."""
    lines = block("<!-- try command -->", "sh").splitlines()
    assert lines[:2] == ["python3 -m venv .venv", ".venv/bin/pip install ."]
    command = lines[-1].removeprefix(".venv/bin/")
    assert command.startswith("gm-mlx chat")
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "red"), done.stderr


def test_python_block_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(block("## In Python", "python"), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("red ")
    assert printed.endswith("star\nyes\n")


def test_gguf_commands(tmp_path: Path) -> None:
    """What the section on llama.cpp shows, with gm-tiny for somebody's model."""
    lines = block("## For llama.cpp", "sh").splitlines()
    assert lines[0] == ".venv/bin/pip install '.[gguf]'"
    names = {"my-model-gguf": str(tmp_path / "gguf"), "photo.jpg": str(ROOT / "examples" / "images" / "shapes.png")}
    for line in lines[1:]:
        words = [names.get(word, word) for word in line.replace("my-model ", "gm-tiny ").split()]
        words = [word.replace("my-model-gguf/", f"{tmp_path}/gguf/") for word in words]
        if words[1] == "chat":
            words += ["--prompt", "what color is the circle?"]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "red"


@pytest.mark.slow
def test_installed_package_answers_too(tmp_path: Path) -> None:
    """``pip install .`` and not ``-e``: the four folders and gm-tiny arrive under one package, nothing beside it."""
    source, target = tmp_path / "source", tmp_path / "target"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} <= {"gm_mlx", "bin"}
    code = "import gm_mlx, sys; print(gm_mlx.__file__); from gm_mlx.cli.main import main; sys.exit(main(sys.argv[1:]))"
    image = str(ROOT / "examples" / "images" / "shapes.png")
    arguments = ["chat", "--image", image, "--prompt", "what color is the circle?", "--json"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(target)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, answer = done.stdout.split("\n", 1)
    assert Path(where).is_relative_to(target)
    assert json.loads(answer)["answer"] == "red"


def test_gate_runs_the_test_command() -> None:
    """``.ci/run`` takes its command from the README; what it takes is the block that the README shows."""
    shown = block("<!-- test command -->", "sh")
    script = (ROOT / ".ci" / "run").read_text()
    awk = re.search(r"command=\$\((awk .*)\)\n", script)
    assert awk
    taken = subprocess.run(awk[1], shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert taken == shown
    assert shown.splitlines()[-1] == ".venv/bin/python -m pytest"


def test_figures_of_gm_tiny() -> None:
    notes = json.loads((GM_TINY / "gm.json").read_text())
    card = (GM_TINY / "README.md").read_text(encoding="utf-8")
    for name, digits in (("easy-vqa", 2), ("generated", 1)):
        share = notes["exact_match"][name]["all"]
        assert f"{share:.{digits}%}" in README
        assert f"{share:.2%}" in card
    size = sum(file.stat().st_size for file in GM_TINY.iterdir()) / 1e6
    assert f"| {size:.1f} MB |" in README


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
