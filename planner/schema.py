"""The published JSON schemas of the files that people exchange."""

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


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a file; raises InputError for an unknown name.

    A plan file also holds ``digest``, the sha256 of the rest in canonical form.
    """
    if name not in RECORDS:
        raise InputError(
            f"there is no schema {name!r}{did_you_mean(name, RECORDS)}; choose one of {', '.join(RECORDS)}"
        )
    schema = adapter(RECORDS[name]).json_schema()
    if name == "plan":
        schema["properties"]["digest"] = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"format version {FORMAT_VERSION}",
        **schema,
    }
