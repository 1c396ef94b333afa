"""``gm-mlx convert`` from the command line to a model that chats."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from huggingface_hub import constants

import gm_mlx
from gm_mlx import hub
from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig
from gm_mlx.convert import random_model, towers
from gm_mlx.errors import UserError
from gm_mlx.presets import PRESETS
from gm_mlx.processor import Processor
from gm_mlx.safetensors_header import check_header
from gm_mlx.weights import load_model, named_arrays

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "source")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "dense", model=tiny_model(config=tiny_config(moe=None)))


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    code = main(["convert", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gm-mlx: error: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("gm-mlx: error: ").rstrip("\n")


def json_of(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def answer(folder: Path) -> str:
    return gm_mlx.load(str(folder)).chat("What is this?", [picture()], max_tokens=8).text


# A model folder written anew.


def test_a_model_folder_is_written_anew(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notice = {"text": "t", "min_image_side": 9}
    (source / "gm.json").write_text(json.dumps({"name": "x", "notice": notice, "exact_match": 1, "sha256": {}}))
    (source / "LICENSE.txt").write_text("terms")
    (source / "README.md").write_text("---\nlicense: gemma\ntags:\n- x\n---\n# Old\n")
    out = tmp_path / "out"
    facts = run(capsys, source, "-o", out)
    assert facts["bytes"] == (out / "model.safetensors").stat().st_size
    assert facts["parameters"] == sum(array.size for array in named_arrays(load_model(source)).values())
    assert facts["active_parameters"] < facts["parameters"]
    assert answer(out) == answer(source)
    gm = json_of(out / "gm.json")
    hashes = {
        name: hashlib.sha256((source / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "config.json", "processor_config.json", "tokenizer.model")
    }
    recorded = gm["sources"]["checkpoint"]
    assert recorded["name"] == "source"  # and not where it lies on this machine
    assert hashes.items() <= recorded["sha256"].items()
    assert gm["notice"] == notice and "exact_match" not in gm
    assert list(gm["sha256"]) == ["model.safetensors"]
    assert (out / "LICENSE.txt").read_text() == "terms"
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: gm-mlx\n") and "\nlicense: gemma\n" in card
    assert "# out\n" in card and "4 experts, 2 per token" in card and hashes["model.safetensors"] in card
    assert str(tmp_path) not in card + (out / "gm.json").read_text()
    run(capsys, out, "-o", tmp_path / "again")
    assert json_of(tmp_path / "again/gm.json")["history"] == [gm["sources"]]


def test_options_are_applied_in_their_order(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--upcycle", "4x2", "--router-rank", "3", "--dtype", "bfloat16", "--max-shard-size", "100KB"]
    facts = run(capsys, dense, "-o", out, *options, "--quantize", "q8", "--template", "plain")
    config = ModelConfig.load(out)
    moe = config.text_config.moe
    assert moe is not None and (moe.num_experts, moe.top_k, moe.router_rank) == (4, 2, 3)
    assert config.extra["quantization"]["bits"] == 8
    assert len(list(out.glob("model-*.safetensors"))) > 1
    entries = {name: entry for file in out.glob("*.safetensors") for name, entry in check_header(file).items()}
    layer = "language_model.model.layers.0.mlp"
    assert entries[f"{layer}.gate.u"].dtype == "F32"
    assert entries[f"{layer}.switch_mlp.up_proj.weight"].dtype == "U32"
    assert entries[f"{layer}.switch_mlp.up_proj.scales"].dtype == "BF16"
    assert Processor.from_folder(out).template.name == "plain"
    gm = json_of(out / "gm.json")
    assert gm["upcycle"]["num_experts"] == 4 and gm["upcycle"]["from"] == "copies of dense FFNs"
    assert gm["routers"]["rank"] == 3 == facts["routers"]["rank"]
    assert gm["quantization"]["recipe"] == "q8" and (gm["dtype"], gm["template"]) == ("bfloat16", "plain")
    assert answer(out)


def test_upcycled_experts_compute_what_the_dense_model_did(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, dense, "-o", tmp_path / "out", "--upcycle", "4x2")
    ids = mx.array([[5, 9, 300]])
    before, after = (np.array(load_model(folder)(ids)) for folder in (dense, tmp_path / "out"))
    assert np.abs(before - after).max() < 1e-5 * np.abs(before).max()


def test_a_split_model_is_measured_against_the_dense_one(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = ["--upcycle-split", "--samples", 2]
    every = run(capsys, dense, "-o", tmp_path / "every", "--upcycle", "4x4", *split)["upcycle"]["agreement"]
    half = run(capsys, dense, "-o", tmp_path / "half", "--upcycle", "4x2", *split)["upcycle"]["agreement"]
    assert 0 <= half["top1"] <= 1 and half["positions"] > 2
    assert half["kl"] > 0 and every["kl"] > 0
    assert json_of(tmp_path / "half/gm.json")["upcycle"]["agreement"] == half
    assert main(["convert", str(dense), "-o", str(tmp_path / "told"), "--upcycle", "4x2", *map(str, split)]) == 0
    assert f"KL divergence {half['kl']:.3g} nats" in capsys.readouterr().out
    unmeasured = run(capsys, dense, "-o", tmp_path / "not", "--upcycle", "4x2", "--upcycle-split", "--samples", 0)
    assert "agreement" not in unmeasured["upcycle"]


def test_quantized_floats_take_half_the_bytes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, source, "-o", tmp_path / "kept")
    run(capsys, source, "-o", tmp_path / "out", "--quantize", "q4")
    kept, out = (check_header(tmp_path / name / "model.safetensors") for name in ("kept", "out"))
    assert {entry.dtype for entry in kept.values()} == {"F32"}
    norm = "language_model.model.norm.weight"
    assert (out[norm].dtype, out["language_model.model.layers.0.mlp.gate.weight"].dtype) == ("F16", "F32")
    card = (tmp_path / "out/README.md").read_text()
    assert "feed-forward networks in 4 bits" in card


def test_the_model_in_the_box(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is quantized, and is copied as it is."""
    run(capsys, "gm-tiny", "-o", tmp_path / "out")
    box = hub.find_model()
    assert check_header(tmp_path / "out/model.safetensors") == check_header(box / "model.safetensors")
    for option in (["--quantize", "q4"], ["--upcycle", "4x2"]):
        error = refused(capsys, "gm-tiny", "-o", tmp_path / "more", *option)
        assert error.startswith(f"gm-tiny: is quantized, which {option[0]} cannot start from")


# A preset.


def test_a_random_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--preset", "gm-tiny", "--random", "-o", str(tmp_path / "out"), "--quantize", "q4"]) == 0
    captured = capsys.readouterr()
    assert "note: the weights are random" in captured.err
    lines = captured.out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: ") and "bits per weight" in lines[0]
    assert lines[-1].startswith(f"try it: gm-mlx chat --model {tmp_path / 'out'} ")
    assert ModelConfig.load(tmp_path / "out").text_config == PRESETS["gm-tiny"].text_config
    assert answer(tmp_path / "out") is not None
    assert "it talks nonsense" in (tmp_path / "out/README.md").read_text()


def test_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hashes(name: str, *options: str) -> dict[str, str]:
        run(capsys, "--preset", "gm-tiny", "--random", "-o", tmp_path / name, *options)
        return json_of(tmp_path / name / "gm.json")["sha256"]

    assert hashes("a") == hashes("b", "--seed", "0") != hashes("c", "--seed", "1")


# Fewer tokens per image.


def figures_of(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, Any]:
    assert main(["info", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_fewer_tokens_per_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a quantized model: no weight changes, and what is pooled can be pooled further or not at all."""
    box, previous = figures_of(capsys, hub.find_model()), "gm-tiny"
    weights: Any = mx.load(str(hub.find_model() / "model.safetensors"))
    for tokens, stride in ((16, 2), (4, 4), (64, 1)):
        out = tmp_path / str(tokens)
        facts = run(capsys, previous, "-o", out, "--image-tokens", tokens)
        assert any(f"takes {tokens} tokens" in note for note in facts["notes"]) == (tokens < 64)
        assert ModelConfig.load(out).spatial_pool_stride == stride
        assert Processor.from_folder(out).tokens_per_image == tokens
        assert json_of(out / "gm.json")["image_tokens"] == tokens
        assert f"{tokens} tokens per image" in (out / "README.md").read_text()
        stored: Any = mx.load(str(out / "model.safetensors"))
        assert stored.keys() == weights.keys() and all(mx.array_equal(stored[name], weights[name]) for name in stored)
        info = figures_of(capsys, out)
        assert (info["tokens_per_image"], info["prompt_tokens"]) == (tokens, tokens + 64)
        assert (info["parameters"], info["flops"]["projector"]) == (box["parameters"], box["flops"]["projector"])
        reply = gm_mlx.load(str(out)).chat("what shape is in the image?", [picture()], max_tokens=8)
        assert reply.stats.image_tokens == tokens and reply.text
        previous = str(out)
    assert answer(tmp_path / "64") == answer(hub.find_model())


def test_a_pooled_model_stays_pooled(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, source, "-o", tmp_path / "a", "--image-tokens", 1)
    run(capsys, tmp_path / "a", "-o", tmp_path / "b", "--quantize", "q8")
    assert ModelConfig.load(tmp_path / "b").num_image_tokens == Processor.from_folder(tmp_path / "b").tokens_per_image
    assert gm_mlx.load(str(tmp_path / "b")).chat("What?", [picture()] * 2, max_tokens=4).stats.image_tokens == 2


def test_a_random_model_with_fewer_tokens_per_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--preset", "gm-tiny", "--random", "-o", tmp_path / "out", "--image-tokens", 1)
    assert ModelConfig.load(tmp_path / "out").spatial_pool_stride == 8
    assert gm_mlx.load(str(tmp_path / "out")).chat("What?", [picture()], max_tokens=4).stats.image_tokens == 1


@pytest.mark.parametrize(
    ("preset", "tokens", "message"),
    [
        ("llava-gm-2b", 100, "24 x 24 patches cannot be averaged to that; it can be one of 576, 144, 64, 36, 16, 9, 4"),
        ("gm-tiny", 63, "8 x 8 patches cannot be averaged to that; it can be one of 64, 16, 4, 1"),
        ("gm-tiny", 0, "8 x 8 patches cannot be averaged to that"),
        ("gm-tiny", -4, "8 x 8 patches cannot be averaged to that"),
    ],
)
def test_numbers_of_tokens_that_no_image_can_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str, tokens: int, message: str
) -> None:
    error = refused(capsys, "--preset", preset, "--random", "-o", tmp_path / "out", "--image-tokens", tokens)
    assert error.startswith(f"--image-tokens {tokens}: {message}")
    assert not list(tmp_path.iterdir())


def test_a_class_token_is_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(tiny_config("clip"), vision_feature_select_strategy="full")
    folder = tiny_folder(tmp_path / "source", model=tiny_model(config=config))
    for tokens in (1, 4, 5):
        error = refused(capsys, folder, "-o", tmp_path / "out", "--image-tokens", tokens)
        assert "vision_feature_select_strategy 'full' and 5 features of 2 x 2 patches can have 5 only" in error


# A PyTorch checkpoint.


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from checkpoint_layouts import LLAVA, llava_json, state_of
    from checkpoints import model_config, reference, write

    config = model_config("gemma")
    model = reference(config, "gemma")
    write(tmp_path / "llava", llava_json(config, "gemma"), state_of(model, LLAVA))
    write(tmp_path / "blind", llava_json(config, "gemma"), state_of(model, LLAVA, tower=False))
    return tmp_path / "llava"


@pytest.mark.slow
def test_a_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(capsys, checkpoint, "-o", out)
    assert answer(out) is not None
    gm = json_of(out / "gm.json")
    assert {"layout", "template", "image_mode", "vocab_cut", "vision_source", "made_by"} <= gm.keys()
    assert gm["vision_source"] == "checkpoint"
    assert ModelConfig.load(out).scale_image_features
    run(capsys, checkpoint, "-o", tmp_path / "pooled", "--image-tokens", 1)
    assert (ModelConfig.load(out).num_image_tokens, ModelConfig.load(tmp_path / "pooled").num_image_tokens) == (4, 1)
    assert answer(tmp_path / "pooled") is not None
    run(capsys, checkpoint, "-o", out, "--force", "--no-scale-image-features", "--quantize", "q4", "--upcycle", "4x2")
    config = ModelConfig.load(out)
    assert not config.scale_image_features
    assert config.extra["quantization"] and config.text_config.moe
    assert answer(out) is not None

    # A tower that the config names and the checkpoint does not hold.
    blind = checkpoint.with_name("blind")
    asked = []

    def find(name: str) -> Path:
        asked.append(name)
        if name == str(blind):
            return blind
        raise UserError(f"{name}: cannot be fetched")

    monkeypatch.setattr(hub, "find_checkpoint", find)
    error = refused(capsys, blind, "-o", tmp_path / "more")
    tower = towers.missing_tower(open_(blind))
    assert asked == [str(blind), tower]
    assert f"{tower}: cannot be fetched; it is the vision tower of {blind}: --vision takes a folder" in error
    assert not (tmp_path / "more").exists()


def open_(folder: Path) -> Any:
    from gm_mlx.convert.checkpoint import open_checkpoint

    return open_checkpoint(folder)


def test_a_repository_in_the_cache(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run(capsys, "org/tiny", "-o", tmp_path / "out")
    recorded = json_of(tmp_path / "out/gm.json")["sources"]["checkpoint"]
    assert (recorded["name"], recorded["revision"]) == ("org/tiny", COMMIT)
    assert "model.safetensors" in recorded["sha256"]
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: org/tiny\n" in card and "https://huggingface.co/org/tiny" in card


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{source}"], "name the model folder to write with -o OUT"),
        (["-o", "{out}"], "name a SOURCE to convert, or a --preset"),
        (["{source}", "-o", "{out}", "--preset", "gm-tiny", "--random"], "name a SOURCE to convert, or a --preset"),
        (["-o", "{out}", "--preset", "gm-tiny"], "--preset and --random need each other"),
        (["{source}", "-o", "{out}", "--random"], "--preset and --random need each other"),
        (["{source}", "-o", "{out}", "--seed", "1"], "--seed is of random weights"),
        (["-o", "{out}", "--preset", "gm-huge", "--random"], "--preset gm-huge: no such preset"),
        (["-o", "{out}", "--preset", "gm-tiny", "--random", "--base", "x"], "--base is about PyTorch checkpoints"),
        (["-o", "{out}", "--preset", "gm-tiny", "--random", "--template", "v1"], "--template: a preset has that of"),
        (
            ["{source}", "-o", "{out}", "--vision", "x"],
            "--vision is about PyTorch checkpoints; leave it out with {source}",
        ),
        (["{source}", "-o", "{out}", "--no-scale-image-features"], "--scale-image-features is about PyTorch"),
        (["{source}", "-o", "{out}", "--template", "x"], "--template x: no such template; choose one of"),
        (["{source}", "-o", "{out}", "--upcycle-split"], "--upcycle-split says how experts are made"),
        (["{source}", "-o", "{out}", "--upcycle", "4"], "--upcycle '4': not EXPERTS"),
        (["{source}", "-o", "{out}", "--upcycle", "4x2"], "--upcycle: the model has experts already"),
        (["{source}", "-o", "{out}", "--router-rank", "4"], "--router-rank 4: not between 1 and 3"),
        (["{source}", "-o", "{out}", "--public"], "--public is about the repository of --upload"),
        (["{source}", "-o", "{out}", "--max-shard-size", "big"], "--max-shard-size: 'big' is not a size"),
        (["{source}", "-o", "{out}", "--quantize", "q5"], "recipe 'q5' is not one of q4, "),
        (
            ["{source}", "-o", "{out}", "--quantize", "awq"],
            "--quantize awq: looks at calibration data; convert without",
        ),
        (["{source}", "-o", "{out}", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["{source}", "-o", "{source}", "--force"], "{source}: is the source"),
        (["{source}", "-o", "{source}/out"], "{source}/out: is the source"),
        (["{source}", "-o", "{source}/config.json"], "{source}/config.json: is a file"),
        (["{source}", "-o", "{out}/a/b"], "{out}/a/b: there is no folder {out}/a; make it first"),
        (["{out}", "-o", "{out}"], "{out}: no such folder; name a checkpoint's folder or"),
        (["{source}", "-o", "{source}"], "{source}: exists; choose another folder"),
    ],
)
def test_one_line_says_what_is_wrong(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"source": str(source), "out": str(tmp_path / "out")}
    assert refused(capsys, *(argument.format(**places) for argument in arguments)).startswith(message.format(**places))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_nothing_is_done_before_options_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second of imports, a download or an hour of work before "no such recipe" would be rude."""
    code = f"import sys; from gm_mlx.cli.main import main; main(['convert', 'x', '-o', {str(tmp_path / 'o')!r}, "
    code += "'--max-shard-size', 'big']); print([name for name in ('mlx.core', 'rich', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


# Uploads, with a hub that only remembers.


class FakeApi:
    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    fails: str | None = None

    def _call(self, name: str, **arguments: Any) -> str:
        if self.fails == name:
            raise RuntimeError(f"{name}: 401 Client Error.\nmore\nlines")
        self.calls.append((name, arguments))
        return "https://huggingface.co/me/tiny"

    def whoami(self) -> str:
        return self._call("whoami")

    def create_repo(self, repo_id: str, **arguments: Any) -> str:
        return self._call("create_repo", repo_id=repo_id, **arguments)

    def upload_folder(self, **arguments: Any) -> str:
        assert (Path(arguments["folder_path"]) / "config.json").is_file()
        return self._call("upload_folder", **arguments)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    fake = type("Fake", (FakeApi,), {"calls": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return fake


@pytest.mark.parametrize("public", [False, True])
def test_uploads(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], api: type[FakeApi], public: bool
) -> None:
    facts = run(capsys, source, "-o", tmp_path / "out", "--upload", "me/tiny", *(["--public"] if public else []))
    assert facts["url"] == "https://huggingface.co/me/tiny"
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert api.calls[1][1] == {"repo_id": "me/tiny", "private": not public, "exist_ok": True}
    assert api.calls[2][1]["folder_path"] == str(tmp_path / "out") and api.calls[2][1]["repo_id"] == "me/tiny"


def test_uploads_that_fail(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    api: type[FakeApi],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert "not a repository's name" in refused(capsys, source, "-o", out, "--upload", "tiny")
    api.fails = "whoami"
    error = refused(capsys, source, "-o", out, "--upload", "me/tiny")
    assert error == "--upload me/tiny: whoami: 401 Client Error; run `hf auth login` with a token that may write"
    assert not out.exists()  # known before the work
    api.fails = "upload_folder"
    error = refused(capsys, source, "-o", out, "--upload", "me/tiny")
    assert error.endswith(f"the model is in {out}, and `hf upload me/tiny {out}` tries again")
    assert load_model(out).config == load_model(source).config
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, source, "-o", out, "--force", "--upload", "me/tiny")


# What a run leaves that is stopped.

SLOW = """
import sys, time
import gm_mlx
from gm_mlx.cli.main import main
from gm_mlx.convert import random_model
real = random_model._uniform
def slow(*arguments):
    if len(made) == 20:
        print("at work", flush=True)
        time.sleep(60)
    made.append(1)
    return real(*arguments)
made = []
random_model._uniform = slow
sys.exit(main(["convert", "--preset", "gm-tiny", "--random", "--force", "-o", sys.argv[1]]))
"""


@pytest.mark.slow
def test_ctrl_c_and_kill_leave_the_old_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert random_model._uniform
    out = tmp_path / "out"
    run(capsys, "--preset", "gm-tiny", "--random", "-o", out)
    before = (out / "model.safetensors").read_bytes()
    for stop, code, left in ((signal.SIGINT, 130, 1), (signal.SIGKILL, -signal.SIGKILL, 2)):
        child = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "at work\n"
        time.sleep(0.1)
        child.send_signal(stop)
        _, errors = child.communicate()
        assert child.returncode == code, errors
        assert len(list(tmp_path.iterdir())) == left
        assert (out / "model.safetensors").read_bytes() == before
    assert "out: exists" in refused(capsys, "--preset", "gm-tiny", "--random", "-o", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
