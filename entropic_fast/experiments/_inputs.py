"""Data, models, minima and paths of a run, for the tasks of all figures."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.memory_format import overruns_channels_last
from .._utils import checks
from .._utils.table import Table
from ..objective import Objective
from ..paths import AutoNEBConfig, Path, auto_neb, linear_path, path_losses
from ..training import TrainConfig, evaluate, train
from ..training.data import ImageData, load
from ..training.minima import load_minimum, save_minimum, training_manifest
from ..training.models import build
from ._executor import Progress, Task
from ._figure import Expected, Stage
from ._run_folder import RunFolder


@lru_cache(maxsize=4)
def _load(
    name: str, data_dir: str | None, device: str, train_limit: int, test_limit: int
) -> tuple[ImageData, ImageData]:
    training, test = load(name, data_dir=data_dir, device=device)
    return training.limited(train_limit or None), test.limited(test_limit or None)


def images(run: RunFolder, name: str = "") -> tuple[ImageData, ImageData]:
    """Training and test images, on the run's device: the run's own, or others by name.

    In the run's `data_dir` a folder of the data set's name comes first.
    """
    section = run.config.data
    name, folder = name or section.name, run.data_dir
    if folder is not None and (FilePath(folder) / name).is_dir():
        folder = str(FilePath(folder) / name)
    return _load(name, folder, run.device, section.train_limit, section.test_limit)


def prepare(run: RunFolder) -> None:
    """Check the images and networks of a run before anything is computed.

    Raises:
        ValueError: images other than those the run was begun with, an unknown network, or
            settings that ask for more images than there are.
    """
    training, test = images(run)
    network(run)
    others = dict.fromkeys(pair for section in run.config.sections() for pair in section.networks())
    for model, data in others:
        network(run, model, data)
    for section in run.config.sections():
        for key, count in section.images_needed().items():
            if count > len(training):
                expected = f"at most the {len(training)} training images"
                raise checks.invalid(f"{section.toml}.{key}", expected, str(count))
    run.record_images(
        _facts(training, test)
        | {n: _facts(*images(run, n)) for _, n in others if n not in ("", training.name)}
    )


def _facts(training: ImageData, test: ImageData) -> dict[str, Any]:
    return {
        "train_examples": len(training),
        "train_sha256": training.hash,
        "test_examples": len(test),
        "test_sha256": test.hash,
    }


def training_examples(run: RunFolder) -> int:
    """The number of training images, from the run's record if it has begun."""
    recorded = run.images()
    return int(recorded["train_examples"]) if recorded else len(images(run)[0])


def network(run: RunFolder, name: str = "", data: str = "") -> nn.Module:
    """A network of the run's kind (or of the name given), for its images (or others)."""
    training, _ = images(run, data)
    model = build(
        name or run.config.model.name, training.num_classes, in_channels=training.images.shape[1]
    )
    return model.to(run.device)


def recipe(run: RunFolder, epochs: int = 0, batch_size: int = 0) -> TrainConfig:
    """The run's training recipe, with other epochs and batches if given."""
    section = run.config.train
    values = section.model_dump(exclude={"seeds"})
    sizes = {"epochs": epochs or section.epochs, "batch_size": batch_size or section.batch_size}
    return TrainConfig(**values | sizes)


def train_tasks(run: RunFolder) -> list[Task]:
    """One task per minimum. The costs of all tasks are numbers of gradients of single examples."""
    cost = run.config.train.epochs * training_examples(run)
    return [
        Task(f"train/{seed}", train_minimum, (seed,), cost=cost) for seed in run.config.train.seeds
    ]


def train_minimum(run: RunFolder, progress: Progress, seed: int) -> dict[str, Any]:
    """Train one minimum; its weights and manifest go beside the task's tables."""
    training, test = images(run)
    model, config = network(run), recipe(run)
    trained = train(
        model, training, config, seed=seed, on_epoch=lambda r: progress(r.epoch / r.epochs)
    )
    metrics = {}
    for name, data in (("train", training), ("test", test)):
        metrics[f"{name}_loss"], metrics[f"{name}_accuracy"] = evaluate(model, data)
    manifest = training_manifest(run.config.model.name, training, config, seed, metrics=metrics)
    save_minimum(run.task_folder(f"train/{seed}") / "minimum.safetensors", model, manifest)
    return {"history": trained.history, "metrics": {"seed": seed, **metrics}}


def minimum(run: RunFolder, seed: int) -> nn.Module:
    """A network with a trained minimum's weights and statistics."""
    model = network(run)
    load_minimum(run.task_folder(f"train/{seed}") / "minimum.safetensors", model)
    return model


def objective(run: RunFolder, model: nn.Module, data: ImageData | None = None) -> Objective:
    """Mean cross-entropy of a network over the run's training images, or over others.

    On a CPU images are laid out channels last, which makes convolutions and normalization faster.
    """
    inputs, targets = (data or images(run)[0]).tensors()
    if run.device == "cpu" and not any(
        isinstance(m, nn.Conv2d) and overruns_channels_last(m.weight.shape, m.stride, m.groups)
        for m in model.modules()
    ):
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return Objective(model, "cross_entropy", (inputs, targets), device=run.device)


def curvature_work(run: RunFolder, products: int) -> float:
    """Cost of Hessian-vector products, about three gradients each."""
    return 3.0 * products * (run.config.data.curvature_examples or training_examples(run))


def norm_examples(run: RunFolder) -> int | None:
    """How many examples running statistics are re-estimated on; None for all."""
    return run.config.data.norm_examples or None


def path_names(run: RunFolder) -> list[tuple[str, int, int, int]]:
    """Every path of the run: its name, its two minima, its AutoNEB seed."""
    section = run.config.path
    return [(f"{a}-{b}-s{s}", a, b, s) for a, b in section.pairs for s in section.seeds]


def load_path(run: RunFolder, name: str) -> Path:
    """A minimum energy path that is finished."""
    return Path(run.tensors(f"path/{name}", "pivots")["pivots"])


def summary(run: RunFolder) -> Table:
    """Loss and accuracy of every minimum."""
    rows = [run.document(f"train/{s}", "metrics") for s in run.config.train.seeds]
    return Table.from_rows(rows)


def path_tasks(run: RunFolder) -> list[Task]:
    """One task for each pair of minima and AutoNEB seed."""
    section = run.config.path
    work = sum(section.steps) * section.pivots * section.batch_size
    return [
        Task(f"path/{name}", find_path, (a, b, seed), (f"train/{a}", f"train/{b}"), work)
        for name, a, b, seed in path_names(run)
    ]


def find_path(run: RunFolder, progress: Progress, a: int, b: int, seed: int) -> dict[str, Any]:
    """AutoNEB between two minima, and the loss along it and along the straight line."""
    obj = objective(run, minimum(run, a))
    end = objective(run, minimum(run, b)).parameters_vector()
    return connect(run, progress, obj, end, seed)


def connect(
    run: RunFolder, progress: Progress, obj: Objective, end: Tensor, seed: int
) -> dict[str, Any]:
    """AutoNEB from the objective's own point to another, as the run is configured."""
    section = run.config.path
    config = AutoNEBConfig(
        pivots=section.pivots,
        max_pivots=section.max_pivots,
        cycles=tuple(zip(section.steps, section.lrs, strict=True)),
        batch_size=section.batch_size,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        eval_points=3,
        recalibration_examples=norm_examples(run),
        seed=seed,
    )
    return connected(progress, obj, end, config, section.dense_points)


def connected(
    progress: Progress, obj: Objective, end: Tensor, config: AutoNEBConfig, line_points: int
) -> dict[str, Any]:
    """A minimum energy path from the objective's own point to `end`, and the losses on both lines.

    Args:
        end: the other minimum.  # [P]
        line_points: points of the straight line between its ends.
    """
    start = obj.parameters_vector()
    result = auto_neb(
        obj, start, end, config, on_step=lambda done, total, _: progress(0.9 * done / total)
    )
    line = path_losses(
        obj,
        linear_path(start, end),
        line_points,
        recalibration_examples=config.recalibration_examples,
    )
    saddle = result.saddle
    return {
        "pivots": {"pivots": result.path.pivots},
        "losses": result.losses,
        "history": result.history,
        "line": line,
        "saddle": {
            "position": saddle.position,
            "bracket": list(saddle.bracket),
            "loss": saddle.loss,
            "length_over_chord": result.path.length / float((end - start).norm()),
        },
    }


STAGES = (
    Stage(
        "train",
        "Train the minima.",
        train_tasks,
        expected={"train": Expected((1.1, 1.1), lambda c: 3)},
    ),
    Stage(
        "path",
        "Find the minimum energy paths (trains what is missing).",
        path_tasks,
        needs=("train",),
        expected={"path": Expected((0.56, 1.39), lambda c: 6 * c.path.max_pivots)},
    ),
)
