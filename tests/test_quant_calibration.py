"""Calibration: where samples come from, and what is noted while the model reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import IMAGE_TOKEN, picture, tiny_config, tiny_folder, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gm_mlx import cpu
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.moe import SparseMLP
from gm_mlx.processor import Processor
from gm_mlx.quant.calibration import LAYERS, Calibration, Sample, calibrate, encode, experts_path, load_samples
from gm_mlx.quant.drawings import DRAWINGS, SIZES, draw
from gm_mlx.weights import apply_quantization, named_arrays

SAMPLES = [
    Sample("What colour is the shape?", [picture(0)]),
    Sample("Hello world, how many small blue squares are there in the two pictures?", [picture(1), picture(2)]),
    Sample("Hello"),
    Sample("The quick brown fox jumps over the lazy dog. " * 3, [picture(3)]),
]


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.from_folder(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


def test_built_in_samples_are_varied_and_always_the_same() -> None:
    samples = load_samples(None, 48)
    again = load_samples(None, 60)[:48]
    assert [(s.prompt, [image.tobytes() for image in s.images]) for s in samples] == [
        (s.prompt, [image.tobytes() for image in s.images]) for s in again
    ]
    assert len({s.prompt for s in samples}) > 15
    assert len({image.tobytes() for s in samples for image in s.images}) == sum(len(s.images) for s in samples)
    assert {len(s.images) for s in samples} == {0, 1}
    assert {image.size for s in samples for image in s.images} == set(SIZES)


def test_drawings_differ_in_their_statistics() -> None:
    grain, spread = [], []
    for index in range(len(DRAWINGS)):
        values = np.asarray(draw(index).convert("L")).astype(float)
        grain.append(np.abs(np.diff(values, axis=1)).mean())
        spread.append(values.std())
    assert max(grain) > 20 * min(grain)
    assert min(spread) > 1


def test_a_folder_gives_its_images_spread_over_their_names(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("RGB", (8 + i, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    samples = load_samples(tmp_path, 3)
    assert [s.images[0].width for s in samples] == [8, 10, 12]
    assert len({s.prompt for s in samples}) == 3
    assert [s.images[0].width for s in load_samples(tmp_path, 100)] == [8, 9, 10, 11, 12, 13]


def test_large_images_are_made_smaller(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "a.png")
    assert load_samples(tmp_path, 1)[0].images[0].size == (1024, 512)


def test_a_file_gives_its_first_lines(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("L", (5, 7)).save(tmp_path / "pictures" / "a.png")
    lines = [
        {"image": "pictures/a.png", "prompt": "What is it?", "answer": "a box"},
        {"image": ["pictures/a.png", str(tmp_path / "pictures" / "a.png")], "prompt": "Do they differ?"},
        {"image": None, "prompt": "Größe?"},
        {"image": "missing.png", "prompt": "never read"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    samples = load_samples(path, 3)
    assert [(s.prompt, len(s.images)) for s in samples] == [("What is it?", 1), ("Do they differ?", 2), ("Größe?", 0)]
    assert (samples[0].images[0].size, samples[0].images[0].mode) == ((5, 7), "RGB")
    with pytest.raises(UserError, match=r"prompts\.jsonl line 7: .*missing\.png: no such file"):
        load_samples(path, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ("[1]", 'needs "prompt" and "image"'),
        ('{"prompt": "a"}', 'needs "prompt" and "image"'),
        ('{"image": null, "prompt": " "}', '"prompt" must be a text'),
        ('{"image": null, "prompt": 3}', '"prompt" must be a text'),
        ('{"image": null, "prompt": "\\ud800"}', '"prompt" must be a text'),
        ('{"image": 3, "prompt": "a"}', '"image" must be'),
        ('{"image": [null], "prompt": "a"}', '"image" must be'),
        ('{"image": "", "prompt": "a"}', '"image" must be'),
        ('{"image": "a\\nb", "prompt": "a"}', '"image" must be'),
        ('{"image": "\\u0000", "prompt": "a"}', "cannot be opened"),
        ('{"image": ".", "prompt": "a"}', "a folder, not an image"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"image": null, "prompt": "good"}\n' + line)
    with pytest.raises(UserError) as error:
        load_samples(path, 9)
    assert str(error.value).startswith(f"{path} line 2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=60)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(st.none() | st.text(), st.lists).map(lambda v: json.dumps(v).encode()),
        st.fixed_dictionaries({"image": st.none() | st.text(), "prompt": st.text()}).map(
            lambda v: json.dumps(v).encode()
        ),
    )
)
def test_any_file_is_read_or_refused_in_one_line(scratch: Path, content: bytes) -> None:
    path = scratch / "any.jsonl"
    path.write_bytes(content)
    try:
        samples = load_samples(path, 5)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(s.prompt.strip().encode() for s in samples)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "no such file or folder"),
        ("a.txt", "neither a folder"),
        ("empty", "has no images"),
        ("e.jsonl", "has no lines"),
    ],
)
def test_a_path_without_samples_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "e.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match=message) as error:
        load_samples(tmp_path / name, 3)
    assert str(tmp_path / name) in str(error.value)


def test_a_limit_of_none_is_refused() -> None:
    with pytest.raises(UserError, match="--samples 0"):
        load_samples(None, 0)


def test_samples_are_encoded_as_a_question_is(processor: Processor) -> None:
    ids, pixels = encode(processor, SAMPLES[1])
    assert (ids.dtype, ids.shape[0]) == (np.int32, 1)
    assert (ids == IMAGE_TOKEN).sum() == 2 * processor.tokens_per_image
    assert pixels is not None
    assert (pixels.dtype, pixels.shape) == (mx.float32, (2, 16, 16, 3))
    assert np.array_equal(np.array(pixels), processor.pixels(SAMPLES[1].images))
    ids, pixels = encode(processor, SAMPLES[2])
    assert pixels is None
    assert ids[0].tolist() == processor.encode([{"role": "user", "content": "Hello"}]).ids


CONFIGS: dict[str, ModelConfig] = {
    "gemma": tiny_config(),
    "two sparse layers, top-1, low rank": tiny_config(moe=MoEConfig(mode="dense", top_k=1, router_rank=2)),
    "residual": tiny_config(moe=MoEConfig(use_residual=True)),
    "dense": tiny_config(moe=None),
    "phi": tiny_config(norm="layer", gated=False, parallel_block=True, attention_bias="all"),
    "phi, residual": tiny_config(norm="layer", gated=False, parallel_block=True, moe=MoEConfig(use_residual=True)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_noted_is_what_flows(name: str, processor: Processor) -> None:
    model = tiny_model(config=CONFIGS[name])
    found = calibrate(model, processor, SAMPLES)
    flows = [inputs_of_networks(model, processor, sample) for sample in SAMPLES]
    total = sum(len(flow[0]) for flow in flows)
    assert (found.num_samples, found.num_tokens) == (len(SAMPLES), total)
    expected_paths = set()
    for layer, block in enumerate(model.layers):
        x = np.concatenate([flow[layer] for flow in flows])  # [T, D]
        assert np.allclose(found.rows[layer], x, atol=1e-4)  # all of them: there are fewer than may be kept
        if not isinstance(block.mlp, SparseMLP):
            check(found, f"{LAYERS}.{layer}.mlp", x, np.ones((len(x), 1)), [weights_of(block.mlp)])
            expected_paths.add(f"{LAYERS}.{layer}.mlp")
            continue
        assert np.allclose(found.covariances[layer], x.T @ x / total, rtol=1e-4, atol=1e-4)
        check(found, experts_path(layer), x, membership(block.mlp, x), weights_of(block.mlp.switch_mlp))
        expected_paths.add(experts_path(layer))
        assert sum(found.tokens_per_expert()[layer]) == block.mlp.top_k * total
        if "mlp" in block.mlp:
            check(found, f"{LAYERS}.{layer}.mlp.mlp", x, np.ones((len(x), 1)), [weights_of(block.mlp.mlp)])
            expected_paths.add(f"{LAYERS}.{layer}.mlp.mlp")
    assert set(found.networks) == expected_paths
    assert set(found.covariances) == set(model.config.text_config.sparse_layers)
    json.dumps(found.to_dict())


def inputs_of_networks(model: Model, processor: Processor, sample: Sample) -> list[np.ndarray]:
    """For each layer, what its feed-forward network reads, [L, D]."""
    ids, pixels = encode(processor, sample)
    x = model.embed(ids, None if pixels is None else model.encode_images(pixels))
    out = []
    for block in model.layers:
        h = block.input_layernorm(x)
        if not model.config.text_config.parallel_block:
            h = block.post_attention_layernorm(x + block.self_attn(h, "causal"))
        out.append(np.array(h)[0])
        x = block(x, "causal")
    return out


def membership(mlp: SparseMLP, x: np.ndarray) -> np.ndarray:
    """1 where a token goes to an expert, [T, E]."""
    order = np.argsort(-np.array(mlp.gate(mx.array(x))), axis=1)[:, : mlp.top_k]
    return (order[..., None] == np.arange(4)).sum(axis=1)


def weights_of(network: Any) -> Any:
    """The parameters of a dense network, or a list with those of each expert."""
    names = [name for name in ("gate_proj", "up_proj", "fc1") if name in network]
    arrays = {f"{name}.{key}": np.array(value) for name in names for key, value in network[name].items()}
    if arrays[f"{names[0]}.weight"].ndim == 2:
        return {"activation": network.activation, **arrays}
    experts = range(len(arrays[f"{names[0]}.weight"]))
    return [{"activation": network.activation, **{k: v[e] for k, v in arrays.items()}} for e in experts]


def check(found: Calibration, path: str, x: np.ndarray, members: np.ndarray, weights: list[dict[str, Any]]) -> None:
    """Compare with means taken token by token."""
    seen = found.networks[path]
    assert seen.tokens.tolist() == members.sum(axis=0).tolist()
    for expert, own in enumerate(weights):
        mine = x[members[:, expert] == 1]
        if "fc1.weight" in own:
            h = own["activation"](mx.array(mine @ own["fc1.weight"].T + own["fc1.bias"]))
        else:
            h = own["activation"](mx.array(mine @ own["up_proj.weight"].T), mx.array(mine @ own["gate_proj.weight"].T))
        expected = np.zeros(x.shape[1]) if not len(mine) else np.abs(mine).mean(axis=0)
        assert np.allclose(seen.inputs[expert], expected, rtol=1e-4, atol=1e-5)
        expected = np.zeros(h.shape[1]) if not len(mine) else np.abs(np.array(h)).mean(axis=0)
        assert np.allclose(seen.hidden[expert], expected, rtol=1e-4, atol=1e-5)


def test_no_more_rows_are_kept_than_asked_for(processor: Processor) -> None:
    model = tiny_model()
    everything = calibrate(model, processor, SAMPLES)
    for most in (2, 7, 40):
        few = calibrate(model, processor, SAMPLES, max_rows=most)
        assert len(few.rows[0]) == len(few.rows[1]) == most
        assert np.array_equal(few.covariances[0], everything.covariances[0])
        distance = np.abs(few.rows[1][:, None] - everything.rows[1]).max(axis=2)  # [few, all]
        assert (distance.min(axis=1) == 0).all()


def test_the_model_is_as_it_was_even_after_an_error(processor: Processor) -> None:
    model = tiny_model()
    modules = dict(model.named_modules())
    arrays = named_arrays(model)
    calibrate(model, processor, SAMPLES[:1])

    def interrupt(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, processor, SAMPLES, interrupt)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert named_arrays(model).keys() == arrays.keys()


def test_progress_is_told(processor: Processor) -> None:
    told: list[tuple[str, int, int]] = []
    calibrate(tiny_model(), processor, SAMPLES[:2], lambda *args: told.append(args))
    assert told == [("calibrate", 1, 2), ("calibrate", 2, 2)]


def test_a_quantized_model_can_be_watched_too(processor: Processor) -> None:
    model = tiny_model()
    plain = calibrate(model, processor, SAMPLES)
    apply_quantization(model, {"group_size": 32, "bits": 8})
    cpu.speed_up(model)
    found = calibrate(model, processor, SAMPLES)
    for path, seen in plain.networks.items():
        assert np.abs(found.networks[path].hidden - seen.hidden).max() < 0.1 * seen.hidden.max()


def test_a_sample_that_does_not_fit_is_named(processor: Processor) -> None:
    model = tiny_model(config=tiny_config(max_position_embeddings=40))
    with pytest.raises(UserError, match=r"sample 2 \('The quick.*has \d+ tokens but the model's context is 40"):
        calibrate(model, processor, [SAMPLES[2], SAMPLES[3]])


def test_no_samples_are_refused(processor: Processor) -> None:
    with pytest.raises(UserError, match="no samples"):
        calibrate(tiny_model(), processor, [])
