"""The errors a user can meet, each with the exit code of the command line.

========================  =========  =====================================================
class                     exit code  meaning
========================  =========  =====================================================
:class:`PlannerError`     2          base class; never raised itself
:class:`InputError`       2          unusable input: a file, a name, a value, a model
:class:`TraceError`       2          model code that cannot be captured
:class:`InfeasibleError`  3          the problem has no plan under the limits given
:class:`IRError`          2          a pass or a file broke an invariant of the IR
========================  =========  =====================================================
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Diagnosis = tuple[tuple[str, ...], str, Mapping[str, Any]]
LONGEST_NAME, MOST_NAMES = 100, 5000


class PlannerError(Exception):
    """Base of every error the planner raises on purpose; the message is one clear sentence."""

    exit_code = 2


class InputError(PlannerError):
    """Bad input: names the thing, what is wrong with it and what would fix it."""


class TraceError(InputError):
    """Model code that cannot be captured as a graph."""


class IRError(PlannerError):
    """An invariant of the IR does not hold (see :mod:`ir.verifier` for the list)."""


class InfeasibleError(PlannerError):
    """No plan satisfies the limits.

    Args:
        message: one sentence for people.
        conflict: names of the limits that cannot hold together, in the user's words
            (``"hbm_budget"``, ``"pin[C20]=data_parallel"``).
        relaxation: the smallest change known to make the problem feasible.
        change: the same for programs: fields of the constraints with their new values, ``{"hosts": 4}``, or
            ``{"without": (limits,)}``; empty where it was not worked out.
        diagnose: works these three out when one of them is first asked for, which many callers never do; None
            from it leaves what was given.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        conflict: Iterable[str] = (),
        relaxation: str = "",
        change: Mapping[str, Any] | None = None,
        diagnose: Callable[[], Diagnosis | None] | None = None,
    ) -> None:
        super().__init__(message)
        self._found: Diagnosis = (tuple(conflict), relaxation, dict(change or {}))
        self._diagnose = diagnose

    def _diagnosis(self) -> Diagnosis:
        if self._diagnose is not None:
            diagnose, self._diagnose = self._diagnose, None
            self._found = diagnose() or self._found
        return self._found

    @property
    def conflict(self) -> tuple[str, ...]:
        """Limits that cannot hold together."""
        return self._diagnosis()[0]

    @property
    def relaxation(self) -> str:
        """The smallest change known to help, in words."""
        return self._diagnosis()[1]

    @property
    def change(self) -> Mapping[str, Any]:
        """The smallest change known to help, as data."""
        return self._diagnosis()[2]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name, or an empty string."""
    if len(name) > LONGEST_NAME:
        return ""
    # the comparison takes time with the product of the lengths: long names and long lists are cut short
    few = itertools.islice((other for other in known if len(other) <= LONGEST_NAME), MOST_NAMES)
    near = difflib.get_close_matches(name, list(few), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
