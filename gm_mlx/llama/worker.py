"""Calls of llama.cpp that Ctrl-C can stop.

Python acts on a signal between two of its own instructions, and one call of llama.cpp can take half a minute. But
llama.cpp asks a callback again and again whether to go on, and that is Python. So while a call runs, Ctrl-C only sets a
flag, which the callback reports, and ``KeyboardInterrupt`` is raised when llama.cpp has returned: never in the middle
of what it does.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from gm_mlx.llama.binding import library

Result = TypeVar("Result")


class Worker:
    """Runs calls of llama.cpp.

    Attributes:
        stops: whether the call that runs should give up.
        stop: the same as a callback for llama.cpp; the worker must live as long as whoever asks it.
    """

    def __init__(self) -> None:
        self.stops = False
        self.stop = library().ggml_abort_callback(lambda data: self.stops)

    def run(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Run a call and return its result; raises ``KeyboardInterrupt`` after it when Ctrl-C came meanwhile."""
        # Signals go to the main thread only, and whoever handles Ctrl-C in a way of his own keeps doing so.
        if threading.current_thread() is not threading.main_thread():
            return call(*arguments)
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return call(*arguments)
        self.stops = False
        signal.signal(signal.SIGINT, self._interrupt)
        try:
            result = call(*arguments)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.stops:
            self.stops = False
            raise KeyboardInterrupt
        return result

    def _interrupt(self, number: int, frame: Any) -> None:
        self.stops = True
