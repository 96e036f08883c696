"""``planner doctor``: versions, engines, and what this machine can run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

PACKAGES = (
    *("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "ortools", "networkx", "numpy"),
    *("pydantic", "click", "rich"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing this machine can or cannot do, and what would change that."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything found."""

    machine: dict[str, str]
    packages: dict[str, str]  # name -> version, "absent" when not installed
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look, change nothing; a check that fails by itself is a finding, never an exception."""
    checks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("plan", _plan),
        ("train with TorchRec", _train),
        ("CUDA", _cuda),
        ("compiled kernels", _kernels),
        ("emulated cluster", _cluster),
        ("UPMEM compiler", _upmem),
    )
    found = []
    for name, check in checks:
        try:
            found.append(check())
        except Exception as error:  # a broken installation may raise anything
            found.append(Finding(name, False, f"{type(error).__name__}: {error}", "install it again"))
    return Diagnosis(_machine(), {name: _version(name) for name in PACKAGES}, tuple(found))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _machine() -> dict[str, str]:
    from ir.units import format_bytes

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": str(usable),
        "memory": format_bytes(memory),
    }


def _plan() -> Finding:
    from planner.api import compile

    plan = compile("dlrm-small", "local-2", time_limit=1.0)
    return Finding("plan", True, f"dlrm-small on local-2, gap {100 * plan.certificate.gap:.1f} %")


def _train() -> Finding:
    name = "train with TorchRec"
    if importlib.util.find_spec("torchrec") is None:
        return Finding(name, False, "TorchRec is absent", "pip install --no-deps torchrec==1.8.0")
    import torch
    import torchrec  # noqa: F401

    if not torch.distributed.is_gloo_available():
        return Finding(name, False, "torch has no gloo", "install a build of torch with gloo")
    has = hasattr(torch.ops.fbgemm, "split_embedding_codegen_lookup_sgd_function_cpu")
    return Finding(name, has, "gloo and FBGEMM's CPU kernels" if has else "FBGEMM's CPU kernels are absent")


def _cuda() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("CUDA", False, "no device; plans for GPUs can be made, read and emitted, not run here")
    names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    return Finding("CUDA", True, f"{torch.cuda.device_count()} x {', '.join(names)}")


def _kernels() -> Finding:
    from codegen.runtime import _native

    ready = _native.load() is not None
    detail = "number formats run compiled" if ready else "number formats run in torch, same bits but slower"
    return Finding("compiled kernels", ready, detail, "" if ready else "install a C compiler (gcc or clang)")


def _cluster() -> Finding:
    name = "emulated cluster"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return Finding(name, False, f"no {' and no '.join(missing)}", "install iproute2")
    if os.geteuid() != 0:
        return Finding(name, False, "network namespaces need root", "run it as root")
    return Finding(name, True, "root, ip and tc; python -m benchmarks.cluster check tries it")


def _upmem() -> Finding:
    tool = "dpu-upmem-dpurte-clang"
    there = shutil.which(tool) is not None
    detail = f"{tool} found" if there else f"{tool} is absent; DPU kernels run in emulation with gcc"
    return Finding("UPMEM compiler", there, detail, "" if there else "install the UPMEM SDK")
