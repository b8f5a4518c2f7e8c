"""The memory of a device: the batch size that fits, and what happens where one does not."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import attack, attacks, cli, devices, explain, threats
from adv2_jax.attacks import count_steps, fitting_batch_size
from adv2_jax.data import ImageSet
from adv2_jax.presets import resolve
from adv2_jax.runs.run import Settings, run

N = 5
CAM = {"interpreter": "cam", "warm_steps": 1, "steps": 3, "threat": threats.linf(0.1)}
# batches of another size round otherwise, and a sign step makes 2α of a last bit at a zero gradient:
# rare, and not with these images
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(make_small):
    return make_small()


@pytest.fixture(scope="module")
def images(images):
    return images[:N]


@pytest.fixture(scope="module")
def labels(model, images):
    return explain(model, images, np.zeros(N, int), interpreter="cam")[0].argmax(-1)


@pytest.fixture(scope="module")
def maps(model, images, labels):
    return explain(model, images, labels, interpreter="cam")[1]


@pytest.fixture
def memory(monkeypatch):
    """A device that has memory for `fits` images at a time; `sizes` are those of the batches that it was given."""
    monkeypatch.setattr(attacks, "_SMALLER", {})
    device = SimpleNamespace(fits=N, sizes=[])

    def limited(program):
        def call(model, batch, *args, **options):
            device.sizes.append(len(jax.tree.leaves(batch)[0]))
            if device.sizes[-1] > device.fits:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating")
            return program(model, batch, *args, **options)

        return call

    for name in ("craft", "look"):
        monkeypatch.setattr(attacks, name, limited(getattr(attacks, name)))
    return device


def test_an_attack_goes_on_with_half_the_batch(model, images, labels, maps, memory, caplog):
    targets, options = (labels + 1) % 10, CAM | {"snapshots": 3}
    small = attack(model, images, targets, maps, batch_size=2, **options)
    whole = attack(model, images, targets, maps, batch_size=N, **options)
    memory.fits, steps = 2, []
    for _ in range(2):
        halved = attack(model, images, targets, maps, batch_size=N, on_step=steps.append, **options)
        # the very programs of batches of two
        jax.tree.map(np.testing.assert_array_equal, halved, small)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), halved, whole)
    # said once: a size that did not fit is not tried again
    assert caplog.messages == ["out of memory in batches of 5: going on in batches of 2"]
    preset = resolve("default", "cam", threat=CAM["threat"], warm_steps=1, steps=3)
    assert sum(steps) == 2 * count_steps(preset, N, N)


def test_what_is_finished_is_not_computed_again(model, images, labels, memory, monkeypatch):
    expected = explain(model, images, labels, interpreter="grad", batch_size=1)
    memory.sizes.clear()
    full = iter([3, 1, 1, 1, 1, 1, 1])  # the device fills up after the first batch
    seen = attacks._seen

    def filling(*args):
        memory.fits = next(full)
        return seen(*args)

    monkeypatch.setattr(attacks, "_seen", filling)
    halved = explain(model, images, labels, interpreter="grad", batch_size=3)
    assert memory.sizes == [3, 3, 1, 1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), halved, expected)


def test_one_image_that_does_not_fit_ends_in_one_line(
    model, images, labels, memory, brightness, tmp_path, capsys
):
    memory.fits = 0
    with pytest.raises(MemoryError, match="left for one image at a time: end other") as error:
        explain(model, images, labels, interpreter="cam")
    assert "\n" not in str(error.value)
    words = ["attack", *brightness, "--batch-size", "4", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    *halved, last = capsys.readouterr().err.splitlines()
    assert [line[:33] for line in halved] == ["adv2: out of memory in batches of"] * 2
    assert last.startswith("adv2: out of memory: the device has none left for one image")
    assert not (tmp_path / "out").exists()


def test_other_errors_of_xla_are_not_taken_for_it(model, images, labels, memory, monkeypatch):
    def broken(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(attacks, "look", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        explain(model, images, labels, interpreter="cam")


def test_parts_of_a_run_stay_what_they_are(model, images, labels, memory, tmp_path):
    settings = Settings(["cam"], CAM["threat"], warm_steps=1, steps=3, batch_size=4, snapshots=2)
    results, lines = [], []
    for fits in (4, 1):
        memory.fits = fits
        folder = tmp_path / str(fits)
        folder.mkdir()
        run(model, ImageSet(images, labels), settings, folder)
        log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        lines.append([(line["attack"], line["batch"], line["n"]) for line in log])
        results.append(dict(np.load(folder / "results.npz")))
    expected = [(kind, i, n) for i, n in ((0, 4), (1, 1)) for kind in ("pgd", "adv2", "noise")]
    assert lines[0] == lines[1] == expected
    assert results[0].keys() == results[1].keys()
    for name, values in results[0].items():
        np.testing.assert_allclose(values, results[1][name], err_msg=name, **ROUNDING)


# Finding the batch size


FLOATS = 256
IMAGE = 2 * 4 * FLOATS  # bytes: what goes in, and what comes out


def lowered(size):
    numbers = [jax.ShapeDtypeStruct((n, FLOATS), jnp.float32) for n in (1, size)]
    return jax.jit(jnp.add).lower(*numbers)


@pytest.mark.parametrize("images, size", [(9, 8), (8, 8), (7.9, 4), (1, 1), (0.5, 1), (1e6, 32)])
def test_the_largest_power_of_two_that_fits(monkeypatch, images, size):
    needed = IMAGE * images + 4 * FLOATS  # the model lies there once
    monkeypatch.setattr(devices, "free_memory", lambda: needed / devices.SHARE)
    assert devices.largest_batch(lowered) == size


def test_nothing_is_found_where_memory_is_not_told(monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda: None)
    assert devices.largest_batch(lowered) is None
    monkeypatch.undo()
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    assert devices.largest_batch(lowered) is None


def test_an_accelerator_tells_its_free_memory(monkeypatch):
    known = {"bytes_limit": 100, "bytes_in_use": 30, "num_allocs": 1}
    for stats, free in ((known, 70), (None, None)):
        device = SimpleNamespace(platform="gpu", memory_stats=lambda stats=stats: stats)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert devices.free_memory() == free


def test_a_cpu_has_the_memory_of_its_machine_or_container(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    machine = devices.free_memory()
    assert machine is None or machine > 2**20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")  # no limit
    assert (devices.free_memory() is None) == (machine is None)
    (tmp_path / "memory.max").write_text("9000\n")
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert devices.free_memory() == 4000


def test_the_step_with_the_most_work_is_measured(model, monkeypatch):
    threat, programs = CAM["threat"], []
    monkeypatch.setattr(attacks, "largest_batch", programs.append)
    presets = {name: resolve("default", name, threat=threat) for name in (None, "cam", "grad")}
    for some in ([presets["grad"]], presets.values(), [presets["cam"]]):
        fitting_batch_size(model, some, threat, (16, 16, 3))
    alone, among, other = (program(2).as_text() for program in programs)
    assert alone == among != other
    with pytest.raises(ValueError, match="rts needs a masker"):
        fitting_batch_size(model, [resolve("default", "rts", threat=threat)], threat, (16, 16, 3))


# The command line


@pytest.fixture
def words(brightness, tmp_path):
    options = "--interpreter cam --steps 2 --limit 6 --snapshots 0 --batch-size auto"
    return ["attack", *brightness, *options.split(), "--out", str(tmp_path / "out")]


def fitting(monkeypatch, size):
    monkeypatch.setattr(attacks, "largest_batch", lambda lowered: size)


def test_auto_is_measured_and_written_down(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "free_memory", lambda: 16 * 2**10)  # a few images of 8 x 8
    assert cli.main(words) == 0
    line = capsys.readouterr().out.splitlines()[0]
    size = json.loads((tmp_path / "out" / "summary.json").read_text())["config"]["batch_size"]
    assert size in (1, 2, 4)
    assert line == f"--batch-size auto: {size} images at a time on each device"
    log = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert len({json.loads(line)["batch"] for line in log}) == -(-6 // size)


def test_auto_shares_the_images_among_the_devices(words, tmp_path, monkeypatch, capsys):
    fitting(monkeypatch, 64)
    monkeypatch.setattr(cli.commands, "number_of_devices", lambda count: 4)
    assert cli.main(words) == 0
    assert "auto: 2 images at a time" in capsys.readouterr().out


def test_hosts_are_given_a_number(words, monkeypatch, capsys):
    monkeypatch.setattr(cli.entry, "connect", lambda *hosts: None)
    assert cli.main([*words, "--distributed"]) == 2
    assert "hosts may have other memories" in capsys.readouterr().err


def test_auto_is_the_default_where_nothing_is_told(words, tmp_path, monkeypatch, capsys):
    fitting(monkeypatch, None)
    assert cli.main(words) == 0
    assert "auto: 6 images at a time on each device" in capsys.readouterr().out  # all
    assert cli.main([*words, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_resumed_run_keeps_the_number_that_auto_found(words, tmp_path, monkeypatch, capsys):
    fitting(monkeypatch, 2)
    attack_batches = cli.commands.run.__globals__["attack_batches"]

    def interrupted(model, task, chosen, jobs, places, *rest):
        if places[0] > 0:
            raise KeyboardInterrupt
        yield from attack_batches(model, task, chosen, jobs, places, *rest)

    with monkeypatch.context() as patch:
        patch.setitem(cli.commands.run.__globals__, "attack_batches", interrupted)
        assert cli.main(words) == 130
    fitting(monkeypatch, 4)
    capsys.readouterr()
    settings = tmp_path / "out" / "batches" / "settings.json"
    whole = settings.read_text()
    settings.write_text(whole[:20])  # damaged
    assert cli.main([*words, "--resume"]) == 2
    assert capsys.readouterr().err.startswith(f"adv2: cannot read {settings}")
    settings.write_text(whole)
    assert cli.main([*words, "--resume"]) == 0
    assert "auto: 2 images at a time on each device" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["config"]["batch_size"] == 2
