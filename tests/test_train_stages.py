"""What learns in each stage and what does not, and models that are made sparse before they learn."""

from __future__ import annotations

import re
from pathlib import Path

import eve_models
import mlx.core as mx
import numpy as np
import pytest
from fixtures import tiny_config, tiny_model
from lora_models import CONFIGS, model_of
from mlx.utils import tree_flatten
from train_runs import batches, conversations, reader, run, weights

from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.inventory import COMPONENTS, model_layers
from gm_mlx.presets import EVF
from gm_mlx.processor import Processor
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.data import collate
from gm_mlx.train.stages import STAGES, WORDS, chosen_components, select, select_stage, upcycle
from gm_mlx.weights import named_arrays

SPARSE: dict[str, ModelConfig] = {
    **{name: tiny_config(**text) for name, text in CONFIGS.items()},
    "residual": tiny_config(moe=MoEConfig(use_residual=True)),
    "clip": tiny_config("clip"),
    "eve": eve_models.CONFIG,
}
DENSE = {"gemma": tiny_config(moe=None), "eve": eve_models.DENSE}

# What each component's weights are called, told apart by the names alone.
NAMES = {
    "tower": r"vision_tower\..*",
    "projector": r"multi_modal_projector\..*",
    "embeddings": r".*\.embed_tokens\.weight|.*\.lm_head\.weight",
    "attention": r"language_model\..*\.(self_attn|attn_linear)\..*",
    "experts": r".*\.mlp\.(switch_mlp|vision_ffn)\..*",
    "routers": r".*\.mlp\.(gate\.(weight|u|v)|coefficient\..*)",
    "dense_ffn": r"language_model\..*\.mlp\.((mlp|language_ffn)\.)?(\w+_proj2?|fc\d)\.(weight|bias)",
    "norms": r"language_model\.(.*layernorm|model\.norm)\..*",
}


def component_of(name: str) -> str:
    found = [component for component, pattern in NAMES.items() if re.fullmatch(pattern, name)]
    assert len(found) == 1, (name, found)
    return found[0]


def trainable(model) -> set[str]:
    return set(dict(tree_flatten(model.trainable_parameters())))


@pytest.mark.parametrize("kind", SPARSE)
def test_a_component_is_all_that_has_its_names(kind: str) -> None:
    model = tiny_model(config=SPARSE[kind])
    for component in {layer.component for layer in model_layers(SPARSE[kind])}:
        wanted = {name for name in named_arrays(model) if component_of(name) == component}
        assert wanted
        counts = select(model, [component])
        assert trainable(model) == wanted
        assert counts == {component: sum(named_arrays(model)[name].size for name in wanted)}


@pytest.mark.parametrize("kind", SPARSE)
def test_the_papers_stages(kind: str) -> None:
    model = tiny_model(config=SPARSE[kind])
    every = {name: component_of(name) for name in named_arrays(model)}
    learns = {
        1: {"projector"},
        2: set(COMPONENTS) - {"tower"},
        3: {"experts", "routers"},
    }
    for stage, components in learns.items():
        counts = select_stage(model, stage)
        assert trainable(model) == {name for name, component in every.items() if component in components}
        assert list(counts) == [component for component in COMPONENTS if component in components]
    select(model, ["all_ffn"])
    assert {every[name] for name in trainable(model)} <= {"projector", "dense_ffn", "experts", "routers"}
    assert not any(".mlp." in name for name in set(every) - trainable(model) if name.startswith("language_model."))


@pytest.mark.parametrize("kind", ["gemma", "phi", "residual", "eve"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_learns_moves_and_nothing_else(kind: str, stage: int, tmp_path: Path) -> None:
    if kind == "eve":
        processor = eve_reader(tmp_path / "model")
    else:
        processor = reader(tmp_path / "model")
    model = tiny_model(config=SPARSE[kind])
    before = weights(model)
    select_stage(model, stage)
    learns = trainable(model)
    run(model, batches(processor), TrainConfig(steps=2, learning_rate=1e-2, log_every=1), tmp_path / "run")
    moved = {name for name, array in weights(model).items() if not np.array_equal(before[name], array)}
    assert moved <= learns
    # A row of the vocabulary that no question has gets no gradient, but each matrix that learns moves somewhere.
    assert moved == learns


def eve_reader(folder: Path) -> Processor:
    """A processor for ``eve_models.CONFIG``."""
    import dataclasses

    own, config = reader(folder), eve_models.CONFIG
    assert own.image is not None
    return dataclasses.replace(
        own,
        image=dataclasses.replace(own.image, size=config.vision_config.image_size),
        image_token_id=config.image_token_index,
        tokens_per_image=config.num_image_tokens,
    )


@pytest.mark.parametrize(
    ("trains", "message"),
    [
        (["expert"], r"trains: 'expert' is none of tower, projector, .*, decoder, moe, all_ffn"),
        (["moe"], r"trains: the model has no moe; make experts with --upcycle, such as 4x2"),
        (["projector", "routers"], r"the model has no routers; leave it out"),
    ],
)
def test_words_that_mean_nothing(trains: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(tiny_model(config=DENSE["gemma"]), trains)


def test_words_for_several_take_what_there_is() -> None:
    assert chosen_components(DENSE["gemma"], ["all_ffn"]) == ("projector", "dense_ffn")
    assert chosen_components(DENSE["gemma"], STAGES[2]) == (
        "projector", "embeddings", "attention", "dense_ffn", "norms",
    )  # fmt: skip
    assert {component for words in WORDS.values() for component in words} <= set(COMPONENTS)


@pytest.mark.parametrize("table", ["q4", "mxfp4"])
def test_what_is_quantized_does_not_learn_whole(table: str) -> None:
    model = model_of("gemma", table)
    for stage, path in ((1, "multi_modal_projector.linear_1"), (2, "multi_modal_projector"), (3, "switch_mlp")):
        with pytest.raises(UserError, match=rf"cannot learn as a whole, since .*{path}.* quantized; train LoRA on it"):
            select_stage(model, stage)
    # What is not packed can learn beside it: routers never are, and here the projector is not.
    assert select(model_of("gemma", "mixed"), ["projector", "routers"]).keys() == {"projector", "routers"}


@pytest.mark.parametrize("moe", [MoEConfig(), MoEConfig(num_experts=3, top_k=1), MoEConfig(use_residual=True)])
def test_experts_begin_as_the_dense_model(moe: MoEConfig, tmp_path: Path) -> None:
    """With pictures, to the last bits that sums of equal terms leave open."""
    processor = reader(tmp_path)
    batch = collate(conversations(processor, 3), pad_id=0)

    def hidden(model) -> np.ndarray:
        return np.array(model.hidden(model.embed(batch.ids, model.encode_images(batch.pixels))))

    dense = tiny_model(config=DENSE["gemma"])
    sparse = upcycle(dense, moe)
    assert sparse.config.text_config.moe == moe
    theirs, ours = hidden(dense), hidden(sparse)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    arrays = named_arrays(sparse)
    experts = arrays["language_model.model.layers.0.mlp.switch_mlp.up_proj.weight"]
    for expert in experts:  # no noise
        assert mx.array_equal(expert, named_arrays(dense)["language_model.model.layers.0.mlp.up_proj.weight"])


def test_vision_ffns_begin_as_the_language_ffns() -> None:
    dense = tiny_model(config=DENSE["eve"])
    sparse = upcycle(dense, EVF)
    words = mx.array(np.random.default_rng(0).integers(3, 300, (1, 20)))
    assert mx.array_equal(sparse(words), dense(words))
    networks = sparse.layers[2].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert mx.array_equal(networks.vision_ffn[name].weight, networks.language_ffn[name].weight)


def test_a_seed_makes_the_routers_and_nothing_else() -> None:
    dense = tiny_model(config=DENSE["gemma"])
    first, again, other = (named_arrays(upcycle(dense, MoEConfig(), seed=seed)) for seed in (1, 1, 2))
    for name, array in first.items():
        assert mx.array_equal(array, again[name])
        assert mx.array_equal(array, other[name]) == (component_of(name) != "routers")


def test_a_sparse_model_is_not_made_sparse_again() -> None:
    with pytest.raises(UserError, match="has experts already"):
        upcycle(tiny_model(), MoEConfig())
