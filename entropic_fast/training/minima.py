"""Trained minima as files: safetensors beside a JSON manifest of their origin."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .._utils import atomic_io as store
from .._utils.checks import invalid
from .._version import __version__
from .data import ImageData

if TYPE_CHECKING:
    from ._config import TrainConfig


class MismatchError(ValueError):
    """Stored weights that belong to another model: other names, shapes or types."""


@dataclass(frozen=True)
class Minimum:
    """A trained network as stored.

    Attributes:
        parameters: by name; tied parameters once.
        buffers: by name; running statistics and the like.
        manifest: seed, data, recipe, metrics, model, versions, time.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    manifest: dict[str, Any]

    def load_into(self, model: nn.Module, source: str = "minimum") -> None:
        """Copy weights and buffers into `model`, or leave it untouched and say what differs.

        Raises:
            MismatchError: names, shapes or types that are not the model's.
        """
        pairs = (
            (self.parameters, dict(model.named_parameters())),
            (self.buffers, dict(model.named_buffers())),
        )
        differences = []
        for stored, tensors in pairs:
            differences += [f"{n} is missing" for n in tensors if n not in stored]
            differences += [f"{n} is unknown" for n in stored if n not in tensors]
            differences += [
                f"{n} is {list(stored[n].shape)} of {stored[n].dtype}, "
                f"not {list(tensors[n].shape)} of {tensors[n].dtype}"
                for n in tensors
                if n in stored
                and (stored[n].shape != tensors[n].shape or stored[n].dtype != tensors[n].dtype)
            ]
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise MismatchError(
                f"{source}: expected weights of this model ({type(model).__name__}, "
                f"{sum(p.numel() for p in model.parameters())} parameters), got those of "
                f"{self.manifest.get('model', 'another')!r}: {'; '.join(differences[:3])}{more}; "
                "build the model that the manifest names"
            )
        with torch.no_grad():
            for stored, tensors in pairs:
                for name, tensor in tensors.items():
                    tensor.copy_(stored[name])


def training_manifest(
    model_name: str,
    data: ImageData,
    config: TrainConfig,
    seed: int,
    *,
    order_seed: int | None = None,
    metrics: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The part of a minimum's manifest that describes its training."""
    return {
        "model": model_name,
        "seed": seed,
        "order_seed": seed if order_seed is None else order_seed,
        "data": {
            "name": data.name,
            "examples": len(data),
            "sha256": data.hash,
            "classes": data.num_classes,
            "shape": list(data.images.shape[1:]),
        },
        "recipe": asdict(config),
        "metrics": dict(metrics or {}),
    }


def save_minimum(path: str | Path, model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Write a model's weights and buffers (safetensors) and, beside them, a JSON manifest.

    Args:
        path: of the weights, ending in `.safetensors`; the manifest ends in `.json`.
        manifest: see `training_manifest`; versions, time and sizes are added.

    Raises:
        ValueError: a path that does not end in `.safetensors`, weights that are NaN or
            infinite, or a manifest that JSON cannot hold.
        OSError: the folder cannot be written or the disk is full; an old file is untouched.

    >>> import tempfile
    >>> from entropic_fast.training.models import build
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_minimum(f"{folder}/m.safetensors", build("digits-cnn"), {"model": "digits-cnn"})
    ...     load_minimum(f"{folder}/m.safetensors", build("digits-cnn"))["num_params"]
    14378
    """
    if Path(path).suffix != ".safetensors":
        raise invalid("path", "a name that ends in .safetensors", repr(str(path)))
    tensors = {}
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise invalid(f"{kind} {name}", "finite values", "NaN or infinity", "train again")
            tensors[f"{kind}/{name}"] = tensor.detach().clone()
    store.save_tensors(
        path,
        tensors,
        {
            **manifest,
            "kind": "entropic-fast minimum",
            "format": 1,
            "num_params": sum(p.numel() for p in model.parameters()),
            "versions": {
                "entropic_fast": __version__,
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


def read_minimum(path: str | Path) -> Minimum:
    """Read what `save_minimum` wrote, without a model.

    Raises:
        FileNotFoundError: the file or its manifest is missing.
        DamagedFileError: truncated, changed, or not a minimum.
    """
    tensors, manifest = store.load_tensors(path)
    if manifest.get("kind") != "entropic-fast minimum" or manifest.get("format") != 1:
        raise store.DamagedFileError(
            f"{path}: expected a minimum (format 1), got a file of kind "
            f"{manifest.get('kind')!r}, format {manifest.get('format')!r}; give another file"
        )
    parts: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}}
    for key, value in sorted(tensors.items()):  # the file's order differs between processes
        kind, _, name = key.partition("/")
        parts[kind][name] = value
    return Minimum(parts["parameter"], parts["buffer"], manifest)


def load_minimum(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """Load a stored minimum into `model`; returns the manifest.

    Raises:
        FileNotFoundError: the file or its manifest is missing.
        DamagedFileError: truncated, changed, or not a minimum.
        MismatchError: weights of another model; `model` is then unchanged.
    """
    minimum = read_minimum(path)
    minimum.load_into(model, str(path))
    return minimum.manifest
