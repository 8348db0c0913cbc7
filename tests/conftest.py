"""What all tests share: one torch thread, the emulated GPU, and one tiny finished run."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import emulated_gpu
import pytest
import tiers
import torch
from hidden_gpus import HIDDEN, asks_for_gpus

from entropic_fast.experiments._pipeline import STAGES
from entropic_fast.experiments.figures import FIGURES

with warnings.catch_warnings():  # torch's own, when its forward mode is first used
    warnings.simplefilter("ignore")
    importlib.import_module("torch._decomp.decompositions_for_jvp")

# Every stage at a size of seconds; what such a run finds is of no meaning.
TINY = [
    "train.seeds=[0,1]",
    "train.epochs=4",
    "data.train_limit=200",
    "data.test_limit=60",
    "data.curvature_examples=32",
    "path.pairs=[[0,1]]",
    "path.seeds=[0]",
    "path.steps=[3,3]",
    "path.lrs=[0.1,0.01]",
    "path.dense_points=9",
    "path.batch_size=64",
    *(
        f"{figure.section.toml}.{key}={json.dumps(value)}"
        for figure in FIGURES.values()
        for key, value in figure.tiny.items()
    ),
]


TIER = "ENTROPIC_FAST_TIER"  # how workers of pytest-xdist learn what their controller was asked


def pytest_addoption(parser):
    parser.addoption("--default", action="store_true", help="the default tier of named tests too")
    parser.addoption("--full", action="store_true", help="run slow tests and more cases too")
    parser.addoption("--nightly", action="store_true", help="run every case of every test")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what the tier does, and mark as slow what the default tier leaves out.

    `pytest` alone is the default tier, `pytest --full` the full one, of which `-m slow` are the
    cases that the default tier leaves out. `pytest --nightly`, and tests that are named on the
    command line, run with all cases; `--default` holds for those too.
    """
    names = [item.nodeid for item in items]
    slow, nightly = (tiers.left_out(names, tier) for tier in (tiers.DEFAULT, tiers.FULL))
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
    tier = os.environ.get(TIER)
    if tier == "default":
        dropped = [item for item in items if item.get_closest_marker("slow")]
    else:
        dropped = [item for item in items if tier == "full" and item.nodeid in nightly]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]


def pytest_configure(config):
    """Tests marked gpu are run by `-m gpu` alone; the others see no GPU (`hidden_gpus`)."""
    if not hasattr(config, "workerinput"):
        bare = config.args_source is pytest.Config.ArgsSource.TESTPATHS
        everything = config.getoption("--nightly") or config.getoption("markexpr") or not bare
        everything = everything and not config.getoption("--default")
        full = config.getoption("--full")
        os.environ[TIER] = "full" if full else "all" if everything else "default"
    if not asks_for_gpus(config.getoption("markexpr")):
        os.environ.update(HIDDEN)
    # Beside a GPU in use torch would take the emulated one for the machine's accelerator.
    if emulated_gpu.SUPPORTED and not torch.cuda.is_available():
        emulated_gpu.register()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Networks this small gain nothing from threads, and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_known():
    """No test finds what another has captured, checked, or compared with autograd."""
    from entropic_fast.objective import _architecture_cache as known

    known.forget()


@dataclass
class Ended:
    """How a command of the command line ended."""

    code: int
    out: str
    err: str


def entropic_fast(*arguments: object) -> Ended:
    """Run `entropic-fast` with these arguments in this process."""
    from entropic_fast.cli import _main as cli

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["entropic-fast", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def command():
    """`entropic-fast` as a function of its arguments."""
    return entropic_fast


@pytest.fixture(scope="session")
def tiny():
    """The overrides of the tiny run, as arguments."""
    return [word for override in TINY for word in ("--set", override)]


@dataclass
class Finished:
    """A finished tiny run, and what each command that made it said. Copy it before a change."""

    path: Path
    ended: dict[str, Ended]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny) -> Finished:
    """A run made part by part, then reported."""
    path = tmp_path_factory.mktemp("tiny") / "run"
    stages = [*(name for name in STAGES if name != "report"), "reproduce"]
    return Finished(
        path,
        {s: entropic_fast(s, "--out", path, "--workers", 1, *tiny) for s in stages},
    )
