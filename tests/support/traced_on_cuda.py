"""Forward passes of models traced with fake CUDA tensors, which need torch's CUDA but no driver.

Run as a program it prints, as JSON, what the graph of each model holds on "cuda" and on "cpu". A
process of its own, as torch asks the driver for a device once another backend is registered, which
the emulated GPU is.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from entropic_fast._torch.full_precision import NativeRecurrence, full_precision
from entropic_fast.curvature.hvp._capture import _traced
from entropic_fast.curvature.hvp._capture_checks import LINEAR, MULTILINEAR
from entropic_fast.curvature.hvp._decompositions import DECOMPOSITIONS, FUNCTIONS
from entropic_fast.curvature.hvp._interpreter import FUSIONS
from entropic_fast.curvature.hvp._jvp_rules import JVP_RULES
from entropic_fast.training import models


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x).mean(1))


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


# But for the deepest, which repeats the blocks of resnet20.
NAMES = [name for name in models.NAMES if name != "resnet110"]
OF_IMAGES = [*NAMES, "resnet18"]
MODELS: dict[str, Any] = {
    name: lambda name=name: models.build(name, in_channels=3) for name in NAMES
}
MODELS |= {
    "resnet18": torchvision.models.resnet18,
    "transformer": Encoder,
    "lstm": lambda: Last(nn.LSTM(8, 6, batch_first=True)),
    "gru": lambda: Last(nn.GRU(8, 6, batch_first=True)),
    "rnn": lambda: Last(nn.RNN(8, 6, batch_first=True)),
}


NORMS = (nn.BatchNorm2d, nn.LayerNorm)


class Replaced(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


def traced(name: str, device: str) -> fx.Graph:
    """The graph of a model in evaluation mode on a device that need not be there."""
    model = MODELS[name]().eval()
    held = [*model.named_parameters(), *model.named_buffers()]
    size = 8 if name.startswith("digits") else 32
    shape = (2, 3, size, size) if name in OF_IMAGES else (2, 4, 8)
    with FakeTensorMode(), full_precision():
        x = torch.empty(shape, device=device)
        values = {n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in held}

        def run(values: dict[str, Tensor], x: Tensor) -> Tensor:
            with torch.no_grad(), NativeRecurrence(), Replaced():  # autograd would ask the driver
                return functional_call(model, values, (x,))

        graph = _traced(run, DECOMPOSITIONS, values, x).graph
    graph.eliminate_dead_code()
    assert {n.meta["val"].device.type for n in graph.nodes if n.op == "placeholder"} == {device}
    return graph


def seen(name: str, device: str) -> dict[str, Any]:
    graph = traced(name, device)
    calls = [n.target for n in graph.nodes if n.op == "call_function"]
    nodes = list(graph.nodes)
    regions = [region for find in FUSIONS for region in find(nodes, [])[0]]
    fused = {node.target for region in regions for node in region.nodes}
    known = {*JVP_RULES, *LINEAR, *MULTILINEAR, *fused}
    return {
        "operations": Counter(map(str, calls)),
        "without a rule": sorted(
            {
                str(target)
                for target in calls
                if target not in known and torch.Tag.pointwise not in getattr(target, "tags", ())
            }
        ),
        "fused": len(regions),
        "norms": sum(isinstance(m, NORMS) for m in MODELS[name]().modules()),
    }


if __name__ == "__main__":
    print(json.dumps({n: {d: seen(n, d) for d in ("cuda", "cpu")} for n in MODELS}))
