"""Validated reading of records from JSON or YAML data, with errors that name the key."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ir.errors import InputError

# A file larger than this is not something a person wrote; refuse before parsing it.
MAX_FILE_BYTES = 256 * 2**20
MAX_NESTING = 100  # the deepest record of a plan has 8 levels
MAX_DIGITS = 20  # of a whole number with its sign; 2**63 has 19
MAX_SHOWN = 300  # characters of a user's text repeated in a message

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Put on records that are read from files: unknown keys, NaN and infinities are errors."""

Record = TypeVar("Record")

_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}
_FIELDS: dict[Any, dict[str, TypeAdapter[Any]]] = {}
_FINITE = ConfigDict(allow_inf_nan=False)


def adapter(cls: type[Record]) -> TypeAdapter[Record]:
    """The (cached) pydantic adapter of a dataclass."""
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def clipped(text: str) -> str:
    """``text`` for a message: long ones lose their end."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def parse_record(cls: type[Record], data: object, what: str) -> Record:
    """``data`` as a ``cls``; raises InputError that lists each bad key with its path."""
    try:
        return adapter(cls).validate_python(data)
    except ValidationError as error:
        raise InputError(f"{what}: {_explain(error)}") from None
    except RecursionError:
        raise InputError(f"{what} is nested too deeply to be read") from None


def check_fields(record: object) -> None:
    """Hold a record made in Python to what is read from files: each field is parsed as there, in place.

    For ``__post_init__``. Records inside it have checked themselves.

    Raises:
        InputError: names the record and the field.
    """
    cls = type(record)
    if cls not in _FIELDS:
        hints = get_type_hints(cls, include_extras=True)
        _FIELDS[cls] = {
            entry.name: TypeAdapter(
                hints[entry.name], config=None if is_dataclass(hints[entry.name]) else _FINITE
            )
            for entry in fields(record)  # type: ignore[arg-type]
        }
    for name, one in _FIELDS[cls].items():
        try:
            object.__setattr__(record, name, one.validate_python(getattr(record, name)))
        except ValidationError as error:
            called = getattr(record, "name", "")
            which = (
                f"{cls.__name__} {clipped(called)!r}" if isinstance(called, str) and called else cls.__name__
            )
            raise InputError(f"{which}: {name}: {_explain(error).removeprefix('top level: ')}") from None


def dump_record(record: object, *, defaults: bool = True) -> dict[str, Any]:
    """A record as plain JSON data; the inverse of :func:`parse_record`.

    Without ``defaults``, fields at any depth that have their default value are left out.
    """
    data = adapter(type(record)).dump_python(record, mode="json", exclude_defaults=not defaults)
    assert isinstance(data, dict)
    return data


def _explain(error: ValidationError) -> str:
    faults = []
    found = error.errors(include_url=False, include_input=False)
    around = {fault["loc"][:depth] for fault in found for depth in range(1, len(fault["loc"]))}
    # a list is also called too short where its items were refused
    found = [fault for fault in found if fault["type"] != "too_short" or fault["loc"] not in around]
    for fault in found[:5]:
        path = clipped(".".join(str(part) for part in fault["loc"])) or "top level"
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            message = "unknown key; remove it or correct its spelling"
        elif fault["type"] == "missing":
            message = "missing; add it"
        elif fault["type"] == "too_short":
            message = f"too few items; list at least {fault['ctx']['min_length']}"
        else:
            message = clipped(fault["msg"].removeprefix("Value error, "))
        faults.append(f"{path}: {message}")
    more = len(found) - len(faults)
    return "; ".join(faults) + (f"; and {more} more" if more > 0 else "")


def read_text(path: str | Path, what: str) -> str:
    """The text of a file; raises InputError when it is missing, too large or not UTF-8."""
    try:
        with open(
            path, "rb"
        ) as file:  # reads no more than the limit, also of pipes and devices without a size
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InputError(
                f"{what} {path} is larger than {MAX_FILE_BYTES} bytes; this is not a file for people"
            )
        return data.decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{what} {path} is a folder; name a file in it") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a NUL in it
        raise InputError(f"{what} {clipped(str(path))!r} cannot be read: {clipped(str(error))}") from None


def read_json(path: str | Path, what: str) -> Any:
    """Parsed JSON of a file; raises InputError with line and column on bad syntax."""
    return loads_json(read_text(path, what), f"{what} {path}")


def loads_json(text: str, what: str) -> Any:
    """Parsed strict JSON (finite numbers, no duplicate keys, bounded nesting); raises InputError."""
    try:
        data = json.loads(
            text,
            parse_constant=lambda name: _refuse(f"{name}, which is not a finite number; replace it"),
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_unique,
        )
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except _Refused as error:
        raise InputError(f"{what} {error}") from None
    except RecursionError:
        raise InputError(f"{what} is nested too deeply to be read") from None
    if not _shallow(data):
        raise InputError(f"{what} is nested too deeply to be read")
    if "\\ud" in text or "\\uD" in text:  # halves of a character come from escapes alone
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{what} holds half of a character (\\ud800 to \\udfff); replace it") from None
    return data


class _Refused(Exception):
    """A value of a JSON text that is not read; says what it holds."""


def _refuse(held: str) -> None:
    raise _Refused(f"holds {held}")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        _refuse(f"{clipped(digits)}, which is too large for a number; replace it")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS or abs(int(digits)) >= 2**63:
        _refuse(f"{clipped(digits)}, which is no count; numbers end at 2**63")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        twice = next(name for name, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Refused(f"has the key {clipped(twice)!r} twice in one object; remove one")
    return data


def _shallow(data: object) -> bool:
    """At most :data:`MAX_NESTING` levels, so that nothing later runs out of stack."""
    level = [data]
    for _ in range(MAX_NESTING):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return True
    return False


def canonical_json(data: object) -> str:
    """The one text of ``data``: sorted keys, no spaces, no NaN; digests are taken over it."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest(data: object) -> str:
    """sha256 over :func:`canonical_json`, as ``"sha256:<hex>"``."""
    return "sha256:" + hashlib.sha256(canonical_json(data).encode()).hexdigest()


def as_mapping(data: object, what: str) -> Mapping[str, Any]:
    """``data`` if it is a mapping with text keys; raises InputError otherwise."""
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise InputError(f"{what} must be a mapping of keys to values, not {type(data).__name__}")
    return data
