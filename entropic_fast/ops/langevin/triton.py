"""Family `langevin` in Triton: in the plane, a thread keeps two particles from first step to last.

Two particles of two coordinates use the four words of one counter per step.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropic_fast.ops._triton import FUSE, count, on_device
from entropic_fast.ops.langevin import _triton_nd as langevin_wide
from entropic_fast.ops.langevin._triton_normal import box_muller as box_muller_of
from entropic_fast.ops.langevin._triton_normal import (
    divide,
    exponential,
    sine_cosine_of_turns,
    square_root,
)
from entropic_fast.ops.langevin.checks import SCHEMES, BoxMuller, LangevinSteps, new_normal
from entropic_fast.ops.langevin.forces import FORCES

# Pairs of particles of a program: one for each of 128 threads.
BLOCK = 128

# Numbers before the potential's parameters: drift, decay, noise.
FIRST_PARAMETER = tl.constexpr(3)


@triton.jit
def force(x, y, numbers, POTENTIAL: tl.constexpr, MODES: tl.constexpr):
    """-grad V of particles (x, y); formulas in forces.py."""
    p = numbers + FIRST_PARAMETER
    p0 = tl.load(p).to(x.dtype)
    p1 = tl.load(p + 1).to(x.dtype)
    if POTENTIAL == 0:  # ring
        half = (0.5 * tl.load(p) * tl.load(p + 1) * MODES).to(x.dtype)
        r = square_root(x * x + y * y)
        away = r > 0
        inverse = tl.where(
            away, divide(tl.full(r.shape, 1.0, r.dtype), tl.where(away, r, 1.0)), 0.0
        )
        cosine = x * inverse
        sine = y * inverse
        c = cosine
        s = sine
        for _ in tl.static_range(MODES - 1):
            following = c * cosine - s * sine
            s = s * cosine + c * sine
            c = following
        u = r - 1.0
        radial = -p0 * (1.0 + p1 * c) * u
        angular = half * s * u * u * inverse
        return radial * cosine - angular * sine, radial * sine + angular * cosine
    elif POTENTIAL == 1:  # ridge
        length = tl.load(p + 2).to(x.dtype)
        wall = tl.load(p + 3).to(x.dtype)
        g = p0 * exponential(p1 * y)
        beyond = tl.where(y < 0, y, tl.where(y > length, y - length, y - y))
        return -g * x, -0.5 * p1 * g * (x * x) - wall * beyond
    else:  # channel
        turns = (1.0 / tl.load(p + 2)).to(x.dtype)
        half = (tl.load(p + 1) * 3.14159265358979323846 / tl.load(p + 2)).to(x.dtype)
        sine, cosine = sine_cosine_of_turns(y * turns)
        g = p0 * exponential(p1 * cosine)
        return -g * x, half * g * sine * (x * x)


@triton.jit
def normals(pair, step, seed, DOUBLE: tl.constexpr):
    """Four normal numbers per pair: x and y of the even particle, then of the odd."""
    low = (pair & 0xFFFFFFFF).to(tl.uint32)
    high = (pair >> 32).to(tl.uint32)
    stream = tl.full(pair.shape, 0, tl.int64) + step
    w0, w1, w2, w3 = tl.philox(
        seed, low, high, (stream & 0xFFFFFFFF).to(tl.uint32), (stream >> 32).to(tl.uint32)
    )
    z0, z1 = box_muller_of(w0, w1, DOUBLE)
    z2, z3 = box_muller_of(w2, w3, DOUBLE)
    return z0, z1, z2, z3


@triton.jit(do_not_specialize=["particles", "first_particle", "first_step", "steps", "seed"])
def steps_kernel(
    positions, velocities, numbers, particles, first_particle, first_step, steps, seed,
    POTENTIAL: tl.constexpr, MODES: tl.constexpr, SCHEME: tl.constexpr, NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK pairs of particles."""
    DOUBLE: tl.constexpr = positions.dtype.element_ty == tl.float64
    first_particle = tl.cast(first_particle, tl.int64)
    seed = tl.cast(seed, tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK + first_particle // 2
    pair = first + tl.arange(0, BLOCK).to(tl.int64)
    even = 2 * pair - first_particle
    odd = even + 1
    in_a = (even >= 0) & (even < particles)
    in_b = odd < particles
    ax = tl.load(positions + 2 * even, mask=in_a, other=0.0)
    ay = tl.load(positions + 2 * even + 1, mask=in_a, other=0.0)
    bx = tl.load(positions + 2 * odd, mask=in_b, other=0.0)
    by = tl.load(positions + 2 * odd + 1, mask=in_b, other=0.0)
    drift = tl.load(numbers).to(ax.dtype)
    decay = tl.load(numbers + 1).to(ax.dtype)
    if SCHEME == 1:  # leimkuhler-matthews
        noise = (0.5 * tl.load(numbers + 2)).to(ax.dtype)
    else:
        noise = tl.load(numbers + 2).to(ax.dtype)
    start = tl.cast(first_step, tl.int64)
    if SCHEME == 2:  # baoab
        avx = tl.load(velocities + 2 * even, mask=in_a, other=0.0)
        avy = tl.load(velocities + 2 * even + 1, mask=in_a, other=0.0)
        bvx = tl.load(velocities + 2 * odd, mask=in_b, other=0.0)
        bvy = tl.load(velocities + 2 * odd + 1, mask=in_b, other=0.0)
        afx, afy = force(ax, ay, numbers, POTENTIAL, MODES)
        bfx, bfy = force(bx, by, numbers, POTENTIAL, MODES)
        for n in count(0, steps):
            avx += drift * afx
            avy += drift * afy
            bvx += drift * bfx
            bvy += drift * bfy
            ax += drift * avx
            ay += drift * avy
            bx += drift * bvx
            by += drift * bvy
            avx *= decay
            avy *= decay
            bvx *= decay
            bvy *= decay
            if NOISE:
                z0, z1, z2, z3 = normals(pair, start + n, seed, DOUBLE)
                avx += noise * z0
                avy += noise * z1
                bvx += noise * z2
                bvy += noise * z3
            ax += drift * avx
            ay += drift * avy
            bx += drift * bvx
            by += drift * bvy
            afx, afy = force(ax, ay, numbers, POTENTIAL, MODES)
            bfx, bfy = force(bx, by, numbers, POTENTIAL, MODES)
            avx += drift * afx
            avy += drift * afy
            bvx += drift * bfx
            bvy += drift * bfy
        tl.store(velocities + 2 * even, avx, mask=in_a)
        tl.store(velocities + 2 * even + 1, avy, mask=in_a)
        tl.store(velocities + 2 * odd, bvx, mask=in_b)
        tl.store(velocities + 2 * odd + 1, bvy, mask=in_b)
    else:
        if NOISE and SCHEME == 1:
            z0, z1, z2, z3 = normals(pair, start, seed, DOUBLE)
        for n in count(0, steps):
            afx, afy = force(ax, ay, numbers, POTENTIAL, MODES)
            bfx, bfy = force(bx, by, numbers, POTENTIAL, MODES)
            ax += drift * afx
            ay += drift * afy
            bx += drift * bfx
            by += drift * bfy
            if NOISE and SCHEME == 0:
                y0, y1, y2, y3 = normals(pair, start + n, seed, DOUBLE)
                ax += noise * y0
                ay += noise * y1
                bx += noise * y2
                by += noise * y3
            if NOISE and SCHEME == 1:
                y0, y1, y2, y3 = normals(pair, start + n + 1, seed, DOUBLE)
                ax += noise * (z0 + y0)
                ay += noise * (z1 + y1)
                bx += noise * (z2 + y2)
                by += noise * (z3 + y3)
                z0 = y0
                z1 = y1
                z2 = y2
                z3 = y3
    tl.store(positions + 2 * even, ax, mask=in_a)
    tl.store(positions + 2 * even + 1, ay, mask=in_a)
    tl.store(positions + 2 * odd, bx, mask=in_b)
    tl.store(positions + 2 * odd + 1, by, mask=in_b)


@triton.jit
def box_muller_kernel(words, normal, pairs, BLOCK: tl.constexpr):
    """Two normal numbers from every two words."""
    DOUBLE: tl.constexpr = normal.dtype.element_ty == tl.float64
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < pairs
    w0 = tl.load(words + 2 * at, mask=mask, other=0).to(tl.uint32)
    w1 = tl.load(words + 2 * at + 1, mask=mask, other=0).to(tl.uint32)
    z0, z1 = box_muller_of(w0, w1, DOUBLE)
    tl.store(normal + 2 * at, z0, mask=mask)
    tl.store(normal + 2 * at + 1, z1, mask=mask)


@functools.lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device, kept: a copy at every call would wait for it, and no CUDA graph allows one."""
    return torch.tensor(values, dtype=torch.float64, device=device)


def langevin_steps(a: LangevinSteps) -> None:
    x = a.x
    if x.shape[0] == 0 or a.steps == 0:
        return
    # In a float64 tensor: as arguments Triton would round them to float32.
    numbers = _numbers((a.drift, a.decay, a.noise, *a.parameters), x.device)
    particles, dim = x.shape
    arguments = (
        x, a.v if a.v.numel() > 0 else x, numbers, particles,
        a.first_particle, a.first_step, a.steps, a.seed,
    )  # fmt: skip
    options = {
        "POTENTIAL": tuple(FORCES).index(a.potential), "SCHEME": SCHEMES.index(a.scheme),
        "NOISE": a.noise > 0, "num_warps": 4, **FUSE,
    }  # fmt: skip
    with on_device(x):
        if dim == 2:
            pairs = (a.first_particle + particles + 1) // 2 - a.first_particle // 2
            modes = int(a.parameters[2]) if a.potential == "ring" else 0
            grid = (triton.cdiv(pairs, BLOCK),)
            steps_kernel[grid](*arguments, MODES=modes, BLOCK=BLOCK, **options)
        else:
            size = triton.next_power_of_2(dim)
            block = langevin_wide.TILE // size
            grid = (triton.cdiv(particles, block),)
            langevin_wide.steps_kernel[grid](*arguments, D=dim, SIZE=size, BLOCK=block, **options)


def box_muller(a: BoxMuller) -> Tensor:
    normal, pairs = new_normal(a), a.words.shape[0]
    if pairs > 0:
        with on_device(normal):
            box_muller_kernel[(triton.cdiv(pairs, BLOCK),)](
                a.words.contiguous(), normal, pairs, BLOCK=BLOCK, num_warps=4, **FUSE
            )
    return normal
