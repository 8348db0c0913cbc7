"""Image folder trees `train/<class>/*`, `test/<class>/*`, decoded once and cached."""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._torch.memory_budget import available_bytes, readable
from .._utils import atomic_io as store
from .._utils.checks import invalid

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_GRAY = ("L", "1", "LA")  # Pillow's modes
_VERSION = 1  # of the cached form
Arrays = tuple[Tensor, Tensor]  # images [N, C, H, W] of uint8, labels [N] of int64


def cache_dir() -> Path:
    """Folder of decoded images and downloads, which may be deleted at any time.

    `ENTROPIC_FAST_CACHE`, else `XDG_CACHE_HOME/entropic_fast`, else `~/.cache/entropic_fast`.
    """
    chosen = os.environ.get("ENTROPIC_FAST_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "entropic_fast"


def read_tree(data_dir: str | Path) -> tuple[Arrays, Arrays, list[str]]:
    """All images of a tree: (train images, labels), (test images, labels), class names.

    Gray images keep one channel if all are gray; otherwise every image is RGB. Hidden files and
    other file types are skipped. Decoded images are cached under every file's path, size and
    modification time.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no such tree, classes that differ between train and test, a class without
            images, a link that leaves the folder, a file that is not a readable 8-bit image, or
            images of different sizes; the message names the file.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"data_dir: expected a folder of train/<class>/* and test/<class>/*, got {root}, "
            "which is no folder; check the path"
        )
    root = root.resolve()
    splits = {split: _list_split(root, split) for split in ("train", "test")}
    classes = list(splits["train"])
    if classes != list(splits["test"]):
        different = sorted(set(classes) ^ set(splits["test"]))
        raise invalid(
            "data_dir",
            "the same classes in train and test",
            f"{len(different)} in one of them only, as {different[0]!r}",
        )
    path = cache_dir() / f"{root.name}-{_digest(root, splits)[:24]}.safetensors"
    arrays = _from_cache(path) or _decode(root, splits, path)
    return (
        (arrays["train_images"], arrays["train_labels"]),
        (arrays["test_images"], arrays["test_labels"]),
        classes,
    )


def _list_split(root: Path, split: str) -> dict[str, list[Path]]:
    folder = root / split
    if not folder.is_dir():
        raise invalid("data_dir", f"a folder {split!r} of one folder a class", f"none in {root}")
    _inside(root, folder, folder.is_symlink())
    classes: dict[str, list[Path]] = {}
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        _inside(root, path, entry.is_symlink())
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        files = []
        for image in sorted(os.scandir(path), key=lambda e: e.name):
            if image.name.startswith(".") or not image.name.lower().endswith(SUFFIXES):
                continue
            _inside(root, Path(image.path), image.is_symlink())
            if image.is_file():
                files.append(Path(image.path))
        if not files:
            raise invalid(
                "data_dir",
                "at least one image in every class folder",
                f"none in {path}",
                f"images end in one of {', '.join(SUFFIXES)}",
            )
        classes[entry.name] = files
    if not classes:
        raise invalid("data_dir", "one folder a class", f"none in {folder}")
    return classes


def _inside(root: Path, path: Path, link: bool) -> None:
    if not link:
        return
    try:
        end = path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        end = Path("nowhere")
    if not end.is_relative_to(root):
        raise invalid(
            "data_dir",
            "links that stay inside the folder",
            f"{path} -> {end}",
            "replace the link by a copy",
        )


def _digest(root: Path, splits: dict[str, dict[str, list[Path]]]) -> str:
    digest = hashlib.sha256(f"{_VERSION} {root}".encode())
    for classes in splits.values():
        for files in classes.values():
            for file in files:
                status = file.stat()
                line = f"\n{file.relative_to(root)}\t{status.st_size}\t{status.st_mtime_ns}"
                digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _from_cache(path: Path) -> dict[str, Tensor] | None:
    try:
        return store.load_tensors(path)[0]
    except (OSError, store.DamagedFileError):
        return None  # absent or damaged: it is decoded and written again


def _decode(root: Path, splits: dict[str, dict[str, list[Path]]], path: Path) -> dict[str, Tensor]:
    files = [
        (f, label)
        for classes in splits.values()
        for label, members in enumerate(classes.values())
        for f in members
    ]
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        shapes = list(pool.map(_shape, [f for f, _ in files]))  # before anything is decoded
        height, width, _ = shapes[0]
        for (file, _), shape in zip(files, shapes, strict=True):
            if shape[:2] != (height, width):
                raise invalid(
                    "data_dir",
                    f"images of one size ({width} x {height}, as {files[0][0]})",
                    f"{shape[1]} x {shape[0]} in {file}",
                    "resize the images to one size first",
                )
        channels = max(shape[2] for shape in shapes)
        needed, free = len(files) * channels * height * width, available_bytes(torch.device("cpu"))
        if 2 * needed > free:  # pixels, and the two parts of them
            raise invalid(
                "data_dir",
                f"images that fit twice in the {readable(free)} free",
                f"{len(files)} of {width} x {height}, {readable(needed)}",
                "make them smaller, or take fewer",
            )
        stacked = np.empty((len(files), channels, height, width), np.uint8)

        def decode(i: int) -> None:
            stacked[i] = _read_image(files[i][0]).transpose(2, 0, 1)  # gray fills all channels

        list(pool.map(decode, range(len(files))))
    labels = torch.tensor([label for _, label in files])
    train = sum(map(len, splits["train"].values()))
    pixels = torch.from_numpy(stacked)
    arrays = {
        "train_images": pixels[:train].clone(),
        "train_labels": labels[:train].clone(),
        "test_images": pixels[train:].clone(),
        "test_labels": labels[train:].clone(),
    }
    try:
        store.save_tensors(path, arrays, {"folder": str(root), "files": len(files)})
    except OSError as error:
        warnings.warn(
            f"{path}: the decoded images could not be kept ({error}) and will be decoded again "
            "next time; set ENTROPIC_FAST_CACHE to a folder that can be written",
            RuntimeWarning,
            stacklevel=4,
        )
    return arrays


def _shape(path: Path) -> tuple[int, int, int]:
    """Height, width and channels of an image, from its header."""
    with _opened(path) as image:
        return image.height, image.width, 1 if image.mode in _GRAY else 3


def _read_image(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:  # [H, W, 1 or 3]
    with _opened(path) as image:
        pixels = np.asarray(image.convert("L" if image.mode in _GRAY else "RGB"))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An open image; whatever is wrong with it is an error of the data folder."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}, more than 8 bits a pixel")
            yield image
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise invalid(
            "data_dir",
            "8-bit images that can be read",
            f"{path} ({error})",
            "delete or replace that file",
        ) from error
