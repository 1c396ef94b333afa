"""Tiny random checkpoints of every family that can be converted, with the files that such a checkpoint has."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import eve_models
from checkpoint_layouts import LLAVA, Table, llava_json, moe_llava_json, moe_llava_names, state_of
from checkpoints import model_config, reference, write, write_hf
from eve_reference import eve
from tiny_byte_pairs import ranks, write_ranks, write_vocabulary

from gm_mlx.chat_template import OPENCHAT_END
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.tokenizer import load_tokenizer


def openchat(folder: Path) -> None:
    size = load_tokenizer(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({OPENCHAT_END: size, "<|pad_0|>": size + 1}))


def tiktoken(name: str) -> Callable[[Path], Any]:
    few = dict(list(ranks().items())[:270])  # with the special tokens behind them fewer than the embedding has rows
    return lambda folder: write_ranks(folder, name, few)


class Family(NamedTuple):
    """A kind of checkpoint.

    Attributes:
        decoder: a key of ``checkpoints.FAMILIES``; "eve" for Eve.
        layout: "Hugging Face LLaVA", "LLaVA", "MoE-LLaVA" or "Eve".
        template: the chat template that it must get.
        tokenizer: writes its tokenizer's files in the place of the tiny SentencePiece model.
        experts: its experts, if it has any.
    """

    decoder: str
    layout: str
    template: str
    tokenizer: Callable[[Path], Any] | None = None
    experts: MoEConfig | None = None


PHI_FILES = functools.partial(write_vocabulary, size=300)
MOE = MoEConfig()
FAMILIES = {
    "llava-gm": Family("gemma", "MoE-LLaVA", "gemma", None, MOE),
    "llava-gemma": Family("gemma", "Hugging Face LLaVA", "gemma"),
    "llava-1.5": Family("llama", "LLaVA", "v1"),
    "moe-llava-llama": Family("llama", "MoE-LLaVA", "v1", None, MOE),
    "moe-llava-openchat": Family("mistral", "MoE-LLaVA", "openchat", openchat, MOE),
    "moe-llava-stablelm": Family("stablelm", "MoE-LLaVA", "phi", tiktoken("arcade100k.tiktoken"), MOE),
    "moe-llava-qwen": Family("qwen", "MoE-LLaVA", "phi", tiktoken("qwen.tiktoken"), MOE),
    "moe-llava-qwen-residual": Family(
        "qwen", "MoE-LLaVA", "phi", tiktoken("qwen.tiktoken"), MoEConfig(2, 1, norm_topk_prob=False, use_residual=True)
    ),
    "moe-llava-qwen1.5": Family("qwen1_5", "MoE-LLaVA", "v1", None, MOE),
    "moe-llava-phi": Family("phi", "MoE-LLaVA", "phi", PHI_FILES, MOE),
    "dense-mistral": Family("mistral", "Hugging Face LLaVA", "v1"),
    "dense-stablelm": Family("stablelm", "Hugging Face LLaVA", "v1"),
    "dense-qwen1.5": Family("qwen1_5", "Hugging Face LLaVA", "v1"),
    "dense-qwen": Family("qwen", "MoE-LLaVA", "phi", tiktoken("qwen.tiktoken")),
    "dense-phi": Family("phi", "Hugging Face LLaVA", "v1"),
    "eve": Family("eve", "Eve", "v1"),
}


class Written(NamedTuple):
    """A checkpoint on disk, the PyTorch model in it, and what its config must become."""

    folder: Path
    model: Any
    config: ModelConfig


def write_family(folder: Path, family: Family) -> Written:
    """Write a checkpoint whose tokenizer is the family's own."""
    if family.decoder == "eve":
        model = eve(eve_models.CONFIG)
        return Written(eve_models.write_eve(folder, model), model, eve_models.CONFIG)
    config = model_config(family.decoder, moe=family.experts)
    model = reference(config, family.decoder)
    if family.layout == "Hugging Face LLaVA":
        write_hf(folder, model)
    else:
        names: Table = LLAVA if family.layout == "LLaVA" else moe_llava_names(family.decoder)
        settings = (llava_json if family.layout == "LLaVA" else moe_llava_json)(config, family.decoder)
        write(folder, settings, state_of(model, names))
    if family.tokenizer is not None:
        if family.tokenizer is not openchat:  # which adds to what is there
            (folder / "tokenizer.model").unlink()
            (folder / "tokenizer_config.json").unlink(missing_ok=True)
        family.tokenizer(folder)
    return Written(folder, model, config)
