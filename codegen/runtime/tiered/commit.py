"""What makes a table's state durable: a manifest, written once, and two commit records, written in turn.

A commit record says which place of every page is current; its end is the SHA-256 of the rest, so a record that
was being written when the process died is not taken for one. The whole record with the highest epoch is
the state of the table.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from codegen.runtime.tiered import native
from ir.errors import InputError
from ir.reading import as_mapping, read_json

MANIFEST = "table.json"
FORMAT = 1  # of the files; another number is refused
_MAGIC = b"SWTIERED"
_HEAD = struct.Struct("<8sQqQQ")  # magic, epoch, tag, optimizer steps, pages
_DIGEST = 32  # bytes of a SHA-256


@dataclass(frozen=True, slots=True)
class Commit:
    """The state of a table at a flush.

    Attributes:
        epoch: number of the flush.
        tag: what the caller gave, such as the step; -1 for none.
        steps: optimizer steps taken.
        places: (pages of all files,) current place of each page.
    """

    epoch: int
    tag: int
    steps: int
    places: npt.NDArray[np.uint8]


def _path(folder: Path, epoch: int) -> Path:
    return folder / f"commit.{epoch % 2}"


def write_commit(folder: Path, commit: Commit) -> None:
    """Replace the older of the two records; durable when this returns."""
    head = _HEAD.pack(_MAGIC, commit.epoch, commit.tag, commit.steps, len(commit.places))
    body = head + np.packbits(commit.places).tobytes()
    data = body + hashlib.sha256(body).digest()
    fd = os.open(_path(folder, commit.epoch), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        native.pwrite(fd, data, 0)
        native.fdatasync(fd)
    finally:
        os.close(fd)


def read_commit(folder: Path, pages: int) -> Commit:
    """The newest whole record; raises InputError when there is none."""
    found = [commit for turn in (0, 1) if (commit := _read(_path(folder, turn), pages)) is not None]
    if not found:
        raise InputError(
            f"{folder} has no whole commit record: the table was damaged; restore it from a copy"
        )
    return max(found, key=lambda commit: commit.epoch)


def _read(path: Path, pages: int) -> Commit | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    size = _HEAD.size + -(-pages // 8)
    body, digest = data[:size], data[size : size + _DIGEST]
    if len(digest) != _DIGEST or hashlib.sha256(body).digest() != digest:
        return None
    magic, epoch, tag, steps, count = _HEAD.unpack_from(body)
    if magic != _MAGIC or count != pages:
        return None
    places = np.unpackbits(np.frombuffer(body, np.uint8, offset=_HEAD.size), count=pages)
    return Commit(epoch, tag, steps, places)


def write_manifest(folder: Path, data: dict[str, Any]) -> None:
    """The last file of a new table: a folder without it holds none."""
    temporary = folder / f".{MANIFEST}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **data}, file, indent=1)
        file.flush()
        native.fdatasync(file.fileno())
    temporary.replace(folder / MANIFEST)
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)  # the names of the files
    finally:
        os.close(fd)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What :func:`write_manifest` wrote; raises InputError when the folder holds no table."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} holds no tiered table; create one there first")
    data = dict(as_mapping(read_json(path, "manifest"), str(path)))
    if data.pop("format", None) != FORMAT:
        raise InputError(f"{path} is of another format than {FORMAT}; create the table again")
    return data


def lock(folder: Path) -> IO[bytes]:
    """An exclusive hold on a table, let go of when the file is closed or the process ends."""
    file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(f"the table {folder} is in use by another process; close it there first") from None
    return file
