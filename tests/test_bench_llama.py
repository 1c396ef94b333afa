"""The engine on llama.cpp as the bench measures it: what is timed is what it says it is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fixtures import picture

from gm_mlx.bench.llama_subject import LlamaSubject, make_ready
from gm_mlx.cli.bench_forms import made_forms
from gm_mlx.cli.console import Progress


@pytest.fixture(scope="module")
def subject() -> Iterator[LlamaSubject]:
    with made_forms(None, "gm-tiny", ["F16"], 0, None, Progress()) as (form,):
        make_ready(form.model, form.mmproj)
        engine = LlamaSubject(form.model, form.mmproj, threads=1, gpu_layers=0)
        yield engine
        engine.close()


@pytest.mark.parametrize("length", [1, 3])
def test_it_decodes_behind_what_it_has_read(subject: LlamaSubject, length: int) -> None:
    ids = np.random.default_rng(0).integers(0, subject.vocab_size, 600).tolist()  # more than one chunk
    subject.prefill(ids[:-length])
    subject.decode(ids[-length:])
    after = subject._open().logits()
    np.testing.assert_allclose(after, subject.all_logits(ids)[-1], rtol=0.02, atol=0.02)


def test_decoding_begins_at_the_first_position(subject: LlamaSubject) -> None:
    ids = [5, 6, 7]
    subject.prefill([1, 2])
    subject.reset()
    subject.decode(ids)
    after = subject._open().logits()
    np.testing.assert_allclose(after, subject.all_logits(ids)[-1], rtol=0.02, atol=0.02)


def test_it_decodes_behind_a_question(subject: LlamaSubject) -> None:
    asked = [subject.ask(picture(seed)) for seed in (0, 1)]
    assert asked[0].depth == asked[1].depth > 64
    assert all(each.encode_seconds > 0 for each in asked)
    question = subject._open().logits()
    subject.decode([5])
    subject.ask(picture(1))
    np.testing.assert_array_equal(subject._open().logits(), question)  # nothing is left of what was decoded


def test_facts(subject: LlamaSubject) -> None:
    assert subject.facts() == {"device": "CPU", "threads": 1, "gpu_layers": 0}
    assert (subject.reads_images, subject.vocab_size, subject.runtime_peak()) == (True, 768, None)
