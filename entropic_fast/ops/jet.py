import torch


def push(
    u,
    extra=None,
    *,
    normal=None,
    scale=None,
    tscale=None,
    tshift=None,
    residual=None,
    slope=None,
    cotangent=None,
    bend=None,
):
    if extra is not None:
        u.add_(extra)
    pre = u if scale is None else u * scale
    if tscale is not None:
        pre = pre + tscale[:, None] * normal
    if tshift is not None:
        pre = pre + tshift[:, None]
    if residual is not None:
        pre = pre + residual
    out = pre * slope if slope is not None else pre.clone()
    sums = (u * cotangent).sum(1, dtype=torch.float64) if cotangent is not None else None
    return out, sums, None


def pull(
    u,
    extra=None,
    *,
    residual=None,
    slope=None,
    normal=None,
    scale=None,
    tscale=None,
    cotangent=None,
    ty=None,
    rstd=None,
):
    if extra is not None:
        u.add_(extra)
    if residual is not None:
        u.add_(residual)
    if slope is not None:
        u.mul_(slope)
    out = u * scale if scale is not None else u.clone()
    if tscale is not None:
        out = out + tscale[:, None] * cotangent
    d = (u * normal).sum(1)
    if ty is not None:
        d = d + rstd * (cotangent * ty).sum(1)
    return out, d, u.sum(1)


def inner(a, b):
    return (a * b).flatten(1).sum(1, dtype=torch.float64)
