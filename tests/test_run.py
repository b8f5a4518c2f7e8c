"""A run: which images it takes, and that its rows are what the arrays say."""

import numpy as np
import pytest
from flax import nnx

from adv2_jax import threats
from adv2_jax.data import ImageSet
from adv2_jax.experiments.run import Settings, run
from adv2_jax.files import read_arrays


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
    return ImageSet(images, np.array(labels, np.int32), masks=masks)


def test_rows_are_what_the_arrays_say(tmp_path):
    settings = Settings(("cam",), threats.linf(0.1), warm_steps=2, steps=20, batch_size=2)
    ticks = []
    images = coloured([0, 1, 2], [0, 1, 2])
    outcome = run(Mean(), images, settings, tmp_path, progress=lambda images, steps, done: ticks.append)
    arrays = read_arrays(tmp_path / "results.npz")
    for row in outcome.rows:
        found = {key.split("/")[-1]: value for key, value in arrays.items() if key.startswith(f"cam/{row['attack']}/")}
        difference = (found["images"].astype(float) - arrays["images"]) / 255
        assert row["linf"] == pytest.approx(abs(difference).max(), rel=1e-5)  # float32 means of a handful of values
        assert row["l2"] == pytest.approx(np.sqrt((difference**2).sum((1, 2, 3))).mean(), rel=1e-5)
        assert row["asr"] == found["success"].mean() == 1
        assert row["mc"] == pytest.approx(found["confidence"].mean(), rel=1e-6)
        apart = abs(found["maps"] - arrays["cam/target_maps"])
        np.testing.assert_allclose(found["map_l1"], apart.mean((1, 2)), rtol=1e-5)
        assert row["map_l1"] == pytest.approx(apart.mean(), rel=1e-5)
        assert row["linf"] <= 0.1 + 0.5 / 255 + 1e-6  # rounding to 8 bits may add half a level
        assert row["gradient_evaluations"] == 22
        assert 0 <= row["pointing_game"] <= 1
        assert row["benign_pointing_game"] == 1  # the map of a colour is its channel, which is brightest on the object
    assert sum(ticks) == 2 * 2 * 22  # PGD and ADV², two batches each


def test_own_target_maps_of_another_size_are_refused(tmp_path):
    images = coloured([0], [0])._replace(target_maps=np.zeros((1, 3, 3), np.float32))
    with pytest.raises(ValueError, match=r"target_maps must be \[1, 4, 4\] for cam, got \[1, 3, 3\]"):
        run(Mean(), images, Settings(("cam",), threats.linf()), tmp_path)
