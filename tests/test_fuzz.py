"""Bad input in bulk: files, arguments and networks that were damaged at random go through the command line.

Input i depends on (SEED, i) only, so that one that fails is found again by its number, whatever their count:

    ADV2_FUZZ=10000 python -m pytest tests/test_fuzz.py -q
    ADV2_FUZZ=10000 python -m pytest "tests/test_fuzz.py::test_bad_input[4711]"
"""

import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from adv2_jax import cli, models
from adv2_jax.experiments.batches import Batches
from adv2_jax.files import write_arrays

resource = pytest.importorskip("resource")  # Windows has none
PIL = pytest.importorskip("PIL.Image")
safetensors = pytest.importorskip("safetensors.numpy")

COUNT = int(os.environ.get("ADV2_FUZZ", "300"))
SEED = int(os.environ.get("ADV2_FUZZ_SEED", "0"))

MIB = 2**20
CONSTANT = 192 * MIB  # what a run takes with any file: compiled programs, decoders
MOST = 89_478_485  # pixels of a picture, by Pillow's default
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
QUICK = ["--limit", "1", "--batch-size", "1", "--warm-steps", "0", "--steps", "1", "--interpreter", "cam"]


class Base(NamedTuple):
    """What is damaged: a folder of valid files, and the arrays of some of them."""

    folder: Path
    images: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    masker: dict[str, np.ndarray]

    def attack(self, *words: str) -> list[str]:
        return ["attack", "--model", f"{self.folder}/net.py:network", *QUICK, "--out", "out", *words]


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
        patch.setitem(models.MODELS, "tiny", models.resnet.cifar(1))
        (folder / "fuzzed_network.py").write_text(NETWORK)
        (folder / "net.py").write_text(NET)
        images = np.random.default_rng(0).integers(80, 120, (N, SIZE, SIZE, 3), np.uint8)
        labels = np.arange(N, dtype=np.int32) % K
        images[np.arange(N), :4, :4, labels] = 200
        arrays = {"images": images, "labels": labels, "targets": (labels + 1) % K}
        arrays |= {"target_maps": np.linspace(0, 1, N * SIZE**2, dtype=np.float32).reshape(N, SIZE, SIZE), "masks": images[..., 0] > 150}
        write_arrays(folder / "images.npz", arrays)
        model = models.build("tiny", width=2, num_classes=K, image_size=SIZE)
        weights = models.convert.to_state_dict(model)
        models.save_masker(models.Masker(model, rngs=models.nnx.Rngs(0)), "tiny", folder / "masker.npz")
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
    save = Batches.save

    def stop(self, part, arrays):
        save(self, part, arrays)
        raise KeyboardInterrupt

    with patch.context() as inner:
        inner.setattr(Batches, "save", stop)
        assert cli.main(unfinished(base, "attack", "part")) == cli.main(unfinished(base, "table", "sheet")) == 130


def unfinished(base: Base, command: str, out: str) -> list[str]:
    name = ["effectiveness"] if command == "table" else []
    model = ["--model", f"{base.folder}/net.py:network", "--images", f"{base.folder}/images.npz"]
    return [command, *name, *model, *QUICK, "--quiet", "--out", out]


# Damage to bytes and texts


def damaged(rng: random.Random, data: bytes) -> bytes:
    """One to three changes that know nothing of the format."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, n = rng.randrange(len(data) + 1), min(len(data), int(2 ** rng.uniform(0, 8)))
        other = rng.randrange(len(data) + 1)
        data = rng.choice(
            (
                lambda: data[:at],
                lambda: data[at:],
                lambda: b"",
                lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
                lambda: data[:at] + rng.randbytes(n) + data[at + n :],
                lambda: data[:at] + rng.choice((b"\0", b"\xff")) * n + data[at + n :],
                lambda: data[:at] + rng.randbytes(n) + data[at:],
                lambda: data[:at] + data[at + n :],
                lambda: data[:at] + data[other : other + n] + data[at:],
                lambda: data + rng.randbytes(n),
                lambda: data + data,
                lambda: rng.randbytes(n),
                lambda: data[:at] + rng.choice(WORDS).encode("utf-8", "surrogateescape") + data[at:],
            )
        )()
    return data


WORDS = (
    *("", " ", "0", "1", "-1", "2", "3", "00", "1.0", "1e3", "nan", "inf", "-inf", "1e999", "0x10", "1_0", "٣", "²", "½", "true", "null"),
    *("9" * 9, "9" * 10, "9" * 20, "9" * 5000, "8/255", "1/0", "/", ".", "..", "~", "*", "%s", "{}", "\\", "'", '"', '""', "`id`", "$HOME"),
    *("a" * 300, "x" * 200000, "é", "e\u0301", "日本", "\u202e", "\u2028", "\ufeff", "\udcff", "\x1b[31m", "\r", "\n", "\r\n", "\t", "\x0b", "\x85"),
    *(",", ";", "=", ":", "#", "--", "-", "-h", "[", "]", "a.png", "a.png,1", "b.png,2,0", "cat", "n01440764 tench, Tinca tinca", "shapes"),
    *("shapes:0", "shapes:3", "shapes:-1", "shapes:", "tfds:", "tfds:mnist", "tfds:/", "x.npz", "x.py:y", ".py:", "x.safetensors", "/dev/null"),
)
COMMON = ("", " ", ",", "\n", "\r\n", "\n\n", ";", '"', "0", "1", "7", "-1", "\t")


def scribbled(rng: random.Random, text: str) -> bytes:
    """A text with changed words, lines and encoding."""
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        cells = re.split(r"(\W)", text)
        at = rng.randrange(len(cells))
        word = rng.choice(WORDS if rng.random() < 0.5 else COMMON)
        cells[at] = rng.choice((lambda: word, lambda: cells[at] + word, lambda: cells[at] * 2, lambda: rng.choice(cells)))()
        text = "".join(cells)
        if rng.random() < 0.3:
            lines = text.splitlines(keepends=True)
            rng.shuffle(lines)
            text = "".join(lines + lines[: rng.randrange(2)])
    encoding = rng.choice((*["utf-8"] * 6, "utf-8-sig", "utf-16", "utf-32", "latin-1"))
    data = text.encode(encoding, "surrogateescape" if encoding == "utf-8" else "replace")
    return damaged(rng, data) if rng.random() < 0.2 else data


# Damage to arrays


def npz(rng: random.Random, arrays: dict[str, np.ndarray]) -> bytes:
    """An `.npz` that is damaged in its bytes, its arrays, or its members."""
    file = io.BytesIO()
    how = rng.random()
    if how < 0.35:
        np.savez_compressed(file, allow_pickle=False, **arrays) if rng.random() < 0.5 else np.savez(file, allow_pickle=False, **arrays)
        return damaged(rng, file.getvalue())
    if how < 0.7:
        np.savez(file, **changed(rng, arrays))
        return file.getvalue()
    if how < 0.74:
        return bomb(rng.choice(list(arrays)[:2]), rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)), arrays)
    victim = rng.choice(list(arrays))
    with zipfile.ZipFile(file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            if name == victim:
                _odd_member(rng, archive, name, member.getvalue(), array)
            else:
                archive.writestr(f"{name}.npy", member.getvalue())
    return file.getvalue()


@functools.cache
def _zeros(kind: int) -> bytes:
    """An archive of a third of a gigabyte of zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive, archive.open("zeros.npy", "w", force_zip64=True) as member:
        member.write(_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': (300, {MIB}), }}"))
        for _ in range(300):
            member.write(bytes(MIB))
    return file.getvalue()


def bomb(name: str, kind: int, arrays: dict[str, np.ndarray]) -> bytes:
    """An `.npz` of which one array unpacks to a thousand times its bytes, or more."""
    file = io.BytesIO(_zeros(kind).replace(b"zeros.npy", f"{name[:5]:z<5}.npy".encode()))
    with zipfile.ZipFile(file, "a") as archive:
        for other, array in arrays.items():
            if other != name:
                member = io.BytesIO()
                np.save(member, array, allow_pickle=False)
                archive.writestr(f"{other}.npy", member.getvalue())
    return file.getvalue()


def _odd_member(rng: random.Random, archive: zipfile.ZipFile, name: str, data: bytes, array: np.ndarray) -> None:
    """A member that an honest writer does not write."""
    entry = f"{name}.npy"

    def lying(shape, descr=array.dtype.str, body=data[128:]):
        return archive.writestr(entry, _header(f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}") + body)

    rng.choice(
        (
            lambda: lying(rng.choice((10**12, (10**12,), (10**6, 10**6), (2**62, 2), (2**64,), (2**31, 8, 8, 3), (-1,), (0,), (1.5,), "x", None))),
            lambda: lying((3,), rng.choice(("|O", "<f3", "<U999999999", "|V0", "<M8", ">f4", "<c8", "|S1", "<f16", [("a", "<f4")], "", 7))),
            lambda: archive.writestr(entry, _header(rng.choice(("", "{}", "[" * 200, "(" * 9000, "{'descr': 1}", "import os", "\0", "x" * 60000))) + data),
            lambda: archive.writestr(entry, data[: rng.randrange(len(data))]),
            lambda: archive.writestr(entry, damaged(rng, data)),
            lambda: archive.writestr(name, data),
            lambda: archive.writestr(f"../{entry}", data),
            lambda: archive.writestr(f"{name}.txt", b"not an array"),
            lambda: archive.writestr(f"{name}/", b""),
            lambda: archive.writestr(rng.choice(WORDS[:60]).encode("utf-8", "replace").decode() + ".npy", data),
        )
    )()


def _header(text: str) -> bytes:
    line = text.encode("latin-1", "replace") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(line)) + line if len(line) < 2**16 else b"\x93NUMPY\x09\x00"


ODD = (np.nan, np.inf, -np.inf, -1, 1e38, 0.5, 2**31, 2**40, 255, 256, 1e-40)


def changed(rng: random.Random, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of which one, or its name, is another."""
    found, name = dict(arrays), rng.choice(list(arrays))
    a = found[name]

    def value():
        floats = np.array(a, rng.choice((np.float32, np.float64)) if a.dtype.kind in "fiub" else object)
        flat = floats.reshape(-1)
        flat[rng.randrange(max(len(flat), 1)) if len(flat) else slice(0)] = rng.choice(ODD)
        with np.errstate(all="ignore"):
            return floats.astype(a.dtype) if rng.random() < 0.5 and a.dtype.kind in "f" else floats

    def renamed():
        found[rng.choice(("", "x", name.upper(), f"{name}.", f"module.{name}", f"a/{name}", "é", "\n", "option/name", "option/depth", name + "\x1b"))] = found.pop(name)
        return None

    types = ("f2", "f4", "f8", "i1", "i4", "i8", "u1", "u2", "u8", "?", "c8", "U3", "S2", "O", "M8[s]", ">f4", ">i8")
    with np.errstate(all="ignore"):
        made = rng.choice(
            (
                lambda: a.astype("f8").astype(rng.choice(types)) if a.dtype.kind in "fiub" else a.astype("O"),
                value,
                value,
                renamed,
                lambda: found.pop(name) and None if False else _dropped(found, name),
                lambda: a[None],
                lambda: a[..., None],
                lambda: a[0] if a.ndim else a[None, None],
                lambda: a.reshape(-1),
                lambda: a[:0] if a.ndim else np.zeros(0, a.dtype),
                lambda: np.concatenate([a, a]) if a.ndim else np.stack([a, a]),
                lambda: a.swapaxes(0, -1) if a.ndim else a,
                lambda: np.asfortranarray(a),
                lambda: np.zeros_like(a),
                lambda: np.array(rng.choice(("text", "resnet50", "", -1, 10**9, np.nan, 2.5, True))),
                lambda: np.array([None, {}, "x"], object),
                lambda: np.zeros((1,) * rng.choice((5, 33)), a.dtype),
                lambda: a[..., :1] if a.ndim else a,
                lambda: a[:1] if a.ndim else a,
                lambda: np.zeros(a.shape, [("r", "f4"), ("g", "f4")]),
            )
        )()
    if made is not None:
        found[name] = made
    return found


def _dropped(found: dict[str, np.ndarray], name: str) -> None:
    del found[name]


def tensors(rng: random.Random, arrays: dict[str, np.ndarray]) -> bytes:
    """A `.safetensors` that is damaged in its bytes, its header, or its arrays."""
    how = rng.random()
    if how < 0.3:
        wanted = {k: np.ascontiguousarray(v) for k, v in changed(rng, arrays).items() if v.dtype.kind in "fiub" and v.dtype.isnative}
        return safetensors.save(wanted)
    data = safetensors.save(arrays)
    if how < 0.6:
        return damaged(rng, data)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if rng.random() < 0.3:
        lengths = (0, 1, size - 1, size + 1, len(data), 10**8, 10**12, 2**63, 2**64 - 1)
        return struct.pack("<Q", rng.choice(lengths)) + data[8:]
    header = tampered(rng, header, ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "C64", "F4", "X", "dtype", "shape", "data_offsets", "__metadata__"))
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = b'{"a":' * 5000 + b"1" + b"}" * 5000
    return struct.pack("<Q", len(text)) + text + body


def tampered(rng: random.Random, tree: object, words: tuple[object, ...]) -> object:
    """A JSON tree in which one node is another."""
    nodes: list[tuple[object, object]] = []

    def walk(node):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            nodes.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    tree = json.loads(json.dumps(tree))
    walk(tree)
    for _ in range(rng.choice((1, 1, 2))):
        node, key = rng.choice(nodes)
        odd = (None, True, 0, 1, -1, 3, 1.5, 1e300, 2**63, 10**30, "", "x", "é\n", "9" * 400, [], {}, [[]], [1, 2], {"x": 1}, float("nan"), float("inf"))
        try:
            if rng.random() < 0.25:
                del node[key]
            elif rng.random() < 0.2 and isinstance(node, dict):
                node[rng.choice(("x", "", "é\n", *map(str, words)))] = node.pop(key)
            else:
                node[key] = rng.choice((*odd, *words))
        except (KeyError, IndexError):
            pass  # the other change took it away
    return tree


# Pictures

FORMATS = {
    **{"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "webp": "WEBP", "ppm": "PPM", "pgm": "PPM"},
    "jp2": "JPEG2000",
}
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F", "YCbCr"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I", "F"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
}


def picture(rng: random.Random, kind: str) -> tuple[bytes, int]:
    """A picture in a format, and the pixels that it may be said to have."""
    mode = rng.choice(MODES[kind])
    size = rng.choice(((8, 8), (8, 8), (12, 10), (1, 1), (1, 4000), (4000, 1), (3, 200)))
    image = PIL.effect_noise(size, 60).convert("L")
    image = image.convert("RGB").convert(mode) if mode in ("CMYK", "LAB", "YCbCr", "P", "RGBA", "RGB") and mode != "LAB" else _mode(image, mode)
    options = {}
    if kind in ("GIF", "TIFF", "PNG", "WEBP") and rng.random() < 0.08:
        options = {"save_all": True, "append_images": [image, image]}
    if kind in ("PNG", "JPEG", "WEBP") and rng.random() < 0.15:
        options["exif"] = rng.choice((b"Exif\0\0garbage!", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0"))
    if kind == "TIFF" and rng.random() < 0.5 and mode not in ("LAB", "F", "I", "I;16"):
        options["compression"] = rng.choice(("tiff_deflate", "tiff_lzw", "packbits"))
    file = io.BytesIO()
    image.save(file, kind, **options)
    data = file.getvalue()
    if rng.random() < 0.25:
        return _said_to_be_large(rng, kind, data)
    return data, size[0] * size[1]


def _mode(image, mode):
    if mode == "LAB":
        return PIL.merge("LAB", (image, image, image))
    if mode == "LA":
        return PIL.merge("LA", (image, image))
    if mode == "I;16":
        return PIL.fromarray(np.asarray(image).astype(np.uint16) * 257)
    return image.convert(mode)


def _said_to_be_large(rng: random.Random, kind: str, data: bytes) -> tuple[bytes, int]:
    """A picture whose header says that it is larger than it is."""
    w, h = rng.choice(((9000, 9000), (2**16 - 1, 1000), (2**16 - 1, 2**16 - 1), (2**31 - 1, 2**31 - 1), (2**31, 2), (0, 0), (0, 8), (40, 2**20)))
    small = min(w, 2**16 - 1), min(h, 2**16 - 1)
    if kind == "PNG":
        head = b"IHDR" + struct.pack(">II", w, h) + data[24:29]
        data = data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    elif kind == "BMP":
        data = data[:18] + struct.pack("<II", w, h) + data[26:]
    elif kind == "GIF":
        at = data.find(b",")
        data = data[:6] + struct.pack("<HH", *small) + data[10:]
        data = data[: at + 5] + struct.pack("<HH", *small) + data[at + 9 :] if at > 0 and rng.random() < 0.7 else data
    elif kind == "JPEG":
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        data = data[: at + 5] + struct.pack(">HH", small[1], small[0]) + data[at + 9 :]
    elif kind == "TIFF":
        for tag, value in ((256, w), (257, h)):
            at = data.find(struct.pack("<H", tag) + b"\x03\0\x01\0\0\0")
            if at > 0:
                data = data[: at + 2] + struct.pack("<HII", 4, 1, value) + data[at + 12 :]
    elif kind == "PPM":
        data = re.sub(rb"^(P\d)\s+\d+\s+\d+", rb"\1 %d %d" % (w, h), data)
    elif kind == "WEBP":
        at = data.find(b"\x9d\x01\x2a")
        data = data[: at + 3] + struct.pack("<HH", 16383, 16383) + data[at + 7 :] if at > 0 else data
    return data, min(w * h, MOST)


# The kinds of input


def arrays_of_images(rng: random.Random, place: Path, base: Base) -> Case:
    keys = [key for key in base.images if key in ("images", "labels") or rng.random() < 0.5]
    (place / "mutant.npz").write_bytes(npz(rng, {key: base.images[key] for key in keys}))
    size = ["--size", str(SIZE)] if rng.random() < 0.7 else []
    return Case(base.attack("--images", "mutant.npz", *size), ("mutant.npz", "image", "network", "target"))


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
    return Case(base.attack("--images", "photos", "--size", str(SIZE)), ("mutant", "sub", "images right"), pixels)


def labels(rng: random.Random, place: Path, base: Base) -> Case:
    text = "".join(f"{name}.png,{i % K}{rng.choice(('', '', f',{(i + 1) % K}'))}\n" for i, name in enumerate("abcd"))
    head = rng.choice(("", "file,class\n", "file,class,target\n"))
    (place / "labels.csv").write_bytes(scribbled(rng, head + text))
    return Case(base.attack("--images", f"{base.folder}/photos", "--size", str(SIZE), "--labels", "labels.csv"), ("labels.csv", "label", "target", "images right"))


def class_list(rng: random.Random, place: Path, base: Base) -> Case:
    text = rng.choice(("cat\ndog\nfox\n", "n01 cat\nn02 dog\nn03 fox, red fox\n", "1 euro\n2 euro\n3D printer\n"))
    (place / "classes.txt").write_bytes(scribbled(rng, text))
    source = rng.choice(("images.npz", "photos", "shapes:2"))
    source = source if ":" in source else f"{base.folder}/{source}"
    return Case(base.attack("--images", source, "--size", str(SIZE), "--classes", "classes.txt"), ("classes.txt", "images right"))


def weights(rng: random.Random, place: Path, base: Base) -> Case:
    suffix = rng.choice(("npz", "safetensors", "npz", "safetensors", "pth", "bin", "txt"))
    write = tensors if suffix == "safetensors" or (suffix != "npz" and rng.random() < 0.5) else npz
    mutant = f"mutant.{suffix}"
    (place / mutant).write_bytes(write(rng, base.weights))
    if rng.random() < 0.8:
        return Case(["convert", mutant, "--model", "tiny", "--out", f"out.{rng.choice(('npz', 'safetensors'))}"], (mutant,))
    words = ["attack", "--model", "tiny", "--weights", mutant, "--images", f"{base.folder}/photos", "--size", str(SIZE), *QUICK, "--out", "out"]
    return Case(words, (mutant, "network"))


def masker(rng: random.Random, place: Path, base: Base) -> Case:
    (place / "mutant.npz").write_bytes(npz(rng, base.masker))
    words = base.attack("--images", f"{base.folder}/photos", "--size", str(SIZE), "--masker", "mutant.npz", "--interpreter", rng.choice(("rts", "cam")))
    return Case(words, ("mutant.npz", "masker", "network"))


def network(rng: random.Random, place: Path, base: Base) -> Case:
    text = rng.choice(SNIPPETS) if rng.random() < 0.6 else scribbled(rng, NETWORK + NET.partition("\n\n")[2])
    (place / "mine.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    name = rng.choice(("ready", "network", "network", "network", "Mean", "nothing", "a b", "", "é", "jax"))
    weights = rng.choice(([], [], [], ["--weights", f"{base.folder}/masker.npz"], ["--weights", "none.npz"], ["--mean", "0", "0", "0"]))
    return Case(base.attack("--images", f"{base.folder}/images.npz", "--model", f"mine.py:{name}", *weights), ("mine.py", "network", "--", "head", "features", "logits"))


def _returning(value: str, more: str = "") -> str:
    return f"import jax, jax.numpy as jnp, numpy as np\n{NETWORK}\n{more}\ndef network(weights=None):\n    return {value}\n"


def _with(features: str = "return image", head: str = "return 10 * features.mean(axis=(0, 1))") -> str:
    body = f"class Net:\n    def features(self, image, act=None):\n        {features}\n\n    def head(self, features):\n        {head}\n"
    return f"import jax, jax.numpy as jnp, numpy as np\n@jax.tree_util.register_static\n{body}\nready = Net()\nnetwork = Net\n"


SNIPPETS = (
    *("def network(:\n", "network = (\n", "\0", "\t x\n y", "# coding: nothing\n", "return 1", "x = '\\", "network = 07", "(" * 300, "import no_such_module"),
    *("raise SystemExit", "raise SystemExit(0)", "import sys; sys.exit('no')", "raise ValueError", "raise KeyError(3)", "raise ValueError('a\\nb')"),
    *("raise BaseException('x')", "raise GeneratorExit", "raise StopIteration", "raise MemoryError", "assert False", "1 / 0", "def f(): f()\nf()"),
    *("raise ExceptionGroup('many', [ValueError(1)])", "raise UnicodeDecodeError('utf-8', b'', 0, 1, 'x')", "class E(Exception):\n    def __str__(self): 1 / 0\nraise E"),
    *("", "network = None", "network = 7", "network = 'x'", "network = []", "import jax as network", "network = print", "network = lambda a, b: 1"),
    *("def __getattr__(name): raise RuntimeError(name)", "import warnings\nwarnings.warn('old')\nnetwork = 1", "async def network(): pass", "def network(): yield 1"),
    *map(_returning, ("None", "7", "'x'", "{}", "[]", "object()", "Mean", "(Mean(), 1)", "lambda x: x", "jnp.zeros(3)", "np.zeros(3)", "network")),
    *map(_with, ("return None", "return image[0]", "return image.astype(int)", "return image.tolist()", "return float(image.sum())", "return (image, image)")),
    *map(_with, ("raise ValueError('a\\nb')", "1 / 0", "return image @ jnp.zeros((4, 4))", "return image * jnp.nan", "return np.asarray(image)", "return image[:1, :1]")),
    *map(_with, ("return image[:0]", "return image if image.sum() > 0 else -image", "print('hello'); return image", "raise SystemExit(3)", "raise KeyboardInterrupt2")),
    *(_with(head=f"return {value}") for value in ("None", "features", "features.mean()", "jnp.zeros(0)", "jnp.zeros(1)", "jnp.zeros(3)", "jnp.full(3, jnp.nan)")),
    *(_with(head=f"return {value}") for value in ("features.mean((0, 1)).astype(int)", "'x'", "jax.nn.softmax(features.mean((0, 1)))", "(features.mean((0, 1)),)", "1 / 0")),
    _with().replace("@jax.tree_util.register_static\n", ""),
    _with().replace("def head", "def heads"),
    _with().replace(", act=None", ""),
    _with().replace("self, features", "self"),
    _with().replace("def features", "features = 3\n\n    def featured"),
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
                base.attack("--images", f"{base.folder}/photos", "--size", "8", "--sample", "2", "--seed", "1"),
                base.attack("--images", images, "--threat", "flow", "--flow-penalty", "0.1"),
                base.attack("--images", images, "--target-map", "patch"),
                ["table", "effectiveness", "--model", net, "--images", images, *QUICK, "--out", "out"],
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
        at = rng.randrange(1, len(argv) + 1)
        rng.choice(
            (
                lambda: argv.insert(at, rng.choice(FLAGS)),
                lambda: argv.insert(at, rng.choice(FLAGS) + "=" + rng.choice(WORDS)),
                lambda: argv.extend((rng.choice(FLAGS), rng.choice(WORDS))),
                lambda: argv.extend((rng.choice(FLAGS), rng.choice(WORDS))),
                lambda: argv.insert(at, rng.choice(WORDS)),
                lambda: argv.__setitem__(min(at, len(argv) - 1), rng.choice(WORDS)),
                lambda: argv.pop(min(at, len(argv) - 1)) if len(argv) > 2 else None,
                lambda: argv.insert(at, argv[min(at, len(argv) - 1)]),
                lambda: argv.__setitem__(min(at, len(argv) - 1), argv[min(at, len(argv) - 1)][: rng.randrange(1, 6)]),
            )
        )()
    if "demo" in argv[:1] and "--no-such-flag" not in argv:
        argv.append("--no-such-flag")
    shutil.copytree(base.folder / "run", place / "run")
    return Case([_affordable(word, before) for before, word in zip(["", *argv], argv, strict=False)])


FLAGS = (
    *("--model", "--weights", "--masker", "--mean", "--std", "--images", "--size", "--labels", "--classes", "--sample", "--interpreter", "--out"),
    *("--encoder-loss", "--encoder-weight", "--threat", "--target-map", "--preset", "--epsilon", "--flow-penalty", "--warm-steps", "--steps"),
    *("--limit", "--batch-size", "--seed", "--resume", "--quiet", "--to-model", "--to-weights", "--encoder", "--encoder-weights", "--tune", "--overwrite"),
    *("--held-out", "--epochs", "--learning-rate", "--shift", "--no-mirror", "--checkpoint-every", "--head-only", "--absent", "--area-power"),
    *("--help", "--version", "--e", "--st", "--s", "-x", "--", "---", "--Model", "--no-such", "—model"),
)
ENDLESS = ("--steps", "--warm-steps", "--epochs")  # valid, and then the machine is busy until the end of time


def _affordable(word: str, before: str) -> str:
    """A number of steps that can be awaited."""
    name, equals, value = word.partition("=")
    for flag, text, head in ((before, word, ""), (name, value, name + equals)):
        if len(flag) > 3 and any(endless.startswith(flag) for endless in ENDLESS) and re.fullmatch(r"[\d_]{3,}", text):
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
    return Case(["transfer", "run", "--model", net, "--quiet", *other], ("run", "results.npz", "summary.json"))


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
    file = place / "out" / "linf-benign" / rng.choice(("summary.json", "summary.json", "results.npz"))
    (_change_json if file.suffix == ".json" else _change_npz)(rng, file)
    argv = unfinished(base, "table", "out")
    argv[1] = name
    return Case([*argv, "--resume"], ("linf-benign",))


def _change_json(rng: random.Random, path: Path) -> None:
    tree = json.loads(path.read_text())
    words = ("interpreter", "attack", "rts", "grad", "mask", "adv2", "pgd", "ci", "rows", "schema", "default", "paper", "map_l1", "benign")
    text = json.dumps(tampered(rng, tree, words))
    path.write_bytes(text.encode() if rng.random() < 0.8 else rng.choice((scribbled(rng, text), damaged(rng, text.encode()), b"[" * 10**5, b"[]", b"null", b"3", b'"x"')))


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
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


def peak() -> int:
    """The most memory that this process ever held, in bytes; since the last call where the system can begin anew (Linux)."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
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
        out, err = capfd.readouterr()
        after = tree(place)
        about += f"\nexit code {code}, stderr {err[:2000]!r}"
        assert code in (0, 2), about
        assert not warned, f"{[str(warning.message) for warning in warned]}, {about}"
        assert not list(scratch.iterdir()), f"left in the folder of temporary files, {about}"
        if code == 2:
            assert err.startswith("adv2: ") and err.endswith("\n") and len(err.splitlines()) == 1, about
            assert err[:-1].isprintable(), about
            assert len(err) < 3000, about
            assert not case.names or any(name in err for name in case.names), f"does not name what is wrong, {about}"
            assert before == after or case.kept, f"left behind: {sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))}, {about}"
        else:
            assert err == "", about
        if code == 0 or case.kept:
            assert not [name for name in after.keys() - before.keys() if Path(name).name.startswith(".")], about
        size = sum(len(data or b"") for data in before.values())
        assert grown < CONSTANT + 10 * size + PIXEL * case.pixels, f"{grown / MIB:.0f} MiB for a file of {size} bytes, {about}"


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
        patch.setattr(cli, "_progress", progress)

    def pass_by(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise KeyboardInterrupt


def interruptible(base: Base, out: str) -> list[str]:
    words = ["attack", "--model", f"{base.folder}/net.py:network", "--images", f"{base.folder}/images.npz", "--out", out]
    return [*words, "--interpreter", "cam", "--batch-size", "1", "--limit", "2", "--warm-steps", "1", "--steps", "2"]


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
        kept = f"; {len(parts)} of 4 parts are kept, --resume goes on from them" if parts else ""
        assert (code, err) == (130, f"adv2: interrupted{kept}\n"), about
        assert not [name for name in tree(out) if Path(name).name.startswith(".")], about
        assert parts or not out.exists(), about
        resume = ["--resume"] if parts else []
    else:
        assert cli.main([*interruptible(base, str(out)), *resume]) == 0, about
    found = tree(out)
    assert found.keys() == expected.keys() and found["results.npz"] == expected["results.npz"], about
