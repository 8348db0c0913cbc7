"""Batches and outputs that are not one tensor: dicts, tuples, arrays, nested structures."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import entropic_fast as ef
from entropic_fast.profile import ProfileSettings, profile_model

N = 7


def ce(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


class Two(nn.Module):
    """Of a picture and of features: a model of two inputs of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 5), nn.Linear(3, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(image.flatten(1)) * self.b(features)))


class OneDict(Two):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["image"], batch["features"])


class Nested(Two):
    def forward(self, image: Tensor, rest: dict[str, Any]) -> Tensor:  # type: ignore[override]
        return super().forward(image, rest["deep"][0]["features"])


@dataclass
class Pair:
    image: Any
    features: Any


class OfDataclass(Two):
    def forward(self, pair: Pair) -> Tensor:  # type: ignore[override]
        return super().forward(pair.image, pair.features)


class Parts(nn.Module):
    """Returns logits and hidden features in a container of some kind."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.f, self.g, self.pack = nn.Linear(4, 6), nn.Linear(6, 3), pack
        self.double()

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.f(x))
        return self.pack(self.g(h), h)


def pictures() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(N, *s, generator=g, dtype=torch.float64) for s in ((2, 4), (3,)))
    return a, b, torch.arange(N) % 3


class Rows(Dataset):
    def __init__(self, *columns: Tensor, keys: tuple[str, ...] = ()) -> None:
        self.columns, self.keys = columns, keys

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, i: int) -> Any:
        row = [c[i] for c in self.columns]
        return dict(zip(self.keys, row, strict=True)) if self.keys else tuple(row)


class Listed:
    """Examples by index, as Hugging Face's datasets: no torch Dataset."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        if i >= len(self):
            raise IndexError
        return self.rows[i]


A, B, Y = pictures()
KEYS = ("image", "features", "labels")
DICT = {"image": A, "features": B, "labels": Y, "names": ["a"] * N}
FORMS: dict[str, tuple[type[nn.Module], Any]] = {
    "((a, b), y)": (Two, ((A, B), Y)),
    "([a, b], y)": (Two, ([A, B], Y)),
    "(a, b, y)": (Two, (A, B, Y)),
    "[a, b, y]": (Two, [A, B, Y]),
    "TensorDataset": (Two, TensorDataset(A, B, Y)),
    "batches of pairs": (Two, [((A[:4], B[:4]), Y[:4]), ((A[4:], B[4:]), Y[4:])]),
    "DataLoader of triples": (Two, DataLoader(TensorDataset(A, B, Y), batch_size=3)),
    "a dict": (Two, DICT),
    "a UserDict": (Two, UserDict(DICT)),
    "(dict, y)": (Two, ({"image": A, "features": B, "id": torch.arange(N)}, Y)),
    "batches (dict, y)": (Two, [({"features": B[:2], "image": A[:2]}, Y[:2]),
                                ({"features": B[2:], "image": A[2:]}, Y[2:])]),
    "batches of dicts": (Two, [{k: DICT[k][:4] for k in KEYS}, {k: DICT[k][4:] for k in KEYS}]),
    "Dataset of dicts": (Two, Rows(A, B, Y, keys=KEYS)),
    "DataLoader of dicts": (Two, DataLoader(Rows(A, B, Y, keys=KEYS), batch_size=2)),
    "examples by index": (Two, Listed(Rows(A, B, Y, keys=KEYS))),
    "NumPy": (Two, ((A.numpy(), B.numpy()), Y.numpy())),
    "NumPy in a dict": (Two, {"image": A.numpy()[::1], "features": B.numpy(), "label": Y.numpy()}),
    "one dict argument": (OneDict, ({"image": A, "features": B}, Y)),
    "one dict with labels": (OneDict, {"image": A, "features": B, "y": Y}),
    "nested": (Nested, ((A, {"deep": [{"features": B}]}), Y)),
    "a dataclass": (OfDataclass, (Pair(A, B.numpy()), Y)),
}  # fmt: skip


def expected() -> tuple[Tensor, Tensor, Tensor]:
    """Loss, per-example gradients and Hessian by double backward."""
    model = Two()
    ps = list(model.parameters())
    losses = ce(model(A, B), Y)
    rows = torch.stack([_flat(torch.autograd.grad(v, ps, retain_graph=True)) for v in losses])
    g = _flat(torch.autograd.grad(losses.mean(), ps, create_graph=True))
    hessian = torch.stack([_flat(torch.autograd.grad(v, ps, retain_graph=True)) for v in g])
    return losses.mean().detach(), rows, hessian


def _flat(parts: Any) -> Tensor:
    return torch.cat([p.flatten() for p in parts])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_batch_gives_the_same_numbers(form: str):
    kind, data = FORMS[form]
    obj = ef.Objective(kind(), "cross_entropy", data)
    loss, rows, hessian = expected()
    identity = torch.eye(obj.num_params, dtype=torch.float64)
    operator = ef.HessianOperator(obj)
    assert operator.method == "graph"
    assert obj.num_examples == N
    assert abs(obj.loss() - float(loss)) < 1e-12
    assert relative_error(ef.score_matrix(obj), rows) < 1e-10
    assert relative_error(operator @ identity, hessian) < 1e-10
    by_autograd = ef.HessianOperator(obj)
    with ef.curvature.autograd_only():
        assert relative_error(by_autograd @ identity, hessian) < 1e-10
    assert relative_error(ef.score_gram(obj), rows @ rows.T) < 1e-10
    assert relative_error(obj.double().gradient(), rows.mean(0)) < 1e-12
    trace = ef.ggn_trace(obj)
    G = ef.GGNOperator(obj) @ identity
    assert abs(float(trace) - float(G.trace())) < 1e-9 * float(G.trace())


@pytest.mark.parametrize("form", ["((a, b), y)", "batches of dicts", "nested", "a dataclass"])
@pytest.mark.parametrize("backend", ["loop", "threads", "vmap"])
def test_dynamics_and_paths_take_structured_batches(form: str, backend: str):
    kind, data = FORMS[form]
    obj = ef.Objective(kind(), "cross_entropy", data)
    plain = ef.Objective(Two(), "cross_entropy", ((A, B), Y))
    theta = obj.parameters_vector()
    path = ef.linear_path(theta, theta + 0.3 * torch.ones_like(theta), 5)
    found, wanted = (
        ef.relax(
            o,
            path,
            0.5,
            ef.ProjectedSGD(0.05, 3, steps=6),
            replicas=3,
            seed=1,
            execution=ef.Execution(backend=e),
        )
        for o, e in ((obj, backend), (plain, "loop"))
    )
    assert torch.allclose(found.position, wanted.position, atol=1e-9)
    losses = [ef.path_losses(o, path, 5) for o in (obj, plain)]
    assert np.allclose(losses[0]["loss"], losses[1]["loss"], rtol=1e-13)


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, h: (a, h),
    "list": lambda a, h: [a, h],
    "dict": lambda a, h: {"logits": a, "hidden": h},
    "namespace": lambda a, h: SimpleNamespace(logits=a, hidden=h, past=None),
    "dataclass": lambda a, h: Pair(a, h),
}


def two_losses(outputs: Any, targets: Tensor) -> Tensor:
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    elif isinstance(outputs, SimpleNamespace):
        outputs = outputs.logits, outputs.hidden
    elif isinstance(outputs, Pair):
        outputs = outputs.image, outputs.features
    return ce(outputs[0], targets) + outputs[1].square().mean(1)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_loss_of_the_users_takes_the_entire_output(kind: str):
    x = torch.randn(N, 4, dtype=torch.float64)
    obj = ef.Objective(Parts(OUTPUTS[kind]), two_losses, (x, Y))
    model = Parts(lambda a, h: torch.cat([a, h], 1))
    plain = ef.Objective(model, lambda o, t: ce(o[:, :3], t) + o[:, 3:].square().mean(1), (x, Y))
    identity = torch.eye(obj.num_params, dtype=torch.float64)
    operator = ef.HessianOperator(obj)
    assert operator.method == "graph"
    with ef.curvature.autograd_only():
        wanted = ef.HessianOperator(plain) @ identity
    assert relative_error(operator @ identity, wanted) < 1e-10
    assert relative_error(ef.score_matrix(obj), ef.score_matrix(plain)) < 1e-12
    trace = ef.hessian_trace(obj, probes=64)
    assert abs(float(trace) - float(wanted.trace())) < 5 * trace.std_error
    assert obj.loss() == pytest.approx(plain.loss(), rel=1e-14)
    with pytest.raises(ValueError, match=r'output="logits"'):
        ef.GGNOperator(obj)
    with pytest.raises(ValueError, match=r'output="logits"'):
        obj.evaluate()


@pytest.mark.parametrize("coupled", [False, True])
def test_a_loss_that_the_model_would_compute_of_labels_is_rejected(coupled: bool):
    """As Hugging Face's `output.loss`, which is None without labels."""
    model = Parts(lambda a, h: SimpleNamespace(logits=a, loss=None))
    x = torch.randn(N, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"labels are not handed to the model.*next_token"):
        ef.Objective(model, lambda output, _: output.loss, (x, Y), coupled=coupled)


@pytest.mark.parametrize(
    ("kind", "part"),
    [("tuple", 0), ("list", 0), ("dict", None), ("dict", "logits"), ("namespace", None),
     ("namespace", "logits"), ("dataclass", "image")],
)  # fmt: skip
def test_logits_are_picked_by_name_by_index_or_by_themselves(kind: str, part: Any):
    x = torch.randn(N, 4, dtype=torch.float64)
    obj = ef.Objective(Parts(OUTPUTS[kind]), "cross_entropy", (x, Y), output=part)
    plain = ef.Objective(Parts(lambda a, h: a), "cross_entropy", (x, Y))
    v = torch.randn(obj.num_params, dtype=torch.float64)
    for make in (ef.HessianOperator, ef.GGNOperator):
        assert make(obj).method == "graph"
        assert relative_error(make(obj) @ v, make(plain) @ v) < 1e-12
    assert obj.evaluate() == plain.evaluate()
    custom = ef.Objective(Parts(OUTPUTS["namespace"]), lambda o, t: ce(o, t), (x, Y))
    assert relative_error(custom.gradient(), plain.gradient()) < 1e-12  # .logits by itself


def test_a_part_that_is_not_there_is_rejected_with_the_names_that_are():
    x = torch.randn(N, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'logits', 'hidden', got 'scores'"):
        ef.Objective(Parts(OUTPUTS["dict"]), "cross_entropy", (x, Y), output="scores")
    with pytest.raises(ValueError, match=r"with the parts 0, 1; pass output=0"):
        ef.Objective(Parts(OUTPUTS["tuple"]), "cross_entropy", (x, Y))


X = torch.randn(N, 4, dtype=torch.float64)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def test_an_index_of_examples_is_dropped():
    plain = ef.Objective(linear(), "cross_entropy", (X, Y))
    for data in (
        (X, Y, torch.arange(N)),
        TensorDataset(X, Y, torch.arange(N)),
        [(X[:3], Y[:3], torch.arange(3)), (X[3:], Y[3:], torch.arange(3, N))],
    ):
        obj = ef.Objective(linear(), "cross_entropy", data)
        assert relative_error(obj.gradient(), plain.gradient()) < 1e-14


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.linear(x if mask is None else x * mask[:, None])


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (linear, (X, Y, torch.ones(N)), "weights of examples belong to the targets"),
        (Optional, (X, torch.ones(N), torch.arange(N)), r"pass \(\(a, b\), targets\)"),
        (linear, ((X, Y), (X, Y)), "a tuple of two that may be either"),
        (linear, {"x": X, "label": Y, "labels": Y}, "several: 'labels', 'label'"),
        (linear, (X, ["a"] * N), r"targets\[0\]: expected tensors or NumPy arrays"),
        (linear, (X, np.array(["a"] * N)), "targets: expected numbers, got an array of dtype <U1"),
        (linear, (X, {"a": Y, "b": Y[:3]}), r"targets\['b'\] \[3\]"),
        (linear, (X, torch.tensor(0)), "of one length"),
        (linear, X, "a dict with labels, a Dataset, or a re-iterable of batches"),
        (linear, {}, "at least one input"),
    ],
)
def test_data_that_say_too_little_are_rejected(model: Any, data: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ef.Objective(model(), "cross_entropy", data)


def test_targets_may_be_structured_for_a_loss_of_ones_own():
    weights = torch.rand(N, dtype=torch.float64)
    obj = ef.Objective(linear(), lambda o, t: t["w"] * ce(o, t["y"]), (X, {"y": Y, "w": weights}))
    plain = ef.Objective(linear(), lambda o, t: t[1] * ce(o, t[0]), (X, (Y, weights)))
    assert torch.equal(obj.gradient(), plain.gradient())
    v = torch.randn(obj.num_params, dtype=torch.float64)
    assert relative_error(ef.HessianOperator(obj) @ v, ef.HessianOperator(plain) @ v) < 1e-14


def test_a_dict_without_labels_is_the_target_itself():
    model = nn.Linear(4, 4).double()
    obj = ef.Objective(model, lambda o, batch: (o - batch["input"]).square().sum(1), {"input": X})
    assert obj.loss() == pytest.approx(float((model(X) - X).square().sum(1).mean().detach()))


def test_inputs_in_half_precision_and_integers_keep_their_kinds():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
            return self.out((self.embed(ids) * scale[:, :, None]).sum(1))

    ids, scale = torch.randint(9, (N, 5)), torch.rand(N, 5, dtype=torch.float64)
    data = {"ids": ids, "scale": scale, "target": Y % 2}
    obj = ef.Objective(Tokens(), "cross_entropy", data)
    batch = next(obj.batches())
    assert batch.inputs["ids"].dtype == torch.int64
    assert batch.inputs["scale"].dtype == torch.float32
    half = ef.Objective(Tokens().bfloat16(), "cross_entropy", data)
    assert next(half.batches()).inputs["scale"].dtype == torch.bfloat16
    assert obj.double().gradient().dtype == torch.float64


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed, self.out = nn.Embedding(9, 4).double(), nn.Linear(4, 9).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        h = self.embed(input_ids)
        if attention_mask is not None:
            h = h * attention_mask[..., None]
        return SimpleNamespace(logits=self.out(torch.tanh(h.cumsum(1))))


def test_tokens_without_labels_are_their_own_for_the_next_token():
    ids = torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 3:] = mask[4, 2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    full = ef.Objective(Causal(), "next_token", {"input_ids": ids, "attention_mask": mask,
                                                 "labels": labels})  # fmt: skip
    for data in (
        {"input_ids": ids, "attention_mask": mask},
        [{"input_ids": ids[:2], "attention_mask": mask[:2]},
         {"input_ids": ids[2:], "attention_mask": mask[2:]}],
        {"input_ids": ids.numpy(), "attention_mask": mask.numpy()},
    ):  # fmt: skip
        assert ef.Objective(Causal(), "next_token", data).loss() == pytest.approx(full.loss())
    logits = Causal()(ids, mask).logits[:, :-1]
    wanted = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
    assert full.loss() == pytest.approx(float(wanted.detach()), rel=1e-12)
    alone = ef.Objective(Causal(), "next_token", ids)
    assert alone.loss() == ef.Objective(Causal(), "next_token", (ids, ids)).loss()
    with pytest.raises(ValueError, match="'input_ids' or labels, for next_token"):
        ef.Objective(Causal(), "next_token", {"tokens": ids})


def test_the_report_of_a_model_takes_dicts_and_parts(tmp_path: Path):
    few = ProfileSettings(probes=4, density_probes=2, density_steps=4, eigenvalues=2, tol=1.0)
    data = {"x": torch.randn(20, 4, dtype=torch.float64), "labels": torch.arange(20) % 3}
    model = Parts(OUTPUTS["tuple"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ef.NotConvergedWarning)
        found = profile_model(model, data, tmp_path, settings=replace(few, output=0))
    wanted = ef.Objective(Parts(lambda a, h: a), "cross_entropy", data).loss()
    assert found.tables["points"]["loss"][0] == pytest.approx(wanted)


def test_targets_of_two_inputs_may_be_nested():
    weights, rows = torch.rand(N, dtype=torch.float64), torch.rand(N, 3, dtype=torch.float64)
    batch = (A, B, (rows, (weights, 2 * weights)))

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        value, (low, high) = targets
        return (low + high) * (outputs - value).square().sum(1)

    obj = ef.Objective(Two(), loss, [batch])
    plain = ef.Objective(Two(), loss, ((A, B), batch[2]))
    assert torch.equal(obj.gradient(), plain.gradient())


def test_scores_per_token_of_structured_outputs_have_their_classes_last():
    ids = torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(1, 1).masked_fill(ids == 0, -100)
    for loss in (nn.CrossEntropyLoss(), functional.cross_entropy):
        obj = ef.Objective(Causal(), loss, {"input_ids": ids, "labels": labels})
        wanted = functional.cross_entropy(Causal()(ids).logits.transpose(1, 2), labels)
        assert obj.loss() == pytest.approx(float(wanted.detach()), rel=1e-12)
        assert ef.GGNOperator(obj).method == "graph"


@pytest.mark.parametrize(
    ("model", "loss", "data", "message"),
    [
        (Two, "cross_entropy", (A, A), r"forward takes image, features, and a pair is read as"),
        (linear, "cross_entropy", {"image": X, "labels": Y, "boxes": X},
         r"its keys 'image', 'boxes' are not the arguments of forward \(input\)"),
        (linear, nn.CrossEntropyLoss, (X, Y), r"an instance, got the class CrossEntropyLoss"),
    ],
)  # fmt: skip
def test_the_cause_of_a_failure_is_named(model: Any, loss: Any, data: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ef.Objective(model(), loss, data)


def test_integers_of_arrays_are_labels_of_any_width():
    labels = Y.numpy().astype(np.int32)
    obj = ef.Objective(linear(), "cross_entropy", (X.numpy(), labels))
    assert obj.loss() == ef.Objective(linear(), "cross_entropy", (X, Y)).loss()


def test_accuracy_along_a_path_is_that_of_cross_entropy_alone():
    obj = ef.Objective(linear(), lambda o, t: (o - t[:, None]).square().mean(1), (X, Y))
    theta = obj.parameters_vector()
    path = ef.linear_path(theta, theta + 1)
    assert "accuracy" not in ef.path_losses(obj, path, 2).columns
    named = ef.Objective(linear(), "cross_entropy", (X, Y))
    assert "accuracy" in ef.path_losses(named, path, 2).columns


class Slope(nn.Module):
    """A derivative in the inputs, without `torch.enable_grad`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        (found,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return found[:, 1:]


class Field(Slope):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = x.clone().requires_grad_(True)
        return self.net(x), x


def residual(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    u, x = outputs
    (found,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (found[:, 1:] - targets).square().mean(1)


@pytest.mark.parametrize(("kind", "loss"), [(Slope, "mse"), (Field, residual)])
def test_derivatives_in_the_inputs_need_no_switch(kind: type[nn.Module], loss: Any):
    targets = torch.randn(N, 3, dtype=torch.float64)
    obj, plain = ef.Objective(kind(), loss, (X, targets)), Slope()
    theta, v = obj.parameters_vector(), torch.randn(obj.num_params, dtype=torch.float64)
    with torch.enable_grad():
        assert obj.loss() == pytest.approx(float((plain(X) - targets).square().mean().detach()))
    differences = (obj.gradient(theta + 1e-5 * v) - obj.gradient(theta - 1e-5 * v)) / 2e-5
    assert relative_error(ef.HessianOperator(obj) @ v, differences) < 1e-6
    assert relative_error(ef.score_matrix(obj).mean(0), obj.gradient()) < 1e-10
    path = ef.linear_path(theta, theta + 0.1)
    assert ef.path_losses(obj, path, 2)["loss"][0] == pytest.approx(obj.loss())
    run = ef.relax(obj, path, 0.5, ef.ProjectedSGD(0.01, 3, project_every=1, steps=2))
    assert bool(run.position.isfinite().all())
