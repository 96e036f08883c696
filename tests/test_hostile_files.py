"""Files made to harm: bombs, claims of terabytes, code to run. Each is refused quickly within a bound of memory."""

from __future__ import annotations

import io
import json
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ir.tower_sample
from codegen.runtime.tiered.table import Range, TieredTable
from ir.errors import InputError, PlannerError
from ir.reading import loads_json
from ir.tower_sample import PooledSample
from ir.yaml_reading import loads_yaml

LAUGHS = "\n".join(
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)),
    ]
)
MERGES = "\n".join(
    ["m0: &m0 {k: v}", *(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 12))]
)
MANY = 200_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS + "\ncapacity: *a11", "anchor"),
        (MERGES, "anchor"),
        ("[" * 200_000, "nested too deeply"),
        ("- " * 200_000, "nested too deeply"),
        ("a: " + "9" * 100_000, "too large"),
        ("a: " + "1:" * 100_000 + "1", "too large"),
        ("a: 2001-13-45", "month"),
        ("a: 1\nb: 2\na: 3", "twice"),
        ("<<: {a: 1}", "merge"),
        ("!!python/object/apply:os.system ['true']", "tag"),
        ('a: "\\ud800"', "not YAML"),
        ("a: " + "x" * 3_000_000, "larger than"),
    ],
)
def test_yaml_that_grows_or_lies(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        loads_yaml(text, "file")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 150 + "1" + "}" * 150, "nested too deeply"),
        ('{"a": ' + "9" * 100_000 + "}", "no count"),
        ('{"a": 1e999}', "too large"),
        ('{"a": NaN}', "not a finite number"),
        ('{"a": -Infinity}', "not a finite number"),
        ('{"a": "\\ud800"}', "half of a character"),
        ("{" + "".join(f'"{n}": 0, ' for n in range(MANY)) + f'"{MANY - 1}": 1}}', "twice"),
    ],
)
def test_json_that_grows_or_lies(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        loads_json(text, "file")
    assert len(str(caught.value)) < 1000


CHILD = """
import resource, sys
from pathlib import Path
limit = 768 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from planner.api import load_yaml, topology
from planner.__main__ import main
sys.argv = ["planner", *sys.argv[1:]]
main()
"""


def run_planner(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process that may take 768 MiB of address space."""
    return subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_command_line_within_a_bound_of_memory(tmp_path: Path) -> None:
    """A world of 10^12 ranks and a device without an end: refused with exit code 2, not killed."""
    import planner

    data = planner.topology("h100-2x8").to_dict()
    for level in data["levels"]:
        level["fanout"] = 1_000_000
    (tmp_path / "t.yaml").write_text(json.dumps(data))
    seed = json.loads((Path(__file__).parent / "data" / "fuzz" / "plan-plain.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps({**seed, "topology": data, "digest": None}))
    for arguments in (
        ("compile", "dlrm-small", "-t", str(tmp_path / "t.yaml")),
        ("verify", str(tmp_path / "p.json")),
        ("explain", "/dev/zero"),
    ):
        done = run_planner(*arguments)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert len(done.stderr) < 2000


class Runs:
    """A pickle that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.path, "ran")


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    from codegen.checkpoint_reader import read_index

    with pytest.raises(InputError, match="which no checkpoint needs"):
        read_index(io.BytesIO(pickle.dumps(Runs(tmp_path / "trace"))), "index")
    # an entry stored as bytes would be unpickled when it is loaded
    as_bytes = Metadata({"weights": BytesStorageMetadata()}, storage_data={})
    with pytest.raises(InputError, match="does not list the tensors"):
        read_index(io.BytesIO(pickle.dumps(as_bytes)), "index")
    assert not (tmp_path / "trace").exists()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The index of a real checkpoint."""
    import torch
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = tmp_path_factory.mktemp("checkpoint")
    save(
        {"a": torch.zeros(4, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, checkpoint_id=folder, no_dist=True
    )
    return (folder / ".metadata").read_bytes()


def test_a_memo_place_far_beyond_the_index() -> None:
    """Found by damage: the unpickler would take 13 GB for the places below."""
    from codegen.checkpoint_reader import read_index

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for put in (b"r\x53\x57\x43\x31", b"p826500947\n"):
        with pytest.raises(InputError, match="memo is beyond its end"):
            read_index(io.BytesIO(b"\x80\x02}" + put + b"."), "index")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 10**6), new=st.binary(max_size=6), cut=st.booleans())
def test_damaged_checkpoint_indexes(at: int, new: bytes, cut: bool, index: bytes) -> None:
    from codegen.checkpoint_reader import read_index

    place = at % len(index)
    data = index[:place] if cut else index[:place] + new + index[place + len(new) :]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = ""
    try:
        read_index(io.BytesIO(data), "index")
    except PlannerError as error:
        said = str(error)
    assert len(said) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


CLAIM = b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"


def _table(folder: Path) -> None:
    ranges = [Range("ram", 40, 512), Range("mapped", 60, 512), Range("block", 100, 512)]
    TieredTable.create(
        folder,
        200,
        4,
        "adagrad",
        ranges,
        init=lambda ids: np.ones((len(ids), 8), np.float32),
        cache_rows=20,
        order=np.arange(200)[::-1],
    ).close()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "table.json",
            b'{"format": 1, "rows": 4611686018427387904, "dim": 4, "optimizer": "sgd", "ranges": '
            b'[{"kind": "block", "rows": 4611686018427387904, "page_bytes": 512}]}',
        ),
        ("table.json", b"[" * 10_000),
        ("table.json", b'{"format": 1}'),
        ("table.json", b"\xff\xfe"),
        (
            "order.npy",
            b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(
                128
            ),
        ),
        ("order.npy", b"\x93NUMPY"),
        ("order.npy", b""),
        ("rows.0", b"short"),
        ("rows.1", b""),
        ("rows.2", b"\x00" * 512 * 20),
        ("commit.0", b""),
        ("commit.0", b"\x00" * 200),
    ],
)
def test_files_of_a_tiered_table(name: str, content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "table"
    _table(folder)
    (folder / name).write_bytes(content)
    with pytest.raises(PlannerError) as caught:
        TieredTable.open(folder, cache_rows=20).close()
    assert len(str(caught.value)) < 1000


def test_an_order_that_lists_a_row_twice(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    _table(folder)
    np.save(folder / "order.npy", np.zeros(200, np.int64))
    with pytest.raises(InputError, match="each of 200 rows once"):
        TieredTable.open(folder, cache_rows=20)


def _npz(path: Path, member: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("features", "dims", "pooled"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(member)


def test_samples_that_claim_or_unpack_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sample.npz"
    head = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    _npz(path, head.ljust(127) + b"\n")
    with pytest.raises(InputError, match="no pooled sample"):
        PooledSample.load(path)
    monkeypatch.setattr(ir.tower_sample, "MAX_BYTES", 2**20)
    _npz(path, b"\x00" * 2**20)  # 3 MiB in a file of 3 KiB
    assert path.stat().st_size < 5000
    with pytest.raises(InputError, match="unpacks to more"):
        PooledSample.load(path)
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(InputError, match="no pooled sample"):
        PooledSample.load(path)
    np.savez(path, features=np.array(["a"]), dims=np.array([[4]]), pooled=np.zeros((2, 4), np.float32))
    with pytest.raises(InputError, match="names and widths"):
        PooledSample.load(path)
