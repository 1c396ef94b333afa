"""The bench's plan, processes, figures and plot. No test looks at a clock: what takes time is made up."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from gguf import GGUFWriter
from PIL import Image

from gm_mlx.bench import child, process
from gm_mlx.bench.child import Measured, peak_memory
from gm_mlx.bench.energy import find_meter
from gm_mlx.bench.forms import Costs, Form, find_form
from gm_mlx.bench.mlx_subject import MLXSubject
from gm_mlx.bench.plot import SOFTWARE, check_plot, write_plot
from gm_mlx.bench.process import Child
from gm_mlx.bench.report import expectations, number, rows, scaled, to_dict
from gm_mlx.bench.rounds import Bench, Outcome, Sample, Settings, Task, turns
from gm_mlx.bench.subject import Asked
from gm_mlx.cli.bench_forms import made_forms
from gm_mlx.cli.console import Progress
from gm_mlx.config import MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.generate import make_cache, prefill

COSTS = [Costs(100, 50, lambda tokens: 1000 * tokens), Costs(80, 25, lambda tokens: 1000 * tokens)]
FORMS = [Form("one", "mlx", Path("/models/one")), Form("two", "llama.cpp", Path("/models/two.gguf"))]
MACHINE = {"cpu": "A CPU", "cores": 2, "load_average": 0.0, "logical_cores": 2}


class FakeForm:
    """A form whose every measure takes as many seconds as its list says, one after the other.

    Attributes:
        log: what was asked of all forms, in order: number, task, tokens.
    """

    def __init__(self, number: int, log: list[Any], *, fails_at: int | None = None, sees: bool = True) -> None:
        self.number, self.log, self.fails_at, self.sees = number, log, fails_at, sees
        self.asked = 0

    def load(self) -> dict[str, Any]:
        self.log.append((self.number, "load"))
        return {"values": {"load": value(1)}, "facts": {"reads_images": self.sees}, **self.memory()}

    def ask(self, **request: Any) -> dict[str, Any]:
        if self.asked == self.fails_at:
            raise UserError("it broke")
        self.asked += 1
        task, tokens = request["task"], request["tokens"]
        self.log.append((self.number, task, tokens))
        names = {"prefill": ["pp"], "decode": ["tg"], "picture": ["encode", "first", "tg_deep"]}[task]
        return {"values": {name: value(self.asked, tokens) for name in names}, **self.memory()}

    def memory(self) -> dict[str, Any]:
        return {"peak_memory": 1000 + self.asked, "runtime_peak": None if self.number else 500 - self.asked}

    def close(self) -> None:
        self.log.append((self.number, "close"))


def value(seconds: float, tokens: int = 1) -> dict[str, Any]:
    return {"seconds": seconds, "joules": None, "tokens": tokens}


def run(settings: Settings, count: int = 2, together: bool = True, **options: Any) -> tuple[Outcome, list[Any]]:
    log: list[Any] = []
    fails = options.pop("fails", {})
    blind = options.pop("blind", ())

    def start(number: int) -> FakeForm:
        return FakeForm(number, log, fails_at=fails.get(number), sees=number not in blind)

    return Bench(count, settings, start, together=together, sleep=lambda seconds: None, **options).run(), log


def test_forms_take_turns_at_each_task_and_the_first_turn_changes() -> None:
    tasks = [Task("prefill", 8), Task("decode", 4)]
    plain = [(form, task.name) for form, task in turns([0, 1], tasks, 0, together=True)]
    assert plain == [(0, "prefill"), (1, "prefill"), (0, "decode"), (1, "decode")]
    back = [(form, task.name) for form, task in turns([0, 1], tasks, 1, together=True)]
    assert back == [(1, "prefill"), (0, "prefill"), (1, "decode"), (0, "decode")]
    alone = [(form, task.name) for form, task in turns([0, 1], tasks, 1, together=False)]
    assert alone == [(1, "prefill"), (1, "decode"), (0, "prefill"), (0, "decode")]


def test_all_forms_warm_up_before_the_first_round() -> None:
    outcome, log = run(Settings(prompt=8, generate=4, rounds=2))
    warm = [("load",), ("prefill", 8), ("decode", 2), ("picture", 2)]
    assert log[:8] == [(form, *step) for form in (0, 1) for step in warm]
    assert log[8:14] == [(form, *step) for step in (("prefill", 8), ("decode", 4), ("picture", 4)) for form in (0, 1)]
    assert log[14:20] == [(form, *step) for step in (("prefill", 8), ("decode", 4), ("picture", 4)) for form in (1, 0)]
    assert log[20:] == [(0, "close"), (1, "close")]
    assert (outcome.rounds, outcome.failures) == (2, {})
    # What a warm-up took is no sample: the three tasks before made "asked" 3.
    assert [sample.seconds for sample in outcome.samples if (sample.form, sample.measure) == (0, "pp")] == [4, 7]


def test_where_memory_is_small_forms_are_loaded_in_turns() -> None:
    outcome, log = run(Settings(prompt=8, generate=0, picture=False, rounds=2), together=False)
    own = ["load", "prefill", "prefill", "close"]
    assert [(form, step) for form, step, *_ in log] == [(form, step) for form in (0, 1, 1, 0) for step in own]
    assert [sample.round for sample in outcome.samples if (sample.form, sample.measure) == (1, "load")] == [0, 1]
    assert not outcome.together


def test_peaks_are_the_highest_of_all_answers() -> None:
    outcome, _ = run(Settings(rounds=1))
    assert outcome.peaks == {0: 1006, 1: 1006}
    assert outcome.runtime_peaks == {0: 500}


def test_no_round_begins_that_would_end_too_late() -> None:
    now = iter(range(0, 1000, 40))  # a look at the clock before the rounds, and before and after each
    outcome, _ = run(Settings(rounds=9, max_seconds=250), clock=lambda: next(now))
    assert outcome.rounds == 3  # 80 seconds each, with what lies between them
    outcome, _ = run(Settings(rounds=9, max_seconds=0), clock=lambda: 0.0)
    assert outcome.rounds == 9
    now = iter(range(0, 1000, 40))
    outcome, _ = run(Settings(rounds=9, max_seconds=0), clock=lambda: next(now))
    assert outcome.rounds == 1


@pytest.mark.parametrize("fails_at", [0, 2, 4])
def test_the_others_go_on_when_one_fails(fails_at: int) -> None:
    outcome, log = run(Settings(rounds=3), fails={0: fails_at})
    assert outcome.failures == {0: "it broke"}
    assert outcome.rounds == 3
    assert sum(entry[1] == "close" for entry in log) == 2
    measured = rows(outcome)
    assert {row.form for row in measured} == {1}
    assert all(row.ratio is None for row in measured)


def test_nothing_is_left_to_measure_when_all_fail() -> None:
    outcome, _ = run(Settings(rounds=3), fails={0: 4, 1: 4})
    assert (set(outcome.failures), outcome.rounds) == ({0, 1}, 0)
    assert rows(outcome) == []


def test_a_model_that_reads_no_images_has_the_other_measures() -> None:
    outcome, _ = run(Settings(rounds=1), blind={1})
    assert {row.measure for row in rows(outcome) if row.form == 1} == {"load", "pp", "tg", "peak"}


@pytest.mark.parametrize("together", [True, False])
def test_progress_ends_at_its_total(together: bool) -> None:
    told: list[tuple[int, int]] = []
    run(Settings(rounds=2), together=together, progress=lambda phase, *counts: told.append(counts))
    assert [done for done, _ in told] == list(range(told[0][1]))
    assert len({total for _, total in told}) == 1


def test_processes_end_with_ctrl_c() -> None:
    log: list[Any] = []

    class Interrupted(FakeForm):
        def ask(self, **request: Any) -> dict[str, Any]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bench(1, Settings(), lambda number: Interrupted(number, log), sleep=lambda seconds: None).run()
    assert log == [(0, "load"), (0, "close")]


def outcome_of(*samples: Sample) -> Outcome:
    facts = {0: {"reads_images": True}, 1: {"reads_images": True}}
    return Outcome(list(samples), facts, {0: 2000, 1: 500}, rounds=3)


SPEEDS = outcome_of(
    *(Sample(0, "tg", number, seconds, 10) for number, seconds in enumerate((1, 2, 4))),
    *(Sample(1, "tg", number, seconds, 10, joules=5.0) for number, seconds in enumerate((0.5, 0.4, 4))),
    Sample(0, "first", 0, 0.5, 1),
    Sample(0, "tg_deep", 0, 2, 10, depth=80),
    Sample(1, "pp", 0, 0.25, 100),
)


def test_figures() -> None:
    found = {(row.form, row.measure): row for row in rows(SPEEDS)}
    first, second = found[0, "tg"], found[1, "tg"]
    assert (first.test, first.median, first.low, first.high, first.ratio) == ("tg10", 5, 2.5, 10, None)
    # Round by round 2, 5 and 1. The medians' ratio would be 20 / 5 = 4.
    assert (second.median, second.ratios, second.ratio) == (20, [2, 5, 1], 2)
    assert found[0, "tg_deep"].test == "tg10 @ d80"
    assert (found[0, "first"].unit, found[0, "first"].median) == ("s", 0.5)
    assert (found[0, "peak"].median, found[1, "peak"].ratio) == (2000, 0.25)
    assert [row.form for row in rows(SPEEDS) if row.measure == "tg"] == [0, 1]


def test_what_the_weights_predict() -> None:
    first, second = expectations(rows(SPEEDS), COSTS)
    assert (first.bytes_per_second, first.of_predicted, first.prefill_flops) == (5 * 50, None, None)
    # Half the bytes should be twice as fast, and it is.
    assert (second.of_predicted, second.flops_per_second) == (1.0, 4 * 100_000)


def test_json_has_everything_under_the_keys_of_llama_bench() -> None:
    facts = to_dict(FORMS, COSTS, Settings(), SPEEDS, MACHINE, "it is not told")
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["energy"], facts["settings"]["rounds_measured"]) == ("it is not told", 3)
    one, two = facts["forms"]
    assert (one["form"], one["engine"], one["peak_memory_bytes"], one["error"]) == ("A", "mlx", 2000, None)
    assert (two["file"], two["of_predicted"], two["active_bytes"]) == ("/models/two.gguf", 1.0, 25)
    results = {(result["form"], result["test"]): result for result in facts["results"]}
    shape = ("n_prompt", "n_gen", "n_depth")
    assert [results["B", "pp100"][key] for key in shape] == [100, 0, 0]
    assert [results["A", "tg10 @ d80"][key] for key in shape] == [0, 10, 80]
    assert results["B", "tg10"]["values"] == [20, 25, 2.5]
    assert (results["B", "tg10"]["joules_per_token"], results["A", "tg10"]["joules_per_token"]) == (0.5, None)


def test_numbers_for_people() -> None:
    assert [number(value) for value in (0.00123, 12.34, 123.4, 12345.6)] == ["0.00123", "12.3", "123", "12,346"]
    assert (scaled("s", 0.5), scaled("s", 2.0), scaled("tokens/s", 0.1)) == (
        ("ms", 1e-3),
        ("s", 1.0),
        ("tokens/s", 1.0),
    )
    assert (scaled("bytes", 1 << 29)[0], scaled("bytes", 1 << 30)[0]) == ("MB", "GB")


def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    check_plot(path)
    write_plot(path, rows(SPEEDS), ["one", "a model with a much longer name/that-is-a-path/model.gguf"], "A CPU")
    with Image.open(path) as image:
        image.load()
        assert (image.format, image.info["Software"]) == ("PNG", SOFTWARE)
        assert image.width > 800
        assert image.height > 300
        # Bars of both forms' colours are there.
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    assert {(0x3B, 0x6F, 0xB6), (0xE0, 0x82, 0x14)} <= colours
    check_plot(path)  # a plot may be drawn again
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_a_plot_never_replaces_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = tmp_path / "photo.png"
    picture().save(photo)
    with pytest.raises(UserError, match="is no plot of gm-mlx bench"):
        check_plot(photo)
    with pytest.raises(UserError, match=r"ends with \.png"):
        check_plot(tmp_path / "plot.jpg")
    with pytest.raises(UserError, match="make it first"):
        check_plot(tmp_path / "nowhere" / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'gm-mlx\[plot\]'"):
        check_plot(tmp_path / "plot.png")


def zone(folder: Path, number: str, name: str, energy: int, around: int = 1000) -> Path:
    place = folder / f"intel-rapl:{number}"
    place.mkdir()
    for file, content in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", around)):
        (place / file).write_text(f"{content}\n")
    return place


def test_energy_is_that_of_the_packages(tmp_path: Path) -> None:
    packages = [zone(tmp_path, "0", "package-0", 900), zone(tmp_path, "1", "package-1", 100)]
    zone(tmp_path, "0:0", "core", 5)
    zone(tmp_path, "2", "psys", 7)
    meter = find_meter(tmp_path, "linux")
    before = meter.read()
    assert before == [900, 100]
    (packages[0] / "energy_uj").write_text("50")  # it began again after 1,000
    (packages[1] / "energy_uj").write_text("400")
    assert meter.joules(before, meter.read()) == pytest.approx((151 + 300) * 1e-6)


def test_energy_that_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = find_meter(tmp_path / "missing", "linux")
    assert (meter.joules(meter.read(), meter.read()), meter.silence) == (None, "this system has no counters of it")
    assert "root alone" in find_meter(tmp_path, "darwin").silence
    zone(tmp_path, "0", "package-0", 900)
    read = Path.read_text

    def refuse(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert find_meter(tmp_path, "linux").silence == f"only root may read {tmp_path}/intel-rapl:0/energy_uj"


class FakeSubject:
    context_length, vocab_size, reads_images = 100, 50, True

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def prefill(self, ids: list[int]) -> None:
        self.calls.append(("prefill", ids))

    def decode(self, ids: list[int]) -> None:
        self.calls.append(("decode", ids))

    def ask(self, image: Image.Image) -> Asked:
        self.calls.append(("ask", image.tobytes()))
        return Asked(0.25, 80)

    def reset(self) -> None:
        self.calls.append(("reset",))


class FakeMeter:
    """Each look at it costs 4 joules."""

    def __init__(self) -> None:
        self.looks = 0

    def read(self) -> list[int]:
        self.looks += 1
        return [self.looks]

    def joules(self, before: list[int], after: list[int]) -> float:
        return 4.0 * (after[0] - before[0])


def test_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(child, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(child, "find_meter", FakeMeter)
    subject = FakeSubject()
    image = picture()
    measured = Measured(subject, np.random.default_rng(0), image)  # type: ignore[arg-type]
    assert measured.prefill(7) == {"pp": {"tokens": 7, "seconds": 1.0, "joules": 4.0}}
    assert measured.decode(5)["tg"]["tokens"] == 5
    answers = [measured.picture(5), measured.picture(0)]
    assert list(answers[0]) == ["encode", "first", "tg_deep"]
    assert answers[0]["encode"]["seconds"] == 0.25
    assert (answers[0]["tg_deep"]["depth"], answers[0]["tg_deep"]["seconds"]) == (80, 1.0)
    assert list(answers[1]) == ["encode", "first"]
    names = [call[0] for call in subject.calls]
    assert names == ["prefill", "reset", "decode", "ask", "decode", "ask"]
    assert all(0 <= token < 50 for call in subject.calls if call[0] == "prefill" for token in call[1])
    pictures = [call[1] for call in subject.calls if call[0] == "ask"]
    assert len({*pictures, image.tobytes()}) == 3  # none was seen before
    with pytest.raises(UserError, match="do not fit the model's context of 100"):
        measured.picture(21)


def test_peak_memory_is_this_process_own() -> None:
    peak = peak_memory()
    assert 10 << 20 < peak < 64 << 30
    block = np.ones(64 << 20, np.uint8)
    assert peak_memory() >= max(peak, block.nbytes)


CRASHES = {
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "crashed with SIGSEGV while it was measured",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "there may be too little memory",
    "import sys; sys.exit('GGML_ASSERT(x) failed')": r"ended with code 1 while it was measured \(GGML_ASSERT",
    'input(); print(\'{"failed": "no such thing"}\')': "B, two: no such thing",
}


@pytest.mark.parametrize("code", CRASHES)
def test_a_child_that_dies_says_why_in_one_line(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", code))
    runner = Child("B, two", FORMS[1], Settings())
    with pytest.raises(UserError, match=CRASHES[code]) as caught:
        runner.load()
    assert str(caught.value).startswith("B, two: ")
    assert "\n" not in str(caught.value)
    runner.close()


def test_a_child_loads_computes_and_ends(tmp_path: Path) -> None:
    form = Form("tiny", "mlx", tiny_folder(tmp_path / "model"))
    runner = Child("A, tiny", form, Settings(prompt=20, generate=3))
    try:
        loaded = runner.load()
        assert loaded["facts"]["reads_images"]
        assert (loaded["facts"]["context_length"], list(loaded["values"])) == (512, ["load"])
        answer = runner.ask(task="prefill", tokens=20)
        assert (answer["values"]["pp"]["tokens"], answer["values"]["pp"]["seconds"] > 0) == (20, True)
        picture = runner.ask(task="picture", tokens=3)["values"]
        assert picture["tg_deep"]["depth"] > 4
        assert picture["first"]["seconds"] > picture["encode"]["seconds"] > 0
        assert answer["peak_memory"] > answer["runtime_peak"] > 0
        with pytest.raises(UserError, match="A, tiny: 500 tokens behind a picture"):
            runner.ask(task="picture", tokens=500)
        assert runner.ask(task="decode", tokens=3)["values"]["tg"]["tokens"] == 3  # it lives on
    finally:
        runner.close()
    assert runner._process.returncode == -signal.SIGKILL


def test_a_bug_in_a_child_is_told_by_its_name() -> None:
    runner = Child("B, two", FORMS[1], Settings())
    with pytest.raises(UserError, match=r"B, two: ended with code 1 while it was measured \(KeyError: 'model'\)"):
        runner.ask(task="load")
    runner.close()


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    form = Form("tiny", "mlx", tiny_folder(tmp_path / "model"))
    runner = Child("A, tiny", form, Settings(prompt=513))
    with pytest.raises(UserError, match="A, tiny: -p 513: the model's context has 512 positions"):
        runner.load()
    runner.close()


@pytest.mark.parametrize("length", [1, 3])
def test_mlx_decodes_behind_what_it_has_read(length: int, tmp_path: Path) -> None:
    subject = MLXSubject(tiny_folder(tmp_path / "model"))
    ids = np.random.default_rng(0).integers(0, 500, 12).tolist()
    subject.prefill(ids[:-length])
    subject.decode(ids[-length:])
    assert {layer.offset for layer in subject._cache} == {12}
    cache = make_cache(subject._model)
    prefill(subject._model, subject._model.embed(np.array([ids])), cache)
    after, reference = (np.array(subject._model(mx.array([[7]]), each)) for each in (subject._cache, cache))
    np.testing.assert_allclose(after, reference, rtol=1e-4, atol=1e-4)
    asked = subject.ask(picture())
    assert {layer.offset for layer in subject._cache} == {asked.depth}
    subject.prefill([subject.processor.image_token_id, 5])  # an id that means an image does no harm
    assert {layer.offset for layer in subject._cache} == {2}


def test_costs_of_a_model_folder(tmp_path: Path) -> None:
    folder = tiny_folder(
        tmp_path / "model", model=tiny_model(config=tiny_config(moe=MoEConfig(num_experts=4, top_k=1)))
    )
    arrays = mx.load(str(folder / "model.safetensors"))
    sizes = {name: array.nbytes for name, array in arrays.items()}  # type: ignore[union-attr]
    text = {name: size for name, size in sizes.items() if name.startswith("language_model.")}
    experts = sum(size for name, size in text.items() if "switch_mlp" in name)
    looked_up = sum(size for name, size in text.items() if "embed_tokens" in name)
    costs = find_form(str(folder)).costs()
    assert costs.weight_bytes == sum(sizes.values())
    assert costs.active_bytes == sum(text.values()) - looked_up - experts * 3 // 4


def write_gguf(path: Path, tied: bool, **texts: str) -> None:
    """A file of nobody's, with 2 of 8 experts at work."""
    writer = GGUFWriter(path, "llama")
    for key, text in texts.items():
        writer.add_string(key.replace("_", "."), text)
    writer.add_uint32("llama.expert_count", 8)
    writer.add_uint32("llama.expert_used_count", 2)
    shapes = {"token_embd.weight": (100, 32), "blk.0.attn_q.weight": (32, 32), "blk.0.attn_norm.weight": (32,)}
    shapes["blk.0.ffn_up_exps.weight"] = (8, 64, 32)
    if not tied:
        shapes["output.weight"] = (100, 32)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_costs_of_any_gguf_file(tied: bool, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tied)
    costs = find_form(str(tmp_path / "model.gguf")).costs()
    head, query, norm, experts = 100 * 32, 32 * 32, 32, 8 * 64 * 32
    assert costs.active_bytes == 4 * (head + query + norm + experts // 4)
    assert costs.weight_bytes == 4 * (head * (1 if tied else 2) + query + norm + experts)
    assert costs.prefill_flops(10) == 2 * (10 * (query + experts // 4) + head)


@pytest.mark.parametrize("text", ["{", "[1]", '{"text_config": 1}'])
def test_a_damaged_config_in_a_gguf_file_is_one_line(text: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tied=True, gm_config=text)
    with pytest.raises(UserError, match="config"):
        find_form(str(tmp_path / "model.gguf")).costs()


@pytest.mark.parametrize("interrupt", [None, KeyboardInterrupt])
def test_made_forms_are_gone_afterwards(
    interrupt: type[BaseException] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = made_forms(None, "gm-tiny", ["Q8_0"], 0, None, Progress())
    if interrupt is None:
        with made as (form,):
            assert (form.name, form.engine, form.model.name) == ("gm-tiny Q8_0", "llama.cpp", "model.gguf")
            assert form.mmproj is not None
            assert form.mmproj.is_file()
            assert math.isclose(
                form.costs().prefill_flops(64), Form("", "mlx", find_form(None).model).costs().prefill_flops(64)
            )
    else:

        def stop(*arguments: Any, **options: Any) -> None:
            raise interrupt

        monkeypatch.setattr("gm_mlx.cli.gguf_output.write_gguf_form", stop)
        with pytest.raises(interrupt), made:
            pass
    assert list(tmp_path.iterdir()) == []


def test_kept_forms(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    with made_forms(None, "gm-tiny", ["Q8_0"], 0, keep, Progress()):
        pass
    assert find_form(str(keep / "Q8_0")).engine == "llama.cpp"
    with pytest.raises(UserError, match="exists"), made_forms(None, "gm-tiny", ["Q8_0"], 0, keep, Progress()):
        pass


def test_a_small_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(out: Path, needed: int) -> None:
        assert 8e9 < needed < 30e9  # 3.6 GB in q4, 3.5 in Q4_0, and 11 of floats on the way
        raise UserError("needs more")

    monkeypatch.setattr("gm_mlx.cli.bench_forms.check_space", no_room)
    keep = tmp_path / "kept"
    with (
        pytest.raises(UserError, match="needs more"),
        made_forms(None, "llava-gm-2b", ["q4", "Q4_K_M"], 0, keep, Progress()),
    ):
        pass
    assert not keep.exists()
