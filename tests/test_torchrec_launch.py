"""The launcher: who is who, what failures say, and that no process outlives a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from codegen.runtime.launch import LaunchError, launch, resolve
from ir.errors import InputError

HERE = Path(__file__).parent
TARGETS = str(HERE / "launch_targets.py")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_ranks_know_their_place_and_hosts_are_emulated() -> None:
    messages: dict[int, Any] = {}
    answers = launch(f"{TARGETS}:place", 4, host_size=2, on_message=messages.__setitem__)
    assert [a["RANK"] for a in answers] == [0, 1, 2, 3]
    assert [a["LOCAL_RANK"] for a in answers] == [0, 1, 0, 1]
    assert {(a["WORLD_SIZE"], a["LOCAL_WORLD_SIZE"], a["sum"]) for a in answers} == {(4, 2, 4.0)}
    pids = {message["pid"] for message in messages.values()}
    assert len(pids) == 4
    assert os.getpid() not in pids
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"^rank 1 failed: ValueError: table 'x' is broken$"),
        ("refuse", r"^rank 1 failed: table 'x' is unusable; mend it$"),
        ("die", "rank 1 failed: the process ended by signal SIGKILL"),
        ("hang", "did not finish within 6 s"),
    ],
)
def test_failures_name_the_rank_and_leave_nothing_behind(how: str, message: str) -> None:
    pids: list[int] = []
    start = time.monotonic()
    with pytest.raises(LaunchError, match=message):
        launch(
            f"{TARGETS}:misbehave",
            3,
            {"how": how},
            timeout=6.0 if how == "hang" else 60.0,
            on_message=lambda rank, pid: pids.append(pid),
        )
    assert time.monotonic() - start < 30
    assert len(pids) == 3
    assert not any(alive(pid) for pid in pids)


SCRIPT = f"""
import sys
sys.path.insert(0, {str(HERE.parent)!r})
from codegen.runtime.launch import launch
if __name__ == "__main__":
    launch({TARGETS + ":misbehave"!r}, 2, {{"how": "hang"}}, on_message=lambda rank, pid: print(pid, flush=True))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_launcher(how: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C, and a launcher that is killed without a chance to tidy up."""
    script = tmp_path / "start.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(how)
    process.wait(timeout=30)
    for _ in range(100):
        if not any(alive(pid) for pid in pids):
            break
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)
    assert process.returncode != 0
    process.communicate()


def test_unusable_input() -> None:
    with pytest.raises(InputError, match="3 processes cannot form hosts of 2"):
        launch(f"{TARGETS}:place", 3, host_size=2)
    with pytest.raises(InputError, match="must be JSON data"):
        launch(f"{TARGETS}:place", 1, {"x": object()})
    with pytest.raises(InputError, match=r"write module:function or file\.py:function"):
        resolve("nothing")
    with pytest.raises(InputError, match=r"has no 'plac'.*did you mean 'place'"):
        resolve(f"{TARGETS}:plac")
    with pytest.raises(InputError, match=r"model file nowhere\.py does not exist"):
        resolve("nowhere.py:build")
    with pytest.raises(InputError, match=r"cannot import no\.such\.module"):
        resolve("no.such.module:build")
