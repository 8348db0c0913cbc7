import pytest
import torch
from torch import nn

from entropic_fast.training import models
from entropic_fast.training.models import build, digits_cnn, initialize, resnet, wide_resnet


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (lambda: build("resnet20"), 272_474),
        (lambda: build("resnet20", num_classes=100), 278_324),
        (lambda: build("resnet8"), 78_042),
        (lambda: build("resnet110"), 1_730_714),
        (lambda: build("wrn16-4"), 2_748_890),
        (lambda: build("wrn28-10"), 36_479_194),  # as published: 36.5 million
        (lambda: build("digits-cnn"), 14_378),
        (lambda: build("digits-cnn-bn"), 14_538),
    ],
)
def test_parameter_counts_are_the_published_ones(model, parameters):
    with torch.device("meta"):
        assert count(model()) == parameters


def test_projection_shortcuts_add_2752_to_the_parameter_free_ones():
    # ResNet-20 with zero-padded shortcuts has 269,722 parameters (He et al.: 0.27 million).
    with torch.device("meta"):
        assert count(resnet(20)) - (16 * 32 + 2 * 32) - (32 * 64 + 2 * 64) == 269_722


@pytest.mark.parametrize("name", models.NAMES)
def test_every_name_builds_a_network_that_runs_and_trains(name):
    digits = name.startswith("digits")
    size, channels = (8, 1) if digits else (16, 3)
    model = build(name, num_classes=7)
    out = model(torch.randn(2, channels, size, size))
    assert out.shape == (2, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "depth", "sizes"),
    [
        (lambda: resnet(8, width=4), 7, [32, 16, 8]),
        (lambda: wide_resnet(10, 2, width=4), 7, [32, 16, 8]),
        (lambda: wide_resnet(16, 1, width=4), 13, [32, 16, 8]),
    ],
)
def test_a_network_has_the_depth_its_name_says(model, depth, sizes):
    model = model()
    threes = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(threes) == depth  # the last weight layer is linear
    seen = []
    for conv in threes:
        conv.register_forward_hook(lambda m, i, o: seen.append(o.shape[-1]))
    model(torch.randn(1, 3, 32, 32))
    assert sorted(set(seen), reverse=True) == sizes


def test_a_block_computes_its_formula():
    torch.manual_seed(0)
    block = models.BasicBlock(3, 5, 2).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    y = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    expected = (y + block.shortcut[1](block.shortcut[0](x))).relu()
    assert torch.allclose(block(x), expected)
    block = models.PreActivationBlock(3, 5, 2).double().eval()
    activated = block.bn1(x).relu()
    expected = block.conv2(block.bn2(block.conv1(activated)).relu()) + block.shortcut(activated)
    assert torch.allclose(block(x), expected)


def test_nothing_is_in_place_and_no_activation_is_shared():
    for name in ("resnet8", "wrn10-1", "digits-cnn-bn"):
        relus = [m for m in build(name).modules() if isinstance(m, nn.ReLU)]
        assert relus and not any(m.inplace for m in relus)
        calls = []
        model = build(name)
        for m in model.modules():
            if isinstance(m, nn.ReLU):
                m.register_forward_hook(lambda m, i, o, calls=calls: calls.append(m))
        model(torch.randn(1, 1 if name.startswith("d") else 3, 8, 8))
        assert len(calls) == len(set(calls)) == len(relus)


def test_widths_and_channels_can_be_chosen():
    assert build("resnet20-w8")[0].out_channels == 8
    assert build("wrn16-4-w4")[0].out_channels == 4
    assert build("resnet8", in_channels=1)[0].in_channels == 1
    assert build("digits-cnn", in_channels=3)[0].in_channels == 3
    assert count(digits_cnn(channels=(2, 3, 4))) == 20 + 57 + 112 + 50


@pytest.mark.parametrize("name", ["resnet", "vgg", "", "resnet20-w", "wrn16", "resnet20 ", None])
def test_an_unknown_name_lists_the_choices(name):
    with pytest.raises(ValueError, match=r"'resnet20'.*'digits-cnn-bn'"):
        build(name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("resnet18"), r"depth: expected 6n \+ 2"),
        (lambda: build("resnet2"), r"depth: expected 6n \+ 2"),
        (lambda: build("wrn12-4"), r"depth: expected 6n \+ 4"),
        (lambda: build("wrn16-0"), "widen"),
        (lambda: build("resnet8", num_classes=0), "num_classes"),
        (lambda: build("resnet8", in_channels=0), "in_channels"),
        (lambda: resnet(8, width=0), "width"),
        (lambda: digits_cnn("layer"), "norm: expected one of 'none', 'batch'"),
        (lambda: digits_cnn(channels=(1, 2)), "channels: expected three"),
        (lambda: digits_cnn(channels=(1, 2, 0)), "channels"),
        (lambda: initialize(digits_cnn(), -1), "seed"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Everything(nn.Module):
    """One of each kind of layer that `initialize` treats in its own way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)
        self.linear = nn.Linear(50, 200, dtype=torch.float64)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(3, 5)
        self.attention = nn.MultiheadAttention(8, 2)
        self.embedding = nn.Embedding(7, 3)


def states(*seeds):
    return [
        {k: v.clone() for k, v in initialize(Everything(), seed).state_dict().items()}
        for seed in seeds
    ]


def test_initialization_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = states(5)[0]
    torch.manual_seed(2)
    second, other = states(5, 6)
    assert all(torch.equal(first[k], second[k]) for k in first)
    for part in (
        "conv.weight",
        "linear.weight",
        "lstm.weight_ih_l0",
        "attention.in_proj_weight",
        "embedding.weight",
    ):
        assert not torch.equal(first[part], other[part])


def test_initialization_undoes_training():
    model = initialize(Everything(), 3)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    initialize(model, 3)
    assert all(torch.equal(v, fresh[k]) for k, v in model.state_dict().items())


def test_initialization_leaves_the_global_generator_alone():
    model = Everything()
    state = torch.get_rng_state()
    initialize(model, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_have_hes_variance():
    model = initialize(Everything(), 0)
    assert model.conv.weight.var().item() == pytest.approx(2 / 27, rel=0.15)
    assert model.linear.weight.var().item() == pytest.approx(2 / 50, rel=0.1)
    assert abs(model.linear.weight.mean().item()) < 4 * (2 / 50 / 10_000) ** 0.5
    assert not model.conv.bias.any() and not model.linear.bias.any()


def test_layers_of_one_shape_get_different_weights():
    model = initialize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0)
    assert not torch.equal(model[0].weight, model[1].weight)


def test_a_module_that_cannot_be_reset_is_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match=r"model\.1: .*Scale with factor.*reset_parameters"):
        initialize(nn.Sequential(nn.Linear(2, 2), Scale()), 0)
