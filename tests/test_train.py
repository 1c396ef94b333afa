"""The training loop, its data and its stages, on tiny models."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from mlx.utils import tree_flatten

from gm_mlx.config import MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.mlx_engine import MLXEngine
from gm_mlx.processor import Processor
from gm_mlx.train.answers import greedy_answers
from gm_mlx.train.data import Batch, Example, answer_loss, collate
from gm_mlx.train.loop import TrainConfig, train
from gm_mlx.train.stages import select_stage, upcycle

CONFIG = TrainConfig(steps=6, learning_rate=1e-2, log_every=1, save_every=2)


def conversations(processor: Processor, rows: int, seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    examples = []
    for row in range(rows):
        question = " ".join(random.choice(["what", "is", "this", "red", "circle"], size=3 + row % 3))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "a red circle"}]
        ids, learnt = processor.encode_supervised(messages, num_images=1)
        examples.append(Example(ids, learnt, processor.pixels([picture(seed + row)])))
    return examples


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.from_folder(tiny_folder(tmp_path_factory.mktemp("model")))


def batches(processor: Processor, rows: int = 4):
    """Batch number n, and the share of it that a rank gets."""

    def batch(step: int, rank: int, ranks: int) -> Batch:
        return collate(conversations(processor, rows, seed=step)[rank::ranks], pad_id=0)

    return batch


def logged(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(model.parameters())}


def test_learns(processor: Processor, tmp_path: Path) -> None:
    model = tiny_model()
    select_stage(model, 2)
    same = collate(conversations(processor, 4), pad_id=0)
    train(model, answer_loss, lambda *_: same, TrainConfig(steps=15, learning_rate=1e-2, log_every=1), tmp_path)
    losses = logged(tmp_path)
    assert losses[-1] < 0.3 * losses[0]


def test_resumed_run_equals_an_uninterrupted_one(processor: Processor, tmp_path: Path) -> None:
    whole, halves = tiny_model(), tiny_model()
    select_stage(whole, 2)
    train(whole, answer_loss, batches(processor), CONFIG, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stops_at_five(step: int, rank: int, ranks: int) -> Batch:
        if step == 5:
            raise Stopped
        return batches(processor)(step, rank, ranks)

    select_stage(halves, 2)
    with pytest.raises(Stopped):
        train(halves, answer_loss, stops_at_five, CONFIG, tmp_path / "halves")
    fresh = tiny_model()  # nothing but the folder survives
    select_stage(fresh, 2)
    train(fresh, answer_loss, batches(processor), CONFIG, tmp_path / "halves")
    # Step 5 was done but not saved (save_every is 2), so it is done again, and logged again.
    assert logged(tmp_path / "whole") == [*logged(tmp_path / "halves")[:4], *logged(tmp_path / "halves")[5:]]
    for name, array in weights(whole).items():
        np.testing.assert_array_equal(array, weights(fresh)[name], err_msg=name)


def test_state_of_another_run_is_refused(processor: Processor, tmp_path: Path) -> None:
    model = tiny_model()
    select_stage(model, 1)
    train(model, answer_loss, batches(processor), CONFIG, tmp_path)
    with pytest.raises(UserError, match="other hyperparameters"):
        train(model, answer_loss, batches(processor), TrainConfig(steps=6, learning_rate=1e-3), tmp_path)
    select_stage(model, 2)
    with pytest.raises(UserError, match="another model"):
        train(model, answer_loss, batches(processor), CONFIG, tmp_path)


@pytest.mark.parametrize(
    ("stage", "learns"),
    [
        (1, ("multi_modal_projector.",)),
        (2, ("multi_modal_projector.", "language_model.")),
        (3, ("language_model.model.layers.0.mlp.",)),
    ],
)
def test_stage_moves_its_parts_only(processor: Processor, tmp_path: Path, stage: int, learns: tuple[str, ...]) -> None:
    model = tiny_model()  # layer 0 of 2 is sparse
    before = weights(model)
    select_stage(model, stage)
    train(model, answer_loss, batches(processor), TrainConfig(steps=2, learning_rate=1e-2), tmp_path)
    for name, array in weights(model).items():
        moved = not np.array_equal(before[name], array)
        assert moved == any(part in name for part in learns), name


def test_upcycled_model_equals_the_dense_one(processor: Processor) -> None:
    dense = tiny_model(config=tiny_config(moe=None))
    batch = collate(conversations(processor, 3), pad_id=0)
    expected = dense(mx.array(np.where(batch.ids == dense.config.image_token_index, 0, batch.ids)))
    for moe in (MoEConfig(), MoEConfig(num_experts=8, top_k=3, mode="dense", router_rank=7)):
        sparse = upcycle(dense, moe)
        assert len(sparse.config.text_config.sparse_layers) == (1 if moe.mode == "sparse" else 2)
        found = sparse(mx.array(np.where(batch.ids == dense.config.image_token_index, 0, batch.ids)))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_loss_is_that_of_all_rows_masked(processor: Processor) -> None:
    """Against the plain way: logits of every position, then the mask."""
    model = tiny_model(config=tiny_config(moe=MoEConfig(aux_loss_coef=0.0)))
    batch = collate(conversations(processor, 3), pad_id=0)
    total, count = answer_loss(model, batch)
    logits = model(mx.zeros((1, 1)), input_embeddings=model.embed(batch.ids, model.encode_images(batch.pixels)))
    losses = nn.losses.cross_entropy(logits[:, :-1], mx.array(batch.ids[:, 1:]))
    expected = (losses * mx.array(batch.learnt[:, 1:])).sum()
    assert count.item() == batch.learnt.sum()
    np.testing.assert_allclose(total.item(), expected.item(), rtol=1e-5)


def test_load_balancing_joins_the_loss(processor: Processor) -> None:
    batch = collate(conversations(processor, 3), pad_id=0)
    totals = [answer_loss(tiny_model(config=tiny_config(moe=MoEConfig(aux_loss_coef=c))), batch)[0] for c in (0, 1)]
    per_token = (totals[1] - totals[0]).item() / batch.learnt.sum()
    assert 0.9 < per_token < 4  # 1 when balanced, the number of experts when not at all


def test_only_answers_are_learnt(processor: Processor) -> None:
    batch = collate(conversations(processor, 5), pad_id=0)
    assert batch.ids.shape[1] % 8 == 0
    for ids, learnt in zip(batch.ids, batch.learnt, strict=True):
        kept = ids[learnt].tolist()
        assert processor.tokenizer.decode(kept[:-1]) == "a red circle"
        assert kept[-1] in processor.stop_ids
    assert not (batch.learnt & ~batch.real).any()


def test_example_without_an_answer_is_an_error() -> None:
    with pytest.raises(UserError, match=r"example 1 .* no answer"):
        collate([Example([1, 2], [False, True]), Example([1, 2], [False, False])], pad_id=0)


def test_padding_changes_nothing(processor: Processor) -> None:
    model = tiny_model()
    examples = conversations(processor, 1)
    one, _ = answer_loss(model, collate(examples, pad_id=0, multiple=1))
    padded, _ = answer_loss(model, collate(examples, pad_id=0, multiple=64))
    np.testing.assert_allclose(one.item(), padded.item(), rtol=1e-4)


def test_greedy_answers_are_the_engines(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    processor, engine = Processor.from_folder(folder), MLXEngine(folder)
    images = [picture(seed) for seed in range(5)]
    questions = ["what is this", "is this a circle", "what", "is this red", "what is this"]
    found = greedy_answers(
        tiny_model(), processor, questions, list(processor.pixels(images)), max_tokens=6, batch_size=2
    )
    from gm_mlx.engine import Sampling

    for question, image, answer in zip(questions, images, found, strict=True):
        pieces = engine.stream([{"role": "user", "content": question}], [image], Sampling(max_tokens=6))
        assert "".join(piece.text for piece in pieces).strip() == answer


# The load-balancing loss is a product of means, so it is not the same over halves of a batch; it is off here.
UNBALANCED = tiny_config(moe=MoEConfig(aux_loss_coef=0.0))

RANK = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from fixtures import tiny_folder, tiny_model
from gm_mlx.processor import Processor
from gm_mlx.train.loop import TrainConfig, train
from gm_mlx.train.stages import select_stage
from gm_mlx.train.data import answer_loss
from test_train import CONFIG, UNBALANCED, batches
import os
out = Path(sys.argv[1])
processor = Processor.from_folder(tiny_folder(out / ("model" + os.environ["MLX_RANK"])))
model = tiny_model(config=UNBALANCED)
select_stage(model, 2)
train(model, answer_loss, batches(processor), CONFIG, out / "two")
"""


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(processor: Processor, tmp_path: Path) -> None:
    """Two processes with half a batch each, over MLX's ring, against one with all of it."""
    model = tiny_model(config=UNBALANCED)
    select_stage(model, 2)
    train(model, answer_loss, batches(processor), CONFIG, tmp_path / "one")

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]))
    for s in sockets:
        s.close()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(Path(__file__).parent)],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    np.testing.assert_allclose(logged(tmp_path / "two"), logged(tmp_path / "one"), rtol=1e-4)
