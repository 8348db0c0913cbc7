"""Checkpoints of a run: one file, replaced atomically, so that a kill leaves it intact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..._utils import atomic_io as store

_FORMAT = "entropic_fast.checkpoint/1"


class CheckpointMismatchError(ValueError):
    """A checkpoint of other settings, data or path; the message names what differs."""


class Checkpoint:
    """State and settings of a run in one safetensors file, replaced atomically.

    The settings are in its header, because a second file could be out of step.
    """

    def __init__(self, file: str | Path, settings: Mapping[str, Any]) -> None:
        self.file = Path(file)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        header = {"format": _FORMAT, "settings": json.dumps(self.settings)}
        store.write_bytes(self.file, safetensors.torch.save(tensors, metadata=header))

    def load(self) -> dict[str, Tensor] | None:
        """The state, or None if there is no file."""
        if not self.file.exists():
            return None
        try:
            with safetensors.safe_open(str(self.file), framework="pt") as opened:
                header = opened.metadata() or {}
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            stored = json.loads(header["settings"])
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']}")
        except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
            raise store.DamagedFileError(
                f"{self.file}: expected a checkpoint of relax, got another file ({error!r}); "
                "delete it and run the same command again"
            ) from error
        differ = [
            f"{key} {_short(stored.get(key))} (asked: {_short(self.settings.get(key))})"
            for key in sorted({*stored, *self.settings})
            if stored.get(key) != self.settings.get(key)
        ]
        if differ:
            raise CheckpointMismatchError(
                f"checkpoint: expected one of these settings, got {self.file} of "
                + ", ".join(differ)
                + "; delete it, name another file, or ask for the settings it is of"
            )
        return state


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def fingerprint(*tensors: Tensor) -> str:
    """A hash of tensors' shapes, dtypes and content.

    >>> fingerprint(torch.ones(2)) == fingerprint(torch.ones(2).double())
    False
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
