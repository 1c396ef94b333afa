"""The presets are the published models: counts to the last tensor and parameter, without an array."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch

import pytest

from gm_mlx.config import ModelConfig
from gm_mlx.inventory import Layer, model_layers
from gm_mlx.presets import PRESETS

# Tensors and parameters of the language model, dense and with experts, and of the checkpoint's files, which have the
# whole of CLIP-L/336 and the projector too. Sums of published shapes; file sizes on Hugging Face agree where known.
PUBLISHED = {
    "moe-llava-stablelm-1.6b": ((340, 1_644_515_328), (460, 2_890_321_920), (855, 3_200_124_928)),
    "moe-llava-qwen-1.8b": ((195, 1_836_828_672), (315, 3_054_323_712), (710, 3_364_126_720)),
    "moe-llava-phi2-2.7b": ((452, 2_779_632_640), (660, 5_296_993_280), (1055, 5_609_680_896)),
    "moe-llava-openchat-7b": ((291, 7_241_748_480), (451, 15_697_727_488), (846, 16_022_214_656)),
    "llava-gm-2b": ((164, 2_506_172_416), (254, 5_224_155_136), (649, 5_533_958_144)),
    "llava-gm-7b": ((254, 8_537_680_896), (394, 18_050_534_400), (789, 18_366_630_912)),
    "llava-1.5-7b": ((291, 6_738_415_616), None, (686, 7_062_902_784)),
    "llava-gemma-2b": ((164, 2_506_172_416), None, (559, 2_815_975_424)),
}
# Per decoder layer: dense, and with 4 experts.
PER_LAYER = {
    "moe-llava-stablelm-1.6b": (14, 24),
    "moe-llava-qwen-1.8b": (8, 18),
    "moe-llava-phi2-2.7b": (14, 27),
    "moe-llava-openchat-7b": (9, 19),
    "llava-gm-2b": (9, 19),
    "llava-gm-7b": (9, 19),
}
# Bytes of keys and values per token in float16.
KV_BYTES = {
    "moe-llava-stablelm-1.6b": 196_608,
    "moe-llava-qwen-1.8b": 196_608,
    "moe-llava-phi2-2.7b": 327_680,
    "moe-llava-openchat-7b": 131_072,
    "llava-gm-2b": 18_432,
    "llava-gm-7b": 458_752,
}
POST_LAYERNORM = (2, 2 * 1024)  # stored with every CLIP, and never read


def published(name: str) -> ModelConfig:
    """A preset as it was published: Gemma's vocabulary is not padded, and all of the tower's layers are there."""
    config = PRESETS[name]
    text = config.text_config
    rows = 256_000 if text.scale_embeddings else text.vocab_size
    return replace(config, text_config=replace(text, vocab_size=rows), vision_feature_layer=-1)


def stored(name: str, config: ModelConfig, part: str = "") -> tuple[int, int]:
    """Tensors and parameters of a part as a checkpoint has them: experts one by one, and Qwen's attention as one."""
    layers = [layer for layer in model_layers(config) if layer.path.startswith(part)]
    fused = ("language_model.*.k_proj", "language_model.*.v_proj") if "qwen" in name else ()
    apart = [layer for layer in layers if not any(fnmatch(layer.path, pattern) for pattern in fused)]
    return sum(map(tensors, apart)), sum(layer.total for layer in layers)


def tensors(layer: Layer) -> int:
    shapes = list(layer.arrays.values())
    return sum(shape[0] for shape in shapes) if ".switch_mlp." in layer.path else len(shapes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_the_published_checkpoints(name: str) -> None:
    dense, sparse, files = PUBLISHED[name]
    config = published(name)
    without = replace(config, text_config=replace(config.text_config, moe=None))
    assert stored(name, without, "language_model") == dense
    if sparse is not None:
        assert stored(name, config, "language_model") == sparse
    count, parameters = stored(name, config)
    assert (count + POST_LAYERNORM[0], parameters + POST_LAYERNORM[1]) == files


@pytest.mark.parametrize("name", PER_LAYER)
def test_tensors_of_a_layer(name: str) -> None:
    config = published(name)
    for layer, expected in ((1, PER_LAYER[name][0]), (0, PER_LAYER[name][1])):
        assert stored(name, config, f"language_model.model.layers.{layer}.")[0] == expected


@pytest.mark.parametrize("name", KV_BYTES)
def test_keys_and_values_per_token(name: str) -> None:
    text = PRESETS[name].text_config
    assert 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim == KV_BYTES[name]


@pytest.mark.parametrize("name", PRESETS)
def test_experts_are_in_every_other_layer(name: str) -> None:
    text = PRESETS[name].text_config
    assert text.sparse_layers == (list(range(0, text.num_hidden_layers, 2)) if text.moe else [])


@pytest.mark.parametrize("name", PRESETS)
def test_an_image_s_slots_take_an_id_that_is_no_token_s(name: str) -> None:
    """Tokenizers have fewer ids than embeddings have rows, or as many."""
    first = {"llava-gm-2b": 256_000, "moe-llava-stablelm-1.6b": 100_289, "moe-llava-qwen-1.8b": 151_851}
    if name in first:
        assert PRESETS[name].image_token_index == first[name]
    assert PRESETS[name].image_token_index <= PRESETS[name].text_config.vocab_size
