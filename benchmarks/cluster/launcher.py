"""Run a script with torchrun on every host of an emulated cluster, collect what it says, leave nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.cluster.network import INTERFACE, Link, Network, Traffic
from ir.errors import InputError, PlannerError
from ir.units import parse_bandwidth, parse_seconds

_PORT = 29400  # torchrun's default rendezvous port; free, because the namespace is new
_GRACE = 10.0  # seconds the other hosts get to end after one has failed, and after SIGTERM
_ROOT = Path(__file__).resolve().parents[2]
_RANK_LINE = re.compile(r"^\[host\d+ rank(\d+)\]:?(.*)$", re.DOTALL)
_PR_SET_PDEATHSIG = 1  # prctl(2)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

OnLine = Callable[[str], None]


class ClusterError(PlannerError):
    """A run on the cluster did not finish in time."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Result:
    """One run of a script.

    Attributes:
        exit_code: 0, or that of the first host that failed (128 + n for signal n).
        seconds: wall clock from start to end, the import of torch included.
        logs: what each rank printed (both streams), by rank.
        output: every line in order of arrival, prefixed by host and rank.
        traffic: bytes each host's card carried during the run, rendezvous included.
    """

    exit_code: int
    seconds: float
    logs: Mapping[int, str]
    output: str
    traffic: tuple[Traffic, ...]


class _Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised like Ctrl-C so that every ``with`` unwinds."""


class Cluster:
    """``hosts`` hosts of ``ranks`` ranks; a context manager that removes everything it made.

    Args:
        hosts: network namespaces, 1 to 64.
        ranks: processes a host that :meth:`run` starts.
        inter: speed of each host's network card, bytes/s or text such as ``"1Gbps"``; the ranks of a host
            share it. Ranks of one host talk over its loopback, which is not shaped.
        latency: one way between hosts, seconds or text such as ``"50us"``; 0 adds none.

    Leftovers of earlier launchers that were killed are removed first; clusters of live ones are not touched.
    SIGTERM and SIGHUP end the ``with`` block like Ctrl-C where they would have ended the process.

    Raises:
        InputError: sizes or speeds out of range.
        ClusterUnavailable: no root, no iproute2, or a kernel feature is missing.
    """

    def __init__(self, hosts: int, ranks: int, inter: float | str, latency: float | str = 0.0) -> None:
        if not 1 <= ranks <= 256:
            raise InputError(f"a host of the cluster runs 1 to 256 ranks, not {ranks}")
        try:
            self.link = Link(parse_bandwidth(inter), parse_seconds(latency))
        except ValueError as error:
            raise InputError(f"the link between hosts: {error}") from None
        self.hosts = hosts
        self.ranks = ranks
        self._network: Network | None = None
        self._running: list[subprocess.Popen[Any]] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Cluster:
        self._catch_signals()
        try:
            self._network = Network(self.hosts, self.link)
        except BaseException:
            self._release_signals()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        with _undisturbed():
            self._stop(list(self._running), 1.0 if failure[0] else 0.0)
            network, self._network = self._network, None
            if network is not None:
                network.close()
        self._release_signals()

    @property
    def network(self) -> Network:
        """The namespaces; raises InputError outside the ``with`` block."""
        if self._network is None:
            raise InputError("the cluster is not up; use it inside `with Cluster(...) as cluster:`")
        return self._network

    def address(self, host: int) -> str:
        """IPv4 address of a host."""
        return self.network.address(host)

    def traffic(self) -> tuple[Traffic, ...]:
        """What each host's card has carried so far."""
        return tuple(self.network.traffic(host) for host in range(self.hosts))

    def popen(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on a host; it ends with the cluster at the latest. Options as for ``Popen``."""
        inside = ["ip", "netns", "exec", self.network.hosts[host].name, *command]
        process: subprocess.Popen[Any] = subprocess.Popen(
            inside, start_new_session=True, preexec_fn=_end_with_launcher, **options
        )
        self._running.append(process)
        return process

    def run(
        self,
        script: str | Path,
        args: Sequence[str] = (),
        *,
        module: bool = False,
        env: Mapping[str, str] | None = None,
        timeout: float = 900.0,
        on_line: OnLine | None = None,
    ) -> Result:
        """Run a script with torchrun on every host: c10d rendezvous at host 0, gloo over the veth.

        Args:
            script: a Python file, or a module name with ``module``.
            args: its arguments.
            module: ``script`` is a module, as for ``python -m``.
            env: variables on top of this process's. ``OMP_NUM_THREADS`` defaults to an equal share of the cores.
            timeout: seconds for the whole run.
            on_line: called with each line as it arrives, prefixed ``[host0 rank1]`` (``[host0]`` for torchrun's own).

        Raises:
            InputError: the script does not exist.
            ClusterError: it did not finish within ``timeout``; its processes are ended.
        """
        if not module and not Path(script).is_file():
            raise InputError(f"script {script} does not exist; check the path")
        started, before = time.monotonic(), self.traffic()
        collector = _Collector(on_line)
        agents = [
            self._agent(host, [*(["-m"] if module else []), str(script), *args], env)
            for host in range(self.hosts)
        ]
        readers = [collector.follow(host, agent) for host, agent in enumerate(agents)]
        try:
            codes = self._wait(agents, started + timeout)
        finally:
            with _undisturbed():
                self._stop(agents, _GRACE)
        for reader in readers:
            reader.join()
        failed = [code for code in codes if code]
        code = failed[0] if failed else 0
        carried = tuple(
            Traffic(now.sent - then.sent, now.received - then.received)
            for now, then in zip(self.traffic(), before, strict=True)
        )
        return Result(
            exit_code=128 - code if code < 0 else code,
            seconds=time.monotonic() - started,
            logs={rank: "".join(collector.logs.get(rank, [])) for rank in range(self.hosts * self.ranks)},
            output="".join(collector.lines),
            traffic=carried,
        )

    def _agent(self, host: int, what: Sequence[str], env: Mapping[str, str] | None) -> subprocess.Popen[Any]:
        threads = max(1, (os.cpu_count() or 1) // (self.hosts * self.ranks))
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            # c10d warns of every connection whose address has no name; hosts here have none
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PYTHONPATH": os.pathsep.join(paths),
            **(env or {}),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            "TP_SOCKET_IFNAME": INTERFACE,
            "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": f"[host{host} rank${{rank}}]:",
        }
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={self.hosts}",
            f"--nproc-per-node={self.ranks}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.address(0)}:{_PORT}",
            f"--rdzv-conf=is_host={int(host == 0)}",
            "--rdzv-id=cluster",
            f"--local-addr={self.address(host)}",
            "--max-restarts=0",
            "--tee=3",
            *what,
        ]
        return self.popen(
            host,
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def _wait(self, agents: Sequence[subprocess.Popen[Any]], deadline: float) -> list[int]:
        """Exit codes in the order hosts ended; once one fails the others have ``_GRACE`` seconds."""
        codes: list[int] = []
        waiting = list(agents)
        failing = False
        while waiting:
            for agent in [agent for agent in waiting if agent.poll() is not None]:
                waiting.remove(agent)
                codes.append(agent.returncode)
                if agent.returncode and not failing:
                    failing, deadline = True, min(deadline, time.monotonic() + _GRACE)
            if waiting and time.monotonic() > deadline:
                if failing:
                    return codes
                raise ClusterError("the run on the cluster did not finish in time; give a longer timeout")
            time.sleep(0.02)
        return codes

    def _stop(self, processes: Sequence[subprocess.Popen[Any]], grace: float) -> None:
        """End these politely (agents then end their ranks), and what is left inside the hosts of them not."""
        for process in processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + grace
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        # a rank has a session of its own; what popen() started for somebody else is known by its session
        others = {process.pid for process in self._running if process not in processes}
        if self._network is not None:
            for space in self._network.hosts:
                space.kill(others)
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._running = [process for process in self._running if process not in processes]

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                self._handlers[number] = signal.signal(number, _raise_stopped)

    def _release_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise _Stopped(signal.Signals(number).name)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Cleaning up is not itself interrupted; a signal that comes meanwhile takes effect afterwards.

    Handlers are exchanged rather than signals blocked: a blocked signal would reach another thread,
    and Python would run its handler in the main thread all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda caught, frame: came.append(caught)) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])


_LIBC = ctypes.CDLL(None)


def _end_with_launcher() -> None:
    """In the child: SIGTERM when the launcher dies, even by SIGKILL, so that ranks do not run on."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Collector:
    """Gathers the agents' output, line by line, from one thread an agent."""

    def __init__(self, on_line: OnLine | None) -> None:
        self.lines: list[str] = []
        self.logs: dict[int, list[str]] = {}
        self._on_line = on_line
        self._lock = threading.Lock()

    def follow(self, host: int, agent: subprocess.Popen[Any]) -> threading.Thread:
        thread = threading.Thread(target=self._read, args=(host, agent), daemon=True)
        thread.start()
        return thread

    def _read(self, host: int, agent: subprocess.Popen[Any]) -> None:
        assert agent.stdout is not None
        for line in agent.stdout:
            match = _RANK_LINE.match(line)
            with self._lock:
                if match is not None:
                    self.logs.setdefault(int(match[1]), []).append(match[2])
                self.lines.append(line if match is not None else f"[host{host}] {line}")
                if self._on_line is not None:
                    self._on_line(self.lines[-1].rstrip("\n"))
