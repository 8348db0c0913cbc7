"""Random crops and flips, as a function of random words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .._utils.checks import describe, integer, invalid, shown
from ..ops.random_bits.streams import fold_in, philox


def augment(
    images: Tensor, index: Tensor, epoch: int, seed: int, pad: int = 4, flip: bool = True
) -> Tensor:
    """Random crops of the zero-padded images and horizontal flips.

    A function of (seed, epoch, index of the example), independent of batches, threads and device.

    Args:
        images: uint8.  # [B, C, H, W]
        index: each image's index in its data set.  # [B]
        epoch: the pass over the data.
        seed: of the data order and augmentation.
        pad: pixels of zero (black) on each side; 0 for no crop.
        flip: whether to flip, with probability 1/2.

    Returns:
        a new tensor of the same shape and type.

    >>> x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8); i = torch.arange(4)
    >>> one = torch.cat([augment(x[j:j+1], i[j:j+1], epoch=2, seed=0) for j in range(4)])
    >>> torch.equal(augment(x, i, epoch=2, seed=0), one)
    True
    """
    integer("epoch", epoch)
    integer("pad", pad)
    if images.ndim != 4:
        raise invalid("images", "a tensor of shape [B, C, H, W]", describe(images))
    if index.shape != images.shape[:1] or index.dtype != torch.int64:
        raise invalid("index", f"an int64 tensor of shape [{len(images)}]", describe(index))
    words = philox(index.to(images.device), fold_in(seed, "augment"), stream=epoch)  # [B, 4]
    return CropAndFlip(pad, flip)(images, words)


@dataclass(frozen=True)
class CropAndFlip:
    """Random crops of padded images and horizontal flips, as a function of random words.

    Args:
        pad: pixels added on each side; 0 for no crop.
        flip: whether to flip, with probability 1/2.
        fill: the value added, one per channel; default 0. For normalized images black is -mean /
            std, as in `ImageData.augmentation`.

    >>> images, words = torch.rand(5, 3, 8, 8), philox(torch.arange(5), seed=0)
    >>> tuple(CropAndFlip(pad=2)(images, words).shape)
    (5, 3, 8, 8)
    """

    pad: int = 4
    flip: bool = True
    fill: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        integer("pad", self.pad)

    def __call__(self, images: Tensor, words: Tensor) -> Tensor:
        """Images [B, C, H, W], cropped and flipped by words [B, 4], int64, uniform in [0, 2^32)."""
        if images.ndim != 4:
            raise invalid("images", "a tensor of shape [B, C, H, W]", describe(images))
        if self.fill and len(self.fill) != images.shape[1]:
            raise invalid("fill", f"{images.shape[1]} numbers, one a channel", shown(self.fill))
        if not (self.pad or self.flip):
            return images.clone()
        out = images
        if self.pad:
            height, width = images.shape[-2:]
            windows = self._padded(images).unfold(2, height, 1).unfold(3, width, 1)
            offset = (words[:, :2] * (2 * self.pad + 1)) >> 32  # uniform over 0 .. 2 pad
            rows = torch.arange(len(images), device=images.device)
            out = windows[rows, :, offset[:, 0], offset[:, 1]]
        if self.flip:
            turned = (words[:, 2] >> 31).bool()
            out = torch.where(turned[:, None, None, None], out.flip(-1), out)
        return out

    def _padded(self, images: Tensor) -> Tensor:
        out = functional.pad(images, (self.pad,) * 4)
        for channel, value in enumerate(self.fill):
            out[:, channel] = functional.pad(images[:, channel], (self.pad,) * 4, value=value)
        return out
