"""Layouts that can be planned and not run, known from the plan alone."""

from __future__ import annotations

from ir.errors import InputError
from ir.parallelism import Parallelism


def check_runs(made: Parallelism) -> None:
    """Raise InputError where PyTorch or this runtime cannot carry the layout out."""
    layout = made.layout
    if made.model.kv_heads % layout.tensor:
        raise InputError(
            f"tensor {layout.tensor} does not divide {made.model.kv_heads} key-value heads; copies of heads are "
            "planned but not run here: compile with a smaller constraints.parallelism.tensor"
        )
    obstacles = {
        "recomputation": layout.recompute != "none",
        "ring attention": layout.context > 1,
        "weights that are gathered twice (ZeRO-3)": layout.zero == 3 and layout.data > 1,
    }
    what = next((name for name, there in obstacles.items() if there), "")
    if layout.schedule == "zero_bubble" and what:
        raise InputError(
            f"a zero-bubble schedule splits the backward pass, which torch cannot do through {what}; compile with "
            "constraints.parallelism.schedules: [1f1b, interleaved_1f1b]"
        )
    if layout.schedule == "1f1b" and layout.micro_batches < layout.pipeline:
        raise InputError(
            f"torch's 1F1B needs a micro-batch for each of {layout.pipeline} stages, the plan has {layout.micro_batches}; "
            "compile with constraints.parallelism.micro_batch: 1 or with schedule gpipe"
        )
