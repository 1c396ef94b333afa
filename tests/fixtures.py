"""Tiny random models and complete model folders, for any test that needs one.

Their weights are drawn so that every part matters: what a model says changes with the image, with each token and with
its position, and is not the last token over and over, as with freshly initialised tied embeddings. It only ever says
whole words, so that an answer's text is tokenized to the ids that were generated, as a trained model's is.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import sentencepiece
from PIL import Image
from tiny_tokenizer import sentencepiece_model, write_sentencepiece

from gm_mlx.chat_template import GEMMA, ChatTemplate
from gm_mlx.config import ModelConfig, MoEConfig, TextConfig, VisionConfig
from gm_mlx.images import HALF, ImageConfig
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.tokenizer import load_tokenizer
from gm_mlx.weights import named_arrays, save_model

VOCAB = 512  # more rows than the tokenizer has ids, as padded vocabularies do
IMAGE_TOKEN = 511
IMAGE_SIZE = 16
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
SPARSE = MoEConfig()
TOWERS: dict[str, dict[str, Any]] = {
    "siglip": {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "clip": {"model_type": "clip_vision_model"},
}


def tiny_config(kind: Literal["siglip", "clip"] = "siglip", moe: MoEConfig | None = SPARSE, **text: Any) -> ModelConfig:
    """A config of two decoder layers (the first sparse) whose image takes 4 tokens; ``text`` overrides TextConfig."""
    defaults: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "moe": moe,
    }
    vision = VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        **TOWERS[kind],
    )
    return ModelConfig(
        text_config=TextConfig(**{**defaults, **text}),
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2 if kind == "clip" else -1,
        vision_feature_select_strategy="default" if kind == "clip" else "full",
    )


@functools.cache
def words() -> list[int]:
    """Ids of the tiny tokenizer's pieces that begin a word; in any order, their text is tokenized to them again."""
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    pieces = [model.id_to_piece(token) for token in range(model.get_piece_size())]
    # A piece that is not what its own text is tokenized to would come back as others.
    return [i for i, piece in enumerate(pieces) if len(piece) > 2 and piece[0] == SPACE and model.encode(piece) == [i]]


def tiny_model(seed: int = 0, config: ModelConfig | None = None) -> Model:
    """A float32 model with random weights that depend on the seed and on each weight's name only."""
    model = Model(config or tiny_config())
    weights = []
    for name, array in named_arrays(model).items():
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        scale = 0.1 if array.ndim == 1 or "embed_tokens" in name else 2 * array.shape[-1] ** -0.5
        if "q_proj" in name or "k_proj" in name:
            scale /= 2  # attention that is neither flat nor on one position only
        value = random.normal(size=array.shape) * scale
        if name.endswith("lm_head.weight"):
            value[np.setdiff1d(np.arange(len(value)), words())] = 0
        weights.append((name, mx.array(value, dtype=mx.float32)))
    model.load_weights(weights)
    model.eval()
    return model


def tiny_folder(
    folder: Path,
    *,
    model: Model | None = None,
    template: ChatTemplate = GEMMA,
    max_shard_bytes: int = 5 << 30,
) -> Path:
    """Write a complete model folder (weights, tokenizer, processor) and return it."""
    model = model or tiny_model()
    config = model.config
    save_model(model, folder, max_shard_bytes=max_shard_bytes)
    tokenizer = load_tokenizer(write_sentencepiece(folder), template.controls)
    image = ImageConfig(config.vision_config.image_size, "resize", HALF, HALF)
    Processor(tokenizer, template, image, config.image_token_index, config.num_image_tokens).save(folder)
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (20, 12)) -> Image.Image:
    """An RGB image of noise."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
