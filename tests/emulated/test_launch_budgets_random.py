"""Ceilings of launches, synchronizations and copies: random numbers, cycles of relax, training.

A change that needs fewer launches lowers the ceiling.
"""

from __future__ import annotations

import pytest
import torch

import entropic_fast as ef
from entropic_fast.curvature.estimators._probes import sign_vectors
from entropic_fast.dynamics.projected_sgd._replica_state import ReplicaState
from entropic_fast.ops.random_bits import streams as random
from entropic_fast.training import _train as training
from entropic_fast.training import data, models

GPU = torch.device("emulated", 0)
# Outside the graph, of a whole cycle of 15 updates and a projection, any number of replicas. While
# random numbers were tensor arithmetic 252 (2 replicas) and 983 (8), augmented 4,062 and 16,133.
OUTSIDE, OUTSIDE_AUGMENTED = 10, 16
# Of an update inside the graph.
INSIDE, INSIDE_AUGMENTED = 80, 90
TRAINING_STEP = 60  # 183 and 3 copies from the host before


def spent(emulated, work):
    with emulated.counted() as seen:
        work()
    return seen


def test_a_block_of_signs_is_one_launch(emulated):
    found = []
    signs = lambda: found.append(sign_vectors(1000, 0, range(3, 11), torch.float32, GPU))  # noqa: E731
    assert spent(emulated, signs) == emulated.Counts(1, 0, 0)
    assert torch.equal(found[0].cpu(), sign_vectors(1000, 0, range(3, 11), torch.float32, "cpu"))


def test_a_random_order_is_four_launches_at_most(emulated):
    seen = spent(emulated, lambda: random.permutation(1000, 0, device=GPU))
    assert seen.launches <= 4 and (seen.synchronizations, seen.copies) == (0, 0)
    seeds = torch.arange(8).to(GPU)
    seen = spent(emulated, lambda: random.permutations(1000, seeds, 0, 3))
    assert seen.launches <= 4 and (seen.synchronizations, seen.copies) == (0, 0)


# ---- relax ---------------------------------------------------------------------------------------


@pytest.fixture
def small():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (64,), generator=generator)
    model = models.initialize(models.digits_cnn("none", channels=(4, 4, 4)), 1)
    return ef.Objective(model, "cross_entropy", (images, labels), device=GPU)


@pytest.fixture
def inside(emulated, monkeypatch):
    """What `ReplicaState.updates` spends, which is what a CUDA graph holds."""
    total, updates = emulated.Counts(), ReplicaState.updates

    def watched(self, table):
        seen = spent(emulated, lambda: updates(self, table))
        total.__dict__.update((total - (emulated.Counts() - seen)).__dict__)

    monkeypatch.setattr(ReplicaState, "updates", watched)
    return total


@pytest.mark.parametrize("augment", [None, data.CropAndFlip(1)], ids=["plain", "augmented"])
@pytest.mark.parametrize("replicas", [2, 8])
def test_a_cycle_of_relax(emulated, small, inside, replicas, augment):
    theta = small.parameters_vector()
    path = ef.linear_path(theta, 1.1 * theta, 3)

    def cycles(count):
        inside.__dict__.update(emulated.Counts().__dict__)
        whole = spent(
            emulated,
            lambda: ef.relax(
                small,
                path,
                [0.3] * replicas,
                ef.ProjectedSGD(0.01, 4, steps=15 * count, augment=augment),
                recording=ef.Recording(every=15 * count),
                execution=ef.Execution(backend="vmap", cuda_graphs=False),
            ),
        )
        return whole - inside, emulated.Counts(**inside.__dict__)

    # Of 16 batches an epoch: one begins in each of the two further cycles.
    (outside, within), (more_outside, more_within) = cycles(2), cycles(4)
    outside, within = more_outside - outside, more_within - within
    ceiling = OUTSIDE if augment is None else OUTSIDE_AUGMENTED
    assert outside.launches <= 2 * ceiling
    assert outside.synchronizations <= 2 and outside.copies == 0, emulated.synchronized
    ceiling = INSIDE if augment is None else INSIDE_AUGMENTED
    assert within.launches <= 30 * ceiling
    assert (within.synchronizations, within.copies) == (0, 0)


# ---- training ------------------------------------------------------------------------------------


def test_a_step_of_training(emulated):
    images, _ = data.load("digits", limit=80, test_limit=20)
    images = images.to(GPU)
    model = models.initialize(models.digits_cnn("batch", channels=(4, 4, 4)), 0).to(GPU)

    def epoch(steps):
        config = training.TrainConfig(epochs=1, batch_size=80 // steps)
        return spent(emulated, lambda: training.train(model, images, config, seed=0))

    epoch(1)  # mean and standard deviation go to the device
    seen = epoch(8) - epoch(2)
    assert seen.launches <= 6 * TRAINING_STEP
    assert (seen.synchronizations, seen.copies) == (0, 0), emulated.synchronized
