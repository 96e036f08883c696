"""Builds and loads C files of this folder, or says why it cannot; nothing depends on them for correctness.

``kernels.c`` holds the quantizers, ``pages.c`` the page files and caches of tiered tables,
``codecs.c`` the error-bounded codecs.

The first use on a machine compiles one C file with the system's compiler into a per-user cache; later
processes load it from there. No compiler, no writable cache, or ``SHARDWRIGHT_NATIVE=0`` mean that
:func:`load` returns None and callers take the torch (or numpy) path, which gives the same bits.

* The file's name carries a digest of the source, the compiler, the flags and the processor, so that a home
  directory shared by different machines never mixes their code.
* It is written under a temporary name and renamed, so that processes which build at the same time each see
  either no file or a whole one.
* The cache folder must belong to the user and be writable by nobody else, since what lies in it is run.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
ABI_VERSION = 4  # of kernels.c; a library that answers otherwise is not used
COMPILE_TIMEOUT = 120  # seconds; a cold compile takes about one

# Strict IEEE arithmetic: contraction to FMA would change bits. Without traps and errno loops vectorise.
# -O3 would unroll the blocks' loops first: GCC 12 then takes eight times as long and its code is slower.
_STRICT = (
    "-std=c11",
    "-O2",
    "-ftree-vectorize",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)

_log = logging.getLogger("shardwright.native")
_lock = threading.Lock()
_state: dict[str, ctypes.CDLL | str | None] = {}


def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None; :func:`reason` then says why. Thread-safe; builds at most once."""
    with _lock:
        if "library" not in _state:
            _state["library"], _state["reason"] = _load()
            if _state["library"] is None:
                _log.info("compiled quantizers are not used: %s", _state["reason"])
        library = _state["library"]
    return library if isinstance(library, ctypes.CDLL) else None


def load_file(source: Path) -> ctypes.CDLL | None:
    """The compiled form of another C file, or None. Thread-safe; builds at most once."""
    with _lock:
        if source.name not in _state:
            library, why = _load(source)
            _state[source.name] = library
            if library is None:
                _log.info("%s is not used: %s", source.name, why)
        found = _state[source.name]
    return found if isinstance(found, ctypes.CDLL) else None


def reject(why: str) -> None:
    """Stop using the library in this process (its results were found to differ)."""
    with _lock:
        _state["library"], _state["reason"] = None, why
    _log.warning("compiled quantizers are not used: %s", why)


def reason() -> str:
    """Why there is no library, or an empty string."""
    load()
    return str(_state["reason"] or "")


def _load(source: Path | None = None) -> tuple[ctypes.CDLL | None, str]:
    source = source or SOURCE
    if os.environ.get("SHARDWRIGHT_NATIVE", "1") == "0":
        return None, "SHARDWRIGHT_NATIVE=0"
    found = (shutil.which(name) for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name)
    compiler = next((name for name in found if name), None)
    if compiler is None:
        return None, "no C compiler (cc, gcc or clang) is on PATH"
    try:
        folder = _cache_folder()
        for flags in (("-march=native",), ("-mcpu=native",), ()):
            binary = folder / f"{source.stem}-{_digest(compiler, flags, source)}.so"
            if binary.exists() or _compile(compiler, flags, binary, source):
                library = ctypes.CDLL(str(binary))
                if source != SOURCE or library.shardwright_abi() == ABI_VERSION:
                    return library, ""
    except OSError as error:
        return None, f"the kernels cannot be built or loaded: {error}"
    return None, f"{compiler} does not compile {source.name}"


def _cache_folder() -> Path:
    """The per-user cache folder, made if need be; raises OSError when it is not safe or not writable."""
    chosen = os.environ.get("SHARDWRIGHT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(chosen) if chosen else Path(base) / "shardwright"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(f"{folder} must be owned by this user and writable by no one else")
    return folder


def _processor() -> str:
    """What tells apart processors that may run different code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")  # x86 and Arm
    first = {line.split(":")[0].strip(): line for line in reversed(lines)}
    return "\n".join([platform.machine(), platform.processor(), *(first.get(key, "") for key in wanted)])


def _digest(compiler: str, flags: tuple[str, ...], source: Path) -> str:
    status = os.stat(compiler)
    parts = [
        compiler,
        str(status.st_size),
        str(status.st_mtime_ns),
        *_STRICT,
        *flags,
        sys.platform,
        _processor(),
    ]
    return hashlib.sha256(source.read_bytes() + "\0".join(parts).encode()).hexdigest()[:24]


def _compile(compiler: str, flags: tuple[str, ...], path: Path, source: Path) -> bool:
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        command = [compiler, *_STRICT, *flags, "-o", temporary, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False)
        if done.returncode:
            _log.debug("%s failed: %s", " ".join(command), done.stderr)
            return False
        os.replace(temporary, path)
        return True
    except subprocess.SubprocessError:
        return False
    finally:
        Path(temporary).unlink(missing_ok=True)
