"""Agreement with the unquantized model, its sums checked by hand, and exact match."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model

from gm_mlx import load
from gm_mlx.errors import UserError
from gm_mlx.quant.build import build_model
from gm_mlx.quant.calibration import Sample, load_samples
from gm_mlx.quant.evaluate import answered, compare, divergence, exact_match, load_questions, observe, record
from gm_mlx.quant.quantize import Source, measure, open_source, prepare


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(tiny_folder(tmp_path_factory.mktemp("evaluate") / "source"))


SAMPLES = [Sample("what is this?", [picture(1)]), Sample("say something"), Sample("left or right?", [picture(2)])]


def test_divergence() -> None:
    p, q = np.array([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]), np.array([[0.25, 0.25, 0.5], [0.9, 0.05, 0.05]])
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert divergence(np.log(p), np.log(q)) == pytest.approx([expected, 0])


def test_the_answer_is_the_one_that_users_get(source: Source) -> None:
    engine = load(str(source.folder))
    for sample in SAMPLES:
        case = answered(source.model(), source.processor, sample, answer_tokens=6)
        ids = case.ids[0, case.start + 1 :].tolist()
        said = engine.chat(sample.prompt, images=sample.images, max_tokens=6)
        assert source.processor.tokenizer.decode(ids).strip() == said.text.strip()
        assert len(ids) == said.stats.generated_tokens if said.stats.finish_reason == "length" else len(ids) < 6


def test_what_is_observed(source: Source) -> None:
    model = source.model()
    case = answered(model, source.processor, SAMPLES[0])
    seen = observe(model, case)
    length = case.ids.shape[1]
    assert seen.log_probs.shape == (length - case.start, source.processor.tokenizer.vocab_size)
    assert np.exp(seen.log_probs).sum(axis=-1) == pytest.approx(1, abs=1e-5)
    assert {layer: experts.shape for layer, experts in seen.experts.items()} == {0: (length, 2)}
    # The positions that count are those that predict the answer, which was chosen greedily among these tokens.
    answer = case.ids[0, case.start + 1 :]
    assert seen.log_probs[:-1].argmax(axis=-1).tolist() == answer.tolist()


def test_a_model_agrees_with_itself(source: Source, tmp_path: Path) -> None:
    record(source.model(), source.processor, SAMPLES, tmp_path)
    same = compare(source.model(), tmp_path)
    assert same.kl < 1e-9
    assert (same.top1, same.routing_top1, same.routing_set) == (1, 1, 1)
    assert same.layers == {0: (1, 1)}


def test_agreement_is_the_mean_over_positions(source: Source, tmp_path: Path) -> None:
    """Against the same figures computed the plain way, from both models at once."""
    record(source.model(), source.processor, SAMPLES, tmp_path)
    result = prepare(source, "q4-all")
    reference, packed = source.model(), build_model(result.config, result.tensors, result.plan.table, "float16")
    found = compare(packed, tmp_path)
    kl, top1, first, both = [], [], [], []
    for sample in SAMPLES:
        case = answered(reference, source.processor, sample)
        one, two = observe(reference, case), observe(packed, case)
        for p, q in zip(one.log_probs, two.log_probs, strict=True):
            kl.append(sum(np.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            top1.append(p.argmax() == q.argmax())
        for a, b in zip(one.experts[0].tolist(), two.experts[0].tolist(), strict=True):
            first.append(a[0] == b[0])
            both.append(set(a) == set(b))
    assert found.positions == len(kl)
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-6)
    assert found.kl > 1e-4
    assert found.top1 == pytest.approx(np.mean(top1))
    assert (found.routing_top1, found.routing_set) == pytest.approx((np.mean(first), np.mean(both)))


def test_more_bits_agree_more(source: Source) -> None:
    results = [prepare(source, recipe) for recipe in ("q8", "q4", "q4-all")]
    assert measure(source, results, load_samples(None, 4)) is None
    kl = [result.agreement.kl for result in results if result.agreement]
    assert kl == sorted(kl)
    assert kl[0] < 0.1 * kl[2]


def test_a_dense_model_has_no_routing(tmp_path: Path) -> None:
    dense = open_source(tiny_folder(tmp_path / "source", model=tiny_model(config=tiny_config(moe=None))))
    result = prepare(dense, "q4")
    measure(dense, [result], SAMPLES[:1])
    assert result.agreement is not None
    assert (result.agreement.routing_top1, result.agreement.routing_set, result.agreement.layers) == (None, None, {})


def test_an_empty_record(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record"):
        compare(source.model(), tmp_path)


def test_a_prompt_that_is_longer_than_the_context(source: Source) -> None:
    with pytest.raises(UserError, match=r"has \d+ tokens but the model's context is 512; shorten it"):
        answered(source.model(), source.processor, Sample("word " * 600))


def questions_file(folder: Path, source: Source) -> Path:
    """Three questions, two of whose answers are what the model says, written a little differently."""
    engine = load(str(source.folder))
    lines = []
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
        said = engine.chat("what is it?", images=[folder / f"{seed}.png"], max_tokens=32).text
        answer = f" {said.strip().upper()}." if seed < 2 else "something else"
        lines.append(json.dumps({"image": f"{seed}.png", "question": "what is it?", "answer": answer, "kind": "x"}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return folder / "questions.jsonl"


def test_exact_match(source: Source, tmp_path: Path) -> None:
    questions = load_questions(questions_file(tmp_path, source))
    assert [question.image.name for question in questions] == ["0.png", "1.png", "2.png"]
    assert exact_match(source.model(), source.processor, questions) == pytest.approx(2 / 3)
    assert exact_match(source.model(), source.processor, questions, batch=2) == pytest.approx(2 / 3)
    result = prepare(source, "q8")
    assert measure(source, [result], SAMPLES[:1], questions) == pytest.approx(2 / 3)
    assert result.exact_match is not None
    assert [q.image.name for q in load_questions(tmp_path / "questions.jsonl", 2)] == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: must be like"),
        ("[]", r"line 2: must be like"),
        ('{"image": "0.png", "question": "what?"}', r"line 2: must be like"),
        ('{"image": "0.png", "question": "", "answer": "x"}', r"line 2: must be like"),
        ('{"image": "no.png", "question": "what?", "answer": "x"}', r"line 2: .*no\.png is not there"),
    ],
)
def test_questions_that_cannot_be_read(line: str, message: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "0.png")
    good = json.dumps({"image": "0.png", "question": "what?", "answer": "x"})
    (tmp_path / "q.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=message) as caught:
        load_questions(tmp_path / "q.jsonl")
    assert "\n" not in str(caught.value)


def test_no_questions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no questions"):
        load_questions(tmp_path / "empty.jsonl")


def test_padding_rows_do_not_count(source: Source) -> None:
    """A head that wants to say what no tokenizer has a token for changes nothing."""
    model = source.model()
    case = answered(model, source.processor, SAMPLES[1])
    before = observe(model, case).log_probs
    head = model.language_model.lm_head
    head.weight = mx.concatenate([head.weight[: case.vocab_size], head.weight[case.vocab_size :] + 9.0])
    assert np.array_equal(observe(model, case).log_probs, before)
    assert answered(model, source.processor, SAMPLES[1]).ids.tolist() == case.ids.tolist()
