"""An image on which the network gives no finite numbers fails alone: not its batch, not the run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import attack, cli, explain, report, threats
from adv2_jax.activations import relu
from adv2_jax.attacks import image_keys
from adv2_jax.data import ImageSet
from adv2_jax.files import read_arrays
from adv2_jax.interpreters import INTERPRETERS, grad_interpreter
from adv2_jax.runs.run import Settings, run
from adv2_jax.runs.transfer import load_run, transfer_matrix

NAMES = [name for name in INTERPRETERS if name != "rts" and "rollout" not in name]
WIDE = threats.linf(0.2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Standardised:
    """Each image is standardised: on a uniform one logits are finite, and the gradient is 0/0."""

    mix: jax.Array

    def features(self, image, act=relu):
        return act(
            jnp.einsum(
                "hwc,ck->hwk", (image - image.mean()) / jnp.maximum(image.std(), 0.01), self.mix
            )
        )

    def head(self, features):
        return features.mean((0, 1)) * jnp.array([1.0, 0.9, 1.1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Silent(Standardised):
    """Logits that are not a number where the image is dark."""

    def head(self, features):
        return super().head(features) / (features.max() > 0)


@pytest.fixture(scope="module")
def mix():
    return jnp.asarray(np.random.default_rng(5).normal(size=(3, 3)), jnp.float32)


@pytest.fixture(scope="module")
def images():
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    x[1] = 0
    return x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "name"),
    [*((Standardised, name) for name in NAMES), (Silent, "cam"), (Silent, "mask")],
)
def test_one_image_fails_and_its_neighbours_do_not_notice(mix, images, network, name):
    model, others = network(mix), [0, 2, 3]
    labels, targets = np.zeros(4, int), np.full(4, 2)
    logits, maps = explain(model, images, labels, interpreter=name)
    finite = np.isfinite(maps).all((1, 2))
    assert finite[others].all() and np.isfinite(logits[others]).all()
    assert network is not Silent or np.isnan(logits[1]).any()
    assert finite[1] or np.isnan(maps[1]).all()  # a whole map, or none
    result = attack(
        model, images, targets, maps, interpreter=name, steps=12, warm_steps=2, threat=WIDE
    )
    assert result.failed.tolist() == [False, True, False, False]
    np.testing.assert_array_equal(result.images[1], images[1])
    for values in (result.logits, result.maps, result.float_logits, result.float_maps):
        assert np.isnan(values[1]).all() and np.isfinite(values[others]).all()
    assert not any((result.images[i] == images[i]).all() for i in others)
    # one of them twice: as many images, so the same programs
    four = [*others, 0]
    alone = attack(
        model,
        images[four],
        targets[four],
        maps[four],
        interpreter=name,
        steps=12,
        warm_steps=2,
        threat=WIDE,
        keys=image_keys(0, np.array(four)),  # of what some surrogates draw
    )
    np.testing.assert_array_equal(alone.images, result.images[four])


@pytest.mark.parametrize(
    "threat", [threats.l2(), threats.flow(), threats.linf_flow()], ids=lambda threat: threat.name
)
@pytest.mark.parametrize("floating", [False, True])
def test_under_every_threat(mix, images, threat, floating):
    given = images / np.float32(255) if floating else images
    result = attack(
        Standardised(mix), given, np.full(4, 2), interpreter=None, steps=3, threat=threat
    )
    assert result.failed.tolist() == [False, True, False, False]
    np.testing.assert_array_equal(result.images[1], images[1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


def test_a_network_that_fails_on_all_images_is_refused(mix, images):
    dark = np.zeros_like(images)
    for call in (
        lambda: explain(Silent(mix), dark, np.zeros(4, int), interpreter="cam"),
        lambda: attack(Standardised(mix), dark, np.full(4, 2), interpreter=None, steps=3),
    ):
        with pytest.raises(
            ValueError,
            match=r"^the network gives logits or gradients that are not finite numbers on",
        ):
            call()


def test_a_map_with_some_numbers_that_are_not_finite_is_refused(mix, images):
    maps = np.zeros((4, 8, 8))
    maps[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"target_maps must lie in \[0, 1\]"):
        attack(Standardised(mix), images, np.full(4, 2), maps, steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_run_goes_on_and_names_the_image(mix, images, tmp_path, batch_size):
    """In batches of one image there is one in which all fail."""
    labels = (
        explain(Standardised(mix), images, np.zeros(4, int), interpreter="cam")[0]
        .argmax(-1)
        .astype(np.int32)
    )
    image_set = ImageSet(images, labels, names=np.array(["a.png", "black.png", "c.png", "d.png"]))
    settings = Settings(("grad", "cam"), WIDE, steps=4, batch_size=batch_size)
    outcome = run(
        Standardised(mix),
        image_set,
        settings,
        tmp_path,
        publish=report.write,
        config={"preset": "default"},
    )
    assert outcome.failed == ["black.png"]
    # no NaN in it: that would not be JSON
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failed"] == ["black.png"] and summary["counts"]["failed"] == 1
    for row in summary["rows"]:
        # noise takes the image from where CAM's attacks fail; of GRAD its benign map fails already
        fine = (row["interpreter"], row["attack"]) == ("cam", "noise")
        assert (row["n"], row["failed"]) == ((4, 0) if fine else (3, 1))
        assert np.isfinite([row["map_l1"], row["asr"], row["linf"]]).all()
    assert all(pair["n"] == 3 for pair in summary["paired"])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(line["failed"] for line in lines) == 5 and sum(line["n"] for line in lines) == 19
    arrays = read_arrays(tmp_path / "results.npz")
    assert np.isnan(arrays["cam/adv2/map_l1"]).tolist() == [False, True, False, False]
    np.testing.assert_array_equal(arrays["cam/adv2/images"][1], images[1])
    assert "Failed" in (tmp_path / "report.html").read_text(encoding="utf-8")
    matrix = transfer_matrix(load_run(tmp_path), Standardised(mix))
    json.dumps(matrix, allow_nan=False)


def test_the_command_line_says_which_image_failed(images, tmp_path, capsys):
    (tmp_path / "net.py").write_text(NETWORK, encoding="utf-8")
    x = images / 255
    spread = np.maximum(x.std((1, 2, 3), keepdims=True), 0.01)
    labels = np.maximum((x - x.mean((1, 2, 3), keepdims=True)) / spread, 0).mean((1, 2)).argmax(-1)
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    words = [
        "--model",
        f"{tmp_path / 'net.py'}:network",
        "--images",
        str(tmp_path / "set.npz"),
        "--interpreter",
        "cam",
    ]
    assert cli.main(["attack", *words, "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    assert (
        "1 failed, the network gives numbers that are not finite on them: 1\n"
        in capsys.readouterr().out
    )


NETWORK = """
import jax, jax.numpy as jnp

@jax.tree_util.register_static
class Network:
    def features(self, image, act=jax.nn.relu):
        return act((image - image.mean()) / jnp.maximum(image.std(), .01))
    def head(self, features):
        return features.mean((0, 1))

network = Network()
"""


def test_a_set_of_one_image_has_no_interval_and_a_page(mix, images, tmp_path):
    labels = (
        explain(Standardised(mix), images, np.zeros(4, int), interpreter="cam")[0]
        .argmax(-1)
        .astype(np.int32)
    )
    one = ImageSet(images[:1], labels[:1])
    outcome = run(
        Standardised(mix), one, Settings(("cam",), WIDE, steps=2), tmp_path, publish=report.write
    )
    assert [pair["ci"] for pair in outcome.paired] == [None, None]
    assert outcome.rows[0]["ci"].keys() == {"asr"}  # a proportion has one: Wilson's
    assert (tmp_path / "report.html").exists()


def test_two_interpreters_of_one_name_are_refused(mix, images, tmp_path):
    settings = Settings((grad_interpreter(pool=1), grad_interpreter(pool=4)), WIDE)
    with pytest.raises(
        ValueError, match=r"^interpreter 'grad' is given 2 times; each needs its own name"
    ):
        run(Standardised(mix), ImageSet(images, np.zeros(4, np.int32)), settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
