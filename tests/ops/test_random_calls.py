"""Every op on random sizes, strides, options and values against its oracle in float64."""

import pytest
import torch
from random_calls import OPS, disagreement

from entropic_fast.ops import backend

# They call an operator by its number, and no kernel:
# tests/curvature/operators/test_torch_compile.py.
OTHERS = {"operator_product", "operator_forms"}
SEEDS = 60


@pytest.mark.parametrize("name", OPS)
def test_random_calls_agree_with_the_oracle(name: str) -> None:
    wrong = {s: d for s in range(SEEDS) if (d := disagreement(name, s, "cpp"))}
    assert wrong == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("setting", ["triton", "cuda"])
def test_random_calls_agree_on_a_gpu(name: str, setting: str) -> None:
    family = "step" if name.endswith("_step") else name.split("_")[0]
    if setting == "cuda" and family not in ("step", "random"):
        pytest.skip("only the step and random numbers have CUDA C++ kernels")
    assert backend.unusable(setting, "cuda") is None
    wrong = {s: d for s in range(SEEDS) if (d := disagreement(name, s, setting, "cuda"))}
    assert wrong == {}


def test_no_op_is_left_out() -> None:
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.partition("::")[2] for s in schemas if s.name.startswith("entropic_fast::")}
    assert names == set(OPS) | OTHERS


def test_a_wrong_result_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry of a result off by a thousandth."""
    import random_calls

    run = random_calls.run

    def off(name, arguments, written, setting):
        found = run(name, arguments, written, setting)
        first = next((t for t in found if t.is_floating_point()), found[0])
        if setting == "cpp" and first.numel():
            first[(-1,) * first.dim()] += 1e-3 if first.is_floating_point() else 1
        return found

    monkeypatch.setattr(random_calls, "run", off)
    for name in OPS:
        assert any(disagreement(name, seed, "cpp") for seed in range(8)), name
