"""Validation: the loss against float64 NumPy, answers against the engine's own, ranks that share the work."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import picture, tiny_folder, tiny_model
from lora_models import trained
from numpy_decoder import logits
from training_data import images_in, write_lines

from gm_mlx.chat_template import V1
from gm_mlx.engine import Sampling
from gm_mlx.errors import UserError
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.mlx_engine import MLXEngine
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.train.answers import answer_text, same_answer
from gm_mlx.train.data import Batch
from gm_mlx.train.dataset import Dataset
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.prepare import prepare
from gm_mlx.train.validation import Validation
from gm_mlx.weights import named_arrays

MAX_TOKENS = 24
# The users' turns of each conversation, each with the numbers of its images.
TALKS: list[list[tuple[str, list[int]]]] = [
    [("what is this", [0])],
    [("is this red", [1]), ("what", [])],
    [("what is red", [])],
    [("is this a circle", [2, 3]), ("what is this", []), ("is this red", [])],
    [("what", []), ("is this red", [4]), ("what is this", [0, 2])],
    [("is this a dog", [])],
]


def talker(seed: int = 0) -> Model:
    """A tiny model whose answers end, some sooner and some later."""
    model = tiny_model(seed)
    head = np.array(model.language_model.lm_head.weight)  # [V, D]
    for stop in (1, 5):  # EOS and <end_of_turn>
        head[stop] = np.random.default_rng(stop).normal(size=head.shape[1]) * 3 * head.shape[1] ** -0.5
    model.language_model.lm_head.weight = mx.array(head)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), model=talker())


@pytest.fixture(scope="module")
def reader(folder: Path) -> Processor:
    return Processor.from_folder(folder)


def records(engine: MLXEngine, wrong: Container[tuple[int, int]] = ()) -> list[dict[str, Any]]:
    """LLaVA records of the talks, answered by the engine, but for those that are to be wrong."""
    found = []
    for number, talk in enumerate(TALKS):
        messages: list[dict[str, Any]] = []
        turns, images = [], []
        for turn, (question, pictures) in enumerate(talk):
            parts = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": question}]
            messages.append({"role": "user", "content": parts})
            opened = [picture(seed) for seed in (*images, *pictures)]
            answer = "".join(piece.text for piece in engine.stream(messages, opened, Sampling(max_tokens=MAX_TOKENS)))
            if not answer:  # nothing that could be learnt
                break
            answer = f"not {answer}" if (number, turn) in wrong else answer
            messages.append({"role": "assistant", "content": answer})
            turns += [("human", "<image>" * len(pictures) + question), ("gpt", answer)]
            images += pictures
        conversations = [{"from": who, "value": text} for who, text in turns]
        found.append({"image": [f"{seed}.png" for seed in images], "conversations": conversations})
    return found


def dataset(folder: Path, reader: Processor, lines: list[dict[str, Any]]) -> Dataset:
    images_in(folder, 5)
    return prepare([write_lines(folder / "data.jsonl", lines)], reader, max_length=400).train


@pytest.fixture(scope="module")
def engine(folder: Path) -> MLXEngine:
    return MLXEngine(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, reader: Processor, engine: MLXEngine) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"), reader, records(engine))


def plain_loss(rows: Dataset, reader: Processor, chosen: range) -> tuple[float, int]:
    """The sum over learnt tokens of -log p, in float64 from the first layer on, a row at a time; and their number."""
    model = talker()
    weights = {name: np.array(array) for name, array in named_arrays(model).items()}
    total, count = 0.0, 0
    for row in chosen:
        ids, learnt = rows.tokens(row)
        images = [rows.images[image] for image in rows.images_of(row)]
        features = model.encode_images(mx.array(reader.pixels(images))) if images else None
        embeddings = np.array(model.embed(ids[None], features))[0]
        found = logits(model.config.text_config, weights, embeddings)
        for position in np.flatnonzero(learnt):
            scores = found[position - 1]
            total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[ids[position]]
            count += 1
    return total, count


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_loss_is_that_of_float64(rows: Dataset, reader: Processor, batch_size: int) -> None:
    total, count = plain_loss(rows, reader, range(len(rows)))
    found = Validation(rows, reader, batch_size=batch_size, exact_match=False)(talker())
    assert found == {"loss": pytest.approx(total / count, rel=1e-5), "rows": len(rows)}


def test_the_balance_of_experts_is_no_part_of_it(rows: Dataset, reader: Processor) -> None:
    plain = Validation(rows, reader, batch_size=4, exact_match=False)(talker())
    loss = AnswerLoss(aux_loss_coef=3.0, z_loss_coef=1.0)
    assert Validation(rows, reader, batch_size=4, exact_match=False, loss=loss)(talker()) == plain

    def other(model: object, batch: Batch) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        return mx.array(3.0), mx.array(2), {}

    assert Validation(rows, reader, batch_size=6, exact_match=False, loss=other)(talker())["loss"] == 1.5


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_are_the_engines(rows: Dataset, reader: Processor, batch_size: int) -> None:
    """Every one of the engine's answers is right, whatever the turn and the number of images."""
    found = Validation(rows, reader, batch_size=batch_size, max_tokens=MAX_TOKENS)(talker())
    assert (found["exact_match"], found["answers"]) == (1.0, sum(map(len, TALKS)))


def test_wrong_answers_are_found(tmp_path: Path, reader: Processor, engine: MLXEngine) -> None:
    wrong = {(0, 0), (3, 1), (4, 2), (5, 0)}
    mixed = dataset(tmp_path, reader, records(engine, wrong))
    found = Validation(mixed, reader, batch_size=4, max_tokens=MAX_TOKENS)(talker())
    assert found["answers"] == 11 and found["exact_match"] == pytest.approx(7 / 11)
    other = Validation(mixed, reader, batch_size=4, max_tokens=MAX_TOKENS)(talker(seed=1))
    assert other["exact_match"] < 7 / 11


def test_long_answers_are_not_asked_for(tmp_path: Path, reader: Processor, engine: MLXEngine) -> None:
    lines = records(engine)
    lines[2]["conversations"][1]["value"] = "a red dog " * 20
    mixed = dataset(tmp_path, reader, lines)
    assert Validation(mixed, reader, batch_size=4, max_tokens=MAX_TOKENS)(talker())["answers"] == 10
    only = mixed.take([2])
    found = Validation(only, reader, batch_size=4, max_tokens=MAX_TOKENS)(talker())
    assert found.keys() == {"loss", "rows"}


def test_an_answer_after_a_space_of_the_template(tmp_path: Path) -> None:
    """LLaVA's v1 has a space before each answer, and ends it with </s>: neither is part of the text."""
    folder = tiny_folder(tmp_path / "model", model=talker(), template=V1)
    reader = Processor.from_folder(folder)
    own = dataset(tmp_path / "data", reader, records(MLXEngine(folder)))
    ids, learnt = own.tokens(0)
    assert answer_text(reader, ids[learnt]) == own.rows[0].turns[1]
    assert Validation(own, reader, batch_size=4, max_tokens=MAX_TOKENS)(talker())["exact_match"] == 1


def test_a_limit_spreads_over_the_rows(rows: Dataset, reader: Processor) -> None:
    total, count = plain_loss(rows, reader, range(0, 6, 2))
    found = Validation(rows, reader, batch_size=4, limit=3, max_tokens=MAX_TOKENS)(talker())
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert (found["rows"], found["answers"]) == (3, 5)  # rows 0, 2 and 4
    whole = Validation(rows, reader, batch_size=4, exact_match=False)(talker())
    assert Validation(rows, reader, batch_size=4, limit=99, exact_match=False)(talker()) == whole


def test_the_mode_is_given_back_and_nothing_is_drawn(rows: Dataset, reader: Processor) -> None:
    model = trained(talker(), LoRAConfig(rank=2, dropout=0.5))
    validation = Validation(rows, reader, batch_size=4, max_tokens=MAX_TOKENS)
    wanted = validation(model)
    assert not model.training
    model.train()
    before = np.array(mx.random.state[0])
    assert validation(model) == wanted  # though there is dropout in training
    assert model.training
    np.testing.assert_array_equal(mx.random.state[0], before)

    def interrupted(*_: object) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Validation(rows, reader, batch_size=4, loss=interrupted)(model)
    assert model.training


def test_no_rows_and_bad_images_are_errors(tmp_path: Path, rows: Dataset, reader: Processor, engine: MLXEngine) -> None:
    with pytest.raises(UserError, match="no rows to validate on; hold some out"):
        Validation(rows.take([]), reader, batch_size=4)
    bad = dataset(tmp_path, reader, records(engine))
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:100])
    with pytest.raises(UserError, match=r"data\.jsonl: line 5: .*4\.png"):
        Validation(bad, reader, batch_size=4)(talker())


def test_images_that_no_memory_is_left_for_are_let_go(rows: Dataset, reader: Processor) -> None:
    validation = Validation(rows, reader, batch_size=2, max_tokens=MAX_TOKENS)
    wanted = validation(talker())
    validation._loader._cache, validation._loader._room = {}, 0
    assert validation(talker()) == wanted
    assert not validation._loader._coming and not validation._loader._cache


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        ("Red.", "red", True),
        ("  a  red\tdog ", "A red dog.", True),
        ("red .", "red", True),
        ("STRASSE", "straße", True),
        ("red", "red..", False),
        ("red dog", "reddog", False),
        ("", "red", False),
        ("", "", True),
    ],
)
def test_same_answer(given: str, wanted: str, same: bool) -> None:
    assert same_answer(given, wanted) == same_answer(wanted, given) == same


RANK = """
import json, os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_train_validation import MAX_TOKENS, talker
from gm_mlx.processor import Processor
from gm_mlx.train.prepare import prepare
from gm_mlx.train.validation import Validation
out = Path(sys.argv[1])
reader = Processor.from_folder(out / "model")
rows = prepare([out / "data.jsonl"], reader, max_length=400).train
found = Validation(rows, reader, batch_size=4, max_tokens=MAX_TOKENS)(talker())
(out / f"{os.environ['MLX_RANK']}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_ranks_share_the_rows(tmp_path: Path) -> None:
    """Two processes over MLX's ring find what one finds, and both know it."""
    folder = tiny_folder(tmp_path / "model", model=talker())
    reader = Processor.from_folder(folder)
    mixed = dataset(tmp_path, reader, records(MLXEngine(folder), {(0, 0), (4, 2)}))
    wanted = Validation(mixed, reader, batch_size=4, max_tokens=MAX_TOKENS)(talker())
    assert wanted["exact_match"] == pytest.approx(9 / 11)
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
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(wanted, rel=1e-6)
