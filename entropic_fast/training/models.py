"""The paper's networks as plain modules: residual and wide residual networks, a CNN for 8x8 digits.

Every activation is its own module, used once, and nothing is changed in place, so that hooks,
tracers and second derivatives see each step.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.checks import integer, invalid, one_of, shown
from ..ops.random_bits.streams import fold_in, normal

NAMES = (
    "resnet20",
    "resnet20-w8",
    "resnet8",
    "resnet110",
    "wrn16-4",
    "wrn10-1",
    "digits-cnn",
    "digits-cnn-bn",
)
_FORMS = (
    "; any resnet<6n+2> and wrn<6n+4>-<widen> exist, and -w<width> sets the first stage's width"
)
_PATTERN = re.compile(r"(?:resnet(\d+)|wrn(\d+)-(\d+))(?:-w(\d+))?")


class BasicBlock(nn.Module):
    """conv - BN - ReLU - conv - BN, plus the shortcut, then ReLU (He et al. 2016, figure 2)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3(channels_out, channels_out, 1)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class PreActivationBlock(nn.Module):
    """BN - ReLU - conv - BN - ReLU - conv, plus the shortcut (Zagoruyko and Komodakis 2016).

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv3(channels_in, channels_out, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv3(channels_out, channels_out, 1)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        out: Tensor = y + (x if self.shortcut is None else self.shortcut(activated))
        return out


def resnet(
    depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16
) -> nn.Sequential:
    """Residual network for 32x32 images (He et al. 2016, section 4.2), projection shortcuts.

    Args:
        depth: 6n + 2, so 8, 14, 20, ... 110.
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the first stage; the others have twice and four times as many.

    Returns:
        a module from images [N, C, H, W] to logits [N, num_classes].

    Raises:
        ValueError: a depth that is not 6n + 2, or a size below 1.

    >>> sum(p.numel() for p in resnet(20).parameters())
    272474
    """
    n = _blocks(depth, 2, "8, 20 or 110")
    _sizes(num_classes, in_channels, width)
    stem = nn.Sequential(_conv3(in_channels, width, 1), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(
        *stem,
        *_stages(BasicBlock, n, width, (width, 2 * width, 4 * width)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


def wide_resnet(
    depth: int, widen: int, num_classes: int = 10, in_channels: int = 3, width: int = 16
) -> nn.Sequential:
    """Wide residual network WRN-depth-widen (Zagoruyko and Komodakis 2016), no dropout.

    Args:
        depth: 6n + 4, so 10, 16, 22, 28, ...
        widen: the factor k on the stages' channels.
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the stem and, times `widen`, of the first stage.

    Returns:
        a module from images [N, C, H, W] to logits [N, num_classes].

    Raises:
        ValueError: a depth that is not 6n + 4, or a size below 1.

    >>> sum(p.numel() for p in wide_resnet(16, 4).parameters())
    2748890
    """
    n = _blocks(depth, 4, "10, 16 or 28")
    integer("widen", widen, 1)
    _sizes(num_classes, in_channels, width)
    stages = (width * widen, 2 * width * widen, 4 * width * widen)
    return nn.Sequential(
        _conv3(in_channels, width, 1),
        *_stages(PreActivationBlock, n, width, stages),
        nn.BatchNorm2d(stages[-1]),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(stages[-1], num_classes),
    )


def digits_cnn(
    norm: str = "none",
    num_classes: int = 10,
    in_channels: int = 1,
    channels: tuple[int, int, int] = (16, 32, 32),
) -> nn.Sequential:
    """Three 3x3 convolutions (the second halves the image), global mean, linear layer.

    Args:
        norm: "none", or "batch" for BatchNorm after each convolution.
        num_classes: outputs.
        in_channels: channels of the images.
        channels: outputs of the three convolutions.

    Returns:
        a module from images [N, C, H, W] to logits [N, num_classes].

    Raises:
        ValueError: an unknown norm or a size below 1.

    >>> [sum(p.numel() for p in digits_cnn(norm).parameters()) for norm in ("none", "batch")]
    [14378, 14538]
    """
    one_of("norm", norm, ("none", "batch"))
    _sizes(num_classes, in_channels)
    if len(channels) != 3:
        raise invalid("channels", "three numbers, one a convolution", shown(channels))
    layers: list[nn.Module] = []
    before = in_channels
    for after, stride in zip(channels, (1, 2, 1), strict=True):
        integer("channels", after, 1)
        layers.append(nn.Conv2d(before, after, 3, stride, padding=1))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(after))
        layers.append(nn.ReLU())
        before = after
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)
    )


def build(name: str, num_classes: int = 10, in_channels: int | None = None) -> nn.Sequential:
    """A network by its name, with torch's own initial weights: see `initialize`.

    Args:
        name: one of `NAMES`, or of the same form with another depth or width, as "resnet14",
            "wrn22-2", "resnet20-w4".
        num_classes: outputs.
        in_channels: channels of the images; by default 1 for the digits, 3 otherwise.

    Raises:
        ValueError: an unknown name (the message lists the choices), or a depth that does not exist
            in that family.

    >>> sum(p.numel() for p in build("resnet20-w8", num_classes=10, in_channels=3).parameters())
    68786
    """
    if name in ("digits-cnn", "digits-cnn-bn"):
        norm = "batch" if name.endswith("-bn") else "none"
        return digits_cnn(norm, num_classes, 1 if in_channels is None else in_channels)
    match = _PATTERN.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise invalid("model name", "one of " + ", ".join(map(repr, NAMES)) + _FORMS, shown(name))
    depth, wrn_depth, widen, width = (int(g) if g else 0 for g in match.groups())
    channels = 3 if in_channels is None else in_channels
    width = width or 16
    if depth:
        return resnet(depth, num_classes, channels, width)
    return wide_resnet(wrn_depth, widen, num_classes, channels, width)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> nn.Module:
    """Reset every parameter and buffer of `model`, as a function of `seed` and its name alone.

    Convolutions and linear layers get He's normal weights (variance 2 / fan-in, also for the last
    layer) and zero biases; normalization layers get scale 1, shift 0 and fresh statistics; other
    layers reset themselves by their `reset_parameters`. Torch's global generators are neither read
    nor moved, and the values do not depend on the device.

    Returns:
        `model`, changed in place.

    Raises:
        ValueError: a module with parameters and no method to reset them.

    >>> a, b = (initialize(build("digits-cnn"), seed=1) for _ in range(2))
    >>> all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    True
    """
    integer("seed", seed)
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        weighted = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
        if weighted and "weight" in parameters:
            weight = parameters["weight"]
            scale = math.sqrt(2.0 / max(1, weight[0].numel()))
            drawn = normal(tuple(weight.shape), fold_in(seed, "initialise", name))
            weight.copy_((scale * drawn).to(weight.dtype))
            if module.bias is not None:
                module.bias.zero_()
        elif hasattr(module, "reset_parameters") or hasattr(module, "_reset_parameters"):
            _reset(module, fold_in(seed, "initialise", name))
        elif parameters:
            raise invalid(
                f"model.{name}" if name else "model",
                "a module that can set its own parameters",
                f"{type(module).__name__} with {', '.join(parameters)} and no reset_parameters()",
                "give it that method, or initialize it yourself and train with resume=TrainState()",
            )
    return model


def _reset(module: nn.Module, seed: int) -> None:
    # On a CPU copy, under a private state of the CPU generator: the values do not depend on the
    # device, and no global generator moves.
    twin: Any = copy.deepcopy(module).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        (getattr(twin, "reset_parameters", None) or twin._reset_parameters)()
    for mine, fresh in ((module.parameters, twin.parameters), (module.buffers, twin.buffers)):
        for old, new in zip(mine(), fresh(), strict=True):
            old.copy_(new)


def _conv3(channels_in: int, channels_out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


def _stages(
    block: type[BasicBlock] | type[PreActivationBlock], n: int, before: int, stages: tuple[int, ...]
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number, after in enumerate(stages):
        for i in range(n):
            layers.append(block(before, after, 2 if number > 0 and i == 0 else 1))
            before = after
    return layers


def _blocks(depth: int, extra: int, examples: str) -> int:
    integer("depth", depth, 1)
    n, rest = divmod(depth - extra, 6)
    if rest or n < 1:
        raise invalid("depth", f"6n + {extra} with n of at least 1, as {examples}", str(depth))
    return n


def _sizes(num_classes: int, in_channels: int, width: int = 1) -> None:
    integer("num_classes", num_classes, 1)
    integer("in_channels", in_channels, 1)
    integer("width", width, 1)
