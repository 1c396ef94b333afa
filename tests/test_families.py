"""Every command on every family: convert, verify, quantize, info, chat and lora, on tiny random checkpoints.

Behind the matrix: traps of the checkpoints, where no other module has a test of its own for one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_layouts import HF_OLD, moe_llava_json, moe_llava_names, state_of, text_json
from checkpoints import (
    TOLERANCE,
    convert,
    edit_config,
    largest_error,
    model_config,
    reference,
    write,
    write_hf,
    write_tower,
)
from families import FAMILIES, Written, write_family
from fixtures import picture
from training_data import images_in, llava, write_lines

from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.convert.checkpoint import open_checkpoint
from gm_mlx.convert.new_projector import with_new_projector
from gm_mlx.convert.translate import translate
from gm_mlx.errors import UserError
from gm_mlx.lora.peft import module_path
from gm_mlx.presets import PRESETS
from gm_mlx.processor import Processor
from gm_mlx.weights import load_model, num_parameters, quantized_layers

SPARSE = MoEConfig()


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Written, Path]:
    """The name of a family, its checkpoint, and the model folder that ``convert`` makes of it."""
    root = tmp_path_factory.mktemp(request.param)
    written = write_family(root / "source", FAMILIES[request.param])
    assert main(["convert", str(written.folder), "-o", str(root / "whole")]) == 0
    return request.param, written, root / "whole"


@pytest.fixture(scope="module")
def small(whole: tuple[str, Written, Path]) -> Path:
    """The same, quantized."""
    folder = whole[2].parent / "small"
    assert main(["quantize", str(whole[2]), "-o", str(folder), "--recipe", "q8"]) == 0
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("image") / "picture.png"
    picture().save(file)
    return str(file)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_convert(whole: tuple[str, Written, Path]) -> None:
    """Config, logits, template and length of the vocabulary are those of the checkpoint."""
    name, written, folder = whole
    family = FAMILIES[name]
    config, facts = ModelConfig.load(folder), json.loads((folder / "gm.json").read_text())
    assert config.text_config == written.config.text_config
    assert config.vision_config == written.config.vision_config
    assert (facts["layout"], facts["template"]) == (family.layout, family.template)
    processor = Processor.from_folder(folder)
    assert facts["vocab_cut"] == processor.tokenizer.vocab_size <= config.text_config.vocab_size
    end = "<|endoftext|>" if family.template == "phi" else None
    assert end is None or processor.template.stop_strings == (end,)
    if family.decoder != "eve":  # whose logits test_eve_convert.py compares
        assert largest_error(convert(written.folder), written.model) <= TOLERANCE


def test_verify(whole: tuple[str, Written, Path], small: Path) -> None:
    """Against transformers where it has the model, and against the quantized form everywhere."""
    name, written, folder = whole
    few = ["--samples", "1", "--max-tokens", "3"]
    if FAMILIES[name].layout == "Hugging Face LLaVA":
        assert main(["verify", str(written.folder), str(folder), *few]) == 0
    assert main(["verify", str(folder), str(small), *few]) == 0


def test_quantize(whole: tuple[str, Written, Path], small: Path) -> None:
    layers = quantized_layers(load_model(small))
    text = whole[1].config.text_config
    assert "language_model.model.layers.1.self_attn.q_proj" in layers
    if text.moe is not None and text.moe.kind == "experts":
        assert f"language_model.model.layers.0.mlp.switch_mlp.{'up_proj' if text.gated else 'fc1'}" in layers
    assert not any(path.endswith((".gate", ".coefficient")) for path in layers)


def test_info(whole: tuple[str, Written, Path], small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = whole[1].config.text_config
    facts, less = (printed(capsys, "info", str(folder)) for folder in (whole[2], small))
    assert facts["sparse_layers"] == text.sparse_layers
    assert facts["experts_per_token"] == (text.moe.top_k if text.moe else 0)
    assert less["parameters"] == facts["parameters"]
    assert facts["parameters"]["total"] == num_parameters(load_model(whole[2]))
    assert less["file_bytes"] < facts["file_bytes"]


def test_chat(whole: tuple[str, Written, Path], small: Path, image: str, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("--prompt", "What is it?", "--max-tokens", "5")
    for folder in (whole[2], small):
        seen = printed(capsys, "chat", "--model", str(folder), "--image", image, *ask)
        assert seen["image_tokens"] == whole[1].config.num_image_tokens and seen["generated_tokens"] > 0
        assert printed(capsys, "chat", "--model", str(folder), *ask)["image_tokens"] == 0


def test_lora(
    whole: tuple[str, Written, Path],
    small: Path,
    image: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps on the quantized model; the adapter is used beside it."""
    monkeypatch.setattr("gm_mlx.cli.training._draw", lambda run: None)  # takes longer than the run
    images_in(tmp_path / "photos", 2)
    records = [llava("<image>what is this?", "a dog", image=f"{n % 2}.png") for n in range(4)]
    data, out = write_lines(tmp_path / "photos" / "data.jsonl", records), str(tmp_path / "adapter")
    steps = ("--steps", "2", "--batch-size", "2", "--workers", "0")
    facts = printed(capsys, "lora", "--model", str(small), "--data", str(data), "-o", out, *steps)
    assert facts["steps"] == 2 and np.isfinite(facts["loss"]) and facts["parameters"] > 0
    ask = ("--image", image, "--prompt", "What is it?", "--max-tokens", "3")
    assert printed(capsys, "chat", "--model", str(small), "--adapter", out, *ask)["generated_tokens"] > 0


# Traps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phi", "moe-llava-stablelm-1.6b", "LLAVA-qwen_lora"])
def test_the_folder_s_name_says_nothing(name: str, tmp_path: Path) -> None:
    """MoE-LLaVA chooses class and template by it."""
    written = write_family(tmp_path / "source", FAMILIES["moe-llava-qwen"])
    translation = convert(written.folder)
    renamed = convert(shutil.copytree(written.folder, tmp_path / name))
    assert (renamed.config, renamed.provenance) == (translation.config, translation.provenance)
    assert renamed.processor.template == translation.processor.template


def test_phi_2_has_a_bias_of_its_head_and_moe_llava_s_has_not(tmp_path: Path) -> None:
    config = model_config("phi")
    model = reference(config, "phi")
    state = state_of(model, moe_llava_names("phi"))
    state["lm_head.bias"] = torch.ones(config.text_config.vocab_size)
    write(tmp_path, moe_llava_json(config, "phi"), state)
    translation = convert(tmp_path)
    assert largest_error(translation, model) <= TOLERANCE
    assert translation.notes == ["the language model's lm_head.bias is left out, as MoE-LLaVA's code leaves it out"]


def test_another_model_with_a_bias_of_its_head_is_refused(tmp_path: Path) -> None:
    config = model_config("phi")
    model = reference(config, "phi")
    state = state_of(model, HF_OLD)
    state["language_model.lm_head.bias"] = torch.ones(config.text_config.vocab_size)
    write_hf(tmp_path, model)
    write(tmp_path, json.loads((tmp_path / "config.json").read_text()), state)
    with pytest.raises(UserError, match=r"lm_head\.bias: a head with a bias"):
        convert(tmp_path)


@pytest.mark.parametrize("family", ["phi", "stablelm"])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_share_of_a_head_that_is_turned_is_the_config_s(family: str, share: float, tmp_path: Path) -> None:
    config = model_config(family)
    config = replace(config, text_config=replace(config.text_config, partial_rotary_factor=share))
    model = reference(config, family)
    write_hf(tmp_path, model)
    assert convert(tmp_path).config.text_config.partial_rotary_factor == share
    assert largest_error(convert(tmp_path), model) <= TOLERANCE


def test_phi_does_not_fall_back_to_phi_1(tmp_path: Path) -> None:
    write_hf(tmp_path, reference(model_config("phi"), "phi"))
    edit_config(tmp_path, lambda c: c["text_config"]["rope_parameters"].pop("partial_rotary_factor"))
    edit_config(tmp_path, lambda c: c["text_config"].pop("partial_rotary_factor", None))
    with pytest.raises(UserError, match=r"text_config\.partial_rotary_factor is missing, and Phi models differ in it"):
        convert(tmp_path)


def test_qwen_counts_both_halves_of_its_ffn(tmp_path: Path) -> None:
    written = write_family(tmp_path, FAMILIES["moe-llava-qwen"])
    edit_config(tmp_path, lambda c: c.update(intermediate_size=64))
    with pytest.raises(UserError, match=r"intermediate_size \(of 2 matrices\) is 64 where .* has 64 rows"):
        convert(written.folder)


@pytest.mark.parametrize("family", ["qwen", "phi", "stablelm"])
def test_stage_1_on_a_base(family: str, tmp_path: Path) -> None:
    """A projector alone, beside the language model that it was trained on; the tower is a folder's of its own."""
    config = model_config(family)
    model = reference(config, family)
    names = moe_llava_names(family)
    named = state_of(model, names)
    base = write(
        tmp_path / "base",
        text_json(config, family),
        {name: tensor for name, tensor in named.items() if "tower" not in name and "projector" not in name},
    )
    folder = write(tmp_path / "stage1", moe_llava_json(config, family), {})
    (folder / "model.safetensors").unlink()
    torch.save({name: t for name, t in named.items() if "mm_projector" in name}, folder / "mm_projector.bin")
    write_tower(tmp_path / "tower", model, whole=False)
    translation = convert(folder, base=base, vision=tmp_path / "tower")
    assert largest_error(translation, model) <= TOLERANCE
    assert translation.processor.template.name == "plain"


@pytest.mark.parametrize("family", ["qwen", "phi"])
def test_a_new_projector_on_a_language_model(family: str, tmp_path: Path) -> None:
    """What MoE-LLaVA's stage 1 starts from; of plain Phi-2 the bias of its head is left out there too."""
    config = model_config(family)
    model = reference(config, family)
    named = state_of(model, moe_llava_names(family))
    alone = {name: tensor for name, tensor in named.items() if "tower" not in name and "projector" not in name}
    if family == "phi":
        alone["lm_head.bias"] = torch.ones(config.text_config.vocab_size)
    base = write(tmp_path / "base", text_json(config, family), alone)
    write_tower(tmp_path / "tower", model, whole=False)
    made = translate(with_new_projector(open_checkpoint(base), tmp_path / "tower"), vision=tmp_path / "tower")
    assert made.config.text_config == config.text_config
    assert bool(made.notes) == (family == "phi")


@pytest.mark.parametrize(
    ("module", "path", "expert"),
    [
        ("model.layers.7.self_attn.dense", "language_model.model.layers.7.self_attn.o_proj", None),
        ("language_model.model.layers.7.self_attn.dense", "language_model.model.layers.7.self_attn.o_proj", None),
        ("transformer.h.7.mlp.w2", "language_model.model.layers.7.mlp.gate_proj", None),
        (
            "transformer.h.7.mlp.deepspeed_moe.experts.deepspeed_experts.3.w1",
            "language_model.model.layers.7.mlp.switch_mlp.up_proj",
            3,
        ),
        ("transformer.mm_projector.image_spatial_proj.2", "multi_modal_projector.linear_2", None),
    ],
)
def test_modules_of_adapters(module: str, path: str, expert: int | None) -> None:
    """An adapter that was trained on another program's model is used beside ours."""
    assert module_path(module) == (path, expert)


@pytest.mark.parametrize("family", ["qwen", "phi"])
def test_lora_inside_the_experts(family: str, tmp_path: Path) -> None:
    """MoE-LLaVA saves the model as peft has wrapped it; in Qwen's fused attention too."""
    config = model_config(family, moe=SPARSE)
    model = reference(config, family)
    state = state_of(model, moe_llava_names(family))
    root, part, targets = {
        "qwen": ("transformer.h", "w2", {"attn.c_attn": (96, 32)}),
        "phi": ("model.layers", "fc1", {"self_attn.dense": (32, 32)}),
    }[family]
    targets |= {f"mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.{part}": (64, 32) for expert in range(4)}
    for layer in config.text_config.sparse_layers:
        for target, (rows, columns) in targets.items():
            down, up = torch.randn(2, columns), torch.randn(rows, 2)
            path = f"{root}.{layer}.{target}"
            state |= {f"{path}.lora_A.default.weight": down, f"{path}.lora_B.default.weight": up}
            inner = target.replace("deepspeed_moe.experts.deepspeed_experts", "experts")
            with torch.no_grad():
                module = model.model.language_model.layers[layer].get_submodule(inner)
                module.weight += 4 / 2 * up @ down
    lora = {"lora_enable": True, "lora_r": 2, "lora_alpha": 4, "lora_bias": "none"}
    write(tmp_path, moe_llava_json(config, family, lora=lora), state, "bin")
    assert largest_error(convert(tmp_path), model) <= TOLERANCE


def test_keys_that_are_missing_from_moe_have_deepspeed_s_defaults(tmp_path: Path) -> None:
    """With those it drops tokens in evaluation, which is said."""
    config = model_config("phi", moe=SPARSE)
    settings = moe_llava_json(config, "phi")
    for key in ("capacity_factor", "eval_capacity_factor", "min_capacity"):
        del settings["moe"][key]
    write(tmp_path, settings, state_of(reference(config, "phi"), moe_llava_names("phi")))
    assert [note.split(" lets")[0] for note in convert(tmp_path).notes] == ["eval_capacity_factor 1"]


@pytest.mark.parametrize("key", ["image_token_id", "image_token_index"])
def test_both_names_of_the_image_token(key: str, tmp_path: Path) -> None:
    write_hf(tmp_path, reference(model_config("llama"), "llama"))

    def renamed(config: dict[str, Any]) -> None:
        for other in ("image_token_id", "image_token_index"):
            config.pop(other, None)
        config[key] = 510

    edit_config(tmp_path, renamed)
    assert convert(tmp_path).config.image_token_index == 510


def test_a_window_that_qwen_names_and_does_not_use(tmp_path: Path) -> None:
    config = model_config("qwen1_5")
    write_hf(tmp_path, reference(config, "qwen1_5"))
    for used, context in ((False, 1024), (True, 256)):
        edit_config(tmp_path, lambda c, on=used: c["text_config"].update(sliding_window=256, use_sliding_window=on))
        assert convert(tmp_path).config.text_config.max_position_embeddings == context


def test_every_system_of_the_papers_has_a_preset_and_a_row_here() -> None:
    decoders = {name: PRESETS[name].text_config for name in PRESETS if name != "gm-tiny"}
    shapes = {traits(text) for text in decoders.values()}
    tested = {
        traits(model_config(family.decoder).text_config) for family in FAMILIES.values() if family.decoder != "eve"
    }
    assert shapes - tested == {traits(decoders["eve-1.8b"])}  # Eve's tiny models are in eve_models.py


def traits(text: Any) -> tuple[Any, ...]:
    return (
        text.norm, text.norm_plus_one, text.scale_embeddings, text.attention_bias, text.parallel_block, text.gated,
        text.hidden_act, text.partial_rotary_factor < 1, text.shortcut_size > 0,
    )  # fmt: skip
