"""Parity of the whole path with Hugging Face: pixels, tower, projector, merged embeddings, logits."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_reference import CLIP, IMAGE_TOKEN, SIGLIP, TEXT, copy_weights, model_pair, relative_error, siglip

from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.model import Model, pool
from gm_mlx.vision import VisionTower

TOLERANCE = 1e-4
DENSE = ModelConfig(text_config=TEXT, vision_config=CLIP, image_token_index=IMAGE_TOKEN)
SPARSE = replace(DENSE, text_config=replace(TEXT, moe=MoEConfig()))


def pictures(count: int, size: int = CLIP.image_size) -> np.ndarray:
    """Pixels [N, H, W, 3] as our models take them."""
    return np.random.default_rng(3).normal(size=(count, size, size, 3)).astype(np.float32)


def to_torch(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())  # [N, 3, H, W]


def prompts(config: ModelConfig, images_per_row: list[int]) -> np.ndarray:
    """Ids [B, L]: each row is text with its images apart from each other, filled up with text to one length."""
    random = np.random.default_rng(5)
    width = max(images_per_row) * (config.num_image_tokens + 2) + 5
    rows = []
    for images in images_per_row:
        row: list[int] = []
        for _ in range(images):
            row += [*random.integers(3, 60, 2), *[IMAGE_TOKEN] * config.num_image_tokens]
        rows.append([*row, *random.integers(3, 60, width - len(row))])
    return np.array(rows)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("images_per_row", [[1], [2], [1, 2]], ids=["one image", "two images", "batch"])
def test_every_stage_equals_hugging_face(config: ModelConfig, images_per_row: list[int]) -> None:
    model, reference = model_pair(config)
    pixels, ids = pictures(sum(images_per_row)), prompts(config, images_per_row)
    with torch.no_grad():
        tower = reference.model.vision_tower(to_torch(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
        features = torch.stack(list(reference.get_image_features(to_torch(pixels)).pooler_output))
        seen: list[torch.Tensor] = []
        hook = reference.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        logits = reference(input_ids=torch.from_numpy(ids), pixel_values=to_torch(pixels)).logits
        hook.remove()

    ours = model.encode_images(mx.array(pixels))
    embeddings = model.embed(ids, ours)
    assert relative_error(model.vision_tower(mx.array(pixels)), tower) <= TOLERANCE
    assert relative_error(ours, features) <= TOLERANCE
    assert relative_error(embeddings, seen[0]) <= TOLERANCE
    assert relative_error(model.logits(model.hidden(embeddings)), logits) <= TOLERANCE
    assert relative_error(model(mx.array(ids), input_embeddings=embeddings), logits) <= TOLERANCE


def test_scaled_image_features_are_what_older_transformers_computed() -> None:
    """transformers before 5.4 multiplied everything it was given by sqrt(d), images as well."""
    model, reference = model_pair(replace(DENSE, scale_image_features=True))
    pixels, ids = pictures(3), prompts(DENSE, [1, 2])
    with torch.no_grad():
        features = torch.cat(list(reference.get_image_features(to_torch(pixels)).pooler_output))
        embeddings = reference.get_input_embeddings()(torch.from_numpy(ids))
        embeddings[torch.from_numpy(ids == IMAGE_TOKEN)] = features * TEXT.hidden_size**0.5
        logits = reference.lm_head(reference.model.language_model(inputs_embeds=embeddings).last_hidden_state)
    ours = model.embed(ids, model.encode_images(mx.array(pixels)))
    assert relative_error(ours, embeddings) <= TOLERANCE
    assert relative_error(model.logits(model.hidden(ours)), logits) <= TOLERANCE


def test_the_class_token_stays_when_the_config_says_full() -> None:
    config = replace(DENSE, vision_feature_select_strategy="full", vision_feature_layer=-1)
    model, reference = model_pair(config)
    pixels, ids = pictures(2), prompts(config, [2])
    assert config.num_image_tokens == CLIP.num_patches + 1
    with torch.no_grad():
        logits = reference(input_ids=torch.from_numpy(ids), pixel_values=to_torch(pixels)).logits
    embeddings = model.embed(ids, model.encode_images(mx.array(pixels)))
    assert relative_error(model.logits(model.hidden(embeddings)), logits) <= TOLERANCE


@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
def test_siglip_tower(layer: int) -> None:
    config = ModelConfig(
        text_config=TEXT,
        vision_config=SIGLIP,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=layer,
        vision_feature_select_strategy="full",
    )
    reference = siglip(SIGLIP)
    tower = VisionTower(SIGLIP, config.num_vision_layers_used, keep_first=True)
    copy_weights(reference, tower, config.num_vision_layers_used)
    pixels = pictures(2, SIGLIP.image_size)
    with torch.no_grad():
        theirs = reference(to_torch(pixels), output_hidden_states=True).hidden_states[layer]
    ours = tower(mx.array(pixels))
    assert ours.shape == (2, SIGLIP.num_patches, SIGLIP.hidden_size)
    assert relative_error(ours, theirs) <= TOLERANCE


@given(
    count=st.integers(1, 3),
    side=st.integers(1, 6),
    stride=st.integers(1, 5),
    size=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_pooling_equals_pytorch(count: int, side: int, stride: int, size: int, dtype: str, seed: int) -> None:
    grid = side * stride
    values = np.random.default_rng(seed).normal(size=(count, grid * grid, size)).astype(np.float32)
    theirs = torch.from_numpy(values).to(getattr(torch, dtype)).float()  # [B, N, D], as rounded as ours
    maps = theirs.transpose(1, 2).reshape(count, size, grid, grid)
    expected = torch.nn.functional.avg_pool2d(maps, stride).flatten(2).transpose(1, 2)
    ours = pool(mx.array(values).astype(getattr(mx, dtype)), stride)
    assert ours.dtype == mx.float32 and ours.shape == (count, side * side, size)
    np.testing.assert_allclose(np.array(ours), expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("stride", "scale"), [(2, False), (2, True), (4, True)])
def test_pooled_features_are_pooled_after_the_projector(stride: int, scale: bool) -> None:
    """And before they are scaled: the order in which llama.cpp's projector and Gemma's embeddings follow each other."""
    config = replace(SPARSE, spatial_pool_stride=stride, scale_image_features=scale)
    model, reference = model_pair(config)
    pixels, ids = pictures(3), prompts(config, [1, 2])
    with torch.no_grad():
        features = torch.stack(list(reference.get_image_features(to_torch(pixels)).pooler_output))  # [3, 16, D]
        maps = features.transpose(1, 2).reshape(3, TEXT.hidden_size, 4, 4)
        pooled = torch.nn.functional.avg_pool2d(maps, stride).flatten(2).transpose(1, 2)
        embeddings = reference.get_input_embeddings()(torch.from_numpy(ids))
        slots = pooled.reshape(-1, TEXT.hidden_size) * (TEXT.hidden_size**0.5 if scale else 1)
        embeddings[torch.from_numpy(ids == IMAGE_TOKEN)] = slots
        logits = reference.lm_head(reference.model.language_model(inputs_embeds=embeddings).last_hidden_state)
    ours = model.encode_images(mx.array(pixels))
    assert ours.shape == (3, config.num_image_tokens, TEXT.hidden_size)
    assert relative_error(ours, pooled) <= TOLERANCE
    merged = model.embed(ids, ours)
    assert relative_error(merged, embeddings) <= TOLERANCE
    assert relative_error(model.logits(model.hidden(merged)), logits) <= TOLERANCE


def test_pooled_features_have_the_decoders_dtype() -> None:
    model = Model(replace(DENSE, spatial_pool_stride=2))
    model.set_dtype(mx.bfloat16)
    assert model.encode_images(mx.array(pictures(1))).dtype == mx.bfloat16


def test_text_alone_equals_gemma() -> None:
    model, reference = model_pair(SPARSE)
    ids = np.random.default_rng(7).integers(3, 60, (2, 9))
    with torch.no_grad():
        logits = reference(input_ids=torch.from_numpy(ids)).logits
    assert relative_error(model(mx.array(ids)), logits) <= TOLERANCE


def test_the_embedding_scale_is_rounded_to_the_activation_dtype() -> None:
    model = Model(replace(DENSE, text_config=replace(TEXT, hidden_size=3072, num_hidden_layers=1, vocab_size=8)))
    model.set_dtype(mx.bfloat16)
    assert model.language_model.embedding_scale.item() == 55.5  # sqrt(3072) = 55.43


@pytest.mark.parametrize("given", [None, 1, 3])
def test_features_that_do_not_fit_the_slots_are_counted(given: int | None) -> None:
    model = Model(DENSE)
    features = None if given is None else mx.zeros((given, CLIP.num_patches, TEXT.hidden_size))
    count = (given or 0) * CLIP.num_patches
    with pytest.raises(ValueError, match=f"{2 * CLIP.num_patches} image positions but the images give {count}"):
        model.embed(prompts(DENSE, [2]), features)


def test_an_image_token_outside_the_vocabulary_is_never_looked_up() -> None:
    config = replace(DENSE, image_token_index=10_000)
    model = Model(config)
    ids = np.array([[3, *[10_000] * CLIP.num_patches, 4]])
    x = model.embed(ids, mx.full((1, CLIP.num_patches, TEXT.hidden_size), 2.0))
    assert mx.array_equal(x[0, 1:-1], mx.full((CLIP.num_patches, TEXT.hidden_size), 2.0))
    assert mx.array_equal(x[0, [0, -1]], model.language_model.embed(mx.array([3, 4])))
