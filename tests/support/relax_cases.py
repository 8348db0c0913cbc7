"""Small problems for tests of projected SGD: an objective and a path in its parameters."""

import dataclasses

import torch
from torch import nn

from entropic_fast.dynamics import Checkpointing, Execution, ProjectedSGD, Recording, relax
from entropic_fast.objective import Objective
from entropic_fast.paths import Path, linear_path
from entropic_fast.training.models import digits_cnn, initialize


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def images(n=40, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g, dtype=dtype), torch.randint(10, (n,), generator=g)


def mlp_problem(dtype=torch.float64, n=24, seed=0):
    """A small classifier and a bent path of three pivots."""
    g = torch.Generator().manual_seed(seed)
    model = initialize(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), seed).to(dtype)
    x = torch.randn(n, 5, generator=g, dtype=dtype)
    obj = Objective(model, "cross_entropy", (x, torch.randint(3, (n,), generator=g)))
    theta = obj.parameters_vector()
    bends = 0.5 * torch.randn(2, obj.num_params, generator=g, dtype=dtype)
    return model, obj, Path(torch.stack((theta, theta + bends[0], theta + bends[1])))


def conv_problem(norm, channels=(4, 4, 4), norm_of_objective="running"):
    obj = Objective(
        initialize(digits_cnn(norm, channels=channels), 1),
        "cross_entropy",
        images(),
        norm=norm_of_objective,
    )
    a = obj.parameters_vector()
    g = torch.Generator().manual_seed(3)
    return obj, linear_path(a, a + 0.1 * torch.randn(len(a), generator=g), pivots=3)


class Valley(nn.Module):
    """Loss 5 exp(-y/2) |w|^2 + xi . w of example xi: no energetic force on y along w = 0."""

    def __init__(self):
        super().__init__()
        self.w, self.y = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(()))

    def forward(self, xi):
        return 5 * torch.exp(-self.y / 2) * self.w.square().sum() + xi @ self.w


def valley(n=512):
    """Noise across the path from y = 0 to y = 1 only; test_entropic_force has the theory."""
    xi = torch.randn(n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = xi - xi.mean(0), torch.zeros(n)
    obj = Objective(Valley().double(), lambda outputs, _: outputs, data)
    ends = torch.zeros(2, 9, dtype=torch.float64)
    ends[1, -1] = 1.0
    return obj, linear_path(*ends)


SGD = [field.name for field in dataclasses.fields(ProjectedSGD)]
RECORDING = {
    "record_every": "every",
    "loss_every": "loss_every",
    "datasets": "datasets",
    "datasets_every": "datasets_every",
    "record_to": "to",
    "on_record": "callback",
}
EXECUTION = [field.name for field in dataclasses.fields(Execution)]


def relax_with(obj, path, start, **options):
    """`relax` with the fields of all its settings in one dictionary."""
    sgd = {name: options.pop(name) for name in SGD if name in options}
    record = {RECORDING[name]: options.pop(name) for name in RECORDING if name in options}
    execution = {name: options.pop(name) for name in EXECUTION if name in options}
    if "checkpoint_every" in options:
        every, file = options.pop("checkpoint_every"), options.pop("checkpoint", None)
        options["checkpoint"] = None if file is None else Checkpointing(file, every)
    return relax(
        obj,
        path,
        start,
        ProjectedSGD(**sgd),
        recording=Recording(**record),
        execution=Execution(**execution),
        **options,
    )
