"""What if: a plan's inputs with some settings changed, planned again and compared.

=============================  ==================================================================
setting                        means
=============================  ==================================================================
``hosts``, ``host_size``       hosts in all, devices of a host
``topology``                   another preset or YAML file
``link.NAME``                  bandwidth of a level's link; NAME is a level, a link, intra or inter
``latency.NAME``               its latency
``TIER`` (``hbm``)             capacity of a memory tier
``bandwidth.TIER``             its read and write bandwidth
``flops.DTYPE``                peak FLOP/s of an element type
``batch``                      global batch
``optimizer``, ``compute_dtype``, ``exchange_dtype``   of the workload
``memory_reserve``, ``memory_limit``, ``min_column_width``   of the constraints
``serving.FIELD``, ``parallelism.FIELD``   of what is asked of a decoder (``serving.new=1000000``)
``sequence``, ``global_tokens``   of a decoder's training
=============================  ==================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ir.plan
from ir.constraints import Constraints
from ir.errors import InputError, did_you_mean
from ir.reading import parse_record
from ir.topology import Topology
from ir.workload import Workload
from planner.plan import Plan

if TYPE_CHECKING:
    from cost_models.calibration import Calibration
    from ir.program import Model, Program
    from passes.base import Pass

_WORKLOAD = {"batch": "global_batch", "optimizer": "optimizer", "compute_dtype": "compute_dtype"}
_WORKLOAD |= {"exchange_dtype": "exchange_dtype"}
_TOKENS = ("sequence", "global_tokens")
_SECTIONS = ("serving", "parallelism")
_CONSTRAINTS = ("memory_reserve", "memory_limit", "min_column_width")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a plan was made of, apart from the model."""

    topology: Topology
    workload: Workload
    constraints: Constraints


def parse_settings(texts: Iterable[str]) -> dict[str, str]:
    """``key=value`` texts as a mapping; raises InputError on one without ``=`` or a key given twice."""
    settings: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise InputError(f"--set {text!r} is not KEY=VALUE; write for example --set hosts=8")
        if key in settings:
            raise InputError(f"--set {key} is given twice; keep one")
        settings[key] = value
    return settings


def change(inputs: Inputs, settings: Mapping[str, str]) -> Inputs:
    """``inputs`` with ``settings`` applied; raises InputError that names the setting and what is known."""
    for key, value in settings.items():
        inputs = _change_one(inputs, key, value)
    return inputs


def whatif(plan: ir.plan.Plan, settings: Mapping[str, str], *, model: Any = None, **options: Any) -> Plan:
    """Plan again with ``settings`` changed; ``options`` go to :func:`planner.compile`.

    The search starts from the plan: its shardings, formats and tiers, on other ranks placed anew, and its towers, where
    the ranks stay. Ranks are named so that little moves. The provenance then says which plan it was (``start``), or else
    why it was planned anew (``anew``).

    Args:
        plan: the plan to start from.
        settings: see the module's table.
        model: default what the plan says it was compiled from.

    Raises:
        InputError: an unknown setting, or no model to plan with.
        InfeasibleError: no plan under the changed limits.
    """
    from planner.api import compile
    from planner.towers import price_over_arch

    changed = change(
        Inputs(plan.topology, replace(plan.workload, dedup={}, dedup_ops={}), plan.constraints), settings
    )
    captured = model_of(plan, model)
    options.setdefault("objective", plan.provenance.get("objective", "phases"))
    options.setdefault("seed", int(plan.provenance.get("seed", "0")))
    source = str(model) if isinstance(model, str) else plan.provenance.get("model", "")
    unused = ["other passes are given"] if "passes" in options else planned_anew(plan, changed)

    def planned(keep_towers: bool) -> Plan:
        given = options
        if not unused:
            passes = _warm_passes(plan, changed, options.get("calibration"), unused, keep_towers)
            given = {**options, "passes": price_over_arch(passes, source) if source else passes}
        return compile(
            captured,
            changed.topology,
            changed.workload,
            constraints=changed.constraints,
            mode=plan.mode,
            name=plan.model.name,
            **given,
        )

    towers = not unused and in_towers(plan) and changed.constraints.towers is not None
    made = planned(towers)
    if towers and not in_towers(made):  # the flat plan they were weighed against was looked for in passing
        made = planned(keep_towers=False)
    said = {"model": source} if source else {}
    said |= {"anew": unused[0]} if unused else {"start": plan.digest}
    return replace(made, provenance={**made.provenance, **said})


def in_towers(plan: ir.plan.Plan) -> bool:
    """Whether the plan's towers are in force."""
    return plan.decisions.towers is not None and plan.decisions.towers.applied


def planned_anew(plan: ir.plan.Plan, changed: Inputs) -> list[str]:
    """Why the search does not start from the plan; nothing where it does."""
    from passes.assignment.solve import FEW_TABLES

    machine, limits = changed.topology, changed.constraints
    if (machine.world_size, machine.host_size) == (plan.world_size, plan.topology.host_size):
        return [] if plan.table_plans else ["layouts of decoders are all looked at each time"]
    if not plan.table_plans:
        return ["layouts of decoders are all looked at each time"]
    if in_towers(plan):
        return ["towers are cut for the hosts that there are"]
    if len(plan.table_plans) <= FEW_TABLES and limits.formats is None and limits.tiers is None:
        return [f"{len(plan.table_plans)} tables on other ranks are searched as fast without a start"]
    return []


def _warm_passes(
    plan: ir.plan.Plan,
    changed: Inputs,
    calibration: Calibration | None,
    unused: list[str],
    keep_towers: bool,
) -> tuple[Pass, ...]:
    """The pipeline that starts from the plan; what it could not use is noted in ``unused``."""
    from passes.dense import DenseParallelism
    from passes.pipeline import pipeline
    from passes.relabel import Relabel
    from passes.towers import KnownTowers, Towers
    from passes.warm_sharding import WarmSharding

    limits, machine, towers = changed.constraints, changed.topology, plan.decisions.towers
    pinned = frozenset(t.name for t in plan.table_plans if limits.for_table(t.name).ranks is not None)
    ranks = (plan.world_size, plan.topology.host_size)
    first = WarmSharding(plan.table_plans, ranks, calibration, plan.decisions.formats, unused)
    if keep_towers:
        first = replace(first, effort="quick")
    named: list[Pass] = [first]
    if machine.host_size == plan.topology.host_size and not keep_towers:  # the first hosts stay
        left = range(plan.world_size)
        survivors = tuple(rank if rank in left else -1 for rank in range(machine.world_size))
        named.append(Relabel(plan.table_plans, survivors, pinned))
    made: list[Pass] = []
    for step in pipeline(calibration):
        if isinstance(step, DenseParallelism):  # what does not start from the plan there is no matter
            step = replace(step, placing=replace(first, unused=[]))
        if isinstance(step, Towers) and keep_towers and towers is not None:
            step = replace(step, known=KnownTowers(towers, plan.table_plans))
        made += named if step.name == "sharding" else [step]
    return tuple(made)


def model_of(plan: ir.plan.Plan, model: Any = None) -> Model:
    """The captured model of a plan; raises InputError when there is none, or it is another one."""
    from ir.program import Model
    from planner.models import resolve

    if isinstance(model, Model):
        captured = model
    else:
        source = model or plan.provenance.get("model", "")
        if not source:
            raise InputError("the plan does not say what it was compiled from; name the model with --model")
        captured = resolve(source).model
    if captured.digest != plan.model.digest:
        raise InputError(
            f"{captured.name} is not the model of the plan ({plan.model.name}): tables or layers differ; name "
            "the right one with --model, or compile again"
        )
    return captured


def program_of(plan: ir.plan.Plan, model: Any = None) -> Program:
    """The program that a plan is the end of, to price it again; raises InputError as :func:`model_of`."""
    from ir.program import Options, Program

    return Program(
        model=model_of(plan, model),
        topology=plan.topology,
        workload=plan.workload,
        options=Options(plan.mode, plan.constraints),
        tables=plan.table_plans,
        decisions=plan.decisions,
        certificate=plan.certificate,
        memory=plan.memory,
    )


def _change_one(inputs: Inputs, key: str, value: str) -> Inputs:
    if key in _WORKLOAD:
        data = inputs.workload.to_dict() | {_WORKLOAD[key]: _number(value)}
        return replace(inputs, workload=parse_record(Workload, data, f"--set {key}"))
    if key in _CONSTRAINTS:
        data = inputs.constraints.to_dict() | {key: _number(value)}
        return replace(inputs, constraints=parse_record(Constraints, data, f"--set {key}"))
    if key in _TOKENS:
        data = inputs.workload.to_dict()
        data["llm"] = (data["llm"] or {}) | {key: _number(value)}
        return replace(inputs, workload=parse_record(Workload, data, f"--set {key}"))
    section, _, field = key.partition(".")
    if section in _SECTIONS and field:
        data = inputs.constraints.to_dict()
        data[section] = (data[section] or {}) | {field: _number(value)}
        return replace(inputs, constraints=parse_record(Constraints, data, f"--set {key}"))
    if key == "topology":
        from planner.api import topology

        return replace(inputs, topology=topology(value))
    data = inputs.topology.to_dict()
    _change_topology(data, key, value)
    return replace(inputs, topology=parse_record(Topology, data, f"--set {key}={value}"))


def _number(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _change_topology(data: dict[str, Any], key: str, value: str) -> None:
    """Change one setting in a topology's plain data; parsing checks the value."""
    levels, kind, (_, _, name) = data["levels"], key.partition(".")[0], key.partition(".")
    if key in ("hosts", "host_size"):
        if key == "hosts" and len(levels) < 2:
            raise InputError(
                f"{data['name']} is one host without a network; change --set topology=... instead"
            )
        if key == "hosts":
            _change_hosts(levels, _count(key, value))
        else:
            levels[0]["fanout"] = _count(key, value)
    elif kind in ("link", "latency") and name:
        found = [level for level in levels if name in (level["name"], level["link"]["name"])]
        found += levels[:1] if name == "intra" else []
        found += levels[-1:] if name == "inter" and len(levels) > 1 else []
        if not found:
            raise _unknown(key, [*(f"{kind}.{level['name']}" for level in levels), *_FIXED])
        for level in found:
            level["link"]["bandwidth" if kind == "link" else "latency"] = value
    elif kind == "flops" and name in data["device"]["flops"]:
        data["device"]["flops"][name] = value
    else:
        tiers = [*data["device"]["tiers"], *data["host_tiers"]]
        wanted = name if kind == "bandwidth" and name else key
        found = [tier for tier in tiers if tier["name"] == wanted]
        if not found:
            names = [tier["name"] for tier in tiers]
            flops = [f"flops.{dtype}" for dtype in data["device"]["flops"]]
            raise _unknown(key, [*names, *_FIXED, *_WORKLOAD, *_TOKENS, *_CONSTRAINTS, *flops])
        of = ("capacity",) if wanted == key else ("read_bandwidth", "write_bandwidth")
        for tier in found:
            tier.update(dict.fromkeys(of, value))


def _change_hosts(levels: list[dict[str, Any]], hosts: int) -> None:
    """So many hosts in all: whole domains of the level below the last, or a part of a single one."""
    *inner, outer = levels[1:]
    domain = math.prod(level["fanout"] for level in inner)
    if hosts % domain == 0:
        outer["fanout"] = hosts // domain
    elif hosts < domain and len(inner) == 1:
        inner[0]["fanout"], outer["fanout"] = hosts, 1
    else:
        raise InputError(
            f"--set hosts={hosts} does not fill whole {inner[-1]['name']}s of {domain} hosts; use a multiple of {domain}"
        )


def _count(key: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise InputError(f"--set {key}={value} must be a whole number of at least 1")
    return int(value)


_FIXED = ("hosts", "host_size", "topology", "link.intra", "link.inter", "latency.inter")


def _unknown(key: str, known: Iterable[str]) -> InputError:
    known = list(known)
    return InputError(f"there is no setting {key!r}{did_you_mean(key, known)}; known are {', '.join(known)}")
