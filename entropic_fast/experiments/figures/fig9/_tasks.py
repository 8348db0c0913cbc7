"""Tasks of figure 9: the bad minimum, the path to it, curvature and dynamics there."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator

from ...._utils.table import Table
from ....objective import Objective
from ....ops.random_bits import streams as random
from ....paths import Path
from ....training import TrainConfig, evaluate, train
from ....training.data import ImageData
from ....training.minima import load_minimum, save_minimum, training_manifest
from ... import _inputs
from ..._executor import Progress, Task
from ..._run_folder import RunFolder
from ..._sections import Count, Distinct, Natural, Number, Positive, Section, in_unit_interval
from .. import _relaxation_runs as relaxation
from .. import fig2
from ..fig2 import Curvature

NAME = "normal-bad"
MINIMUM, PATH, CURVATURE, RELAX = (
    "bad-minimum/minimum",
    "bad-minimum/path",
    "bad-minimum/curvature",
    "bad-minimum/relax",
)


class BadMinimum(Section):
    """A minimum that fits its examples and generalizes badly, and the path to it (figure 9).

    The last `corrupted_labels` training images, in the data set's order, get wrong labels. A
    network is trained on all images for `epochs`, with neither augmentation nor weight decay. The
    path to it begins at the first minimum; its loss, curvature and dynamics are those on the
    images that kept their labels. With corrupted_labels = 0 there is no such figure.
    """

    toml = "bad_minimum"
    corrupted_labels: Natural = 0
    epochs: Count = 200
    batch_size: Count = 64
    lr: Positive = 0.05
    starts: Annotated[Distinct[Number], AfterValidator(in_unit_interval)] = (0.5, 0.93, 0.99)
    relax_lr: Positive = 0.1
    relax_batch_size: Count = 4
    steps: Count = 1500
    replicas: Count = 16

    def images_needed(self) -> dict[str, int]:
        """Some images keep their labels."""
        return {"corrupted_labels": self.corrupted_labels + bool(self.corrupted_labels)}


def tasks(run: RunFolder) -> list[Task]:
    """The bad minimum, the path to it, and curvature and dynamics there."""
    section, path = run.config[BadMinimum], run.config.path
    if not section.corrupted_labels:
        return []
    steps = sum(path.steps) * path.pivots * path.batch_size
    work = _inputs.curvature_work(run, path.pivots * (run.config[Curvature].probes + 10))
    updates = len(section.starts) * section.replicas * section.steps
    normal = f"train/{run.config.train.seeds[0]}"
    examples = section.epochs * _inputs.training_examples(run)
    return [
        Task(MINIMUM, train_bad, cost=examples),
        Task(PATH, find_path, (), (normal, MINIMUM), steps),
        Task(CURVATURE, measure, (), (PATH,), work),
        Task(RELAX, relax_there, (), (PATH,), float(updates * (section.relax_batch_size + 8))),
    ]


def _parts(run: RunFolder) -> tuple[ImageData, ImageData]:
    """The images that keep their labels, and the others with wrong ones."""
    training, _ = _inputs.images(run)
    corrupted = run.config[BadMinimum].corrupted_labels
    kept, rest = training.order[:-corrupted], training.order[-corrupted:]
    wrong = training.subset(rest)
    draw = random.uniform((corrupted,), random.fold_in(run.config.seed, "attack"))
    shift = 1 + (draw * (training.num_classes - 1)).long().clamp(max=training.num_classes - 2)
    labels = (wrong.labels + shift.to(wrong.labels)) % training.num_classes
    return training.subset(kept), replace(wrong, labels=labels)


def train_bad(run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Train on both parts from a fresh start."""
    section, seed = run.config[BadMinimum], run.config.train.seeds[0]
    kept, wrong = _parts(run)
    both = replace(
        kept,
        images=torch.cat([kept.images, wrong.images]),
        labels=torch.cat([kept.labels, wrong.labels]),
    )
    config = TrainConfig(
        lr=section.lr,
        momentum=run.config.train.momentum,
        weight_decay=0.0,
        batch_size=section.batch_size,
        epochs=section.epochs,
        augment=False,
    )
    model = _inputs.network(run)
    train(model, both, config, seed=seed, on_epoch=lambda r: progress(r.epoch / r.epochs))
    metrics = {"corrupted_labels": section.corrupted_labels, **_metrics(run, model, wrong)}
    manifest = training_manifest(run.config.model.name, both, config, seed, metrics=metrics)
    save_minimum(run.task_folder(MINIMUM) / "minimum.safetensors", model, manifest)
    return {"metrics": metrics}


def _metrics(run: RunFolder, model: torch.nn.Module, wrong: ImageData) -> dict[str, float]:
    kept, _ = _parts(run)
    named = {"kept": kept, "corrupted": wrong, "test": _inputs.images(run)[1]}
    found: dict[str, float] = {"test_images": len(named["test"])}
    for name, data in named.items():
        loss, accuracy = evaluate(model, data)
        found |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
    return found


def _objective(run: RunFolder) -> Objective:
    """The loss on images that kept their labels, at the normal minimum."""
    model = _inputs.minimum(run, run.config.train.seeds[0])
    kept, _ = _parts(run)
    return _inputs.objective(run, model, kept)


def find_path(run: RunFolder, progress: Progress) -> dict[str, Any]:
    """AutoNEB from the first minimum to the bad one; loss and accuracy of both."""
    objective, model = _objective(run), _inputs.network(run)
    load_minimum(run.task_folder(MINIMUM) / "minimum.safetensors", model)
    end = Objective(model, "cross_entropy", objective.tensors()).parameters_vector()
    _, wrong = _parts(run)
    normal = _inputs.minimum(run, run.config.train.seeds[0])
    minima = [
        {"minimum": name, **_metrics(run, network, wrong)}
        for name, network in (("normal", normal), ("bad", model))
    ]
    found = _inputs.connect(run, progress, objective, end, run.config.seed)
    return {**found, "minima": Table.from_rows(minima)}


def _path(run: RunFolder) -> Path:
    return Path(run.tensors(PATH, "pivots")["pivots"])


def measure(run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Curvature at every pivot."""
    kept, _ = _parts(run)
    return {"profile": fig2.profile(run, progress, NAME, _path(run), _objective(run), kept)}


def relax_there(run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Projected SGD from several starts."""
    section = run.config[BadMinimum]
    setup = relaxation.relaxation_setup(
        run, _objective(run), _path(run), section.steps, section.replicas
    )
    settings = [(s, section.relax_lr) for s in section.starts for _ in range(section.replicas)]
    size = section.relax_batch_size
    return {"trajectory": relaxation.along(run, progress, RELAX, "9", setup, settings, size)}


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    table = relaxation.collect(run, ["relax"], stage="bad-minimum")
    losses = fig2.both_losses(run, PATH, NAME)
    return {
        "fig9_minima": run.table(PATH, "minima"),
        "fig9_loss": Table({name: losses[name] for name in ("kind", "s", "loss")}),
        "fig9_curvature": run.table(CURVATURE, "profile"),
        "fig9_relaxation": table,
        "fig9_bands": relaxation.bands(table),
    }
