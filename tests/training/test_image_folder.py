import os

import numpy as np
import pytest
import torch
from PIL import Image

from entropic_fast.training import _image_folder as folders
from entropic_fast.training.data import load


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ENTROPIC_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, seed=0, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) + (() if mode == "L" else (len(mode),))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode=None).save(path)
    return pixels


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "set"
    for split, n in (("train", 3), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(n):
                write(root / split / name / f"{i}.png", seed=10 * c + i)
    return root


def test_a_tree_is_read_in_alphabetical_order(tree):
    train, test = load("pets", tree)
    assert train.class_names == ("cat", "dog") and train.name == "pets"
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]
    assert train.images.shape == (6, 3, 4, 6)  # [N, C, H, W] of images 6 wide and 4 high
    pixels = write(tree.parent / "again.png", seed=11)
    assert torch.equal(train.images[4], torch.from_numpy(pixels).permute(2, 0, 1))
    x = train.images.double() / 255
    assert train.mean == pytest.approx(x.mean((0, 2, 3)).tolist())
    assert train.std == pytest.approx(x.std((0, 2, 3), correction=0).tolist())
    assert test.mean == train.mean


def test_the_second_reading_comes_from_the_cache(tree, cache, monkeypatch):
    first = load("pets", tree)
    assert len(list(cache.iterdir())) == 2

    def fail(path):
        raise AssertionError("decoded again")

    monkeypatch.setattr(folders, "_read_image", fail)
    again = load("pets", tree)
    assert [a.hash for a in again] == [f.hash for f in first]


@pytest.mark.parametrize("change", ["content", "added", "removed"])
def test_a_changed_tree_is_decoded_again(tree, change):
    before = load("pets", tree)[0].hash
    path = tree / "train" / "cat" / "0.png"
    if change == "content":
        write(path, seed=99)
        os.utime(path, ns=(1, 1))
    elif change == "added":
        write(tree / "train" / "cat" / "7.png", seed=7)
    else:
        path.unlink()
    assert load("pets", tree)[0].hash != before


@pytest.mark.parametrize("damage", ["weights", "manifest"])
def test_a_damaged_cache_is_decoded_again(tree, cache, damage):
    before = load("pets", tree)[0].hash
    for file in cache.glob("*.safetensors" if damage == "weights" else "*.json"):
        file.write_bytes(file.read_bytes()[:-3])
    assert load("pets", tree)[0].hash == before
    assert load("pets", tree)[0].hash == before


def test_a_cache_that_cannot_be_written_is_a_warning(tree, cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.store, "save_tensors", full)
    with pytest.warns(RuntimeWarning, match="could not be kept.*ENTROPIC_FAST_CACHE"):
        train, _ = load("pets", tree)
    assert len(train) == 6


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("ENTROPIC_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folders.cache_dir() == tmp_path / "entropic_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folders.cache_dir() == tmp_path / "home" / ".cache" / "entropic_fast"


def test_gray_images_keep_one_channel_unless_mixed(tree):
    for path in tree.rglob("*.png"):
        write(path, mode="L")
    assert load("pets", tree)[0].images.shape[1] == 1
    write(tree / "test" / "dog" / "0.png", mode="RGB")
    train, _ = load("pets", tree)
    assert train.images.shape[1] == 3
    assert torch.equal(train.images[:, 0], train.images[:, 2])


def test_transparency_palettes_and_upper_case_are_read(tree):
    write(tree / "train" / "cat" / "0.png", mode="RGBA")
    Image.open(tree / "train" / "cat" / "1.png").convert("P").save(tree / "train" / "cat" / "1.png")
    (tree / "train" / "cat" / "2.png").rename(tree / "train" / "cat" / "2.PNG")
    assert load("pets", tree)[0].images.shape == (6, 3, 4, 6)


def test_other_and_hidden_files_are_passed_over(tree):
    (tree / "train" / "cat" / "notes.txt").write_text("x")
    (tree / "train" / "cat" / ".hidden.png").write_text("x")
    (tree / "train" / ".cache").mkdir()
    (tree / "train" / "README.png").write_text("a file, not a class")
    assert len(load("pets", tree)[0]) == 6


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_a_corrupt_image_is_named(tree, content):
    path = tree / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if content == "truncated" else content)
    with pytest.raises(ValueError, match=r"dog.1\.png.*delete"):
        load("pets", tree)


def test_an_image_of_more_than_8_bits_is_named(tree):
    deep = np.full((4, 6), 60000, dtype=np.uint16)
    Image.fromarray(deep).save(tree / "train" / "dog" / "1.png")
    with pytest.raises(ValueError, match=r"dog.1\.png.*more than 8 bits"):
        load("pets", tree)


def test_an_image_of_another_size_is_named(tree):
    write(tree / "test" / "dog" / "1.png", size=(7, 4))
    with pytest.raises(ValueError, match=r"one size \(6 x 4.*got 7 x 4 in .*dog.1\.png"):
        load("pets", tree)


def test_sizes_are_compared_before_anything_is_decoded(tree, monkeypatch):
    write(tree / "test" / "dog" / "1.png", size=(7, 4))
    monkeypatch.setattr(folders, "_read_image", lambda path: pytest.fail(f"{path} was decoded"))
    with pytest.raises(ValueError, match="one size"):
        load("pets", tree)
    (tree / "test" / "dog" / "1.png").unlink()
    write(tree / "test" / "dog" / "1.png")
    monkeypatch.setattr(folders, "available_bytes", lambda device: 100)
    with pytest.raises(ValueError, match="that fit twice in the 100 bytes free"):
        load("pets", tree)


@pytest.mark.parametrize("kind", ["file", "class", "split"])
def test_a_link_out_of_the_folder_is_refused(tree, tmp_path, kind):
    outside = tmp_path / "outside" / "bird"
    write(outside / "0.png")
    link, target = {
        "file": (tree / "train" / "cat" / "9.png", outside / "0.png"),
        "class": (tree / "train" / "bird", outside),
        "split": (tree / "train", outside.parent),
    }[kind]
    if kind == "split":
        (tree / "train").rename(tmp_path / "old")
    link.symlink_to(target)
    with pytest.raises(ValueError, match=r"links that stay inside.*outside"):
        load("pets", tree)


def test_links_that_lead_to_one_another_are_refused(tree):
    one, other = (tree / "train" / "cat" / name for name in ("one.png", "other.png"))
    one.symlink_to(other)
    other.symlink_to(one)
    with pytest.raises(ValueError, match="links that stay inside"):
        load("pets", tree)


def test_a_link_inside_the_folder_is_followed(tree):
    (tree / "train" / "cat" / "9.png").symlink_to(tree / "train" / "cat" / "0.png")
    assert len(load("pets", tree)[0]) == 7


def test_a_link_to_the_folder_itself_is_followed(tree, tmp_path):
    (tmp_path / "link").symlink_to(tree)
    assert len(load("pets", tmp_path / "link")[0]) == 6


def test_a_tree_without_its_parts_is_refused(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("pets", tmp_path / "nowhere")
    (tree / "train" / "fox").mkdir()
    with pytest.raises(ValueError, match=r"at least one image.*fox"):
        load("pets", tree)
    write(tree / "train" / "fox" / "0.png")
    with pytest.raises(ValueError, match=r"the same classes.*'fox'"):
        load("pets", tree)
    with pytest.raises(ValueError, match="a folder 'train'"):
        load("pets", tree / "train")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="one folder a class"):
        load("pets", tmp_path / "empty")


def test_a_folder_called_cifar10_must_have_ten_classes(tree):
    with pytest.raises(ValueError, match="10 classes for 'cifar10', got 2"):
        load("cifar10", tree)
