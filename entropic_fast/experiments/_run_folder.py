"""A run folder: the configuration, one folder per finished task, figures and the report.

RUN/config.json             the effective configuration
RUN/environment.json        versions and hardware
RUN/images.json             the number of images, and their hashes
RUN/tasks/<task>/...        what a task computed; done.json, written last, holds the hashes
RUN/data/*.csv              the numbers behind the figures
RUN/figures/*.png, *.svg
RUN/claims.json  RUN/report.html
RUN/manifest.json           the hashes of these, written last
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .._utils import atomic_io as store
from .._utils import checks
from .._utils.devices import is_gpu
from ._config import differences, from_dict
from ._sections import Config
from ._task_store import TaskStore, require_same, require_unused


class RunFolder(TaskStore):
    """Reads and writes one run's files.

    Args:
        path: the folder.
        config: the run's configuration.
        device: where tasks compute, "cpu" or "cuda".
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
        with run.exclusive():
            if (path / "config.json").exists():
                require_same(path, differences(cls.open(path).config, config))
            else:
                store.write_sealed(path / "config.json", config.to_dict())
            store.write_sealed(path / "environment.json", environment(device))
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
            raise checks.invalid(
                "RUN", "a run folder (with config.json)", str(path), "check the path"
            )
        try:
            return cls(path, from_dict(store.read_sealed(stored)))
        except ValueError as error:
            raise store.DamagedFileError(
                f"{stored}: expected a run's configuration, got a damaged one, or one of "
                f"another version ({error}); restore the file, or choose a new folder"
            ) from error

    def images(self) -> dict[str, Any] | None:
        """What `record_images` wrote; None if nothing yet."""
        file = self.path / "images.json"
        return store.read_sealed(file) if file.exists() else None

    def record_images(self, facts: dict[str, Any]) -> None:
        """Record what identifies the images, or compare it with the record.

        Raises:
            ValueError: the run was begun with other images.
        """
        with self.exclusive():
            recorded = self.images()
            if recorded is None:
                store.write_sealed(self.path / "images.json", facts)
        if recorded is not None and recorded != facts:
            raise checks.invalid(
                "--data-dir",
                f"the images that {self.path} was begun with ({recorded})",
                f"others ({facts})",
                "give the same images, or another --out",
            )

    def discard_metadata(self) -> None:
        """Remove the run's own records, so that the folder can take another configuration."""
        for name in ("config.json", "environment.json", "images.json"):
            (self.path / name).unlink(missing_ok=True)

    def finished_tasks(self) -> int:
        """How many tasks are finished."""
        return sum(1 for _ in (self.path / "tasks").glob("**/done.json"))

    def write_manifest(self) -> None:
        """Record the hashes of the files that a report is made of, once all are written."""
        files = [f for name in ("data", "figures") for f in (self.path / name).iterdir()]
        files += [self.path / name for name in ("claims.json", "report.html")]
        hashes = {
            file.relative_to(self.path).as_posix(): store.sha256(file.read_bytes())
            for file in sorted(files)
            if not file.name.startswith(".")
        }
        store.write_sealed(self.path / MANIFEST, {"files": hashes})


def check_manifest(path: Path) -> Iterator[str]:
    """Describe the damaged files among those that `write_manifest` recorded, one line per file."""
    manifest = path / MANIFEST
    if not manifest.exists():
        return
    try:
        files = dict(store.read_sealed(manifest)["files"])
    except (store.DamagedFileError, KeyError) as error:
        yield str(error)
        return
    for name, expected in files.items():
        file = path / name
        got = "another"
        try:
            content = file.read_bytes()
        except OSError as error:
            content, got = None, error.strerror or "a file that cannot be read"
        if content is None or store.sha256(content) != expected:
            yield (
                f"{file}: expected the content recorded when it was written, got {got}; "
                f"`entropic-fast report {path}` writes it again"
            )


MANIFEST = "manifest.json"


def processor() -> str:
    """The processor's name, or its architecture if the system has no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name() if is_gpu(device) else platform.machine(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
