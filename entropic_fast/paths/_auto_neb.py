"""AutoNEB: the minimum energy path between two minima of an objective."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._utils import checks
from .._utils.convergence import DivergenceError
from .._utils.devices import is_gpu
from .._utils.table import Table
from ..objective import Objective, require_objective
from ..ops.random_bits import streams as random
from ._config import AutoNEBConfig
from ._descent import Descent
from ._elastic_band import insertions
from ._losses import path_losses, saddle
from ._path import Path, linear_path
from ._state import NEBResult, NEBState

Row = dict[str, Any]

STEPS_UNREAD = 16  # on a GPU, steps per synchronization


def auto_neb(
    obj: Objective,
    a: Tensor,
    b: Tensor,
    config: AutoNEBConfig | None = None,
    *,
    train_obj: Objective | None = None,
    on_step: Callable[[int, int, Row], None] | None = None,
    on_cycle: Callable[[NEBState], None] | None = None,
    resume: NEBState | None = None,
    cuda_graphs: bool = True,
) -> NEBResult:
    """Connect two minima by a path of low loss.

    A nudged elastic band with improved tangents (Henkelman and Jonsson 2000), descended by SGD on
    minibatches, with pivots redistributed to equal arc length. Between cycles, pivots are inserted
    where the dense loss exceeds the interpolated one (Kolsbjerg et al. 2016; Draxler et al. 2018).
    In a step all pivots see the same examples, so their energies compare and share the noise. The
    same arguments give the same path: bit for bit on one machine's CPU, and to rounding on a GPU.

    The band descends `train_obj`, normalized by batch statistics as in training, plus the weight
    decay; dense evaluations are of `obj` (without weight decay), whose running statistics are
    re-estimated at each point. The path holds parameters only.

    Args:
        obj: the objective, in evaluation mode (norm="running") for models that keep statistics.
        a, b: the minima; neither moves.  # [P]
        config: settings; default, `AutoNEBConfig()`.
        train_obj: the objective that the band descends; default, `obj` or, if it keeps running
            statistics, `obj.with_norm("batch")`.
        on_step: called after each step with (steps done, total steps, the step's row of
            `NEBResult.history`).
        on_cycle: called after each cycle with a state from which a run can be resumed.
        resume: such a state; the result is that of the uninterrupted run, bit for bit on a CPU.
        cuda_graphs: on a GPU, launch the gradients of all pivots as a CUDA graph where that works.

    Raises:
        ValueError: ends that do not fit the objective or are equal; a model in half precision; a
            state of another run.
        DivergenceError: a NaN or infinite loss, gradient or pivot; `partial` is the state before
            the cycle.

    >>> def double_well(outputs, targets):
    ...     return (outputs[:, 0] ** 2 - 1) ** 2 + 4 * (outputs[:, 1] - 1 + outputs[:, 0] ** 2) ** 2
    >>> class Point(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.theta = torch.nn.Parameter(torch.zeros(2))
    ...     def forward(self, x):
    ...         return self.theta.expand(len(x), 2)
    >>> obj = Objective(Point(), double_well, (torch.zeros(1, 1), torch.zeros(1)))
    >>> config = AutoNEBConfig(pivots=5, cycles=[(60, 0.05)], momentum=0, weight_decay=0)
    >>> result = auto_neb(obj, torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0]), config)
    >>> [round(x, 2) for x in result.path.point(0.5).tolist()]  # the saddle, above the line
    [0.0, 1.0]
    """
    require_objective(obj)
    config = AutoNEBConfig() if config is None else config
    checks.instance("config", config, AutoNEBConfig)
    checks.functions(on_step=on_step, on_cycle=on_cycle)
    checks.boolean("cuda_graphs", cuda_graphs)
    if train_obj is not None:
        checks.instance("train_obj", train_obj, Objective)
    if resume is not None:
        checks.instance("resume", resume, NEBState, "give what on_cycle was called with")
    checks.single_or_double("obj", obj.dtype, "a path")
    for name, end in (("a", a), ("b", b)):
        checks.vector(name, end, obj.num_params)
    a, b = obj.point(a), obj.point(b)
    state = _start(a, b, config) if resume is None else _resumed(resume, a, b, config)
    train = _training_objective(obj, train_obj)
    if train.weight_decay and config.weight_decay:
        raise checks.invalid(
            "config.weight_decay",
            "0 for an objective with weight decay of its own",
            f"{config.weight_decay} beside {train.weight_decay}",
            "pass AutoNEBConfig(weight_decay=0)",
        )
    losses: Table | None = None
    note, graphs = "", False
    for cycle in range(state.cycle, len(config.cycles)):
        steps, lr = config.cycles[cycle]
        batch_size = None if train.coupled else config.batch_size
        batches = minibatches(train.num_examples, batch_size, config.seed, cycle, train.device)
        descent = Descent(train, state.pivots, lr, config, cuda_graphs)
        with contextlib.closing(descent):
            rows = _run_cycle(descent, batches, state, on_step)
        path, note = Path(descent.pivots), descent.note
        graphs = graphs or descent.graphs
        with warnings.catch_warnings():  # the last evaluation warns
            if cycle + 1 < len(config.cycles):
                warnings.filterwarnings("ignore", "path_losses: the loss is not finite")
            losses = _dense(obj, path, config)
        inserted: list[float] = []
        if cycle + 1 < len(config.cycles):
            threshold, room = config.insert_threshold, config.max_pivots - path.num_pivots
            dense = losses["s"], losses["loss"], losses["is_pivot"]
            inserted = insertions(*dense, threshold, room)
        summary = {
            "cycle": cycle,
            "steps": steps,
            "lr": lr,
            "pivots": path.num_pivots,
            "max_loss": float(losses["loss"].max()),
            "length": path.length,
            "inserted": len(inserted),
        }
        state = NEBState(
            cycle + 1,
            _with_points(path, inserted),
            Table.from_rows([*state.history.rows(), *rows]),
            Table.from_rows([*state.cycles.rows(), summary]),
            config,
        )
        if on_cycle is not None:
            on_cycle(state)
    path = Path(state.pivots)
    losses = _dense(obj, path, config) if losses is None else losses
    notes = (note,) if note else ()
    return NEBResult(path, losses, state.history, state.cycles, saddle(losses), notes, graphs)


def minibatches(
    count: int, batch_size: int | None, seed: int, cycle: int, device: torch.device | None = None
) -> Iterator[Tensor | None]:
    """Indices [batch_size] of the examples of each step, a pure function of the arguments.

    Each pass over the data is a new random order, cut into full batches; None stands for all
    examples.
    """
    key = random.fold_in(seed, "neb", cycle)
    epoch = 0
    while True:
        if batch_size is None or batch_size >= count:
            yield None
            continue
        order = random.permutation(count, key, stream=epoch, device=device)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]
        epoch += 1


def _run_cycle(
    descent: Descent,
    batches: Iterator[Tensor | None],
    state: NEBState,
    on_step: Callable[[int, int, Row], None] | None,
) -> list[Row]:
    """The steps of the state's cycle; one row of `NEBResult.history` per step."""
    config, cycle = state.config, state.cycle
    steps, lr = config.cycles[cycle]
    done = sum(n for n, _ in config.cycles[:cycle])
    # On a GPU the facts of so many steps are read at once, unless a callback needs each.
    every = STEPS_UNREAD if is_gpu(descent.pivots.device) and on_step is None else 1
    rows: list[Row] = []
    unread: list[Tensor] = []
    for step in range(steps):
        descent.step(next(batches))
        unread.append(descent.facts)
        if len(unread) < every and step + 1 < steps:
            continue
        read = torch.stack(unread).tolist() if len(unread) > 1 else [unread[0].tolist()]
        unread.clear()
        for facts in read:
            where = f"step {len(rows)} of cycle {cycle} (learning rate {lr:g})"
            count = (len(facts) - 4) // 2
            _require_finite(facts[4 : 4 + count], where, "loss", state)
            _require_finite(facts[4 + count :], where, "norm", state)
            named = zip(("mean_loss", "max_loss", "force", "length"), facts[:4], strict=True)
            row = {"cycle": cycle, "step": len(rows), "lr": lr, "pivots": count, **dict(named)}
            rows.append(row)
            if on_step is not None:
                on_step(done + len(rows), config.steps, row)
    return rows


def _training_objective(obj: Objective, train_obj: Objective | None) -> Objective:
    if train_obj is None:
        return obj.with_norm("batch") if obj.has_running_statistics else obj
    want = (obj.num_params, obj.dtype, obj.device)
    got = (train_obj.num_params, train_obj.dtype, train_obj.device)
    if got != want:
        raise checks.invalid(
            "train_obj",
            "an objective of {} parameters, {} on {}, as obj".format(*want),
            "{} parameters, {} on {}".format(*got),
            "build both from one model",
        )
    return train_obj


def _start(a: Tensor, b: Tensor, config: AutoNEBConfig) -> NEBState:
    line = linear_path(a, b, config.pivots)
    return NEBState(0, line.pivots, Table({}), Table({}), config)


def _resumed(state: NEBState, a: Tensor, b: Tensor, config: AutoNEBConfig) -> NEBState:
    if state.config != config:
        raise checks.invalid(
            "resume",
            f"a state of a run with {config}",
            f"one with {state.config}",
            "resume with the same settings, or start again",
        )
    pivots = state.pivots.to(a.device)
    if pivots.dtype != a.dtype or not (torch.equal(pivots[0], a) and torch.equal(pivots[-1], b)):
        raise checks.invalid(
            "resume",
            "a state between the same ends a and b",
            "one between other ends",
            "resume with the same minima, or start again",
        )
    return NEBState(state.cycle, pivots, state.history, state.cycles, config)


def _dense(obj: Objective, path: Path, config: AutoNEBConfig) -> Table:
    return path_losses(
        obj, path, config.eval_points, recalibration_examples=config.recalibration_examples
    )


def _with_points(path: Path, s: list[float]) -> Tensor:
    """The pivots and the path's points at `s`, in order.  # [M + len(s), P]"""
    positions = torch.cat((path.positions, path.positions.new_tensor(s)))
    extra = path.point(path.positions.new_tensor(s))
    return torch.cat((path.pivots, extra))[torch.argsort(positions, stable=True)]


def _require_finite(values: list[float], where: str, what: str, state: NEBState) -> None:
    for pivot, value in enumerate(values):
        if not math.isfinite(value):
            raise DivergenceError(
                f"pivot {pivot} of {len(values)}: expected a finite {what}, got "
                f"{value} at {where}; lower the learning rate, or check the ends",
                state,
            )
