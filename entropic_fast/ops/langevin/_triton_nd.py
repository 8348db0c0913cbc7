"""Family `langevin` in Triton in more than two dimensions: ridge and channel, a tile of particles.

Each coordinate computes its own normal number from the counter it shares with its neighbors: up to
four times the work for noise that the plane's kernel does, but no exchange between threads.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from entropic_fast.ops._triton import count
from entropic_fast.ops.langevin._triton_normal import box_muller, exponential, sine_cosine_of_turns

# Elements of a tile: four for each of 128 threads.
TILE = 512


@triton.jit
def force(x, column, numbers, D: tl.constexpr, POTENTIAL: tl.constexpr):
    """-grad V of particles in rows; formulas in forces.py."""
    p = numbers + 3  # after drift, decay and noise
    p0 = tl.load(p).to(x.dtype)
    p1 = tl.load(p + 1).to(x.dtype)
    across = column < D - 1
    y = tl.sum(tl.where(column == D - 1, x, 0.0), axis=1)
    square = tl.sum(tl.where(across, x * x, 0.0), axis=1)
    if POTENTIAL == 1:  # ridge
        length = tl.load(p + 2).to(x.dtype)
        wall = tl.load(p + 3).to(x.dtype)
        g = p0 * exponential(p1 * y)
        beyond = tl.where(y < 0, y, tl.where(y > length, y - length, y - y))
        slow = -0.5 * p1 * g * square - wall * beyond
    else:  # channel
        turns = (1.0 / tl.load(p + 2)).to(x.dtype)
        half = (tl.load(p + 1) * 3.14159265358979323846 / tl.load(p + 2)).to(x.dtype)
        sine, cosine = sine_cosine_of_turns(y * turns)
        g = p0 * exponential(p1 * cosine)
        slow = half * g * sine * square
    return tl.where(across, -g[:, None] * x, tl.where(column == D - 1, slow[:, None], 0.0))


@triton.jit
def normals(number, step, seed, DOUBLE: tl.constexpr):
    """Normal numbers of these numbers in a step's stream."""
    counter = number >> 2
    stream = tl.full(number.shape, 0, tl.int64) + step
    w0, w1, w2, w3 = tl.philox(
        seed,
        (counter & 0xFFFFFFFF).to(tl.uint32),
        (counter >> 32).to(tl.uint32),
        (stream & 0xFFFFFFFF).to(tl.uint32),
        (stream >> 32).to(tl.uint32),
    )
    second = (number & 2) != 0
    z0, z1 = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1), DOUBLE)
    return tl.where((number & 1) != 0, z1, z0)


@triton.jit(do_not_specialize=["particles", "first_particle", "first_step", "steps", "seed"])
def steps_kernel(
    positions, velocities, numbers, particles, first_particle, first_step, steps, seed,
    D: tl.constexpr, SIZE: tl.constexpr, POTENTIAL: tl.constexpr, SCHEME: tl.constexpr,
    NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK particles."""
    DOUBLE: tl.constexpr = positions.dtype.element_ty == tl.float64
    seed = tl.cast(seed, tl.int64)
    start = tl.cast(first_step, tl.int64)
    row = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64))[:, None]
    column = tl.arange(0, SIZE).to(tl.int64)[None, :]
    mask = (row < particles) & (column < D)
    at = row * D + column
    number = at + tl.cast(first_particle, tl.int64) * D
    x = tl.load(positions + at, mask=mask, other=0.0)
    drift = tl.load(numbers).to(x.dtype)
    decay = tl.load(numbers + 1).to(x.dtype)
    if SCHEME == 1:  # leimkuhler-matthews
        noise = (0.5 * tl.load(numbers + 2)).to(x.dtype)
    else:
        noise = tl.load(numbers + 2).to(x.dtype)
    if SCHEME == 2:  # baoab
        v = tl.load(velocities + at, mask=mask, other=0.0)
        f = force(x, column, numbers, D, POTENTIAL)
        for n in count(0, steps):
            v += drift * f
            x += drift * v
            v *= decay
            if NOISE:
                v += noise * normals(number, start + n, seed, DOUBLE)
            x += drift * v
            f = force(x, column, numbers, D, POTENTIAL)
            v += drift * f
        tl.store(velocities + at, v, mask=mask)
    else:
        if NOISE and SCHEME == 1:
            z = normals(number, start, seed, DOUBLE)
        for n in count(0, steps):
            x += drift * force(x, column, numbers, D, POTENTIAL)
            if NOISE and SCHEME == 0:
                x += noise * normals(number, start + n, seed, DOUBLE)
            if NOISE and SCHEME == 1:
                following = normals(number, start + n + 1, seed, DOUBLE)
                x += noise * (z + following)
                z = following
    tl.store(positions + at, x, mask=mask)
