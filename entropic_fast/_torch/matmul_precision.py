"""How float32 products are taken where a GPU's tensor cores could take them faster.

One setting for all score kernels on a GPU; the CPU always computes in full float32.

    "float32"   IEEE float32 products and sums, no tensor cores. The default.
    "tf32x3"    each product as three of TF32's on tensor cores: products good to about 2^-21,
                sums rounded toward zero.
    "tf32"      one TF32 product on tensor cores: factors rounded to 11 bits, errors of 2^-11.

"tf32x3" is not what "float32" means, although its products come near: tensor cores cut the end
off every partial sum instead of rounding it, so a sum of squares comes out too small by some
multiples of 2^-24 however long it is, where errors of rounded sums cancel. A Gram matrix's
diagonal is such a sum, and its smallest eigenvalues are what its errors spoil first. float64 is
never reduced.
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
    """The setting in force.

    >>> matmul_precision()
    'float32'
    """
    return _precision
