"""Seconds per step, and a bar that says which step is being done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Clock:
    """Times named steps; entered, it shows them as they are done until it is left.

    Attributes:
        seconds: per step, in order of appearance; a step may be done in several parts.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._shown = False
        self._bar: tqdm[None] | None = None

    @contextmanager
    def shown(self, progress: bool) -> Iterator[None]:
        """Shows the steps that are done meanwhile."""
        self._shown = progress
        try:
            yield
        finally:
            self._shown = False
            if self._bar is not None:
                self._bar.close()

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        if self._shown and self._bar is None:  # only now: what is refused at once shows no bar
            self._bar = tqdm(desc="merge", unit=" steps", leave=False)
        if self._bar is not None:
            self._bar.set_postfix_str(step)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start
            if self._bar is not None:
                self._bar.update()
