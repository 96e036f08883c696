"""Deterministic work: what the solver has done, in seconds that do not depend on the clock."""

from __future__ import annotations

import time

SAFETY = 10.0  # the clock stops a search only after this multiple of the limit (plus 30 s)


class Budget:
    """Counts work; every search loop pays for its steps and stops when the limit is reached.

    The same input spends the same work on any machine, so it stops at the same step. The wall clock is
    a safety net for machines far slower than the one the prices were measured on; a plan that it cut
    short is still valid, but another run may differ.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.work = 0.0
        self._deadline = time.monotonic() + SAFETY * limit + 30.0
        self._calls = 0

    def spend(self, seconds: float) -> None:
        """Pay for a step."""
        self.work += seconds
        self._calls += 1

    def spent(self) -> bool:
        """Whether to stop."""
        if self.work >= self.limit:
            return True
        return self._calls % 64 == 0 and time.monotonic() > self._deadline

    def slice(self, fraction: float) -> Budget:
        """A budget of a fraction of what is left; add its work back with :meth:`spend`."""
        part = Budget(max(0.0, self.limit - self.work) * fraction)
        part._deadline = self._deadline
        return part
