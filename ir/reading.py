"""Validated reading of records from JSON or YAML data, with errors that name the key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ir.errors import InputError

# A file larger than this is not something a person wrote; refuse before parsing it.
MAX_FILE_BYTES = 256 * 2**20

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Put on records that are read from files: unknown keys, NaN and infinities are errors."""

Record = TypeVar("Record")

_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def adapter(cls: type[Record]) -> TypeAdapter[Record]:
    """The (cached) pydantic adapter of a dataclass."""
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def parse_record(cls: type[Record], data: object, what: str) -> Record:
    """``data`` as a ``cls``; raises InputError that lists each bad key with its path."""
    try:
        return adapter(cls).validate_python(data)
    except ValidationError as error:
        raise InputError(f"{what}: {_explain(error)}") from None


def dump_record(record: object) -> dict[str, Any]:
    """A record as plain JSON data; the inverse of :func:`parse_record`."""
    data = adapter(type(record)).dump_python(record, mode="json")
    assert isinstance(data, dict)
    return data


def _explain(error: ValidationError) -> str:
    faults = []
    for fault in error.errors(include_url=False)[:5]:
        path = ".".join(str(part) for part in fault["loc"]) or "top level"
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            message = "unknown key; remove it or correct its spelling"
        elif fault["type"] == "missing":
            message = "missing; add it"
        else:
            message = fault["msg"].removeprefix("Value error, ")
        faults.append(f"{path}: {message}")
    more = len(error.errors()) - len(faults)
    return "; ".join(faults) + (f"; and {more} more" if more > 0 else "")


def read_text(path: str | Path, what: str) -> str:
    """The text of a file; raises InputError when it is missing, too large or not UTF-8."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(
                f"{what} {path} is larger than {MAX_FILE_BYTES} bytes; this is not a file for people"
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{what} {path} is a folder; name a file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from None


def read_json(path: str | Path, what: str) -> Any:
    """Parsed JSON of a file; raises InputError with line and column on bad syntax."""
    return loads_json(read_text(path, what), f"{what} {path}")


def loads_json(text: str, what: str) -> Any:
    """Parsed strict JSON (no NaN, no duplicate keys); raises InputError."""

    def refuse_constant(name: str) -> None:
        raise InputError(f"{what} holds {name}, which is not a finite number; replace it")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{what} has the key {twice!r} twice in one object; remove one")
        return data

    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise InputError(f"{what} is nested too deeply to be read") from None


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
