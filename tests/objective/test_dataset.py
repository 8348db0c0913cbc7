"""Examples: one fixed order, true sizes, and no data that changes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from entropic_fast.objective import Objective
from entropic_fast.objective.data import ExampleSet, RepeatedExamples

CPU = torch.device("cpu")


def tensors(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(2.0 * n).view(n, 2), torch.arange(n)


def make(data, batch_size: int | None = None) -> ExampleSet:
    return ExampleSet(data, CPU, torch.float64, batch_size)


class Stream(IterableDataset):
    def __init__(self, n: int) -> None:
        self.data = tensors(n)

    def __iter__(self):
        return zip(*self.data, strict=True)


def sources(n: int) -> dict[str, ExampleSet]:
    x, y = tensors(n)
    return {
        "tensors": make((x, y), 4),
        "list of tensors": make([x, y], 4),
        "dataset": make(TensorDataset(x, y), 4),
        "stream": make(Stream(n), 4),
        "loader": make(DataLoader(TensorDataset(x, y), batch_size=4)),
        "batches": make([(x[:1], y[:1]), (x[1:1], y[1:1]), (x[1:], y[1:])]),
    }


KINDS = list(sources(2))


@pytest.mark.parametrize("n", [2, 4, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_holds_the_same_examples(kind: str, n: int):
    examples = sources(n)[kind]
    assert examples.count == n
    for size in (None, 1, 3, 100):
        batches = list(examples.batches(batch_size=size))
        assert torch.equal(torch.cat([b.targets for b in batches]), torch.arange(n))
        assert torch.equal(torch.cat([b.inputs for b in batches]), tensors(n)[0].double())
        starts = [b.start for b in batches]
        assert starts == [int(b.targets[0]) for b in batches]
        if size is not None:
            assert all(0 < len(b.inputs) <= size for b in batches)


@pytest.mark.parametrize("kind", KINDS)
def test_max_examples_takes_the_first(kind: str):
    examples = sources(9)[kind]
    for most in range(1, 10):
        for size in (None, 2):
            targets = [b.targets for b in examples.batches(most, size)]
            assert torch.equal(torch.cat(targets), torch.arange(most))


def test_one_example():
    for data in (tensors(1), TensorDataset(*tensors(1)), [tensors(1)]):
        batches = list(make(data).batches())
        assert [len(b.inputs) for b in batches] == [1]


def test_batches_of_tensors_are_as_long_as_asked():
    assert [len(b.inputs) for b in make(tensors(33), 32).batches()] == [32, 1]
    assert [len(b.inputs) for b in make(tensors(600)).batches()] == [256, 256, 88]
    assert [len(b.inputs) for b in make(tensors(10), 4).batches(batch_size=6)] == [6, 4]


def test_floating_inputs_are_cast_and_whole_ones_kept():
    x, y = tensors(3)
    assert next(make((x, y)).batches()).inputs.dtype == torch.float64
    assert next(make((x, y)).cast(torch.float32).batches()).inputs.dtype == torch.float32
    assert next(make((y, y)).batches()).inputs.dtype == torch.int64
    loader = make([(x, y)]).cast(torch.float32)
    assert next(loader.batches()).inputs.dtype == torch.float32


class Shuffled:
    """A re-iterable of batches in another order each time."""

    def __init__(self) -> None:
        self.turn = 0

    def __iter__(self):
        self.turn += 1
        x, y = tensors(4)
        order = torch.arange(4).roll(self.turn)
        return iter([(x[order], y[order])])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(0, 2), torch.zeros(0)), "at least one example, got none"),
        ([], "at least one example, got none"),
        (TensorDataset(torch.zeros(0, 2), torch.zeros(0)), "at least one example"),
        ((torch.zeros(3, 2), torch.zeros(2)), r"of one length, got inputs \[3, 2\], targets \[2\]"),
        ((torch.zeros(()), torch.zeros(())), "of one length"),
        ([(torch.zeros(3, 2), torch.zeros(2))], "of one length"),
        ([torch.zeros(3, 2)], r"batches that are \(inputs, targets\)"),
        (iter([(torch.zeros(3, 2), torch.zeros(3))]), "read many times, got a one-shot iterator"),
        (Shuffled(), "the same examples in the same order"),
        (3, "a Dataset, or a re-iterable of batches"),
    ],
)
def test_data_that_does_not_fit_is_refused(data, message):
    with pytest.raises(ValueError, match="data: expected .*" + message):
        make(data)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_bad_batch_sizes_are_refused(size):
    with pytest.raises(ValueError, match="batch_size: expected an integer"):
        make(tensors(3), size)


def test_a_batch_size_for_batches_is_refused():
    with pytest.raises(ValueError, match="batch_size: expected None for data that come in"):
        make([tensors(3)], 2)


def test_nan_inputs_are_the_same_at_every_reading():
    x, y = tensors(3)
    x[0, 0] = float("nan")
    assert make([(x, y)]).count == 3


def test_batches_that_change_after_the_first_are_refused():
    class Reshuffled:
        def __init__(self):
            self.readings = 0

        def __iter__(self):
            self.readings += 1
            yield torch.zeros(2, 3), torch.zeros(2)
            rest = torch.arange(12.0).reshape(4, 3)
            yield (rest if self.readings % 2 else rest.flip(0)), torch.zeros(4)

    with pytest.raises(ValueError, match="others at the second reading"):
        Objective(nn.Linear(3, 1), lambda o, t: o[:, 0] - t, Reshuffled())


def test_targets_that_are_no_probabilities_are_refused():
    with pytest.raises(ValueError, match="sum to 1 over the classes"):
        Objective(nn.Linear(3, 2), "cross_entropy", (torch.randn(4, 3), torch.full((4, 2), -7.0)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [1, 2, 5])
def test_repeated_examples_are_those_of_repeated_data(kind: str, times: int):
    x, _ = tensors(9)
    expected, targets = x.double().repeat_interleave(times, 0), torch.arange(9 * times)
    examples = RepeatedExamples(sources(9)[kind], times, targets)
    assert examples.count == 9 * times
    for size in (None, 1, 3, 4, 100):
        for most in (None, 1, 7):
            batches = list(examples.batches(most, size))
            assert torch.equal(torch.cat([b.inputs for b in batches]), expected[:most])
            assert torch.equal(torch.cat([b.targets for b in batches]), targets[:most])
            assert [b.start for b in batches] == [int(b.targets[0]) for b in batches]
            assert size is None or max(len(b.inputs) for b in batches) <= size
    narrow = examples.cast(torch.float32)
    assert next(narrow.batches()).inputs.dtype == torch.float32 and narrow.count == 9 * times


def test_repeated_examples_need_a_target_each():
    with pytest.raises(ValueError, match="targets: expected 6, 2 for each example"):
        RepeatedExamples(sources(3)["tensors"], 2, torch.arange(5))
    with pytest.raises(ValueError, match="times: expected an integer"):
        RepeatedExamples(sources(3)["tensors"], 0, torch.arange(0))


def test_data_and_models_made_in_inference_mode_are_taken():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    expected = Objective(model, "mse", (x, y)).gradient()
    with torch.inference_mode():
        made, inputs, targets = copy.deepcopy(model), x.clone(), y.clone()
    assert inputs.is_inference() and made.weight.is_inference()
    for data in ((inputs, targets), [(inputs, targets)]):
        obj = Objective(made, "mse", data)
        assert torch.equal(obj.gradient(), expected)
        assert obj.double().loss() == pytest.approx(obj.loss())
