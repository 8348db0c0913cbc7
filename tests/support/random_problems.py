"""Random problems: a random model with a form of batches, outputs and loss; functions of a seed.

`random_models` draws the networks. What is drawn around them: how batches come (tuples, dicts,
nested, arrays, of several sizes), containers of outputs, derivatives in the inputs, losses of
every kind (`random_losses`), losses that mix examples, chosen and complex parameters, wrappers.
The oracle is in `plain_problems`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from random_derivatives import WithInput, gradient_penalty, random_derivative
from random_forms import PACKS, PLACES, Batches, Called, Columns, random_form, unpacked
from random_losses import RandomLoss, coupled_loss, random_loss
from random_models import random_network
from random_pieces import Draw, Shape
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map

from entropic_fast.objective import Objective

# Differences of gradients are no derivative of these, for which a value is a constant.
DETACHED = {
    "output also detached", "weight also detached", "used under no_grad too",
    "conv under no_grad too", "F.linear of a rounded weight", "Embedding with padding_idx",
}  # fmt: skip


@dataclass(frozen=True)
class RandomProblem:
    """A model as a user has it, its loss, data and arguments; float64."""

    seed: int
    model: nn.Module  # perhaps in a wrapper
    plain: Called  # without
    loss: RandomLoss
    given: Any  # the loss as an objective takes it
    data: Callable[[], Any]
    arguments: dict[str, Any]
    batches: Batches
    read: Callable[[Any], Any]  # what the loss's terms take of the model's output
    chosen: frozenset[str] | None  # names of parameters; None for all
    one_tensor: bool  # the loss takes one tensor, so that there is a Gauss-Newton matrix
    derivative: bool
    kinds: frozenset[str]

    @property
    def coupled(self) -> bool:
        return bool(self.arguments.get("coupled"))

    def objective(self, **changes: Any) -> Objective:
        return Objective(self.model, self.given, self.data(), **{**self.arguments, **changes})

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those of theta by name, in order, each once."""
        return {
            name: p
            for name, p in self.plain.named_parameters()
            if (p.requires_grad if self.chosen is None else name in self.chosen)
        }


class Body(nn.Module):
    """A network, and a few of its hidden features beside its outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.network, nn.Sequential) and len(self.network) > 1:
            features = self.network[:-1](x)
            hidden = torch.sin(features.flatten(1)[:, :4])  # before the last may overwrite them
            return self.network[-1](features), hidden
        out = self.network(x)
        return out, torch.sin(out.flatten(1)[:, :4])


class ComplexMix(nn.Module):
    """Outputs through complex weights."""

    def __init__(self, inside: int, outside: int, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, outside, dtype=torch.complex128) / inside)
        self.shift = nn.Parameter(torch.randn(outside, dtype=torch.complex128))
        self.kind = kind

    def forward(self, out: Tensor) -> Tensor:
        z = out.flatten(1).to(self.weight.dtype) @ self.weight + self.shift
        if self.kind == "fft":
            return torch.fft.ifft(torch.fft.fft(z) * self.shift).real
        return z.abs() if self.kind == "abs" else z.real * z.imag + z.real


class Inner(nn.Module):
    """(x, scale) to an output, in a container or not."""

    def __init__(self, body: nn.Module, gate_input: bool) -> None:
        super().__init__()
        self.body, self.gate, self.tail = body, nn.Linear(3, 1), nn.Identity()
        self.gate.double()
        self.gate_input = gate_input
        self.mixes = False
        self.squash: Callable[[Tensor], Tensor] | None = None
        self.pack: Callable[[Tensor, Tensor], Any] | None = None
        self.kind = "tuple"  # of container, one of PACKS where it is one

    def forward(self, x: Tensor, scale: Tensor | None) -> Any:
        if isinstance(self.body, WithInput):  # the loss differentiates the outputs
            with torch.enable_grad():
                return self.compute(x, scale)
        return self.compute(x, scale)

    def compute(self, x: Tensor, scale: Tensor | None) -> Any:
        gate = None if scale is None else 1 + torch.tanh(self.gate(scale)) / 2  # [n, 1]
        if gate is not None and self.gate_input:
            x, gate = x * gate.view(-1, *[1] * (x.ndim - 1)), None
        out, hidden = self.body(x)
        if gate is not None:
            out = out * gate.view(-1, *[1] * (out.ndim - 1))
        out = self.tail(out)
        if self.mixes:
            out = out - 0.5 * torch.tanh(out).mean(0)
        out = out if self.squash is None else self.squash(out)
        return out if self.pack is None else self.pack(out, hidden)


@contextmanager
def plainly() -> Iterator[None]:
    """Within it attention has all derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def random_problem(seed: int) -> RandomProblem:
    """The problem of a seed; the same at every call."""
    with torch.random.fork_rng(devices=[]), plainly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return _problem(seed, Draw(1_000_003 * (seed + 1)))


def _problem(seed: int, draw: Draw) -> RandomProblem:
    derivative = draw.one("", "", "", "", "", "inside", "inside", "penalty")
    coupled, two = draw.chance(0.17), draw.chance(0.45)
    network, entry, vocabulary = _network(draw, bool(derivative))
    columns = _columns(draw.whole(3 if coupled else 1, 7), entry, vocabulary, two)
    body: nn.Module = Body(network)
    if derivative == "inside":
        body = random_derivative(draw, body, columns["x"])
    elif derivative:
        draw.note("gradient penalty in the loss")
        body = WithInput(body)
    # A gate on the input of a derivative would be cut off with its history.
    inner = Inner(body, gate_input=not vocabulary and not derivative)
    if not two:
        inner.gate = None  # type: ignore[assignment]
    if derivative:
        draw.note("input derivative")

    out, _ = inner.body(columns["x"])
    if draw.chance(0.12):
        kind = draw.one("abs", "product", "fft")
        draw.note(f"complex parameters: {kind}")
        inner.tail = ComplexMix(out[0].numel(), draw.whole(2, 4), kind)
        out = inner.tail(out)
    shape = tuple(out.shape[1:])

    inner.mixes = coupled and draw.chance(0.3)
    if inner.mixes:
        draw.note("coupled: model")
    choose_loss = coupled_loss if coupled and not inner.mixes else random_loss
    loss = choose_loss(draw, shape)
    while derivative == "penalty" and loss.parts > 1:
        loss = choose_loss(draw, shape)
    inner.squash = loss.squash
    given, read, arguments, loss = _outputs(draw, inner, loss, derivative == "penalty")
    if coupled:
        arguments["coupled"] = True
    if draw.chance(0.15):
        draw.note("weight decay")
        arguments["weight_decay"] = draw.one(1e-2, 0.5)

    batches = _batches(draw, inner, loss, read, columns, coupled)
    plain_targets = isinstance(batches[0][1], Tensor)
    form = random_form(draw, two, plain_targets)
    if coupled and form.batch_size == 1:  # for which nothing mixes
        form = replace(form, batch_size=2)
    plain = form.model(inner)
    model = _wrapped(draw, plain)
    plain = getattr(model, "module", getattr(model, "_orig_mod", model))
    chosen = _chosen(draw, plain, arguments) if draw.chance(0.25) else None

    def data() -> Any:
        return form.data(batches)[0]

    if not coupled:
        arguments.update(form.data(batches)[1])
    return RandomProblem(
        seed, model.eval(), plain, loss, given, data, arguments, batches, read, chosen,
        one_tensor=isinstance(read, Part) or (read is _itself and inner.pack is None),
        derivative=bool(derivative), kinds=frozenset(draw.kinds),
    )  # fmt: skip


def _network(draw: Draw, floats: bool) -> tuple[nn.Module, Shape, int]:
    """A network, the shape of its inputs, and its vocabulary (0 for numbers).

    With `floats` one of numbers, with nothing detached.
    """
    while True:
        before = set(draw.kinds)
        network, entry, _, vocabulary = random_network(draw)
        if not floats or not (vocabulary or DETACHED & draw.kinds):
            return network, entry, vocabulary
        draw.kinds.clear()
        draw.kinds.update(before)


def _columns(n: int, entry: Shape, vocabulary: int, two: bool) -> Columns:
    if vocabulary:
        x = torch.randint(0, vocabulary, (n, *entry))
    else:
        x = torch.randn(n, *entry, dtype=torch.float64)
    return {"x": x, "scale": torch.randn(n, 3, dtype=torch.float64)} if two else {"x": x}


# -- outputs ----------------------------------------------------------------------------------


def _itself(output: Any) -> Any:
    return output


class Part:
    """The first of the parts in a container."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, output: Any) -> Tensor:
        return unpacked(self.kind, output)[0]


def _values(output: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(output.values())


def _outputs(
    draw: Draw, inner: Inner, loss: RandomLoss, penalty: bool
) -> tuple[Any, Callable[[Any], Any], dict[str, Any], RandomLoss]:
    """The loss as given, how the oracle reads outputs, arguments, and the loss of what is read."""
    if loss.parts == 3:
        inner.pack = lambda out, hidden: (out, torch.sin(out), torch.cos(1.7 * out))
        return loss.given, tuple, {}, loss
    if loss.parts == 2:
        second = draw.one("tuple", "dict")
        draw.note(f"outputs: two in a {second}")
        inner.pack = _pair if second == "tuple" else lambda o, h: dict(zip("ab", _pair(o, h)))  # noqa: B905
        return loss.given, tuple if second == "tuple" else _values, {}, loss
    if penalty:
        inner.pack = lambda out, x: (out, x)
        terms = loss.terms

        def penalized(output: Any, targets: Any) -> Tensor:
            value, slope = terms(output[0], targets), gradient_penalty(*output)
            value = value.flatten(1).mean(1) if value.ndim > 1 else value
            return value + 0.3 * (slope.mean() if value.ndim == 0 else slope)

        return penalized, _itself, {}, RandomLoss(penalized, loss.targets, penalized)
    if not draw.chance(0.5):
        return loss.given, _itself, {}, loss
    kind = draw.one(*PACKS)
    draw.note(f"outputs: {kind}")
    inner.pack, inner.kind = PACKS[kind], kind
    own_loss = loss.given is loss.terms
    if own_loss and draw.chance(0.6):
        draw.note("a loss of several parts")
        part_terms = loss.terms

        def both(output: Any, targets: Any) -> Tensor:
            out, hidden = unpacked(kind, output)
            value = part_terms(out, targets)
            extra = hidden.square().mean(1)
            return value + 0.3 * (extra.mean() if value.ndim == 0 else extra)

        return both, _itself, {}, RandomLoss(both, loss.targets, both)
    arguments: dict[str, Any] = {}
    if own_loss or kind in ("tuple", "list") or draw.chance(0.5):
        draw.note("output= by name or index")
        arguments["output"] = draw.one(*PLACES[kind])
    return loss.given, Part(kind), arguments, loss


def _pair(out: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return out, F.softplus(0.7 * out.roll(1, -1)) + 0.1


# -- data -------------------------------------------------------------------------------------


def _batches(
    draw: Draw, inner: Inner, loss: RandomLoss, read: Any, columns: Columns, coupled: bool
) -> Batches:
    """One batch, or several, perhaps of inputs of different sizes, perhaps an empty one."""

    def with_targets(columns: Columns) -> tuple[Columns, Any]:
        with torch.no_grad():
            part = read(inner(columns["x"], columns.get("scale")))
        if not isinstance(part, Tensor):
            part = unpacked(inner.kind, part)[0]
        return columns, loss.targets(len(part), tuple(part.shape[1:]))

    n = len(columns["x"])
    whole = with_targets(columns)
    if n < 2 or not draw.chance(0.4):
        return [whole]
    first = draw.whole(1, n - 1)
    pieces = [_cut(whole, slice(first)), _cut(whole, slice(first, n))]
    if not coupled and draw.chance(0.6):
        other = _shorter(inner, loss, read, pieces[1][0], with_targets)
        if other is not None:
            draw.note("batches of inputs of different sizes")
            if _shape(other[1]) != _shape(pieces[1][1]):
                draw.note("batches of outputs of different sizes")
            return [pieces[0], other]
    draw.note("ragged batches")
    if draw.chance(0.3):
        draw.note("an empty batch")
        pieces.insert(draw.whole(0, 2), _cut(whole, slice(0)))
    return pieces


def _cut(batch: tuple[Columns, Any], part: slice) -> tuple[Columns, Any]:
    return tree_map(lambda t: t[part], batch)


def _shape(targets: Any) -> Shape:
    return tuple(tree_leaves(targets)[0].shape[1:])


def _shorter(
    inner: Inner, loss: RandomLoss, read: Any, columns: Columns, with_targets: Any
) -> tuple[Columns, Any] | None:
    """The batch with inputs that have one entry less on an axis, where the model takes them."""
    x = columns["x"]
    axis = 1 if x.ndim < 4 else x.ndim - 1
    try:
        cut = {**columns, "x": x.narrow(axis, 0, x.shape[axis] - 1).clone()}
        batch = with_targets(cut)
        with torch.no_grad():
            one = read(inner(cut["x"][:1], *[c[:1] for c in list(cut.values())[1:]] or [None]))
            found = loss.terms(read(inner(cut["x"], cut.get("scale"))), batch[1])
            alone = loss.terms(one, tree_map(lambda t: t[:1], batch[1]))
    except (RuntimeError, IndexError, ValueError, AssertionError):
        return None
    right = bool(torch.isfinite(found).all()) and torch.allclose(alone[0], found[0])
    return batch if right else None


# -- models -----------------------------------------------------------------------------------


def _wrapped(draw: Draw, plain: Called) -> nn.Module:
    if not draw.chance(0.2):
        return plain
    kind = draw.one("DataParallel", "AveragedModel", "torch.compile")
    draw.note(f"wrapper: {kind}")
    if kind == "DataParallel":
        where = nn.DataParallel.__init__.__globals__  # no GPU is looked for
        with mock.patch.dict(where, _get_available_device_type=lambda: None):
            return nn.DataParallel(plain)
    if kind == "AveragedModel":
        return AveragedModel(plain)
    return torch.compile(plain, backend="eager")  # type: ignore[return-value]


def _chosen(draw: Draw, plain: Called, arguments: dict[str, Any]) -> frozenset[str] | None:
    """Chooses parameters, by a pattern, a module or one by one."""
    every = dict(plain.named_parameters(remove_duplicate=False))
    name = draw.one(*[n for n, p in every.items() if p.numel()])
    parts = name.split(".")
    place = ".".join(parts[: draw.whole(1, len(parts))])
    names = [n for n in every if n == place or n.startswith(place + ".")]
    kind = draw.one("name", "pattern", "module", "parameters")
    draw.note(f"parameters= by {kind}")
    if kind == "pattern":
        pattern = "*." + parts[-1]
        # Of modules too, such as those that hold a normalized weight's factors.
        names = [n for n in every if f".{parts[-1]}." in f"{n}."]
        arguments["parameters"] = draw.one(pattern, [pattern])
    elif kind == "module" and place != name:
        arguments["parameters"] = plain.get_submodule(place)
    elif kind == "parameters":
        arguments["parameters"] = [every[n] for n in names]
    else:
        arguments["parameters"] = draw.one(place, [place, name])
    kept = {id(every[n]) for n in names}
    return frozenset(n for n, p in plain.named_parameters() if id(p) in kept)
