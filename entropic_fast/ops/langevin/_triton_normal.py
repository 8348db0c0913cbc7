"""Elementary functions and normal numbers for Triton kernels: those of csrc/cpu/simd/normal.h.

Triton's own float32 log, exp and division are approximations; these are accurate to a few units of
the last place, and fast, as their arguments are reduced exactly.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    if b.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def square_root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def log_of_parts(f, exponent):
    """log(2^exponent (1 + f)), f in [sqrt(1/2) - 1, sqrt(2) - 1]"""
    s = divide(f, 2.0 + f)
    z = s * s
    half_square = 0.5 * f * f
    if f.dtype == tl.float32:
        tail = z * (0.24279078841 * z + 0.28498786688)
        tail = z * (z * (tail + 0.40000972152) + 0.66666662693)
        small = s * (half_square + tail) + exponent * 9.0580006145e-06
        return exponent * 6.9313812256e-01 - ((half_square - small) - f)
    else:
        tail = 1.479819860511658591e-01 * z + 1.531383769920937332e-01
        tail = tail * z + 1.818357216161805012e-01
        tail = tail * z + 2.222219843214978396e-01
        tail = tail * z + 2.857142874366239149e-01
        tail = tail * z + 3.999999999940941908e-01
        tail = (tail * z + 6.666666666666735130e-01) * z
        small = s * (half_square + tail) + exponent * 1.90821492927058770002e-10
        return exponent * 6.93147180369123816490e-01 - ((half_square - small) - f)


@triton.jit
def sine_cosine(quarter, turn):
    """Sine and cosine of (quarter + turn) pi / 2, |turn| <= 1/2."""
    x = turn * 1.57079632679489661923
    z = x * x
    if turn.dtype == tl.float32:
        s = (-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1
        c = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    else:
        s = 1.58969099521155010221e-10 * z - 2.50507602534068634195e-08
        s = s * z + 2.75573137070700676789e-06
        s = s * z - 1.98412698298579493134e-04
        s = s * z + 8.33333333332248946124e-03
        s = s * z - 1.66666666666666324348e-01
        c = -1.13596475577881948265e-11 * z + 2.08757232129817482790e-09
        c = c * z - 2.75573143513906633035e-07
        c = c * z + 2.48015872894767294178e-05
        c = c * z - 1.38888888888741095749e-03
        c = c * z + 4.16666666666666019037e-02
    s = x + x * (z * s)
    half = 0.5 * z
    whole = 1.0 - half
    c = whole + (((1.0 - whole) - half) + z * (z * c))
    swap = (quarter & 1) != 0
    sine = tl.where(swap, c, s)
    cosine = tl.where(swap, s, c)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    return sine, cosine


@triton.jit
def sine_cosine_of_turns(x):
    """Sine and cosine of 2 pi x."""
    quarters = 4.0 * x
    whole = tl.floor(quarters + 0.5)
    return sine_cosine(whole.to(tl.int64), quarters - whole)


@triton.jit
def exponential(x):
    """e^x; float32: infinity from 88 on, 0 below -87."""
    if x.dtype == tl.float32:
        power = tl.floor(tl.minimum(tl.maximum(x, -90.0), 90.0) * 1.44269504088896340736 + 0.5)
        r = (x - power * 6.9313812256e-01) - power * 9.0580006145e-06
        series = r * (1.0 / 5040) + 1.0 / 720
        series = series * r + 1.0 / 120
        series = series * r + 1.0 / 24
        series = series * r + 1.0 / 6
        series = series * r + 0.5
        scale = ((power.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        value = (1.0 + (r + r * r * series)) * scale
        value = tl.where(x > 88.0, float("inf"), value)
        return tl.where(x < -87.0, 0.0, value)
    else:
        return tl.exp(x)


@triton.jit
def plus_half(w):
    """A word + 1/2 in float32, rounded once."""
    return (w >> 16).to(tl.float32) * 65536.0 + ((w & 0xFFFF).to(tl.float32) + 0.5)


@triton.jit
def box_muller(w0, w1, DOUBLE: tl.constexpr):
    """Two normal numbers from two words (uint32)."""
    if DOUBLE:
        u = (w0.to(tl.float64) + 0.5) * 2.3283064365386962890625e-10
        bits = u.to(tl.int64, bitcast=True) + (0x3FF0000000000000 - 0x3FE6A09E667F3BCD)
        fraction = (bits & 0x000FFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD
        exponent = ((bits >> 52) - 1023).to(tl.float64)
        log = log_of_parts(fraction.to(tl.float64, bitcast=True) - 1.0, exponent)
        quarters = (w1.to(tl.float64) + 0.5) * 9.31322574615478515625e-10
        whole = tl.floor(quarters + 0.5)
        sine, cosine = sine_cosine(whole.to(tl.int32), quarters - whole)
    else:
        # Near 1 a float has not the digits of 1 - u, which the word has.
        close = plus_half(w0 ^ 0xFFFFFFFF) * -2.3283064365386962890625e-10
        u = plus_half(w0) * 2.3283064365386962890625e-10
        bits = u.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
        fraction = (bits & 0x007FFFFF) + 0x3F3504F3
        exponent = ((bits >> 23) - 127).to(tl.float32)
        near = w0 > 3037000500
        f = tl.where(near, close, fraction.to(tl.float32, bitcast=True) - 1.0)
        log = log_of_parts(f, tl.where(near, 0.0, exponent))
        quarter = (w1 + 0x20000000) >> 30
        rest = (w1 - (quarter << 30)).to(tl.int32, bitcast=True)
        turn = (rest.to(tl.float32) + 0.5) * 9.31322574615478515625e-10
        sine, cosine = sine_cosine(quarter.to(tl.int32), turn)
    radius = square_root(-2.0 * log)
    return radius * cosine, radius * sine
