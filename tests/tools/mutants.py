"""Whether the default tier finds one-line defects: each is made, and some test has to fail.

python tests/tools/mutants.py [NUMBER ...]

The package of the checkout is changed in place and restored; run it in a clone. A test that ends
with an error other than a failed assertion counts as well: the defect was noticed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """A defect: text of a module of the package, what replaces it, and who should notice."""

    module: str
    old: str
    new: str
    tests: str  # folders or files under tests/, separated by spaces


MUTANTS = [
    # -- estimates
    Mutant("_utils/results.py", "/ (n - 1)", "/ n", "_utils"),
    Mutant("_utils/results.py", "math.sqrt(variance / n)", "math.sqrt(variance)", "_utils"),
    Mutant(
        "_utils/results.py",
        "cls(exact + mean,",
        "cls(mean,",
        "_utils curvature/estimators/test_gauss_newton_trace.py",
    ),
    Mutant(
        "curvature/estimators/_probes.py",
        "estimate.std_error <= tol * abs(estimate.value)",
        "estimate.std_error <= tol * estimate.value",
        "curvature/estimators/test_trace_methods.py curvature/estimators/test_trace.py",
    ),
    Mutant(
        "curvature/estimators/_probes.py",
        "dataclasses.replace(estimate, converged=False)",
        "estimate",
        "curvature/estimators/test_trace_methods.py curvature/estimators/test_trace.py",
    ),
    Mutant("dynamics/_relaxation.py", "math.sqrt(n)", "n", "dynamics"),
    # -- Hessian products
    Mutant(
        "curvature/hvp/_jvp_rules.py",
        "ctx.tangent(0) * (ctx.value(ctx.node) > 0)",
        "ctx.tangent(0)",
        "curvature/hvp",
    ),
    Mutant(
        "curvature/hvp/_second_order_terms.py",
        "return 2 * inner(aligned(a, dims) * aligned(b, dims), g)",
        "return inner(aligned(a, dims) * aligned(b, dims), g)",
        "curvature/hvp",
    ),
    Mutant(
        "curvature/hvp/transformer/_attention.py",
        "bends.add_(both, alpha=2 * self.attention.scale)",
        "bends.add_(both, alpha=self.attention.scale)",
        "curvature/hvp/test_transformer.py",
    ),
    Mutant("curvature/hvp/_tiles.py", "weights[:counted] = 1", "weights[:] = 1", "curvature/hvp"),
    Mutant(
        "curvature/hvp/_engine.py",
        "sums += weighted_tangent.flatten(1).sum(1)",
        "pass",
        "curvature/hvp",
    ),
    Mutant(
        "curvature/hvp/_node.py",
        "self._first.add_(self._second)",
        "pass",
        "curvature/hvp curvature/operators",
    ),
    # -- per-example gradients
    Mutant(
        "ops/norm_example_grads/reference.py",
        "(a.x - a.mean) * a.rstd",
        "a.x * a.rstd",
        "ops/test_norm_example_grads.py",
    ),
    # -- kernels
    Mutant(
        "ops/projected_step/reference.py",
        "alpha=1 - a.dampening",
        "alpha=1",
        "ops/test_projected_step.py",
    ),
    Mutant(
        "ops/projected_step/reference.py",
        "squared = torch.where(t == 0, here, torch.where(t == 1, following, squared))",
        "squared = torch.where(t == 0, here, squared)",
        "ops/test_projected_step.py",
    ),
    Mutant(
        "ops/norm_act_tangents/reference.py",
        "forms = (a.bend * pre.square())",
        "forms = (a.bend * pre)",
        "ops/test_norm_act_tangents.py",
    ),
    Mutant("ops/_checks.py", "if start < reached:", "if False:", "ops"),
    Mutant(
        "ops/_checks.py",
        "if isinstance(tensor, Tensor) and tensor.requires_grad:",
        "if False:",
        "ops",
    ),
    # -- paths and dynamics
    Mutant(
        "paths/_path.py",
        "along / torch.linalg.vector_norm(along, dim=1, keepdim=True)",
        "along",
        "paths/test_path.py",
    ),
    Mutant(
        "dynamics/force/_point_force.py",
        "return -self.gradient / self.length",
        "return self.gradient / self.length",
        "dynamics/force",
    ),
    Mutant(
        "dynamics/force/_point_force.py", "/ (2 * (1 - settings.momentum))", "/ 2", "dynamics/force"
    ),
    Mutant(
        "dynamics/langevin/_potentials.py",
        "integral: Tensor = torch.sqrt(2 * math.pi * v) * phi + v * torch.exp(-0.5 / v)",
        "integral: Tensor = torch.sqrt(2 * math.pi * v) * phi",
        "dynamics/langevin",
    ),
    Mutant(
        "dynamics/projected_sgd/_replica_state.py",
        "& ~loss.isfinite()",
        "& (loss != loss)",
        "dynamics/projected_sgd",
    ),
    Mutant(
        "paths/_elastic_band.py",
        "gradients - along * tangents",
        "gradients + along * tangents",
        "paths",
    ),
    Mutant(
        "paths/_elastic_band.py",
        "(lengths[1:] - lengths[:-1])",
        "(lengths[1:] + lengths[:-1])",
        "paths",
    ),
    # -- eigenvalues, losses, data
    Mutant(
        "curvature/estimators/_block_lanczos.py",
        "converged = bool((residuals <= limits).all())",
        "converged = True",
        "curvature/estimators",
    ),
    Mutant(
        "objective/_mean_loss.py", "(0.5 * self.weight_decay)", "self.weight_decay", "objective"
    ),
    Mutant("training/data.py", ".sub_(mean).div_(std)", ".sub_(mean)", "training"),
    Mutant("dynamics/_survival.py", "time[below[0]]", "time[below[-1]]", "dynamics"),
    # -- files and processes
    Mutant("_utils/atomic_io.py", "os.replace(temporary, path)", "pass", "_utils"),
]


def noticed(mutant: Mutant) -> bool:
    """Whether a test of the default tier fails with the defect."""
    path = ROOT / "entropic_fast" / mutant.module
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.module}: {mutant.old!r} is not there once"
    path.write_text(text.replace(mutant.old, mutant.new))
    named = [f"tests/{name}" for name in mutant.tests.split()]
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--default", *named]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finally:
        path.write_text(text)
    return run.returncode in (1, 2)  # failed tests; modules that cannot be imported


def main(numbers: list[str]) -> None:
    """Print what became of each defect; exit with 1 if one was not noticed."""
    chosen = [MUTANTS[int(number)] for number in numbers] or MUTANTS
    missed = 0
    for mutant in chosen:
        found = noticed(mutant)
        missed += not found
        print("found " if found else "MISSED", mutant.module, mutant.old, flush=True)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main(sys.argv[1:])
