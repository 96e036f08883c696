"""Hosts, a switch and shaped links, out of namespaces, a bridge, veth pairs and ``tc``.

::

    host 0 (namespace)          switch (namespace)          host 1 (namespace)
    lo    ranks 0..R-1            bridge br0                lo    ranks R..2R-1
    eth0 [bucket out] ----- p0 [bucket in] | p1 [bucket in] ----- [bucket out] eth0

Each host has one full-duplex network card: a token bucket of the set rate on what it sends (its end of the pair)
and one on what it receives (the switch's end), so that incast is limited like fan-out. Nothing is added to the
machine's own namespace: both ends of every pair are born inside. The same addresses serve every cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cluster.namespaces import Namespace, new_family, remove_all, sweep
from ir.errors import InputError

INTERFACE = "eth0"
MAX_HOSTS = 64
_FIRST_ADDRESS = 101  # three digits for every host, so that addresses sort like hosts: torchrun ranks by text
_MAX_MTU = 9000  # bytes; jumbo frames, as on cluster networks
_MIN_MTU = 1500  # bytes; Ethernet
_FRAME_SECONDS = 120e-6  # a frame is cut to about this long on a slow link, so that messages share it finely
# The bucket holds this much time at full rate: what an idle link lets through unpaced. A timer that fires
# later than this loses tokens; with 150 us a busy machine lost 15 % at 80 Mbit/s, with this much nothing.
_BURST_SECONDS = 300e-6
_HEADROOM = 128  # bytes of frame header and slack; tbf drops a frame larger than its bucket
_QUEUE = 32 * 2**20  # bytes a port queues before it drops; more than the receive windows of all flows hold
_WINDOW = 2**20  # bytes of receive window a connection may grow to; far above bandwidth x round trip here


class ClusterUnavailable(InputError):
    """This machine (or user) cannot emulate a cluster; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Link:
    """A host's network card.

    Attributes:
        bandwidth: bytes/s, each direction, shared by the host's ranks.
        latency: seconds added one way between two hosts (needs the kernel's netem).
    """

    bandwidth: float
    latency: float = 0.0

    @property
    def mtu(self) -> int:
        """Bytes of a frame's payload."""
        return min(_MAX_MTU, max(_MIN_MTU, round(self.bandwidth * _FRAME_SECONDS)))

    @property
    def burst(self) -> int:
        """Bytes of the token bucket: what passes an idle link at once."""
        return max(self.mtu + _HEADROOM, round(self.bandwidth * _BURST_SECONDS))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes a host's card has sent and received since the cluster started, frame headers included."""

    sent: int
    received: int


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode:
        reason = (
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        )
        raise ClusterUnavailable(f"the emulated cluster failed at `{' '.join(command)}`: {reason}")
    return done.stdout


def check_machine(latency: float = 0.0) -> None:
    """Raise ClusterUnavailable, in one sentence, when this machine cannot emulate a cluster.

    Tries each kernel feature in a namespace of its own; ``latency`` > 0 also asks for netem.
    """
    if sys.platform != "linux":
        raise ClusterUnavailable("the emulated cluster needs Linux network namespaces; run it on Linux")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise ClusterUnavailable(f"the emulated cluster needs `{tool}`; install iproute2")
    if os.geteuid() != 0:
        raise ClusterUnavailable(
            "the emulated cluster makes network namespaces, which needs root; run it as root"
        )
    probe = Namespace(f"{new_family()}-probe")
    try:
        _need("network namespaces (CAP_SYS_ADMIN)", "ip", "netns", "add", probe.name)
        at = ("ip", "-n", probe.name, "link", "add")
        _need("bridges (module bridge, CAP_NET_ADMIN)", *at, "br0", "type", "bridge")
        _need("veth pairs (module veth)", *at, "left", "type", "veth", "peer", "name", "right")
        bucket = ("tbf", "rate", "1mbit", "burst", "16384", "limit", "65536")
        add = ("tc", "-n", probe.name, "qdisc", "add", "dev")
        _need("token buckets (module sch_tbf)", *add, "left", "root", *bucket)
        if latency > 0:
            fix = "latency emulation (module sch_netem); leave --latency out"
            _need(fix, *add, "right", "root", "netem", "delay", "1ms")
    finally:
        remove_all([probe])


def _need(feature: str, *command: str) -> None:
    try:
        _call(*command)
    except ClusterUnavailable as error:
        raise ClusterUnavailable(f"this kernel or container lacks {feature}: {error}") from None


class Network:
    """The namespaces of one cluster; made by the constructor, removed by :meth:`close`.

    Raises:
        InputError: sizes or speeds out of range.
        ClusterUnavailable: no root, no ``ip`` or ``tc``, or a kernel feature is missing.
    """

    def __init__(self, hosts: int, link: Link) -> None:
        if not 1 <= hosts <= MAX_HOSTS:
            raise InputError(f"an emulated cluster has 1 to {MAX_HOSTS} hosts, not {hosts}")
        if not 1e3 <= link.bandwidth <= 1e12 or not 0 <= link.latency <= 10:
            raise InputError(
                f"a link of {link.bandwidth:g} bytes/s and {link.latency:g} s is out of range; "
                f"use 8 Kbps to 8 Tbps and up to 10 s"
            )
        check_machine(link.latency)
        self.swept = sweep()
        self.link = link
        family = new_family()
        self.switch = Namespace(f"{family}-switch")
        self.hosts = tuple(Namespace(f"{family}-h{host}") for host in range(hosts))
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def address(self, host: int) -> str:
        """IPv4 address of a host inside the cluster."""
        return f"10.77.0.{_FIRST_ADDRESS + host}"

    def traffic(self, host: int) -> Traffic:
        """What the host's card has carried."""
        shown = json.loads(_call("ip", "-j", "-s", "-n", self.hosts[host].name, "link", "show", INTERFACE))
        counters = shown[0]["stats64"]
        return Traffic(counters["tx"]["bytes"], counters["rx"]["bytes"])

    def drops(self) -> int:
        """Packets that any token bucket has dropped; stays 0 unless a queue overflowed."""
        dropped = 0
        for host, space in enumerate(self.hosts):
            for where, device in ((space.name, INTERFACE), (self.switch.name, f"p{host}")):
                for qdisc in json.loads(_call("tc", "-j", "-s", "-n", where, "qdisc", "show", "dev", device)):
                    dropped += qdisc.get("drops", 0)
        return dropped

    def set_bandwidth(self, bandwidth: float) -> None:
        """Fill the token buckets of every card at another rate, bytes/s, also under running processes.

        Frames are as large as cards of that rate have them, but never larger than :attr:`link` had them, because
        connections agreed on that.
        """
        now = Link(bandwidth)
        mtu = min(now.mtu, self.link.mtu)
        for host, space in enumerate(self.hosts):
            for where, device, delayed in (
                (space, INTERFACE, False),
                (self.switch, f"p{host}", self.link.latency > 0),
            ):
                place = ("parent", "1:1", "handle", "10:") if delayed else ("root",)
                change = ("tc", "-n", where.name, "qdisc", "change", "dev", device, *place)
                _call(*change, *_bucket(bandwidth, max(now.burst, self.link.mtu + _HEADROOM)))
                _call("ip", "-n", where.name, "link", "set", device, "mtu", str(mtu))

    def close(self) -> None:
        """End every process inside and remove every namespace; safe to repeat."""
        remove_all((*self.hosts, self.switch))

    def _build(self) -> None:
        self._add(self.switch)
        at = ("ip", "-n", self.switch.name, "link")
        _call(*at, "add", "br0", "mtu", str(self.link.mtu), "type", "bridge")
        _call(*at, "set", "br0", "up")
        for host in range(len(self.hosts)):
            self._add_host(host)

    def _add(self, space: Namespace) -> None:
        _call("ip", "netns", "add", space.name)
        # no IPv6: its neighbour discovery would be counted with the traffic
        settings = [f"net.ipv6.conf.{scope}.disable_ipv6=1" for scope in ("all", "default")]
        # a data-centre transport does not fall back to slow start after each compute phase
        settings.append("net.ipv4.tcp_slow_start_after_idle=0")
        settings.append(f"net.ipv4.tcp_rmem=4096 131072 {_WINDOW}")
        # nothing is lost here, so reno keeps its window; BBR, a common default, drains the link every 10 s to probe it
        settings.append("net.ipv4.tcp_congestion_control=reno")
        for setting in settings:
            key, _, value = setting.partition("=")
            path = "/proc/sys/" + key.replace(".", "/")
            # a kernel without IPv6 has no such file, which is as good
            write = 'test ! -e "$0" || echo "$1" > "$0"'
            _call("ip", "netns", "exec", space.name, "sh", "-c", write, path, value)

    def _add_host(self, host: int) -> None:
        space, port = self.hosts[host], f"p{host}"
        self._add(space)
        # a segment larger than the bucket would be cut in software
        segment = ("gso_max_size", str(min(65536, max(self.link.burst, 2 * self.link.mtu))))
        pair = ("type", "veth", "peer", "name", port, "netns", self.switch.name, "mtu", str(self.link.mtu))
        _call("ip", "-n", space.name, "link", "add", INTERFACE, "mtu", str(self.link.mtu), *segment, *pair)
        _call("ip", "-n", self.switch.name, "link", "set", port, *segment, "master", "br0", "up")
        _call("ip", "-n", space.name, "addr", "add", f"{self.address(host)}/24", "dev", INTERFACE)
        _call("ip", "-n", space.name, "link", "set", "lo", "up")
        _call("ip", "-n", space.name, "link", "set", INTERFACE, "up")
        self._shape(space, INTERFACE, 0.0)
        self._shape(self.switch, port, self.link.latency)

    def _shape(self, space: Namespace, device: str, delay: float) -> None:
        add = ("tc", "-n", space.name, "qdisc", "add", "dev", device)
        bucket = _bucket(self.link.bandwidth, self.link.burst)
        if delay > 0:
            # netem on top and the bucket below it, the order of tc-netem(8)
            queued = str(_QUEUE // 1500)
            _call(*add, "root", "handle", "1:", "netem", "delay", f"{delay * 1e6:.0f}us", "limit", queued)
            _call(*add, "parent", "1:1", "handle", "10:", *bucket)
        else:
            _call(*add, "root", *bucket)


def _bucket(bandwidth: float, burst: int) -> Sequence[str]:
    return ("tbf", "rate", f"{round(bandwidth * 8)}bit", "burst", str(burst), "limit", str(_QUEUE))
