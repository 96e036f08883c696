"""What if: a plan's inputs with some settings changed, planned again and compared.

=============================  ==================================================================
setting                        means
=============================  ==================================================================
``hosts``, ``host_size``       hosts of the cluster, devices of a host
``topology``                   another preset or YAML file
``link.NAME``                  bandwidth of a level's link; NAME is a level, a link, intra or inter
``latency.NAME``               its latency
``TIER`` (``hbm``)             capacity of a memory tier
``bandwidth.TIER``             its read and write bandwidth
``flops.DTYPE``                peak FLOP/s of an element type
``batch``                      global batch
``optimizer``, ``compute_dtype``, ``exchange_dtype``   of the workload
``memory_reserve``, ``memory_limit``, ``min_column_width``   of the constraints
=============================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
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

_WORKLOAD = {"batch": "global_batch", "optimizer": "optimizer", "compute_dtype": "compute_dtype"}
_WORKLOAD |= {"exchange_dtype": "exchange_dtype"}
_CONSTRAINTS = ("memory_reserve", "memory_limit", "min_column_width")
STEP = 0.10  # relative change of an assumption in :func:`sensitivity`


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a plan was made of, apart from the model."""

    topology: Topology
    workload: Workload
    constraints: Constraints


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The modelled step of the same plan when one assumption is a tenth worse or better, seconds."""

    name: str
    value: str
    worse: float
    better: float


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

    Args:
        plan: the plan to start from.
        settings: see the module's table.
        model: default what the plan says it was compiled from.

    Raises:
        InputError: an unknown setting, or no model to plan with.
        InfeasibleError: no plan under the changed limits.
    """
    from planner.api import compile

    changed = change(Inputs(plan.topology, replace(plan.workload, dedup={}), plan.constraints), settings)
    captured = model_of(plan, model)
    options.setdefault("objective", plan.provenance.get("objective", "phases"))
    options.setdefault("seed", int(plan.provenance.get("seed", "0")))
    made = compile(
        captured,
        changed.topology,
        changed.workload,
        constraints=changed.constraints,
        mode=plan.mode,
        name=plan.model.name,
        **options,
    )
    source = str(model) if isinstance(model, str) else plan.provenance.get("model", "")
    return replace(made, provenance={**made.provenance, **({"model": source} if source else {})})


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
        levels[-1 if key == "hosts" else 0]["fanout"] = _count(key, value)
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
            raise _unknown(key, [*names, *_FIXED, *_WORKLOAD, *_CONSTRAINTS, *flops])
        of = ("capacity",) if wanted == key else ("read_bandwidth", "write_bandwidth")
        for tier in found:
            tier.update(dict.fromkeys(of, value))


def _count(key: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise InputError(f"--set {key}={value} must be a whole number of at least 1")
    return int(value)


_FIXED = ("hosts", "host_size", "topology", "link.intra", "link.inter", "latency.inter")


def _unknown(key: str, known: Iterable[str]) -> InputError:
    known = list(known)
    return InputError(f"there is no setting {key!r}{did_you_mean(key, known)}; known are {', '.join(known)}")


def sensitivity(
    plan: ir.plan.Plan, *, model: Any = None, calibration: Calibration | None = None
) -> tuple[Sensitivity, ...]:
    """How the modelled step of the plan, left as it is, depends on each assumption; largest effect first.

    Worse is a tenth less of a bandwidth, rate or efficiency, and a tenth more of a time.

    Raises:
        InputError: as :func:`model_of`.
    """
    from cost_models.calibration import default_calibration

    base = calibration or default_calibration(plan.topology)
    program = program_of(plan, model)
    found = []
    for name, value, vary in _assumptions(plan.topology, base):
        steps = [_step(program, *vary(factor)) for factor in (1 - STEP, 1 + STEP)]
        found.append(Sensitivity(name, value, max(steps), min(steps)))
    return tuple(sorted(found, key=lambda s: s.better - s.worse))


def _step(program: Program, topology: Topology, calibration: Calibration) -> float:
    from passes.step import StepTimeline

    made = StepTimeline(calibration).run(replace(program, topology=topology))
    assert made.timeline is not None
    return made.timeline.step


Vary = Callable[[float], tuple[Topology, "Calibration"]]


def _assumptions(topology: Topology, base: Calibration) -> Iterable[tuple[str, str, Vary]]:
    from ir.units import format_bandwidth

    def constant(name: str) -> Vary:
        return lambda factor: (topology, replace(base, **{name: getattr(base, name) * factor}))

    def link(index: int) -> Vary:
        level = topology.levels[index]

        def scaled(factor: float) -> tuple[Topology, Calibration]:
            other = replace(level, link=replace(level.link, bandwidth=level.link.bandwidth * factor))
            levels = (*topology.levels[:index], other, *topology.levels[index + 1 :])
            return replace(topology, levels=levels), base

        return scaled

    def memory(factor: float) -> tuple[Topology, Calibration]:
        first, *rest = topology.device.tiers
        scaled = replace(
            first,
            read_bandwidth=first.read_bandwidth * factor,
            write_bandwidth=first.write_bandwidth * factor,
        )
        return replace(topology, device=replace(topology.device, tiers=(scaled, *rest))), base

    for index, level in enumerate(topology.levels):
        yield f"link.{level.name}", format_bandwidth(level.link.bandwidth), link(index)
    tier = topology.device.tiers[0]
    yield f"bandwidth.{tier.name}", format_bandwidth(tier.read_bandwidth), memory
    for field in fields(base):
        value = getattr(base, field.name)
        if isinstance(value, float) and value:
            yield field.name, f"{value:g}", constant(field.name)
