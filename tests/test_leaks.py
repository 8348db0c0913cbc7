"""A thousand products, Gram matrices and cycles of a run leave memory as it was."""

import subprocess
import sys

import pytest
from leaks import KINDS, LIMIT
from memory_of import needs_proc


@needs_proc
@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "batch norm gamma 0") for kind in KINDS), ("gram", "data-dependent branch")],
)
def test_a_thousand_calls_leave_memory_as_it_was(request, kind: str, name: str):
    script = request.config.rootpath / "tests" / "support" / "leaks.py"
    command = [sys.executable, script, kind, name]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, tensors = map(int, ended.stdout.split())
    assert tensors == 0
    assert grown < LIMIT
