"""The emulated cluster, with real packets: speeds, byte counts, isolation, and what is left behind (nothing)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cluster import Cluster, ClusterError, ClusterUnavailable, check_machine
from benchmarks.cluster import launcher as launcher_module
from benchmarks.cluster import network as network_module
from benchmarks.cluster.namespaces import PREFIX, Namespace, existing, start_tick
from ir.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def emulation() -> None:
    """Skips what needs root, iproute2 and the kernel's help where they are missing."""
    try:
        check_machine()
    except ClusterUnavailable as error:
        pytest.skip(str(error))


# --- what needs no privileges ---------------------------------------------------------------------------------


def test_a_namespace_is_stale_once_its_owner_is_gone() -> None:
    owner = subprocess.Popen(["sleep", "60"])
    try:
        start = start_tick(owner.pid)
        name = f"{PREFIX}-{owner.pid}-{start}-0-h0"
        assert not Namespace(name).stale
        # the pid was given to somebody else since
        assert Namespace(f"{PREFIX}-{owner.pid}-{int(start or 0) - 1}-0-h0").stale
    finally:
        owner.kill()
    deadline = time.monotonic() + 5
    while not Namespace(name).stale and time.monotonic() < deadline:  # a zombie is gone, too: it runs nothing
        time.sleep(0.01)
    assert Namespace(name).stale
    owner.wait()
    assert Namespace(name).stale
    # other people's namespaces are never touched
    assert not Namespace("docker-1").stale


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda patch: patch.setattr(network_module.sys, "platform", "darwin"), "needs Linux"),
        (
            lambda patch: patch.setattr(network_module.shutil, "which", lambda tool: None),
            "needs `ip`; install iproute2",
        ),
        (lambda patch: patch.setattr(network_module.os, "geteuid", lambda: 1000), "needs root"),
    ],
)
def test_what_is_missing_is_said(
    break_it: Callable[[pytest.MonkeyPatch], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_module.shutil, "which", lambda tool: f"/sbin/{tool}")
    break_it(monkeypatch)
    with pytest.raises(ClusterUnavailable, match=message):
        check_machine()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hosts": 0}, "1 to 64 hosts"),
        ({"hosts": 65}, "1 to 64 hosts"),
        ({"ranks": 0}, "1 to 256 ranks"),
        ({"inter": "fast"}, "bandwidth"),
        ({"inter": "1 Gb"}, "unknown unit"),
        ({"inter": "0 bps"}, "out of range"),
        ({"latency": "-1us"}, "out of range"),
    ],
)
def test_sizes_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Cluster(**{"hosts": 2, "ranks": 1, "inter": "1Gbps", **arguments}).__enter__()


def test_a_cluster_that_is_not_up_says_so() -> None:
    with pytest.raises(InputError, match="inside `with"):
        Cluster(2, 1, "1Gbps").traffic()


def test_cleaning_up_is_not_interrupted_but_the_signal_is_not_lost() -> None:
    done = False

    def clean() -> None:
        nonlocal done
        with launcher_module._undisturbed():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            done = True

    with pytest.raises(KeyboardInterrupt):
        clean()
    assert done


# --- real packets -----------------------------------------------------------------------------------------------

RECEIVER = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 5000))
print("listening", flush=True)
connections = [server.accept()[0] for _ in range(int(sys.argv[2]))]
import threading
counts, start = [0] * len(connections), []
def drain(i):
    while data := connections[i].recv(1 << 20):
        start or start.append(time.perf_counter())
        counts[i] += len(data)
threads = [threading.Thread(target=drain, args=(i,)) for i in range(len(connections))]
[t.start() for t in threads]; [t.join() for t in threads]
print(sum(counts) / (time.perf_counter() - start[0]), flush=True)
"""
SENDER = """
import socket, sys
socket.create_connection((sys.argv[1], 5000)).sendall(bytes(int(sys.argv[2])))
"""


def received(cluster: Cluster, sources: list[int], target: int, size: int) -> float:
    """Bytes/s that ``target`` receives while each source sends ``size`` bytes over one TCP connection."""
    address = cluster.address(target)
    receiver = cluster.popen(
        target,
        [sys.executable, "-c", RECEIVER, address, str(len(sources))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "listening\n"
    senders = [cluster.popen(s, [sys.executable, "-c", SENDER, address, str(size)]) for s in sources]
    rate = float(receiver.stdout.readline())
    assert [process.wait(10) for process in (receiver, *senders)] == [0] * (1 + len(sources))
    return rate


def fastest(cluster: Cluster, senders: list[int], receiver: int, size: int, enough: float) -> float:
    """The best of a few transfers: a busy machine makes a shaped link slower, nothing makes it faster."""
    best = 0.0
    for _ in range(4):
        best = max(best, received(cluster, senders, receiver, size))
        if best >= enough:
            break
    return best


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(("speed", "set_rate"), [("80Mbps", 10e6), ("400Mbps", 50e6)])
def test_links_carry_what_they_are_set_to(speed: str, set_rate: float) -> None:
    with Cluster(3, 1, speed) as cluster:
        size = int(set_rate * 0.6)
        between = fastest(cluster, [0], 1, size, 0.9 * set_rate)
        assert between == pytest.approx(set_rate, rel=0.12)
        # two senders share the receiver's card
        shared = fastest(cluster, [0, 2], 1, size // 2, 0.9 * set_rate)
        assert shared == pytest.approx(set_rate, rel=0.12)
        # the inside of a host is not shaped
        assert fastest(cluster, [0], 0, 64 * 2**20, 4 * between) > 4 * between
        cluster.network.set_bandwidth(set_rate / 2)
        halved = fastest(cluster, [0], 1, size // 2, 0.45 * set_rate)
        assert halved == pytest.approx(set_rate / 2, rel=0.12)
        assert cluster.network.drops() == 0


@pytest.mark.usefixtures("emulation")
def test_the_card_counts_what_crossed_it() -> None:
    with Cluster(2, 1, "400Mbps") as cluster:
        before = cluster.traffic()
        received(cluster, [0], 1, 10_000_000)
        across = cluster.traffic()
        received(cluster, [0], 0, 10_000_000)
        inside = cluster.traffic()
    # headers: 66 bytes or so a frame of 6000 bytes or more
    assert 10_000_000 < across[0].sent - before[0].sent < 10_300_000
    assert 10_000_000 < across[1].received - before[1].received < 10_300_000
    assert across[1].sent - before[1].sent < 300_000
    assert inside[0].sent - across[0].sent < 1000


@pytest.mark.usefixtures("emulation")
def test_two_clusters_do_not_see_each_other() -> None:
    connect = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=1)"
    with Cluster(2, 1, "100Mbps") as one, Cluster(2, 1, "100Mbps") as other:
        assert one.address(0) == other.address(0)
        server = one.popen(
            0, [sys.executable, "-c", RECEIVER, one.address(0), "1"], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        command = [sys.executable, "-c", connect, one.address(0)]
        assert other.popen(1, command, stderr=subprocess.DEVNULL).wait(20) != 0
        assert one.popen(1, command).wait(20) == 0


# --- torchrun -------------------------------------------------------------------------------------------------------

ALL_TO_ALL = """
import json, os
import torch, torch.distributed as dist

def sent():
    for line in open("/proc/net/dev"):
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[8])

dist.init_process_group("gloo")
rank, world, size = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
hosts = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
given = torch.arange(1 << 20, dtype=torch.float32)
taken = torch.empty_like(given)
bytes_sent = {}
for name, group in (("world", dist.group.WORLD), ("host", hosts[rank // size])):
    dist.all_to_all_single(taken, given, group=group)
    dist.barrier()
    before = sent()
    dist.barrier()
    for _ in range(3):
        dist.all_to_all_single(taken, given, group=group)
    dist.barrier()
    bytes_sent[name] = sent() - before
print(json.dumps({"rank": rank, "host": int(os.environ["GROUP_RANK"]), "local": int(os.environ["LOCAL_RANK"]),
                  "sent": bytes_sent}), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.usefixtures("emulation")
def test_an_all_to_all_moves_what_it_must(tmp_path: Path) -> None:
    script = tmp_path / "exchange.py"
    script.write_text(ALL_TO_ALL)
    lines: list[str] = []
    with Cluster(2, 2, "800Mbps") as cluster:
        result = cluster.run(script, timeout=120, on_line=lines.append)
    assert result.exit_code == 0, result.output
    assert any(line.startswith("[host1 rank3]:{") for line in lines)
    for rank, log in result.logs.items():
        told = json.loads(log)
        assert (told["rank"], told["host"], told["local"]) == (rank, rank // 2, rank % 2)
        # 3 exchanges; each of a host's 2 ranks sends half of its 4 MiB to the other host
        must = 3 * 2 * (4 * 2**20) // 2
        assert must <= told["sent"]["world"] < 1.04 * must + 10_000
        assert told["sent"]["host"] < 20_000  # the barriers around it


@pytest.mark.usefixtures("emulation")
def test_a_failing_script_and_one_that_hangs(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import sys; print('so far'); sys.exit(3)")
    with Cluster(1, 1, "1Gbps") as cluster:
        helper = cluster.popen(0, ["sleep", "100"])
        result = cluster.run(script, timeout=120)
        assert result.exit_code == 1  # torchrun's own code when a rank fails
        assert result.logs[0].strip() == "so far"
        with pytest.raises(InputError, match="does not exist"):
            cluster.run(tmp_path / "none.py")
        with pytest.raises(ClusterError, match="did not finish in time"):
            cluster.run(script, timeout=0.2)
        assert cluster.network.hosts[0].processes() == [helper.pid]


# --- nothing is left behind -------------------------------------------------------------------------------------

STUBBORN = ["sh", "-c", "trap '' TERM INT HUP; echo ready; while :; do sleep 1; done"]
DRIVER = f"""
import subprocess, time
from benchmarks.cluster import Cluster
with Cluster(2, 1, "1Gbps") as cluster:
    stubborn = cluster.popen(1, {STUBBORN!r}, stdout=subprocess.PIPE)
    stubborn.stdout.readline()
    print("up", cluster.network.switch.name, *(host.name for host in cluster.network.hosts), flush=True)
    time.sleep(300)
"""


@contextlib.contextmanager
def driver() -> Iterator[tuple[subprocess.Popen[str], set[str]]]:
    """A process that holds a cluster of two hosts and a program that will not end; its namespaces."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline().split()
        assert said[:1] == ["up"]
        yield process, set(said[1:])
    finally:
        process.kill()
        process.wait()


def names() -> set[str]:
    return {space.name for space in existing()}


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_launcher_cleans_up(number: signal.Signals) -> None:
    with driver() as (launcher, spaces):
        inside = [pid for name in spaces for pid in Namespace(name).processes()]
        assert inside
        assert spaces <= names()
        launcher.send_signal(number)
        launcher.wait(20)
        assert not spaces & names()
        assert not any(start_tick(pid) for pid in inside)


@pytest.mark.usefixtures("emulation")
def test_the_next_start_removes_what_a_killed_launcher_left() -> None:
    with Cluster(1, 1, "1Gbps") as bystander:
        sleeper = bystander.popen(0, ["sleep", "100"])
        with driver() as (launcher, spaces):
            launcher.kill()
            launcher.wait()
        left = [pid for name in spaces for pid in Namespace(name).processes()]
        assert left, "the stubborn program outlives its launcher"
        assert spaces <= names()
        with Cluster(1, 1, "1Gbps"):
            assert not spaces & names()
            assert not any(start_tick(pid) for pid in left)
            # the cluster of a live launcher stands
            assert bystander.network.hosts[0].name in names()
            assert sleeper.poll() is None


@pytest.mark.usefixtures("emulation")
def test_ctrl_c_of_the_command_ends_the_ranks(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text("import os, time; print('pid', os.getpid(), flush=True); time.sleep(300)")
    command = [sys.executable, "-m", "benchmarks.cluster", "run", "--hosts", "1", "--ranks", "1", str(script)]
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    assert launcher.stdout is not None
    rank = next(int(line.split()[-1]) for line in launcher.stdout if "pid" in line)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert "the cluster is removed" in errors
    assert start_tick(rank) is None
    assert not any(name.startswith(f"{PREFIX}-{launcher.pid}-") for name in names())
