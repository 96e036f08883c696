"""An emulated cluster: hosts are network namespaces, links are veth pairs shaped by token buckets.

``python -m benchmarks.cluster run --hosts 2 --ranks 2 --inter 1Gbps script.py`` runs a script with torchrun
on every host; :class:`Cluster` is the same from Python. See docs/cluster.md for what is and is not emulated.
"""

from __future__ import annotations

from benchmarks.cluster.launcher import Cluster, ClusterError, Result
from benchmarks.cluster.network import ClusterUnavailable, Link, Traffic, check_machine

__all__ = ["Cluster", "ClusterError", "ClusterUnavailable", "Link", "Result", "Traffic", "check_machine"]
