"""`entropic-fast profile`: the command line of `profile.profile_model`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from torch import nn

from .._utils import checks
from ..experiments import choose_device
from ..objective.losses import NAMES
from ..profile import (
    ProfileSettings,
    data_from,
    load_weights,
    model_from,
    plan_profile,
    profile_model,
)
from ._options import with_options

MODEL = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="A callable without arguments that returns an nn.Module, in a module (by name) or a "
        ".py file (by path).",
    ),
]
DATA = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        help="digits, cifar10, cifar100, a folder of train/<class>/* and test/<class>/*, a "
        ".safetensors or .pt file with inputs and targets, or MODULE:FACTORY that returns data.",
    ),
]
OUT = Annotated[Path, typer.Option(help="Folder; the same command resumes it.")]
WEIGHTS = Annotated[
    Optional[list[Path]],  # noqa: UP045 - typer reads the annotation on Python 3.10
    typer.Option(
        metavar="FILE",
        help="A .safetensors, .pt or .pth file with the model's weights. Given twice: two points, "
        "and a path between them.",
    ),
]
PARAMETERS = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        metavar="PATTERN",
        help="Only the parameters whose name, or whose module's name, matches, as 'head.*'; the "
        "others are constants. May be given several times.",
    ),
]
DATA_DIR = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Where the images of --data are, or where CIFAR is downloaded to."),
]
DEVICE = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
PLAN = Annotated[
    bool, typer.Option("--plan", help="Show what it would take on this machine, and stop.")
]


def profile(
    model: MODEL,
    data: DATA,
    out: OUT,
    weights: WEIGHTS = None,
    data_dir: DATA_DIR = None,
    parameters: PARAMETERS = None,
    device: DEVICE = "auto",
    plan: PLAN = False,
    **options: Any,
) -> None:
    """Curvature, path and relaxation report of your own model.

    With no or one --weights: curvature at that point. With two: a minimum energy path between
    them, curvature and relaxation along it. Importing MODULE runs it, as Python does. Under
    torchrun (torchrun --nproc-per-node 4 -m entropic_fast.cli profile ...) all ranks share the
    work of each part.
    """
    checks.one_of("--loss", options["loss"], NAMES)
    checks.one_of("--norm", options["norm"], ("running", "batch"))
    output = options["output"]
    index = {"output": int(output)} if output and output.isdigit() else {}
    settings = ProfileSettings(**{**options, **index})
    files = weights or []
    if len(files) > 2:
        raise checks.invalid("--weights", "one file, or two", str(len(files)))
    place = choose_device(device)
    with torch.random.fork_rng(devices=[]):  # a factory may draw weights: the same when resumed
        torch.manual_seed(settings.seed)
        examples_of = data_from(data, data_dir, "--data")
        networks = [_network(model, file, settings.seed) for file in (*files,) or (None,)]
    common: dict[str, Any] = {
        "other": networks[1] if len(networks) > 1 else None,
        "settings": settings,
        "device": place,
        "parameters": parameters or None,
    }
    if plan:
        plan_profile(networks[0], examples_of, **common)
        return
    found = profile_model(
        networks[0],
        examples_of,
        out,
        **common,
        named={"model": model, "weights": " and ".join(map(str, files)), "data": data},
        console=Console(stderr=True, emoji=False),
    )
    if not int(os.environ.get("RANK", 0)):
        found.show(Console(emoji=False))


def _network(reference: str, weights: Path | None, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = model_from(reference, "MODULE:FACTORY")
    if weights is not None:
        load_weights(network, weights)
    return network


_OPTIONAL: dict[str, Any] = {
    "output": Optional[str],  # noqa: UP045 - typer reads the annotation on Python 3.10
    "examples": Optional[int],  # noqa: UP045
    "batch_size": Optional[int],  # noqa: UP045
}


def _settings() -> Iterator[inspect.Parameter]:
    """One option per field of `ProfileSettings`, with its text in the docstring as help."""
    entries = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", ProfileSettings.__doc__ or "", re.M)
    texts = {name: " ".join(text.split()) for name, text in entries}
    texts["loss"] = f"one of {', '.join(NAMES)}."
    for field in dataclasses.fields(ProfileSettings):
        kind = _OPTIONAL.get(field.name, type(field.default))
        help_ = (text := texts.get(field.name, ""))[:1].upper() + text[1:]
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[kind, typer.Option(help=help_)],
        )


with_options(profile, _settings())
