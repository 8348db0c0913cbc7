"""Energy that a computation took, where the machine counts it."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

from .._utils.devices import is_gpu

POWERCAP = Path("/sys/class/powercap")


class Energy:
    """Joules by the processor packages' counters (RAPL) and NVIDIA's, while the block runs.

    They count all that runs on the machine meanwhile. A counter that cannot be read is left out;
    one that wraps around more than once (hours, on a busy package) counts too little.

    Args:
        device: "cpu", or "cuda" for the present GPU's counter too.

    Attributes:
        joules: by counter, after the block; empty where nothing can be read.
        seconds: wall-clock time of the block.

    >>> with Energy() as energy:
    ...     pass
    >>> energy.seconds >= 0 and all(joules >= 0 for joules in energy.joules.values())
    True
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self.joules: dict[str, float] = {}
        self.seconds = 0.0

    def __enter__(self) -> Energy:
        self._start, self._before = time.monotonic(), self._read()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.monotonic() - self._start
        for name, (after, wraps_at) in self._read().items():
            if name in self._before:
                spent = after - self._before[name][0]
                self.joules[name] = spent if spent >= 0 else spent + wraps_at

    def _read(self) -> dict[str, tuple[float, float]]:
        """Joules so far and those at which the counter begins anew, by counter."""
        found = {}
        for zone in sorted(POWERCAP.glob("intel-rapl:*")):
            if zone.name.count(":") > 1:  # part of a package
                continue
            try:
                name = f"{(zone / 'name').read_text().strip()} (RAPL)"
                now, most = (
                    int((zone / file).read_text()) / 1e6
                    for file in ("energy_uj", "max_energy_range_uj")
                )
            except (OSError, ValueError):  # only root may read it on many machines
                continue
            found[name] = (now, most)
        if is_gpu(self._device):
            found |= _gpu()
        return found


def _gpu() -> dict[str, tuple[float, float]]:
    try:
        nvml: Any = importlib.import_module("pynvml")
        import torch

        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        return {"GPU (NVML)": (nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)}
    except Exception:  # no library, no permission, or a GPU without a counter
        return {}
