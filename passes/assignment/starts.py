"""Choices of options to start from: the relaxation at several targets, and the simple plans."""

from __future__ import annotations

from collections import Counter

import numpy as np

from passes.assignment.compiled import Compiled
from passes.assignment.relaxation import piece_floor, relax

# Pieces up to these multiples of the bound: small ones pack better, large ones cost less.
LIMITS = (1.0, 1.05, 1.15, 1.4, 0.7, 0.5, 0.35, 0.2, 0.1)
COMMON = 0.9  # an option label that this share of the tables has makes a uniform plan


def relaxed_choices(compiled: Compiled, bound: float) -> list[list[int]]:
    """Least-average choices among options whose pieces stay below several multiples of the bound."""
    floor = piece_floor(compiled)
    made: list[list[int]] = []
    least = np.minimum.reduceat(np.where(compiled.usable, floor, np.inf), compiled.start[:-1])
    for limit in LIMITS:
        allowed = compiled.usable & (floor <= np.maximum(limit * bound, least)[compiled.table] * (1 + 1e-9))
        choice = list(map(int, relax(compiled, allowed).choice - compiled.start[:-1]))
        if choice not in made:
            made.append(choice)
    return made


def uniform_choices(compiled: Compiled, fallback: list[int]) -> list[list[int]]:
    """The same option for every table that has it, as simple planners do."""
    problem = compiled.problem
    counts = Counter(label for options in problem.options for label in {option.label for option in options})
    made = []
    for label, count in sorted(counts.items()):
        if count < COMMON * compiled.tables:
            continue
        choice = list(fallback)
        for t, options in enumerate(problem.options):
            for j, option in enumerate(options):
                if option.label == label and compiled.usable[compiled.start[t] + j]:
                    choice[t] = j
        made.append(choice)
    return made
