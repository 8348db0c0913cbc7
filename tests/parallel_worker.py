"""What one of several processes computes in `test_parallel`: every shared quantity, to a file.

torchrun --nproc-per-node W tests/parallel_worker.py FOLDER [FAULT]
"""

import os
import sys

import torch
from torch.distributed.fsdp import fully_shard

import entropic_fast as ef
from entropic_fast.parallel import init
from entropic_fast.store import save_tensors

torch.set_num_threads(1)


def network(norm):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten()]
    if norm:
        layers.insert(1, torch.nn.BatchNorm2d(4))
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 3)).double()


def images(n):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


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
    return found | along_a_path(share(whole))


def at_a_point(obj, theta):
    columns = torch.randn(len(theta), 3, generator=torch.Generator().manual_seed(2)).double()
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
    }
    if not obj.separable:
        return found
    pairs = ef.fisher_eigenvalues(obj, 2, theta, tol=1e-8)
    return found | {
        "norms": ef.gradient_norms(obj, theta),
        "norms by": torch.stack(list(ef.gradient_norms(obj, theta, by="module").values())),
        "fisher": pair(ef.fisher_trace(obj, theta))[:1],
        "ggn trace": pair(ef.ggn_trace(obj, theta))[:1],
        "beside": pair(ef.hessian_trace(obj, theta, probes=4, method="gauss-newton")),
        "gram": ef.score_gram(obj, theta),
        "gram by": torch.stack(list(ef.score_gram(obj, theta, by="parameter").values())),
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
        obj, band.path, [0.3, 0.5, 0.7], lr=[0.01, 0.02, 1e9], batch_size=4, project_every=5,
        steps=20, loss_every=10, fixed_sets={"few": images(3)},
    )  # fmt: skip
    return {
        "pivots": band.path.pivots,
        **{f"profile.{c}": torch.as_tensor(profile[c]).double() for c in profile.columns},
        "position": run.position,
        "relax losses": torch.stack([run.loss, run.full_loss, run.fixed_losses["few"]]),
        "lost": run.diverged_at,
        "steps": run.steps,
    }


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
    x, y = images(8)
    x = x.flatten(1)
    if kind == "data" and rank == 1:
        x = x + 1
    obj = ef.shard(ef.Objective(net, "cross_entropy", (x, y)))
    if kind == "elsewhere" and rank == 1:
        obj.loss()
    if kind == "killed" and rank == 1:
        os.kill(os.getpid(), 9)
    if kind == "loss":  # NaN for the last example alone, which the last process takes
        x[-1] = float("nan")
    obj.gradient()


if __name__ == "__main__":
    init(timeout=60.0)
    if len(sys.argv) > 2:
        try:
            fault(sys.argv[2])
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            sys.exit(3)
        sys.exit(0)
    results = everything(ef.shard)
    results = {k: torch.as_tensor(v).contiguous() for k, v in results.items()}
    save_tensors(f"{sys.argv[1]}/{os.environ['RANK']}.safetensors", results, {})
