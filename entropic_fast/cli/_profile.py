"""`entropic-fast profile`: the command line of `experiments.profile_model`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from torch import nn

from .._utils import checks
from ..experiments import _pipeline as stages
from ..objective.losses import NAMES
from ..profile import _user_code as sources
from ..profile._profile import plan_profile, profile_model
from ..profile._subject import ProfileSettings
from ..profile._weight_files import load_weights

_DEFAULT = ProfileSettings()

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
OUTPUT = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="PART",
        help="Of an output with many parts, the name or index of the tensor that the loss takes; "
        "default: logits, or the only tensor.",
    ),
]
DATA_DIR = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Where the images of --data are, or where CIFAR is downloaded to."),
]
WHOLE = Optional[int]  # noqa: UP045


def profile(
    model: MODEL,
    data: DATA,
    out: OUT,
    weights: WEIGHTS = None,
    data_dir: DATA_DIR = None,
    loss: Annotated[str, typer.Option(help=f"{', '.join(NAMES)}.")] = "cross_entropy",
    norm: Annotated[
        str, typer.Option(help="Normalization by running statistics, or each batch's: batch.")
    ] = "running",
    parameters: PARAMETERS = None,
    output: OUTPUT = None,
    examples: Annotated[WHOLE, typer.Option(help="For curvature; default 512, or all.")] = None,
    points: Annotated[int, typer.Option(help="Along the path.")] = _DEFAULT.points,
    probes: Annotated[int, typer.Option(help="Random signs for a trace.")] = _DEFAULT.probes,
    tol: Annotated[float, typer.Option(help="Of eigenvalues, relative.")] = _DEFAULT.tol,
    eigenvalues: Annotated[int, typer.Option(help="Largest at a point.")] = _DEFAULT.eigenvalues,
    density_probes: Annotated[
        int, typer.Option(help="Of the spectral density, the dearest part.")
    ] = _DEFAULT.density_probes,
    density_steps: Annotated[
        int, typer.Option(help="Lanczos steps of each.")
    ] = _DEFAULT.density_steps,
    pivots: Annotated[int, typer.Option(help="Of the path, at first.")] = _DEFAULT.pivots,
    path_steps: Annotated[int, typer.Option(help="Updates of the path.")] = _DEFAULT.path_steps,
    path_lr: Annotated[float, typer.Option(help="Its first rate.")] = _DEFAULT.path_lr,
    weight_decay: Annotated[float, typer.Option(help="Of the path.")] = _DEFAULT.weight_decay,
    replicas: Annotated[int, typer.Option(help="Relaxing at each start.")] = _DEFAULT.replicas,
    steps: Annotated[int, typer.Option(help="Updates of a replica.")] = _DEFAULT.steps,
    lr: Annotated[float, typer.Option(help="Its learning rate.")] = _DEFAULT.lr,
    batch_size: Annotated[WHOLE, typer.Option(help="Of its minibatches; default 8.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = _DEFAULT.seed,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would take on this machine, and stop.")
    ] = False,
) -> None:
    """Curvature, path and relaxation report of your own model.

    With no or one --weights: curvature at that point. With two: a minimum energy path between
    them, curvature and relaxation along it. Importing MODULE runs it, as Python does. Under
    torchrun (torchrun --nproc-per-node 4 -m entropic_fast.cli profile ...) all ranks share the
    work of each part.
    """
    asked = locals()
    names = {field.name for field in dataclasses.fields(ProfileSettings)}
    settings = ProfileSettings(**{name: asked[name] for name in names & asked.keys()})
    checks.one_of("--loss", loss, NAMES)
    checks.one_of("--norm", norm, ("running", "batch"))
    files = weights or []
    if len(files) > 2:
        raise checks.invalid("--weights", "one file, or two", str(len(files)))
    place = stages.choose_device(device)
    with torch.random.fork_rng(devices=[]):  # a factory may draw weights: the same when resumed
        torch.manual_seed(seed)
        examples_of = sources.data_from(data, data_dir, "--data")
        networks = [_network(model, file, seed) for file in files]
        networks = networks or [_network(model, None, seed)]
    common: dict[str, Any] = {
        "other": networks[1] if len(networks) > 1 else None,
        "loss": loss,
        "norm": norm,
        "settings": settings,
        "device": place,
        "parameters": parameters or None,
        "output": int(output) if output and output.isdigit() else output,
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
    network = sources.model_from(reference, "MODULE:FACTORY")
    if weights is not None:
        load_weights(network, weights)
    return network
