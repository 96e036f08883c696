"""Reading a ``torch.distributed.checkpoint`` folder without running what is in it.

Its ``.metadata`` file is a pickle, and torch's reader unpickles whatever it names; an entry stored as bytes
is unpickled as well. Here the pickle may name the records that torch writes and nothing else, every entry must
be a tensor, and a file name must lie in the folder.
"""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from ir.errors import InputError

MAX_METADATA_BYTES = 256 * 2**20  # some hundred bytes a shard

_KNOWN: dict[tuple[str, str], Any] = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in metadata.__all__},
    (metadata.__name__, "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib", "WindowsPath"): pathlib.PureWindowsPath,
    # newer Python writes paths under this name
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}


class _Unpickler(pickle.Unpickler):
    """Makes the records of a checkpoint's index; refuses any other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise InputError(f"it names {module}.{name}, which no checkpoint needs")


def read_index(file: BinaryIO, what: str) -> Metadata:
    """The index of a checkpoint; raises InputError when it is damaged or is not one."""
    data = file.read(MAX_METADATA_BYTES + 1)
    if len(data) > MAX_METADATA_BYTES:
        raise InputError(f"{what} is larger than {MAX_METADATA_BYTES} bytes; it is no checkpoint's index")
    try:
        _check_memo(data)
        found = _Unpickler(io.BytesIO(data)).load()
    except InputError as error:
        raise InputError(f"{what} is not read: {error}") from None
    except Exception as error:  # a damaged pickle raises anything, from IndexError to UnicodeDecodeError
        raise InputError(f"{what} is damaged ({type(error).__name__}); take an earlier checkpoint") from None
    if not isinstance(found, Metadata) or not _sound(found):
        raise InputError(f"{what} does not list the tensors of a checkpoint; it was edited or damaged")
    return found


def _check_memo(data: bytes) -> None:
    """Refuse a memo place beyond what the bytes could fill: the unpickler makes room for all places below it."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise InputError(f"place {argument} of its memo is beyond its end")


def _sound(found: Metadata) -> bool:
    """Tensors alone, each chunk in a file of the folder."""
    # a damaged name of a field leaves the record without it
    entries, places = getattr(found, "state_dict_metadata", None), getattr(found, "storage_data", None)
    if not isinstance(entries, dict) or not isinstance(places, dict):
        return False
    if not all(isinstance(entry, TensorStorageMetadata) for entry in entries.values()):
        return False
    return all(
        isinstance(place, filesystem._StorageInfo)
        and isinstance(path := getattr(place, "relative_path", None), str)
        and PurePath(path).name == path
        and not getattr(place, "transform_descriptors", "missing")
        for place in places.values()
    )


class TensorReader(FileSystemReader):
    """torch's reader of a folder, with the index read by :func:`read_index`.

    Args:
        path: the folder.
        grown: tensor -> rows that it has gained since it was saved: no file has them, so they are left as they are.
    """

    def __init__(self, path: str | PurePath, grown: Mapping[str, int] | None = None) -> None:
        super().__init__(str(path))
        self.grown = dict(grown or {})

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            found = read_index(cast(BinaryIO, file), f"the checkpoint index {path}")
        if not isinstance(found.storage_meta, StorageMeta):
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        for key, rows in self.grown.items():
            entry = found.state_dict_metadata.get(key)
            if isinstance(entry, TensorStorageMetadata) and entry.size:  # a missing one is reported by torch
                entry.size = torch.Size((entry.size[0] + rows, *entry.size[1:]))
        return found
