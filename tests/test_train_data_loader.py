"""Batches with pixels: the same with any number of workers, and workers that never outlive their owner."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_model
from mlx.utils import tree_flatten
from training_data import data_url, images_in, llava, png, write_lines

from gm_mlx.config import MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.images import ImageConfig
from gm_mlx.processor import Processor
from gm_mlx.train.data import Batch
from gm_mlx.train.image_pool import ImagePool
from gm_mlx.train.loader import Loader
from gm_mlx.train.loop import TrainConfig, train
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.prepare import Prepared, prepare
from gm_mlx.train.rows import BadRows
from gm_mlx.train.stages import select_stage

ROWS = 21


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, reader: Processor) -> Prepared:
    """Rows with no, one and two images; some images are shared, some lie in the data."""
    folder = tmp_path_factory.mktemp("data")
    names = images_in(folder, 6)
    records = []
    for number in range(ROWS):
        images = [names[(number * 5 + n) % 6] for n in range(number % 3)]
        images = [data_url(number % 4)] if number % 7 == 0 else images
        records.append(llava("<image>" * len(images) + "what is this red " * (1 + number % 4), "a dog", image=images))
    return prepare([write_lines(folder / "data.jsonl", records)], reader, max_length=400)


def equal(mine: Batch, other: Batch) -> None:
    for name in ("ids", "learnt", "real"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(other, name))
    assert (mine.pixels is None) == (other.pixels is None)
    if mine.pixels is not None:
        np.testing.assert_array_equal(mine.pixels, other.pixels)


@pytest.mark.parametrize(("workers", "cache"), [(0, 0), (1, 1 << 20), (3, 0), (2, 2000)])
def test_batches_do_not_depend_on_workers_or_memory(
    prepared: Prepared, reader: Processor, workers: int, cache: int
) -> None:
    with Loader(prepared.train, reader, 4, seed=3, workers=0) as plain:
        expected = [plain(number) for number in range(14)]  # more than two epochs
    with Loader(prepared.train, reader, 4, seed=3, workers=workers, cache_bytes=cache) as loader:
        for number in [0, 1, 2, 3, 9, 4, 13, 0, 1, 2]:  # as read ahead, and with jumps
            equal(loader(number), expected[number])


def test_pixels_are_the_processors(prepared: Prepared, reader: Processor) -> None:
    with Loader(prepared.train, reader, 4, workers=0) as loader:
        for number in range(6):
            batch = loader(number)
            rows = [prepared.train.rows[index] for index in loader.plan.rows(number)]
            sources = [image if isinstance(image, str) else image.read() for row in rows for image in row.images]
            expected = reader.pixels(sources)
            assert (batch.pixels is None) == (not sources)
            if batch.pixels is not None:
                np.testing.assert_array_equal(batch.pixels, expected)
            assert (batch.ids == reader.image_token_id).sum() == len(sources) * reader.tokens_per_image
            assert batch.ids.shape[1] % 32 == 0
            assert loader.names(number) == [str(row.where) for row in rows]


def test_ranks_and_parts_share_a_step(prepared: Prepared, reader: Processor) -> None:
    """Two ranks that accumulate three parts each learn from the step's rows, each once."""
    with (
        Loader(prepared.train, reader, 8, workers=0) as whole,
        Loader(prepared.train, reader, 8, workers=0, parts=3) as shared,
    ):
        for step in range(4):
            found = [real_ids(shared(step * 3 + part, rank, 2)) for part in range(3) for rank in range(2)]
            assert sorted(row for share in found for row in share) == sorted(real_ids(whole(step)))


def real_ids(batch: Batch) -> list[list[int]]:
    """The ids of a batch's rows, without padding, of those that are to be learnt."""
    rows = zip(batch.ids, batch.real, batch.learnt, strict=True)
    return [ids[real].tolist() for ids, real, learnt in rows if learnt.any()]


def test_a_share_without_rows_learns_nothing(prepared: Prepared, reader: Processor) -> None:
    model = tiny_model(config=tiny_config(moe=MoEConfig()))
    with Loader(prepared.train, reader, 2, workers=0) as loader:
        batch = loader(0, rank=2, ranks=3)
    assert not batch.learnt.any()
    (total, count, _), grads = nn.value_and_grad(model, AnswerLoss())(model, batch)
    assert (total.item(), count.item()) == (0, 0)
    assert all(mx.abs(grad).max().item() == 0 for _, grad in tree_flatten(grads))


def test_the_loop_takes_a_loader(prepared: Prepared, reader: Processor, tmp_path: Path) -> None:
    model = tiny_model()
    select_stage(model, 1)
    config = TrainConfig(steps=3, learning_rate=1e-3, log_every=1)
    with Loader(prepared.train, reader, 4, workers=1) as loader:
        train(model, AnswerLoss(), loader, config, tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_damaged_behind_its_header_names_its_row(tmp_path: Path, reader: Processor, workers: int) -> None:
    (tmp_path / "cut.png").write_bytes(png()[:100])
    file = write_lines(tmp_path / "d.jsonl", [llava("Q", "A"), llava("<image>", "A", image="cut.png")])
    data = prepare([file], reader, max_length=400)
    with (
        Loader(data.train, reader, 2, workers=workers) as loader,
        pytest.raises(UserError, match=r"d\.jsonl: line 2: .*cut\.png: the image is damaged"),
    ):
        loader(0)


def test_images_of_a_small_set_are_decoded_once(
    prepared: Prepared, reader: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | bytes] = []
    with Loader(prepared.train, reader, 4, workers=0) as loader:
        assert loader._pool is not None
        submit = loader._pool.submit
        monkeypatch.setattr(loader._pool, "submit", lambda source: asked.append(source) or submit(source))
        for number in range(3 * loader.plan.steps_per_epoch):
            loader(number)
    assert len(asked) == len(prepared.train.images)


def test_what_is_read_ahead_is_bounded(prepared: Prepared, reader: Processor) -> None:
    with Loader(prepared.train, reader, 1, workers=1, cache_bytes=0) as loader:
        for number in range(2 * ROWS):
            loader(number)
            assert len(loader._coming) <= 4 + 2


# --- worker processes ---


def test_workers_import_neither_mlx_nor_llama_cpp() -> None:
    code = "import sys, gm_mlx.train.image_worker; print([m for m in sys.modules if m.split('.')[0] in NAMES])"
    names = ("mlx", "mlx_lm", "llama_cpp", "transformers", "torch", "sentencepiece")
    done = subprocess.run(
        [sys.executable, "-c", f"NAMES = {names}; {code}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_worker_that_dies_is_an_error_and_not_a_wait() -> None:
    pool = ImagePool(ImageConfig(8, "resize"), 1)
    assert pool.submit(png()).result().shape == (8, 8, 3)
    os.kill(pool._processes[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"has ended \(exit code -9\).*use fewer workers"):
        pool.submit(png()).result()
    pool.close()
    pool.close()


def test_closing_ends_busy_workers() -> None:
    pool = ImagePool(ImageConfig(8, "resize"), 2)
    big = picture(size=(3000, 3000))
    out = io.BytesIO()
    big.save(out, "PNG", compress_level=1)
    futures = [pool.submit(out.getvalue()) for _ in range(12)]
    futures[0].result()
    pool.close()
    assert all(process.poll() is not None for process in pool._processes)
    assert all(future.done() for future in futures)


OWNER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from training_data import png
from gm_mlx.images import ImageConfig
from gm_mlx.train.image_pool import ImagePool
pool = ImagePool(ImageConfig(8, "resize"), 2)
for future in [pool.submit(png()) for _ in range(4)]:
    future.result()
print("ready", flush=True)
try:
    time.sleep(600)
finally:
    pool.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_workers_end_with_their_owner(number: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(Path(__file__).parent)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    owner.send_signal(number)
    # The workers hold the other end of stderr, too: this returns when the last of them is gone.
    owner.communicate(timeout=60)
    assert owner.returncode == -number


# --- all of it ---


def test_all_bad_rows_are_listed_or_left_out(tmp_path: Path, reader: Processor) -> None:
    images_in(tmp_path, 2)
    records = [
        llava("<image>Q", "A", image="0.png"),
        llava("Q", ""),
        llava("<image>Q", "A", image="9.png"),
        "{",
        llava("word " * 300, "A"),
        llava("<image>Q", "A", image="1.png"),
    ]
    file = write_lines(tmp_path / "d.jsonl", records)
    with pytest.raises(BadRows, match=r"4 of 6 rows cannot be learnt from; the first: .*d\.jsonl: line 2: ") as caught:
        prepare([file], reader, max_length=200)
    assert "\n" not in str(caught.value) and "--skip-bad" in str(caught.value)
    assert [problem.where.number for problem in caught.value.problems] == [2, 3, 4, 5]
    found = prepare([file], reader, max_length=200, skip_bad=True)
    assert found.problems == caught.value.problems
    assert [row.where.number for row in found.train.rows] == [1, 6] and len(found.held_out) == 0


def test_nothing_to_learn_from_is_an_error(tmp_path: Path, reader: Processor) -> None:
    file = write_lines(tmp_path / "d.jsonl", [llava("Q", ""), llava("Q", "")])
    with pytest.raises(BadRows, match="2 of 2 rows cannot be learnt from") as caught:
        prepare([file], reader, max_length=200, skip_bad=True)
    assert "--skip-bad" not in str(caught.value)
    with pytest.raises(UserError, match="no data: has no rows"):
        prepare([], reader, max_length=200)


def test_several_sources_with_a_hold_out(tmp_path: Path, reader: Processor) -> None:
    told: list[int] = []
    files = []
    for name in "ab":
        images_in(tmp_path, 20)
        records = [llava(f"<image>{name}{n}", "A", image=f"{n % 20}.png") for n in range(200)]
        files.append(write_lines(tmp_path / f"{name}.jsonl", records))
    found = prepare(files, reader, max_length=200, hold_out=0.25, seed=1, progress=told.append)
    assert (len(found.train), len(found.held_out)) == (300, 100)
    assert not set(found.train.images) & set(found.held_out.images)
    assert told == [256]
    assert (
        found.held_out.fingerprint()
        == prepare(files, reader, max_length=200, hold_out=100, seed=1).held_out.fingerprint()
    )
