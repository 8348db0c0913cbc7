"""The user's model, weights and data: found, or refused with what to do."""

import textwrap

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from entropic_fast.profile import _user_code as sources


@pytest.fixture
def module(tmp_path):
    """A .py file with factories good and bad."""
    file = tmp_path / "mynet.py"
    code = """
    import beside
    from torch import nn, ones

    model = nn.Linear(2, 3)
    number = 3
    _hidden = print

    class Net(nn.Linear):
        def __init__(self):
            super().__init__(2, beside.CLASSES)

    class Place:
        build = Net

    def sized(width):
        return nn.Linear(2, width)

    def optional(width=3):
        return nn.Linear(2, width)

    def state():
        return Net().state_dict()

    def broken():
        return [][0]

    def pair():
        return ones(4, 2), ones(4).long()
    """
    file.write_text(textwrap.dedent(code))
    (tmp_path / "beside.py").write_text("CLASSES = 3\n")
    return file


@pytest.mark.parametrize("name", ["Net", "Place.build", "optional"])
def test_a_factory_in_a_file_finds_what_lies_beside_it(module, name):
    assert sources.model_from(f"{module}:{name}").out_features == 3


def test_a_file_is_run_once(module):
    first, second = (sources.model_from(f"{module}:Net") for _ in range(2))
    assert type(first) is type(second) and first is not second


def test_a_module_by_name_may_be_in_the_current_folder(module, monkeypatch):
    monkeypatch.chdir(module.parent)
    (module.parent / "by_name_net.py").write_text(module.read_text())
    assert sources.model_from("by_name_net:Net").out_features == 3
    assert sources.model_from("torch.nn:Identity")(3) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Absent", ["expected a name in", "'Absent', which is not there", "callable there", "Net"]),
        ("number", ["expected a callable without arguments, got int 3"]),
        ("model", ["expected a callable", "Linear, an nn.Module", "function that returns it"]),
        ("sized", ["without arguments, got sized(width)", "missing a required argument: 'width'"]),
        ("state", ["expected an nn.Module from", "got OrderedDict {'weight'", "the model itself"]),
        ("broken", ["to return, got IndexError: list index out of range", "mynet.py, line 26"]),
        ("pair", ["expected an nn.Module from", "tuple {shape [4, 2]"]),
    ],
)
def test_a_factory_that_does_not_serve_is_refused(module, name, words):
    with pytest.raises(ValueError, match=r"^model: expected") as refused:
        sources.model_from(f"{module}:{name}")
    for word in words:
        assert word in str(refused.value)
    assert "_hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("net", "expected MODULE:FACTORY"),
        ("net:", "expected MODULE:FACTORY"),
        (":build", "expected MODULE:FACTORY"),
        ("no_such_module:build", "'no_such_module', which is neither installed nor in"),
        ("torch.no_such_module:build", "'torch.no_such_module', which is neither installed"),
        ("no_such_file.py:build", "no_such_file.py, which is none; check the path"),
    ],
)
def test_a_module_that_is_not_there_is_refused(reference, words):
    with pytest.raises(ValueError, match=r"^model: expected") as refused:
        sources.model_from(reference)
    assert words in str(refused.value)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_module_that_fails_names_the_line(tmp_path, monkeypatch, by_name):
    monkeypatch.chdir(tmp_path)
    name = f"failing_{by_name}"
    (tmp_path / f"{name}.py").write_text("x = 1\nimport no_such_thing\n")
    place = name if by_name else f"{name}.py"
    for _ in range(2):  # nothing half-made is kept
        with pytest.raises(ValueError, match=r"to import, got ModuleNotFoundError.*line 2\)"):
            sources.model_from(f"{place}:build")


# -- data -----------------------------------------------------------------------------------


def test_data_come_from_a_file_a_folder_a_name_or_a_factory(module, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROPIC_FAST_CACHE", str(tmp_path / "cache"))
    save_file({"inputs": torch.ones(3, 2), "targets": torch.arange(3)}, tmp_path / "d.safetensors")
    inputs, targets = sources.data_from(str(tmp_path / "d.safetensors"))
    assert inputs.shape == (3, 2) and targets.tolist() == [0, 1, 2]
    assert sources.data_from(f"{module}:pair")[0].shape == (4, 2)
    assert len(sources.data_from("digits")[1]) == 1437
    for split in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            Image.new("L", (4, 5), i).save(tmp_path / "pets" / split / name / "1.png")
    for found in (
        sources.data_from(str(tmp_path / "pets")),
        sources.data_from("pets", tmp_path / "pets"),
    ):
        assert found[0].shape == (2, 1, 5, 4) and sorted(found[1].tolist()) == [0, 1]


def test_data_that_are_none_of_these_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data: expected one of 'digits'.*got 'mnist'"):
        sources.data_from("mnist")
    torch.save({"inputs": torch.ones(3, 2), "targets": torch.arange(3)}, tmp_path / "d.pt")
    assert sources.data_from(str(tmp_path / "d.pt"))[1].tolist() == [0, 1, 2]
    save_file({"x": torch.ones(3, 2)}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="expected tensors `inputs` and `targets`, got x"):
        sources.data_from(str(tmp_path / "d.safetensors"))
