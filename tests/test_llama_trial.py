"""Files that pass every check and still make llama.cpp break down take a child process with them, and only that."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import picture
from tiny_gguf import our_folder, text_keys, text_tensors, vision_keys, vision_tensors, write, write_mmproj, write_text

from gm_mlx.engine import Sampling
from gm_mlx.errors import UserError
from gm_mlx.gguf_file import read_header
from gm_mlx.llama import trial
from gm_mlx.llama.check import check_mmproj, check_text_model
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.llama.trial import check_by_trial


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sound")
    return write_text(folder / "text.gguf"), write_mmproj(folder / "mmproj.gguf")


def test_a_file_is_tried_once(tmp_path: Path, sound: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tried: list[list[Path]] = []
    attempt = trial._try
    monkeypatch.setattr(trial, "_try", lambda paths: tried.append(paths) or attempt(paths))
    text, mmproj = check_text_model(sound[0]), check_mmproj(sound[1])
    for _ in range(2):
        check_by_trial(text, mmproj)
        check_by_trial(text, None)
    assert tried == [[text.path, mmproj.path], [text.path]]


def test_an_assertion_of_llama_cpp_is_one_line(tmp_path: Path, sound: tuple[Path, Path]) -> None:
    """Four experts in three groups: a rule of llama.cpp that is checked nowhere here."""
    keys = text_keys() | {"llama.expert_count": 4, "llama.expert_used_count": 2, "llama.expert_group_count": 3}
    path = write(tmp_path / "x.gguf", "llama", keys, text_tensors(len(keys["tokenizer.ggml.tokens"])))
    check_text_model(path)
    with pytest.raises(UserError) as error:
        LlamaCppEngine(path, sound[1])
    assert str(error.value).startswith(f"{path}: llama.cpp breaks down when it loads this file: GGML_ASSERT(")
    assert str(error.value).endswith("; download it again") and "\n" not in str(error.value)


def test_the_file_that_breaks_is_named(tmp_path: Path, sound: tuple[Path, Path]) -> None:
    tensors = vision_tensors() | {"v.blk.0.attn_q.weight": np.zeros((32, 8), np.float32)}
    path = write(tmp_path / "x.gguf", "clip", vision_keys(), tensors)
    check_mmproj(path)
    with pytest.raises(UserError, match=rf"^{path}: llama\.cpp (breaks down|cannot load)"):
        LlamaCppEngine(sound[0], path)


def test_what_llama_cpp_says_itself_is_told(tmp_path: Path) -> None:
    keys = text_keys()
    tensors = text_tensors(len(keys["tokenizer.ggml.tokens"]))
    del tensors["blk.1.attn_q.weight"]
    path = write(tmp_path / "x.gguf", "llama", keys, tensors)
    with pytest.raises(UserError, match=rf"^{path}: llama\.cpp cannot load it: .*blk\.1\.attn_q\.weight"):
        LlamaCppEngine(path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "there is not enough memory to load it; take a smaller",
        ),
        ("import ctypes; ctypes.string_at(0)", "breaks down when it loads this file: it does not say why"),
        ("import time; time.sleep(60)", "does not come to an end of loading it"),
    ],
)
def test_other_ends_of_a_trial(
    tmp_path: Path, sound: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trial, "SECONDS", 2)
    run = subprocess.run

    def child(command: list[str], **options: Any) -> Any:
        return run([sys.executable, "-c", code], **options)

    monkeypatch.setattr(trial.subprocess, "run", child)
    with pytest.raises(UserError, match=message):
        check_by_trial(check_text_model(sound[0]), None)


def test_where_nothing_can_be_tried(tmp_path: Path, sound: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In an app the interpreter is the app itself, and on some phones no program may start another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(*args: Any, **options: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(trial.subprocess, "run", fail)
    check_by_trial(check_text_model(sound[0]), None)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    check_by_trial(check_text_model(sound[0]), check_mmproj(sound[1]))


# Run as a program: each damaged file in a folder is loaded and asked something, in one process that must live.


def damaged(source: Path, seed: int) -> bytes:
    """A copy of a file with a byte or two changed where it hurts: values of keys and the table of tensors."""
    content = bytearray(source.read_bytes())
    header = read_header(source)
    size = min(tensor.offset for tensor in header.tensors.values())
    values = [content.find(key.encode()) + len(key) for key in header.kinds]
    names = [content.find(name.encode()) for name in header.tensors]
    chance = random.Random(seed)
    for _ in range(chance.choice([1, 1, 2])):
        places = (
            chance.choice(values) + chance.randrange(12),
            chance.choice(names) + chance.randrange(-4, 50),
            chance.randrange(size),
        )
        at = chance.choice(places)
        content[at] = chance.choice([0, 1, 255, chance.randrange(256), content[at] ^ (1 << chance.randrange(8))])
    return bytes(content)


def outcome(text: Path, mmproj: Path) -> str:
    """What becomes of two files: "checked", "refused" or "answers"."""
    try:
        check_text_model(text)
        check_mmproj(mmproj)
    except UserError as error:
        assert "\n" not in str(error)
        return "checked"
    try:
        engine = LlamaCppEngine(text, mmproj, threads=1)
        question = [{"role": "user", "content": "What is this?"}]
        list(engine.stream(question, [picture()], Sampling(max_tokens=3)))
        engine.close()
    except UserError as error:
        assert "\n" not in str(error)
        return "refused"
    return "answers"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["foreign text", "foreign vision", "our text", "our vision"])
def test_damaged_files_are_one_line_or_a_working_model(tmp_path: Path, sound: tuple[Path, Path], kind: str) -> None:
    pair = sound
    if kind.startswith("our"):
        folder = our_folder(tmp_path)[1]
        pair = folder / "model.gguf", folder / "mmproj.gguf"
    job = json.dumps([str(pair[0]), str(pair[1]), kind.endswith("vision"), str(tmp_path / "damaged.gguf")])
    run = subprocess.run([sys.executable, __file__, job], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    counts = json.loads(run.stdout.splitlines()[-1])
    assert sum(counts.values()) == FILES and counts["checked"] and counts["answers"], counts


FILES = 40


def main(text: str, mmproj: str, vision: bool, out: str) -> None:
    counts: Counter[str] = Counter()
    for seed in range(FILES):
        source, copy = Path(mmproj if vision else text), Path(out)
        copy.write_bytes(damaged(source, seed))
        pair = (Path(text), copy) if vision else (copy, Path(mmproj))
        print(f"file {seed}", flush=True)
        counts[outcome(*pair)] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
