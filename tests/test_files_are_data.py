"""Nothing that is read can run: no pickled objects, no evaluation of text, in the package."""

import ast
from pathlib import Path

import pytest

import entropic_fast

PACKAGE = Path(entropic_fast.__file__).parent
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml"}
CALLS = {"eval", "exec", "torch.load", "torch.save", "numpy.load", "np.load", "pandas.read_pickle"}


def findings(source: str) -> list[str]:
    """Imports and calls that read or write code as data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            # What copying a module may raise is no way to read one.
            found += [str(node.module) for a in node.names if not a.name.endswith("Error")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            # torch reads tensors and plain containers alone where it is told so.
            safe = "weights_only=True" in map(ast.unparse, node.keywords)
            found += [] if safe else [ast.unparse(node.func)]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_module_reads_code_as_data(path):
    assert findings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import load",
        "torch.load('x')",
        "eval('1')",
        "torch.load('x', weights_only=w)",
    ],
)
def test_what_is_looked_for_would_be_found(line):
    assert findings(line)
