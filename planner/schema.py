"""The published JSON schemas: of the files that people exchange, and of what commands print with ``--json``."""

from __future__ import annotations

from typing import Any

from ir.constraints import Constraints
from ir.errors import InputError, did_you_mean
from ir.plan import FORMAT_VERSION, Plan
from ir.reading import adapter
from ir.topology import Topology
from ir.workload import Workload

RECORDS: dict[str, type[Any]] = {
    "plan": Plan,
    "topology": Topology,
    "workload": Workload,
    "constraints": Constraints,
}


DRAFT = "https://json-schema.org/draft/2020-12/schema"


def names() -> tuple[str, ...]:
    """Files, then commands."""
    from planner.schema_outputs import OUTPUTS

    return (*RECORDS, *OUTPUTS)


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a file or of a command's answer; raises InputError for an unknown name.

    A plan file also holds ``digest``, see :attr:`ir.plan.Plan.digest`. Besides the commands there is
    "error", what any of them prints when it fails.
    """
    from planner.schema_outputs import output_schema

    if name not in names():
        raise InputError(
            f"there is no schema {name!r}{did_you_mean(name, names())}; choose one of {', '.join(names())}"
        )
    if name in ("plan", "compile"):
        schema = adapter(Plan).json_schema()
        schema["properties"]["digest"] = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
    elif name in RECORDS:
        schema = adapter(RECORDS[name]).json_schema()
    else:
        schema = output_schema(name)
    return {"$schema": DRAFT, "$comment": f"format version {FORMAT_VERSION}", **schema}
