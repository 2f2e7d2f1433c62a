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
        self._bar: tqdm[None] | None = None

    @contextmanager
    def shown(self, progress: bool) -> Iterator[None]:
        """Shows the steps that are done meanwhile."""
        with tqdm(desc="merge", unit=" steps", disable=not progress, leave=False, mininterval=0) as self._bar:
            yield
        self._bar = None

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        if self._bar is not None:
            self._bar.set_postfix_str(step)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start
            if self._bar is not None:
                self._bar.update()
