"""Min-max assignment of table options and pieces to ranks, with proved bounds."""

from passes.assignment.alternatives import alternatives, runner_up
from passes.assignment.problem import Option, Piece, Problem, Solution, evaluate
from passes.assignment.solve import Effort, solve

__all__ = [
    "Effort",
    "Option",
    "Piece",
    "Problem",
    "Solution",
    "alternatives",
    "evaluate",
    "runner_up",
    "solve",
]
