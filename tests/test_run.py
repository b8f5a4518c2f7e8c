"""A run: its images, its rows against its arrays, and that nothing that is finished is lost."""

import dataclasses
import errno
import json
import threading
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adv2_jax import explain, metrics, threats
from adv2_jax.attacks import attack, image_keys, noise
from adv2_jax.crafting import snapshot_steps
from adv2_jax.data import ImageSet, targets
from adv2_jax.data.lazy import LazyImages
from adv2_jax.files import read_arrays, read_summary
from adv2_jax.presets import resolve
from adv2_jax.runs import store
from adv2_jax.runs.run import Settings, run
from adv2_jax.runs.transfer import load_run, transfer_matrix


class Mean(nnx.Module):
    """Logits are the mean red, green and blue of the image: what it gets right is known."""

    def features(self, image, act=None):
        return image

    def head(self, features):
        return 10 * features.mean(axis=(0, 1))


def coloured(channels, labels):
    images = np.full((len(channels), 4, 4, 3), 100, np.uint8)
    for image, channel in zip(images, channels, strict=True):
        image[:2, :2, channel] = 140
    masks = np.zeros((len(channels), 4, 4), bool)
    masks[:, :2, :2] = True
    return ImageSet(images, np.array(labels, np.int32), objects=masks)


def test_rows_are_what_the_arrays_say(tmp_path):
    settings = Settings(("cam",), threats.linf(0.1), warm_steps=2, steps=20, batch_size=2)
    ticks = []
    images = coloured([0, 1, 2], [0, 1, 2])
    outcome = run(
        Mean(), images, settings, tmp_path, progress=lambda images, steps, done: ticks.append
    )
    arrays = read_arrays(tmp_path / "results.npz")
    for row in outcome.rows:
        attacked = {
            key.split("/")[-1]: value
            for key, value in arrays.items()
            if key.startswith(f"cam/{row['attack']}/")
        }
        difference = (attacked["images"].astype(float) - arrays["images"]) / 255
        # float32 means of a handful of values
        assert row["linf"] == pytest.approx(abs(difference).max(), rel=1e-5)
        assert row["l2"] == pytest.approx(np.sqrt((difference**2).sum((1, 2, 3))).mean(), rel=1e-5)
        # these classes are far apart: noise changes none, which leaves no mean over successes
        success, mc, work = {
            "noise": (0, None, 0),
            "pgd": (1, attacked["confidence"].mean(), 22),
            "adv2": (1, attacked["confidence"].mean(), 22),
        }[row["attack"]]
        assert row["asr"] == attacked["success"].mean() == success
        assert row["mc"] == (mc and pytest.approx(mc, rel=1e-6))
        apart = abs(attacked["maps"] - arrays["cam/target_maps"])
        np.testing.assert_allclose(attacked["map_l1"], apart.mean((1, 2)), rtol=1e-5)
        assert row["map_l1"] == pytest.approx(apart.mean(), rel=1e-5)
        assert row["linf"] <= 0.1
        # a tiny network: the weights of its head count
        assert row["gradient_evaluations"] == pytest.approx(work, rel=0.02)
        assert 0 <= row["pointing_game"] <= 1
        # the map of a colour is its channel, which is brightest on the object
        assert row["benign_pointing_game"] == 1
    assert [row["attack"] for row in outcome.rows] == ["noise", "pgd", "adv2"]
    assert sum(ticks) == 2 * 2 * 22  # PGD and ADV², two batches each; noise has no steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WithFunction:
    """A network one leaf of which is a function, as in Equinox."""

    weights: jax.Array
    last: Callable

    def logits(self, image, act=jax.nn.relu):
        return self.last(act(image.reshape(-1, 3) @ self.weights).mean(0))


def test_a_network_with_a_function_among_its_leaves_is_attacked(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    model = WithFunction(jnp.eye(3, 4), jnp.tanh)
    settings = Settings(["grad"], threats.linf(), steps=1, batch_size=2)
    outcome = run(model, ImageSet(images), settings, tmp_path)
    assert [row["n"] for row in outcome.rows] == [3, 3, 3]


def test_own_target_maps_of_another_size_are_refused(tmp_path):
    images = coloured([0], [0])._replace(target_maps=np.zeros((1, 3, 3), np.float32))
    with pytest.raises(
        ValueError, match=r"target_maps must be \[1, 4, 4\] for cam, got \[1, 3, 3\]"
    ):
        run(Mean(), images, Settings(("cam",), threats.linf()), tmp_path)


# Target maps.


def varied(n=7, seed=0):
    """Images whose colour says their class and whose pixels do not; each class twice at least."""
    images = coloured(np.arange(n) % 3, np.arange(n) % 3)
    noise = np.random.default_rng(seed).integers(-15, 16, images.images.shape)
    return images._replace(
        images=(images.images + noise).astype(np.uint8), classes=("red", "green", "blue")
    )


QUICK = Settings(("cam",), threats.linf(0.1), warm_steps=1, steps=8, batch_size=2)


def results(directory):
    return read_arrays(directory / "results.npz")


def test_patches_are_shown_wherever_the_image_stands(tmp_path):
    run(Mean(), varied(), QUICK._replace(target_map="patch", seed=4), tmp_path)
    arrays = results(tmp_path)
    for i, m in zip(arrays["indices"], arrays["cam/target_maps"], strict=True):
        np.testing.assert_array_equal(m, targets.patch((4, 4), seed=4, index=int(i)))
    assert {row["target_map"] for row in read_summary(tmp_path)["rows"]} == {"patch"}


def test_maps_of_other_images_are_those_of_images_of_the_target_class(tmp_path):
    source = varied()
    run(Mean(), source, QUICK._replace(target_map="image"), tmp_path)
    arrays = results(tmp_path)
    for i, t, m in zip(
        arrays["indices"], arrays["targets"], arrays["cam/target_maps"], strict=True
    ):
        donors = np.flatnonzero(source.labels == t)
        assert i not in donors
        _, maps = explain(Mean(), source.images[donors], np.full(len(donors), t), interpreter="cam")
        assert np.abs(maps - m).max((1, 2)).min() < 1e-6  # batches of another size
    assert {row["target_map"] for row in read_summary(tmp_path)["rows"]} == {"image"}


def test_own_maps_are_named_and_do_not_give_way(tmp_path):
    own = varied()._replace(target_maps=np.zeros((7, 4, 4), np.float32))
    run(Mean(), own, QUICK, tmp_path)
    assert {row["target_map"] for row in read_summary(tmp_path)["rows"]} == {"file"}
    with pytest.raises(
        ValueError, match=r"^target map 'patch': the images come with target maps of their own$"
    ):
        run(Mean(), own, QUICK._replace(target_map="patch"), tmp_path)


def test_unknown_target_map_lists_the_valid_ones(tmp_path):
    with pytest.raises(ValueError, match=r"^target map 'cat' is not one of benign, image, patch$"):
        run(Mean(), varied(), QUICK._replace(target_map="cat"), tmp_path)


# Noise.


def test_noise_is_drawn_once_by_the_places_in_the_source_and_explained_by_each(tmp_path):
    source, found = varied(), []
    settings = QUICK._replace(interpreters=["cam", "grad_cam"], steps=1, seed=5)
    for name, size in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        run(Mean(), source, settings._replace(batch_size=size), tmp_path / name)
        found.append(results(tmp_path / name))
    a, b = found
    expected = noise(
        Mean(),
        a["images"],
        a["targets"],
        threat=settings.threat,
        keys=image_keys(5, a["indices"]),
    )
    for one in ("cam", "grad_cam"):
        np.testing.assert_array_equal(a[f"{one}/noise/images"], expected.images)
        np.testing.assert_array_equal(a[f"{one}/noise/images"], b[f"{one}/noise/images"])
        _, maps = explain(Mean(), expected.images, a["targets"], interpreter=one)
        # other batches
        np.testing.assert_allclose(a[f"{one}/noise/maps"], maps, atol=1e-6)
        assert not [key for key in a if key.startswith((f"{one}/noise/curve", f"{one}/noise/snap"))]
    rows = [row for row in read_summary(tmp_path / "a")["rows"] if row["attack"] == "noise"]
    assert [row["interpreter"] for row in rows] == ["cam", "grad_cam"]
    for row in rows:
        assert (row["gradient_evaluations"], row["preset"], row["linf"]) == (0, None, 25 / 255)
        assert row["map_l1"] == row["float_map_l1"] > 0


def test_a_threat_model_of_your_own_without_noise_has_no_such_row(tmp_path):
    threat = QUICK.threat._replace(name="mine", noise=None)
    outcome = run(Mean(), varied(), QUICK._replace(threat=threat, steps=1), tmp_path)
    assert [row["attack"] for row in outcome.rows] == ["pgd", "adv2"]
    finished = load_run(tmp_path)
    assert finished.sources == ["benign", "pgd", "cam"]
    assert len(transfer_matrix(finished, Mean())["map_l1"]) == 3


# Compilation.


# Why so many: a step is plain PGD's, which is that of the warm starts too, or one interpreter's.
# Logits alone are explained in a batch of four, to select, and of three, of plain PGD; maps are
# drawn by two interpreters, of images and snapshots in batches of the same size. Images are 8-bit
# or not. A start is a warm one or one of the three descents.
PROGRAMS = {"one": 3, "_explain_batch": 4, "images_of": 2, "_photograph": 1, "_start": 4}


def test_a_run_compiles_a_step_for_each_interpreter_and_no_more(tmp_path, caplog):
    def compiled(limit, **changes):
        caplog.clear()
        (directory := tmp_path / str(limit)).mkdir()
        with jax.log_compiles():
            run(Mean(), source, settings._replace(**changes), directory, limit=limit)
        words = [record.getMessage().split() for record in caplog.records]
        return Counter(word[1] for word in words if word[0] == "Compiling")

    # of a size that is known to no other test
    images = np.pad(varied().images, ((0, 0), (0, 1), (0, 1), (0, 0)))
    source = varied()._replace(images=images, objects=None)
    settings = Settings(
        ["cam", "grad_cam"], threats.linf(0.1), "paper", 1, 2, batch_size=4, snapshots=2
    )
    programs = compiled(3)
    assert {name: programs[f"jit({name})"] for name in PROGRAMS} == PROGRAMS
    # three batches of the same size, to other classes
    assert not compiled(None, batch_size=3, seed=1)


# Store.


@pytest.mark.slow
def test_batch_size_changes_nothing(tmp_path):
    for size in (2, 3, 10):
        (tmp_path / str(size)).mkdir()
        run(
            Mean(),
            varied(),
            QUICK._replace(batch_size=size, target_map="patch"),
            tmp_path / str(size),
        )
    a, *others = (results(tmp_path / str(size)) for size in (2, 3, 10))
    for b in others:
        assert list(a) == list(b)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def interrupt_at(step):
    """Return progress that is interrupted when so many steps are done."""
    done = 0

    def tick(new):
        nonlocal done
        done += new
        if done >= step:
            raise KeyboardInterrupt

    return lambda images, steps, done: tick


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    run(Mean(), varied(), QUICK, directory, config={"seed": 0})
    return directory


def test_interrupted_run_goes_on_to_the_same_bytes(tmp_path, whole):
    with pytest.raises(
        KeyboardInterrupt, match=r"^; 4 of 12 parts are kept, --resume goes on from them$"
    ):
        # 9 steps a part
        run(Mean(), varied(), QUICK, tmp_path, config={"seed": 0}, progress=interrupt_at(32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batches", "log.jsonl"]
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"batch": 1, "inter')  # a kill
    seen = []

    def progress(images, steps, done):
        seen.append((images, steps, done))
        return seen.append

    run(
        Mean(),
        varied(),
        QUICK,
        tmp_path,
        config={"seed": 0, "out": "elsewhere"},
        resume=True,
        progress=progress,
    )
    assert seen[0] == (7, 72, 27) and sum(seen[1:]) == 45
    assert (tmp_path / "results.npz").read_bytes() == (whole / "results.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log.jsonl",
        "results.npz",
        "summary.json",
    ]
    rows, expected = (read_summary(directory)["rows"] for directory in (tmp_path, whole))
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in expected]


def test_log_has_a_line_for_each_part(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Mean(), varied(), QUICK, tmp_path, progress=interrupt_at(32))
    run(Mean(), varied(), QUICK, tmp_path, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted((line["batch"], line["attack"], line["n"]) for line in lines) == [
        (i, kind, 1 if i == 3 else 2) for i in range(4) for kind in ("adv2", "noise", "pgd")
    ]
    arrays = results(tmp_path)
    for line in lines:
        assert line.keys() == {
            "batch",
            "interpreter",
            "attack",
            "n",
            "failed",
            "asr",
            "mc",
            "map_l1",
            "map_iou75",
            "seconds",
        }
        images = slice(2 * line["batch"], 2 * line["batch"] + 2)
        success = arrays[f"cam/{line['attack']}/success"][images]
        confidence = arrays[f"cam/{line['attack']}/confidence"][images]
        assert line["asr"] == success.mean()
        # of successes only, as in the rows
        expected = confidence[success].mean() if success.any() else None
        assert line["mc"] == pytest.approx(expected, abs=1e-6)
        # six digits
        assert line["map_l1"] == pytest.approx(
            arrays[f"cam/{line['attack']}/map_l1"][images].mean(), abs=1e-6
        )


def test_resuming_must_be_said_and_settings_stay(tmp_path):
    with pytest.raises(
        ValueError, match=f"^nothing to resume: {tmp_path} holds no unfinished run$"
    ):
        run(Mean(), varied(), QUICK, tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(Mean(), varied(), QUICK, tmp_path, config={"seed": 0}, progress=interrupt_at(32))
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ValueError,
        match=rf"^{tmp_path} holds an unfinished run: go on with it \(--resume\), or remove ",
    ):
        run(Mean(), varied(), QUICK, tmp_path, config={"seed": 0})
    with pytest.raises(
        ValueError,
        match=rf"^cannot resume {tmp_path} with other settings: seed was 0, is 1; limit was None, is 5$",
    ):
        run(Mean(), varied(), QUICK, tmp_path, config={"seed": 1, "limit": 5}, resume=True)
    with pytest.raises(
        ValueError,
        match=r"with other settings: image set was .* numbers [0-9a-f]{16}, is .* numbers [0-9a-f]{16}$",
    ):
        run(Mean(), varied(seed=1), QUICK, tmp_path, config={"seed": 0}, resume=True)
    assert sorted(tmp_path.rglob("*")) == files


def on_demand(image_set, edited=None):
    """The set with images that are decoded on demand, and its pixels; those of image `edited` are others."""
    pixels = image_set.images.copy()
    if edited is not None:
        pixels[edited, 3, 3, 0] ^= 1
    names = [f"{i}.png" for i in range(len(pixels))]
    return image_set._replace(images=LazyImages(names, lambda i: pixels[i].copy())), pixels


def test_images_decoded_on_demand_give_the_same_bytes_and_must_not_change(tmp_path, whole):
    lazy, pixels = on_demand(varied())
    with pytest.raises(KeyboardInterrupt, match=r"^; 4 of 12 parts are kept"):
        run(Mean(), lazy, QUICK, tmp_path, config={"seed": 0}, progress=interrupt_at(32))
    threads = threading.active_count()
    edited, _ = on_demand(varied(), edited=6)
    with pytest.raises(ValueError, match="with other settings: image set was 126 numbers "):
        run(Mean(), edited, QUICK, tmp_path, config={"seed": 0}, resume=True)

    def edit(images, steps, done):  # between the choice of the images and the attack on the last
        pixels[6, 3, 3, 0] ^= 1
        return lambda new: None

    with pytest.raises(ValueError, match=r"^6\.png has changed since it was first read$"):
        run(Mean(), lazy, QUICK, tmp_path, config={"seed": 0}, resume=True, progress=edit)
    assert threading.active_count() == threads
    # another copy of the same images
    run(Mean(), on_demand(varied())[0], QUICK, tmp_path, config={"seed": 0}, resume=True)
    assert (tmp_path / "results.npz").read_bytes() == (whole / "results.npz").read_bytes()


def full_disk(monkeypatch, module, name, call):
    """Make a function find the disk full, half-way, from its call-th use on."""
    original, calls = getattr(module, name), []

    def write(file, *arguments, **options):
        calls.append(file)
        if len(calls) >= call:
            if hasattr(file, "write"):
                file.write(b"half of the n")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(file, *arguments, **options)

    monkeypatch.setattr(module, name, write)


def test_full_disk_is_one_line_and_keeps_what_is_finished(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, store.np, "savez", 5)
        with pytest.raises(
            ValueError,
            match=r"^cannot write .*cam\.adv2.00001\.npz: No space left on device; 4 of 12 parts are kept",
        ):
            run(Mean(), varied(), QUICK, tmp_path, config={"seed": 0})
    with monkeypatch.context() as patch:
        full_disk(patch, store, "write_streams", 1)
        with pytest.raises(
            ValueError,
            match=r"^cannot write .*results\.npz: No space left on device; 12 of 12 parts are kept",
        ):
            run(Mean(), varied(), QUICK, tmp_path, config={"seed": 0}, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batches", "log.jsonl"]
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    run(Mean(), varied(), QUICK, tmp_path, config={"seed": 0}, resume=True)
    assert (tmp_path / "results.npz").read_bytes() == (whole / "results.npz").read_bytes()


def test_the_next_attack_begins_while_a_part_is_written_and_an_interrupt_waits_for_it(
    tmp_path, monkeypatch
):
    going, begun = threading.Event(), threading.Event()
    savez = np.savez

    def slow(file, **arrays):
        begun.set()
        assert going.wait(30)
        savez(file, **arrays)

    def progress(images, steps, done):
        def tick(new):
            # a step of an attack while the part of the one before is being written
            if begun.is_set():
                threading.Timer(0.05, going.set).start()
                raise KeyboardInterrupt

        return tick

    monkeypatch.setattr(store.np, "savez", slow)
    with pytest.raises(KeyboardInterrupt, match=r"^; 1 of 12 parts are kept"):
        run(Mean(), varied(), QUICK, tmp_path, progress=progress)
    assert [path.name for path in tmp_path.rglob("0*")] == ["00000.npz"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("mount_point", [True, False])
def test_shared_directory_that_vanishes_is_one_line_and_resumed_when_it_is_back(
    tmp_path, whole, monkeypatch, mount_point
):
    out, away, savez, calls = tmp_path / "out", tmp_path / "away", np.savez, []
    out.mkdir()

    def vanish(file, **arrays):
        savez(file, **arrays)
        calls.append(file)
        if len(calls) == 3:
            out.rename(away)
            if mount_point:  # what is left where a file system was mounted
                out.mkdir()

    with monkeypatch.context() as patch:
        patch.setattr(store.np, "savez", vanish)
        with pytest.raises(ValueError, match=r"^cannot write .*: No such file or directory$"):
            run(Mean(), varied(), QUICK, out, config={"seed": 0})
    if mount_point:
        out.rmdir()  # nothing was written into it
    away.rename(out)
    run(Mean(), varied(), QUICK, out, config={"seed": 0}, resume=True)
    assert (out / "results.npz").read_bytes() == (whole / "results.npz").read_bytes()


def test_disk_that_is_full_from_the_start_is_left_alone(tmp_path, monkeypatch):
    full_disk(monkeypatch, store.np, "savez", 1)
    with pytest.raises(
        ValueError, match=r"^cannot write .*cam\.pgd.00000\.npz: No space left on device$"
    ):
        run(Mean(), varied(), QUICK, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failure_to_publish_keeps_the_run(tmp_path):
    def publish(directory):
        assert read_summary(directory)["rows"] and results(directory)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        ValueError,
        match=rf"^cannot write to {tmp_path}: No space left on device; 12 of 12 parts are kept",
    ):
        run(Mean(), varied(), QUICK, tmp_path, publish=publish)
    published = []
    run(Mean(), varied(), QUICK, tmp_path, resume=True, publish=published.append)
    assert published == [tmp_path] and not (tmp_path / "batches").exists()


# Curves and snapshots.


@pytest.mark.slow
def test_curves_and_snapshots_are_those_of_the_attack(tmp_path):
    source, settings = varied(19), QUICK._replace(steps=150, batch_size=4)
    run(Mean(), source, settings, tmp_path)
    arrays = results(tmp_path)
    preset = resolve("default", "cam", warm_steps=1, steps=150)
    arguments = Mean(), arrays["images"], arrays["targets"], arrays["cam/target_maps"]
    whole = attack(
        *arguments, interpreter="cam", threat=settings.threat, preset=preset, snapshots=16
    )
    steps = arrays["cam/adv2/curve_steps"]
    assert len(steps) == 100 and (steps[0], steps[-1]) == (0, 150) and (np.diff(steps) > 0).all()
    for name, values in whole.curves._asdict().items():
        np.testing.assert_array_equal(
            arrays[f"cam/adv2/curve_{name}"], np.asarray(values)[:, steps]
        )
    assert "cam/pgd/curve_map_l1" not in arrays and arrays["cam/pgd/curve_loss"].shape == (19, 100)
    np.testing.assert_array_equal(arrays["cam/adv2/snapshot_images"], whole.snapshots)
    np.testing.assert_array_equal(arrays["cam/adv2/snapshot_steps"], snapshot_steps(preset))
    np.testing.assert_array_equal(
        arrays["cam/adv2/snapshot_maps"][:, -1], arrays["cam/adv2/maps"][:16]
    )
    np.testing.assert_array_equal(
        arrays["cam/adv2/snapshot_confidence"][:, -1], arrays["cam/adv2/confidence"][:16]
    )


# Intervals.


def test_intervals_hold_the_means(whole):
    summary, arrays = read_summary(whole), results(whole)
    for row in summary["rows"]:
        assert row["ci"].keys() >= {"asr", "map_l1", "map_l2", "map_iou75", "map_iou50"}
        assert all(low <= row[key] <= high for key, (low, high) in row["ci"].items())
    difference = arrays["cam/adv2/map_l1"] - arrays["cam/pgd/map_l1"]
    pair = next(pair for pair in summary["paired"] if pair["measure"] == "map_l1")
    assert pair["difference"] == pytest.approx(difference.mean(), abs=1e-6)
    assert pair["n"] == 7 and pair["ci"][0] <= pair["difference"] <= pair["ci"][1]
    assert arrays["cam/adv2/map_iou75"] == pytest.approx(
        np.asarray(metrics.iou_quantile(arrays["cam/adv2/maps"], arrays["cam/target_maps"]))
    )
