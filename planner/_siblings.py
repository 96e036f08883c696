"""A clear sentence when another package shadows one of the five."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_SIBLINGS = ("ir", "cost_models", "passes", "codegen")


def check_siblings() -> None:
    """Raise ImportError when ir, cost_models, passes or codegen is somebody else's package."""
    home = Path(__file__).resolve().parent.parent
    for name in _SIBLINGS:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != home:
            raise ImportError(
                f"the package {name!r} next to {home / 'planner'} is shadowed by {found or 'a folder'}; "
                f"rename that folder or run python with -P"
            )
