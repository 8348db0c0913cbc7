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
from torch import Tensor

from .. import checks, store
from ..table import Table
from .config import Config, differences, from_dict

Output = Mapping[str, "Table | Mapping[str, Tensor] | dict[str, Any]"]


class RunFolder:
    """Reads and writes one run's files.

    Args:
        path: the folder.
        config: the run's configuration.
        device: where units compute, "cpu" or "cuda".
    """

    def __init__(
        self, path: Path, config: Config, device: str = "cpu", data_dir: str | None = None
    ) -> None:
        self.path, self.config, self.device, self.data_dir = path, config, device, data_dir

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
        stored = path / "config.json"
        if stored.exists():
            changes = differences(cls.open(path).config, config)
            if changes:
                raise checks.fail(
                    "--out",
                    "a new folder, or one of the same configuration",
                    f"{path}, which differs (stored -> asked):\n  " + "\n  ".join(changes) + "\n",
                    "choose another folder, or ask for the stored configuration",
                )
        elif path.exists() and not path.is_dir():
            raise checks.fail("--out", "a folder", f"{path}, which is a file", "choose another")
        elif path.is_dir() and any(f for f in path.iterdir() if not f.name.endswith(".part")):
            raise checks.fail(
                "--out", "a new or empty folder, or a run's", f"{path}, which holds other files"
            )
        else:
            store.write_json(stored, config.to_dict())
        run = cls(path, config, device, data_dir)
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
        recorded = self.images()
        if recorded is None:
            store.write_json(self.path / "images.json", facts)
        elif recorded != facts:
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

    def unit_folder(self, unit: str) -> Path:
        """The folder of a unit's files."""
        return self.path / "units" / unit

    def is_done(self, unit: str) -> bool:
        """Whether a unit is finished.

        Raises:
            DamagedFileError: finished, but a file is missing or changed; names the file.
        """
        folder = self.unit_folder(unit)
        if not (folder / "done.json").exists():
            return False
        record = store.read_json(folder / "done.json")
        if not isinstance(record, dict) or not {"unit", "seconds", "files"} <= record.keys():
            raise store.DamagedFileError(
                f"{folder / 'done.json'}: expected the record of a finished unit, got another file"
            )
        for name, expected in record["files"].items():
            file = folder / name
            if not file.exists() or store.sha256(file.read_bytes()) != expected:
                raise store.DamagedFileError(
                    f"{file}: expected the content recorded when it was written, got "
                    + ("another" if file.exists() else "no file")
                )
        return True

    def finish(self, unit: str, output: Output, seconds: float) -> None:
        """Store a unit's output: tables as CSV, tensors as safetensors, the rest as JSON."""
        folder = self.unit_folder(unit)
        for name, value in output.items():
            if isinstance(value, Table):
                value.to_csv(folder / f"{name}.csv")
            elif value and all(isinstance(v, Tensor) for v in value.values()):
                store.save_tensors(folder / f"{name}.safetensors", dict(value), {"unit": unit})
            else:
                store.write_json(folder / f"{name}.json", value)
        files = sorted(f for f in folder.iterdir() if f.suffix in (".csv", ".safetensors", ".json"))
        hashes = {f.name: store.sha256(f.read_bytes()) for f in files if f.name != "done.json"}
        store.write_json(
            folder / "done.json", {"unit": unit, "seconds": round(seconds, 3), "files": hashes}
        )

    def finished_units(self) -> int:
        """How many units are finished."""
        return sum(1 for _ in (self.path / "units").glob("**/done.json"))

    def add_energy(self, stage: str, seconds: float, joules: Mapping[str, float]) -> None:
        """Note what a command took that computed something."""
        file = self.path / "energy.json"
        known = list(store.read_json(file)) if file.exists() else []
        entry = {"stage": stage, "seconds": round(seconds, 1), "joules": dict(joules)}
        store.write_json(file, [*known, entry])

    def energy(self) -> list[dict[str, Any]]:
        """What `add_energy` noted, command by command."""
        file = self.path / "energy.json"
        return [dict(entry) for entry in store.read_json(file)] if file.exists() else []

    def table(self, unit: str, name: str) -> Table:
        """A table that a finished unit stored."""
        return Table.from_csv(self.unit_folder(unit) / f"{name}.csv")

    def tensors(self, unit: str, name: str) -> dict[str, Tensor]:
        """Tensors that a finished unit stored, on the run's device."""
        tensors, _ = store.load_tensors(self.unit_folder(unit) / f"{name}.safetensors")
        return {key: value.to(self.device) for key, value in tensors.items()}

    def document(self, unit: str, name: str) -> dict[str, Any]:
        """A JSON document that a finished unit stored."""
        return dict(store.read_json(self.unit_folder(unit) / f"{name}.json"))

    def stage_seconds(self) -> dict[str, float]:
        """Compute seconds by stage, summed over the finished units."""
        seconds: dict[str, float] = {}
        for done in sorted((self.path / "units").glob("**/done.json")):
            record = store.read_json(done)
            stage = record["unit"].split("/")[0]
            seconds[stage] = seconds.get(stage, 0.0) + record["seconds"]
        return seconds


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
