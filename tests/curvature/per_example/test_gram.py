"""The ways a Gram matrix is taken: all give the same, within the budget, and say what they do."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from cases import CASES, Case, by_name, plain_scores, relative_error
from torch import Tensor, nn

from entropic_fast._utils import workspace as scratch
from entropic_fast.curvature import score_gram, score_plan, score_spectrum
from entropic_fast.curvature.per_example import _activation_cache as records_module
from entropic_fast.curvature.per_example._gram import mirror_lower
from entropic_fast.objective import Objective

WAYS = ("memory", "disk", "recompute")
ways = pytest.mark.parametrize("strategy", WAYS)


@ways
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_way_gives_the_gram_of_the_scores(case: Case, strategy: str):
    scores = plain_scores(case, 9)
    obj = case.objective(9)
    assert relative_error(score_gram(obj, strategy=strategy), scores @ scores.T) < 1e-13


@ways
@pytest.mark.parametrize("group_by", ["parameter", "module"])
def test_shares_add_up_and_are_those_of_each(strategy: str, group_by: str):
    case = by_name("transformer layer")
    obj, scores = case.objective(6), plain_scores(case, 6)
    shares = score_gram(obj, strategy=strategy, group_by=group_by)
    assert relative_error(sum(shares.values()), scores @ scores.T) < 1e-13
    parts = obj.split(obj.parameters_vector())
    slices = dict(zip(parts, scores.split([p.numel() for p in parts.values()], 1), strict=True))
    for name, share in shares.items():
        own = [s for n, s in slices.items() if n == name or n.rpartition(".")[0] == name]
        assert relative_error(share, sum(s @ s.T for s in own)) < 1e-13


def test_spectra_of_parameters_are_those_of_their_blocks():
    case = by_name("group norm")
    obj, scores = case.objective(6), plain_scores(case, 6)
    parts = obj.split(obj.parameters_vector())
    blocks = scores.split([p.numel() for p in parts.values()], 1)
    spectra = score_spectrum(obj, group_by="parameter")
    assert list(spectra) == list(parts)
    for values, block in zip(spectra.values(), blocks, strict=True):
        expected = torch.linalg.svdvals(block).square() / 6
        assert torch.allclose(values, expected, atol=1e-13 * float(expected[0]))


def test_float32_products_err_as_the_docstring_says():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 3)
    )
    obj = Objective(model, "cross_entropy", (torch.randn(40, 3, 8, 8), torch.randint(3, (40,))))
    exact, quick = score_gram(obj), score_gram(obj, products="float32")
    sizes = exact.diagonal().sqrt()
    assert not torch.equal(exact, quick)
    assert float(((exact - quick) / (sizes[:, None] * sizes)).abs().max()) < 1e-6


# -- plans ---------------------------------------------------------------------------------


def wide(examples: int = 64) -> Objective:
    """A convolution whose inputs and output gradients take a tenth of its gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64 * 4, 3))
    data = torch.randn(examples, 32, 4, 4), torch.randint(3, (examples,))
    return Objective(model.double(), "cross_entropy", data)


def test_records_are_a_fraction_of_the_score_matrix():
    obj = wide()
    plan = score_plan(obj, memory_budget=10**9)
    assert plan.strategy == "memory" and plan.passes == 1 and plan.spilled == 0
    assert plan.held < 64 * obj.num_params * 8 / 4
    assert "of factored gradients in memory" in str(plan)


def test_the_plan_says_how_many_parameters_go_which_way():
    raw = by_name("raw parameter").objective()  # a scale of 4 and a temperature
    plan = score_plan(raw)
    assert (plan.covered_by_layer_rule, plan.copied, plan.by_torch) == (raw.num_params - 5, 5, 0)
    assert str(plan).endswith("by layer rules, 5 as one copy per example")
    plan = score_plan(by_name("data-dependent branch").objective())
    assert plan.covered_by_layer_rule == plan.copied == 0
    assert f"{plan.by_torch} by torch.func, as vmap cannot trace" in str(plan)


@ways
def test_a_forced_way_is_taken_and_said(strategy: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="entropic_fast"):
        score_gram(wide(8), strategy=strategy)
    says = {"memory": "in memory", "disk": tempfile.gettempdir(), "recompute": "blocks of 8 rows"}
    assert says[strategy] in caplog.text


def test_records_larger_than_the_budget_go_to_disk():
    obj = wide(2048)
    whole = score_plan(obj, memory_budget=2**40)
    budget = 8 * 2048**2 + whole.held * 4 // 5
    plan = score_plan(obj, memory_budget=budget)
    assert plan.strategy == "disk" and plan.spilled == whole.held and plan.folder is not None
    assert f"of factored gradients in {plan.folder}" in str(plan)
    before = set(plan.folder.glob("entropic-fast-*"))  # others' may be there
    gram = score_gram(obj, memory_budget=budget)
    assert set(plan.folder.glob("entropic-fast-*")) <= before  # nothing is left behind
    assert relative_error(gram, score_gram(obj)) < 1e-12


def test_without_a_disk_blocks_are_computed_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records_module, "_IN_MEMORY", ("ext4", "overlay", "xfs", "btrfs", "tmpfs"))
    monkeypatch.setattr(
        "entropic_fast.curvature.per_example._gram_plan.spill_folder", lambda needed: None
    )
    obj = wide(128)
    budget = 8 * 128**2 + score_plan(obj, memory_budget=2**40).held
    plan = score_plan(obj, memory_budget=budget)
    assert plan.strategy == "recompute" and plan.passes > 1 and plan.block < 128
    assert f"blocks of {plan.block} rows" in str(plan) and f"{plan.passes:.2f} passes" in str(plan)
    assert relative_error(score_gram(obj, memory_budget=budget), score_gram(obj)) < 1e-12
    with pytest.raises(ValueError, match=r"strategy: expected .* free .* set TMPDIR"):
        score_gram(obj, strategy="disk")


def test_rows_that_are_never_made_cost_no_chunk():
    """A wide layer's rows of 3.8 MiB are not made: inner products go by its one position."""
    model = nn.Sequential(nn.Linear(5000, 200), nn.Tanh(), nn.Linear(200, 3))
    data = torch.zeros(60, 5000), torch.zeros(60, dtype=torch.int64)
    plan = score_plan(Objective(model, "cross_entropy", data), memory_budget=8 * 2**20)
    assert plan.strategy == "memory" and plan.chunk > 20


@pytest.mark.parametrize("strategy", ["memory", "disk"])
def test_tiles_of_one_pair_give_the_same_inner_products(
    strategy: str, monkeypatch: pytest.MonkeyPatch
):
    obj = wide(9)  # the linear layer has one position
    whole = score_gram(obj)
    for size in (0, 300, 3000):
        monkeypatch.setattr(scratch, "CPU", scratch.CPU._replace(tile=size))
        assert relative_error(score_gram(obj, strategy=strategy), whole) < 1e-14


def test_files_are_removed_after_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(
        "entropic_fast.curvature.per_example._gram_plan.spill_folder", lambda needed: tmp_path
    )
    case = by_name("layer norm")
    model, x, y = case.build(9)
    x[7, 0] = float("nan")
    with pytest.raises(ValueError, match="example 7"):
        score_gram(Objective(model, "cross_entropy", (x, y), batch_size=2), strategy="disk")
    assert not list(tmp_path.iterdir())


def test_folders_in_memory_are_not_disks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "a / ext4 rw\nb /dev/shm tmpfs rw\n")
    assert records_module._is_memory("/dev/shm")
    assert records_module._is_memory("/dev/shm/deeper")
    assert not records_module._is_memory("/dev")


class Averaging(nn.Module):
    """Takes sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(2, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.first(x)).mean(1))


@pytest.mark.parametrize("strategy", ["auto", *WAYS])
def test_batches_of_different_lengths(strategy: str):
    torch.manual_seed(0)
    model = Averaging().double()
    batches = [(torch.randn(n, t, 2), torch.randint(3, (n,))) for n, t in ((2, 3), (3, 5), (2, 1))]
    rows = []
    for x, y in batches:
        for i in range(len(x)):
            loss = nn.functional.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
            found = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in found]))
    scores = torch.stack(rows)
    gram = score_gram(Objective(model, "cross_entropy", batches), strategy=strategy)
    assert relative_error(gram, scores @ scores.T) < 1e-13


def test_mirroring_in_blocks_is_exact():
    for n in (0, 1, 5, 8, 13):
        a = torch.randn(n, n, dtype=torch.float64)
        expected = a.tril() + a.tril(-1).T
        mirror_lower(a, block=4)
        assert torch.equal(a, expected)


@pytest.mark.parametrize("argument", ["strategy", "products", "group_by"])
@pytest.mark.parametrize("function", [score_gram, score_spectrum])
@pytest.mark.parametrize("examples", [9, 400])  # E < P and E > P
def test_unknown_choices_are_refused(function, argument: str, examples: int):
    with pytest.raises(ValueError, match=f"{argument}: expected one of"):
        function(by_name("raw parameter").objective(examples), **{argument: "nonsense"})


# -- memory --------------------------------------------------------------------------------

PEAK = """
import gc, sys, torch
from torch import nn
from entropic_fast.objective import Objective
from entropic_fast.curvature import score_gram, score_plan

def status(key):
    line = [l for l in open("/proc/self/status") if l.startswith(key)][0]
    return int(line.split()[1]) * 1024

strategy, budget = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2), nn.BatchNorm2d(64),
    nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 9, 10),
).eval()
x, y = torch.randn(600, 16, 12, 12), torch.randint(0, 10, (600,))
obj = Objective(model, "cross_entropy", (x, y))
score_gram(obj, max_examples=1)
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
score_gram(obj, memory_budget=budget, strategy=strategy)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("strategy", "mebibytes"), [("auto", 160), ("disk", 64), ("recompute", 96)]
)
def test_peak_memory_stays_within_the_budget_and_15_percent(strategy: str, mebibytes: int):
    """The score matrix is 193 MiB."""
    budget = mebibytes * 2**20
    run = subprocess.run(
        [sys.executable, "-c", PEAK, strategy, str(budget)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(run.stdout) < 1.15 * budget
