"""A decoder's serving plan carried out on this process group, and how far its formats move the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ir.errors import InputError
from ir.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

    from codegen.runtime.llm.serve import ServedDecoder


def served_decoder(plan: Plan, module: nn.Module, *, exact: bool = False) -> ServedDecoder:
    """``module`` on this rank of the default process group: ``.prefill(tokens)``, ``.decode(tokens)``.

    Args:
        plan: a serving plan.
        module: the whole model in fp32.
        exact: leave the plan's formats aside.

    Raises:
        InputError: no serving plan of a decoder, or a layout that is not run here.
    """
    from codegen.runtime.llm.serve import ServedDecoder

    if plan.decisions.serving is None:
        raise InputError(
            f"the plan of {plan.model.name!r} serves no decoder; compile it with mode='inference'"
        )
    return ServedDecoder(plan.decisions.serving, module, exact=exact)


@dataclass(frozen=True, slots=True)
class Drift:
    """What a plan's formats change in the logits of one request."""

    relative: float  # norm of the difference over the norm of the exact logits, largest of all steps
    agreed: float  # share of next tokens that are the same
    cache_bytes: int  # of this rank
    exact_bytes: int  # the same in fp32


def measure_drift(plan: Plan, module: nn.Module, prompt: Tensor, tokens: int = 4) -> Drift:
    """Serve ``prompt`` (sequences, T) and ``tokens`` more in the plan's formats and in fp32, on the same tokens.

    Raises:
        InputError: as :func:`served_decoder`.
    """
    planned, exact = (served_decoder(plan, module, exact=wide) for wide in (False, True))
    mine, theirs = planned.prefill(prompt), exact.prefill(prompt)
    drifts, same = [_relative(mine, theirs)], [mine.argmax(-1) == theirs.argmax(-1)]
    for _ in range(tokens):
        chosen = theirs.argmax(-1)
        mine, theirs = planned.decode(chosen), exact.decode(chosen)
        drifts.append(_relative(mine, theirs))
        same.append(mine.argmax(-1) == theirs.argmax(-1))
    agreed = sum(int(step.sum()) for step in same) / (len(same) * prompt.shape[0])
    return Drift(max(drifts), agreed, planned.cache_bytes, exact.cache_bytes)


def _relative(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).norm() / theirs.norm())
