"""Models and losses that draw random numbers are refused: what draws, where, and what to do."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entropic_fast as ef
from entropic_fast._torch.randomness import sources


class With(nn.Module):
    """A linear layer, and noise on what it gives."""

    def __init__(self, noise) -> None:
        super().__init__()
        self.linear, self.noise = nn.Linear(3, 4), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.linear(x))


def sampled(x: Tensor) -> Tensor:
    return torch.distributions.Normal(x, 1.0).rsample()


def attention(x: Tensor) -> Tensor:
    q = x[:, None, None]
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)[:, 0, 0]


def stochastic_depth(x: Tensor) -> Tensor:
    keep = torch.empty(len(x), 1).bernoulli_(0.9)
    return x * keep / 0.9


TORCH = {
    "a VAE's sample": (
        lambda x: x + torch.randn_like(x),
        r"from randn_like \(test_randomness.py:\d+, in <lambda>\); noise such as a VAE's sample",
    ),
    "torch.randn": (lambda x: x + torch.randn(x.shape), "from randn .* such as a VAE's sample"),
    "a distribution": (sampled, r"from normal_ \(test_randomness.py:\d+, in sampled.*VAE's sample"),
    "rand_like": (lambda x: x * torch.rand_like(x), "from rand_like .*call rand_like only if self"),
    "bernoulli": (
        stochastic_depth,
        r"from bernoulli_ \(test_randomness.py:\d+, in stochastic_depth",
    ),
    "dropout": (F.dropout, r"from dropout .*use nn.Dropout, or F.dropout\(\.\.\., training=self.t"),
    "alpha dropout": (lambda x: F.alpha_dropout(x, training=True), r"F\.alpha_dropout\(\.\.\., tr"),
    "attention": (
        attention,
        "scaled_dot_product_attention .*dropout_p=p if self.training else 0.0",
    ),
    "gumbel": (F.gumbel_softmax, "from gumbel_softmax .*call gumbel_softmax only if self.training"),
    "permutation": (lambda x: x[:, torch.randperm(4)], "from randperm"),
    "rrelu": (lambda x: F.rrelu(x, training=True), "from rrelu"),
    "in place": (lambda x: x + torch.empty_like(x).normal_(), "from normal_ .*VAE"),
    "several": (lambda x: F.dropout(x) + torch.randn_like(x), "from dropout .*, randn_like .*VAE"),
}


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3), torch.arange(6) % 4


@pytest.mark.parametrize("name", TORCH)
def test_the_operation_is_named_and_what_to_do_about_it(name: str):
    noise, words = TORCH[name]
    with pytest.raises(ValueError, match=r"(?s)^model: expected the same outputs.*" + words) as got:
        ef.Objective(With(noise), "cross_entropy", data())
    assert len(str(got.value)) < 600
    if "dropout" not in name and name not in ("several", "attention"):
        assert "dropout" not in str(got.value)


def test_noise_from_elsewhere_is_said_to_be_from_elsewhere():
    for noise in (
        lambda x: x + np.random.default_rng().normal(),
        lambda x: x * random.random(),
    ):
        with pytest.raises(ValueError, match=r"no operation of torch draws numbers.*NumPy's"):
            ef.Objective(With(noise), "cross_entropy", data())

    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return len(calls) * x

    with pytest.raises(ValueError, match=r"state that forward changes \(a counter"):
        ef.Objective(With(counted), "cross_entropy", data())


@pytest.mark.parametrize("rare", [False, True])
def test_a_random_loss_is_refused_too(rare: bool):
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs, targets, reduction="none")
        noise = torch.rand_like(losses)
        return losses if rare else losses + noise

    with pytest.raises(ValueError, match=r"^loss: expected the same .* from rand_like"):
        ef.Objective(nn.Linear(3, 4), loss, data())


def test_noise_of_training_alone_is_no_noise():
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(3, 4), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            out = self.drop(self.linear(x))
            return out + torch.randn_like(out) if self.training else out

    assert ef.Objective(Trained(), "cross_entropy", data()).loss() > 0


def test_what_fails_while_it_is_looked_at_says_what_it_drew_before():
    def failing() -> None:
        torch.rand(3)
        raise RuntimeError("later")

    assert [name for name, _ in sources(failing)] == ["rand"]
    assert sources(lambda: torch.ones(3).exp()) == []
