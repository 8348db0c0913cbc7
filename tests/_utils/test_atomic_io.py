import json
import os

import pytest
import torch

from entropic_fast._utils import atomic_io as store


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "a.json"
    store.write_json(path, {"x": [1, 2.5, None], "y": "é"})
    assert store.read_json(path) == {"x": [1, 2.5, None], "y": "é"}
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_tensors_keep_values_types_and_shapes(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.float64).T,
        "empty": torch.zeros(0, 2),
        "count": torch.tensor(7),
        "pixels": torch.arange(6, dtype=torch.uint8),
    }
    store.save_tensors(path, tensors, {"seed": 3})
    read, manifest = store.load_tensors(path)
    assert manifest["seed"] == 3 and manifest["sha256"] == store.sha256(path.read_bytes())
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_weight_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "w.safetensors"
    store.save_tensors(path, {"a": torch.ones(100)}, {})
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[-1] ^= 1
    else:
        data = bytearray()
    path.write_bytes(data)
    with pytest.raises(store.DamagedFileError, match=r"w\.safetensors.*truncated or changed"):
        store.load_tensors(path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"not tensors")
    store.write_json(tmp_path / "w.json", {"sha256": store.sha256(b"not tensors")})
    with pytest.raises(store.DamagedFileError, match="not a safetensors file"):
        store.load_tensors(path)


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"a": 1'])
def test_a_broken_manifest_is_refused(tmp_path, text):
    path = tmp_path / "w.safetensors"
    store.save_tensors(path, {"a": torch.ones(1)}, {})
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(store.DamagedFileError, match=r"w\.json"):
        store.load_tensors(path)


def test_a_manifest_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    store.save_tensors(path, {"a": torch.ones(1)}, {})
    (tmp_path / "w.json").write_text("[1]")
    with pytest.raises(store.DamagedFileError):
        store.load_tensors(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        store.load_tensors(tmp_path / "none.safetensors")
    store.write_json(tmp_path / "none.json", {})
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        store.load_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    store.write_text(path, "old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        store.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    store.write_text(path, "old")

    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write_text(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        store.write_text(tmp_path / "file" / "a.txt", "x")


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    order = []
    write = store.write_bytes
    monkeypatch.setattr(
        store, "write_bytes", lambda path, data: (order.append(path.suffix), write(path, data))
    )
    store.save_tensors(tmp_path / "w.safetensors", {"a": torch.ones(1)}, {})
    assert order == [".safetensors", ".json"]


def test_gradients_and_views_can_be_saved(tmp_path):
    base = torch.randn(4, 4, requires_grad=True)
    store.save_tensors(tmp_path / "w.safetensors", {"p": base, "column": base[:, 1]}, {})
    read, _ = store.load_tensors(tmp_path / "w.safetensors")
    assert torch.equal(read["column"], base[:, 1].detach())


def test_json_is_plain_text(tmp_path):
    store.write_json(tmp_path / "a.json", {"b": 1})
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n") and json.loads(text) == {"b": 1}
