"""The front door: :func:`compile`."""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ir.plan
from ir.constraints import Constraints
from ir.errors import InputError
from ir.llm import DecoderModel
from ir.plan import ModelSummary
from ir.program import Mode, Model, Objective, Options, Program
from ir.reading import read_text
from ir.topology import Topology
from ir.workload import Workload
from ir.yaml_reading import loads_yaml
from planner.constraint_names import check_names
from planner.decoders import decoder_inputs, decoder_pipeline, refuse_tensor_constraints
from planner.plan import Plan
from planner.serving import serving_inputs, serving_pipeline

if TYPE_CHECKING:
    from torch import nn

    from cost_models.calibration import Calibration
    from passes.base import Pass
    from passes.pipeline import Observer
    from planner.zoo import ZooModel


def topology(name: str | Path | Topology) -> Topology:
    """A topology from a preset name (``"h100-16x8"``) or a YAML file.

    Raises:
        InputError: neither a preset nor a readable file; or a file with a bad key.
    """
    if isinstance(name, Topology):
        return name
    text = str(name)
    if text.endswith((".yaml", ".yml")) or isinstance(name, Path):
        return Topology.from_dict(load_yaml(text, "topology"), f"topology {text}")
    from planner.presets import preset

    return preset(text)


def load_yaml(path: str | Path, what: str) -> Any:
    """Parsed YAML of a file, plain data only; raises InputError with the line of what is wrong."""
    return loads_yaml(read_text(path, what), f"{what} {path}")


def compile(
    model: nn.Module | Model | ZooModel | str,
    topology: Topology | str | Path,
    workload: Workload | None = None,
    *,
    mode: Mode = "train",
    constraints: Constraints | None = None,
    passes: Sequence[Pass] | None = None,
    calibration: Calibration | str | Path | None = None,
    time_limit: float = 30.0,
    seed: int = 0,
    objective: Objective = "phases",
    name: str | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    observers: Sequence[Observer] = (),
) -> Plan:
    """Plan how ``model`` is sharded over ``topology``.

    Args:
        model: an ``nn.Module`` (also on meta), an ``fx.GraphModule``, a captured
            :class:`ir.program.Model`, a zoo name or model, ``file.py:callable``, or a JSON table list.
        topology: a :class:`Topology`, a preset name or a YAML path.
        workload: what the model is fed; without one the model's own (zoo, table list) or the
            documented defaults of :mod:`ir.workload`, which the plan names.
        mode: "train" or "inference".
        constraints: what is pinned, forbidden or bounded; a name in them is of the model, and the plan warns of a glob
            that matches nothing (:mod:`planner.constraint_names`).
        passes: instead of :func:`passes.pipeline.pipeline`.
        calibration: constants of the cost models, or a file of ``planner calibrate``; default the file
            that lies beside the topology's, else the constants of the device kind.
        time_limit: limit on deterministic work of all searches together, about seconds; also a wall-clock safety net.
            Passes that search share it (:mod:`passes.search_share`); bounds, prices and a first placement come on top.
        seed: of the solver's search.
        objective: what sharding minimises: "phases", the embedding time of the modelled step, or
            "bottleneck", the slowest rank's total (see :mod:`passes.sharding`).
        name: of the model in the plan; default the zoo name or the class name.
        example_inputs: for modules whose inputs cannot be inferred.
        observers: called after each pass, see :mod:`passes.pipeline`.

    Raises:
        InputError: unusable input.
        TraceError: model code that cannot be captured.
        InfeasibleError: no plan under the limits.
    """
    from passes.pipeline import pipeline, run_pipeline

    if mode not in ("train", "inference"):
        raise InputError(f"mode must be 'train' or 'inference', not {mode!r}")
    if objective not in ("phases", "bottleneck"):
        raise InputError(f"objective must be 'phases' or 'bottleneck', not {objective!r}")
    if not (math.isfinite(time_limit) and time_limit > 0):
        raise InputError(f"time_limit must be a positive number of seconds, not {time_limit!r}")
    machine = _machine(topology)
    captured, own_workload = _capture(model, name, example_inputs)
    notes: tuple[str, ...] = ()
    if isinstance(captured, DecoderModel):
        refuse_tensor_constraints(constraints or Constraints())
        inputs = decoder_inputs if mode == "train" else serving_inputs
        captured, work = inputs(captured, workload, own_workload, mode)
    else:
        work, notes = _workload(workload, own_workload, captured, machine)
    notes += check_names(constraints or Constraints(), captured) + _plain_tables(captured)
    program = Program(
        model=captured,
        topology=machine,
        workload=work,
        options=Options(mode, constraints or Constraints(), time_limit, seed, objective),
        warnings=notes,
    )
    if passes is None:
        served = serving_pipeline if mode == "inference" else decoder_pipeline
        stages = served if isinstance(captured, DecoderModel) else pipeline
        passes = stages(_calibration(calibration, topology))
    if program.options.constraints.towers is not None:
        from planner.towers import price_over_arch

        passes = price_over_arch(passes, getattr(model, "module", model))
    program, _ = run_pipeline(program, passes, observers)
    return _plan(program, str(model) if isinstance(model, (str, Path)) else "")


# `topology` is an argument of compile(), where it hides the function
_machine = topology


def _calibration(
    given: Calibration | str | Path | None, topology: Topology | str | Path
) -> Calibration | None:
    """The constants to price with; None for the defaults of the device kind."""
    from planner.calibrate import calibration_path, load_calibration

    if isinstance(given, (str, Path)):
        return load_calibration(given)
    if given is None and str(topology).endswith((".yaml", ".yml")) and not isinstance(topology, Topology):
        beside = calibration_path(topology)
        return load_calibration(beside) if beside.exists() else None
    return given


def _capture(
    model: Any, name: str | None, example_inputs: tuple[Any, ...] | None
) -> tuple[Model, Workload | None]:
    if isinstance(model, Model):
        return (replace(model, name=name) if name else model), None
    if isinstance(model, (str, Path)):
        from planner.models import resolve

        resolved = resolve(str(model))
        return (replace(resolved.model, name=name) if name else resolved.model), resolved.workload
    from ir.capture_llm import capture_model
    from planner.zoo import ZooModel

    if isinstance(model, ZooModel):
        return capture_model(model.module, name=name or model.name), model.workload
    return capture_model(model, name=name, example_inputs=example_inputs), None


def _workload(
    given: Workload | None, own: Workload | None, model: Model, machine: Topology
) -> tuple[Workload, tuple[str, ...]]:
    """The workload in force, and what the user should know about it."""
    world = machine.world_size
    if given is None:
        chosen = own or Workload()
        # the default batch is nobody's wish, so it bends to the world size
        batch = -(-chosen.global_batch // world) * world
        said = () if own else ("no workload given: one id a sample and feature, uniform access",)
        return replace(chosen, global_batch=batch), said
    if given.global_batch % world:
        near = max(1, (given.global_batch + world // 2) // world) * world
        raise InputError(
            f"global_batch {given.global_batch} does not divide over {world} ranks; use {near} or another multiple"
        )
    features = {feature for table in model.tables for feature in table.features}
    unknown = sorted(set(given.features) - features)
    missing = sorted(features - set(given.features))
    notes: list[str] = []
    if unknown:
        notes.append(
            f"the workload has {len(unknown)} features that no table looks up, such as {unknown[0]!r}"
        )
    if missing and given.features:
        notes.append(
            f"the workload lacks {len(missing)} features, such as {missing[0]!r}: one id a sample assumed"
        )
    return given, tuple(notes)


def _plain_tables(model: Model) -> tuple[str, ...]:
    """Said of a model whose tables lie outside TorchRec's collections: it can be planned, not yet run."""
    plain = [
        table.name
        for table in model.tables
        if table.parameter
        and not any(
            table.parameter.endswith(f"{attribute}.{table.name}.weight")
            for attribute in ("embedding_bags", "embeddings")
        )
    ]
    if not plain:
        return ()
    return (
        f"{len(plain)} {'table is' if len(plain) == 1 else 'tables are'} in no TorchRec collection, such as {plain[0]!r}: "
        "to run the plan, put nn.EmbeddingBag and nn.Embedding into an EmbeddingBagCollection or EmbeddingCollection",
    )


@functools.cache  # reading a distribution's metadata takes milliseconds
def _installed(package: str) -> str:
    return importlib.metadata.version(package)


def versions() -> dict[str, str]:
    """What a plan's bytes depend on besides its inputs."""
    from planner import __version__

    return {"planner": __version__, **{package: _installed(package) for package in ("ortools", "numpy")}}


def _plan(program: Program, source: str) -> Plan:
    tables, certificate, memory, timeline = (
        program.tables,
        program.certificate,
        program.memory,
        program.timeline,
    )
    if tables is None or certificate is None or memory is None or timeline is None:
        raise InputError(
            "the passes given do not make a whole plan; keep sharding, memory and step among them"
        )
    model = program.model
    return Plan(
        model=ModelSummary(
            name=model.name,
            digest=model.digest,
            embedding_params=model.embedding_params,
            dense_params=model.dense_params,
            dense_flops=model.dense_flops,
        ),
        topology=program.topology,
        workload=program.workload,
        constraints=program.options.constraints,
        mode=program.options.mode,
        table_plans=tables,
        memory=memory,
        timeline=timeline,
        certificate=certificate,
        decisions=program.decisions,
        assumptions=program.assumptions,
        warnings=program.warnings,
        provenance={
            **{f"version.{package}": version for package, version in versions().items()},
            **({"model": source} if source else {}),
            "objective": program.options.objective,
            "seed": str(program.options.seed),
            "time_limit": repr(program.options.time_limit),
            "digest.model": model.digest,
            "digest.topology": program.topology.digest,
            "digest.workload": program.workload.digest,
        },
        format_version=ir.plan.FORMAT_VERSION,
    )
