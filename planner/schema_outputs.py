"""What each command prints with ``--json``: one record a command, from which its JSON schema is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from ir.format_plan import Sensitivity
from ir.parallelism import Parallelism
from ir.plan import Plan, TablePlan
from ir.reading import STRICT
from ir.serving import Serving
from ir.topology import Topology
from planner.report_pareto import BudgetPoint
from planner.why_not_answer import WhyNot


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """Any command that fails; the exit code is 2 (unusable input) or 3 (infeasible)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    error: str
    exit_code: int
    conflict: list[str] = field(default_factory=list)
    relaxation: str = ""


@dataclass(frozen=True, slots=True)
class ExplainedTable:
    """A table in ``explain PLAN``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    option: str
    reason: str
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class ExplainedCertificate:
    """``ir.plan.Certificate`` and its gap."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    objective_name: str
    objective: float
    lower_bound: float
    status: Literal["optimal", "feasible"]
    bound_method: str
    gap: float


@dataclass(frozen=True, slots=True)
class ExplainedPlan:
    """``explain PLAN``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    certificate: ExplainedCertificate
    step_seconds: float
    tables: dict[str, ExplainedTable]
    parallelism: Parallelism | None = None
    serving: Serving | None = None


@dataclass(frozen=True, slots=True)
class ExplainedRank:
    """``explain PLAN --rank N``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rank: int
    limit: int
    used: dict[str, int]
    tables: list[str]


@dataclass(frozen=True, slots=True)
class ChangedTable:
    """A table in ``diff``; an empty side: the plan lacks it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    table: str
    before: str
    after: str
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class DiffAnswer:
    """``diff``; pairs are before and after."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    same: bool
    step_seconds: tuple[float, float]
    objective_seconds: tuple[float, float]
    gap: tuple[float, float]
    samples_per_second: tuple[float, float]
    peak_memory_bytes: tuple[int, int]
    topology: tuple[str, str]
    parallelism: tuple[str, str]
    inputs: dict[str, tuple[str, str]]
    phase_seconds: dict[str, tuple[float, float]]
    memory_bytes: dict[str, tuple[int, int]]
    sections: dict[str, str]
    unchanged_tables: int
    moved_bytes: int
    move_seconds: float
    break_even_steps: float | None
    changed_tables: list[ChangedTable]


@dataclass(frozen=True, slots=True)
class WhatIfAnswer(DiffAnswer):
    """``whatif --set``: ``start`` is the plan that the search began with, or ``anew`` why it did not; the other is empty."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    start: str
    anew: str


@dataclass(frozen=True, slots=True)
class AssumptionRow:
    """Seconds when an assumption is a tenth worse or better, and which: a key of the answer's ``seconds``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    value: str
    worse: float
    better: float
    of: str


@dataclass(frozen=True, slots=True)
class SensitivityAnswer:
    """``whatif`` without ``--set``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    seconds: dict[str, float]
    sensitivity: list[AssumptionRow]


@dataclass(frozen=True, slots=True)
class VerifyAnswer:
    """``verify``: the faults that each check found."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    ok: bool
    checks: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class EmitAnswer:
    """``emit``: the file's text unless it was written to a path, what to run, and what it cannot say."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    target: str
    path: str | None
    text: str | None
    use: str
    limits: list[str]


@dataclass(frozen=True, slots=True)
class ReportAnswer:
    """``report``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    report: str
    bytes: int
    pareto: list[BudgetPoint]


@dataclass(frozen=True, slots=True)
class TraceAnswer:
    """``trace``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    trace: str
    events: int


@dataclass(frozen=True, slots=True)
class ReplanCandidate:
    """One way to go on; ``total_seconds``: the horizon's steps and the move."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    candidate: str
    step_seconds: float
    moved_bytes: int
    move_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class ReplanAnswer:
    """``replan``: candidates, the chosen one first, and the digest of its plan."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    horizon: int
    candidates: list[ReplanCandidate]
    digest: str


@dataclass(frozen=True, slots=True)
class CalibrateAnswer:
    """``calibrate``: what was written to the two files."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    topology: Topology
    calibration: dict[str, Any]  # cost_models.calibration.Calibration


@dataclass(frozen=True, slots=True)
class FormatRow:
    """A number format."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    id: str
    element: str
    shares_scale: str
    scale: str | None
    scale_mode: str | None
    rounding: str
    non_finite: str | None
    bits_per_element: float
    qsnr_normal_db: float | None
    lossless: bool
    qsnr_bound_db: float | None
    kernels: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class FormatsAnswer:
    """``formats``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    row_length: int
    formats: list[FormatRow]


@dataclass(frozen=True, slots=True)
class LowPrecisionAnswer:
    """``sensitivity --low-precision``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    formats: dict[str, str]
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """``completion``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    shell: str
    script: str


def _runs() -> dict[str, Any]:
    """``run``: a recommender's result or a decoder's, each with what follows from its fields."""
    from codegen.llm import DecoderRun
    from codegen.runtime.compare import RunResult

    schema = TypeAdapter(RunResult | DecoderRun).json_schema()
    number, truth = {"type": "number"}, {"type": "boolean"}
    for name, reference in (("RunResult", "median_unsharded_step"), ("DecoderRun", "median_reference_step")):
        record = schema["$defs"][name]
        record["properties"] |= {
            **{"equal": truth, "median_step": number, "predicted_step": number},
            reference: number,
        }
        record["additionalProperties"] = False
    schema["$defs"]["RunResult"]["properties"]["accepted"] = truth
    return schema


def _scale() -> dict[str, Any]:
    """``scale``: the advice, the label of the best size, and the price of each where one was given."""
    from planner.scale import Advice

    schema = TypeAdapter(Advice).json_schema()
    schema["properties"]["best"] = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    return schema


def _doctor() -> dict[str, Any]:
    from planner.doctor import Diagnosis

    return TypeAdapter(Diagnosis).json_schema()


# command -> the type of its answer, or what makes its schema
OUTPUTS: dict[str, Any] = {
    "compile": Plan,
    "explain": ExplainedPlan | TablePlan | ExplainedRank | WhyNot,
    "diff": DiffAnswer,
    "verify": VerifyAnswer,
    "run": _runs,
    "emit": EmitAnswer,
    "report": ReportAnswer,
    "trace": TraceAnswer,
    "whatif": WhatIfAnswer | SensitivityAnswer,
    "replan": ReplanAnswer,
    "models": dict[str, str],
    "topologies": dict[str, str] | Topology,
    "calibrate": CalibrateAnswer,
    "formats": FormatsAnswer,
    "scale": _scale,
    "sensitivity": Sensitivity | LowPrecisionAnswer,
    "doctor": _doctor,
    "schema": dict[str, Any],
    "completion": CompletionAnswer,
    "error": ErrorAnswer,
}


def output_schema(command: str) -> dict[str, Any]:
    """The JSON schema of what a command prints with ``--json``; raises KeyError for an unknown one."""
    kind = OUTPUTS[command]
    if kind in (_runs, _scale, _doctor):
        made: dict[str, Any] = kind()
        return made
    return TypeAdapter(kind).json_schema()
