"""Names in constraints: each must be of the model, and a glob that matches nothing is said.

A key of a mapping of rules is a glob; without ``*``, ``?`` and ``[`` it is one name. A rule for a name that the model
lacks would limit nothing, silently.

============================  =====================================================
constraint                    names
============================  =====================================================
``tables``                    tables
``tiers.tables``              tables
``compression.format_error``  tables
``formats.rules``, ``groups`` tensors: a table, ``TABLE.state``, ``OP.weight``,
                              ``OP.input``, ``OP.kv``, ``traffic.forward`` and
                              ``traffic.backward``
``dedup.keep``                features
``growth.exclude``            modules
============================  =====================================================
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ir.constraints import Constraints
from ir.errors import InputError, did_you_mean
from ir.program import Model


@dataclass(frozen=True, slots=True)
class _Use:
    """Patterns of one constraint and the names that they may match."""

    where: str
    kind: str
    patterns: tuple[str, ...]
    known: Sequence[str]


def check_names(constraints: Constraints, model: Model) -> tuple[str, ...]:
    """Warnings for globs that match nothing.

    Raises:
        InputError: a name that the model does not have.
    """
    notes = []
    for use in _uses(constraints, model):
        notes += [note for pattern in use.patterns if (note := _unmatched(use, pattern))]
    return tuple(notes)


def _uses(constraints: Constraints, model: Model) -> Iterable[_Use]:
    tables = [table.name for table in model.tables]
    yield _Use("tables", "table", tuple(constraints.tables), tables)
    if constraints.tiers is not None:
        yield _Use("tiers.tables", "table", tuple(constraints.tiers.tables or ()), tables)
    if constraints.compression is not None:
        yield _Use("compression.format_error", "table", tuple(constraints.compression.format_error), tables)
    if constraints.formats is not None:
        groups = tuple(pattern for group in constraints.formats.groups for pattern in group)
        tensors = _tensors(model)
        yield _Use("formats.rules", "tensor", tuple(constraints.formats.rules), tensors)
        yield _Use("formats.groups", "tensor", groups, tensors)
    if constraints.dedup is not None:
        features = [feature for table in model.tables for feature in table.features]
        yield _Use("dedup.keep", "feature", constraints.dedup.keep, features)
    if constraints.growth is not None:
        modules = list(dict.fromkeys(op.module for op in model.ops if op.module))
        yield _Use("growth.exclude", "module", constraints.growth.exclude, modules)


def _tensors(model: Model) -> list[str]:
    """What :mod:`passes.formats` may give a format, in training or inference."""
    names = [name for table in model.tables for name in (table.name, f"{table.name}.state")]
    for op in model.ops:
        if op.gemm is not None:
            names += [f"{op.name}.weight", f"{op.name}.input"]
        if op.kind == "attention":
            names.append(f"{op.name}.kv")
    return [*names, "traffic.forward", "traffic.backward"]


def _unmatched(use: _Use, pattern: str) -> str:
    """The warning for a glob that matches nothing; empty where something matches."""
    if pattern in use.known and not any(c in pattern for c in "*?["):
        return ""
    if any(fnmatch.fnmatchcase(name, pattern) for name in use.known):
        return ""
    if not any(c in pattern for c in "*?["):
        raise InputError(
            f"constraints.{use.where} names {pattern!r}, and the model has no such {use.kind}"
            f"{did_you_mean(pattern, use.known)}"
        )
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in pattern)
    meant = f"; for the {use.kind} of that name write {escaped!r}" if pattern in use.known else ""
    return f"constraints.{use.where}: {pattern!r} matches no {use.kind} of the model, so it limits nothing{meant}"
