"""Full precision holds within `full_precision`, and what a user had set is there afterwards."""

from __future__ import annotations

import pytest
import torch
from torch.backends import cudnn

from entropic_fast._torch import full_precision as exact
from entropic_fast._torch.full_precision import full_precision, products_in

SETTINGS = {
    "mkldnn.matmul": torch.backends.mkldnn.matmul,
    "mkldnn.conv": torch.backends.mkldnn.conv,
    "mkldnn.rnn": torch.backends.mkldnn.rnn,
    "cuda.matmul": torch.backends.cuda.matmul,
    "cudnn.conv": cudnn.conv,
    "cudnn.rnn": cudnn.rnn,
}


def state():
    found = {name: setting.fp32_precision for name, setting in SETTINGS.items()}
    for name, read in (
        ("matmul", torch.get_float32_matmul_precision),
        ("cudnn", torch._C._get_cudnn_allow_tf32),
    ):
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "contradicted"
    return found


@pytest.fixture(autouse=True)
def gpu_and_restore(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    before = state()
    yield
    for setting in (torch.backends.mkldnn, cudnn, torch.backends):
        setting.fp32_precision = "none"
    torch.set_float32_matmul_precision(before["matmul"])
    torch._C._set_cudnn_allow_tf32(before["cudnn"])
    for name, setting in SETTINGS.items():
        setting.fp32_precision = before[name]


def nothing():
    pass


def older_high():
    torch.set_float32_matmul_precision("high")


def older_medium():
    torch.set_float32_matmul_precision("medium")


def newer_tf32():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def newer_bf16_on_cpus():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def newer_full_convolutions():
    cudnn.conv.fp32_precision = "ieee"


def newer_tf32_for_all():
    torch.backends.fp32_precision = "tf32"


def newer_full_for_all():
    torch.backends.fp32_precision = "ieee"


def older_full():
    torch._C._set_cudnn_allow_tf32(False)


@pytest.mark.parametrize(
    "choose",
    [
        nothing, older_high, older_medium, newer_tf32, newer_bf16_on_cpus,
        newer_full_convolutions, newer_tf32_for_all, newer_full_for_all, older_full,
    ],
)  # fmt: skip
def test_no_setting_is_below_float32_within_and_all_are_restored(choose):
    choose()
    before = state()
    with full_precision(), full_precision():
        low = [n for n, s in SETTINGS.items() if s.fp32_precision in ("tf32", "bf16")]
    assert low == []
    assert state() == before


def test_settings_are_restored_after_an_error():
    older_high()
    before = state()
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert state() == before


@pytest.mark.parametrize("choose", [nothing, older_high])
def test_a_forward_pass_may_turn_cudnn_off(choose):
    choose()
    before = state()
    with full_precision():
        with cudnn.flags(enabled=False):
            assert not torch._C._get_cudnn_enabled()
        assert torch.backends.cuda.matmul.allow_tf32 is False
    assert state() == before


@pytest.mark.parametrize("above", ["tf32", "ieee"])
@pytest.mark.parametrize("products", ["ieee", "tf32"])
def test_a_setting_for_all_still_reaches_each_afterwards(above, products):
    for setting in SETTINGS.values():  # cuDNN's begin as TF32 that cannot be written back
        setting.fp32_precision = "none"
    torch.backends.fp32_precision = above
    cudnn.rnn.fp32_precision = "tf32"  # of its own, unlike the others
    with products_in(products), full_precision():
        assert {s.fp32_precision for s in SETTINGS.values()} <= {"ieee", products}
    for later in (above, "ieee", "tf32"):
        torch.backends.fp32_precision = later
        found = {name: setting.fp32_precision for name, setting in SETTINGS.items()}
        assert found == dict.fromkeys(SETTINGS, later) | {"cudnn.rnn": "tf32"}


def test_settings_are_made_again_after_they_could_not_be_made(monkeypatch):
    older_high()
    before = state()
    with monkeypatch.context() as patched:
        patched.setattr(exact, "_float32_settings", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError), full_precision():
            pass
    with full_precision():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert state() == before
