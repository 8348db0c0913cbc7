"""Precision of the float32 products of score kernels on a GPU; CPUs always use full float32.

    "float32"   IEEE float32 products and sums, no tensor cores. The default.
    "tf32x3"    each product as three of TF32's on tensor cores, good to about 2^-21, with sums
                rounded toward zero.
    "tf32"      one TF32 product on tensor cores: factors rounded to 11 bits, errors of 2^-11.

Tensor cores truncate every partial sum, so in "tf32x3" a sum of squares is too small by some
multiples of 2^-24 for any length, where errors of rounded sums cancel. A Gram matrix's diagonal is
such a sum, and its smallest eigenvalues suffer first. float64 is never reduced.
"""

from __future__ import annotations

from entropic_fast._utils.checks import invalid, shown

NAMES = ("float32", "tf32x3", "tf32")

_precision = "float32"


def set_matmul_precision(name: str) -> None:
    """Choose "float32" (default), "tf32x3" or "tf32" for float32 products on a GPU.

    Raises:
        ValueError: `name` is none of these.

    >>> set_matmul_precision("tf32")
    >>> matmul_precision()
    'tf32'
    >>> set_matmul_precision("float32")
    """
    global _precision
    if name not in NAMES:
        raise invalid("name", "one of " + ", ".join(NAMES), shown(name))
    _precision = name


def matmul_precision() -> str:
    """The current setting."""
    return _precision
