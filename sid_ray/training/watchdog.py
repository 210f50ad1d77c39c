"""The watchdog: ends a worker that makes no progress, so that whoever launched it sees a dead worker, not silence.

A rank that hangs leaves its peers waiting in a collective, and DeepSpeed's process groups wait for torch's default
timeout or for ever. Each worker therefore watches itself, and only where progress is owed: in training steps and
reports. Starting up, evaluating and writing checkpoints may take their time.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_CODE = 75
"""How a process ends that its watchdog has ended (EX_TEMPFAIL: try again)."""
LAST_WORDS_SECONDS = 10.0
"""How long writing down the stack traces may take; the storage may be what hangs."""


class Watchdog:
    """Ends this process, after writing all threads' stacks to `log`, when a watched stretch takes too long.

    `seconds`: the longest that a stretch may take; None watches nothing. `who` names the worker in the log.
    A thread can look as long as somebody releases the interpreter's lock; a process that never does, or that is
    stopped, does not answer Ray's health checks, which take the same timeout.
    """

    def __init__(self, seconds: float | None, log: Path, who: str):
        self.seconds, self.log, self.who = seconds, log, who
        self._since: float | None = None
        self._closed = threading.Event()
        if seconds is not None:
            threading.Thread(target=self._look, args=(seconds,), name="watchdog", daemon=True).start()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around what must not take longer than `seconds`; not nested."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()

    def _look(self, seconds: float) -> None:
        while not self._closed.wait(min(1.0, seconds / 4)):
            since = self._since
            if since is not None and time.monotonic() - since > seconds:
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(LAST_WORDS_SECONDS, exit=True, file=2)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(
                f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.who}: no progress for {seconds:g} s "
                "(cluster.hang_timeout_seconds); this is where its threads are:\n"
            )
            file.flush()
            faulthandler.dump_traceback(file)
            file.write("\n")
        os._exit(EXIT_CODE)
