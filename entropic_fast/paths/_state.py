"""Result of AutoNEB, and the state from which it resumes."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._utils import atomic_io as store
from .._utils import notebook as display
from .._utils import plot_style
from .._utils.table import Table
from ._config import AutoNEBConfig
from ._losses import Saddle, barrier
from ._path import Path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMAT = "entropic_fast.neb-state/1"


@dataclass(frozen=True)
class NEBResult:
    """A minimum energy path.

    Attributes:
        path: the path found.
        losses: dense evaluation of the path by `path_losses`: s, loss, is_pivot and, for a
            classifier, accuracy.
        history: one row per step: cycle, step, lr, pivots, mean_loss and max_loss of the interior
            pivots on the step's examples, force (largest norm of a pivot's gradient across the
            path, with weight decay) and length of the path after the step.
        cycles: one row per cycle: cycle, steps, lr, pivots, and at its end max_loss (dense), length
            and inserted (number of pivots).
        saddle: the highest point of `losses`, interpolated.
        notes: on a GPU, why CUDA graphs were not used; else empty.
        graphs: whether CUDA graphs were used.
    """

    path: Path
    losses: Table
    history: Table
    cycles: Table
    saddle: Saddle
    notes: tuple[str, ...] = ()
    graphs: bool = False

    def _repr_html_(self) -> str:
        rise, (low, high) = barrier(self.losses), self.saddle.bracket
        rows = [
            ("pivots", self.path.num_pivots),
            ("length", self.path.length),
            ("steps", self.history.num_rows),
            ("saddle's position", f"{self.saddle.position:.4g}, between {low:.4g} and {high:.4g}"),
            ("saddle's loss", self.saddle.loss),
            ("barrier over the higher end", rise.over_max),
        ]
        return display.facts(rows) + display.plot(self._draw)

    def _draw(self, ax: Axes) -> None:
        s, loss, pivot = (self.losses[name] for name in ("s", "loss", "is_pivot"))
        ax.plot(s, loss, color=plot_style.COLORS[0])
        ax.plot(s[pivot], loss[pivot], "o", ms=3, color=plot_style.COLORS[0], label="pivots")
        top = [self.saddle.position], [self.saddle.loss]
        ax.plot(*top, "^", color=plot_style.COLORS[1], label="saddle")
        ax.set_xlabel("relative distance along the path")
        ax.set_ylabel("loss")
        ax.legend(frameon=False)


@dataclass(frozen=True)
class NEBState:
    """An unfinished AutoNEB run, between two cycles: give it to `auto_neb(resume=...)`.

    Attributes:
        cycle: cycles done.
        pivots: where the next cycle starts.  # [M, P]
        history, cycles: as in `NEBResult`, so far.
        config: the settings of the run.
    """

    cycle: int
    pivots: Tensor
    history: Table
    cycles: Table
    config: AutoNEBConfig

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the pivots as safetensors, and the rest as the JSON manifest beside them."""
        manifest = {
            "format": _FORMAT,
            "cycle": self.cycle,
            "config": config_to_json(self.config),
            "history": {name: self.history[name].tolist() for name in self.history},
            "cycles": {name: self.cycles[name].tolist() for name in self.cycles},
        }
        store.save_tensors(os.fspath(file), {"pivots": self.pivots}, manifest)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> NEBState:
        """Read what `save` wrote; every number comes back exactly.

        Raises:
            FileNotFoundError: the file or its manifest is missing.
            DamagedFileError: truncated or changed, or not such a state.
        """
        file = os.fspath(file)
        tensors, manifest = store.load_tensors(file)
        try:
            if manifest["format"] != _FORMAT:
                raise ValueError(f"format {manifest['format']!r}")
            return cls(
                manifest["cycle"],
                tensors["pivots"],
                Table(manifest["history"]),
                Table(manifest["cycles"]),
                config_from_json(manifest["config"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise store.DamagedFileError(
                f"{file}: expected the state of an AutoNEB run ({_FORMAT}), got one that does not "
                f"parse ({error!r}); delete it and run the same command again"
            ) from error


def config_to_json(config: AutoNEBConfig) -> dict[str, Any]:
    """The settings as JSON values; infinite springs are the word "inf"."""
    values = dataclasses.asdict(config)
    values["springs"] = "inf" if config.springs == math.inf else config.springs
    values["cycles"] = [list(cycle) for cycle in config.cycles]
    return values


def config_from_json(values: dict[str, Any]) -> AutoNEBConfig:
    return AutoNEBConfig(**{**values, "springs": float(values["springs"])})
