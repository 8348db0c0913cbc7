"""Path: a polyline through parameter space, read by relative arc length."""

from __future__ import annotations

import math
import os
from typing import Any, overload

import torch
from torch import Tensor

from .._utils import atomic_io as store
from .._utils import checks
from .._utils import notebook as display
from . import _arc_length as arc

# Rows of theta projected at once: temporaries of at most this many float64 numbers each.
_CHUNK = 1 << 24
_FORMAT = "entropic_fast.path/1"


class Path:
    """A polyline through pivots, parametrized by its relative Euclidean arc length s in [0, 1].

    Lengths, positions and projections are accumulated in float64 for any dtype of the pivots.

    Args:
        pivots: at least two points; the first and the last are the ends. Copied.  # [M, P]

    Raises:
        ValueError: not a floating-point matrix, fewer than two pivots, no parameters, NaN or
            infinite values, or all pivots at one point.

    >>> path = Path(torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 1.0]]))
    >>> path.length, path.positions.tolist(), path.point(0.5).tolist()
    (4.0, [0.0, 0.75, 1.0], [2.0, 0.0])
    >>> s, nearest, distance = path.project(torch.tensor([1.0, -2.0]))
    >>> s, nearest.tolist(), distance
    (0.25, [1.0, 0.0], 2.0)
    """

    def __init__(self, pivots: Tensor) -> None:
        if not isinstance(pivots, Tensor) or pivots.ndim != 2:
            raise checks.invalid("pivots", "a tensor of shape [M, P]", checks.describe(pivots))
        if pivots.shape[0] < 2 or pivots.shape[1] < 1:
            raise checks.invalid(
                "pivots",
                "at least 2 pivots of at least 1 parameter",
                checks.describe(pivots),
                "a path needs two ends",
            )
        self._pivots = checks.finite("pivots", pivots).detach().clone()
        length, self._positions = arc.measured(self._pivots)
        self._length = float(length)
        if not (self._length > 0 and math.isfinite(self._length)):
            raise checks.invalid(
                "pivots",
                "a finite length above 0",
                f"length {self._length}",
                "the ends and all pivots coincide" if self._length == 0 else "rescale them",
            )

    @property
    def pivots(self) -> Tensor:
        """The points; do not change them.  # [M, P]"""
        return self._pivots

    @property
    def num_pivots(self) -> int:
        """M, both ends counted."""
        return int(self._pivots.shape[0])

    @property
    def num_params(self) -> int:
        """P."""
        return int(self._pivots.shape[1])

    @property
    def length(self) -> float:
        """Euclidean arc length, in the units of the parameters."""
        return self._length

    @property
    def positions(self) -> Tensor:
        """Relative arc length s of each pivot, float64, on the pivots' device.  # [M]"""
        return self._positions

    @overload
    def segment(self, s: float) -> tuple[int, float]: ...
    @overload
    def segment(self, s: Tensor) -> tuple[Tensor, Tensor]: ...
    def segment(self, s: float | Tensor) -> tuple[int, float] | tuple[Tensor, Tensor]:
        """The segment that holds s, and the fraction t in [0, 1] along it.

        A position at a pivot belongs to the segment that begins there (the end, to the last).
        Segments of length 0 are never returned.

        Args:
            s: a position, or positions [K].

        Returns:
            (index, t): an int and a float, or int64 [K] and float64 [K].

        Raises:
            ValueError: a position outside [0, 1].
        """
        many, single = self._checked(s)
        index, t = arc.located(self._positions, many)
        return (int(index[0]), float(t[0])) if single else (index, t)

    def point(self, s: float | Tensor) -> Tensor:
        """The point [P] at position s, or points [K, P]; at a pivot's position, exactly that pivot.

        Raises:
            ValueError: a position outside [0, 1].
        """
        many, single = self._checked(s)
        points = arc.points_at(self._pivots, self._positions, many)
        return points[0] if single else points

    def tangent(self, s: float | Tensor) -> Tensor:
        """Unit vector [P] along the path at s, or [K, P]; at a pivot, of the segment it begins.

        Raises:
            ValueError: a position outside [0, 1].
        """
        many, single = self._checked(s)
        index, _ = arc.located(self._positions, many)
        along = self._pivots[index + 1].double() - self._pivots[index].double()
        along = along / torch.linalg.vector_norm(along, dim=1, keepdim=True)
        unit: Tensor = along.to(self._pivots.dtype)
        return unit[0] if single else unit

    def project(self, theta: Tensor) -> tuple[Any, Tensor, Any]:
        """The nearest point of the path over all segments, the first of equally near ones.

        Distances are summed from differences in float64, so nothing cancels close to the path.

        Args:
            theta: a point [P], or points [R, P], in the pivots' dtype or another.

        Returns:
            (s, theta_on_path, distance): float, [P], float; or float64 [R], [R, P] and float64 [R].

        Raises:
            ValueError: another number of parameters, or NaN or infinite values.
        """
        if (
            not isinstance(theta, Tensor)
            or theta.ndim not in (1, 2)
            or theta.shape[-1] != self.num_params
        ):
            p = self.num_params
            raise checks.invalid("theta", f"shape [{p}] or [R, {p}]", checks.describe(theta))
        if theta.device != self._pivots.device:
            raise checks.invalid(
                "theta", f"a tensor on {self._pivots.device}", f"one on {theta.device}"
            )
        rows = checks.finite("theta", theta.detach()).reshape(-1, self.num_params)
        size = max(1, _CHUNK // self.num_params)
        parts = [self._project_rows(rows[i : i + size]) for i in range(0, len(rows), size)]
        if not parts:
            empty = rows.new_zeros(0).double()
            parts = [(empty, rows.to(self._pivots.dtype), empty)]
        s, nearest, distance = (torch.cat(column) for column in zip(*parts, strict=True))
        if theta.ndim == 1:
            return float(s[0]), nearest[0], float(distance[0])
        return s, nearest, distance

    def _project_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows.double()  # [R, P]
        best = torch.full_like(rows[:, 0], torch.inf)
        s = torch.zeros_like(best)
        nearest = torch.empty_like(rows)
        # Segments of length 0 hold no position.
        proper = (self._positions[1:] > self._positions[:-1]).nonzero()[:, 0]
        for i in proper.tolist():
            start = self._pivots[i].double()
            along = self._pivots[i + 1].double() - start
            offset = rows - start
            t = ((offset @ along) / along.dot(along)).clamp(0.0, 1.0)
            # From the nearer end, as lerp does, so that t = 1 is the pivot itself.
            candidate = torch.lerp(
                start.expand_as(rows), (start + along).expand_as(rows), t[:, None]
            )
            distance = torch.linalg.vector_norm(rows - candidate, dim=1)
            closer = distance < best
            best = torch.where(closer, distance, best)
            here = torch.lerp(self._positions[i], self._positions[i + 1], t)
            s = torch.where(closer, here, s)
            nearest = torch.where(closer[:, None], candidate, nearest)
        return s, nearest.to(self._pivots.dtype), best

    def resampled(self, count: int) -> Path:
        """`count` pivots at equal arc length along this path, the ends unchanged.

        The new polyline cuts corners, so its segments are equal up to the bends they span.

        Raises:
            ValueError: fewer than two pivots.
        """
        checks.integer("count", count, 2)
        return Path(arc.resampled(self._pivots, self._positions, count))

    def reversed(self) -> Path:
        """The same path from its other end."""
        return Path(self._pivots.flip(0))

    def to(self, *args: Any, **kwargs: Any) -> Path:
        """The path with pivots converted as by `torch.Tensor.to` (dtype, device)."""
        return Path(self._pivots.to(*args, **kwargs))

    def _repr_html_(self) -> str:
        chord = float((self._pivots[-1].double() - self._pivots[0].double()).norm())
        rows = [
            ("pivots", self.num_pivots),
            ("parameters", self.num_params),
            ("length", self.length),
            ("distance between the ends", chord),
            ("positions of the pivots", ", ".join(f"{s:.3g}" for s in self._positions.tolist())),
            ("type", f"{self._pivots.dtype}, {self._pivots.device}"),
        ]
        return display.facts(rows)

    def save(self, file: str | os.PathLike[str], **manifest: Any) -> None:
        """Write the pivots as safetensors, and a JSON manifest beside them.

        Args:
            file: where to, for example "path.safetensors"; the manifest is "path.json".
            manifest: further facts to record (seed, objective, settings), JSON values.
        """
        facts = {
            "format": _FORMAT,
            "num_pivots": self.num_pivots,
            "num_params": self.num_params,
            "length": self.length,
        }
        clash = sorted(set(facts) & set(manifest))
        if clash:
            raise checks.invalid("manifest", f"names other than {sorted(facts)}", str(clash))
        store.save_tensors(os.fspath(file), {"pivots": self._pivots}, {**facts, **manifest})

    @classmethod
    def load(cls, file: str | os.PathLike[str], num_params: int | None = None) -> Path:
        """Read what `save` wrote.

        Args:
            num_params: the P expected; None for any.

        Raises:
            FileNotFoundError: the file or its manifest is missing.
            DamagedFileError: truncated or changed, or not a path.
            ValueError: a path for another number of parameters.
        """
        file = os.fspath(file)
        tensors, manifest = store.load_tensors(file)
        if manifest.get("format") != _FORMAT or set(tensors) != {"pivots"}:
            raise store.DamagedFileError(
                f"{file}: expected a path ({_FORMAT}), got format "
                f"{manifest.get('format')!r} holding {sorted(tensors)}; give the file of a path"
            )
        shape = [manifest.get("num_pivots"), manifest.get("num_params")]
        if list(tensors["pivots"].shape) != shape:
            raise store.DamagedFileError(
                f"{file}: expected pivots {shape} as its manifest says, got "
                f"{list(tensors['pivots'].shape)}; delete it and run the same command again"
            )
        if num_params is not None and shape[1] != num_params:
            raise checks.invalid(
                str(file),
                f"a path in {num_params} parameters",
                f"one in {shape[1]}",
                "give the path of this model",
            )
        return cls(tensors["pivots"])

    def __repr__(self) -> str:
        return (
            f"Path({self.num_pivots} pivots in {self.num_params} parameters, "
            f"length {self.length:.6g}, {self._pivots.dtype})"
        )

    def _checked(self, s: float | Tensor) -> tuple[Tensor, bool]:
        """s as float64 [K] on the path's device, and whether it was a single position."""
        try:
            many = torch.as_tensor(s, dtype=torch.float64, device=self._positions.device).detach()
        except (TypeError, ValueError, RuntimeError):
            raise checks.invalid("s", "positions in [0, 1]", checks.shown(s)) from None
        if many.ndim > 1:
            raise checks.invalid("s", "a number or positions [K]", checks.describe(many))
        if not bool(((many >= 0) & (many <= 1)).all()):
            bad = many[~((many >= 0) & (many <= 1))] if many.ndim else many.reshape(1)
            raise checks.invalid(
                "s", "positions in [0, 1] (relative arc length)", str(float(bad[0]))
            )
        return many.reshape(-1), many.ndim == 0


def linear_path(a: Tensor, b: Tensor, pivots: int = 2) -> Path:
    """The straight line from a to b, with equally spaced pivots.

    Args:
        a, b: the ends, of one shape and dtype.  # [P]
        pivots: number of pivots M, both ends counted.

    Raises:
        ValueError: ends that differ in shape, dtype or device, that are equal or not finite, or
            fewer than two pivots.

    >>> linear_path(torch.zeros(2), torch.tensor([1.0, 2.0]), pivots=3).pivots.tolist()
    [[0.0, 0.0], [0.5, 1.0], [1.0, 2.0]]
    """
    checks.integer("pivots", pivots, 2)
    for name, end in (("a", a), ("b", b)):
        if not isinstance(end, Tensor) or end.ndim != 1 or end.numel() == 0:
            raise checks.invalid(name, "a tensor of shape [P]", checks.describe(end))
        checks.finite(name, end)
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        raise checks.invalid(
            "b",
            f"an end like a ({checks.describe(a)} on {a.device})",
            f"{checks.describe(b)} on {b.device}",
            "both ends must come from the same model",
        )
    if torch.equal(a, b):
        raise checks.invalid("b", "another point than a", "the same one")
    return Path(torch.stack((a, b))).resampled(pivots)
