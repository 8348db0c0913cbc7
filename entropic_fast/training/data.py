"""Image data as uint8 tensors on a device, with counter-based augmentation and order."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._utils.checks import describe, integer, invalid, shown
from ..ops.random_bits.streams import fold_in, permutation
from . import _image_folder as folders
from ._augmentation import CropAndFlip, augment

__all__ = ["NAMES", "CropAndFlip", "DataUnavailableError", "ImageData", "augment", "batches",
           "epoch_order", "load"]  # fmt: skip

NAMES = ("digits", "cifar10", "cifar100")
_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labeled images of one size, kept as uint8 on their device.

    Args:
        images: uint8.  # [N, C, H, W]
        labels: int64, in [0, number of class names).  # [N]
        mean: of each channel over the training set, on the scale 0 to 1.  # C numbers
        std: standard deviation of each channel over the training set, same scale, above 0.
        class_names: one name per class, in label order.
        name: the data set's name, for records.

    Raises:
        ValueError: shapes, types or labels that do not fit, or no images.

    >>> data = ImageData(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]),
    ...                  (0.0,), (1.0,), ("cat", "dog"), "pets")
    >>> len(data), data.num_classes, tuple(data.inputs().shape)
    (2, 2, (2, 1, 8, 8))
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
            raise invalid("images", "a uint8 tensor of shape [N, C, H, W]", describe(images))
        if images.numel() == 0:
            raise invalid("images", "at least one image", describe(images))
        if (
            not isinstance(labels, Tensor)
            or labels.dtype != torch.int64
            or (labels.shape != images.shape[:1])
        ):
            raise invalid("labels", f"an int64 tensor of shape [{len(images)}]", describe(labels))
        if labels.device != images.device:
            raise invalid("labels", f"a tensor on {images.device}", str(labels.device))
        bad = ((labels < 0) | (labels >= self.num_classes)).nonzero()
        if len(bad):
            first = int(bad[0])
            raise invalid(
                "labels",
                f"values from 0 to {self.num_classes - 1}, one a class name",
                f"{int(labels[first])} at index {first}",
            )
        for argument in ("mean", "std"):
            values = getattr(self, argument)
            if len(values) != images.shape[1] or not np.isfinite(values).all():
                raise invalid(
                    argument, f"{images.shape[1]} finite numbers, one a channel", shown(values)
                )
        if min(self.std) <= 0:
            raise invalid("std", "numbers above 0", shown(self.std))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        """Device of images and labels."""
        return self.images.device

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of everything a result can depend on: pixels, labels, scale, classes."""
        digest = hashlib.sha256(
            repr((tuple(self.images.shape), self.mean, self.std, self.class_names)).encode()
        )
        digest.update(self.images.cpu().contiguous().numpy().data)
        digest.update(self.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def normalize(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(images / 255 - mean) / std, by channel.  # [N, C, H, W] -> [N, C, H, W]"""
        key = (images.device, dtype)
        if key not in self._scales:
            mean, std = (
                torch.tensor(numbers, dtype=dtype, device=images.device).mul_(255.0).view(-1, 1, 1)
                for numbers in (self.mean, self.std)
            )
            self._scales[key] = (mean, std)
        mean, std = self._scales[key]
        return images.to(dtype).sub_(mean).div_(std)

    @functools.cached_property
    def _scales(self) -> dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]]:
        """255 x mean and 255 x std [C, 1, 1] by device and dtype: copied there once."""
        return {}

    def inputs(
        self, index: Tensor | slice | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Normalized images, all or those at `index` [n].  # [n, C, H, W]"""
        return self.normalize(self.images if index is None else self.images[index], dtype)

    @functools.cached_property
    def order(self) -> Tensor:
        """A fixed shuffled order in which every prefix is balanced over the classes.  # [N]

        The first n examples hold each class floor(n / K) or ceil(n / K) times, while no class has
        run out.
        """
        shuffled = permutation(len(self), fold_in(0, "balanced order"))
        labels = self.labels.cpu()[shuffled]
        by_class = torch.argsort(labels, stable=True)
        starts = torch.cumsum(torch.bincount(labels, minlength=self.num_classes), 0)
        starts = starts - torch.bincount(labels, minlength=self.num_classes)
        rank = torch.empty_like(labels)
        rank[by_class] = torch.arange(len(self)) - starts[labels[by_class]]
        return shuffled[torch.argsort(rank, stable=True)].to(self.device)

    def tensors(
        self, limit: int | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Inputs [n, C, H, W] and targets [n], in `order`, as an Objective takes them.

        Args:
            limit: only the first so many, hence balanced over the classes; None for all.
            dtype: of the inputs.

        Raises:
            ValueError: a limit below 1 or above the number of examples.
        """
        index = self.order[: self._limit(limit)]
        return self.inputs(index, dtype), self.labels[index]

    def augmentation(self, pad: int = 4, flip: bool = True) -> CropAndFlip:
        """`augment` for normalized images: see `CropAndFlip`."""
        black = tuple(-m / s for m, s in zip(self.mean, self.std, strict=True))
        return CropAndFlip(pad, flip, black)

    def subset(self, index: Tensor | Sequence[int]) -> ImageData:
        """The examples at `index` [n]; mean and standard deviation stay the training set's."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.device)
        return replace(self, images=self.images[index], labels=self.labels[index])

    def limited(self, limit: int | None) -> ImageData:
        """The first `limit` examples in `order`, balanced over the classes; None for all."""
        return self if limit is None else self.subset(self.order[: self._limit(limit)])

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def _limit(self, limit: int | None) -> int:
        if limit is not None and integer("limit", limit, 1) > len(self):
            raise invalid("limit", f"at most {len(self)}, the number of examples", str(limit))
        return len(self) if limit is None else limit


def load(
    name: str = "digits",
    data_dir: str | Path | None = None,
    download: bool = True,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    test_limit: int | None = None,
) -> tuple[ImageData, ImageData]:
    """A training and a test set.

    Args:
        name: "digits" (1,797 gray 8x8 images from scikit-learn, split 1,437 to 360 by class),
            "cifar10", "cifar100", or any name for a folder in `data_dir`.
        data_dir: an image folder tree `train/<class>/*`, `test/<class>/*` (decoded once, then
            cached); or, for the CIFAR sets, where torchvision keeps the originals (default: in the
            cache folder).
        download: let torchvision download missing CIFAR originals.
        device: where the data are put.
        limit: keep only so many training examples, balanced over the classes.
        test_limit: the same for the test set.

    Returns:
        (train, test); both with the channel means and deviations of the entire training set.

    Raises:
        ValueError: an unknown name without `data_dir`, a folder that does not hold such a tree, a
            corrupt image or images of different sizes (the file is named).
        FileNotFoundError: `data_dir` does not exist.
        RuntimeError: torchvision is needed and absent, or the download failed.

    >>> train, test = load("digits", limit=100)
    >>> len(train), len(test), train.labels.bincount().tolist()
    (100, 360, [10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    """
    parts: Any
    if data_dir is not None and name != "digits" and not Path(data_dir).is_dir():
        raise FileNotFoundError(
            f"data_dir: expected a folder, got {data_dir}, which is none; check the path"
        )
    if name == "digits":
        if data_dir is not None:
            raise invalid(
                "data_dir",
                "None for 'digits', which scikit-learn holds",
                shown(data_dir),
                "leave it out, or give the data set another name",
            )
        parts = _digits()
    elif data_dir is not None and (name not in NAMES or (Path(data_dir) / "train").is_dir()):
        parts = folders.read_tree(data_dir)
        if len(parts[2]) != _CLASSES.get(name, len(parts[2])):
            raise invalid(
                "data_dir",
                f"{_CLASSES[name]} classes for {name!r}",
                f"{len(parts[2])} in {data_dir}",
                "give the data set another name",
            )
    elif name in ("cifar10", "cifar100"):
        parts = _torchvision(name, data_dir, download)
    else:
        raise invalid(
            "data set",
            "one of " + ", ".join(map(repr, NAMES)),
            shown(name),
            "for images of your own, pass data_dir, a folder of train/<class>/* and test/<class>/*",
        )
    (images, labels), (test_images, test_labels), classes = parts
    mean, std = _channel_statistics(images)
    train = ImageData(images, labels, mean, std, tuple(classes), name)
    test = ImageData(test_images, test_labels, mean, std, tuple(classes), name)
    return train.limited(limit).to(device), test.limited(test_limit).to(device)


class DataUnavailableError(RuntimeError):
    """Images that cannot be had: no torchvision, or a download that failed."""


def _digits() -> tuple[folders.Arrays, folders.Arrays, list[str]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    everything = ImageData(images, labels, (0.0,), (1.0,), tuple("0123456789"), "digits")
    # The first 36 of each class in the balanced order are the test set: a stratified split.
    order = everything.order
    return (
        (images[order[360:]], labels[order[360:]]),
        (images[order[:360]], labels[order[:360]]),
        list(everything.class_names),
    )


def _torchvision(
    name: str, data_dir: str | Path | None, download: bool
) -> tuple[folders.Arrays, folders.Arrays, list[str]]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataUnavailableError(
            f"data set {name!r}: expected torchvision to read the originals, got {error}; "
            "install torchvision, or pass data_dir, a folder of train/<class>/* and "
            "test/<class>/*"
        ) from error
    root = Path(data_dir) if data_dir is not None else folders.cache_dir() / "torchvision"
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        sets = [kind(str(root), train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataUnavailableError(
            f"data set {name!r}: could not be had from {root} ({error}); check the network, or "
            "pass data_dir, a folder of train/<class>/* and test/<class>/*"
        ) from error
    train, test = (
        (
            torch.from_numpy(np.ascontiguousarray(s.data.transpose(0, 3, 1, 2))),
            torch.tensor(s.targets, dtype=torch.int64),
        )
        for s in sets
    )
    return train, test, list(sets[0].classes)


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # From the counts of the 256 values: exact, and no float copy of the images.
    value = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float(share @ value)
        means.append(mean)
        stds.append(float(share @ (value - mean).square()) ** 0.5 or 1.0)  # constant: scale 1
    return tuple(means), tuple(stds)


def epoch_order(n: int, epoch: int, seed: int, device: torch.device | str | None = None) -> Tensor:
    """The order in which an epoch visits n examples, made on `device`.  # [n]"""
    integer("n", n, 1)
    return permutation(n, fold_in(seed, "order"), stream=integer("epoch", epoch), device=device)


def batches(
    n: int, batch_size: int, epoch: int, seed: int, device: torch.device | str | None = None
) -> Iterator[Tensor]:
    """Index batches of one epoch, on `device`; the last one may be short.  # [b]

    >>> [len(b) for b in batches(10, 4, epoch=0, seed=0)]
    [4, 4, 2]
    """
    integer("batch_size", batch_size, 1)
    order = epoch_order(n, epoch, seed, device)
    for start in range(0, n, batch_size):
        yield order[start : start + batch_size]
