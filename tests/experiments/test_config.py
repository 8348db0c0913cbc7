import json

import pytest

from entropic_fast.experiments import _config as config
from entropic_fast.experiments._config import differences, from_dict, load_preset


@pytest.mark.parametrize("name", config.presets())
def test_every_preset_loads_and_survives_json(name):
    loaded = load_preset(name)
    assert loaded.preset == name
    assert from_dict(json.loads(json.dumps(loaded.to_dict()))) == loaded


def test_the_presets_are_those_of_the_help():
    assert config.presets() == ("demo", "paper", "small")


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.epochs=3", "train", "epochs", 3),
        ("train.lr=1e-3", "train", "lr", 1e-3),
        ("train.lr=1", "train", "lr", 1.0),
        ("train.augment=true", "train", "augment", True),
        ("path.pairs=[[2, 0]]", "path", "pairs", ((2, 0),)),
        ("relax.starts=[]", "relax", "starts", ()),
        ("relax.starts=[0, 0.5]", "relax", "starts", (0.0, 0.5)),
        ('model.name="resnet20"', "model", "name", "resnet20"),
        ("model.name=resnet20", "model", "name", "resnet20"),  # a shell takes the quotes away
        (" train.epochs = 3", "train", "epochs", 3),
    ],
)
def test_an_override_is_read_as_toml(override, section, key, value):
    got = getattr(getattr(load_preset("demo", [override]), section), key)
    assert got == value and type(got) is type(value)


def test_the_last_override_wins_and_top_level_keys_can_be_overridden():
    loaded = load_preset("demo", ["seed=1", "seed=7"])
    assert loaded.seed == 7


def test_differences_list_what_differs_and_nothing_else():
    changed = load_preset("demo", ["train.epochs=3", "path.lrs=[1,2,3,4]", "seed=5"])
    assert differences(load_preset("demo"), changed) == [
        "path.lrs: [0.1, 0.05, 0.02, 0.005] -> [1.0, 2.0, 3.0, 4.0]",
        "seed: 0 -> 5",
        "train.epochs: 100 -> 3",
    ]
    assert differences(changed, changed) == []


def test_an_unknown_preset_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"preset: expected one of 'demo', 'paper', 'small'.*huge"):
        load_preset("huge")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"train\.epoch: expected one of seeds, epochs.*unknown key"),
        ("training.epochs=3", r"training: expected one of preset, seed, data.*unknown key"),
        ("train=3", "train: expected a section, got 3"),
        ("train.epochs.x=3", "--set: expected section.key=value, got 'train.epochs.x=3'"),
        ("train.epochs", "--set: expected section.key=value, got 'train.epochs'"),
        ("=3", "--set: expected section.key=value"),
        ("train.=3", "--set: expected section.key=value"),
        ("preset=paper", "--set: .*use --preset"),
        ("train.epochs=2.5", "train.epochs: expected a value of type int, got 2.5"),
        ("train.epochs=true", "train.epochs: expected a value of type int, got True"),
        ("train.lr=fast", "train.lr: expected a value of type float, got 'fast'"),
        ("train.augment=1", "train.augment: expected a value of type bool, got 1"),
        ("train.seeds=3", "train.seeds: expected a list, got 3"),
        ("path.pairs=[[0,1", "path.pairs: expected a list, got "),
        ("path.pairs=[[0,1,2]]", r"path.pairs: expected a list of 2, got \[0, 1, 2\]"),
        ("path.pairs=[[0,3]]", r"path.pairs: expected two different seeds of \(0, 1, 2\)"),
        ("path.pairs=[[1,1]]", "path.pairs: expected two different seeds"),
        ("path.pairs=[[0,1],[0,1]]", "path.pairs: expected at least one entry, and none twice"),
        ("path.pairs=[]", "path.pairs: expected at least one entry"),
        ("path.seeds=[]", "path.seeds: expected at least one entry"),
        ("train.seeds=[0]", "train.seeds: expected at least two different"),
        ("train.seeds=[0,1,2,2]", "train.seeds: expected at least two different"),
        ("path.steps=[1]", "path.steps: expected as many cycles as path.lrs"),
        ("path.steps=[1,1,1,0]", "path.steps: expected a finite number of at least 1, got 0"),
        ("path.pivots=2", "path.pivots: expected a finite number of at least 3"),
        ("path.max_pivots=5", r"path.max_pivots: expected at least path.pivots \(9\), got 5"),
        ("train.epochs=0", "train.epochs: .*at least 1, got 0"),
        ("train.lr=-0.1", "train.lr: expected a finite number above 0, got -0.1"),
        ("train.lr=0", "train.lr: expected a finite number above 0"),
        ("train.lr=nan", "train.lr: expected a finite number"),
        ("train.lr=inf", "train.lr: expected a finite number"),
        ("train.momentum=1.0", r"train.momentum: expected a number in \[0, 1\), got 1.0"),
        (
            "relax.starts=[0.5,1.5]",
            r"relax.starts: expected positions in \[0, 1\], got \(0.5, 1.5\)",
        ),
        ("relax.start=-0.5", "relax.start: .*at least 0, got -0.5"),
        ("relax.records=0", "relax.records: .*at least 1"),
        ("relax.lrs=[]", "relax.lrs: expected at least one entry"),
        ("relax.optimizers=['lion']", "relax.optimizers: expected one of 'sgd'.*got 'lion'"),
        ("lmc.branch_epochs=[0,41]", r"lmc.branch_epochs: expected at most 26.*\[0, 41\]"),
        ("lmc.seeds=[0,0]", "lmc.seeds: .*none twice"),
        ("langevin.temperature=0", "langevin.temperature: expected a finite number above 0"),
    ],
)
def test_a_bad_override_is_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        load_preset("demo", [override])


@pytest.mark.parametrize("document", [{}, {"preset": 3}, [], {"preset": "demo", "train": []}])
def test_a_stored_document_that_is_no_configuration_is_refused(document):
    with pytest.raises(ValueError, match="expected"):
        from_dict(document)


def test_the_force_is_measured_at_no_more_places_than_a_path_has_segments():
    assert load_preset("demo", ["force.positions=8"]).force.positions == 8
    with pytest.raises(ValueError, match=r"force\.positions: expected at most the 8 segments"):
        load_preset("demo", ["force.positions=9"])
