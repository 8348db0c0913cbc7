"""The page of benchmarks, written from the records in benchmarks/results.

Nothing on it is typed by hand but what a record's kind means. `python docs/make_benchmarks.py`
prints the page; the site's build calls `page`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
Record = dict[str, Any]

INTRODUCTION = """# Benchmarks

Written by `docs/make_benchmarks.py` from the JSON records in `benchmarks/results/` when this site
is built. Rivals run in turns within one process, so that a change in the machine's load meets all
of them alike; medians and quartiles are over rounds. Every record says the commit, the versions
and the processor it was measured with, and other records may be of other machines: compare within
a table. `benchmarks/results/README.md` says how to repeat each.

Nothing has been timed on a GPU unless a record below says so.
"""

# What each kind of record is, by the beginning of its file's name; in the order of the page.
KINDS: tuple[tuple[str, str, str], ...] = (
    (
        "modern",
        "Transformers and wide networks",
        "Trace probes, products and norms, each in plain gradients of the same batch.",
    ),
    (
        "score-norms",
        "Squared norms of single examples' gradients",
        "Time for one batch. A plain gradient is one forward and backward pass of the same batch.",
    ),
    (
        "score-spectrum",
        "Spectrum of the score matrix",
        "All eigenvalues of the empirical Fisher matrix of E examples. The floor is one plain "
        "gradient pass and E² P operations at the rate of `torch.mm`.",
    ),
    ("score-memory", "Peak memory of the spectrum", "Beyond what the process held before."),
    ("score-growth", "Growth with examples and parameters", "The spectrum at other sizes."),
    (
        "score-kernels",
        "Kernels of the score engine",
        "As shares of what the processor can do: the peak rate of operations or the rate of a "
        "copy, whichever binds.",
    ),
    (
        "hessian-products",
        "Hessian products",
        "Time for one product or quadratic form where several are taken at once. A product is no "
        "nearer to float64 than ReLUs let it, as rounding turns some of them on or off.",
    ),
    (
        "hessian-probes",
        "Probes of the Hessian's trace on a wide network",
        "Time for one probe of a whole call: random signs, the values at the point and the forms.",
    ),
    (
        "hessian-second-objective",
        "A second objective of an architecture",
        "Time until an objective of a new network is ready for its first product, the network's "
        "construction included: with nothing known of the architecture, and after another.",
    ),
    (
        "hessian-path",
        "Largest eigenvalue along a minimum energy path",
        "Each search begins at the point before.",
    ),
    (
        "hessian-line",
        "Largest eigenvalue along a straight line",
        "Each search begins at the point before.",
    ),
    (
        "hessian-trace",
        "Trace of the Hessian to a relative standard error",
        "Peers' times in all are their product's median times the products that an estimator "
        "needs: Hutchinson's, and the best.",
    ),
    ("step", "A cycle of projected SGD", "Updates, a projection, and both."),
    ("replicas", "Replicas of projected SGD", "Time for one update of one replica."),
    ("langevin", "Langevin dynamics", "Nanoseconds for a particle and step."),
    ("random-bits", "Random numbers", "Nanoseconds per number."),
    ("ten-thousand-steps", "Ten thousand Langevin steps", "Of a million particles on the ring."),
    ("long-run", "A million updates", "Memory of a run that is recorded to disk."),
    (
        "scaling",
        "Scaling over processes",
        "Seconds measured and expected by the cost model, for a fixed number of examples (strong) "
        "and a fixed number a process (weak).",
    ),
    (
        "force-batches",
        "The force's batches and images",
        "Of a run of `small` whose noise beyond the leading directions was sampled evenly: "
        "[Questions](questions.md#is-a-drift-down-the-curvature-entropic-at-all).",
    ),
    (
        "trust-models",
        "Random models against autograd",
        "How many were tried, and how many were wrong.",
    ),
    (
        "trust-problems",
        "Random problems against plain torch",
        "Random models in batches, outputs, losses and derivatives of every kind: how many were "
        "tried, how many were wrong, and what was rejected, by the message.",
    ),
    (
        "torch-derivatives",
        "torch's own derivatives",
        "The first three derivatives of torch's layers and functions against central differences "
        "of the one before, and transforms of `torch.func` against nested gradients; what is wrong "
        "or missing, and what becomes of it here "
        "([Numerics](numerics.md#where-torchs-derivatives-are-wrong)).",
    ),
    (
        "trust-ops",
        "Random calls of every operation against its oracle",
        "How many were made, and how many were wrong.",
    ),
    (
        "trust-leaks",
        "Memory after a thousand calls",
        "Bytes by which a process has grown, and tensors that are left.",
    ),
    ("trust-kills", "Runs killed and resumed", "Every CSV file compared with an unbroken run's."),
    ("trust-damage", "Damaged files of a run", "How many were tried, and how many not found."),
)


def page(results: Path = RESULTS) -> str:
    """The whole page, as Markdown."""
    files = sorted(results.glob("*.json"))
    parts = [INTRODUCTION]
    for kind, title, text in KINDS:
        mine = [file for file in files if _kind(file) == kind]
        if mine:
            parts += [f"## {title}\n", f"{text}\n", *map(_section, mine)]
    others = [file for file in files if not _kind(file)]
    if others:
        parts += ["## Other records\n", *map(_section, others)]
    return "\n".join(parts)


def _kind(file: Path) -> str:
    return next((kind for kind, _, _ in KINDS if file.name.startswith(kind + "-")), "")


def _section(file: Path) -> str:
    record = json.loads(file.read_text(encoding="utf-8"))
    body = SPECIAL.get(_kind(file), _plain)(record)
    failed = record.get("failed") or {}
    notes = [f"- {_text(name)} failed: {_text(why)}" for name, why in failed.items()]
    missing = record.get("peers not installed") or []
    if missing:
        notes.append("- not installed, and so not timed: " + ", ".join(map(_text, missing)))
    heading = f"### {_heading(file, record)}\n"
    return "\n".join([heading, _provenance(file, record), "", body, *notes, ""])


def _heading(file: Path, record: Record) -> str:
    facts = [
        f"{record[key]:,} {key}" if isinstance(record[key], int) else _text(record[key])
        for key in ("model", "parameters", "examples", "replicas", "particles", "points")
        if isinstance(record.get(key), int | str)
    ]
    return ", ".join(facts) or _text(file.stem)


def _provenance(file: Path, record: Record) -> str:
    versions = record.get("versions", {})
    commit, _, changes = str(record.get("commit", "unknown")).partition("+")
    where = ", ".join(map(_text, record.get("gpu") or [])) if record.get("device") != "cpu" else ""
    facts = [
        f"`{file.name}`",
        f"commit {_text(commit[:9])}" + (" with changes" if changes else ""),
        f"torch {_text(versions.get('torch', '?'))}",
        _text(where or f"{record.get('device', 'cpu')}, {record.get('isa', '?')}"),
        f"{record.get('threads', '?')} threads",
    ]
    return ", ".join(facts) + "."


def _plain(record: Record) -> str:
    """A record with "seconds" by rival, and whatever units they are given in too."""
    seconds = record.get("seconds")
    if not isinstance(seconds, dict):
        return _facts(record)
    if all(isinstance(value, dict) for value in seconds.values()):
        return _timings(seconds)
    products = record.get("products", {})
    rows = [[name, number(value), products.get(name, "")] for name, value in seconds.items()]
    return table(["", "seconds", "products"], rows)


def _facts(record: Record) -> str:
    """A record's own numbers, those of its dictionaries too."""
    known = ("commit", "versions", "isa", "threads", "load_average", "gpu")
    rows = []
    for name, value in record.items():
        if name in known:
            continue
        each = value.items() if isinstance(value, dict) else [("", value)]
        for key, v in each:
            label = f"{name}, {key}" if key else name
            rows.append([label, number(v) if isinstance(v, float) else _text(str(v))])
    return table(["", ""], rows)


def _timings(seconds: dict[str, Any]) -> str:
    units = [key for key in next(iter(seconds.values())) if key.startswith("in ")]
    scale, unit = (1e3, "ms") if max(row["median"] for row in seconds.values()) < 0.5 else (1, "s")
    rows = []
    for name, row in seconds.items():
        low, high = (number(scale * value) for value in row["quartiles"])
        ratios = [number(row[key]) if key in row else "" for key in units]
        median = number(scale * row["median"])
        rows.append([name, median, f"{low} to {high}", row["rounds"], *ratios])
    return table(["", f"median, {unit}", "quartiles", "rounds", *units], rows)


def _derivatives(record: Record) -> str:
    wrong, transforms = record["not right in torch"], record["not right under transforms"]
    said = f"{record['functions']} functions, {record['tried']:,} ways; all others are right."
    rows = [[f"`{name}`", row["in torch"], row["here"]] for name, row in wrong.items()]
    more = [
        [f"`{name}`", ", ".join(row["wrong in torch"]), row["here"]]
        for name, row in transforms.items()
    ]
    head = ["", "in torch", "here"]
    parts = [said, "", table(head, rows), table(["", "wrong under", "here"], more)]
    return "\n".join(parts)


def _products(record: Record) -> str:
    errors = [[name, number(value)] for name, value in record["error against float64"].items()]
    return _plain(record) + "\n" + table(["product", "relative error against float64"], errors)


def _spectrum(record: Record) -> str:
    floor = record["floor"]
    rows = [[name, f"{number(value)}"] for name, value in floor.items() if "per second" not in name]
    return table(["what the floor is made of", "seconds"], rows) + "\n" + _plain(record)


def _memory(record: Record) -> str:
    parts = []
    for model, found in record.items():
        if not isinstance(found, dict) or "peak bytes" not in found:
            continue
        budget = found["budget"]
        said = f", within a budget of {number(budget / 2**30)} GiB" if budget else ""
        rows = [
            [name, number(row["peak"] / 2**30) if "peak" in row else f"failed: {row['failed']}"]
            for name, row in found["peak bytes"].items()
        ]
        parts.append(f"{_text(model)}, {found['examples']:,} examples{said}\n")
        parts.append(table(["", "GiB"], rows))
    return "\n".join(parts)


def _growth(record: Record) -> str:
    parts = []
    for axis in ("examples", "parameters"):
        runs = record[axis]
        names = list(dict.fromkeys(name for run in runs for name in run["seconds"]))
        rows = [
            [
                f"{run['model']}, {run['parameters']:,} parameters, {run['examples']:,} examples",
                *(
                    number(run["seconds"][name]["median"]) if name in run["seconds"] else ""
                    for name in names
                ),
            ]
            for run in runs
        ]
        parts.append(table([f"with {axis}", *(f"{name}, s" for name in names)], rows))
    return "\n".join(parts)


def _kernels(record: Record) -> str:
    rows: dict[str, dict[str, Record]] = {}
    for kernel in record["kernels"]:
        rows.setdefault(kernel["kernel"], {})[kernel["backend"]] = kernel
    backends = list(dict.fromkeys(kernel["backend"] for kernel in record["kernels"]))
    head = ["kernel", "bound by"]
    head += [f"{backend}, ms (share of the limit)" for backend in backends]
    lines = []
    for name, by in rows.items():
        bound = next(iter(by.values()))["bound by"]
        cells = [
            f"{number(1e3 * by[b]['median'])} ({100 * by[b]['share of the limit']:.0f} %)"
            if b in by
            else ""
            for b in backends
        ]
        lines.append([name, bound, *cells])
    return table(head, lines)


def _trace(record: Record) -> str:
    estimates = [
        [name, number(value), number(error), products, number(record["seconds"][name]["median"])]
        for name, (value, error, products) in record["estimates"].items()
    ]
    first, best = record["peers in all"], record["with the best estimator"]
    peers = [[name, number(first[name]), number(best[name])] for name in first]
    needed = [[name, count] for name, count in record["products needed"].items()]
    said = f"To {100 * record['tol']:g} %.\n"
    return "\n".join(
        [
            said,
            table(["", "estimate", "standard error", "vectors", "seconds"], estimates),
            table(["estimator", "products needed"], needed),
            table(["peer", "s with Hutchinson's estimator", "s with the best estimator"], peers),
            _plain(record),
        ]
    )


def _both(row: Record | None) -> str:
    return f"{number(row['median'])} ({number(row['expected'])})" if row else ""


def _scaling(record: Record) -> str:
    parts = []
    for kind in ("strong", "weak"):
        found = record[kind]
        names = dict.fromkeys(name for f in found.values() for name in f["quantities"])
        lines = [
            [name, *(_both(f["quantities"].get(name)) for f in found.values())] for name in names
        ]
        head = [f"{kind} scaling, s (expected)", *(f"{w} processes" for w in found)]
        parts.append(table(head, lines))
    each, columns = record["weak, examples a process"], record["columns"]
    said = f"Weak scaling: {each} examples a process. Columns of forms: {columns}.\n"
    return "\n".join([said, *parts])


def _positions(record: Record) -> str:
    def cell(value: Any) -> str:
        return ", ".join(map(number, value)) if isinstance(value, list) else number(value)

    found = record["positions"]
    return table([*found[0]], [[cell(value) for value in row.values()] for row in found])


def _replicas(record: Record) -> str:
    if "by replicas" in record:
        return "\n".join(
            f"{count} replicas:\n\n{_replicas(found)}"
            for count, found in record["by replicas"].items()
        )
    if "times as fast as the eager loop" not in record:
        return _plain(record)
    quicker = [
        [name, number(row["by medians"]), number(row["by the quickest rounds"])]
        for name, row in record["times as fast as the eager loop"].items()
    ]
    head = ["times as fast as the eager loop", "by medians", "by the quickest rounds"]
    return _plain(record) + "\n" + table(head, quicker)


def _langevin(record: Record) -> str:
    key = "ns a particle and step"
    names = list(dict.fromkeys(name for run in record["runs"] for name in run[key]))
    rows = [
        [
            *(run[field] for field in ("potential", "scheme", "dtype")),
            *(number(run[key][name]["median"]) if name in run[key] else "" for name in names),
        ]
        for run in record["runs"]
    ]
    return table(["potential", "scheme", "dtype", *(f"{name}, ns" for name in names)], rows)


def _random_bits(record: Record) -> str:
    key = "ns a number"
    names = list(record["runs"][0][key])
    rows = [
        [run["what"], f"{run['numbers']:,}", *(number(run[key][n]["median"]) for n in names)]
        for run in record["runs"]
    ]
    return table(["what", "numbers", *(f"{name}, ns" for name in names)], rows)


def _second(record: Record) -> str:
    names = list(record["runs"][0]["seconds"])
    rows = [
        [run["examples"], *(number(run["seconds"][n]["median"]) for n in names)]
        for run in record["runs"]
    ]
    return table(["images", *(f"{name}, s" for name in names)], rows)


SPECIAL: dict[str, Callable[[Record], str]] = {
    "score-spectrum": _spectrum,
    "score-memory": _memory,
    "score-growth": _growth,
    "score-kernels": _kernels,
    "hessian-products": _products,
    "hessian-trace": _trace,
    "hessian-second-objective": _second,
    "torch-derivatives": _derivatives,
    "replicas": _replicas,
    "scaling": _scaling,
    "force-batches": _positions,
    "langevin": _langevin,
    "random-bits": _random_bits,
}


def number(value: float) -> str:
    """Three digits, without an exponent where that is readable.

    >>> number(0.0123456), number(12345.6), number(2.0)
    ('0.0123', '12,346', '2')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; what is given is text, without markup."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_text, line)) + " |" for line in lines) + "\n"


def _text(value: object) -> str:
    text = escape(str(value), quote=False).replace("\n", " ")
    for sign in r"\`*_[]|":
        text = text.replace(sign, f"&#{ord(sign)};")
    return text


if __name__ == "__main__":
    sys.stdout.write(page())
