"""``gm-mlx fuse`` and adapters beside a model, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import picture, tiny_folder
from lora_models import CONFIGS, EVERYTHING, TABLES, error, everything, logits, model_of, trained

import gm_mlx
from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.folder import read_model_folder
from gm_mlx.lora.config import LoRAConfig, lora_targets
from gm_mlx.lora.folder import load_adapter, save_adapter
from gm_mlx.lora.merge import fuse
from gm_mlx.quant.fuse import fuse_folders
from gm_mlx.weights import load_model, named_arrays, quantized_layers


def adapter_folder(
    folder: Path, base: str = "gemma", table: str | None = None, lora: LoRAConfig | None = None, seed: int = 0
) -> Path:
    save_adapter(trained(model_of(base, table), lora or everything(base), seed), folder, base="tiny")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["fuse", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("table", [None, *TABLES])
@pytest.mark.parametrize("base", CONFIGS)
def test_fused_is_the_adapter(
    base: str, table: str | None, dora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In floats the folder says what model and adapter say; packed again, it is the merged weights, packed."""
    folder = tiny_folder(tmp_path / "model", model=model_of(base, table))
    adapter = adapter_folder(tmp_path / "adapter", base, table, everything(base, dora))
    model = load_model(folder)
    load_adapter(model, adapter)
    wanted = logits(model)
    run(capsys, str(folder), str(adapter), "-o", str(tmp_path / "floats"), "--dequantize")
    floats = load_model(tmp_path / "floats")
    assert error(logits(floats), wanted) <= (1e-5 if table is None else 1e-4)
    assert not quantized_layers(floats) and "quantization" not in floats.config.extra
    if table is None:
        return
    run(capsys, str(folder), str(adapter), "-o", str(tmp_path / "packed"))
    packed, in_memory = load_model(tmp_path / "packed"), fuse(model)
    found, expected = named_arrays(packed), named_arrays(in_memory)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if array.dtype in (mx.uint32, mx.uint8):  # a code may be rounded the other way, here and there
            assert (found[name] != array).mean().item() < 2e-3, name
        else:
            assert error(np.array(found[name]), np.array(array)) <= 1e-4, name


def test_what_has_no_adapter_is_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "model", model=model_of("gemma", "mixed"))
    adapter = adapter_folder(tmp_path / "adapter", lora=LoRAConfig(targets=["q_proj", "up_proj"]))
    run(capsys, str(folder), str(adapter), "-o", str(tmp_path / "out"))
    before, after = read_model_folder(folder), read_model_folder(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = mx.array_equal(tensor.read(), after[name].read()).item()
        changed = any(part in name for part in ("language_model.model.layers", "up_proj")) and any(
            part in name for part in ("q_proj", "up_proj")
        )
        assert same != changed, name
    hows = [
        {path: (m.bits, m.group_size, m.mode) for path, m in quantized_layers(load_model(place)).items()}
        for place in (folder, tmp_path / "out")
    ]
    assert hows[0] == hows[1]
    assert len(set(hows[0].values())) == 3


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is what the files say: ||W' - W|| and ||Q(W') - W'|| over ||W'||, for each component."""
    folder = tiny_folder(tmp_path / "model", model=model_of("low-rank router", "q4"))
    adapter = adapter_folder(
        tmp_path / "adapter", "low-rank router", "q4", LoRAConfig(targets=["attention", "experts"], router=True)
    )
    facts = json.loads(run(capsys, str(folder), f"{adapter}=0.5", "-o", str(tmp_path / "out"), "--json"))
    run(capsys, str(folder), f"{adapter}=0.5", "-o", str(tmp_path / "floats"), "--dequantize")
    assert facts["parts"].keys() == {"attention", "experts", "routers"}
    assert facts["adapters"][0]["name"] == "adapter" and facts["adapters"][0]["weight"] == 0.5

    def matrix(place: Path, path: str) -> np.ndarray:
        from gm_mlx.lora.layers import float_weight

        module: Any = load_model(place)
        for name in path.split("."):
            module = module[int(name)] if isinstance(module, list) else module[name]
        experts = range(module.num_experts) if "switch_mlp" in path else [None]
        return np.stack([np.array(float_weight(module, e), np.float64) for e in experts])

    sums: dict[str, np.ndarray] = {}
    for path, target in lora_targets(ModelConfig.load(folder)).items():
        if target.component in facts["parts"]:
            before, after, exact = (matrix(place, path) for place in (folder, tmp_path / "out", tmp_path / "floats"))
            own = [(exact**2).sum(), ((exact - before) ** 2).sum(), ((after - exact) ** 2).sum()]
            sums[target.component] = sums.get(target.component, np.zeros(3)) + own
    for component, (whole, changed, lost) in sums.items():
        assert facts["parts"][component]["change"] == pytest.approx((changed / whole) ** 0.5, rel=1e-3)
        assert facts["parts"][component]["rounding"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3, abs=1e-7)
    assert facts["parts"]["routers"]["rounding"] == 0
    assert facts["parts"]["experts"]["modules"] == 3


def test_two_adapters_and_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "model")
    (folder / "gm.json").write_text(json.dumps({"name": "x", "exact_match": 0.9, "adapters": [{"name": "older"}]}))
    (folder / "README.md").write_text("# A model\n")
    (folder / "LICENSE").write_text("Do what you like.\n")
    first = adapter_folder(tmp_path / "first", "gemma", None, LoRAConfig(targets=["q_proj"]))
    model = load_model(folder)
    # The folder's model has a head of its own, the adapter's base had none.
    text = failed(capsys, "fuse", str(folder), str(first), "-o", str(tmp_path / "out"))
    assert (
        "gm.json: the adapter is for tiny, whose text_config.tie_word_embeddings is True where this model's is False"
        in text
    )
    assert not (tmp_path / "out").exists()
    for name, seed in (("first", 0), ("second", 1)):
        save_adapter(trained(load_model(folder), EVERYTHING, seed), tmp_path / name, base="tiny", force=True)
        load_adapter(model, tmp_path / name, 0.5 if name == "first" else -1.0)
    out = tmp_path / "out"
    assert main(["fuse", str(folder), f"{first}=0.5", f"{tmp_path / 'second'}=-1", "-o", str(out)]) == 0
    captured = capsys.readouterr()
    assert f"gm-mlx chat --model {out}" in captured.err
    rows = dict(line.strip().split("  ", 1) for line in captured.out.splitlines() if "  " in line.strip())
    assert {"experts", "attention", "routers"} <= set(rows)
    assert error(logits(load_model(out)), logits(model)) <= 1e-5
    notes = json.loads((out / "gm.json").read_text())
    assert notes["name"] == "x" and "exact_match" not in notes
    assert [(one["name"], one.get("weight")) for one in notes["adapters"]] == [
        ("older", None), ("first", 0.5), ("second", -1.0)
    ]  # fmt: skip
    card = (out / "README.md").read_text()
    assert card.startswith("# A model\n\n## Adapters\n") and "`first` with a weight of 0.5" in card
    assert (out / "LICENSE").read_text() == "Do what you like.\n"


def test_one_matrix_at_a_time(tmp_path: Path) -> None:
    """Planning reads no value, and each tensor is read by itself."""
    folder = tiny_folder(tmp_path / "model", model=model_of("gemma", "q4"))
    fused = fuse_folders(folder, [(adapter_folder(tmp_path / "adapter"), 1.0)])
    assert all(effect.whole == 0 for effect in fused.effects.values())
    name = "language_model.model.layers.0.mlp.switch_mlp.up_proj.weight"
    array = fused.tensors[name].read()
    assert (array.shape, array.dtype) == ((4, 128, 64), mx.float32)
    assert [component for component, effect in fused.effects.items() if effect.whole] == ["experts"]


def test_a_note_where_packing_eats_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "model", model=model_of("gemma", "q4"))
    adapter = adapter_folder(tmp_path / "adapter", lora=LoRAConfig(targets=["experts"]))
    assert main(["fuse", str(folder), f"{adapter}=0.001", "-o", str(tmp_path / "out")]) == 0
    assert "note: experts: packing rounds away more than the adapters change" in capsys.readouterr().err


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "model", model=model_of())
    adapter = adapter_folder(tmp_path / "adapter")
    out = tmp_path / "out"
    assert "Missing option '--out'" in failed(capsys, "fuse", str(folder), str(adapter))
    assert "no such folder; name an adapter's folder" in failed(capsys, "fuse", str(folder), "no such", "-o", str(out))
    assert "is the source" in failed(capsys, "fuse", str(folder), str(adapter), "-o", str(folder), "--force")
    assert "whole model and no adapter" in failed(capsys, "fuse", str(folder), str(folder), "-o", str(out))
    assert "weight of nan" in failed(capsys, "fuse", str(folder), f"{adapter}=nan", "-o", str(out))
    text = failed(capsys, "fuse", str(folder), f"{adapter}=1e300", "-o", str(out))
    assert "beyond what F32 can hold; use a smaller weight" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


@pytest.mark.parametrize("table", [None, "q4"])
def test_beside_a_model(table: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``chat --adapter`` and ``load(adapters=...)`` answer as the fused model does."""
    folder = tiny_folder(tmp_path / "model", model=model_of("gemma", table))
    first, second = (adapter_folder(tmp_path / name, table=table, seed=seed) for seed, name in enumerate("ab"))
    out = tmp_path / "fused"
    run(capsys, str(folder), str(first), f"{second}=0.5", "-o", str(out), "--dequantize")

    def said(*arguments: str) -> dict[str, Any]:
        picture().save(tmp_path / "a.png")
        options = ["--image", str(tmp_path / "a.png"), "--prompt", "what is this?", "--max-tokens", "8", "--json"]
        assert main(["chat", *arguments, *options]) == 0
        return json.loads(capsys.readouterr().out)

    wanted = said("--model", str(out))["answer"]
    assert said("--model", str(folder), "--adapter", str(first), "--adapter", f"{second}=0.5")["answer"] == wanted
    assert said("--model", str(folder))["answer"] != wanted
    model = gm_mlx.load(str(folder), adapters=[first, (str(second), 0.5)])
    assert model.chat("what is this?", images=[picture()], max_tokens=8).text == wanted


def test_not_beside_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gguf_files import gguf_folder

    file = gguf_folder(tmp_path / "gguf") / "model.gguf"
    text = failed(capsys, "chat", "--model", str(file), "--adapter", "x", "--prompt", "what?")
    assert f"gm-mlx convert ADAPTER --to gguf-lora --base {file} -o ADAPTER.gguf" in text and "--lora" in text
    with pytest.raises(UserError, match="--adapter is for MLX"):
        gm_mlx.load(str(file), adapters=["x"])


def test_a_wrong_adapter_beside_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "model")
    adapter = adapter_folder(tmp_path / "adapter")
    for name, message in ((str(adapter), "the adapter is for tiny"), ("no such", "no such folder")):
        assert message in failed(capsys, "chat", "--model", str(folder), "--adapter", name, "--prompt", "what?")
