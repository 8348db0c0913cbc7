"""Checks of a device against the CPU, run on the emulated GPU everywhere and on "cuda" where it is.

Each takes the device. Results are compared with the CPU's in float64, so that float32 is held to
what is right and not to what another processor rounds.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from operator import matmul
from typing import Any

import torch
from cases import CASES, Case, relative_error
from relax_cases import relax_with
from torch import Tensor, nn

import entropic_fast as ef
from entropic_fast.dynamics.projected_sgd import _gradient_backends as backends
from entropic_fast.dynamics.projected_sgd._minibatches import Minibatches
from entropic_fast.dynamics.projected_sgd._optimizers import Optimizer
from entropic_fast.dynamics.projected_sgd._replica_state import ReplicaState
from entropic_fast.ops.random_bits import streams as random
from entropic_fast.training import EpochRecord, TrainConfig, models, train
from entropic_fast.training.data import ImageData

Watched = Callable[[], AbstractContextManager[Any]]  # within which the host may not wait

# ---- every model of tests/support/cases.py
# ---------------------------------------------------------------


class Sequence(nn.Module):
    """A recurrent layer, and a linear map of its last output."""

    def __init__(self, layer: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer = layer(2, 3, batch_first=True, **options)
        self.out = nn.Linear(6 if options.get("bidirectional") else 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


RECURRENT = [
    Case("gru", lambda: Sequence(nn.GRU), (2, 2)),
    Case("rnn of two directions", lambda: Sequence(nn.RNN, bidirectional=True), (2, 2)),
    Case("rnn with relu", lambda: Sequence(nn.RNN, nonlinearity="relu"), (2, 2)),
]
MODELS = {case.name: case for case in [*CASES, *RECURRENT]}
DTYPES = [torch.float32, torch.float64]
# Of a result's norm: the first for what is computed once, the second for what is iterated on.
TOLERANCE = {torch.float32: (2e-5, 1e-3), torch.float64: (1e-10, 1e-6)}


def _measured(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], str]:
    """What is computed of a model, and how products go."""
    model, inputs, targets = case.build(3)
    data = (inputs, targets)
    obj = ef.Objective(model.to(dtype), "cross_entropy", data, device=device)
    v = random.normal((obj.num_params, 2), 0).to(obj.device, dtype)
    hessian, jacobian = ef.HessianOperator(obj), ef.JacobianOperator(obj)
    pushed = jacobian @ v
    found: dict[str, Any] = {
        "loss": obj.loss(),
        "gradient": obj.gradient(),
        "scores": ef.score_matrix(obj),
        "Gram": ef.score_gram(obj),
        "norms": ef.gradient_norms(obj),
        "Fisher product": ef.FisherOperator(obj) @ v,
        "Hessian product": hessian @ v,
        "forms": hessian.quadratic_forms(v),
        "Gauss-Newton product": ef.GGNOperator(obj) @ v,
        "Jacobian product": pushed,
        "transposed": jacobian.T @ pushed,
    }
    if dtype == torch.float32 or device == "cpu":  # in float64 they are what is above, once more
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ef.NotConvergedWarning)
            found |= {
                "Hessian trace": ef.hessian_trace(obj, probes=2).value,
                "Gauss-Newton trace": ef.ggn_trace(obj).value,
                "* eigenvalue": ef.top_eigenvalues(hessian, max_matvecs=6, block=1).values,
                "* density": ef.spectral_density(
                    hessian, ef.DensitySettings(probes=1, steps=3)
                ).nodes,
            }
    on_device = {name: t for name, t in found.items() if isinstance(t, Tensor)}
    for name, tensor in on_device.items():
        assert tensor.dtype in (dtype, torch.float64), f"{name}: {tensor.dtype}"
    return {name: torch.as_tensor(t).detach().cpu() for name, t in found.items()}, hessian.method


@functools.cache
def _expected(name: str) -> tuple[dict[str, Tensor], str]:
    return _measured(MODELS[name], torch.float64, "cpu")


def check_model(name: str, dtype: torch.dtype, device: str) -> None:
    """A model's scores, products, traces, eigenvalues and density are those of the CPU."""
    expected, way = _expected(name)
    found, found_way = _measured(MODELS[name], dtype, device)
    once, iterated = TOLERANCE[dtype]
    errors = {key: relative_error(found[key], expected[key]) for key in found}
    wrong = {k: e for k, e in errors.items() if not e < (iterated if k[0] == "*" else once)}
    assert not wrong, wrong
    assert found_way.split(",")[0] == way.split(",")[0], found_way


# ---- what a user calls, on a network with batch normalization in float32 -------------------------


def network(device: str, dtype: torch.dtype = torch.float32) -> ef.Objective:
    """A small network after some training's worth of statistics, and images of 8 x 8."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 1, 8, 8, generator=generator)
    model = models.initialize(models.digits_cnn("batch", channels=(4, 4, 4)), 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(torch.linspace(-0.1, 0.1, 4))
            module.running_var.copy_(torch.linspace(0.5, 1.5, 4))
    data = (images, torch.arange(24) % 10)
    return ef.Objective(model.to(dtype), "cross_entropy", data, device=device)


def ends(obj: ef.Objective) -> tuple[Tensor, Tensor]:
    """Two points some way apart."""
    a = obj.parameters_vector()
    return a, a + torch.linspace(-0.1, 0.1, len(a)).to(a)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        found.detach().cpu().double(),
        expected.detach().cpu().double(),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
    )


def check_batch_norm_in_evaluation_mode(device: str) -> None:
    """Rules and fused chains, not torch's forward mode, and the same products."""
    here, there = network("cpu"), network(device)
    v = random.normal((here.num_params, 3), 0).float()
    for kind in (ef.HessianOperator, ef.GGNOperator):
        operator = kind(there)
        assert relative_error(operator @ v.to(there.device), kind(here) @ v) < 2e-5
        assert operator.method == "graph"
    assert relative_error(ef.score_gram(there), ef.score_gram(here)) < 2e-5


def check_repeated_products(device: str, kind: str) -> None:
    """CUDA graphs of products and forms of several widths, each with vectors of its own."""
    here, there = network("cpu"), network(device)
    operators = {"hessian": ef.HessianOperator, "ggn": ef.GGNOperator}
    calls: list[Callable[[Any, Tensor], Tensor]] = [matmul]
    if kind == "hessian":
        calls.append(lambda operator, v: operator.quadratic_forms(v))
    for multiply in calls:
        operator = operators[kind](there)
        for number, width in enumerate((1, 1, 1, 1, 3, 8, 3, 8, 1, 3, 8, 5)):
            v = random.normal((here.num_params, width), 0, number).float()
            # A new operator on the CPU, which keeps nothing.
            expected = multiply(operators[kind](here), v)
            found = multiply(operator, v.to(there.device))
            assert relative_error(found, expected) < 2e-5, (number, width)
        assert operator.graphs == "captured", operator.graphs


def check_relax(device: str, engine: str, optimizer: str) -> None:
    """A relaxation, with cycles as graphs and without, is the CPU's."""
    # Adam divides by what is nearly 0: in float32 it would follow the rounding.
    lr, dtype = (0.002, torch.float64) if optimizer == "adam" else (0.02, torch.float32)

    def relaxed(device: str, graphs: bool) -> ef.Trajectory:
        obj = network(device, dtype)
        path = ef.linear_path(*ends(obj), pivots=3)
        common = dict(lr=lr, batch_size=6, project_every=2, steps=10, loss_every=2)
        return relax_with(
            obj, path, [0.3, 0.6], optimizer=optimizer, **common, backend=engine, cuda_graphs=graphs
        )

    expected = relaxed("cpu", False)
    for graphs in (True, False):
        found = relaxed(device, graphs)
        assert found.backend == engine + "+graphs" * graphs and not found.notes
        for name in ("position", "distance", "loss", "full_loss"):
            assert_near(getattr(found, name), getattr(expected, name))


def check_auto_neb(device: str) -> None:
    """Paths and losses of some steps, and the losses along the path that they end on."""

    def found(device: str) -> ef.NEBResult:
        obj = network(device)
        config = ef.AutoNEBConfig(pivots=3, cycles=((4, 0.05), (3, 0.02)), batch_size=12)
        return ef.auto_neb(obj, *ends(obj), config)

    here, there = found("cpu"), found(device)
    assert there.graphs and not there.notes and not here.graphs
    assert_near(there.path.pivots, here.path.pivots)
    assert_near(
        torch.as_tensor(there.history["max_loss"]), torch.as_tensor(here.history["max_loss"])
    )


def check_training(device: str, precision: str = "float32") -> None:
    """Two epochs with augmentation: the CPU's losses, as near as TF32 or bfloat16 let them be."""

    def trained(device: str) -> list[float]:
        epochs: list[EpochRecord] = []
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (48, 1, 8, 8), generator=generator, dtype=torch.uint8)
        names = tuple("0123456789")
        data = ImageData(images, torch.arange(48) % 10, (0.5,), (0.25,), names, "noise").to(device)
        model = models.digits_cnn("batch", channels=(4, 4, 4)).to(device)
        config = TrainConfig(epochs=2, batch_size=16, augment=True, precision=precision)
        train(model, data, config, seed=0, on_epoch=epochs.append)
        return [epoch.loss for epoch in epochs]

    assert_near(torch.tensor(trained(device)), torch.tensor(trained("cpu")), 0.02)


def check_langevin(device: str) -> None:
    """The same noise on every device."""
    ring = ef.RingPotential(modes=2)
    angles = torch.linspace(0, 6, 101, dtype=torch.float64)
    here, there = (
        ef.simulate_langevin(ring, ring.on_ring(angles.to(d)), ef.LangevinIntegrator(0.1, 0.01), 20)
        for d in ("cpu", device)
    )
    assert_near(there.final, here.final, 1e-9)


def check_updates_read_nothing_back(device: str, watched: Watched) -> None:
    """Updates of replicas, of which only the projection's record is read back."""
    obj = network(device)
    path = ef.linear_path(*ends(obj), pivots=3)
    lrs = torch.tensor([0.02, 0.01], dtype=torch.float64).to(device)
    run = ReplicaState(
        path,
        torch.tensor([0.3, 0.6], dtype=torch.float64),
        Optimizer(ef.ProjectedSGD(lrs.tolist(), 1, optimizer="nesterov"), lrs),
        Minibatches(obj, 6, 0, range(2)),
        backends.loop_gradients(obj),
        1.0,
    )
    table = run.minibatches.table(0, 3)
    run.updates(table)  # whatever is done once
    with watched():
        run.updates(table)


def check_products_are_read_back_at_the_end(device: str, watched: Watched) -> None:
    """Plain gradients of a batch, the yardstick of everything else."""
    obj = network(device)
    theta = obj.parameters_vector().requires_grad_()
    batch = next(iter(obj.batches()))
    obj.losses(theta, batch.inputs, batch.targets).sum().backward()
    with watched():
        obj.losses(theta, batch.inputs, batch.targets).sum().backward()


CHECKS: dict[str, Callable[[str], None]] = {
    "batch norm in evaluation mode": check_batch_norm_in_evaluation_mode,
    "AutoNEB": check_auto_neb,
    **{
        f"repeated {kind} products": functools.partial(check_repeated_products, kind=kind)
        for kind in ("hessian", "ggn")
    },
    "training": check_training,
    "training in bfloat16": functools.partial(check_training, precision="bfloat16"),
    "Langevin": check_langevin,
    **{
        f"relax by {engine}, {optimizer}": functools.partial(
            check_relax, engine=engine, optimizer=optimizer
        )
        for engine, optimizer in (("loop", "sgd"), ("loop", "adam"), ("vmap", "nesterov"))
    },
}
READ_NOTHING = [check_updates_read_nothing_back, check_products_are_read_back_at_the_end]
