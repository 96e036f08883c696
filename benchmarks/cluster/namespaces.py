"""Named network namespaces, who owns them, what runs in them, and how leftovers go away.

A name is ``swcluster-<pid>-<start>-<serial>-<role>``: the process that made it, the clock tick at which
that process started (so that a recycled pid is not taken for the owner), a counter of clusters within the process,
and the part it plays (``switch``, ``h0``, ``h1``, ...). A namespace whose owner is gone is stale.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PREFIX = "swcluster"
FOLDER = Path("/run/netns")  # where iproute2 keeps named namespaces: ip-netns(8)

_NAME = re.compile(rf"^{PREFIX}-(?P<pid>\d+)-(?P<start>\d+)-(?P<serial>\d+)-(?P<role>[a-z0-9]+)$")
_SERIAL = itertools.count()
_KILL_ROUNDS = 50  # a process that forks while it is killed needs another round; each waits 20 ms


def start_tick(pid: int) -> int | None:
    """Clock ticks from boot to the start of ``pid`` (field 22 of proc(5) stat); None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the command name, field 2, may hold spaces and brackets; the last bracket ends it
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def new_family() -> str:
    """A stem that no other live cluster uses; namespaces of one cluster share it."""
    pid = os.getpid()
    return f"{PREFIX}-{pid}-{start_tick(pid)}-{next(_SERIAL)}"


@dataclass(frozen=True, slots=True)
class Namespace:
    """One named namespace that this package made."""

    name: str

    @property
    def stale(self) -> bool:
        """True when the process that made it no longer runs."""
        match = _NAME.match(self.name)
        return match is not None and start_tick(int(match["pid"])) != int(match["start"])

    def processes(self) -> list[int]:
        """Ids of the processes inside, without those that this user may not see."""
        try:
            wanted = (FOLDER / self.name).stat()
        except OSError:
            return []
        inside = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    found = os.stat(f"/proc/{entry}/ns/net")
                    if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                        inside.append(int(entry))
        return inside

    def kill(self, spare: Collection[int] = ()) -> None:
        """End every process inside at once, whatever it does about it; sessions in ``spare`` live on."""
        for _ in range(_KILL_ROUNDS):
            running = [
                pid for pid in self.processes() if start_tick(pid) is not None and _session(pid) not in spare
            ]
            if not running:
                return
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def remove(self) -> None:
        """Kill what runs inside and delete the namespace with its links; no error when it is gone."""
        self.kill()
        # in a session of its own: Ctrl-C at the terminal is not for it
        command = ["ip", "netns", "delete", self.name]
        subprocess.run(command, capture_output=True, check=False, start_new_session=True)


def existing() -> list[Namespace]:
    """Every namespace on this machine that carries the prefix, whoever made it."""
    try:
        names = os.listdir(FOLDER)
    except OSError:
        return []
    return [Namespace(name) for name in sorted(names) if _NAME.match(name)]


def remove_all(spaces: Iterable[Namespace]) -> None:
    """Remove several, hosts before their switch or not: the order does not matter."""
    for space in spaces:
        space.remove()


def sweep() -> Sequence[Namespace]:
    """Remove what runs of this package left behind whose launcher is gone; returns what was removed."""
    stale = [space for space in existing() if space.stale]
    remove_all(stale)
    return stale
