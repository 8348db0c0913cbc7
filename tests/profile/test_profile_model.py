"""The profile of a model of one's own: from the command line and from Python."""

import json
import shutil
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from entropic_fast import HessianOperator, Objective, score_spectrum
from entropic_fast._utils.table import Table
from entropic_fast.experiments._task_store import TaskStore
from entropic_fast.profile import ProfileSettings, profile_model
from entropic_fast.profile import _tasks as profile_tasks

FEW = {
    "points": 3,
    "probes": 4,
    "tol": 0.05,
    "replicas": 2,
    "steps": 30,
    "lr": 0.02,
    "path_steps": 8,
}
QUICK = ProfileSettings(**FEW, density_probes=2, density_steps=8, eigenvalues=3, pivots=4)
CODE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

def data():
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()

def bad_labels():
    x, y = data()
    return x, y + 1

def wide():
    x, y = data()
    return x.repeat(1, 2), y

def noise():
    return iter([data()])

def half():
    return build().half()

def dropout():
    return nn.Sequential(nn.Linear(4, 3), Always())

class Always(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x)
"""


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def examples(count: int = 48):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def numbers(folder):
    """Files that hold results, not times or dates."""
    return {k: v for k, v in content(folder).items() if k.suffix in (".csv", ".png", ".svg")}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a user's code and two points."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine.py").write_text(textwrap.dedent(CODE))
    for seed, name in enumerate("ab"):
        save_file(net(seed).state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def arguments(given):
    """The command, but for --out."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in FEW.items()]
    weights = [w for name in "ab" for w in ("--weights", str(given / f"{name}.safetensors"))]
    mine = given / "mine.py"
    return ["profile", f"{mine}:build", "--data", f"{mine}:data", *weights, *words]


@pytest.fixture(scope="module")
def two_points(arguments, command, tmp_path_factory):
    """A finished profile of two points, and how the command ended."""
    out = tmp_path_factory.mktemp("two") / "out"
    return out, command(*arguments, "--out", out)


def refused(ended, *words):
    assert ended.code == 1 and ended.out == "" and "Traceback" not in ended.err
    assert ended.err.startswith("error: "), ended.err
    for word in words:
        assert word in ended.err


# -- one point ------------------------------------------------------------------------------


def test_a_single_point_has_the_spectra_of_its_matrices_and_no_path(tmp_path):
    model, data = net().double(), examples()
    found = profile_model(model, data, tmp_path / "out", settings=QUICK)
    obj = Objective(model, "cross_entropy", data)
    dense = torch.linalg.eigvalsh(HessianOperator(obj) @ torch.eye(obj.num_params).double())
    for row in found.tables["eigenvalues"].rows():
        exact = dense[-row["rank"]] if row["which"] == "largest" else dense[0]
        assert abs(row["eigenvalue"] - float(exact)) <= row["residual"] + 1e-9
    fisher = found.tables["fisher"]
    np.testing.assert_allclose(fisher["eigenvalue"], score_spectrum(obj).numpy(), atol=1e-12)
    (point,) = found.tables["points"].rows()
    assert point["loss"] == pytest.approx(obj.loss()) and point["point"] == "point"
    gap = abs(point["hessian_trace"] - float(dense.sum()))
    assert gap <= 6 * point["hessian_trace_std_error"]
    assert point["gradient_norm"] == pytest.approx(float(obj.gradient().norm()))
    assert set(found.tables) == {"points", "eigenvalues", "density", "fisher"}
    assert found.methods == {"point": found.methods["point"]}
    assert found.methods["point"]["Hessian"] == "graph"
    assert f"{obj.num_params} by layer rules" in found.methods["point"]["scores"]
    html = found.report.read_text()
    assert "Relaxation" not in html and "Profile of Sequential" in html
    for name, table in found.tables.items():
        stored = Table.from_csv(tmp_path / "out" / "data" / f"{name}.csv")
        assert stored.rows() == table.rows()


@pytest.mark.parametrize("kind", ["dataset", "batches"])
def test_data_may_be_a_dataset_or_batches_of_which_curvature_takes_the_first(tmp_path, kind):
    data = TensorDataset(*examples())
    if kind == "batches":
        data = DataLoader(data, batch_size=7)
    settings = ProfileSettings(examples=10, density_probes=2, density_steps=4, probes=2)
    found = profile_model(net(), data, tmp_path / "out", settings=settings)
    (point,) = found.tables["points"].rows()
    x, y = examples()
    obj = Objective(net(), "cross_entropy", (x[:10], y[:10]))
    assert point["loss"] == pytest.approx(obj.loss()) and found.tables["fisher"].num_rows == 10


def test_normalization_by_batches_has_no_fisher_matrix_and_the_report_says_why(tmp_path):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    found = profile_model(
        model, examples(), tmp_path / "out", settings=replace(QUICK, norm="batch")
    )
    assert "fisher" not in found.tables and "fisher_trace" not in found.tables["points"]
    assert "normalization by batch statistics" in found.report.read_text()


def test_any_loss_serves_and_is_named(tmp_path):
    def robust(outputs, targets):
        return (outputs - targets).square().mean(1).add(1).sqrt()

    data = (examples()[0], torch.zeros(48, 3))
    for loss, name in (("mse", "mse"), (robust, "robust")):
        found = profile_model(net(), data, tmp_path / name, settings=replace(QUICK, loss=loss))
        assert "accuracy" not in found.tables["points"]
        assert name in json.loads((found.path / "profile.json").read_text())["loss"]


def test_a_model_that_rules_do_not_take_says_so(tmp_path):
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (2 if float(self.weight.sum()) > -1e6 else 1)

    found = profile_model(Branching(4, 3), examples(), tmp_path / "out", settings=QUICK)
    assert found.methods["point"]["Hessian"].startswith("autograd: ")
    assert "autograd: " in found.report.read_text()


# -- two points -----------------------------------------------------------------------------


def test_two_points_are_joined_and_measured_along_the_path(two_points, given):
    out, ended = two_points
    assert ended.code == 0, ended.err
    for words in ("a minimum energy path from A to B", "gradients of one example", "[7/7]"):
        assert words in ended.err
    assert "Hessian trace" in ended.out and f"report: {out / 'report.html'}" in ended.out
    tables = {p.stem: Table.from_csv(p) for p in (out / "data").glob("*.csv")}
    assert tables["curvature"]["s"].tolist() == [0.0, 0.5, 1.0]
    assert tables["points"]["point"].tolist() == ["A", "between", "B"]
    data = examples()
    for seed, row in ((0, 0), (1, 2)):
        loss = Objective(net(seed), "cross_entropy", data).loss()
        assert tables["points"]["loss"][row] == pytest.approx(loss)
        assert tables["curvature"]["loss"][row] == pytest.approx(loss)
    moved = tables["displacement"]
    assert moved["panel"].tolist() == ["k = 15"] * 3 + ["k = 1"] * 3
    assert (moved["replicas"] == 2).all() and (moved["low"] <= moved["displacement"]).all()
    assert set(tables["losses"]["kind"]) == {"path", "line"}
    figures = {p.name for p in (out / "figures").iterdir()}
    assert figures == {f"{n}.{k}" for n in ("along", "relaxation", "spectra") for k in
                       ("png", "svg")}  # fmt: skip
    assert not list(out.rglob("*.part"))


def test_the_report_and_the_summary_hold_what_was_asked_and_found(two_points, given):
    out, _ = two_points
    html = (out / "report.html").read_text()
    assert html.count("data:image/svg+xml;base64") == 3
    for words in (f"{given / 'mine.py'}:build", "a.safetensors and ", "Student", "graph"):
        assert words in html
    summary = json.loads((out / "summary.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert summary["settings"]["points"] == 3 and summary["found"]["parameters"] == 51
    assert summary["environment"]["torch"] == torch.__version__
    assert [row["point"] for row in summary["points"]] == ["A", "between", "B"]
    assert summary["methods"]["B"]["Hessian"] == "graph"
    assert set(summary["seconds"]) == {"path", "profile", "relax", "spectra"}


def test_an_interrupted_profile_goes_on_to_the_same_numbers(
    two_points, arguments, command, tmp_path, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(profile_tasks, "relax_along", interrupted)
        ended = command(*arguments, "--out", out)
    assert ended.code == 130 and "finished tasks are kept" in " ".join(ended.err.split())
    done = {p: p.stat().st_mtime_ns for p in out.rglob("done.json")}
    assert out / "tasks" / "path" / "band" / "done.json" in done
    ended = command(*arguments, "--out", out)
    assert ended.code == 0 and f"{len(done)} of 7 tasks are finished" in ended.err
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())
    assert numbers(out) == numbers(two_points[0])


def test_weights_that_a_factory_draws_are_the_same_when_resumed(command, given, tmp_path):
    mine = given / "mine.py"
    few = ["--density-probes", 2, "--density-steps", 4, "--probes", 2]
    arguments = ["profile", f"{mine}:build", "--data", f"{mine}:data", "--out", tmp_path / "out"]
    for said in ("[1/1] spectra/point", "from the time of one pass"):
        ended = command(*arguments, *few)
        assert ended.code == 0 and said in ended.err
    assert "[1/1]" not in ended.err  # it was finished
    refused(command(*arguments, *few, "--seed", 1), "settings.seed: 0 -> 1", "found.weights: [")


def test_a_folder_of_something_else_is_refused_with_the_differences(
    two_points, arguments, command, given, tmp_path
):
    out = shutil.copytree(two_points[0], tmp_path / "out")
    before = content(out)
    refused(
        command(*arguments, "--out", out, "--points", 5, "--seed", 1),
        "--out: expected a new folder, or one of the same configuration",
        "\n  settings.points: 3 -> 5\n",
        "\n  settings.seed: 0 -> 1\n",
    )
    others = [a.replace("b.safetensors", "c.safetensors") for a in arguments]
    save_file(net(2).state_dict(), given / "c.safetensors")
    refused(command(*others, "--out", out), "found.weights: [", "other weights")
    refused(command(*arguments[:6], *arguments[8:], "--out", out), "found.weights: [")
    assert content(out) == before
    shutil.copy(given / "b.safetensors", given / "c.safetensors")  # the same by another name
    assert command(*others, "--out", out).code == 0
    assert numbers(out) == {k: v for k, v in before.items() if k.suffix in (".csv", ".png", ".svg")}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    refused(command(*arguments, "--out", tmp_path / "full"), "which holds other files")


def test_normalization_statistics_are_gathered_at_each_point(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    with torch.random.fork_rng():
        a, b = build(0), build(1)
    b[1].running_mean.fill_(3.0)  # of no account
    found = profile_model(a, examples(), tmp_path / "out", other=b, settings=QUICK)
    table = found.tables["curvature"]
    assert (table["norm_examples"] == 48).all()
    obj = Objective(b, "cross_entropy", examples()).recalibrated()
    assert table["loss"][-1] == pytest.approx(obj.loss(), rel=1e-5)
    assert "re-estimated at every point" in found.report.read_text()


def test_where_an_end_is_the_highest_point_the_middle_is_taken(tmp_path):
    store = TaskStore(tmp_path)
    for highest, place in ((0.0, 0.5), (0.3, 0.3), (1.0, 0.5)):
        store.finish(profile_tasks.BAND, {"saddle": {"position": highest}}, 0.0)
        assert profile_tasks.place_of(store, "between") == place
    assert [profile_tasks.place_of(store, name) for name in "AB"] == [0.0, 1.0]


def test_replicas_that_diverge_are_counted_and_the_rest_is_kept(tmp_path):
    settings = ProfileSettings(**{**FEW, "lr": 1e30}, density_probes=2, density_steps=8)
    found = profile_model(net(0), examples(), tmp_path / "out", other=net(1), settings=settings)
    moved = found.tables["displacement"].where(panel="k = 15")
    assert (moved["diverged"] == 2).all() and np.isnan(moved["displacement"]).all()
    assert "replicas diverged" in found.report.read_text()
    json.loads((found.path / "summary.json").read_text(), parse_constant=lambda name: 1 / 0)


def test_text_that_comes_from_the_user_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    named = dict.fromkeys(("model", "weights", "data"), evil)
    model = net()
    type_ = type(evil, (nn.Sequential,), {})
    found = profile_model(type_(*model), examples(), tmp_path / "out", named=named, settings=QUICK)
    html = found.report.read_text()
    assert "<script>alert" not in html and html.count("&lt;script&gt;") >= 5


# -- refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "options", "words"),
    [
        ("nowhere", "data", [], ["MODULE:FACTORY: expected a name in", "build"]),
        ("data", "data", [], ["MODULE:FACTORY: expected an nn.Module from", "tuple"]),
        ("build", "nowhere", [], ["--data: expected a name in"]),
        ("build", "bad_labels", [], ["labels in 0 .. 2 (the model has 3 outputs), got 3"]),
        ("build", "wide", [], ["data: expected inputs that the model takes", "[8, 8]"]),
        ("build", "noise", [], ["data that can be read many times", "a one-shot iterator"]),
        ("half", "data", [], ["model: expected float32 or float64", "model.float()"]),
        ("dropout", "data", [], ["model: expected the same outputs for the same inputs"]),
        ("build", "data", ["--loss", "hinge"], ["--loss: expected one of 'cross_entropy', 'mse'"]),
        ("build", "data", ["--loss", "mse"], ["targets: expected the outputs' shape"]),
        ("build", "data", ["--norm", "layer"], ["--norm: expected one of"]),
        ("build", "data", ["--examples", "49"], ["examples: expected at most the 48 there are"]),
        ("build", "data", ["--batch-size", "49"], ["batch_size: expected at most the 48", "49"]),
        ("build", "data", ["--points", "2"], ["points: expected an integer of at least 3"]),
        ("build", "data", ["--device", "tpu"], ["--device: expected one of"]),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    command, given, tmp_path, model, data, options, words
):
    mine = given / "mine.py"
    out = tmp_path / "out"
    ended = command(
        "profile", f"{mine}:{model}", "--data", f"{mine}:{data}", "--out", out, *options
    )
    refused(ended, *words)
    assert not out.exists()


def test_a_block_of_weights_from_a_checkpoint(command, given, tmp_path):
    mine, out = given / "mine.py", tmp_path / "out"
    torch.save({"model": nn.DataParallel(net(3)).cpu().state_dict()}, tmp_path / "a.pt")
    base = ["profile", f"{mine}:build", "--data", f"{mine}:data", "--weights", tmp_path / "a.pt"]
    few = ["--probes=4", "--density-probes=2", "--density-steps=8"]
    head = ["--parameters", "2.weight", "--parameters", "*.2.bias", "--out", out]
    refused(command(*base, *few, *head), "parameters: expected", "'*.2.bias', which matches none")
    head[3] = "2.b*"
    assert command(*base, *few, *head).code == 0
    model = net(3)
    obj = Objective(model, "cross_entropy", examples(), parameters=model[2])
    dense = torch.linalg.eigvalsh(HessianOperator(obj) @ torch.eye(obj.num_params))
    rows = Table.from_csv(out / "data" / "eigenvalues.csv").rows()
    row = next(r for r in rows if r["which"] == "largest" and r["rank"] == 1)
    assert abs(row["eigenvalue"] - float(dense[-1])) <= row["residual"] + 1e-5
    ended = command(*base, *few, "--parameters", "0", "--out", out)
    refused(ended, "chosen: ['2.weight', '2.bias'] -> ['0.weight', '0.bias']")


def test_weights_that_make_no_path_are_refused(command, given, tmp_path):
    mine, a = given / "mine.py", given / "a.safetensors"
    base = ["profile", f"{mine}:build", "--data", f"{mine}:data", "--out", tmp_path / "out"]
    refused(command(*base, *["--weights", a] * 2), "other: expected another point than the first")
    refused(command(*base, *["--weights", a] * 3), "--weights: expected one file, or two, got 3")
    save_file(nn.Linear(4, 3).state_dict(), tmp_path / "small.safetensors")
    refused(command(*base, "--weights", tmp_path / "small.safetensors"), "0.weight, 0.bias")
    refused(command(*base, "--weights", tmp_path / "absent.safetensors"), "absent.safetensors")
    assert not (tmp_path / "out").exists()


def test_points_that_differ_beyond_their_parameters_are_refused(tmp_path):
    a, b = net(0), net(1)
    with pytest.raises(ValueError, match=r"other: .*same architecture.*0\.weight \(6, 4\)"):
        profile_model(a, examples(), tmp_path / "x", other=nn.Linear(4, 3), settings=QUICK)
    for model in (a, b):
        model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"other: .*the same buffers.*frozen parameters"):
        profile_model(a, examples(), tmp_path / "x", other=b, settings=QUICK)
    with pytest.raises(ValueError, match=r"other: .*the same buffers.*frozen parameters"):
        profile_model(a, examples(), tmp_path / "x", other=b, settings=QUICK, parameters=a[2])
    batches = [
        (torch.ones(n, length, 4), torch.ones(n, length).long()) for n, length in ((2, 3), (1, 2))
    ]

    class Words(nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(1, 2)

    one, two = Words(4, 3), Words(4, 3)
    with pytest.raises(ValueError, match="data: expected examples of one shape"):
        profile_model(one, batches, tmp_path / "x", other=two, settings=QUICK)


def test_a_folder_in_which_nothing_was_computed_takes_the_corrected_command(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(profile_tasks, "measure_spectra", full)
        with pytest.raises(RuntimeError, match="spectra/point: no room"):
            profile_model(net(), examples(), tmp_path / "out", settings=QUICK)
    found = profile_model(net(1), examples(), tmp_path / "out", settings=QUICK)
    assert found.report.exists()


# -- models of others -----------------------------------------------------------------------

SMALL = ProfileSettings(
    examples=8, probes=2, density_probes=2, density_steps=5, eigenvalues=1, tol=0.2
)


@pytest.mark.slow
def test_torchvisions_resnet18(tmp_path):
    from torchvision.models import resnet18

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = resnet18(num_classes=10), torch.randn(8, 3, 32, 32)
    found = profile_model(model, (x, torch.arange(8)), tmp_path / "out", settings=SMALL)
    assert found.methods["point"]["Hessian"] == "graph"
    (point,) = found.tables["points"].rows()
    assert point["hessian_trace"] > 0 and point["fisher_trace"] > 0


@pytest.mark.slow
def test_a_small_transformer(tmp_path):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.out = nn.Linear(16, 2)

        def forward(self, tokens):
            return self.out(self.encoder(self.embed(tokens)).mean(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b, x = Classifier(), Classifier(), torch.randint(0, 20, (64, 8))
    y = (x == 3).any(1).long()
    settings = ProfileSettings(**{**FEW, "examples": 32}, density_probes=2, density_steps=10)
    found = profile_model(a, (x, y), tmp_path / "out", other=b, settings=settings)
    assert set(found.methods) == {"A", "between", "B"}
    assert (found.tables["displacement"]["diverged"] == 0).all()
