"""Print results of the public API as hexadecimal floats, one `name<TAB>numbers` per line.

    python tests/tools/api_results.py > before.txt
    python tests/tools/api_results.py --compare before.txt

Two versions of the library that print the same lines on one machine agree to the last bit; other
processors and other versions of torch may give other bits. Short tensors are printed in full, long
ones as some entries and the correctly rounded sum of all. One thread, fixed seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hexadecimal import differences, line
from operation_results import BACKENDS, draws, operation_results
from torch import Tensor, nn

import entropic_fast as ef
from entropic_fast import dynamics, paths
from entropic_fast.curvature import (
    CurvatureSettings,
    autograd_only,
    curvature_at,
    tracked_eigenpairs,
)
from entropic_fast.ops.random_bits import streams
from entropic_fast.training import TrainConfig, data, evaluate, minima, models, train

sys.path.append(str(Path(__file__).parents[1] / "support"))
from langevin_cases import simulate_with
from relax_cases import relax_with

Lines = Iterator[tuple[str, object]]
SUBJECTS = (
    ("mlp", torch.float32), ("conv", torch.float64), ("conv", torch.float32),
    ("attention", torch.float64),
)  # fmt: skip


# ---- subjects ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Tokens, one head of attention, layer normalization, mean over positions."""

    def __init__(self, width: int = 6, tokens: int = 7, classes: int = 3) -> None:
        super().__init__()
        self.embed, self.mixed = nn.Embedding(tokens, width), nn.Linear(width, 3 * width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, classes]
        x = self.embed(tokens)
        query, key, value = self.mixed(x).chunk(3, -1)
        weights = torch.softmax(query @ key.transpose(-1, -2) / x.shape[-1] ** 0.5, -1)
        return self.head(self.norm(x + weights @ value).mean(1))


def objective(kind: str, dtype: torch.dtype = torch.float64) -> ef.Objective:
    """A network with random weights and statistics, on 24 random examples of 3 classes."""
    torch.manual_seed(0)
    if kind == "mlp":
        inputs = torch.randn(24, 5, dtype=dtype)
        model: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    elif kind == "conv":
        inputs = torch.randn(24, 1, 8, 8, dtype=dtype)
        model = models.initialize(models.digits_cnn("batch", 3, channels=(4, 5, 6)), 0)
        for name, values in model.named_buffers():
            if "running" in name:
                values.copy_(torch.rand(values.shape) + name.endswith("var") / 2)
    else:
        inputs, model = torch.randint(7, (24, 4)), Attention()
    labels = torch.randint(3, (24,))
    return ef.Objective(model.to(dtype), "cross_entropy", (inputs, labels), batch_size=10)


def bent(obj: ef.Objective, by: float = 0.3) -> ef.Path:
    theta = obj.parameters_vector()
    bends = by * draws(2, obj.num_params, dtype=theta.dtype)
    return ef.Path(torch.stack((theta, theta + bends[0], theta + bends[1])))


def random_images(count: int, seed: int = 0) -> data.ImageData:
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=g, dtype=torch.uint8)
    labels = torch.randint(3, (count,), generator=g)
    return data.ImageData(pixels, labels, (0.5,), (0.3,), ("a", "b", "c"), "random")


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters())


# ---- results by topic ----------------------------------------------------------------------------


def point_results() -> Lines:
    """Losses, per-example gradients and products at one point."""
    for kind, dtype in SUBJECTS:
        obj = objective(kind, dtype)
        title = f"{kind}{torch.finfo(dtype).bits}"
        yield f"{title} loss", (obj.evaluate(), obj.example_losses(), obj.gradient())
        norms = (ef.gradient_norms(obj), ef.gradient_norms(obj, group_by="module"))
        yield f"{title} scores", (ef.score_matrix(obj), norms)
        other = ef.score_gram(obj, products="float32", strategy="recompute")
        yield f"{title} gram", (ef.score_gram(obj), other, ef.ntk_gram(obj, max_examples=5))
        spectrum = ef.score_spectrum(obj)
        yield f"{title} score spectrum", (spectrum, ef.score_spectrum_floor(spectrum, dtype))
        sampled = ef.with_sampled_labels(obj, draws=2, seed=3)
        traces = (ef.fisher_trace(obj, group_by="parameter"), ef.fisher_trace(sampled))
        yield f"{title} fisher", (traces, ef.FisherOperator(obj) @ vectors_of(obj))
        yield f"{title} ggn trace", (ef.ggn_trace(obj), ef.ggn_trace(obj, group_by="module"))
        trace = ef.hessian_trace(obj, probes=8, group_by="module")
        yield f"{title} hessian trace", (trace, ef.hessian_diagonal(obj, probes=8))
        yield f"{title} products, graph", products(obj)
        with autograd_only():
            yield f"{title} products, autograd", products(obj)


def vectors_of(obj: ef.Objective) -> Tensor:
    return draws(obj.num_params, 3, dtype=obj.dtype)


def products(obj: ef.Objective) -> list[Tensor]:
    """Products with blocks and one vector. Repeated, as values are cached from the second on."""
    vectors, results = vectors_of(obj), []
    for operator in (ef.HessianOperator(obj), ef.GGNOperator(obj)):
        results += [operator @ vectors, operator @ vectors[:, 0], operator @ vectors]
        results += [operator.quadratic_forms(vectors) for _ in range(3)]
    jacobian = ef.JacobianOperator(obj)
    outputs = jacobian @ vectors
    return [*results, outputs, jacobian.T @ outputs]


def estimator_results() -> Lines:
    obj = objective("conv")
    hessian = ef.HessianOperator(obj)
    top = ef.top_eigenvalues(hessian, k=3)
    for method in ("hutchinson", "hutch++", "xtrace", "gauss-newton"):
        for name, directions in (("", None), (", deflated", top)):
            trace = ef.hessian_trace(obj, probes=24, method=method, deflate=directions)
            yield f"trace {method}{name}", trace
    yield "trace hutch++, grouped", ef.hessian_trace(obj, method="hutch++", group_by="parameter")
    yield "trace, to a tolerance", ef.hessian_trace(obj, probes=400, tol=0.2)
    dense = draws(40, 40) / 6 + torch.arange(40.0).double().diag()
    dense = (dense + dense.T) / 2
    traces = [ef.operator_trace(dense, 12, method=m) for m in ("hutchinson", "hutch++", "xtrace")]
    yield "trace and diagonal, matrix", (traces, ef.operator_diagonal(dense, 12))
    yield "diagonal, deflated", ef.hessian_diagonal(obj, probes=8, deflate=top)
    yield "eigenvalues, largest", top
    yield "eigenvalues, both ends", ef.top_eigenvalues(hessian, 2, which="BE")
    yield "eigenvalues, smallest", ef.top_eigenvalues(hessian, 2, which="SA", block=1)
    near = ef.HessianOperator(obj, obj.parameters_vector() + 1e-3)
    yield "eigenvalues, from a neighbor", ef.top_eigenvalues(near, 3, v0=top)
    yield "eigenvalues, tracked", (tracked_eigenpairs(near, top), tracked_eigenpairs(near))
    yield "eigenvalues, by module", ef.top_eigenvalues(hessian, 1, group_by="module")
    yield "eigenvalues, fisher", ef.fisher_eigenvalues(obj, 3)
    density = ef.spectral_density(hessian, ef.DensitySettings(probes=4, steps=20))
    yield "density", (density, ef.density_log_determinant(density, 0.01))
    tangent = bent(obj).tangent(0.4)
    yield "log determinant", ef.log_determinant(hessian, orthogonal_to=tangent, k=3)
    shifted = ef.log_determinant(
        hessian, orthogonal_to=tangent, delta=0.01, density=ef.DensitySettings(probes=4, steps=20)
    )
    yield "log determinant, shifted", shifted


def path_results() -> Lines:
    for kind, across in (("conv", False), ("conv", True), ("attention", False)):
        obj = objective(kind)
        quantities = ("loss", "fisher_trace", "hessian_trace", "top_eigenvalue", "norm", "density")
        settings = CurvatureSettings(probes=4, density=ef.DensitySettings(2, 12))
        profile = ef.curvature_profile(
            *(obj, bent(obj), 3, quantities), settings=settings, orthogonal_to_path=across
        )
        yield f"profile {kind}{', across the path' * across}", profile
    obj = objective("conv")
    path, theta = bent(obj), obj.parameters_vector()
    middle, batch = path.point(0.5), obj.with_norm("batch")
    row = curvature_at(
        obj, middle, orthogonal_to=path.tangent(0.5), settings=CurvatureSettings(probes=4)
    ).row
    yield "profile at a point", row
    norms = (obj.recalibrated(middle).evaluate(), batch.evaluate(), batch.gradient())
    yield "normalization by new and batch statistics", norms
    places = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    nearest = path.project(theta + 0.1)
    yield "path", (path.positions, path.length, path.point(places), path.tangent(places), nearest)
    yield "path, resampled", (path.resampled(6).pivots, path.reversed().positions)
    line = ef.path_losses(obj, ef.linear_path(theta, path.pivots[2]), 7)
    barrier, saddle = paths.barrier(line), paths.saddle(line)
    yield "path losses", (line, barrier.over_max, barrier.over_mean, saddle.position, saddle.loss)
    for kind, springs in (("mlp", math.inf), ("mlp", 5.0), ("conv", math.inf)):
        obj = objective(kind, torch.float32)
        cycles = paths.annealed(2, 12, 0.1, 0.02)
        config = ef.AutoNEBConfig(4, 7, cycles, batch_size=8, springs=springs, eval_points=3)
        neb = ef.auto_neb(obj, *bent(obj, 0.6).pivots[:2], config)
        tables = (neb.losses, neb.history, neb.cycles)
        yield f"auto_neb {kind}, springs {springs}", (neb.path.pivots, neb.saddle.loss, tables)


def relax_results() -> Lines:
    common = dict(lr=0.01, project_every=3, steps=24, seed=4)
    three = dict(replicas=3, loss_every=6, **common)
    for kind, optimizer in product(("mlp", "conv"), ("sgd", "nesterov", "adam")):
        obj = objective(kind, torch.float32)
        for batch, decay in ((1, 0.0), (24, 0.01)):
            settings = dict(optimizer=optimizer, batch_size=batch, weight_decay=decay, **three)
            yield (
                f"relax {kind} {optimizer}, batch {batch}",
                relax_with(obj, bent(obj), 0.3, **settings),
            )
    obj = objective("mlp")
    path = bent(obj)
    settings = dict(batch_size=5, momentum=0.5, augment=shifted, datasets_every=6, **three)
    for engine in ("loop", "vmap", "threads"):
        sets = {"few": obj.tensors(8)}
        run = relax_with(obj, path, [0.2, 0.4, 0.6], backend=engine, datasets=sets, **settings)
        yield f"relax, {engine}", (run, run.dataset_losses)
    sgd = ef.ProjectedSGD(0.01, 3, project_every=3, steps=24)
    many = [sgd.replace(batch_size=b, lr=lr) for b, lr in product((2, 24), (0.05, 0.1))]
    many += [sgd.replace(optimizer="adam"), sgd]
    starts, ids = [0.3] * 4 + [0.5] * 2, [0, 1, 2, 3, 4, 9]
    yield "relax_many", ef.relax_many(obj, path, starts, many, replicas=ids, seed=4)
    yield "relax, stored and resumed", list(stored(obj, path, dict(batch_size=2, **common)))


def shifted(inputs: Tensor, words: Tensor) -> Tensor:
    """An augmentation: every example moved by a random number."""
    return inputs + (words[:, :1] / 2**33).to(inputs)


def stored(obj: ef.Objective, path: ef.Path, settings: dict[str, Any]) -> Iterator[ef.Trajectory]:
    with tempfile.TemporaryDirectory() as folder:
        record, state = Path(folder) / "run.csv", Path(folder) / "run.state"
        yield relax_with(obj, path, 0.3, record_to=record, **settings)
        yield ef.Trajectory.load(record)
        for steps in (18, 24):  # the first leaves a checkpoint at update 12
            saved = {**settings, "steps": steps, "checkpoint": state, "checkpoint_every": 12}
            yield relax_with(obj, path, 0.3, **saved)


def force_results() -> Lines:
    obj = objective("mlp")
    path, settings = bent(obj), dynamics.ProjectedSGD(0.05, 4, project_every=5, momentum=0.5)
    force = dynamics.ForceSettings(directions=4, complement_examples=8, tol=1e-4)
    point = dynamics.point_force(obj, path, 0.4, force)
    curvature = (
        point.gradient,
        point.stiffness,
        point.curvature_slope,
        point.curvature_moments,
        point.curvature_moments_error,
    )
    noise = (
        point.covariance,
        point.noise,
        point.noise_slope,
        point.noise_share,
        point.noise_heterogeneity,
    )
    yield "point force", (curvature, noise)
    velocities = (point.energetic, point.entropic(settings), point.without_replacement(settings))
    limits = (point.stationary(settings), point.potential(settings), point.temperatures(settings))
    yield "point force, velocities", (velocities, limits, point.squared_distance(settings))
    compared = dynamics.compare_force(obj, path, [0.4, 0.7], settings, 6, seed=1, force=force)
    fit, drift = compared.fit, compared.drift
    statistics = (fit.slope, fit.chi2, fit.p_value, compared.correlation, compared.shuffled_p)
    yield "force, compared", (compared.table, statistics)
    noiseless = dynamics.noiseless_drift(obj, path, [0.4, 0.7], settings)
    yield "force, drift", (drift.velocity, drift.raw, drift.order_error, noiseless)
    temperature = dynamics.effective_temperature(drift, 0, compared.forces[0])
    yield "force, temperature", (temperature.predicted, temperature.measured, temperature.ratio)
    obj = objective("conv").with_norm("batch")
    path, rows = bent(obj), dynamics.scale_invariant_rows(obj)
    point = dynamics.point_force(obj, path, 0.4, force)
    share = dynamics.radial_share(obj, path, point, settings)
    yield "force, norm growth", (share.entropic, share.radial, share.tangent, rows)


def relaxation_results() -> Lines:
    obj = objective("mlp")
    for lr, batch in ((0.05, 2), (0.1, 4)):
        settings = dict(lr=lr, batch_size=batch, project_every=2, steps=60, replicas=8)
        run = relax_with(obj, bent(obj), 0.3, **settings)
        moved = (dynamics.displacement(run), dynamics.displacement(run, statistic="median"))
        time = dynamics.relaxation_time(run, fraction=0.8)
        arrivals = (time.times, time.censored, time.median, time.restricted_mean)
        yield f"relaxation, batch {batch}", (moved, dynamics.drift(run), arrivals)
    unused = dynamics.mean_interval(torch.zeros(2))
    times, groups = -streams.uniform((4, 20), 3).log(), []
    for row, (lr, batch) in zip(times, product((0.1, 0.2), (2, 4)), strict=True):
        row = row * batch / lr / 20
        passed = (row.clamp(max=1.2), row > 1.2, unused, False, 1.2, unused)
        groups.append(({"lr": lr, "batch": batch}, dynamics.RelaxationTime(*passed)))
    first, second = groups[0][1], groups[1][1]
    survival = dynamics.kaplan_meier(first)
    yield "survival", (survival.table, survival.median, survival.low, survival.high)
    yield "log rank", [dynamics.log_rank(first, second, paired=paired) for paired in (False, True)]
    for title, replicas in (("independent", None), ("clusters", [range(20)] * 4)):
        fit = dynamics.fit_scaling(groups, replicas=replicas)
        exponents = (fit.exponents, fit.std_errors, fit.low, fit.high)
        yield f"scaling, {title}", (exponents, fit.intercept, fit.shape, fit.log_likelihood)


def langevin_results() -> Lines:
    wells = (ef.RingPotential(7.0, 0.6, 3), ef.RidgePotential(30.0, 9.0), ef.ChannelPotential(20.0))
    start = 0.5 + 0.1 * draws(50, 2)
    for scheme in ("euler-maruyama", "leimkuhler-matthews", "baoab"):
        settings = dict(dt=0.01, steps=40, record_every=20, seed=3, scheme=scheme)
        starts = [(start, backend) for backend in BACKENDS] + [(start.float(), None)]
        for well, name in zip(wells, ("ring", "ridge", "channel"), strict=True):
            runs = [
                simulate_with(well, x, temperature=0.2, **settings, backend=b) for x, b in starts
            ]
            yield f"langevin {name}, {scheme}", [(run.positions, run.velocities) for run in runs]
    y = torch.linspace(0, 1, 5, dtype=torch.float64)
    densities = [(well.analytic_density(0.2, y), well.stiffness(y)) for well in wells]
    yield "langevin densities", densities
    run = ef.simulate_langevin(
        lambda x: x.square().sum(1), draws(9, 3), ef.LangevinIntegrator(0.2, 0.01), 20
    )
    yield "langevin, potential given as a function", run.positions


def training_results() -> Lines:
    images, held_out = random_images(48), random_images(24, seed=1)
    network = partial(models.digits_cnn, "batch", 3, channels=(4, 5, 6))
    config = TrainConfig(epochs=4, batch_size=16, pad=1)
    for nesterov in (False, True):
        chosen = replace(config, nesterov=nesterov)
        trained = train(network(), images, chosen, seed=2)
        evaluation = evaluate(trained.model, held_out)
        results = (trained.history, flat(trained.model), evaluation)
        yield f"training, {'nesterov' if nesterov else 'momentum'}", results
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "minimum.safetensors"
        manifest = minima.training_manifest("digits-cnn", images, config, 2)
        minima.save_minimum(file, trained.model, manifest)
        minimum = minima.read_minimum(file)
    stored = {**minimum.parameters, **minimum.buffers}
    yield "minimum, read again", [stored[name] for name in sorted(stored)]
    settings = ef.LineSettings(points=3, curvature_examples=16)
    lmc = ef.linear_mode_connectivity(network, images, config, (0, 2), settings, eval_data=held_out)
    yield "linear mode connectivity", (lmc.table, lmc.instability)
    built = [models.initialize(models.build(name), 3) for name in ("resnet8-w8", "digits-cnn")]
    yield "models", [flat(model) for model in built]
    digits, test = data.load("digits", limit=64)
    yield "digits", (digits.inputs(), digits.labels, test.inputs(), digits.mean, digits.std)


def random_results() -> Lines:
    seed, shape = streams.fold_in(7, "a purpose", 3), (9,)
    single = streams.normal(shape, seed, start=10**9, dtype=torch.float32)
    reals = (streams.uniform(shape, seed), streams.normal(shape, seed, 2), single)
    signs, order = streams.rademacher(shape, seed), streams.permutation(9, seed)
    yield "random numbers", (reals, streams.words(9, seed), signs, order)


# ---- printing and comparing ----------------------------------------------------------------------

TOPICS = (
    point_results, estimator_results, path_results, relax_results, force_results,
    relaxation_results, langevin_results, training_results, random_results, operation_results,
)  # fmt: skip


def lines() -> Iterator[str]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for topic in TOPICS:
        for name, result in topic():
            yield line(name, result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compare", metavar="FILE", type=Path, help="print what differs from it")
    chosen = parser.parse_args()
    if chosen.compare is None:
        for text in lines():
            print(text, flush=True)
        return 0
    before = chosen.compare.read_text().splitlines()
    different = list(differences(before, list(lines())))
    print("\n".join(different) or f"{len(before)} results agree to the last bit")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
