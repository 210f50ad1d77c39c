"""Writes without which training goes on: tried, warned about, tried again when there is something new to write."""

from __future__ import annotations

from collections.abc import Callable

from safetensors import SafetensorError


class BestEffort:
    """Runs actions that write files; a full disk or storage that fails does not end training."""

    def __init__(self, note: Callable[[str], None]):
        self.note = note
        self.failing: set[str] = set()

    def __call__(self, what: str, action: Callable[[], object]) -> bool:
        """Do it; returns whether it succeeded. Warns when `what` begins to fail, and not again until it succeeds."""
        try:
            action()
        except (OSError, SafetensorError) as error:
            if what not in self.failing:
                self.note(f"warning: {what}: {error}; training goes on, and it is tried again")
            self.failing.add(what)
            return False
        self.failing.discard(what)
        return True
