"""What one of several processes computes in `test_parallel`: every shared quantity, to a file.

torchrun --nproc-per-node W tests/support/parallel_worker.py FOLDER [FAULT]
"""

import os
import signal
import sys
import time
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import entropic_fast as ef
from entropic_fast._utils.atomic_io import save_tensors
from entropic_fast.curvature.per_example._chunks import ExampleGradients
from entropic_fast.distributed import RankFailedError, init
from entropic_fast.dynamics import ProjectedSGD, measure_drift, relax, relax_many
from entropic_fast.dynamics.projected_sgd._minibatches import Minibatches
from entropic_fast.objective import Objective
from entropic_fast.paths._descent import Descent

torch.set_num_threads(1)


def network(norm):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten()]
    if norm:
        layers.insert(1, torch.nn.BatchNorm2d(4))
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 3)).double()


class Waves(torch.nn.Module):
    """A complex layer, and constants before it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(32, 4).double()
        self.layer = torch.nn.Linear(4, 3, dtype=torch.complex128)

    def forward(self, x):
        h = torch.tanh(self.first(x.flatten(1)))
        return self.layer(torch.complex(h, h.flip(1))).abs()


class Parts(torch.nn.Module):
    """Of two inputs, with an output of two parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(32, 3).double(), torch.nn.Linear(4, 3).double()

    def forward(self, a, b):
        h = torch.tanh(self.b(b))
        return {"scores": self.a(a.flatten(1)) * h, "hidden": h}


def two_parts(outputs, y):
    losses = torch.nn.functional.cross_entropy(outputs["scores"], y, reduction="none")
    return losses + outputs["hidden"].square().mean(1)


def about_the_mean(outputs, y):
    return (outputs - outputs.mean(0)).square().mean() + outputs[:, 0].mean() ** 2


def images(n):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


class Counted(ExitStack):
    """Counts what this process does of shared work, while it is entered.

    Attributes:
        of: rows made for the Gram matrix, replicas run, and passes of AutoNEB's pivots.
    """

    def __enter__(self):
        self.of = dict.fromkeys(COUNTS, 0)
        made, beginning = ExampleGradients.local_chunks, Minibatches.__init__
        losses, energies = Objective.losses, Descent._local_energies

        def local_chunks(gradients, *args):
            for start, rows in made(gradients, *args):
                self.of["gram rows"] += len(rows)
                yield start, rows

        def one_pass(obj, *args):
            self.of["passes"] += 1
            return losses(obj, *args)

        def own_energies(*args):
            with patch.object(Objective, "losses", one_pass):
                return energies(*args)

        def begin(minibatches, obj, batch_size, seed, ids, *args):
            self.of["replicas"] += len(ids)
            beginning(minibatches, obj, batch_size, seed, ids, *args)

        self.enter_context(patch.object(ExampleGradients, "local_chunks", local_chunks))
        self.enter_context(patch.object(Descent, "_local_energies", own_energies))
        self.enter_context(patch.object(Minibatches, "__init__", begin))
        return self


COUNTS = {"gram rows": 23, "replicas": 9, "passes": 28}  # of all processes in `counts`


def counts(share):
    """What this process does of each shared work, by name."""
    obj = share(ef.Objective(network(False), "cross_entropy", images(23), batch_size=7))
    a = obj.parameters_vector()
    path = ef.linear_path(a, 1.1 * a)
    config = ef.AutoNEBConfig(pivots=7, max_pivots=7, cycles=((4, 0.1),), batch_size=8)
    with Counted() as counted:
        ef.score_gram(obj)
        relax(obj, path, [0.1 * i for i in range(9)], ProjectedSGD(0.01, 4, steps=15))
        ef.auto_neb(obj, a, 1.1 * a, config)
    return counted.of


def everything(share):
    """Every quantity that processes share, by name; `share` makes an objective shared."""
    found = {}
    for name, n, norm, options in (
        ("plain", 23, False, {"batch_size": 7}),
        ("few", 2, False, {}),  # fewer examples than processes
        ("normed", 16, True, {"norm": "batch", "batch_size": 4}),
    ):
        obj = share(ef.Objective(network(norm), "cross_entropy", images(n), **options))
        theta = 1.1 * obj.parameters_vector()
        found |= {f"{name}.{key}": value for key, value in at_a_point(obj, theta).items()}
    whole = ef.Objective(network(False), "cross_entropy", images(23), batch_size=7)
    batches = [(x, y) for _, x, y in whole.batches(batch_size=5)]
    obj = share(ef.Objective(network(False), "cross_entropy", batches))
    found |= {f"batches.{key}": v for key, v in at_a_point(obj, obj.parameters_vector()).items()}
    x, y = images(23)
    obj = share(ef.Objective(network(False).float(), "cross_entropy", (x.float(), y)))
    found |= {f"single.{key}": v for key, v in at_a_point(obj, obj.parameters_vector()).items()}
    normed = share(ef.Objective(network(True), "cross_entropy", images(16)))
    theta = normed.parameters_vector()
    losses = ef.path_losses(normed, ef.linear_path(theta, 1.2 * theta), points=3)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(32, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)]
    flat = torch.nn.Sequential(torch.nn.Flatten(), *layers).double()
    flat = share(ef.Objective(flat, "cross_entropy", images(17), norm="batch", batch_size=5))
    found |= {"flat loss": flat.loss(), "flat gradient": flat.gradient()}
    decayed = ef.Objective(network(False), "cross_entropy", images(23), weight_decay=0.3)
    found |= with_decay(share(decayed))
    waves = share(ef.Objective(Waves(), "cross_entropy", images(17), parameters="layer"))
    found |= {"complex gradient": waves.gradient(), "complex gram": ef.score_gram(waves)}
    found["complex hessian"] = ef.HessianOperator(waves) @ torch.eye(waves.num_params).double()
    parts = share(ef.Objective(Parts(), two_parts, {"a": x[:17], "b": x[:17, 0, 0], "y": y[:17]}))
    found |= {"parts gradient": parts.gradient(), "parts scores": ef.score_matrix(parts)}
    found["parts hessian"] = ef.HessianOperator(parts) @ torch.eye(parts.num_params).double()
    mixed = share(ef.Objective(network(False), about_the_mean, images(17), coupled=True))
    v = torch.linspace(-1, 1, mixed.num_params).double()
    found |= {"coupled loss": mixed.loss(), "coupled gradient": mixed.gradient()}
    found |= {"coupled hessian": ef.HessianOperator(mixed) @ v}
    found |= {"coupled trace": pair(ef.hessian_trace(mixed, probes=4))}
    found["path losses"] = torch.tensor([losses[c].tolist() for c in ("loss", "accuracy")])
    return found | along_a_path(share(whole))


def with_decay(obj):
    a = obj.parameters_vector()
    path = ef.linear_path(a, 1.2 * a)
    config = ef.AutoNEBConfig(pivots=4, max_pivots=4, cycles=((3, 0.1),), weight_decay=0)
    band = ef.auto_neb(obj, a, 1.2 * a, config)
    run = ef.relax(
        obj,
        path,
        [0.2, 0.4],
        ef.ProjectedSGD(0.01, 4, project_every=5, steps=10),
        recording=ef.Recording(every=5, loss_every=10),
    )
    found = {f"decayed.{key}": value for key, value in at_a_point(obj, a).items()}
    return found | {
        "decayed path": torch.as_tensor(ef.path_losses(obj, path, points=3)["loss"]).double(),
        "decayed pivots": band.path.pivots,
        "decayed position": run.position,
        "decayed full loss": run.full_loss,
    }


def at_a_point(obj, theta):
    columns = torch.randn(len(theta), 3, generator=torch.Generator().manual_seed(2)).to(theta)
    hessian = ef.HessianOperator(obj, theta)
    loss, accuracy = obj.evaluate(theta)
    found = {
        "loss": obj.loss(theta),
        "evaluate": torch.tensor([loss, accuracy]),
        "gradient": obj.gradient(theta),
        "losses": obj.example_losses(theta),
        "hessian": hessian @ columns,
        "again": hessian @ columns,  # from values that are kept
        "forms": hessian.quadratic_forms(columns),
        "ggn": ef.GGNOperator(obj, theta) @ columns,
        "trace": pair(ef.hessian_trace(obj, theta, probes=4)),
        "top": ef.top_eigenvalues(hessian, 2, tol=1e-8).values,
        "density": ef.spectral_density(hessian, ef.DensitySettings(probes=2, steps=8)).density,
        "log det": ef.log_determinant(
            hessian, delta=1.0, density=ef.DensitySettings(probes=2, steps=8)
        ).value,
    }
    if not obj.separable:
        return found
    pairs = ef.fisher_eigenvalues(obj, 2, theta, lanczos=ef.LanczosSettings(tol=1e-8))
    return found | {
        "norms": ef.gradient_norms(obj, theta),
        "norms by": torch.stack(list(ef.gradient_norms(obj, theta, group_by="module").values())),
        "fisher": pair(ef.fisher_trace(obj, theta)),
        "ggn trace": pair(ef.ggn_trace(obj, theta)),
        "beside": pair(ef.hessian_trace(obj, theta, probes=4, method="gauss-newton")),
        "gram": ef.score_gram(obj, theta),
        "gram by": torch.stack(list(ef.score_gram(obj, theta, group_by="parameter").values())),
        "gram first": ef.score_gram(obj, theta, max_examples=min(5, obj.num_examples)),
        "spectrum": ef.score_spectrum(obj, theta),
        "scores": ef.score_matrix(obj, theta),
        "fisher top": pairs.values,
    }


def along_a_path(obj):
    a = obj.parameters_vector()
    b = a + torch.randn(len(a), generator=torch.Generator().manual_seed(3)).double()
    config = ef.AutoNEBConfig(pivots=5, max_pivots=6, cycles=((4, 0.1), (3, 0.01)), batch_size=8)
    band = ef.auto_neb(obj, a, b, config)
    profile = ef.curvature_profile(obj, band.path, points=3)
    run = ef.relax(
        obj,
        band.path,
        [0.3, 0.5, 0.7],
        ef.ProjectedSGD([0.01, 0.02, 1e9], 4, project_every=5, steps=20),
        recording=ef.Recording(loss_every=10, datasets={"few": images(3)}),
    )
    settings = [ef.ProjectedSGD(0.01, b, project_every=5, steps=10) for b in (4, 8, 4)]
    many = relax_many(obj, band.path, [0.2, 0.4, 0.6], settings)
    bursts = ProjectedSGD(0.01, 4, project_every=5, steps=5)
    drift = measure_drift(obj, band.path, [0.3, 0.6], bursts, replicas=3)
    return {
        "relax many": torch.cat([r.position[:, -1] for r in many]),
        "drift": drift.velocity,
        "pivots": band.path.pivots,
        **{f"profile.{c}": torch.as_tensor(profile[c]).double() for c in profile.columns},
        "position": run.position,
        "relax losses": torch.stack([run.loss, run.full_loss, run.dataset_losses["few"]]),
        "lost": run.diverged_at,
        "steps": run.steps,
    }


def say(line):
    os.write(2, f"{line}\n".encode())  # whole, where others write too


def pair(estimate):
    return torch.tensor([estimate.value, estimate.std_error])


def fault(kind):
    """Ways for one process to go wrong."""
    rank = int(os.environ["RANK"])
    if kind == "model":
        torch.manual_seed(rank)
        net = torch.nn.Linear(32, 3).double()
    else:
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32, 3)).double()
        torch.manual_seed(0)
        torch.nn.init.normal_(net[1].weight)
        torch.nn.init.zeros_(net[1].bias)
    if kind == "fsdp":
        fully_shard(net)
    if kind == "function" and rank == 1:
        net.append(torch.nn.Tanh())
    x, y = images(8)
    x = x.flatten(1)
    if kind == "data" and rank == 1:
        x = x + 1
    obj = ef.distribute(ef.Objective(net, "cross_entropy", (x, y)))
    if kind == "arguments":
        differ(obj, rank)
    if kind == "elsewhere" and rank == 1:
        obj.loss()
    if kind == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "late" and rank == 1:
        time.sleep(1.5 * PATIENT)
    if kind == "loss":  # NaN for the last example alone, which the last process takes
        x[-1] = float("nan")
    obj.gradient()
    if kind == "late":
        say("was waited for")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        obj.gradient()


def differ(obj, rank):
    """Calls with other arguments on process 1: each is refused by all, who then go on together."""
    other = rank == 1
    theta = obj.parameters_vector() + 0.01 * other
    columns = torch.ones(obj.num_params, 2).double()
    columns[0] += 0.01 * other
    hessian = ef.HessianOperator(obj)
    path = ef.linear_path(obj.parameters_vector(), 2 * obj.parameters_vector())
    x, y = images(8)
    x = x.flatten(1)
    calls = {
        "point": lambda: obj.gradient(theta),
        "vectors": lambda: hessian @ columns,
        "forms": lambda: hessian.quadratic_forms(columns),
        "seed": lambda: ef.hessian_trace(obj, probes=2, seed=rank),
        "replicas": lambda: relax(obj, path, [0.1, 0.2], ProjectedSGD(0.1, 4, steps=10 + rank)),
        "path": lambda: ef.auto_neb(
            obj, path.pivots[0], path.pivots[1] + 0.01 * other, ef.AutoNEBConfig(pivots=4)
        ),
        "examples": lambda: ef.score_gram(obj, max_examples=4 + other),
        "data": lambda: (obj.with_data((x + 1, y)) if other else obj).loss(),
        "dtype": lambda: (obj.cast(torch.float32) if other else obj).gradient(),
        "single Gram": lambda: ef.score_gram(obj.cast(torch.float32) if other else obj),
        "budget": lambda: ef.score_gram(obj, memory_budget=600 if other else None),
    }
    for name, call in calls.items():
        try:
            call()
        except (RankFailedError, ValueError) as error:
            say(f"{name}: {type(error).__name__}: {error}")
    with torch.inference_mode():
        say(f"inference: {abs(obj.loss() - obj.without_distribution().loss()) < 1e-12}")
    failing = patch.object(Objective, "finite_losses", side_effect=RuntimeError("out of luck"))
    with failing if other else ExitStack():
        try:
            obj.loss()
        except RuntimeError as first:
            try:
                obj.loss()
            except RuntimeError as second:
                say(f"again: {first} | {second}")
    with patch.object(dist, "get_backend", lambda group=None: "nccl" if group is None else "gloo"):
        loss = ef.distribute(obj.without_distribution()).loss()  # a model on the CPU beside GPUs
        say(f"beside: {abs(loss - obj.without_distribution().loss()) < 1e-12}")
    group = dist.new_group([0, 2])
    try:
        ef.distribute(obj.without_distribution(), group).gradient()
    except ValueError as error:
        say(f"group: {error}")


PATIENT = 10.0  # seconds until a process that gives no sign of life is given up, where one stops

if __name__ == "__main__":
    init(timeout=PATIENT if "late" in sys.argv else 60.0)
    if len(sys.argv) > 2:
        try:
            fault(sys.argv[2])
        except Exception as error:
            say(f"{type(error).__name__}: {error}")
            sys.exit(3)
        sys.exit(0)
    results = everything(ef.distribute)
    results |= {f"counted.{k}": v for k, v in counts(ef.distribute).items()}
    results = {k: torch.as_tensor(v).contiguous() for k, v in results.items()}
    save_tensors(f"{sys.argv[1]}/{os.environ['RANK']}.safetensors", results, {})
