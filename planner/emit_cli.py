"""``planner emit`` for trainers and servers of decoders."""

from __future__ import annotations

from collections.abc import Callable

from codegen.emission import Emission
from ir.errors import InputError
from ir.plan import Plan

TARGETS = ("torchtitan", "torchtitan-0.3", "megatron", "accelerate", "vllm")
"""Targets that give an :class:`codegen.emission.Emission`."""


def emission(plan: Plan, target: str) -> Emission:
    """The configuration of a decoder's plan for ``target``; raises InputError for an unknown one."""
    from codegen.accelerate import emit_accelerate
    from codegen.megatron import emit_megatron
    from codegen.torchtitan import emit_torchtitan
    from codegen.torchtitan_python import emit_torchtitan_python
    from codegen.vllm import emit_vllm

    emitters: dict[str, Callable[[Plan], Emission]] = {
        "torchtitan": emit_torchtitan,
        "torchtitan-0.3": emit_torchtitan_python,
        "megatron": emit_megatron,
        "accelerate": emit_accelerate,
        "vllm": emit_vllm,
    }
    if target not in emitters:
        raise InputError(f"there is no target {target!r} for decoders; choose one of {', '.join(emitters)}")
    return emitters[target](plan)
