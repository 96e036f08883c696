"""How far a search is, for whoever watches; nothing in a solution depends on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """A new incumbent or a new bound of the problem that is being solved.

    Seconds of the objective without what no assignment changes; the incumbent is infinite before the first.
    """

    incumbent: float
    bound: float

    @property
    def gap(self) -> float:
        """(incumbent - bound) / incumbent, a fraction of 1; 1 before the first incumbent."""
        return max(0.0, 1.0 - self.bound / self.incumbent) if self.incumbent > 0 else 0.0


Watcher = Callable[[Progress], None]
_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` about every search that runs inside."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def tell(incumbent: float, bound: float) -> None:
    """Called by the searches."""
    watcher = _WATCHER.get()
    if watcher is not None:
        watcher(Progress(incumbent, bound))
