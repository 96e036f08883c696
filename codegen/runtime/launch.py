"""Real processes on this machine: one per rank, joined by gloo, with hosts emulated.

Processes come from a fork server that has imported torch and TorchRec once, so that starting ten
ranks costs one import. They meet through a file, so there is no port to be free or taken. Everything
that crosses a process border is JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from ir.errors import InputError, PlannerError, did_you_mean

DEFAULT_TIMEOUT = 900.0  # seconds; a run that takes longer on one machine is stuck
_GRACE = 2.0  # seconds for the other ranks to report before they are ended
_PRELOAD = [
    "torch.distributed.optim",
    "torch._dynamo",
    "torchrec.distributed.model_parallel",
    "torchrec.distributed.embeddingbag",
    "torchrec.distributed.embedding",
    "pydantic.type_adapter",
    "numpy",
]

OnMessage = Callable[[int, Any], None]


class LaunchError(PlannerError):
    """A rank failed, died or hung; the message names the rank and what it said."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details  # the rank's traceback, for logs


@dataclass(frozen=True, slots=True)
class Rank:
    """What a rank's function is told about its place."""

    rank: int
    world_size: int
    host_size: int
    report: Callable[[Any], None]  # sends JSON data to the launcher's ``on_message``


def resolve(path: str) -> Callable[..., Any]:
    """The callable behind ``"package.module:name"`` or ``"folder/file.py:name"``; raises InputError."""
    where, colon, name = path.rpartition(":")
    if not colon or not where or not name:
        raise InputError(f"{path!r} does not name a callable; write module:function or file.py:function")
    module = _load_file(where) if where.endswith(".py") else _load_module(where)
    found: Any = module
    for part in name.split("."):
        known = dir(found)
        found = getattr(found, part, None)
        if found is None:
            raise InputError(f"{where} has no {name!r}{did_you_mean(part, known)}; check the spelling")
    if not callable(found):
        raise InputError(f"{path} is a {type(found).__name__}, not a callable; name a function or class")
    called: Callable[..., Any] = found
    return called


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"cannot import {name}: {error}; check the name and sys.path") from None


def _load_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"model file {path} does not exist; check the path")
    known = sys.modules.get(f"_planned_{file.stem}")
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    spec = importlib.util.spec_from_file_location(f"_planned_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look the module up by name
    sys.path.insert(0, str(file.parent))  # as when the file is run, so that it finds its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def launch(
    function: str,
    nproc: int,
    arguments: dict[str, Any] | None = None,
    *,
    host_size: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    on_message: OnMessage | None = None,
) -> list[Any]:
    """Call ``function(rank, **arguments)`` in ``nproc`` gloo processes and return what each returned.

    Args:
        function: ``"module:name"`` or ``"file.py:name"``; called with a :class:`Rank` and the arguments,
            with the default process group initialised and ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and
            ``LOCAL_WORLD_SIZE`` set.
        arguments: JSON data.
        host_size: ranks of one emulated host; default all.
        timeout: seconds for the whole run, the import of torch included.
        on_message: called with (rank, data) for each ``rank.report(data)``, in the calling thread.

    Returns:
        JSON data, one entry a rank.

    Raises:
        InputError: counts that do not fit together, or arguments that are not JSON.
        LaunchError: a rank raised, died or did not finish in time; no process is left behind.
    """
    host_size = nproc if host_size is None else host_size
    if nproc < 1 or host_size < 1 or nproc % host_size:
        raise InputError(
            f"{nproc} processes cannot form hosts of {host_size}; choose a multiple of the host size"
        )
    try:
        text = json.dumps(arguments or {}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the arguments of {function} must be JSON data: {error}") from None
    threads = max(1, (os.cpu_count() or 1) // nproc)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="planner-run-") as folder:
        crew = _Crew(timeout, on_message)
        try:
            for rank in range(nproc):
                ours, theirs = context.Pipe(duplex=True)
                process = context.Process(
                    target=_worker,
                    args=(
                        theirs,
                        function,
                        text,
                        (rank, nproc, host_size),
                        f"{folder}/store",
                        timeout,
                        threads,
                    ),
                    name=f"rank {rank}",
                    daemon=True,
                )
                process.start()
                theirs.close()
                crew.add(process, ours)
            return crew.gather()
        finally:
            crew.disband()


@dataclass(slots=True)
class _Failure:
    rank: int
    when: float
    message: str
    details: str
    died: bool = False  # without a word: then the others' broken connections are its doing


class _Crew:
    """The running ranks, their pipes, and what they have said so far."""

    def __init__(self, timeout: float, on_message: OnMessage | None) -> None:
        self.deadline = time.monotonic() + timeout
        self.timeout = timeout
        self.on_message = on_message
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.results: dict[int, Any] = {}
        self.failures: list[_Failure] = []

    def add(self, process: Any, pipe: Connection) -> None:
        self.processes.append(process)
        self.pipes.append(pipe)

    def gather(self) -> list[Any]:
        open_pipes = dict(enumerate(self.pipes))
        deadline = self.deadline
        while open_pipes:
            ready = wait(list(open_pipes.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank, pipe in open_pipes.items() if pipe in ready]:
                if not self._read(rank, open_pipes[rank]):
                    del open_pipes[rank]
            if self.failures:
                deadline = min(deadline, self.failures[0].when + _GRACE)
        if self.failures:
            first = min(self.failures, key=lambda failure: (not failure.died, failure.when))
            raise LaunchError(f"rank {first.rank} failed: {first.message}", first.details)
        if open_pipes:
            stuck = ", ".join(str(rank) for rank in sorted(open_pipes))
            raise LaunchError(
                f"rank {stuck} did not finish within {self.timeout:g} s; give a longer timeout or fewer steps"
            )
        return [self.results[rank] for rank in range(len(self.processes))]

    def _read(self, rank: int, pipe: Connection) -> bool:
        """Take one message; False once the rank has nothing more to say."""
        try:
            kind, value = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            self._died(rank)
            return False
        if kind == "message":
            if self.on_message is not None:
                self.on_message(rank, value)
            return True
        if kind == "result":
            self.results[rank] = value
        else:
            self.failures.append(_Failure(rank, value["when"], value["message"], value["details"]))
        return False

    def _died(self, rank: int) -> None:
        process = self.processes[rank]
        process.join(_GRACE)
        code = process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
            how += ", often a sign of too little memory" if -code == signal.SIGKILL else ""
        self.failures.append(_Failure(rank, time.monotonic(), f"the process ended by {how}", "", True))

    def disband(self) -> None:
        """End whatever still runs: politely, then not."""
        finished = len(self.results) == len(self.processes) and not self.failures
        for process in self.processes:
            if finished:
                process.join(_GRACE)
            if process.is_alive():
                process.terminate()
        for process in self.processes:
            process.join(_GRACE)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()


def _worker(
    pipe: Connection,
    function: str,
    arguments: str,
    place: tuple[int, int, int],
    store: str,
    timeout: float,
    threads: int,
) -> None:
    """The main function of a rank's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which ends the ranks
    threading.Thread(target=_end_with_launcher, args=(pipe,), daemon=True).start()
    lock = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with lock:
            pipe.send_bytes(json.dumps([kind, value]).encode())

    try:
        rank = Rank(*place, report=lambda data: send("message", data))
        _join(rank, store, timeout, threads)
        send("result", _call(function, json.loads(arguments), rank))
    except BaseException as error:
        text = str(error).strip() or type(error).__name__
        message = text if isinstance(error, PlannerError) else f"{type(error).__name__}: {text}"
        failure = {"when": time.monotonic(), "message": message, "details": traceback.format_exc()}
        send("failure", failure)
    finally:
        # Skip interpreter teardown: gloo threads of a failed group may never join.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _end_with_launcher(pipe: Connection) -> None:
    """The launcher never writes; its end closing means that it is gone."""
    try:
        pipe.poll(None)
        pipe.recv_bytes()
    except (EOFError, OSError):
        pass
    os._exit(1)


def _join(place: Rank, store: str, timeout: float, threads: int) -> None:
    """Set up the process and its process group."""
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # TorchRec logs each process group it makes as a warning
    torch.set_num_threads(threads)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.rank % place.host_size),
        LOCAL_WORLD_SIZE=str(place.host_size),
    )
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name need not resolve
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, place.world_size),  # type: ignore[attr-defined]
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout),
    )


def _call(function: str, arguments: dict[str, Any], place: Rank) -> Any:
    import torch.distributed as dist

    result = resolve(function)(place, **arguments)
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early would look like a failure to the others
        dist.destroy_process_group()
    return result
