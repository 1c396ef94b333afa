"""Ctrl-C while llama.cpp computes."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from gm_mlx.llama.worker import Worker


def press() -> None:
    """Ctrl-C, as the terminal sends it."""
    os.kill(os.getpid(), signal.SIGINT)


def test_results_and_errors_come_back() -> None:
    worker = Worker()
    assert worker.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        worker.run(divmod, 7, 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_stops_a_call_but_never_in_its_midst(presses: int) -> None:
    """However often it is pressed: the call must be over before its memory can be given back."""
    worker, seen = Worker(), []

    def compute() -> None:
        for _ in range(presses):
            seen.append(worker.stop(None))  # as llama.cpp asks between two steps
            press()
        seen.append(worker.stop(None))
        seen.append("ended")

    with pytest.raises(KeyboardInterrupt):
        worker.run(compute)
    assert seen == [False, *[True] * presses, "ended"]
    assert worker.run(worker.stop, None) is False
    with pytest.raises(KeyboardInterrupt):  # as ever, when nothing is computed
        press()


def test_somebody_elses_way_with_ctrl_c_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        Worker().run(press)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]


def test_in_another_thread() -> None:
    results: list[tuple[int, int]] = []
    thread = threading.Thread(target=lambda: results.append(Worker().run(divmod, 7, 2)))
    thread.start()
    thread.join()
    assert results == [(3, 1)]
