"""Networks named as `file.py:name`."""

import sys

import pytest

from adv2_jax.models import user

FILE = """
import pathlib
import dataclasses
import jax
import beside

@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Net:
    scale: float = beside.SCALE
    def features(self, image, act=None):
        return image * self.scale
    def head(self, features):
        return features.mean((0, 1))

ready = Net(3.0)
number = 7

def network(path=None):
    return Net(float(pathlib.Path(path).read_text())) if path else Net(2.0)

def needs(path):
    return Net()

class Lazy:
    def features(self, image, act=None):
        import at_trace
        return image * at_trace.SCALE

def lazy():
    import at_call
    return at_call.scaled(Lazy())

def leaves():
    raise SystemExit("no weights")

def fails():
    raise KeyError("layer7\\nof many")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine")
    (path / "net.py").write_text(FILE)
    (path / "beside.py").write_text("SCALE = 5.0")
    (path / "at_call.py").write_text(
        "import deeper.down\ndef scaled(net):\n    net.scale = deeper.down.SCALE\n    return net"
    )
    (path / "deeper").mkdir()
    (path / "deeper" / "down.py").write_text("SCALE = 6.0")
    (path / "at_trace.py").write_text("SCALE = 7.0")
    (path / "weights.txt").write_text("4.0")
    (path / "broken.py").write_text("import no_such_module")
    return path


@pytest.mark.parametrize(
    ("name", "weights", "scale"),
    [("ready", None, 3), ("network", None, 2), ("network", "weights.txt", 4), ("Net", None, 5)],
)
def test_a_name_is_a_network_or_makes_one(folder, name, weights, scale):
    weights = weights and str(folder / weights)
    assert user.load(f"{folder}/net.py:{name}", weights).scale == scale


def test_modules_beside_the_file_are_found_whenever_they_are_imported(folder, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    made = user.load(f"{folder}/net.py:lazy")
    assert (made.scale, made.features(2.0)) == (6, 14)
    user.load(f"{folder}/net.py:ready")
    assert sys.path.count(str(folder)) == 1


@pytest.mark.parametrize(
    ("reference", "weights", "message"),
    [
        ("net.py", None, "must be path/to/file.py:name"),
        ("net.py:not a name", None, "must be path/to/file.py:name"),
        ("none.py:network", None, "cannot import .*none.py: no such file"),
        (
            "broken.py:network",
            None,
            "cannot import .*broken.py: ModuleNotFoundError: .*no_such_module",
        ),
        (
            "net.py:networks",
            None,
            "has no 'networks'; it has Net, ready, network, needs, Lazy, lazy, leaves, fails",
        ),
        ("net.py:number", None, "neither a network nor a function that makes one, but int"),
        ("net.py:ready", "weights.txt", "is a network with its weights"),
        ("net.py:needs", None, r"needs\(\) failed: TypeError: .*path"),
        ("net.py:network", "none.txt", r"network\(none.txt\) failed: FileNotFoundError"),
        ("net.py:fails", None, r"fails\(\) failed: KeyError: 'layer7"),
        ("net.py:leaves", None, r"leaves\(\) failed: SystemExit: no weights"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(folder, reference, weights, message):
    with pytest.raises(ValueError, match=message) as caught:
        user.load(f"{folder}/{reference}", weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b.py:net", True), ("net.py", True), ("resnet50", False), ("c:/x.py:n", True)],
)
def test_references_are_told_from_names(name, expected):
    assert user.is_reference(name) is expected
