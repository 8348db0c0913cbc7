"""Cross-entropy as `nn.CrossEntropyLoss` says it: class weights, ignored labels, smoothing."""

import pytest
import torch
from torch import Tensor, nn

from entropic_fast.curvature import HessianOperator
from entropic_fast.objective import Objective


def sequences(*lengths: int, ignored: bool = False) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in lengths:
        tokens = torch.randint(9, (3, n), generator=generator)
        labels = torch.randint(5, (3, n), generator=generator)
        labels[1, ::2] = -100 if ignored else labels[1, ::2]
        found.append((tokens, labels))
    return found


def language_model() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(tokens))).transpose(1, 2)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Model().double()


@pytest.mark.parametrize("weighted", [False, True])
def test_ignored_positions_count_as_zero_in_the_mean(weighted: bool):
    """torch's mean is ours times the number of positions over the weight of what counts."""
    model, (batch,) = language_model(), sequences(6, ignored=True)
    weight = torch.linspace(0.5, 2, 5) if weighted else None  # float32, as users have it
    each = nn.CrossEntropyLoss(weight=weight, ignore_index=-100, reduction="none")
    obj = Objective(model, each, batch)
    labels = batch[1]
    counted = labels != -100
    total = counted.sum() if weight is None else weight.double()[labels[counted]].sum()
    double = None if weight is None else weight.double()
    expected = nn.functional.cross_entropy(model(batch[0]).detach(), labels, double)
    assert obj.loss() == pytest.approx(float(expected * total / labels.numel()), rel=1e-13)
    assert torch.equal(each.weight, weight) if weighted else each.weight is None
    assert HessianOperator(obj).method == "graph"


def test_an_example_of_an_ignored_label_has_no_loss():
    x, model = torch.randn(4, 2, dtype=torch.float64), nn.Linear(2, 3).double()
    loss = nn.CrossEntropyLoss(ignore_index=-100, reduction="none", label_smoothing=0.1)
    obj = Objective(model, loss, (x, torch.tensor([0, -100, 2, -100])))
    losses = obj.example_losses()
    assert losses[1] == losses[3] == 0 and (losses[::2] > 0).all()
    rest = Objective(model, loss, (x[::2], torch.tensor([0, 2])))
    v = torch.randn(9, dtype=torch.float64)
    product = HessianOperator(obj) @ v
    assert torch.allclose(product, (HessianOperator(rest) @ v) / 2, rtol=1e-12, atol=1e-15)


def test_without_options_it_is_the_loss_by_name():
    data = sequences(4)
    one = Objective(language_model(), "cross_entropy", data)
    other = Objective(language_model(), nn.CrossEntropyLoss(reduction="none"), data)
    assert one.loss() == other.loss()


def test_labels_out_of_range_are_refused_but_for_the_ignored_one():
    data = sequences(4, ignored=True)
    with pytest.raises(ValueError, match=r"got -100 for example 1; to ignore it, pass nn\."):
        Objective(language_model(), "cross_entropy", data)
    with pytest.raises(ValueError, match=r"labels in 0 \.\. 4 .*, got -100 for example 1"):
        Objective(language_model(), nn.CrossEntropyLoss(ignore_index=-1, reduction="none"), data)


def test_labels_are_checked_against_the_outputs_of_their_own_batch():
    data = sequences(7, 4)
    assert Objective(language_model(), "cross_entropy", data).num_examples == 6
    data[1] = (data[1][0], data[1][1][:, :3])
    with pytest.raises(ValueError, match=r"each output of shape \[5, 4\], got shape \[3, 3\]"):
        Objective(language_model(), "cross_entropy", data)
