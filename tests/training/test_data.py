import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch

from entropic_fast.ops.random_bits.streams import philox
from entropic_fast.training.data import (
    CropAndFlip,
    ImageData,
    augment,
    batches,
    epoch_order,
    load,
)


def images(n=6, channels=3, size=5, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    return ImageData(
        pixels,
        torch.arange(n) % classes,
        (0.5,) * channels,
        (0.25,) * channels,
        tuple("abcdefghij"[:classes]),
        "toy",
    )


# -- ImageData -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_normalized_by_channel(dtype):
    data = ImageData(
        images().images, images().labels, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), ("a", "b", "c"), "toy"
    )
    mean = torch.tensor(data.mean, dtype=dtype).view(3, 1, 1)
    std = torch.tensor(data.std, dtype=dtype).view(3, 1, 1)
    expected = (data.images.to(dtype) / 255 - mean) / std
    assert data.inputs(dtype=dtype).dtype == dtype
    assert torch.allclose(data.inputs(dtype=dtype), expected, atol=1e-6)
    index = torch.tensor([4, 0])
    assert torch.equal(data.inputs(index, dtype), data.inputs(dtype=dtype)[index])


def test_the_training_set_has_mean_zero_and_deviation_one():
    train, _ = load("digits")
    x = train.inputs(dtype=torch.float64)
    assert abs(float(x.mean())) < 1e-12
    assert float(x.square().mean()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("classes", [1, 3, 7])
def test_every_beginning_of_the_order_is_balanced(classes):
    data = images(n=70, classes=classes).subset(torch.randperm(70))
    assert sorted(data.order.tolist()) == list(range(70))
    for limit in (1, 2, 13, 70):
        _, targets = data.tensors(limit)
        counts = targets.bincount(minlength=classes)
        assert counts.max() - counts.min() <= 1


def test_an_unbalanced_set_is_balanced_until_a_class_runs_out():
    labels = torch.tensor([0] * 2 + [1] * 20)
    data = ImageData(
        torch.zeros(22, 1, 2, 2, dtype=torch.uint8), labels, (0.0,), (1.0,), ("a", "b"), "toy"
    )
    assert data.tensors(4)[1].bincount().tolist() == [2, 2]
    assert data.tensors(10)[1].bincount().tolist() == [2, 8]


def test_a_smaller_limit_is_a_beginning_of_a_larger_one():
    data = images(n=30)
    few, many = data.tensors(7), data.tensors()
    assert torch.equal(few[0], many[0][:7]) and torch.equal(few[1], many[1][:7])
    assert torch.equal(data.limited(7).tensors()[1].sort()[0], few[1].sort()[0])


def test_the_hash_sees_every_part():
    base = images()
    assert base.hash == images().hash
    other = images()
    other.images[5, 2, 4, 4] ^= 1
    moved = ImageData(base.images, base.labels.roll(1), base.mean, base.std, base.class_names, "")
    scaled = ImageData(base.images, base.labels, base.mean, (1.0,) * 3, base.class_names, "")
    assert len({x.hash for x in (base, other, moved, scaled, base.subset([0, 1]))}) == 5


IMAGES, LABELS = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1])
GOOD = {
    "images": IMAGES,
    "labels": LABELS,
    "mean": (0.0,),
    "std": (1.0,),
    "class_names": ("a", "b"),
    "name": "x",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.float()}, r"images: expected a uint8.*float32"),
        ({"images": IMAGES[0]}, "images: expected a uint8 tensor of shape"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images: expected at least one"),
        ({"labels": LABELS[:1]}, r"labels: expected an int64 tensor of shape \[2\]"),
        ({"labels": LABELS.int()}, "labels: expected an int64"),
        ({"labels": torch.tensor([0, 2])}, "labels: expected values from 0 to 1.*2 at index 1"),
        ({"labels": torch.tensor([-1, 0])}, "-1 at index 0"),
        ({"mean": (0.0, 1.0)}, "mean: expected 1 finite"),
        ({"std": (float("nan"),)}, "std: expected 1 finite"),
        ({"std": (0.0,)}, "std: expected numbers above 0"),
    ],
)
def test_data_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ImageData(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.tensors(0), "limit: expected an integer of at least 1"),
        (lambda x: x.tensors(7), "limit: expected at most 6"),
        (lambda x: x.limited(7), "limit: expected at most 6"),
        (lambda x: x.subset([]), "images: expected at least one"),
        (lambda x: list(batches(0, 1, 0, 0)), "n: expected"),
        (lambda x: list(batches(1, 0, 0, 0)), "batch_size"),
        (lambda x: epoch_order(3, -1, 0), "epoch"),
        (lambda x: augment(x.images, torch.arange(5), 0, 0), r"index: expected.*\[6\]"),
        (lambda x: augment(x.images, torch.arange(6), 0, 0, pad=-1), "pad"),
        (lambda x: augment(x.images[0], torch.arange(3), 0, 0), "images: expected"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(images())


# -- augmentation and order ------------------------------------------------------------------


def augment_by_loop(x, words, pad, flip):
    out = torch.empty_like(x)
    n, _, height, width = x.shape
    for i in range(n):
        dy, dx = ((int(w) * (2 * pad + 1)) >> 32 for w in words[i, :2])
        for r in range(height):
            for c in range(width):
                source = c if not (flip and int(words[i, 2]) >> 31) else width - 1 - c
                rr, cc = r + dy - pad, source + dx - pad
                inside = 0 <= rr < height and 0 <= cc < width
                out[i, :, r, c] = x[i, :, rr, cc] if inside else 0
    return out


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (1, True), (4, True), (3, False)])
def test_augmentation_is_crop_then_flip(pad, flip):
    from entropic_fast.ops.random_bits.streams import fold_in, philox

    x = torch.randint(1, 256, (9, 2, 5, 4), dtype=torch.uint8)
    index = torch.randint(10**6, (9,))
    words = philox(index, fold_in(8, "augment"), stream=3)
    got = augment(x, index, 3, 8, pad, flip)
    assert got.dtype == torch.uint8
    assert torch.equal(got, augment_by_loop(x, words, pad, flip))


def test_augmentation_does_not_depend_on_batches_order_or_threads():
    x = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8)
    index = torch.arange(60)
    whole = augment(x, index, 1, 2)
    order = torch.randperm(60)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            parts = [augment(x[i], i, 1, 2) for i in order.split(7)]
            assert torch.equal(torch.cat(parts), whole[order])
    finally:
        torch.set_num_threads(threads)


def test_augmentation_changes_with_seed_epoch_and_example_only():
    x = torch.randint(256, (1, 1, 8, 8), dtype=torch.uint8).expand(200, 1, 8, 8)
    index = torch.arange(200)
    first = augment(x, index, 0, 0)
    assert torch.equal(first, augment(x, index, 0, 0))
    for other in (augment(x, index, 1, 0), augment(x, index, 0, 1), augment(x, index + 200, 0, 0)):
        same = (first == other).flatten(1).all(1).double().mean()
        assert same < 0.05  # one of 162 outcomes


def test_every_offset_and_flip_is_equally_likely():
    from scipy import stats

    x = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
    x[0, 0, 1] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    n = 5400
    out = augment(x.expand(n, 1, 3, 3), torch.arange(n), 0, 0, pad=1)
    kinds, counts = torch.unique(out.flatten(1), dim=0, return_counts=True)
    assert len(kinds) == 18
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_augmenting_does_not_change_the_images_given():
    data = images()
    before = data.images.clone()
    augment(data.images, torch.arange(6), 0, 0, pad=0, flip=False).zero_()
    assert torch.equal(data.images, before)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (5, 5), (5, 9), (10, 3)])
def test_batches_visit_every_example_once(n, size):
    parts = list(batches(n, size, epoch=2, seed=1))
    assert all(len(p) == size for p in parts[:-1])
    assert torch.equal(torch.cat(parts), epoch_order(n, 2, 1))
    assert sorted(torch.cat(parts).tolist()) == list(range(n))


def test_epochs_and_seeds_have_their_own_order():
    orders = {tuple(epoch_order(20, e, s).tolist()) for e in (0, 1) for s in (0, 1)}
    assert len(orders) == 4


# -- sources ---------------------------------------------------------------------------------


def test_digits_are_split_by_class_without_overlap():
    from sklearn.datasets import load_digits

    train, test = load("digits")
    assert (len(train), len(test)) == (1437, 360) and train.images.shape[1:] == (1, 8, 8)
    assert test.labels.bincount().tolist() == [36] * 10
    # Together they are scikit-learn's images, each with its label, none lost and none twice.
    pixels = torch.cat([train.images, test.images]).flatten(1).numpy()
    labels = torch.cat([train.labels, test.labels]).numpy()
    ours = sorted(
        (label, tuple(np.rint(p / 15.9375))) for label, p in zip(labels, pixels, strict=True)
    )
    theirs = load_digits()
    assert ours == sorted(zip(theirs.target, map(tuple, theirs.data), strict=True))


def test_a_limit_keeps_the_whole_sets_scale():
    few, test = load("digits", limit=55, test_limit=20)
    assert few.mean == load("digits")[0].mean
    assert len(few) == 55 and test.labels.bincount().tolist() == [2] * 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist",), r"data set: expected one of 'digits', 'cifar10', 'cifar100'.*data_dir"),
        (("digits", "somewhere"), "data_dir: expected None for 'digits'"),
    ],
)
def test_unknown_sources_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(*arguments)


@pytest.fixture
def torchvision(monkeypatch):
    """A stand-in with torchvision's interface and tiny data."""

    class Fake:
        calls: ClassVar[list] = []

        def __init__(self, root, train, download):
            self.calls.append((root, train, download))
            n = 20 if train else 10
            self.data = np.arange(n * 32 * 32 * 3, dtype=np.uint8).reshape(n, 32, 32, 3)
            self.targets = [i % 10 for i in range(n)]
            self.classes = list("abcdefghij")

    Fake.calls = []
    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(CIFAR10=Fake, CIFAR100=Fake)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return Fake


def test_cifar_comes_from_torchvision(torchvision, tmp_path):
    train, test = load("cifar10", data_dir=tmp_path)
    assert (len(train), len(test)) == (20, 10) and train.images.shape[1:] == (3, 32, 32)
    reference = torchvision("", True, False)
    assert torch.equal(train.images[3], torch.from_numpy(reference.data[3]).permute(2, 0, 1))
    assert train.labels.tolist() == reference.targets
    assert torchvision.calls[:2] == [(str(tmp_path), True, True), (str(tmp_path), False, True)]


def test_a_mistyped_folder_is_refused_before_any_download(torchvision, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("cifar10", data_dir=tmp_path / "nowhere")
    assert not torchvision.calls and not list(tmp_path.iterdir())


def test_downloads_go_to_the_cache_folder(torchvision, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROPIC_FAST_CACHE", str(tmp_path / "cache"))
    load("cifar100")
    assert torchvision.calls[0][0] == str(tmp_path / "cache" / "torchvision")


def test_a_missing_torchvision_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RuntimeError, match=r"install torchvision, or pass data_dir"):
        load("cifar10")


def test_a_failed_download_is_explained(torchvision, monkeypatch, tmp_path):
    def fail(self, root, train, download):
        raise RuntimeError("Dataset not found or corrupted")

    monkeypatch.setattr(torchvision, "__init__", fail)
    with pytest.raises(RuntimeError, match=r"'cifar10'.*not found or corrupted.*data_dir"):
        load("cifar10", data_dir=tmp_path, download=False)


@pytest.mark.gpu
def test_a_gpu_augments_and_orders_as_the_cpu_does():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    data, _ = load("digits", limit=100)
    there = data.to("cuda")
    index = torch.arange(100)
    got = augment(there.images, index.cuda(), 3, 4)
    assert torch.equal(got.cpu(), augment(data.images, index, 3, 4))
    assert torch.equal(there.order.cpu(), data.order) and there.hash == data.hash
    assert torch.allclose(there.inputs().cpu(), data.inputs(), atol=1e-6)


def test_normalized_images_are_padded_with_black():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (9, 3, 6, 5), generator=g, dtype=torch.uint8)
    data = ImageData(
        images, torch.zeros(9, dtype=torch.int64), (0.2, 0.4, 0.5), (0.1, 0.2, 0.3), ["a"], "x"
    )
    words = philox(torch.arange(9), seed=5)
    first = data.normalize(CropAndFlip(3)(images, words))
    last = data.augmentation(pad=3)(data.normalize(images), words)
    torch.testing.assert_close(last, first)


def test_a_fill_needs_a_number_a_channel():
    with pytest.raises(ValueError, match="fill: expected 3 numbers"):
        CropAndFlip(fill=(0.0,))(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, dtype=torch.int64))
