"""Tiny PyTorch checkpoints in every layout that the converter reads, written from transformers' own models.

A reference model is Hugging Face's LLaVA in transformers 5, with ``NaiveMoE`` in its sparse layers. Its state dict is
renamed by the tables of ``checkpoint_layouts``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from checkpoint_layouts import State
from qwen_reference import QwenMLP, QwenModel
from safetensors.torch import save_file
from tiny_tokenizer import write_sentencepiece
from torch_reference import NaiveMoE, gemma_config, randomise, vision_config
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    StableLmConfig,
)

from gm_mlx.config import ModelConfig, MoEConfig, TextConfig, VisionConfig
from gm_mlx.convert.checkpoint import open_checkpoint
from gm_mlx.convert.translate import Translation, translate
from gm_mlx.model import Model

TOLERANCE = 1e-4  # of the largest logit
VOCAB = 512  # more rows than the tiny tokenizer has ids
# The sizes are those that a known tower's id allows: heads of 64 (CLIP) or 72 (SigLIP) channels, patches of 14 pixels.
TOWERS = {
    "clip": VisionConfig("clip_vision_model", 128, 48, 3, 2, image_size=28, patch_size=14),
    "siglip": VisionConfig(
        "siglip_vision_model", 144, 48, 3, 2, image_size=32, patch_size=14, hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    ),
}  # fmt: skip
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 1024,
}  # fmt: skip
# No value is the default of a family's class, so that one that is not read shows.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "llama": {
        "head_dim": 8, "hidden_act": "silu", "tie_word_embeddings": False, "norm_plus_one": False,
        "scale_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
    },
}  # fmt: skip
FAMILIES["mistral"] = FAMILIES["llama"]
FAMILIES["qwen1_5"] = {**FAMILIES["llama"], "attention_bias": "qkv"}
FAMILIES["qwen"] = {**FAMILIES["qwen1_5"], "num_key_value_heads": 4}
FAMILIES["stablelm"] = {**FAMILIES["qwen1_5"], "norm": "layer", "rms_norm_eps": 1e-4, "partial_rotary_factor": 0.5}
FAMILIES["phi"] = {
    **FAMILIES["stablelm"], "attention_bias": "all", "partial_rotary_factor": 0.75, "parallel_block": True,
    "gated": False, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip


def model_config(family: str = "gemma", tower: str = "clip", moe: MoEConfig | None = None, **join: Any) -> ModelConfig:
    """What a converted checkpoint of this kind must say of itself."""
    text = TextConfig(**{**SIZES, **FAMILIES[family]}, moe=moe)
    return ModelConfig(text, TOWERS[tower], **{"image_token_index": VOCAB - 1, **join})


def reference(config: ModelConfig, family: str = "gemma", seed: int = 0) -> Any:
    """Hugging Face's LLaVA of this config, with random weights."""
    torch.manual_seed(seed)
    text = config.text_config
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=hf_text_config(text, family),
            vision_config=vision_config(config.vision_config),
            image_token_index=config.image_token_index,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            tie_word_embeddings=text.tie_word_embeddings,
        )
    )
    ffn = None
    if family == "qwen":
        model.model.language_model, ffn = QwenModel(text), QwenMLP
    for layer in text.sparse_layers:
        assert text.moe is not None
        model.model.language_model.layers[layer].mlp = NaiveMoE(text, text.moe, ffn)
    return randomise(model)


def hf_text_config(text: TextConfig, family: str) -> Any:
    if family == "gemma":
        config = gemma_config(text)
        config.max_position_embeddings = text.max_position_embeddings
        return config
    kind: Any = {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "qwen": LlamaConfig,  # whose model is replaced
        "qwen1_5": Qwen2Config,
        "stablelm": StableLmConfig,
        "phi": PhiConfig,
    }[family]
    norm = "rms_norm_eps" if text.norm == "rms" else "layer_norm_eps"
    rope = {"rope_type": "default", "rope_theta": text.rope_theta}
    own: dict[str, Any] = {}
    if text.norm == "layer":
        rope["partial_rotary_factor"] = text.partial_rotary_factor
    if family == "stablelm":
        own = {"use_qkv_bias": True}
    if family == "llama" and text.attention_bias == "all":
        own = {"attention_bias": True}
    return kind(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        vocab_size=text.vocab_size,
        hidden_act=text.hidden_act,
        rope_parameters=rope,
        max_position_embeddings=text.max_position_embeddings,
        tie_word_embeddings=False,
        **{norm: text.rms_norm_eps, **own},
    )


def write(folder: Path, config: Mapping[str, Any] | None, state: State, file: str = "safetensors") -> Path:
    """Write weights, ``config.json`` and a tokenizer; ``file`` is "safetensors" or "bin", with "sharded " before it."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        write_sentencepiece(folder)
    stem, suffix = ("model", "safetensors") if file.endswith("safetensors") else ("pytorch_model", "bin")
    names = [f"{stem}.{suffix}"]
    if file.startswith("sharded"):
        names = [f"{stem}-{i:05d}-of-00002.{suffix}" for i in (1, 2)]
    # Every other tensor, so that the experts of a layer lie in two files.
    shards = [dict(list(state.items())[i :: len(names)]) for i in range(len(names))]
    for name, shard in zip(names, shards, strict=True):
        if suffix == "bin":
            torch.save(shard, folder / name)
        else:
            save_file({key: tensor.contiguous() for key, tensor in shard.items()}, folder / name, {"format": "pt"})
    if len(names) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_hf(folder: Path, model: Any, **options: Any) -> Path:
    """Let transformers write a model, and add a tokenizer."""
    model.save_pretrained(folder, **options)
    return write_sentencepiece(folder)


def torch_logits(model: Any, config: ModelConfig, ids: np.ndarray, pixels: np.ndarray, scale: bool) -> np.ndarray:
    """PyTorch's logits [B, L, V]; with ``scale``, as transformers before 5.4 computed them for Gemma."""
    factor = config.text_config.hidden_size**0.5 if scale else 1.0
    with torch.no_grad():
        images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        features = torch.cat(list(model.get_image_features(images).pooler_output))
        slots = torch.from_numpy(ids == config.image_token_index)
        embeddings = model.get_input_embeddings()(torch.from_numpy(ids).clamp(max=VOCAB - 1))
        embeddings[slots] = features * factor
        return model.lm_head(model.model.language_model(inputs_embeds=embeddings).last_hidden_state).numpy()


def loaded(translation: Translation) -> Model:
    """The model of a translation, in float32."""
    model = Model(translation.config)
    arrays = []
    for name, tensor in translation.tensors.items():
        array = tensor.read()
        assert array.shape == tensor.shape, name
        arrays.append((name, array.astype(mx.float32)))
    model.load_weights(arrays)
    model.eval()
    return model


def largest_error(translation: Translation, model: Any) -> float:
    """Largest difference of logits, over the largest logit, on two prompts with an image each."""
    config = translation.config
    random = np.random.default_rng(3)
    size = config.vision_config.image_size
    pixels = random.normal(size=(2, size, size, 3)).astype(np.float32)
    ids = random.integers(3, 300, (2, config.num_image_tokens + 7))
    ids[:, 2 : 2 + config.num_image_tokens] = config.image_token_index
    theirs = torch_logits(model, config, ids, pixels, config.scale_image_features)
    ours = loaded(translation)
    logits = np.array(ours.logits(ours.hidden(ours.embed(ids, ours.encode_images(mx.array(pixels))))))
    assert logits.shape == theirs.shape
    return float(np.abs(logits - theirs).max() / np.abs(theirs).max())


def convert(folder: Path, **options: Any) -> Translation:
    """Open and translate a checkpoint."""
    return translate(open_checkpoint(folder), **options)


def write_tower(folder: Path, model: Any, whole: bool) -> Path:
    """The tower of a reference model as CLIPModel or SiglipModel, or as CLIPVisionModel."""
    tower = model.model.vision_tower
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
        is_clip = tower.config.model_type == "clip_vision_model"
        kind: Any = CLIPModel if is_clip else SiglipModel
        config: Any = CLIPConfig if is_clip else SiglipConfig
        whole_model = kind(config(vision_config={**tower.config.to_dict(), "vision_use_head": True}, text_config=text))
        whole_model.vision_model.load_state_dict(tower.state_dict(), strict=False)
        whole_model.save_pretrained(folder)
    else:
        vision_model = CLIPVisionModel(tower.config)
        vision_model.load_state_dict(tower.state_dict())
        vision_model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a folder's ``config.json`` in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
