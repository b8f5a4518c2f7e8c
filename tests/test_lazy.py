"""Images that are decoded on demand are those that would be read at once; and what is made ahead of its consumer."""

import os
import shutil
import threading
import time
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from adv2_jax import cli, explain
from adv2_jax.attacks import attack, batches, no_map
from adv2_jax.data import ImageSet, load, photos
from adv2_jax.data.lazy import LazyImages, ahead, behind
from adv2_jax.identity import tree_fingerprint
from adv2_jax.runs.select import select
from adv2_jax.training.loop import Recipe, _augment, _augmentations

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 6, 5, 3), np.uint8)


class Source:
    """An array as a source of images, which counts what is decoded."""

    def __init__(self, pixels=PIXELS):
        self.pixels, self.decoded = pixels.copy(), []
        self.images = LazyImages([f"{i}.png" for i in range(len(pixels))], self.decode)
        self.decoded.clear()  # the first image, which told the size

    def decode(self, i):
        self.decoded.append(i)
        return self.pixels[i].copy()


INDICES = {
    "number": 3,
    "last": -1,
    "slice": slice(2, 9, 3),
    "all": slice(None),
    "integers": np.array([7, 0, 7, 3]),
    "booleans": np.arange(10) % 3 == 1,
    "none": np.zeros(0, int),
    "list": [4, 2],
}


@pytest.mark.parametrize("key", INDICES.values(), ids=INDICES)
def test_it_is_read_like_an_array(key):
    source = Source()
    got, expected = source.images[key], PIXELS[key]
    np.testing.assert_array_equal(got, expected)
    assert (got.dtype, got.shape) == (np.uint8, expected.shape)
    assert sorted(source.decoded) == sorted(np.arange(10)[key].ravel())


def test_what_is_known_without_decoding():
    source = Source()
    images = source.images
    assert (len(images), images.shape, images.dtype, images.ndim) == (
        10,
        (10, 6, 5, 3),
        np.uint8,
        4,
    )
    view = images.take(np.arange(10) > 3).take(slice(None, None, 2)).take([2, 0])
    assert view.shape == (2, 6, 5, 3) and source.decoded == []
    np.testing.assert_array_equal(view, PIXELS[[8, 4]])
    np.testing.assert_array_equal(np.asarray(view, np.float32), PIXELS[[8, 4]].astype(np.float32))
    with pytest.raises(IndexError):
        images[10]
    np.testing.assert_array_equal(list(images), PIXELS)


def test_a_set_stays_on_demand_until_it_is_decoded():
    source = Source()
    image_set = ImageSet(source.images, np.arange(10, dtype=np.int32))
    taken = image_set.take(np.arange(10) % 2 == 1).take(np.array([4, 0]))
    assert taken.labels.tolist() == [9, 1] and source.decoded == []
    decoded = taken.decode()
    assert type(decoded.images) is np.ndarray
    np.testing.assert_array_equal(decoded.images, PIXELS[[9, 1]])
    assert ImageSet(PIXELS).decode().images is PIXELS


def folder_of(path, pixels=PIXELS):
    for i, image in enumerate(pixels):
        path.mkdir(exist_ok=True)
        Image.fromarray(image).save(path / f"{i}.png")
    return path


def test_folders_are_read_on_demand(tmp_path, monkeypatch):
    names = []
    read = photos.read
    monkeypatch.setattr(
        photos, "read", lambda path, *size: (names.append(path.name), read(path, *size))[1]
    )
    images = load(folder_of(tmp_path / "photos"), size=4, sample=7, seed=2).take(np.arange(7) > 2)
    assert len(names) == 1  # the first of the sample, which told the size
    expected = [photos.fit(PIXELS[i], 4) for i in images.positions]
    np.testing.assert_array_equal(images.images, expected)
    assert [f"{i}.png" for i in images.positions] == images.names.tolist()


def test_damage_is_met_before_any_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "net.py").write_text(
        "import jax\n\n@jax.tree_util.register_static\nclass Net:\n"
        "    def logits(self, image, act=None):\n        return 10 * image.mean((0, 1))\n"
    )
    photographs = folder_of(tmp_path / "photos")
    data = (photographs / "7.png").read_bytes()
    (photographs / "7.png").write_bytes(data[: len(data) // 2])
    words = (
        f"attack --model {tmp_path}/net.py:Net --images {photographs} --interpreter grad".split()
    )
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([*words, "--batch-size", "2", "--out", "run"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"adv2: cannot read {photographs}/7.png: ")
    assert err.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


def test_sizes_that_differ_are_met_when_they_are_decoded(tmp_path):
    Image.fromarray(PIXELS[0][:, :3]).save(folder_of(tmp_path / "photos") / "4.png")
    images = load(tmp_path / "photos").images
    assert len(images[:4]) == 4
    with pytest.raises(ValueError, match=r"^0\.png is 5 x 6 pixels, 4\.png 3 x 6: --size N brings"):
        images[2:6]
    assert load(tmp_path / "photos", size=4).images[:].shape == (10, 4, 4, 3)


def test_libtiff_says_nothing_on_stderr_whatever_the_number_of_threads(tmp_path, capfd):
    whole = tmp_path / "0.tiff"
    Image.fromarray(np.resize(PIXELS, (64, 64, 3))).save(whole, compression="tiff_lzw")
    data = whole.read_bytes()
    for i in range(1, 9):
        (tmp_path / f"{i}.tiff").write_bytes(data[:200] + b"\xff" * 60 + data[260:])
    images = load(tmp_path).images
    for i in range(1, 9):
        with pytest.raises(ValueError, match=f"cannot read .*{i}.tiff"):
            images[i:]
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


# The fingerprint


def test_the_fingerprint_costs_no_second_reading_and_knows_every_pixel(tmp_path):
    source = Source()
    for batch in batches(source.images, 4):
        assert len(batch) == 4
    source.decoded.clear()
    image_set = ImageSet(source.images, np.zeros(10, np.int32))
    read = tree_fingerprint(image_set)
    assert source.decoded == []
    fresh = Source()
    assert (
        tree_fingerprint(image_set._replace(images=fresh.images)) == read
    )  # reads what is missing
    assert sorted(fresh.decoded) == list(range(10))
    for i, change in ((9, 1), (0, 128)):
        pixels = PIXELS.copy()
        pixels[i, 5, 4, 2] ^= change
        edited = image_set._replace(images=Source(pixels).images)
        assert tree_fingerprint(edited) != read
    turned = image_set._replace(images=Source(PIXELS.reshape(10, 5, 6, 3)).images)
    others = [turned, image_set.take(np.arange(10)[::-1]), image_set.take(np.arange(9))]
    assert read not in map(tree_fingerprint, others)


def test_the_fingerprint_of_a_folder_is_that_of_its_copy(tmp_path):
    one = folder_of(tmp_path / "one")
    shutil.copytree(one, tmp_path / "two", copy_function=shutil.copy)
    os.utime(tmp_path / "two" / "3.png", (0, 0))
    assert tree_fingerprint(load(one)) == tree_fingerprint(load(tmp_path / "two"))
    Image.fromarray(255 - PIXELS[3]).save(tmp_path / "two" / "3.png")
    assert tree_fingerprint(load(one)) != tree_fingerprint(load(tmp_path / "two"))


def test_a_file_that_changes_between_two_readings_is_refused():
    source = Source()
    source.images[:]
    source.pixels[6, 0, 0, 0] ^= 1
    assert source.images.take([5, 7])[:].shape == (2, 6, 5, 3)
    with pytest.raises(ValueError, match=r"^6\.png has changed since it was first read$"):
        source.images.take([5, 6])[:]


# Consumers


class Mean(nnx.Module):
    """Logits are the mean colours."""

    def features(self, image, act=None):
        return image

    def head(self, features):
        return 10 * jnp.mean(features, axis=(0, 1))


def test_maps_logits_and_attacks_are_those_of_the_array():
    labels = np.arange(10) % 3
    for source in (Source(), Source(PIXELS[:1])):
        n = len(source.images)
        for interpreter in (no_map, "cam"):
            for got, expected in zip(
                *(
                    explain(Mean(), x, labels[:n], interpreter=interpreter, batch_size=4)
                    for x in (source.images, source.pixels)
                ),
                strict=True,
            ):
                np.testing.assert_array_equal(got, expected)
    options = {"interpreter": None, "steps": 2, "warm_steps": 0}
    one, other = (attack(Mean(), x, labels, **options).images for x in (Source().images, PIXELS))
    np.testing.assert_array_equal(one, other)


def test_augmented_batches_are_those_of_the_array():
    recipe = Recipe(epochs=1, batch_size=4, learning_rate=0.1, weight_decay=0.1, shift=2)
    for draw in _augmentations(10, recipe):
        np.testing.assert_array_equal(_augment(Source().images, draw), _augment(PIXELS, draw))


def test_selection_reads_each_image_once_and_holds_a_few_batches():
    """Whole, the images take 12.6 MB, and four times as much as float32."""
    n, side, size = 256, 128, 4
    brightest = np.arange(n) % 3
    decoded = []

    def decode(i):
        decoded.append(i)
        image = np.full((side, side, 3), i % 50, np.uint8)
        image[..., brightest[i]] = 100 + i % 50
        return image

    images = LazyImages([str(i) for i in range(n)], decode)
    image_set = ImageSet(images, brightest.astype(np.int32))
    select(Mean(), image_set.take(np.arange(size)), batch_size=size)  # compiles
    decoded.clear()
    tracemalloc.start()
    selection = select(Mean(), image_set, batch_size=size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(selection.indices) == n and sorted(decoded) == list(range(n))
    # three batches of uint8, waiting or at work, and two copies of one in float32: 11 of 64
    assert peak < n * side**2 * 3 / 4
    assert isinstance(selection.images.images, LazyImages)


# Reading ahead


def test_items_come_in_order_each_made_while_the_one_before_is_used():
    made = [threading.Event() for _ in range(5)]

    def items():
        for i, event in enumerate(made):
            event.set()
            yield i

    seen = []
    for i in ahead(items()):
        assert i == 4 or made[i + 1].wait(10)
        assert i + 2 > 4 or not made[i + 2].wait(0.02)  # no more than one waits
        seen.append(i)
    assert seen == list(range(5)) and list(ahead([])) == []


@pytest.mark.parametrize("error", [ValueError("no image"), KeyboardInterrupt()], ids=repr)
def test_what_making_an_item_raises_is_raised_in_its_place(error):
    def items():
        yield 0
        raise error

    threads, made = threading.active_count(), ahead(items())
    assert next(made) == 0
    with pytest.raises(type(error)):
        next(made)
    assert threading.active_count() == threads and list(made) == []


def test_a_consumer_that_stops_early_leaves_no_thread():
    threads, source = threading.active_count(), Source()
    for batch in ahead(batches(source.images, 2)):
        assert len(batch) == 2
        break
    assert threading.active_count() == threads and len(source.decoded) <= 4
    made = ahead(iter(range(5)))
    next(made)
    with pytest.raises(KeyboardInterrupt):
        made.throw(KeyboardInterrupt)
    assert threading.active_count() == threads


# Writing behind


def test_calls_are_made_in_order_while_the_caller_goes_on():
    done, free = [], threading.Event()

    def work(i):
        assert free.wait(10)
        done.append(i)

    threads = threading.active_count()
    with behind(work, waiting=2) as call:
        call(0)
        call(1)
        assert done == []  # the caller went on
        threading.Timer(0.05, free.set).start()
        call(2)  # the queue is full: waits for the oldest
        assert done[0] == 0
    assert done == [0, 1, 2] and threading.active_count() == threads


def test_nothing_is_done_after_an_error_which_is_raised_at_the_next_call_or_at_the_end():
    done, failed = [], threading.Event()

    def work(i):
        done.append(i)
        failed.set()
        raise ValueError(f"no room for {i}")

    with pytest.raises(ValueError, match=r"^no room for 0$"), behind(work, waiting=3) as call:
        call(0)
        call(1)
    assert done == [0]
    with pytest.raises(ValueError, match=r"^no room for 5$"), behind(work, waiting=1) as call:
        call(5)
        call(6)
        raise AssertionError("the error is known by now")
    assert done == [0, 5]


def test_a_block_that_ends_early_waits_for_what_it_has_called():
    done, started = [], threading.Event()

    def work(i):
        started.set()
        time.sleep(0.05)
        done.append(i)

    with pytest.raises(KeyboardInterrupt), behind(work, waiting=3) as call:
        call(0)
        call(1)
        assert started.wait(10)
        raise KeyboardInterrupt
    assert done == [0, 1]
