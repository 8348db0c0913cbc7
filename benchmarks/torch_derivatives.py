"""torch's first three derivatives of all its layers, against central differences of the one before.

    python benchmarks/torch_derivatives.py

What was tried, what is wrong or missing in the installed torch, and what becomes of it here; goes
to benchmarks/results/torch-derivatives-VERSION.json. About two minutes.
"""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
ORDER = {1: "first", 2: "second", 3: "third"}


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import test_derivative_formulas as known
    from derivative_sweep import TRANSFORMS, first_fault, routes, transform_faults, variants

    from entropic_fast._torch.derivative_formulas import AnyOrder

    facts = runpy.run_path(str(ROOT / "benchmarks" / "conftest.py"))["facts"]()
    refused = known.CONSTANT | known.WRONG_GRADIENT
    found: dict[str, dict[str, str]] = {}
    tried = 0
    for name, cases in known.CASES.items():
        faults: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
        for case in cases:
            for layout, tensors in variants(case):
                for route in routes(len(tensors)).values():
                    tried += 1
                    for formulas in faults:
                        mode = AnyOrder if formulas else nullcontext
                        fault = first_fault(case.function, tensors, route, layout, mode)
                        faults[formulas] += [fault] if fault else []
        if faults[False]:
            here = "refused by name" if name in refused else _here(faults[True])
            found[name] = {"in torch": _in_torch(faults[False]), "here": here}
    transforms: dict[str, dict[str, Any]] = {}
    for name, cases in known.CASES.items():
        if name in refused:
            continue
        case = cases[0]
        here = transform_faults(case.function, case.tensors, known.Refusing)
        plain = transform_faults(case.function, case.tensors, nullcontext, AnyOrder)
        wrong = [how for how, why in plain.items() if why.startswith("wrong")]
        if wrong:
            transforms[name] = {"wrong in torch": wrong, "here": _left(here, wrong)}
    record = {
        **facts,
        "functions": len(known.CASES),
        "tried": tried,
        "transforms tried": len(TRANSFORMS),
        "not right in torch": found,
        "not right under transforms": transforms,
        "names": sorted(known.CASES),
    }
    file = (
        ROOT
        / "benchmarks"
        / "results"
        / f"torch-derivatives-{torch.__version__.split('+')[0]}.json"
    )
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(known.CASES)} functions, {tried} ways: {len(found)} not right in torch")


def _in_torch(faults: list[tuple[int, str]]) -> str:
    order = min(order for order, _ in faults)
    why = next(why for each, why in faults if each == order)
    if "nan" in why:
        return f"{ORDER[order]} derivative NaN"
    return f"{ORDER[order]} derivative {why.split(':')[0]}"


def _here(faults: list[tuple[int, str]]) -> str:
    if not faults:
        return "right, by its formula"
    if all(why.startswith("missing") for _, why in faults):
        return "refused by torch's error"
    return "refused, as not finite" if all("nan" in why for _, why in faults) else "WRONG"


def _left(here: dict[str, str], wrong: list[str]) -> str:
    left = {here[how].split(":")[0] for how in wrong if how in here}
    if any(
        here[how].startswith("wrong") and "nan" not in here[how] for how in wrong if how in here
    ):
        return "WRONG"
    if left == {"missing", "wrong"}:
        return "refused by name, or as not finite"
    refused = {"missing": "refused by name", "wrong": "refused, as not finite"}
    return refused[left.pop()] if left else "right, by its formula"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from entropic_fast._torch.full_precision import full_precision

        with full_precision():
            main()
