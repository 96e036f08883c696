"""``plan = planner.compile(model, topology)``: a sharding and quantization planner for PyTorch.

Everything public is here; the other four packages are the planner's own rooms. Importing this module
imports neither torch nor OR-Tools: they are loaded when a model is captured or a problem is solved.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from planner._siblings import check_siblings

check_siblings()

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "compile": "planner.api",
    "topology": "planner.api",
    "Plan": "planner.plan",
    "Topology": "ir.topology",
    "Workload": "ir.workload",
    "FeatureStats": "ir.workload",
    "Constraints": "ir.constraints",
    "TableConstraint": "ir.constraints",
    "Calibration": "cost_models.calibration",
    "PlannerError": "ir.errors",
    "InputError": "ir.errors",
    "TraceError": "ir.errors",
    "InfeasibleError": "ir.errors",
    "IRError": "ir.errors",
    "icdf_from_zipf": "ir.workload",
    "sessions_from_batches": "ir.session_stats",
    "replan": "planner.replanning",
    "whatif": "planner.what_if",
    "verify": "planner.verification",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from cost_models.calibration import Calibration
    from ir.constraints import Constraints, TableConstraint
    from ir.errors import InfeasibleError, InputError, IRError, PlannerError, TraceError
    from ir.session_stats import sessions_from_batches
    from ir.topology import Topology
    from ir.workload import FeatureStats, Workload, icdf_from_zipf
    from planner.api import compile, topology
    from planner.plan import Plan
    from planner.replanning import replan
    from planner.verification import verify
    from planner.what_if import whatif


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
