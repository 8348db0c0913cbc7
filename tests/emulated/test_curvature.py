"""All of curvature on the emulated GPU: the CPU's results, in full float32, with few launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import emulated_gpu
import pytest
import torch
from tolerances import relative_norm
from torch import Tensor, nn

import entropic_fast as ef
from entropic_fast import curvature
from entropic_fast._torch import memory_budget as memory
from entropic_fast._utils import workspace as scratch
from entropic_fast.curvature.operators import _fisher as fisher_operator
from entropic_fast.curvature.per_example.layer_rules.embedding import EmbeddingGrad
from entropic_fast.ops.random_bits import streams as random
from entropic_fast.training import models

# Few probes and steps, as what is compared is the device.
pytestmark = pytest.mark.filterwarnings("ignore::entropic_fast.NotConvergedWarning")

DEVICE = "emulated:0"
# Relative norm of what differs in the order of sums; through eigenvectors and their residuals.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-12}


class Tokens(nn.Module):
    """An embedding, layer normalization and a linear layer, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.embedding(x)))).mean(1)


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Softplus(),
        nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4))


INPUTS: dict[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]] = {
    cnn: lambda g: torch.randn(12, 2, 6, 6, generator=g),
    mlp: lambda g: torch.randn(12, 5, generator=g),
    Tokens: lambda g: torch.randint(11, (12, 7), generator=g),
}


def objective(make: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> ef.Objective:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make()
    data = INPUTS[make](generator), torch.randint(4, (12,), generator=generator)
    return ef.Objective(model.to(dtype).eval(), "cross_entropy", data, device=device, batch_size=5)


def pairs_of(pairs: Any) -> list[Any]:
    """Eigenpairs but for the signs of their vectors."""
    return [pairs.values, pairs.vectors.abs()]


def estimates(found: Any) -> list[float]:
    many = found.values() if isinstance(found, dict) else [found]
    return [number for e in many for number in (e.value, e.std_error)]


def products(kind: type) -> Callable[[ef.Objective, Tensor], list[Tensor]]:
    return lambda obj, v: [kind(obj) @ v, kind(obj) @ v[:, 0]]


def density(obj: ef.Objective, _: Tensor) -> list[Tensor]:
    found = ef.spectral_density(
        ef.HessianOperator(obj), ef.DensitySettings(probes=2, steps=6), orthogonal_to=_[:, 0]
    )
    return [found.nodes, found.weights]


def profile(obj: ef.Objective, v: Tensor) -> list[Tensor]:
    theta = obj.parameters_vector()
    path = ef.linear_path(theta, theta + 0.01 * v[:, 0], 3)
    quantities = ("loss", "fisher_trace", "hessian_trace", "top_eigenvalue", "norm", "density")
    table = ef.curvature_profile(
        obj,
        path,
        2,
        quantities,
        settings=ef.CurvatureSettings(
            probes=4, tol=0.3, density=ef.DensitySettings(probes=2, steps=4)
        ),
    )
    return [torch.tensor(table[name]).double() for name in table.columns]


def log_determinant(obj: ef.Objective, v: Tensor) -> list[float]:
    found = ef.log_determinant(
        ef.HessianOperator(obj),
        orthogonal_to=v[:, 0],
        delta=0.1,
        density=ef.DensitySettings(probes=2, steps=6),
    )
    return [found.value, found.std_error]


def diagonal(obj: ef.Objective, v: Tensor) -> list[Tensor]:
    found = ef.hessian_diagonal(obj, probes=4, deflate=v[:, :1])
    return [found.value, found.std_error]


def jacobian(obj: ef.Objective, v: Tensor) -> list[Tensor]:
    J = ef.JacobianOperator(obj)
    image = J @ v
    return [image, J.T @ image]


def trace(method: str, **options: Any) -> Callable[[ef.Objective, Tensor], list[float]]:
    probes = {"hutch++": 6, "xtrace": 8}.get(method, 4)
    return lambda obj, _: estimates(ef.hessian_trace(obj, probes=probes, method=method, **options))


CALLS: dict[str, Callable[[ef.Objective, Tensor], list[Any]]] = {
    "score_matrix": lambda obj, _: [ef.score_matrix(obj)],
    "score_gram in memory": lambda obj, _: [ef.score_gram(obj, strategy="memory")],
    "score_gram on disk": lambda obj, _: [ef.score_gram(obj, strategy="disk")],
    "score_gram recomputed": lambda obj, _: [
        ef.score_gram(obj, strategy="recompute", memory_budget=200_000)
    ],
    "score_gram in float32": lambda obj, _: [ef.score_gram(obj, products="float32")],
    "score_gram by parameter": lambda obj, _: list(
        ef.score_gram(obj, group_by="parameter").values()
    ),
    "score_spectrum": lambda obj, _: [ef.score_spectrum(obj)],
    "gradient_norms": lambda obj, _: list(ef.gradient_norms(obj, group_by="parameter").values()),
    "fisher_trace": lambda obj, _: estimates(ef.fisher_trace(obj)),
    "fisher_eigenvalues": lambda obj, _: pairs_of(curvature.fisher_eigenvalues(obj, 2)),
    "ggn_trace": lambda obj, _: estimates(ef.ggn_trace(obj)),
    "ntk_gram": lambda obj, _: [ef.ntk_gram(obj, max_examples=5)],
    "with_sampled_labels": lambda obj, _: [
        ef.with_sampled_labels(obj, draws=2).tensors()[1].double(),
        ef.gradient_norms(ef.with_sampled_labels(obj, draws=2)),
    ],
    "HessianOperator": products(ef.HessianOperator),
    "GGNOperator": products(ef.GGNOperator),
    "FisherOperator": products(ef.FisherOperator),
    "JacobianOperator": jacobian,
    "quadratic_forms": lambda obj, v: [ef.HessianOperator(obj).quadratic_forms(v)],
    "network_forms": lambda obj, v: [
        (ef.HessianOperator(obj) - ef.GGNOperator(obj)).quadratic_forms(v)
    ],
    "hutchinson": trace("hutchinson"),
    "hutchinson by parameter": trace("hutchinson", group_by="parameter"),
    "hutch++": trace("hutch++"),
    "xtrace": trace("xtrace"),
    "gauss-newton": trace("gauss-newton"),
    "hessian_diagonal": diagonal,
    "top_eigenvalues": lambda obj, _: pairs_of(
        ef.top_eigenvalues(ef.HessianOperator(obj), 2, 1e-4)
    ),
    "tracked_eigenpairs": lambda obj, _: [
        curvature.tracked_eigenpairs(ef.HessianOperator(obj), tol=1e-4).values[:1]
    ],
    "spectral_density": density,
    "log_determinant": log_determinant,
    "curvature_profile": profile,
}


@contextlib.contextmanager
def asked_for(how: str) -> Iterator[None]:
    """What a user may ask torch for, by its older and its newer setting."""
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    legacy = torch.get_float32_matmul_precision()
    try:
        if how == "high":
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        torch.backends.cuda.matmul.fp32_precision = before[0]
        torch.backends.mkldnn.matmul.fp32_precision = before[1]


def assert_alike(found: list[Any], expected: list[Any], limit: float) -> None:
    for got, wanted in zip(found, expected, strict=True):
        if isinstance(got, Tensor):
            assert relative_norm(got.cpu(), wanted) <= limit
        else:
            assert got == pytest.approx(wanted, rel=limit, abs=limit)


def assert_as_on_a_cpu(names: list[str], make: Any, dtype: torch.dtype, how: str) -> None:
    on_cpu, on_gpu = objective(make, dtype, "cpu"), objective(make, dtype, DEVICE)
    v = random.normal((on_cpu.num_params, 3), 5, dtype=dtype)
    on_device = v.to(DEVICE)
    for name in names:
        expected = CALLS[name](on_cpu, v)
        with asked_for(how):
            found = CALLS[name](on_gpu, on_device)
        try:
            assert_alike(found, expected, TOLERANCE[dtype])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        assert not emulated_gpu.reduced_precision, f"{name}: {emulated_gpu.reduced_precision}"


QUICK = [
    "score_matrix", "score_gram in memory", "score_gram by parameter", "gradient_norms",
    "HessianOperator", "FisherOperator", "JacobianOperator", "quadratic_forms",
]  # fmt: skip


@pytest.mark.parametrize(
    "make, dtype, how",
    [(cnn, torch.float32, "high"), (mlp, torch.float64, "high"), (Tokens, torch.float32, "tf32")],
)
def test_all_results_are_those_of_a_cpu_in_full_precision(make: Any, dtype: Any, how: str):
    assert_as_on_a_cpu(list(CALLS), make, dtype, how)


@pytest.mark.parametrize(
    "make, dtype, how",
    [(cnn, torch.float64, "tf32"), (mlp, torch.float32, "tf32"), (Tokens, torch.float64, "high")],
)
def test_main_results_in_the_other_dtype(make: Any, dtype: Any, how: str):
    assert_as_on_a_cpu(QUICK, make, dtype, how)


def test_searches_with_a_dense_matrix_in_full_precision():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 40, generator=generator)
    matrix = matrix + matrix.T
    values = torch.linalg.eigvalsh(matrix.double()).flip(0)
    on_device = matrix.to(DEVICE)
    for how in ("high", "tf32"):
        with asked_for(how):
            found = ef.top_eigenvalues(on_device, 3, 1e-4, block=2).values
            curvature.operator_trace(on_device, 8, method="hutch++")
            curvature.operator_diagonal(on_device, 4, deflate=on_device[:, :2])
            ef.spectral_density(on_device, ef.DensitySettings(2, 8), orthogonal_to=on_device[:, 0])
        assert relative_norm(found.cpu(), values[:3]) < 1e-5
        assert not emulated_gpu.reduced_precision


def resnet(examples: int = 8) -> ef.Objective:
    generator = torch.Generator().manual_seed(0)
    data = (
        torch.randn(examples, 3, 32, 32, generator=generator),
        torch.randint(10, (examples,), generator=generator),
    )
    return ef.Objective(
        models.initialize(models.resnet(20), 1), "cross_entropy", data, device=DEVICE
    )


def seen(work: Callable[[], Any]) -> emulated_gpu.Counts:
    with emulated_gpu.counted() as counts:
        work()
    return counts


def test_launches_of_scores_and_gradients():
    """Ceilings: a change that lowers a count lowers its ceiling."""
    obj = resnet()
    theta = obj.parameters_vector()
    vectors = random.normal((obj.num_params, 4), 0, dtype=obj.dtype).to(DEVICE)
    fisher = ef.FisherOperator(obj)
    ceilings = {
        "gradient": (lambda: obj.gradient(theta), 160, 1),
        "Fisher product": (lambda: fisher @ vectors, 401, 3),
        "score_gram": (lambda: ef.score_gram(obj), 733, 3),
        "gradient_norms": (lambda: ef.gradient_norms(obj), 669, 3),
    }
    for name, (work, launches, synchronizations) in ceilings.items():
        counts = seen(work)
        assert counts.launches <= launches, f"{name}: {counts}"
        assert counts.synchronizations <= synchronizations, f"{name}: {counts}"
        assert counts.copies == 0, f"{name}: {counts}"


def test_a_product_waits_once_for_vectors_and_result_together():
    obj = objective(cnn, torch.float32, DEVICE)
    vectors = random.normal((obj.num_params, 3), 0, dtype=obj.dtype).to(DEVICE)
    hessian, ggn, jacobian = (
        kind(obj) for kind in (ef.HessianOperator, ef.GGNOperator, ef.JacobianOperator)
    )
    works: dict[str, tuple[Callable[[], Any], int]] = {
        "Hessian": (lambda: hessian @ vectors, 1),
        "GGN": (lambda: ggn @ vectors, 1),
        "forms": (lambda: hessian.quadratic_forms(vectors), 1),
        "without a look": (lambda: hessian.unchecked(vectors), 0),
        "Jacobian": (lambda: jacobian @ vectors, 1),
    }
    for name, (work, synchronizations) in works.items():
        for _ in range(4):  # the comparison of two examples, values kept, a graph captured
            work()
        assert seen(work).synchronizations == synchronizations, name


def test_launches_of_a_fisher_product_do_not_grow_with_its_parameters(
    monkeypatch: pytest.MonkeyPatch,
):
    generator = torch.Generator().manual_seed(0)
    for size, held in ((3_000, scratch.GPU.products), (3_000, 1000), (40_000, 1000)):
        monkeypatch.setattr(scratch, "GPU", scratch.GPU._replace(products=held))
        scores = torch.randn(16, size, generator=generator)
        columns = torch.randn(size, 8, generator=generator)
        total = torch.zeros(size, 8, dtype=torch.float64, device=DEVICE)
        on_device = scores.to(DEVICE), columns.to(DEVICE)
        counts = seen(lambda o=on_device, t=total: fisher_operator._add_outer_products(*o, t))
        assert counts.launches <= 60
        expected = scores.double().T @ (scores.double() @ columns.double())
        assert relative_norm(total.cpu(), expected) < 1e-13


def test_krylov_products_wait_for_nothing_between_two_looks():
    """Few products are looked at; the others are seen in what `Basis.look` fetches at once."""
    operator = ef.HessianOperator(objective(mlp, torch.float32, DEVICE))
    ef.top_eigenvalues(operator, 1, 1e-7)  # with the comparison of two examples
    emulated_gpu.synchronized.clear()
    before = operator.products
    ef.top_eigenvalues(operator, 1, 1e-7)
    assert operator.products - before >= 12
    looks = sum(n for (file, _, _), n in emulated_gpu.synchronized.items() if file == "checks.py")
    assert looks <= 4, emulated_gpu.synchronized
    assert sum(emulated_gpu.synchronized.values()) <= 40


def test_values_that_are_not_finite_are_named():
    obj = objective(mlp, torch.float64, DEVICE)
    vectors = torch.zeros(obj.num_params, 2, dtype=torch.float64, device=DEVICE)
    vectors[3, 1] = float("nan")
    outputs = torch.full((48,), float("inf"), dtype=torch.float64, device=DEVICE)
    hessian, jacobian = ef.HessianOperator(obj), ef.JacobianOperator(obj)
    for work in (
        lambda: hessian @ vectors,
        lambda: hessian.quadratic_forms(vectors),
        lambda: (hessian - ef.GGNOperator(hessian.obj)).quadratic_forms(vectors),
        lambda: ef.FisherOperator(obj) @ vectors,
        lambda: jacobian @ vectors,
    ):
        with pytest.raises(ValueError, match=r"vectors: expected finite .* \(3, 1\)"):
            work()
    with pytest.raises(ValueError, match=r"vectors: .* 48 NaN or infinite of 48"):
        jacobian.T @ outputs
    theta = obj.parameters_vector()
    theta[2] = float("inf")
    with pytest.raises(ValueError, match=r"theta: expected finite .* \(2,\)"):
        obj.gradient(theta)
    with pytest.raises(ef.NonFiniteLossError, match="example 0"):
        obj.gradient(theta.fill_(1e308))


def test_searches_fall_back_to_autograd_where_rules_give_nan(monkeypatch: pytest.MonkeyPatch):
    on_cpu, on_gpu = (objective(mlp, torch.float64, device) for device in ("cpu", DEVICE))
    expected = ef.top_eigenvalues(ef.HessianOperator(on_cpu), 1, 1e-8).values
    nodes = ef.spectral_density(ef.HessianOperator(on_cpu), ef.DensitySettings(1, 12)).nodes
    calls: list[str] = []
    engine = type(ef.HessianOperator(on_gpu)._engine)
    products = engine.products

    def spoiled(self: Any, rows: Tensor, kind: str, sample: Any = None) -> Tensor:
        calls.append(kind)
        right = products(self, rows, kind, sample)
        return right if len(calls) < 5 else right * float("nan")

    for found, search in (
        (expected, lambda H: ef.top_eigenvalues(H, 1, 1e-8).values.cpu()),
        (nodes, lambda H: ef.spectral_density(H, ef.DensitySettings(1, 12)).nodes),
    ):
        operator = ef.HessianOperator(on_gpu)
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(engine, "products", spoiled)
            assert relative_norm(search(operator), found) < 1e-7
        assert operator.method.startswith("autograd: the captured graph gives NaN")


def test_examples_without_a_gradient_have_zeros_in_joint_records():
    """Records of a GPU lie side by side, in memory that was not cleared."""

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:  # [N, T, 2]
            h = torch.tanh(self.a(x))
            return self.out(torch.tanh(self.b(h)) if x.shape[1] > 3 else h).mean(1)

    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(3, t, 2, generator=generator), torch.randint(3, (3,), generator=generator))
        for t in (5, 3, 5)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Long().double()
    on_cpu, on_gpu = (ef.Objective(model, "cross_entropy", data, device=d) for d in ("cpu", DEVICE))
    for group_by in (None, "module"):
        expected, found = (
            ef.score_gram(on_cpu, group_by=group_by),
            ef.score_gram(on_gpu, group_by=group_by),
        )
        if group_by is None:
            expected, found = {"": expected}, {"": found}
        for name, gram in expected.items():
            assert relative_norm(found[name].cpu(), gram) < 1e-13


def test_norms_of_small_parameters_together(monkeypatch: pytest.MonkeyPatch):
    """Whatever is held back fits the scratch."""
    on_cpu, on_gpu = (objective(cnn, torch.float64, device) for device in ("cpu", DEVICE))
    for size in (scratch.GPU.norms, 600, 1):
        monkeypatch.setattr(scratch, "GPU", scratch.GPU._replace(norms=size))
        for group_by in (None, "module", "parameter"):
            expected, found = (
                ef.gradient_norms(on_cpu, group_by=group_by),
                ef.gradient_norms(on_gpu, group_by=group_by),
            )
            shares = {"": (expected, found)} if group_by is None else {
                name: (share, found[name]) for name, share in expected.items()
            }  # fmt: skip
            for share, other in shares.values():
                assert relative_norm(other.cpu(), share) < 1e-12


def test_norms_of_embeddings_wait_for_nothing(monkeypatch: pytest.MonkeyPatch):
    """Tokens of an example that are all alike, all different, and repeated."""
    generator = torch.Generator().manual_seed(0)
    for n, positions, channels in ((1, 1, 1), (5, 8, 3), (4, 1, 2), (0, 3, 2)):
        tokens = torch.randint(4, (n, positions), generator=generator)
        tokens[:1] = 2
        tokens[1:2] = torch.arange(positions)
        g = torch.randn(n, positions, channels, generator=generator)
        piece = EmbeddingGrad(tokens, g, 8)
        on_device = EmbeddingGrad(tokens.to(DEVICE), g.to(DEVICE), 8)
        expected = piece.rows().double().square().sum(1)
        assert relative_norm(piece.norms(), expected) < 1e-6
        for size in (scratch.GPU.norms, 100):
            monkeypatch.setattr(scratch, "GPU", scratch.GPU._replace(norms=size))
            with emulated_gpu.counted() as counts:
                found = on_device.norms()
            assert counts.synchronizations == counts.copies == 0
            assert relative_norm(found.cpu(), expected) < 1e-6


def test_a_gpus_computation_may_have_half_of_its_free_memory(monkeypatch: pytest.MonkeyPatch):
    device = torch.device(DEVICE)
    assert memory.resolve_budget(None, device) == 2 * 2**30  # of 4 GiB free
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 2**30)
    segments: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert memory.resolve_budget(None, device) == 3 * 2**30  # what is cached is free to torch
    for index, pool, total in ((0, (0, 0), 2**31), (0, (0, 1), 2**30), (1, (0, 1), 2**30)):
        segments.append(
            {
                "device": index,
                "segment_pool_id": pool,
                "total_size": total,
                "allocated_size": total // 4,
            }
        )
    # but for what a graph of this device has to itself
    assert memory.resolve_budget(None, device) == 3 * 2**30 - (2**30 - 2**28) // 2
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 2**30 + 2**29)
    assert memory.resolve_budget(None, device) == 2**31 + 2**28  # little: not looked at
    assert memory.resolve_budget(1000, device) == 1000
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    assert memory.resolve_budget(None, torch.device("cpu")) == 250


def test_traces_of_a_profile_are_within_their_errors_of_the_exact_ones():
    # The directions that are deflated depend on how far each device's search went, so that samples
    # differ from the CPU's: the estimates must still be of the same trace.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (24,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    cpu, gpu = (
        ef.Objective(model, "cross_entropy", (x, y), device=d) for d in ("cpu", emulated_gpu.NAME)
    )
    path = ef.linear_path(gpu.parameters_vector(), 2 * gpu.parameters_vector(), 2)
    quantities = ("hessian_trace", "top_eigenvalue")
    found = ef.curvature_profile(
        gpu, path, points=3, quantities=quantities, settings=ef.CurvatureSettings(probes=16)
    )
    for s, value, error in zip(
        found["s"], found["hessian_trace"], found["hessian_trace_std_error"], strict=True
    ):
        operator = ef.HessianOperator(cpu, path.to("cpu").point(float(s)))
        exact = float((operator @ torch.eye(cpu.num_params, dtype=torch.float64)).trace())
        assert 0 < float(error) < abs(exact)
        assert abs(float(value) - exact) < 5 * float(error)
