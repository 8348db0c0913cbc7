"""Tasks of figures 5, 6 and 7: branches of a training, and the lines between them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from ...._utils import checks
from ...._utils.convergence import held
from ...._utils.table import Table
from ....training import Trained
from ....training.lmc import LineSettings, Trunk, branch, measure_line, summarize
from ... import _inputs
from ..._executor import Progress, Task
from ..._run_folder import RunFolder
from ..._sections import Config, Distinct, Natural, Section, StraightLine
from ..fig2 import Curvature


class LMC(Section):
    """Linear mode connectivity: branch at epoch k with two data orders, for several k.

    An empty `model` or `data`, and 0 for `epochs` or `batch_size`, stand for those of the minima.
    Without seeds there is no such figure.
    """

    toml = "lmc"
    model: str = ""
    data: str = ""
    epochs: Natural = 0
    batch_size: Natural = 0
    branch_epochs: Distinct[Natural] = (0, 1, 2, 4, 8, 16)
    seeds: Distinct[Natural] = (0,)
    points: Annotated[int, Field(ge=3)] = 11

    def check(self, config: Config) -> None:
        """Branches begin before training ends."""
        epochs = self.epochs or config.train.epochs
        if self.seeds and max(self.branch_epochs) > epochs:
            raise checks.invalid(
                f"{self.toml}.branch_epochs",
                f"at most {epochs} epochs",
                checks.shown([*self.branch_epochs]),
            )

    def networks(self) -> list[tuple[str, str]]:
        """The section's own network and images."""
        return [(self.model, self.data)] if self.seeds else []


def tasks(run: RunFolder, section: type[LMC] = LMC) -> list[Task]:
    """One trunk per seed, and one task for every epoch k at which it branches."""
    lmc = run.config[section]
    epochs = lmc.epochs or run.config.train.epochs
    examples = _inputs.training_examples(run)
    found = []
    for seed in lmc.seeds:
        trunk = f"{section.toml}/s{seed}-trunk"
        longest = max(lmc.branch_epochs) * examples
        found.append(Task(trunk, train_trunk, (section, seed), cost=longest))
        for k in lmc.branch_epochs:
            cost = 2.0 * (epochs - k) * examples + _inputs.curvature_work(run, 10 * lmc.points)
            name = f"{section.toml}/s{seed}-k{k}"
            found.append(Task(name, measure, (section, seed, k), (trunk,), cost))
    return found


def train_trunk(
    run: RunFolder, progress: Progress, section: type[LMC], seed: int
) -> dict[str, Any]:
    """Train to the last branching epoch and keep the network and momentum at each."""
    lmc = run.config[section]
    training, _ = _inputs.images(run, lmc.data)
    config = _inputs.recipe(run, lmc.epochs, lmc.batch_size)
    last = max(lmc.branch_epochs)
    trunk = Trunk(
        lambda: _inputs.network(run, lmc.model, lmc.data),
        training,
        config,
        seed,
        lambda _, done, __: progress(done / max(1, last)),
    )
    return {f"k{k}": _pack(trunk.at(k)) for k in sorted(lmc.branch_epochs)}


def measure(
    run: RunFolder, progress: Progress, section: type[LMC], seed: int, k: int
) -> dict[str, Any]:
    """Finish two branches and measure the line between them; figure 8's ends are kept."""
    lmc = run.config[section]
    training, test = _inputs.images(run, lmc.data)
    config = _inputs.recipe(run, lmc.epochs, lmc.batch_size)
    network = _inputs.network(run, lmc.model, lmc.data)
    start = _unpack(run.tensors(f"{section.toml}/s{seed}-trunk", f"k{k}"), network, k)
    share = {"branch 1": (0.0, 0.4), "branch 2": (0.4, 0.4), "line": (0.8, 0.2)}

    def advance(what: str, done: int, total: int) -> None:
        first, part = share[what]
        progress(first + part * done / total)

    a, b = (
        branch(start, training, config, number, seed=seed, progress=advance) for number in (1, 2)
    )
    settings = LineSettings(
        points=lmc.points,
        curvature_examples=run.config.data.curvature_examples or None,
        tol=run.config[Curvature].tol,
    )
    with held():  # the table says what is not converged
        line = measure_line(a, b, training, settings, eval_data=test, seed=seed, progress=advance)
    rows = line.num_rows
    found: dict[str, Any] = {"line": Table({"seed": [seed] * rows, "k": [k] * rows, **line})}
    if section is LMC and k == straight_line_epoch(run):
        found["branch1"], found["branch2"] = dict(a.state_dict()), dict(b.state_dict())
    return found


def straight_line_epoch(run: RunFolder) -> int:
    """The branching epoch of the line of figure 8."""
    epoch, branches = run.config[StraightLine].epoch, run.config[LMC].branch_epochs
    return min((k for k in branches if k >= epoch >= 0), default=max(branches))


def collect(run: RunFolder, section: type[LMC] = LMC, name: str = "fig5") -> dict[str, Table]:
    """The lines, and the instability for each seed and k."""
    lmc = run.config[section]
    lines = {
        seed: Table.concatenated(
            run.table(f"{section.toml}/s{seed}-k{k}", "line") for k in lmc.branch_epochs
        )
        for seed in lmc.seeds
    }
    summaries = [
        {"seed": seed, **row} for seed, rows in lines.items() for row in summarize(rows).rows()
    ]
    return {
        f"{name}_lines": Table.concatenated(lines.values()),
        f"{name}_instability": Table.from_rows(summaries),
    }


def _pack(state: Trained) -> dict[str, Tensor]:
    named = [
        *((f"parameter:{n}", p) for n, p in state.model.named_parameters()),
        *((f"buffer:{n}", b) for n, b in state.model.named_buffers()),
        *((f"momentum:{n}", m) for n, m in state.optimizer_state.items()),
    ]
    return {name: value.detach().clone() for name, value in named}


def _unpack(tensors: dict[str, Tensor], model: nn.Module, epoch: int) -> Trained:
    kinds: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}, "momentum": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition(":")
        kinds[kind][rest] = value
    model.load_state_dict({**kinds["parameter"], **kinds["buffer"]})
    return Trained(model, epoch, kinds["momentum"], Table({}))
