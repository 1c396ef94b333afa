"""What training starts from: batches and their loss, upcycled models, answers to questions."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from train_runs import conversations, reader

from gm_mlx.config import MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.mlx_engine import MLXEngine
from gm_mlx.processor import Processor
from gm_mlx.train.answers import greedy_answers
from gm_mlx.train.data import Example, collate
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.stages import upcycle


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return reader(tmp_path_factory.mktemp("model"))


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
    total, count, _ = AnswerLoss()(model, batch)
    logits = model(mx.zeros((1, 1)), input_embeddings=model.embed(batch.ids, model.encode_images(batch.pixels)))
    losses = nn.losses.cross_entropy(logits[:, :-1], mx.array(batch.ids[:, 1:]))
    expected = (losses * mx.array(batch.learnt[:, 1:])).sum()
    assert count.item() == batch.learnt.sum()
    np.testing.assert_allclose(total.item(), expected.item(), rtol=1e-5)


def test_load_balancing_joins_the_loss(processor: Processor) -> None:
    batch = collate(conversations(processor, 3), pad_id=0)
    totals = [AnswerLoss()(tiny_model(config=tiny_config(moe=MoEConfig(aux_loss_coef=c))), batch)[0] for c in (0, 1)]
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
    one, *_ = AnswerLoss()(model, collate(examples, pad_id=0, multiple=1))
    padded, *_ = AnswerLoss()(model, collate(examples, pad_id=0, multiple=64))
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
