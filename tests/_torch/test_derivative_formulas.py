"""torch's derivatives, as models with derivatives of their own use them, against differences."""

from __future__ import annotations

import pytest
import torch
from derivative_cases import Case
from derivative_layers import cases
from derivative_sweep import first_fault, routes, transform_faults, variants
from torch.nn import functional as F

from entropic_fast._torch.derivative_checks import NO_DERIVATIVE, Watcher
from entropic_fast._torch.derivative_formulas import AnyOrder
from entropic_fast._torch.full_precision import full_precision

CASES: dict[str, list[Case]] = {}
for case in cases():
    CASES.setdefault(case.name, []).append(case)
CONSTANT = {f"special {function.__name__[len('special_') :]}" for function in NO_DERIVATIVE}
WRONG_GRADIENT = {"CrossMapLRN2d"}
# Third derivatives that are NaN, which products refuse.
NOT_FINITE = {"logcumsumexp"}
# Normalization has formulas of its own; of the others a few that models with derivatives use.
TRANSFORMED = [
    name
    for name in CASES
    if "_norm" in name or "weight norm" in name or name in (
        "silu", "softplus", "gelu", "tanh", "softmax", "linear", "conv2d", "pdist 2", "cdist 2",
        "hardsigmoid", "scaled_dot_product_attention", "norm 2", "normalize 2", "prelu",
        "det", "slogdet", "logdet", "solve", "inv", "cholesky_inverse", "householder_product",
    )
]  # fmt: skip


# Random in evaluation too, of no derivative, in low precision alone, or other names of others.
NOT_TRIED = {
    "alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout",
    "gumbel_softmax", "one_hot", "grouped_mm", "scaled_grouped_mm", "scaled_mm",
    "multi_head_attention_forward", "native_channel_shuffle", "upsample", "upsample_bilinear",
    "upsample_nearest", "linear_cross_entropy",
}  # fmt: skip


def test_every_function_of_torch_is_tried():
    """Another torch may have more, which is no failure of this one's."""
    functions = {n for n in dir(F) if n[0].islower() and callable(getattr(F, n))}
    helpers = {n for n in functions if "torch_function" in n or n.endswith("_with_indices")}
    helpers |= {"assert_int_or_pair", "boolean_dispatch"}
    tried = {name.split()[0] for name in CASES}
    left = functions - helpers - tried - NOT_TRIED
    assert not left or torch.__version__.split(".")[:2] != ["2", "14"]


@pytest.mark.filterwarnings("ignore")  # of functions that are in beta
@pytest.mark.parametrize("name", sorted(set(CASES) - CONSTANT - WRONG_GRADIENT))
def test_three_derivatives_are_those_of_differences_or_missing(name: str):
    """Those of torch, by formulas where it has them wrong."""
    with full_precision():
        for case in CASES[name]:
            for layout, tensors in variants(case):
                for taken, route in routes(len(tensors)).items():
                    if layout != "plain" and taken not in ("all", "input first"):
                        continue  # tried where the record is made
                    fault = first_fault(case.function, tensors, route, layout, AnyOrder)
                    allowed = fault is None or fault[1].startswith("missing")
                    if name in NOT_FINITE:
                        allowed = allowed or "nan" in fault[1]
                    assert allowed, (layout, taken, fault)


class Refusing(AnyOrder):
    """With what an objective refuses."""

    def __init__(self) -> None:
        super().__init__()
        self._watcher = Watcher()

    def __enter__(self):
        self._watcher.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._watcher.__exit__(*error)


@pytest.mark.filterwarnings("ignore")  # torch's own, when its forward mode is first used
@pytest.mark.parametrize(
    "name",
    [
        name if name in TRANSFORMED else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(set(CASES) - CONSTANT - WRONG_GRADIENT)
    ],
)
def test_transforms_give_what_nested_gradients_give(name: str):
    with full_precision():
        faults = transform_faults(CASES[name][0].function, CASES[name][0].tensors, Refusing)
    for how, why in faults.items():
        refused = why.startswith("missing") or "nan" in why  # products refuse what is not finite
        assert refused, (how, why)
