"""Weights in files: whatever they are wrapped in, or refused with what differs."""

import io
import warnings
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from entropic_fast.profile._weight_files import load_weights, read_tensors
from entropic_fast.training.minima import save_minimum


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    net[1].running_mean.fill_(float(seed))
    return net


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model.cpu()).to("cpu")


class Holder(nn.Module):
    """As a LightningModule or a Hugging Face head holds what it trains."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Inside(nn.Module):
    def __init__(self, wrap=lambda m: m, seed: int = 0) -> None:
        super().__init__()
        self.net, self.head = wrap(network(seed)), nn.Linear(2, 2)
        nn.init.constant_(self.head.weight, float(seed))
        nn.init.constant_(self.head.bias, float(seed))


WRAPPED = [
    lambda m: m,
    parallel,
    compiled,
    AveragedModel,
    Holder,
    lambda m: parallel(compiled(m)),
    lambda m: compiled(parallel(m)),
    lambda m: Holder(compiled(m)),
    lambda m: parallel(Holder(m)),
    lambda m: AveragedModel(parallel(m)),
]


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("form", ["safetensors", "pt", "legacy"])
def test_prefixes_are_taken_off(wrap, form: str, tmp_path):
    source, file = network(1), tmp_path / "weights.any"
    state = wrap(source).state_dict()
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "pt")
    target = network(2)
    load_weights(target, file)
    assert same(source, target)


@pytest.mark.parametrize("wrap", WRAPPED)
def test_weights_go_into_wrapped_models_too(wrap, tmp_path):
    source, target = network(1), network(2)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    wrapped = wrap(target)
    load_weights(wrapped, tmp_path / "a.pt")
    kept = {n: v for n, v in wrapped.state_dict().items() if n != "n_averaged"}
    assert all(
        torch.equal(*p) for p in zip(kept.values(), source.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("wrap", [parallel, compiled])
def test_prefixes_inside_are_taken_off(wrap, tmp_path):
    torch.save(Inside(wrap, 1).state_dict(), tmp_path / "a.pt")
    torch.save(Inside(seed=1).state_dict(), tmp_path / "b.pt")
    for file, target in (
        ("a.pt", Inside(seed=2)),
        ("b.pt", Inside(wrap, 2)),
        ("a.pt", Inside(wrap)),
    ):
        load_weights(target, tmp_path / file)
        assert same(target, Inside(seed=1))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("twice", [False, True])
def test_checkpoints_hold_a_state_dict(key: str, twice: bool, tmp_path):
    source = network(1)
    optimizer = torch.optim.Adam(source.parameters())
    state = parallel(source).state_dict()
    found = {
        key: {"model": state} if twice else state,
        "epoch": 3,
        "step": torch.tensor(7),
        "optimizer": optimizer.state_dict(),
        "loss": 0.5,
        "arch": "mine",
    }
    torch.save(found, tmp_path / "a.pth")
    target = network(2)
    load_weights(target, tmp_path / "a.pth")
    assert same(source, target)


def test_a_model_whose_own_names_begin_so_is_taken_as_it_is(tmp_path):
    source, target = Holder(network(1)), Holder(network(2))
    torch.save(source.state_dict(), tmp_path / "a.pt")
    load_weights(target, tmp_path / "a.pt")
    assert same(source, target)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_computed_weights_are_stored_by_what_they_are_computed_from(kind: str, tmp_path):
    def make(seed: int) -> nn.Module:
        net = network(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            getattr(nn.utils, kind)(net[0])
        return net

    source, target = make(1), make(2)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    load_weights(target, tmp_path / "a.pt")
    x = torch.ones(2, 3)
    assert torch.equal(source.eval()(x), target.eval()(x))


def test_complex_weights_are_taken(tmp_path):
    source, target = nn.Linear(2, 2, dtype=torch.cfloat), nn.Linear(2, 2, dtype=torch.cdouble)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    load_weights(target, tmp_path / "a.pt")
    assert torch.equal(target.weight, source.weight.to(torch.cdouble))
    with pytest.raises(
        ValueError, match=r"weight is shape .* of complex64, not shape .* of float32"
    ):
        load_weights(nn.Linear(2, 2), tmp_path / "a.pt")


def test_counts_of_batches_may_be_missing(tmp_path):
    state = {n: v for n, v in network(1).state_dict().items() if "num_batches" not in n}
    torch.save(state, tmp_path / "a.pt")
    target = network(2)
    load_weights(target, tmp_path / "a.pt")
    assert same(network(1), target)


class Thing:
    """An object of the user's, which a checkpoint may hold."""


@pytest.mark.parametrize(
    "found",
    [
        lambda: network(),
        lambda: {"state_dict": network().state_dict(), "args": Thing()},
        lambda: Thing(),
    ],
)
def test_pickled_objects_are_refused_with_what_to_do(found, tmp_path):
    torch.save(found(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"weights_only=True.*save the tensors alone.*state_dict"):
        load_weights(network(), tmp_path / "a.pt")


def test_nothing_in_a_file_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for new in (True, False):
        torch.save({"0.weight": Evil()}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match="would run the code"):
            load_weights(network(), tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_torchscript_and_damaged_files_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network()).save(tmp_path / "script.pt")
    buffer = io.BytesIO()
    torch.save(network().state_dict(), buffer)
    (tmp_path / "short.pt").write_bytes(buffer.getvalue()[:300])
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("script", "short", "text", "empty"):
        with pytest.raises(ValueError, match=rf"^weights .*{name}\.pt: expected"):
            load_weights(network(), tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError):
        load_weights(network(), tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"weights": network().state_dict()}, "got dict {'weights': OrderedDict"),
        ([torch.ones(2)], "got list"),
        (torch.ones(2), r"got shape \[2\]"),
        ({"model": network().state_dict(), "net": {}}, "several, under 'model', 'net'"),
        ({"model": {"a": 3}}, "a.pt, model: expected a state dict"),
        ({}, "0.weight, 0.bias, 1.weight and 3 more are missing"),
    ],
)
def test_what_is_no_state_dict_is_refused(found, words: str, tmp_path):
    torch.save(found, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=words):
        load_weights(network(), tmp_path / "a.pt")


def test_differences_are_shown_without_prefixes(tmp_path):
    state = OrderedDict((f"module.{n}", v) for n, v in network().state_dict().items())
    state["module.0.weight"] = torch.ones(2, 4)
    state["module.2.weight"] = torch.ones(1)
    del state["module.1.bias"]
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="tensors of another") as refusal:
        load_weights(network(), tmp_path / "a.pt")
    said = str(refusal.value)
    for words in (
        "1.bias is missing",
        "2.weight is unknown",
        "0.weight is shape [2, 4] of float32, not shape [2, 3] of float32",
    ):
        assert words in said
    assert "module." not in said


def test_messages_stay_short(tmp_path):
    big = nn.Sequential(*[nn.Linear(2, 2) for _ in range(300)])
    torch.save({f"x{n}": v for n, v in big.state_dict().items()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="and 597 more are missing") as refusal:
        load_weights(big, tmp_path / "a.pt")
    assert len(str(refusal.value)) < 600


def test_tensors_of_a_file_are_on_the_cpu_without_gradient(tmp_path):
    torch.save({"a": nn.Parameter(torch.ones(2))}, tmp_path / "a.pt")
    (value,) = read_tensors(tmp_path / "a.pt", "data").values()
    assert not value.requires_grad and value.device.type == "cpu"


# -- as before: safetensors


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight


def test_weights_are_copied_with_buffers_and_converted(tmp_path):
    one = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    one[1].running_mean.fill_(2.0)
    save_file({n: t.half() if t.is_floating_point() else t for n, t in one.state_dict().items()},
              tmp_path / "a.safetensors")  # fmt: skip
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    load_weights(other, tmp_path / "a.safetensors")
    assert torch.equal(other[0].weight, one[0].weight.half().float())
    assert other[1].running_mean.tolist() == [2.0, 2.0] and other[0].weight.dtype == torch.float32


def test_of_tied_weights_one_is_enough(tmp_path):
    save_file({"out.weight": torch.ones(5, 4)}, tmp_path / "a.safetensors")
    model = Tied()
    load_weights(model, tmp_path / "a.safetensors")
    assert torch.equal(model.embed.weight, torch.ones(5, 4)) and model.out.weight is not None


def test_the_minima_of_a_run_are_weights_too(tmp_path):
    one, other = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    save_minimum(tmp_path / "m.safetensors", one, {"model": "mine"})
    load_weights(other, tmp_path / "m.safetensors")
    assert torch.equal(other[0].weight, one[0].weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s | {"0.weight": torch.ones(2, 4)}, ["0.weight is shape [2, 4]", "not shape"]),
        (lambda s: s | {"0.weight": torch.ones(2, 3).long()}, ["0.weight is shape [2, 3] of int"]),
        (
            lambda s: {"0.weight": s["0.weight"]},
            ["0.bias, 1.weight, 1.bias and 2 more are missing"],
        ),
        (lambda s: s | {"extra": torch.ones(1)}, ["extra is unknown"]),
        (lambda s: s | {"0.bias": torch.tensor([0.0, torch.nan])}, ["0.bias", "finite values"]),
    ],
)
def test_weights_of_another_model_are_refused_and_it_stays_as_it_was(tmp_path, change, words):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    stored = change({n: t + 1 for n, t in model.state_dict().items()})
    save_file(stored, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"^weights .*a\.safetensors") as refused:
        load_weights(model, tmp_path / "a.safetensors")
    for word in words:
        assert word in str(refused.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
