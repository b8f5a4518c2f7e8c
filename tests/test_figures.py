"""Figures and tables of a result, against the numbers that they are made of."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import adv2_jax as adv2
from adv2_jax.interpreters import joint
from adv2_jax.report.figures import Figures

WIDE = adv2.threats.linf(0.1)
LABELS, TARGETS = np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7])
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def small(make_small):
    return make_small()


@pytest.fixture(scope="module")
def attacked(small, images):
    """interpreter -> its result on four images, and target maps."""

    def make(interpreter):
        maps = None
        if interpreter is not None:
            maps = adv2.explain(small, images[:4], LABELS, interpreter=interpreter)[1]
        result = adv2.attack(
            small,
            images[:4],
            TARGETS,
            maps,
            interpreter=interpreter,
            threat=WIDE,
            steps=6,
            warm_steps=2,
        )
        return result, maps

    return make


@pytest.mark.parametrize(
    ("interpreter", "of_each"),
    [("cam", 1), (joint("cam", "grad"), 2), (None, 0)],
    ids=["cam", "joint", "pgd"],
)
def test_a_figure_shows_the_numbers_of_the_result(attacked, images, interpreter, of_each):
    result, maps = attacked(interpreter)
    figure = adv2.show(result, images[:4], TARGETS, maps, titles=("A", "B")[:of_each], limit=3)
    tiles, curves = (part.axes for part in figure.subfigs)
    columns = 3 + 2 * of_each
    assert len(tiles) == 3 * columns and len(curves) == (3 if of_each else 2)
    f_t = adv2.metrics.confidence(result.logits, TARGETS)
    for i in range(3):
        row = tiles[i * columns : (i + 1) * columns]
        titles = [tile.get_title() for tile in row]
        assert titles[0] == "benign" and titles[-1] == "change ×10"
        assert titles[1 + of_each] == f"p(class {TARGETS[i]}) {f_t[i]:.2f}"
        np.testing.assert_array_equal(row[0].images[0].get_array(), images[i])
        np.testing.assert_array_equal(row[1 + of_each].images[0].get_array(), result.images[i])
        drawn = result.maps if of_each == 2 else (result.maps,)
        wanted = maps if of_each == 2 else (maps,)
        for k in range(of_each):
            off = np.abs(drawn[k][i] - wanted[k][i]).mean()
            assert titles[2 + of_each + k] == f"{'AB'[k]}, L1 {off:.3f}"
    # the mean of what the steps reported; those of the warm start report no map
    loss = curves[0].lines[0]
    np.testing.assert_allclose(loss.get_ydata(), result.curves.loss.mean(0), rtol=1e-5)
    assert loss.get_xdata().tolist() == list(range(8))
    if of_each:
        lines = curves[2].lines
        assert len(lines) == of_each and lines[0].get_xdata()[0] == 2


def test_a_map_is_drawn_over_its_image_entry_by_entry(attacked, images):
    result, maps = attacked("cam")
    figure = adv2.show(result, images[:4], TARGETS, maps, limit=1)
    over = np.asarray(figure.subfigs[0].axes[1].images[0].get_array(), float)
    blocks = over.mean(-1).reshape(maps.shape[1], -1, maps.shape[2], over.shape[1] // maps.shape[2])
    # brighter where the map is larger, beyond what the image below it does
    light = blocks.mean((1, 3)).ravel()
    assert np.corrcoef(light, maps[0].ravel())[0, 1] > 0.8


def test_a_notebook_shows_figures_one_below_the_other(monkeypatch):
    shown = []
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=shown.append))
    Figures(["agreement", "spectra"])._ipython_display_()
    assert shown == ["agreement", "spectra"]


def test_without_matplotlib_one_line_says_what_to_install(attacked, images, monkeypatch):
    result, maps = attacked("cam")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ValueError, match=r"a figure needs matplotlib: pip install .*plots"):
        adv2.show(result, images[:4], TARGETS, maps)


def test_a_result_reads_and_becomes_a_data_frame(attacked):
    pytest.importorskip("pandas")
    result, maps = attacked("cam")
    size = list(maps.shape)
    assert repr(result) == (
        f"Result(images [4, 16, 16, 3], maps {size}, 8 steps, "
        f"{result.gradient_evaluations} gradients an image, 0 failed)"
    )
    frame = result.to_pandas(TARGETS, maps)
    assert list(frame) == [
        "target",
        "predicted",
        "success",
        "confidence",
        "failed",
        "map_l1",
        "map_iou75",
    ]
    np.testing.assert_array_equal(frame.success, result.logits.argmax(1) == TARGETS)
    np.testing.assert_allclose(frame.map_l1, np.abs(result.maps - maps).mean((1, 2)), rtol=1e-5)
    both, of_both = attacked(joint("cam", "grad"))
    assert {"map_l1_1", "map_l1_2"} <= set(both.to_pandas(TARGETS, of_both))
    plain, _ = attacked(None)
    assert "map_l1" not in plain.to_pandas(TARGETS) and "no maps" in repr(plain)
