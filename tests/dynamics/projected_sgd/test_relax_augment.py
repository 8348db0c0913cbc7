"""Augmentation within relax: counter-based, per replica, example and epoch."""

import pytest
import torch
from relax_cases import conv_problem, relax_with

from entropic_fast.dynamics.projected_sgd._minibatches import Minibatches
from entropic_fast.ops.random_bits.streams import fold_in, philox
from entropic_fast.training.data import CropAndFlip

COMMON = dict(lr=0.05, batch_size=8, project_every=3, steps=12, seed=4)


def test_words_depend_on_seed_replica_epoch_and_example_alone():
    obj, _ = conv_problem("none")
    seen = {}

    def note(images, words):
        seen["images"], seen["words"] = images, words
        return -images

    two = Minibatches(obj, 8, 4, [5, 1], note)
    x, _ = obj.tensors()
    for step in (0, 3, 7):
        index, epoch = two.indices(step), step // two.per_epoch
        inputs, targets = two(step)
        assert torch.equal(inputs, -x[index]) and torch.equal(targets, obj.tensors()[1][index])
        expected = [
            philox(row, fold_in(4, "relax augment", i), epoch)
            for row, i in zip(index, (5, 1), strict=True)
        ]
        assert torch.equal(seen["words"].view(2, 8, 4), torch.stack(expected))
    alone = Minibatches(obj, 8, 4, [1], CropAndFlip(2))
    both = Minibatches(obj, 8, 4, [5, 1], CropAndFlip(2))
    assert torch.equal(alone(7)[0][0], both(7)[0][1])
    assert not torch.equal(alone(7)[0][0], x[alone.indices(7)[0]])


def test_a_trajectory_is_that_of_the_augmented_minibatches():
    obj, path = conv_problem("none")
    augment = CropAndFlip(pad=1)
    run = relax_with(obj, path, 0.3, replicas=2, augment=augment, backend="loop", **COMMON)
    theta, minibatches = path.point(0.3), Minibatches(obj, 8, 4, [1], augment)
    for step in range(3):
        x, y = minibatches(step)
        leaf = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(obj.losses(leaf, x[0], y[0]).mean(), leaf)
        theta = theta - 0.05 * gradient
    position, _, distance = path.project(theta)
    assert run.position[1, 1].item() == pytest.approx(position, abs=1e-6)
    assert run.distance[1, 1].item() == pytest.approx(distance, rel=1e-4)
    plain = relax_with(obj, path, 0.3, replicas=2, backend="loop", **COMMON)
    assert not torch.equal(plain.position, run.position)


@pytest.mark.parametrize("backend", ["vmap", "threads"])
def test_engines_see_the_same_images(backend):
    obj, path = conv_problem("none")
    loop, other = (
        relax_with(obj, path, 0.3, replicas=3, augment=CropAndFlip(2), backend=e, **COMMON)
        for e in ("loop", backend)
    )
    torch.testing.assert_close(other.position, loop.position, rtol=0, atol=1e-5)


def test_a_full_batch_is_augmented_too():
    obj, path = conv_problem("none")
    settings = {**COMMON, "batch_size": obj.num_examples}
    one, two = relax_with(obj, path, 0.3, replicas=2, augment=CropAndFlip(1), **settings).position
    assert not torch.equal(one, two)
