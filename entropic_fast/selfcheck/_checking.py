"""All checks of a machine, its facts, and advice on those that fail."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._utils import checks
from .._utils.devices import GPU_TYPES
from ..ops import backend
from . import _networks as networks
from . import _ops as ops
from . import _speeds as speeds
from ._facts import collect
from ._verdict import Check

_ISSUE = "Please attach the file that --json writes to a bug report."


@dataclass
class Report:
    """Results of `run`.

    Attributes:
        facts: `collect()`, commit, load average and devices.
        checks: all comparisons.
        notes: installed backends that fail and are skipped.
        limits, speeds: by device; empty without speeds.
        seconds: duration.
    """

    facts: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    limits: dict[str, speeds.Limits] = field(default_factory=dict)
    speeds: dict[str, list[speeds.Speed]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[Check]:
        """Comparisons that failed."""
        return [check for check in self.checks if not check.ok]

    @property
    def ok(self) -> bool:
        return not self.wrong

    def advice(self) -> list[str]:
        """What to do about the comparisons that failed."""
        found = list(dict.fromkeys(map(self._advice, self.wrong)))
        return [*found, _ISSUE] if found else []

    def _advice(self, check: Check) -> str:
        wrong = f"Backend {check.backend} is wrong on {check.device}"
        elsewhere = "" if check.device == "cpu" else 'pass device="cpu", or '
        if check.message.startswith(backend.BackendError.__name__):
            return (
                f"Backend {check.backend} is forced and cannot run everything on {check.device}: "
                f'call entropic_fast.set_backend("auto"), or unset {backend.VARIABLE}.'
            )
        if check.kind != "op":
            return (
                f"Results on {check.device} are not to be trusted: {elsewhere}see whether "
                f'entropic_fast.set_backend("reference") fixes it.'
            )
        good = self._another_backend(check.device)
        if good is None:
            return (
                f"{wrong}, and no other one is right there: {elsewhere}do not use this "
                "installation for results."
            )
        return (
            f'{wrong}: call entropic_fast.set_backend("{good}"), or set {backend.VARIABLE}={good}, '
            "until it is fixed."
        )

    def _another_backend(self, device: str) -> str | None:
        """One that can run every family on the device, and is not known to be wrong there."""
        kind = torch.device(device).type
        wrong = {c.backend for c in self.wrong if c.kind == "op" and c.device == device}
        for name in ("cpp", "triton", "reference"):
            everywhere = all(name in backend.modules_of(family) for family in backend.families())
            if name not in wrong and everywhere and backend.unusable(name, kind) is None:
                return name
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "ok": self.ok,
            "findings": [check.finding() for check in self.wrong],
            "advice": self.advice(),
            "notes": self.notes,
            "facts": self.facts,
            "checks": [check.to_dict() for check in self.checks],
            "speeds": {
                device: speeds.to_dict(self.limits[device], rows)
                for device, rows in self.speeds.items()
            },
            "seconds": self.seconds,
        }


def run(
    device: str = "auto", *, quick: bool = False, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """Check the kernels, whole calculations, and speeds: under two minutes on a CPU.

    On a GPU the first run also compiles every Triton kernel (not timed yet).

    Args:
        device: "cpu"; "cuda" for the current GPU, compared with the CPU; "auto" for the CPU and
            the GPU if there is one.
        quick: only float32 calculations, and no speeds: about ten seconds on a CPU.
        progress: called with the name of each part before it begins.

    Raises:
        ValueError: an unknown device, or no GPU.

    >>> report = run("cpu", quick=True)
    >>> report.ok, {check.backend for check in report.checks if check.kind == "op"} != set()
    (True, True)
    """
    start = time.perf_counter()
    devices = _devices(device)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts = {**collect(), "commit": _commit(), "load_average": load}
    report = Report({**facts, "devices": [str(d) for d in devices]}, notes=_skipped(devices))
    for each in devices:
        progress(f"operations on {each}")
        report.checks += ops.check_ops(each)
    progress("a small network with batch normalization")
    dtypes = (torch.float32,) if quick else (torch.float64, torch.float32)
    report.checks += networks.check_networks(devices, dtypes)
    for each in devices if not quick else []:
        progress(f"speeds on {each}")
        report.limits[str(each)], report.speeds[str(each)] = speeds.measure(each)
    report.seconds = time.perf_counter() - start
    return report


def _devices(name: str) -> list[torch.device]:
    checks.one_of("device", name, ("auto", "cpu", *sorted(GPU_TYPES)))
    there = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not there):
        return [torch.device("cpu")]
    if not there:
        raise checks.invalid("device", "a GPU that torch can use", "none", 'pass device="cpu"')
    kind = "cuda" if name == "auto" else name
    gpu = torch.device(kind, torch.cuda.current_device() if kind == "cuda" else 0)
    return [torch.device("cpu"), gpu] if name == "auto" else [gpu]


def _skipped(devices: list[torch.device]) -> list[str]:
    reasons = [
        f"{each.type}: {reason}"
        for each in devices
        for family in backend.families()
        for reason in backend.automatic(family, each.type)[2]
    ]
    return list(dict.fromkeys(reasons))


def _commit() -> str:
    """The commit of the working tree or of the installed package, or "unknown"."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
            return done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return "unknown"
    try:
        source = metadata.distribution("entropic_fast").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return "unknown"
    return str(json.loads(source or "{}").get("vcs_info", {}).get("commit_id", "unknown"))
