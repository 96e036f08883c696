"""``planner emit`` for trainers and servers of decoders: the file on standard output, what it lacks on the other."""

from __future__ import annotations

from collections.abc import Callable

import click

from codegen.emission import Emission
from ir.errors import InputError
from ir.plan import Plan, write_atomically

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


def emit_decoder(plan: Plan, target: str, output: str | None) -> None:
    """Write or print the file; name what it cannot say on standard error."""
    made = emission(plan, target)
    if output is None:
        click.echo(made.text, nl=False)
    else:
        write_atomically(output, made.text)
        click.echo(f"written to {output}; use: {made.command.format(path=output)}")
    for limit in made.limits:
        click.echo(f"note: {limit}", err=True)
