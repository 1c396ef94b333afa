"""The plan: all forms take turns at each task, so that whatever else the machine does meets all of them alike.

A round puts every form to every task once. Within a round a task goes through all forms before the next one begins, and
every other round goes through them backwards: a machine that grows hot or busy favours nobody. Ratios of two forms are
taken within a round, where their runs lie closest.

Forms stay loaded between their turns. Where memory is too small for all of them, they are loaded anew each round, one
at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from gm_mlx.engine import Progress
from gm_mlx.errors import UserError

WARM_UP_TOKENS = 2  # of decoding; every other task runs once as it is, so that its kernels and buffers are there
# Threads that have just computed look out for more work for a while (OpenBLAS for 30 ms), on the others' processors.
SETTLE_SECONDS = 0.1
PICTURE = "picture"


@dataclass(frozen=True)
class Settings:
    """How forms are measured.

    Attributes:
        prompt: tokens of the prompt that is read; 0 leaves it out.
        generate: tokens that are generated; 0 leaves it out.
        rounds: how often everything is measured.
        max_seconds: no round is begun that would end later; one is measured in any case.
        picture: ask about a picture too.
        image: its file; None for noise.
        threads: of llama.cpp; None for all real cores.
        gpu_layers: of llama.cpp; None for all.
        seed: of tokens and noise.
    """

    prompt: int = 256
    generate: int = 24
    rounds: int = 5
    max_seconds: float = 600
    picture: bool = True
    image: str | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    seed: int = 0

    def tasks(self) -> list[Task]:
        """What a round puts each form to."""
        planned = (
            ("prefill", self.prompt, self.prompt > 0),
            ("decode", self.generate, self.generate > 0),
            (PICTURE, self.generate, self.picture),
        )
        return [Task(name, tokens) for name, tokens, wanted in planned if wanted]


class Task(NamedTuple):
    """A task by the name that ``gm_mlx.bench.child`` gives it."""

    name: str
    tokens: int

    def warm_up(self) -> Task:
        """The same, without what need not be long."""
        return self if self.name == "prefill" else Task(self.name, min(self.tokens, WARM_UP_TOKENS))


class Runner(Protocol):
    """A form that can be put to tasks; see ``gm_mlx.bench.process.Child``."""

    def load(self) -> dict[str, Any]: ...

    def ask(self, **request: Any) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Sample:
    """One measured value.

    Attributes:
        form: the form's number.
        measure: "load", "pp", "tg", "encode", "first" or "tg_deep".
        round: the round, from 0 on.
        seconds: how long it took.
        tokens: how many tokens that was.
        joules: energy, where the system tells it.
        depth: positions that were in the cache before.
    """

    form: int
    measure: str
    round: int
    seconds: float
    tokens: int
    joules: float | None = None
    depth: int = 0


@dataclass
class Outcome:
    """What was measured.

    Attributes:
        samples: all values, in the order of time.
        facts: by form: what its engine says about itself.
        peaks: by form: the most memory that its process had, in bytes.
        runtime_peaks: by form: the most that its engine's own allocator had, where it tells.
        failures: by form: why it could not be measured.
        rounds: rounds that were measured.
        together: whether all forms were loaded at a time.
    """

    samples: list[Sample] = field(default_factory=list)
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)
    runtime_peaks: dict[int, int] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    rounds: int = 0
    together: bool = True


def turns(forms: Sequence[int], tasks: Sequence[Task], number: int, together: bool) -> Iterator[tuple[int, Task]]:
    """The order of one round; see above."""
    ordered = forms if number % 2 == 0 else forms[::-1]
    if together:
        yield from ((form, task) for task in tasks for form in ordered)
    else:
        yield from ((form, task) for form in ordered for task in tasks)


class Bench:
    """Measures forms in turns. A form that fails is left out from there on, and the others are measured.

    Args:
        count: how many forms there are.
        settings: how they are measured.
        start: starts the process of a form, by number.
        together: keep all of them loaded.
        progress: told what is measured, how many tasks are done, and of how many.
        clock: seconds, for ``settings.max_seconds`` alone.
        sleep: called before each task.
    """

    def __init__(
        self,
        count: int,
        settings: Settings,
        start: Callable[[int], Runner],
        *,
        together: bool = True,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings, self._start = settings, start
        self._progress = progress or (lambda phase, done, total: None)
        self._clock, self._sleep = clock, sleep
        self._forms = list(range(count))
        self._tasks = settings.tasks()
        self._runners: dict[int, Runner] = {}
        self._done = 0
        opened = 1 if together else settings.rounds
        self._total = count * (opened * (1 + len(self._tasks)) + settings.rounds * len(self._tasks))
        self._outcome = Outcome(together=together)

    def run(self) -> Outcome:
        """Measure; no process is left when this returns or raises."""
        out, together = self._outcome, self._outcome.together
        try:
            if together:
                for form in self._forms:
                    self._open(form, 0)
            began = self._clock()
            for number in range(self._settings.rounds):
                begun = self._clock()
                for form, task in turns(self._forms, self._tasks, number, together):
                    self._turn(form, task, number)
                    if not together and task == self._tasks[-1]:
                        self._close(form)
                if len(out.failures) == len(self._forms):
                    break
                out.rounds = number + 1
                now = self._clock()
                if now - began + (now - begun) > self._settings.max_seconds:
                    break
        finally:
            for form in list(self._runners):
                self._close(form)
        return out

    def _turn(self, form: int, task: Task, number: int) -> None:
        """One form's turn at one task."""
        if form not in self._runners and form not in self._outcome.failures:
            self._open(form, number)
        self._put(form, task, number)

    def _open(self, form: int, number: int) -> None:
        """Load a form and let it warm up."""
        self._progress("load", self._done, self._total)
        try:
            self._runners[form] = self._start(form)
            answer = self._runners[form].load()
        except UserError as error:
            self._fail(form, error)
        else:
            self._outcome.facts[form] = answer["facts"]
            self._keep(form, answer, number)
        self._done += 1
        for task in self._tasks:
            self._put(form, task.warm_up(), None)

    def _put(self, form: int, task: Task, number: int | None) -> None:
        """Put a form to a task; what it takes is kept for a round, and not without one."""
        self._progress(task.name, self._done, self._total)
        self._done += 1
        if form in self._outcome.failures or (task.name == PICTURE and not self._outcome.facts[form]["reads_images"]):
            return
        self._sleep(SETTLE_SECONDS)
        try:
            answer = self._runners[form].ask(task=task.name, tokens=task.tokens)
        except UserError as error:
            self._fail(form, error)
        else:
            self._keep(form, answer, number)

    def _keep(self, form: int, answer: dict[str, Any], number: int | None) -> None:
        out = self._outcome
        out.peaks[form] = max(out.peaks.get(form, 0), answer["peak_memory"])
        if answer["runtime_peak"] is not None:
            out.runtime_peaks[form] = max(out.runtime_peaks.get(form, 0), answer["runtime_peak"])
        if number is not None:
            out.samples += [Sample(form, name, number, **value) for name, value in answer["values"].items()]

    def _fail(self, form: int, error: UserError) -> None:
        self._outcome.failures[form] = str(error)
        self._close(form)

    def _close(self, form: int) -> None:
        if runner := self._runners.pop(form, None):
            runner.close()
