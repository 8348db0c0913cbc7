"""What the ops of family `norm_act_tangents` ask of their tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid

DTYPES = (torch.float32, torch.float64)

# Form of every argument: K, m and C by name; "dense" where pixels are C apart, too.
FORMS = {
    "extra": "KmC", "b": "KmC", "out": "KmC dense", "residual": "KmC dense", "ty": "KmC dense",
    "mean": "C", "weight": "C", "bias": "C",
    "normal": "mC", "slope": "mC", "cotangent": "mC", "bend": "mC",
    "scale": "C", "rstd": "C", "tscale": "KC", "tshift": "KC",
}  # fmt: skip
PUSH = (
    "extra", "normal", "scale", "tscale", "tshift", "residual", "slope", "cotangent", "bend",
)  # fmt: skip
PULL = (
    "extra", "residual", "slope", "normal", "scale", "tscale", "cotangent", "ty", "rstd",
)  # fmt: skip

NORMALISE = ("mean", "rstd", "weight", "bias", "residual")


def refuse_autograd(**tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise invalid(
                name,
                "a tensor that autograd does not follow",
                "one with requires_grad=True",
                f"call under torch.no_grad() or pass {name}.detach()",
            )


def check_push(u: Tensor, *pieces: Tensor | None) -> None:
    given = dict(zip((*PUSH, "out"), pieces, strict=True))
    _check("u", u, given)
    _check_apart("u", u)
    _needs(given, "tscale", "normal")


def check_pull(u: Tensor, *pieces: Tensor | None) -> None:
    given = dict(zip((*PULL, "out"), pieces, strict=True))
    _check("u", u, given)
    _check_apart("u", u)
    _needs(given, "tscale", "cotangent")
    _needs(given, "ty", "cotangent")


def check_normalise(y: Tensor, *pieces: Tensor | None) -> None:
    if y.dim() != 2:
        raise invalid("y", "shape [m, C]", f"shape {list(y.shape)}")
    given = dict(zip(NORMALISE, pieces, strict=True))
    residual = given["residual"]
    _check("y", y[None], {**given, "residual": None if residual is None else residual[None]})


def check_inner(a: Tensor, b: Tensor) -> None:
    _check("a", a, {"b": b})


def check_overlap(written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """Refuses tensors that share memory where one of them is written."""
    given = {name: t for name, t in {**read, **written}.items() if t is not None and t.numel() > 0}
    spans = {name: _span(tensor) for name, tensor in given.items()}
    for name in written:
        if name not in spans:
            continue
        start, end = spans.pop(name)
        for other, (other_start, other_end) in spans.items():
            meet = start < other_end and other_start < end
            if meet and not _interleaved(given[name], given[other]):
                raise invalid(
                    name, f"memory of its own, apart from {other}", "overlap", "clone one"
                )


def _check(name: str, first: Tensor, given: dict[str, Tensor | None]) -> None:
    if first.dim() != 3:
        raise invalid(name, "shape [K, m, C]", f"shape {list(first.shape)}")
    if first.dtype not in DTYPES:
        raise invalid(name, "dtype float32 or float64", str(first.dtype), "convert it first")
    _check_layout(name, first, dense=True)
    k, m, c = first.shape
    shapes = {"KmC": (k, m, c), "mC": (m, c), "KC": (k, c), "C": (c,)}
    dtype, device = first.dtype, first.device
    for other, tensor in given.items():
        if tensor is None:
            continue
        form, _, dense = FORMS[other].partition(" ")
        if tensor.shape != shapes[form]:
            letters = ", ".join(form)
            raise invalid(
                other,
                f"shape [{letters}] = {list(shapes[form])} beside {name}",
                f"shape {list(tensor.shape)}",
            )
        if tensor.dtype != dtype:
            raise invalid(
                other, f"dtype {dtype} as {name}", str(tensor.dtype), "convert one of them"
            )
        if tensor.device != device:
            raise invalid(other, f"device {device} as {name}", str(tensor.device), "move it there")
        _check_layout(other, tensor, dense=bool(dense))
        if other == "out":
            _check_apart(other, tensor)


def _check_layout(name: str, tensor: Tensor, *, dense: bool) -> None:
    if tensor.dim() < 3:
        fits, layout = tensor.is_contiguous(), "a contiguous tensor"
    else:
        _, m, c = tensor.shape
        _, pixel, channel = tensor.stride()
        fits = (c <= 1 or channel == 1) and (m <= 1 or not dense or pixel == c)
        layout = "channels one element apart" + (" and pixels C apart" if dense else "")
    if not fits and tensor.numel() > 0:
        strides = f"strides {tuple(tensor.stride())} for shape {list(tensor.shape)}"
        raise invalid(name, layout, strides, f"pass {name}.contiguous()")


def _check_apart(name: str, tensor: Tensor) -> None:
    """Tangents of what is written do not overlap."""
    k, m, c = tensor.shape
    if k > 1 and tensor.numel() > 0 and tensor.stride(0) < m * c:
        raise invalid(
            name,
            f"tangents that do not overlap (a stride of at least {m * c} along k)",
            f"strides {tuple(tensor.stride())} for shape {list(tensor.shape)}",
            f"pass {name}.contiguous()",
        )


def _needs(given: dict[str, Tensor | None], name: str, other: str) -> None:
    if given[name] is not None and given[other] is None:
        raise invalid(other, f"a tensor, as {name} is given", "None")


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses from the first element to past the last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one stride along k lie apart for each k, as [:, 0] and [:, 1] do."""
    if a.dim() != 3 or b.dim() != 3 or a.stride(0) != b.stride(0) or a.stride(0) <= 0:
        return False
    period = a.stride(0) * a.element_size()
    (a_start, a_end), (b_start, b_end) = _span(a[0]), _span(b[0])
    offset = (b_start - a_start) % period
    return a_end - a_start <= offset and offset + b_end - b_start <= period
