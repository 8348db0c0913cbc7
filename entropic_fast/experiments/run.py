"""A run folder: the configuration, one folder a finished unit, figures and the report.

RUN/config.json             the effective configuration
RUN/environment.json        versions and hardware
RUN/energy.json             time and energy of every command that computed something
RUN/images.json             how many images there are, and their hashes
RUN/units/<unit>/...        what a unit computed; done.json, written last, holds the hashes
RUN/data/*.csv              the numbers behind the figures
RUN/figures/*.png, *.svg
RUN/claims.json  RUN/report.html
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import checks, store
from .config import differences, from_dict
from .sections import Config
from .unit_store import UnitStore, require_same, require_unused


class RunFolder(UnitStore):
    """Reads and writes one run's files.

    Args:
        path: the folder.
        config: the run's configuration.
        device: where units compute, "cpu" or "cuda".
    """

    def __init__(
        self, path: Path, config: Config, device: str = "cpu", data_dir: str | None = None
    ) -> None:
        super().__init__(path, device)
        self.config, self.data_dir = config, data_dir

    @classmethod
    def create(
        cls, path: str | Path, config: Config, device: str = "cpu", data_dir: str | None = None
    ) -> RunFolder:
        """Open the folder for `config`, making it if it does not exist.

        Raises:
            ValueError: the folder holds a run of another configuration (the differences are
                listed), or files that are not a run's.
            OSError: the folder cannot be written.
        """
        path = Path(path)
        if not (path / "config.json").exists():
            require_unused(path)
        run = cls(path, config, device, data_dir)
        with run.alone():
            if (path / "config.json").exists():
                require_same(path, differences(cls.open(path).config, config))
            else:
                store.write_json(path / "config.json", config.to_dict())
            store.write_json(path / "environment.json", environment(device))
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run.

        Raises:
            ValueError: not a run folder, or a damaged configuration.
        """
        path = Path(path)
        stored = path / "config.json"
        if not stored.exists():
            raise checks.fail("RUN", "a run folder (with config.json)", str(path), "check the path")
        try:
            return cls(path, from_dict(json.loads(stored.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise store.DamagedFileError(
                f"{stored}: expected a run's configuration, got a damaged one, or one of "
                f"another version ({error}); restore the file, or choose a new folder"
            ) from error

    def images(self) -> dict[str, Any] | None:
        """What `record_images` wrote; None if nothing yet."""
        file = self.path / "images.json"
        return dict(store.read_json(file)) if file.exists() else None

    def record_images(self, facts: dict[str, Any]) -> None:
        """Keep what identifies the images, or compare with what was kept.

        Raises:
            ValueError: the run was begun with other images.
        """
        with self.alone():
            recorded = self.images()
            if recorded is None:
                store.write_json(self.path / "images.json", facts)
        if recorded is not None and recorded != facts:
            raise checks.fail(
                "--data-dir",
                f"the images that {self.path} was begun with ({recorded})",
                f"others ({facts})",
                "give the same images, or another --out",
            )

    def forget(self) -> None:
        """Remove the run's own records, so that the folder can take another configuration."""
        for name in ("config.json", "environment.json", "images.json", "energy.json"):
            (self.path / name).unlink(missing_ok=True)

    def finished_units(self) -> int:
        """How many units are finished."""
        return sum(1 for _ in (self.path / "units").glob("**/done.json"))

    def add_energy(self, stage: str, seconds: float, joules: Mapping[str, float]) -> None:
        """Note what a command took that computed something."""
        file = self.path / "energy.json"
        entry = {"stage": stage, "seconds": round(seconds, 1), "joules": dict(joules)}
        with self.alone():
            known = list(store.read_json(file)) if file.exists() else []
            store.write_json(file, [*known, entry])

    def energy(self) -> list[dict[str, Any]]:
        """What `add_energy` noted, command by command."""
        file = self.path / "energy.json"
        return [dict(entry) for entry in store.read_json(file)] if file.exists() else []


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware a run is computed with."""
    import numpy
    import scipy

    from .._version import __version__

    return {
        "entropic_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
