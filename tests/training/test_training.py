import copy
import json
import re
import shutil

import pytest
import torch
from torch import nn

from entropic_fast import DivergenceError
from entropic_fast._utils import atomic_io as store
from entropic_fast.training import (
    TrainConfig,
    TrainState,
    evaluate,
    learning_rate,
    train,
)
from entropic_fast.training.data import ImageData, load
from entropic_fast.training.minima import (
    Minimum,
    MismatchError,
    load_minimum,
    read_minimum,
    save_minimum,
    training_manifest,
)
from entropic_fast.training.models import build, initialize

DIGITS = load("digits")
SMALL = DIGITS[0].limited(150)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


# -- recipe ----------------------------------------------------------------------------------


def test_the_learning_rate_falls_by_five_at_the_papers_shares():
    config = TrainConfig()
    rates = [learning_rate(config, e) for e in range(200)]
    falls = [e for e in range(1, 200) if rates[e] < rates[e - 1]]
    assert falls == [60, 120, 160, 180]
    assert rates[0] == 0.1 and rates[-1] == pytest.approx(0.1 / 5**4)


def test_a_share_that_is_not_exact_in_binary_falls_on_its_epoch():
    config = TrainConfig(epochs=10, milestones=(0.7,))
    assert learning_rate(config, 6) == 0.1 and learning_rate(config, 7) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"momentum": 1.0}, r"momentum.*\[0, 1\)"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"epochs": -1}, "epochs"),
        ({"milestones": (0.5, 0.3)}, "milestones: expected ascending"),
        ({"milestones": (0.0,)}, "milestones"),
        ({"gamma": 0}, "gamma"),
        ({"gamma": 2}, "gamma"),
        ({"nesterov": True, "momentum": 0}, "nesterov"),
        ({"pad": -1}, "pad"),
    ],
)
def test_a_bad_recipe_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


# -- training --------------------------------------------------------------------------------


def plain_sgd(model, data, config, seed):
    """The recipe again, with the update written out."""
    from entropic_fast.training.data import augment, batches

    initialize(model, seed)
    model.train()
    momentum = {}
    for epoch in range(config.epochs):
        for index in batches(len(data), config.batch_size, epoch, seed):
            images = data.images[index]
            if config.augment:
                images = augment(images, index, epoch, seed, config.pad, config.flip)
            loss = nn.functional.cross_entropy(model(data.normalize(images)), data.labels[index])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    g = g + config.weight_decay * p
                    v = config.momentum * momentum[p] + g if p in momentum else g
                    momentum[p] = v
                    step = g + config.momentum * v if config.nesterov else v
                    p -= learning_rate(config, epoch) * step


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("augmented", [False, True])
def test_training_is_the_written_out_update(nesterov, augmented):
    config = TrainConfig(
        epochs=3, batch_size=64, milestones=(0.5,), nesterov=nesterov, augment=augmented, pad=1
    )
    ours, theirs = build("digits-cnn-bn"), build("digits-cnn-bn")
    train(ours, SMALL, config, seed=4)
    plain_sgd(theirs, SMALL, config, seed=4)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4, rtol=1e-4)


def test_digits_are_learnt():
    model = build("digits-cnn-bn")
    seen = []
    trained = train(
        model,
        DIGITS[0],
        TrainConfig(epochs=10, batch_size=64, augment=False),
        seed=0,
        on_epoch=seen.append,
    )
    loss, accuracy = evaluate(model, DIGITS[1])
    assert accuracy > 0.9 and loss < 0.4
    history = trained.history
    assert history["epoch"].tolist() == list(range(1, 11))
    assert [r.loss for r in seen] == history["loss"].tolist()
    assert history["loss"][-1] < 0.3 * history["loss"][0]
    assert history["accuracy"][-1] > 0.9
    assert trained.epoch == 10 and not model.training


@pytest.mark.parametrize("cut", [0, 1, 2, 4])
def test_a_cut_run_equals_the_unbroken_one(cut):
    config = TrainConfig(epochs=4, batch_size=50, milestones=(0.5,), pad=1)
    whole, parts = build("digits-cnn-bn"), build("digits-cnn-bn")
    end = train(whole, SMALL, config, seed=3)
    first = train(parts, SMALL, config, seed=3, stop_epoch=cut)
    model = build("digits-cnn-bn")
    model.load_state_dict(parts.state_dict())
    second = train(
        model,
        SMALL,
        config,
        seed=3,
        resume=first.state,
    )
    assert same(whole, model)
    assert end.optimizer_state.keys() == second.optimizer_state.keys()
    assert all(torch.equal(v, second.optimizer_state[k]) for k, v in end.optimizer_state.items())


def test_branches_share_their_start_and_leave_it_alone():
    config = TrainConfig(epochs=2, batch_size=50, augment=False)
    start = train(build("digits-cnn"), SMALL, config, seed=3, stop_epoch=1)
    state = {k: v.clone() for k, v in start.optimizer_state.items()}
    models = []
    for order_seed in (1, 2, 1):
        model = copy.deepcopy(start.model)
        train(
            model,
            SMALL,
            config,
            seed=3,
            order_seed=order_seed,
            resume=start.state,
        )
        models.append(model)
    assert same(models[0], models[2]) and not same(models[0], models[1])
    assert all(torch.equal(state[k], start.optimizer_state[k]) for k in state)


def test_the_seed_decides_and_the_global_generator_does_not():
    config = TrainConfig(epochs=1, batch_size=50, pad=1)
    results = []
    for seed, disturbance in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(disturbance)
        model = build("digits-cnn")
        train(model, SMALL, config, seed=seed)
        results.append(model)
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_the_model_given_can_be_kept_as_the_start():
    model = initialize(build("digits-cnn"), 77)
    kept = copy.deepcopy(model)
    train(model, SMALL, TrainConfig(epochs=1), seed=1, stop_epoch=0, resume=TrainState())
    assert same(model, kept)
    train(model, SMALL, TrainConfig(epochs=1), seed=1, stop_epoch=0)
    assert same(model, initialize(kept, 1))


@pytest.mark.gpu
def test_a_gpu_starts_from_the_same_weights_and_learns():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    data, test = (d.to("cuda") for d in DIGITS)
    model = initialize(build("digits-cnn-bn").cuda(), 4)
    assert all(
        torch.equal(p.cpu(), q)
        for p, q in zip(
            model.parameters(), initialize(build("digits-cnn-bn"), 4).parameters(), strict=True
        )
    )
    train(model, data, TrainConfig(epochs=10, batch_size=64, augment=False), seed=0)
    assert evaluate(model, test).accuracy > 0.9


def test_frozen_parameters_stay():
    model = build("digits-cnn")
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    trained = train(model, SMALL, TrainConfig(epochs=1), seed=1, resume=TrainState())
    assert torch.equal(model[0].weight, before)
    assert "0.weight" not in trained.optimizer_state and "0.bias" in trained.optimizer_state


def test_training_fits_the_labels():
    model, config = build("digits-cnn-bn"), TrainConfig(epochs=15, batch_size=50, augment=False)
    train(model, SMALL, config, seed=1)
    assert evaluate(model, SMALL).accuracy > 0.9


def test_divergence_names_epoch_update_and_rate():
    with pytest.raises(DivergenceError, match=r"epoch \d+, update \d+.*rate 1e\+20; lower lr"):
        train(build("digits-cnn"), SMALL, TrainConfig(lr=1e20, epochs=3, batch_size=50), seed=0)


def test_divergence_at_the_very_last_update_is_seen():
    config = TrainConfig(lr=1e38, weight_decay=1e6, epochs=1, batch_size=150, augment=False)
    with pytest.raises(DivergenceError, match="weights that are NaN or infinite in epoch 0"):
        train(build("digits-cnn"), SMALL, config, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stop_epoch": 3}, "stop_epoch: expected at most 2"),
        (
            {"resume": TrainState(2), "stop_epoch": 1},
            "epoch: expected at most stop_epoch, 1",
        ),
        ({"seed": -1}, "seed"),
        ({"order_seed": -1}, "order_seed"),
        ({"resume": TrainState(0, {"x": torch.ones(1)})}, "optimizer_state.*train"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        train(build("digits-cnn"), SMALL, TrainConfig(epochs=2), **{"seed": 0, **arguments})


def test_a_state_of_other_shapes_is_refused():
    start = train(build("digits-cnn"), SMALL, TrainConfig(epochs=1), seed=0)
    start.optimizer_state["0.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"optimizer_state\['0.bias'\]: expected shape \[16\]"):
        train(
            build("digits-cnn"),
            SMALL,
            TrainConfig(epochs=1),
            seed=0,
            resume=TrainState(0, start.optimizer_state),
        )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (build("digits-cnn", num_classes=5), r"at least 10\].*num_classes=10"),
        (build("resnet8"), r"images of shape \[1, 8, 8\]"),
        (nn.Flatten(0), "outputs of shape"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10, device="meta")), "device"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, SMALL)
    with pytest.raises(ValueError, match=message):
        train(model, SMALL, TrainConfig(epochs=1), seed=0, resume=TrainState())


def test_a_model_without_trainable_parameters_is_refused():
    model = build("digits-cnn").requires_grad_(False)
    with pytest.raises(ValueError, match="at least one parameter"):
        train(model, SMALL, TrainConfig(epochs=1), seed=0)


# -- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 37, 1000])
def test_every_example_weighs_the_same(batch_size):
    data = SMALL.subset(torch.arange(37))
    model = initialize(build("digits-cnn-bn"), 0).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    loss, accuracy = evaluate(model, data, batch_size)
    assert model.training and not model[1].training  # modes are as they were
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    outputs = model(data.inputs()).detach()
    expected = nn.functional.cross_entropy(outputs.double(), data.labels)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert accuracy == float((outputs.argmax(1) == data.labels).double().mean())


def test_an_infinite_loss_names_its_example():
    class Faulty(nn.Module):
        def forward(self, x):
            logits = torch.zeros(len(x), 10)
            logits[x[:, 0, 0, 0] > 100] = float("nan")
            return logits

    pixels = torch.zeros(9, 1, 2, 2, dtype=torch.uint8)
    pixels[6] = 255
    data = ImageData(
        pixels, torch.zeros(9, dtype=torch.int64), (0.0,), (0.001,), tuple("0123456789"), "x"
    )
    with pytest.raises(ValueError, match="nan for example 6"):
        evaluate(Faulty(), data, batch_size=4)


# -- files -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = build("digits-cnn-bn")
    config = TrainConfig(epochs=1, batch_size=50)
    train(model, SMALL, config, seed=5)
    manifest = training_manifest("digits-cnn-bn", SMALL, config, 5, metrics={"loss": 0.5})
    path = tmp_path / "m.safetensors"
    save_minimum(path, model, manifest)
    return path, model


def test_a_minimum_comes_back_bit_for_bit(saved):
    path, model = saved
    other = build("digits-cnn-bn")
    load_minimum(path, other)
    assert same(model, other)
    minimum = read_minimum(path)
    assert isinstance(minimum, Minimum)
    assert minimum.parameters.keys() == dict(model.named_parameters()).keys()
    assert minimum.buffers["1.num_batches_tracked"] == 3


def test_the_manifest_says_how_the_minimum_came_about(saved):
    manifest = json.loads(saved[0].with_suffix(".json").read_text())
    assert manifest["seed"] == manifest["order_seed"] == 5
    assert manifest["model"] == "digits-cnn-bn" and manifest["num_params"] == 14_538
    assert manifest["data"]["sha256"] == SMALL.hash and manifest["data"]["examples"] == 150
    assert TrainConfig(**manifest["recipe"]) == TrainConfig(epochs=1, batch_size=50)
    assert manifest["metrics"] == {"loss": 0.5}
    assert manifest["versions"].keys() == {"entropic_fast", "torch", "numpy", "python"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", manifest["created"])


@pytest.mark.parametrize("model", ["digits-cnn", "resnet8"])
def test_a_minimum_of_another_model_is_refused_and_changes_nothing(saved, model):
    other = build(model)
    before = copy.deepcopy(other)
    with pytest.raises(MismatchError, match=r"m\.safetensors.*'digits-cnn-bn'.*is missing"):
        load_minimum(saved[0], other)
    assert same(other, before)


def test_other_shapes_and_types_are_refused(saved):
    with pytest.raises(MismatchError, match=r"weight is \[10, 32\] of .*, not \[9, 32\]"):
        load_minimum(saved[0], build("digits-cnn-bn", num_classes=9))
    with pytest.raises(MismatchError, match=r"not .* of torch.float64; .*and .* more"):
        load_minimum(saved[0], build("digits-cnn-bn").double())


def test_a_truncated_minimum_is_refused(saved):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(store.DamagedFileError, match="truncated"):
        load_minimum(path, build("digits-cnn-bn"))


def test_a_file_that_is_no_minimum_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    store.save_tensors(path, {"theta": torch.ones(1)}, {"kind": "path"})
    with pytest.raises(store.DamagedFileError, match=r"expected a minimum.*'path'"):
        read_minimum(path)
    with pytest.raises(FileNotFoundError):
        read_minimum(tmp_path / "none.safetensors")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = build("digits-cnn")
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"parameter 0\.weight"):
        save_minimum(tmp_path / "m.safetensors", model, {})
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        save_minimum(tmp_path / "m.pt", build("digits-cnn"), {})
    assert not list(tmp_path.iterdir())


def test_tied_and_viewed_parameters_can_be_saved(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            flat = torch.randn(8)
            self.a, self.b = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
            self.c = self.a

    first, second = Tied(), Tied()
    save_minimum(tmp_path / "m.safetensors", first, {})
    load_minimum(tmp_path / "m.safetensors", second)
    assert same(first, second) and second.c is second.a


def test_a_cut_run_goes_on_whatever_the_layout_of_the_state():
    config = TrainConfig(epochs=3, batch_size=50, augment=False)
    whole = build("digits-cnn")
    train(whole, SMALL, config, seed=0)
    for layout in (torch.contiguous_format, torch.channels_last):
        model = build("digits-cnn")
        cut = train(model, SMALL, config, seed=0, stop_epoch=1)
        state = {
            name: m.contiguous(memory_format=layout) if m.ndim == 4 else m
            for name, m in cut.optimizer_state.items()
        }
        train(model, SMALL, config, seed=0, resume=TrainState(1, state))
        assert same(model, whole)


def test_half_precision_is_for_activations_alone_and_learns():
    config = TrainConfig(epochs=40, batch_size=50, augment=False, precision="bfloat16")
    model = build("digits-cnn")
    trained = train(model, SMALL, config, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {m.dtype for m in trained.optimizer_state.values()} == {torch.float32}
    exact = build("digits-cnn")
    train(exact, SMALL, TrainConfig(epochs=40, batch_size=50, augment=False), seed=0)
    assert evaluate(model, SMALL).accuracy > 0.8
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_weights_keep_their_layout_and_shared_memory():
    model = build("resnet8-w4", in_channels=1)
    train(model, SMALL, TrainConfig(epochs=1, batch_size=75, augment=False), seed=0)
    assert all(p.is_contiguous() for p in model.parameters())
    model = build("digits-cnn")
    both = torch.cat([p.detach().flatten() for p in (model[2].weight, model[4].weight)])
    for layer, part in ((model[2], both[: 16 * 32 * 9]), (model[4], both[16 * 32 * 9 :])):
        layer.weight = nn.Parameter(part.view(layer.weight.shape))
    train(model, SMALL, TrainConfig(epochs=1, batch_size=75, augment=False), seed=0)
    assert torch.equal(model[2].weight.flatten(), both[: 16 * 32 * 9])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_training_is_the_same_training_and_whole_models_come_back():
    data = DIGITS[0].limited(70)  # a last batch of 6
    plain, fast = (
        train(
            build("digits-cnn"),
            data,
            TrainConfig(epochs=2, batch_size=32, augment=False, compiled=c),
            seed=0,
        )
        for c in (False, True)
    )
    assert list(fast.model.state_dict()) == list(plain.model.state_dict())
    assert fast.history["loss"].tolist() == pytest.approx(plain.history["loss"].tolist(), rel=1e-4)
    for a, b in zip(plain.model.parameters(), fast.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
