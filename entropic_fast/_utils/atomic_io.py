"""Files written atomically: text, JSON, and weights as safetensors with a JSON manifest.

A file is written beside its place, flushed to disk and renamed. Weights are never pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor


class DamagedFileError(ValueError):
    """A stored file that is truncated, changed or not of the kind expected."""


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file
        raise


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` for text, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON document, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON document; a DamagedFileError if it is not valid."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{path}: expected a JSON document, got one that does not parse ({error}); "
            "delete it and run the same command again"
        ) from error


def write_sealed(path: str | Path, value: Mapping[str, Any]) -> None:
    """`write_json` for an object, with the hash of its content as a last key, "sha256"."""
    write_json(path, {**value, SEAL: _seal(path, value)})


def read_sealed(path: str | Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote, without the hash; a DamagedFileError if it was changed."""
    document = read_json(path)
    intact = isinstance(document, dict) and SEAL in document
    try:
        intact = intact and document.pop(SEAL) == _seal(path, document)
    except RecursionError:  # deeper than anything that was written
        intact = False
    if not intact:
        raise DamagedFileError(
            f"{path}: expected the content recorded when it was written, got another; the file is "
            "truncated or changed: restore it, or delete it and run the same command again"
        )
    return dict(document)


SEAL = "sha256"


def _seal(path: str | Path, value: Mapping[str, Any]) -> str:
    # The name too, so that one document cannot stand for another.
    return sha256(json.dumps([Path(path).name, value]).encode())


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> None:
    """Write tensors to `path` (safetensors) and `manifest` beside it (`.json`).

    The manifest has the SHA-256 of the tensor file and is written last: a tensor file without it
    was never finished.
    """
    path = Path(path)
    data = safetensors.torch.save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    )
    write_bytes(path, data)
    write_json(path.with_suffix(".json"), {**manifest, "sha256": sha256(data)})


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors and the manifest.

    Raises:
        FileNotFoundError: the file or its manifest is missing.
        DamagedFileError: content that does not match its hash, or is not safetensors.
    """
    path = Path(path)
    manifest = read_json(path.with_suffix(".json"))
    data = path.read_bytes()
    advice = "delete it and run the same command again"
    if not isinstance(manifest, dict) or manifest.get("sha256") != sha256(data):
        raise DamagedFileError(
            f"{path}: expected the content its manifest records (SHA-256), got another "
            f"({len(data)} bytes); the file is truncated or changed: {advice}"
        )
    try:
        return safetensors.torch.load(data), manifest
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path}: not a safetensors file ({error}); {advice}") from error
