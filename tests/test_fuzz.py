"""Bad input in bulk: files, arguments and networks that were damaged at random go through the command line.

Input i depends on (SEED, i) only, so that one that fails is found again by its number, whatever their count:

    ADV2_FUZZ=10000 python -m pytest tests/test_fuzz.py -q
    ADV2_FUZZ=10000 python -m pytest "tests/test_fuzz.py::test_bad_input[4711]"
"""

import contextlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from mutants import FORMATS, MIB, PIL, WORDS, damaged, npz, picture, scribbled, tampered, tensors

from adv2_jax import cli, models
from adv2_jax.files import write_arrays
from adv2_jax.runs.store import Store

resource = pytest.importorskip("resource")  # Windows has none

COUNT = int(os.environ.get("ADV2_FUZZ", "300"))
SEED = int(os.environ.get("ADV2_FUZZ_SEED", "0"))

CONSTANT = 192 * MIB  # what a run takes with any file: compiled programs, decoders
PIXEL = 12  # bytes for each pixel that a picture says it has: RGBA, composed with white, RGB

NETWORK = """
import jax

@jax.tree_util.register_static
class Mean:
    def features(self, image, act=None):
        return image

    def head(self, features):
        return 10 * features.mean(axis=(0, 1))

ready = Mean()
"""
NET = """
from fuzzed_network import Mean, ready  # one object in all runs: nothing is compiled twice

def network(weights=None):
    return ready
"""
N, SIZE, K = 4, 8, 3
QUICK = [
    "--limit",
    "1",
    "--batch-size",
    "1",
    "--warm-steps",
    "0",
    "--steps",
    "1",
    "--interpreter",
    "cam",
]


class Base(NamedTuple):
    """What is damaged: a folder of valid files, and the arrays of some of them."""

    folder: Path
    images: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    masker: dict[str, np.ndarray]

    def attack(self, *words: str) -> list[str]:
        return [
            "attack",
            "--model",
            f"{self.folder}/net.py:network",
            *QUICK,
            "--out",
            "out",
            *words,
        ]

    def photos(self, *words: str) -> list[str]:
        return self.attack("--images", f"{self.folder}/photos", "--size", str(SIZE), *words)


class Case(NamedTuple):
    """One input: the arguments, the words of which a refusal must name one, the pixels of a picture, and whether work is kept."""

    argv: list[str]
    names: tuple[str, ...] = ()
    pixels: int = 0
    kept: bool = False


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", partial(models.CifarResNet, 1))
        (folder / "fuzzed_network.py").write_text(NETWORK)
        (folder / "net.py").write_text(NET)
        images = np.random.default_rng(0).integers(80, 120, (N, SIZE, SIZE, 3), np.uint8)
        labels = np.arange(N, dtype=np.int32) % K
        images[np.arange(N), :4, :4, labels] = 200
        maps = np.linspace(0, 1, N * SIZE**2, dtype=np.float32).reshape(N, SIZE, SIZE)
        arrays = {
            "images": images,
            "labels": labels,
            "targets": (labels + 1) % K,
            "target_maps": maps,
            "masks": images[..., 0] > 150,
        }
        write_arrays(folder / "images.npz", arrays)
        model = models.build("tiny", width=2, num_classes=K, image_size=SIZE)
        weights = models.convert.to_state_dict(model)
        models.save_masker(
            models.Masker(model, rngs=models.nnx.Rngs(0)), "tiny", folder / "masker.npz"
        )
        with np.load(folder / "masker.npz") as archive:
            masker = dict(archive)
        (folder / "photos").mkdir()
        for name, image in zip("abcd", images, strict=True):
            PIL.fromarray(image).save(folder / "photos" / f"{name}.png")
        found = Base(folder, arrays, weights, masker)
        patch.chdir(folder)
        words = ["--images", f"{folder}/images.npz", "--quiet"]
        assert cli.main(found.attack(*words, "--interpreter", "cam", "grad", "--out", "run")) == 0
        assert cli.main(unfinished(found, "table", "done")) == 0
        _interrupt(found, patch)
        yield found


def _interrupt(base: Base, patch: pytest.MonkeyPatch) -> None:
    """A run and a table that were interrupted after their first part."""
    save = Store.save

    def stop(self, part, arrays):
        save(self, part, arrays)
        raise KeyboardInterrupt

    with patch.context() as inner:
        inner.setattr(Store, "save", stop)
        assert (
            cli.main(unfinished(base, "attack", "part"))
            == cli.main(unfinished(base, "table", "sheet"))
            == 130
        )


def unfinished(base: Base, command: str, out: str) -> list[str]:
    name = ["effectiveness"] if command == "table" else []
    model = ["--model", f"{base.folder}/net.py:network", "--images", f"{base.folder}/images.npz"]
    return [command, *name, *model, *QUICK, "--quiet", "--out", out]


# The kinds of input


def arrays_of_images(rng: random.Random, place: Path, base: Base) -> Case:
    keys = [key for key in base.images if key in ("images", "labels") or rng.random() < 0.5]
    (place / "mutant.npz").write_bytes(npz(rng, {key: base.images[key] for key in keys}))
    size = ["--size", str(SIZE)] if rng.random() < 0.7 else []
    return Case(
        base.attack("--images", "mutant.npz", *size), ("mutant.npz", "image", "network", "target")
    )


def folder_of_images(rng: random.Random, place: Path, base: Base) -> Case:
    folder = place / "photos"
    shutil.copytree(base.folder / "photos", folder)
    suffix = rng.choice(list(FORMATS))
    data, pixels = picture(rng, FORMATS[suffix])
    data = damaged(rng, data) if rng.random() < 0.6 else data
    name = f"mutant.{rng.choice((suffix, suffix, suffix, suffix, suffix, 'png', 'txt', 'JPG', '', 'npz'))}"
    (folder / name).write_bytes(data)
    if rng.random() < 0.05:
        (folder / "sub").mkdir()
    return Case(
        base.attack("--images", "photos", "--size", str(SIZE)),
        ("mutant", "sub", "images right", "16-bit images of photos"),
        pixels,
    )


def labels(rng: random.Random, place: Path, base: Base) -> Case:
    text = "".join(
        f"{name}.png,{i % K}{rng.choice(('', '', f',{(i + 1) % K}'))}\n"
        for i, name in enumerate("abcd")
    )
    head = rng.choice(("", "file,class\n", "file,class,target\n"))
    (place / "labels.csv").write_bytes(scribbled(rng, head + text))
    words = base.photos("--labels", "labels.csv")
    return Case(words, ("labels.csv", "label", "target", "images right"))


def class_list(rng: random.Random, place: Path, base: Base) -> Case:
    text = rng.choice(
        ("cat\ndog\nfox\n", "n01 cat\nn02 dog\nn03 fox, red fox\n", "1 euro\n2 euro\n3D printer\n")
    )
    (place / "classes.txt").write_bytes(scribbled(rng, text))
    source = rng.choice(("images.npz", "photos", "shapes:2"))
    source = source if ":" in source else f"{base.folder}/{source}"
    return Case(
        base.attack("--images", source, "--size", str(SIZE), "--classes", "classes.txt"),
        ("classes.txt", "images right"),
    )


def weights(rng: random.Random, place: Path, base: Base) -> Case:
    suffix = rng.choice(("npz", "safetensors", "npz", "safetensors", "pth", "bin", "txt"))
    write = tensors if suffix == "safetensors" or (suffix != "npz" and rng.random() < 0.5) else npz
    mutant = f"mutant.{suffix}"
    (place / mutant).write_bytes(write(rng, base.weights))
    if rng.random() < 0.8:
        return Case(
            [
                "convert",
                mutant,
                "--model",
                "tiny",
                "--out",
                f"out.{rng.choice(('npz', 'safetensors'))}",
            ],
            (mutant,),
        )
    return Case(base.photos("--model", "tiny", "--weights", mutant), (mutant, "network"))


def masker(rng: random.Random, place: Path, base: Base) -> Case:
    (place / "mutant.npz").write_bytes(npz(rng, base.masker))
    words = base.photos("--masker", "mutant.npz", "--interpreter", rng.choice(("rts", "cam")))
    return Case(words, ("mutant.npz", "masker", "network"))


def network(rng: random.Random, place: Path, base: Base) -> Case:
    text = (
        rng.choice(SNIPPETS)
        if rng.random() < 0.6
        else scribbled(rng, NETWORK + NET.partition("\n\n")[2])
    )
    (place / "mine.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    name = rng.choice(
        ("ready", "network", "network", "network", "Mean", "nothing", "a b", "", "é", "jax")
    )
    weights = rng.choice(
        (
            [],
            [],
            [],
            ["--weights", f"{base.folder}/masker.npz"],
            ["--weights", "none.npz"],
            ["--mean", "0", "0", "0"],
        )
    )
    words = base.attack(
        "--images", f"{base.folder}/images.npz", "--model", f"mine.py:{name}", *weights
    )
    return Case(words, ("mine.py", "network", "--", "head", "features", "logits"))


def _returning(value: str, more: str = "") -> str:
    return f"import jax, jax.numpy as jnp, numpy as np\n{NETWORK}\n{more}\ndef network(weights=None):\n    return {value}\n"


def _with(
    features: str = "return image", head: str = "return 10 * features.mean(axis=(0, 1))"
) -> str:
    one = f"    def features(self, image, act=None):\n        {features}\n"
    other = f"    def head(self, features):\n        {head}\n"
    body = f"@jax.tree_util.register_static\nclass Net:\n{one}\n{other}\n"
    return f"import jax, jax.numpy as jnp, numpy as np\n{body}\nready = Net()\nnetwork = Net\n"


ONE_LINERS = r"""
def network(:
network = (
x = '\
# coding: nothing
return 1
network = 07
import no_such_module
raise SystemExit
raise SystemExit(0)
import sys; sys.exit('no')
raise ValueError
raise ValueError('a\nb')
raise KeyError(3)
raise BaseException('x')
raise GeneratorExit
raise StopIteration
raise MemoryError
raise ExceptionGroup('x', [OSError(1)])
raise UnicodeDecodeError('utf-8', b'', 0, 1, 'x')
assert False
1 / 0
network = None
network = 7
network = 'x'
network = []
network = print
network = lambda a, b: 1
import jax as network
def __getattr__(name): raise RuntimeError(name)
async def network(): pass
def network(): yield 1
"""
SNIPPETS = [
    *ONE_LINERS.strip().splitlines(),
    *(
        "",
        "\0",
        "\t x\n y",
        "(" * 300,
        "def f(): f()\nf()",
        "class E(Exception):\n    def __str__(self): 1 / 0\nraise E",
    ),
    *map(
        _returning,
        (
            "None",
            "7",
            "'x'",
            "{}",
            "[]",
            "object()",
            "Mean",
            "(Mean(), 1)",
            "lambda x: x",
            "jnp.zeros(3)",
            "network",
        ),
    ),
    *map(
        _with,
        (
            "return None",
            "return image[0]",
            "return image.astype(int)",
            "return image.tolist()",
            "return (image, image)",
            "1 / 0",
        ),
    ),
    *map(
        _with,
        (
            "return float(image.sum())",
            "raise ValueError('a\\nb')",
            "return image @ jnp.zeros((4, 4))",
            "return image * jnp.nan",
        ),
    ),
    *map(
        _with,
        (
            "return np.asarray(image)",
            "return image[:1, :1]",
            "return image[:0]",
            "return image if image.sum() > 0 else -image",
        ),
    ),
    *map(_with, ("print('hello'); return image", "raise SystemExit(3)", "raise BaseException")),
    *(
        _with(head=f"return {value}")
        for value in (
            "None",
            "features",
            "features.mean()",
            "'x'",
            "1 / 0",
            "(features.mean((0, 1)),)",
        )
    ),
    *(
        _with(head=f"return jnp.{value}")
        for value in ("zeros(0)", "zeros(1)", "zeros(3)", "full(3, jnp.nan)", "zeros(3, int)")
    ),
    _with(head="return jax.nn.softmax(features.mean((0, 1)))"),
    _with().replace("@jax.tree_util.register_static\n", ""),
    _with().replace("def head", "def heads"),
    _with("raise KeyError(3)").replace(
        "    def features(self, image, act=None)", "    @property\n    def features(self)"
    ),
    _with().replace("register_static", "register_pytree_node_class")
    + "Net.tree_flatten = lambda self: 1 / 0\n",
    _with().replace("register_static", "register_pytree_node_class")
    + "Net.tree_flatten = lambda self: (('x', object()), None)\n",
    _with() + "Net.__eq__ = Net.__hash__ = lambda self, other=None: 1 / 0\n",
    _with().replace(", act=None", ""),
    _with().replace("self, features", "self"),
    _with().replace("def features", "features = 3\n\n    def featured"),
]


def _other_words(rng: random.Random, argv: list[str]) -> list[str]:
    at = rng.randrange(1, len(argv) + 1)
    before, here, after = argv[:at], argv[at : at + 1], argv[at + 1 :]
    flag, word = rng.choice(FLAGS), rng.choice(WORDS)
    new = (
        [flag],
        [f"{flag}={word}"],
        [word],
        [*here, flag, word],
        [*here, *here],
        [text[: rng.randrange(1, 6)] for text in here],
        [],
    )
    return rng.choice(
        (
            [*before, *rng.choice(new), *after],
            [*before, *rng.choice(new), *here, *after],
            [*argv, flag, word],
        )
    )


def arguments(rng: random.Random, place: Path, base: Base) -> Case:
    """Valid arguments of every command, in which words are changed; none asks for much work."""
    net, images = f"{base.folder}/net.py:network", f"{base.folder}/images.npz"
    tiny = ["--model", "tiny", "--images", images, "--epochs", "1", "--batch-size", "2"]
    argv = list(
        rng.choice(
            (
                base.attack("--images", images),
                base.attack("--images", images, "--epsilon", "0.1", "--preset", "paper"),
                base.attack(
                    "--images",
                    f"{base.folder}/photos",
                    "--size",
                    "8",
                    "--sample",
                    "2",
                    "--seed",
                    "1",
                ),
                base.attack("--images", images, "--threat", "flow", "--flow-penalty", "0.1"),
                base.attack("--images", images, "--target-map", "patch"),
                [
                    "table",
                    "effectiveness",
                    "--model",
                    net,
                    "--images",
                    images,
                    *QUICK,
                    "--out",
                    "out",
                ],
                ["transfer", "run", "--model", net, "--to-model", net],
                ["convert", "none.npz", "--model", "tiny", "--out", "out.npz"],
                ["train", "classifier", *tiny, "--learning-rate", "0.1", "--out", "out"],
                ["train", "rts", *tiny, "--variation", "1", "--out", "out"],
                ["demo", "--out", "out"],
            )
        )
    )
    if argv[0] == "demo":
        argv.append("--no-such-flag")
    for _ in range(rng.choice((1, 1, 2, 3))):
        argv = _other_words(rng, argv)
    if "demo" in argv[:1] and "--no-such-flag" not in argv:
        argv.append("--no-such-flag")
    shutil.copytree(base.folder / "run", place / "run")
    return Case(
        [_affordable(word, before) for before, word in zip(["", *argv], argv, strict=False)]
    )


WORDS_OF_FLAGS = """
--model --weights --weights-key --masker --mean --std --images --size --labels --classes --sample --interpreter --out --overwrite
--encoder-loss --encoder-weight --threat --target-map --preset --epsilon --flow-penalty --warm-steps --steps --limit --batch-size
--seed --resume --quiet --to-model --to-weights --encoder --encoder-weights --tune --held-out --epochs --learning-rate --shift
--no-mirror --checkpoint-every --head-only --absent --area-power --help --version --e --st --s -x -- --- --Model --no-such —model
"""
FLAGS = WORDS_OF_FLAGS.split()
# valid, and then the machine is busy until the end of time
ENDLESS = ("--steps", "--warm-steps", "--epochs")


def _affordable(word: str, before: str) -> str:
    """A number of steps that can be awaited."""
    name, equals, value = word.partition("=")
    for flag, text, head in ((before, word, ""), (name, value, name + equals)):
        if (
            len(flag) > 3
            and any(endless.startswith(flag) for endless in ENDLESS)
            and re.fullmatch(r"[\d_]{3,}", text)
        ):
            return f"{head}2"
    return word


def finished_run(rng: random.Random, place: Path, base: Base) -> Case:
    """`transfer` of a run whose files were changed."""
    shutil.copytree(base.folder / "run", place / "run")
    if rng.random() < 0.6:
        _change_json(rng, place / "run" / "summary.json")
    else:
        _change_npz(rng, place / "run" / "results.npz")
    net = f"{base.folder}/net.py:network"
    other = rng.choice(([], ["--to-model", net]))
    return Case(
        ["transfer", "run", "--model", net, "--quiet", *other],
        ("run", "results.npz", "summary.json"),
    )


def unfinished_run(rng: random.Random, place: Path, base: Base) -> Case:
    """`--resume` of a run, or of a table, whose parts were changed."""
    command, out = rng.choice((("attack", "part"), ("table", "sheet")))
    shutil.copytree(base.folder / out, place / out)
    files = sorted(path for path in (place / out).rglob("*") if path.is_file())
    file = rng.choice(files)
    {".npz": _change_npz, ".json": _change_json}.get(file.suffix, _change_bytes)(rng, file)
    return Case([*unfinished(base, command, out), "--resume"], (out,), kept=True)


def finished_table(rng: random.Random, place: Path, base: Base) -> Case:
    """`table --resume` where the run it needs is finished, but changed."""
    name = rng.choice(("effectiveness", "transfer"))
    shutil.copytree(base.folder / "done" / "linf-benign", place / "out" / "linf-benign")
    file = (
        place / "out" / "linf-benign" / rng.choice(("summary.json", "summary.json", "results.npz"))
    )
    (_change_json if file.suffix == ".json" else _change_npz)(rng, file)
    argv = unfinished(base, "table", "out")
    argv[1] = name
    return Case([*argv, "--resume"], ("linf-benign",))


def _change_json(rng: random.Random, path: Path) -> None:
    tree = json.loads(path.read_text())
    words = [
        "interpreter",
        "attack",
        "rts",
        "grad",
        "adv2",
        "pgd",
        "ci",
        "rows",
        "schema",
        "default",
        "paper",
        "map_l1",
        "benign",
    ]
    text = json.dumps(tampered(rng, tree, words))
    others = (
        scribbled(rng, text),
        damaged(rng, text.encode()),
        b"[" * 10**5,
        b"[]",
        b"null",
        b"3",
        b'"x"',
    )
    path.write_bytes(text.encode() if rng.random() < 0.8 else rng.choice(others))


def _change_npz(rng: random.Random, path: Path) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    path.write_bytes(npz(rng, arrays))


def _change_bytes(rng: random.Random, path: Path) -> None:
    path.write_bytes(damaged(rng, path.read_bytes()))


Kind = Callable[[random.Random, Path, Base], Case]
KINDS: tuple[tuple[Kind, int], ...] = (
    (arrays_of_images, 4),
    (folder_of_images, 5),
    (labels, 3),
    (class_list, 2),
    (weights, 4),
    (masker, 2),
    (network, 2),
    (arguments, 5),
    (finished_run, 3),
    (unfinished_run, 2),
    (finished_table, 1),
)


# What is asked of each input


def tree(place: Path) -> dict[str, bytes | None]:
    """All that lies below a folder."""
    return {
        str(path.relative_to(place)): path.read_bytes() if path.is_file() else None
        for path in place.rglob("*")
    }


def peak() -> int:
    """The most memory that this process ever held, in bytes; since the last call where the system can begin anew (Linux)."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return most * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("i", range(COUNT))
def test_bad_input(i, base, capfd, monkeypatch):
    rng = random.Random(f"{SEED} {i}")
    kinds, shares = zip(*KINDS, strict=True)
    kind = rng.choices(kinds, shares)[0]
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        place, scratch = Path(folder, "place"), Path(folder, "scratch")
        place.mkdir(), scratch.mkdir()
        case = kind(rng, place, base)
        before = tree(place)
        about = f"input {i} of seed {SEED} ({kind.__name__}): adv2 {' '.join(map(ascii, case.argv))[:2000]}"
        peak()
        capfd.readouterr()
        held = peak()
        with monkeypatch.context() as patch:
            patch.chdir(place)
            patch.setattr(tempfile, "tempdir", str(scratch))
            patch.setattr(sys, "path", [*sys.path])  # a network's file adds its folder
            try:
                with warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always")
                    code = cli.main(case.argv)
            except SystemExit as stop:  # --help, --version
                code = stop.code
            except BaseException:
                pytest.fail(f"{about}\n{traceback.format_exc()}", pytrace=False)
        grown = peak() - held
        err = capfd.readouterr().err
        after = tree(place)
        about += f"\nexit code {code}, stderr {err[:2000]!r}"
        assert code in (0, 2), about
        assert not warned, f"{[str(warning.message) for warning in warned]}, {about}"
        assert not list(scratch.iterdir()), f"left in the folder of temporary files, {about}"
        if code == 2:
            assert err.startswith("adv2: ") and err.endswith("\n") and len(err.splitlines()) == 1, (
                about
            )
            assert err[:-1].isprintable(), about
            assert len(err) < 3000, about
            assert not case.names or any(name in err for name in case.names), (
                f"does not name what is wrong, {about}"
            )
            assert before == after or case.kept, (
                f"left behind: {sorted(name for name in after if before.get(name) != after[name])}, {about}"
            )
        else:
            # weights that were damaged may still give a network, of which this is said
            left_out = "adv2: the network gives logits that are not finite numbers on "
            assert all(line.startswith(left_out) for line in err.splitlines()), about
        if code == 0 or case.kept:
            assert not [
                name for name in after.keys() - before.keys() if Path(name).name.startswith(".")
            ], about
        size = sum(len(data or b"") for data in before.values())
        assert grown < CONSTANT + 10 * size + PIXEL * case.pixels, (
            f"{grown / MIB:.0f} MiB for a file of {size} bytes, {about}"
        )


# Ctrl-C


class Moments:
    """The moments at which a run may be interrupted: after a step, and before and after a file takes its place."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None = None):
        self.at, self.seen = at, 0
        replace = os.replace

        def replaced(*paths):
            self.pass_by()
            replace(*paths)
            self.pass_by()

        @contextlib.contextmanager
        def progress(quiet):
            yield lambda title, steps, **more: lambda new: self.pass_by()

        patch.setattr(os, "replace", replaced)
        patch.setattr(cli.commands, "progress_bars", progress)

    def pass_by(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise KeyboardInterrupt


def interruptible(base: Base, out: str) -> list[str]:
    words = [
        "attack",
        "--model",
        f"{base.folder}/net.py:network",
        "--images",
        f"{base.folder}/images.npz",
        "--out",
        out,
    ]
    return [
        *words,
        "--interpreter",
        "cam",
        "--batch-size",
        "1",
        "--limit",
        "2",
        "--warm-steps",
        "1",
        "--steps",
        "2",
    ]


@pytest.fixture(scope="module")
def whole(base):
    """How often a run may be interrupted, and what it leaves if it is not."""
    with pytest.MonkeyPatch.context() as patch:
        moments = Moments(patch)
        assert cli.main(interruptible(base, str(base.folder / "whole"))) == 0
    return moments.seen, tree(base.folder / "whole")


@pytest.mark.parametrize("i", range(max(COUNT // 30, 1)))
def test_interrupts(i, base, whole, tmp_path, capfd, monkeypatch):
    """Interrupted twice at random moments, a run says what is kept, and goes on from it to the same bytes."""
    rng, (moments, expected) = random.Random(f"{SEED} {i}"), whole
    out, resume = tmp_path / "out", []
    for at in (rng.randrange(1, moments + 1), rng.randrange(1, moments + 1)):
        capfd.readouterr()
        with monkeypatch.context() as patch:
            Moments(patch, at)
            code = cli.main([*interruptible(base, str(out)), *resume])
        err, parts = capfd.readouterr().err, sorted(out.rglob("0*.npz"))
        about = f"interrupts {i} of seed {SEED}, moment {at}: exit code {code}, stderr {err!r}, {sorted(tree(out))}"
        if code == 0:  # the rest of a run has fewer moments
            break
        kept = f"; {len(parts)} of 6 parts are kept, --resume goes on from them" if parts else ""
        assert (code, err) == (130, f"adv2: interrupted{kept}\n"), about
        assert not [name for name in tree(out) if Path(name).name.startswith(".")], about
        assert parts or not out.exists(), about
        resume = ["--resume"] if parts else []
    else:
        assert cli.main([*interruptible(base, str(out)), *resume]) == 0, about
    found = tree(out)
    assert found.keys() == expected.keys() and found["results.npz"] == expected["results.npz"], (
        about
    )
