"""Pooled embeddings of real batches: what interaction strengths and compression losses are measured on."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ir.errors import InputError
from ir.reading import clipped
from ir.towers import Strength

Floats = npt.NDArray[np.float64]
_ROUNDING = 1e-6  # of fp32 vectors: what is left of a constant one after its mean is taken from it
MAX_BYTES = 2**30  # of a sample file when unpacked: 16,000 samples of 856 tables of 16 columns


@dataclass(frozen=True, slots=True, eq=False)
class PooledSample:
    """Feature vectors of some samples, side by side.

    Attributes:
        features: names.
        dims: columns of each.
        pooled: (samples, sum of ``dims``), fp32.
    """

    features: tuple[str, ...]
    dims: tuple[int, ...]
    pooled: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        if len(set(self.features)) != len(self.features) or len(self.dims) != len(self.features):
            raise InputError("a pooled sample needs one dim for each feature, and every feature once")
        if self.pooled.ndim != 2 or self.pooled.shape[1] != sum(self.dims) or len(self.pooled) < 2:
            raise InputError(
                f"a pooled sample of shape {self.pooled.shape} does not fit features of {sum(self.dims)} columns "
                "and two samples or more"
            )
        if not np.isfinite(self.pooled).all():
            raise InputError("a pooled sample holds a value that is not finite; train with a smaller rate")

    def of(self, features: Sequence[str]) -> Floats:
        """(samples, columns of ``features``) in their order; raises InputError for one that is missing."""
        ends = np.cumsum(self.dims)
        place = {
            name: (end - dim, end) for name, dim, end in zip(self.features, self.dims, ends, strict=True)
        }
        for name in features:
            if name not in place:
                raise InputError(f"the pooled sample lacks feature {name!r}; measure it on this model")
        parts = [self.pooled[:, place[name][0] : place[name][1]] for name in features]
        return np.concatenate(parts, axis=1).astype(np.float64)

    def strengths(self, features: Sequence[str], kind: Strength = "centred") -> Floats:
        """Interaction strengths |mean over samples of cos(e_i, e_j)|, (n, n) with a zero diagonal.

        "centred" takes from each feature its mean vector first: what never changes tells nothing of interaction,
        and between tables of a few rows, whose random start training hardly moves, it is chance that would
        outweigh what they learnt. A sample in which a vector is zero (an empty bag) counts as no interaction.
        Vectors of different widths are padded with zeros. Source: the partitioner of arXiv 2403.00877.
        """
        place = dict(zip(self.features, self.dims, strict=True))
        width = max((place.get(name, 0) for name in features), default=0)
        unit = np.zeros((len(self.pooled), len(features), width))
        for index, name in enumerate(features):
            vectors = self.of([name])
            if kind == "centred":
                present = vectors.any(axis=1, keepdims=True)
                vectors = np.where(present, vectors - vectors.sum(0) / max(1, present.sum()), 0.0)
                vectors[np.abs(vectors).max(1) <= _ROUNDING * np.abs(self.of([name])).max(1)] = 0.0
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            unit[:, index, : vectors.shape[1]] = vectors / np.where(norms > 0, norms, 1.0)
        flat = unit.transpose(1, 0, 2).reshape(len(features), -1)
        strengths: Floats = np.abs(flat @ flat.T / len(self.pooled))
        np.fill_diagonal(strengths, 0.0)
        return np.minimum(strengths, 1.0)

    @property
    def digest(self) -> str:
        """Content digest, for the plan."""
        found = hashlib.sha256(repr((self.features, self.dims)).encode())
        found.update(np.ascontiguousarray(self.pooled, dtype="<f4").tobytes())
        return f"sha256:{found.hexdigest()}"

    def save(self, path: str | Path) -> None:
        """Write an uncompressed ``.npz``; raises InputError when it cannot be written."""
        try:
            with open(path, "wb") as file:
                np.savez(file, features=np.array(self.features), dims=np.array(self.dims), pooled=self.pooled)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: str | Path) -> PooledSample:
        """Read what :meth:`save` wrote; raises InputError."""
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_BYTES:
                raise InputError(f"{path} unpacks to more than {MAX_BYTES} bytes; sample fewer batches")
            with np.load(path, allow_pickle=False) as data:
                features, dims, pooled = (data[key] for key in ("features", "dims", "pooled"))
        except FileNotFoundError:
            raise InputError(f"pooled sample {path} does not exist; check the path") from None
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            MemoryError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            # MemoryError: an array's header claims more than there is
            raise InputError(
                f"{path} is no pooled sample: {clipped(str(error))}; write one with PooledSample.save"
            ) from None
        if features.ndim != 1 or features.dtype.kind != "U" or dims.ndim != 1 or dims.dtype.kind not in "iu":
            raise InputError(f"{path} is no pooled sample: it lacks names and widths of features")
        if pooled.dtype.kind != "f" or (dims < 1).any():
            raise InputError(f"{path} is no pooled sample: its vectors are no floats or have no columns")
        return cls(tuple(map(str, features)), tuple(map(int, dims)), np.asarray(pooled, dtype=np.float32))
