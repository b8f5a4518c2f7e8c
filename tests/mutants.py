"""Damage at random: what test_fuzz.py does to files. All of it is drawn from the generator that a function is given."""

import contextlib
import functools
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
import pytest

MIB = 2**20
MOST = 89_478_485  # pixels of a picture, by Pillow's default

PIL = pytest.importorskip("PIL.Image")
safetensors = pytest.importorskip("safetensors.numpy")


# Damage to bytes and texts


def damaged(rng: random.Random, data: bytes) -> bytes:
    """One to three changes that know nothing of the format."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = _changed_bytes(rng, data)
    return data


def _changed_bytes(rng: random.Random, data: bytes) -> bytes:
    at, other, n = (
        rng.randrange(len(data) + 1),
        rng.randrange(len(data) + 1),
        min(len(data), int(2 ** rng.uniform(0, 8))),
    )
    before, after = data[:at], data[at:]
    return rng.choice(
        (
            lambda: before,
            lambda: after,
            lambda: b"",
            lambda: before + rng.randbytes(1) + after[1:],
            lambda: before + rng.randbytes(n) + after[n:],
            lambda: before + rng.choice((b"\0", b"\xff")) * n + after[n:],
            lambda: before + rng.randbytes(n) + after,
            lambda: before + after[n:],
            lambda: before + data[other : other + n] + after,
            lambda: data + rng.randbytes(n),
            lambda: data + data,
            lambda: rng.randbytes(n),
            lambda: before + rng.choice(WORDS).encode("utf-8", "surrogateescape") + after,
        )
    )()


COMMON = ["", " ", ",", "\n", "\r\n", "\n\n", ";", '"', "0", "1", "7", "-1", "\t"]
SHORT = r"""
0 1 -1 2 3 00 1.0 1e3 nan inf -inf 1e999 0x10 1_0 ٣ ² ½ true null 8/255 1/0 / . .. ~ * %s {} [ ] \ ' " "" `id` $HOME é 日本
, ; = : # -- - -h a.png a.png,1 b.png,2,0 cat shapes shapes:0 shapes:3 shapes:-1 shapes: shapes:9999999 tfds: tfds:mnist tfds:/
x.npz x.npz/test x.py:y .py: x.safetensors /dev/null
"""
CONTROL = [
    "",
    " ",
    "\r",
    "\n",
    "\r\n",
    "\t",
    "\x0b",
    "\x85",
    "\u2028",
    "\u202e",
    "\ufeff",
    "\udcff",
    "\x1b[31m",
    "e\u0301",
]
LONG = [
    *("9" * n for n in (9, 10, 20, 5000)),
    "a" * 300,
    "x" * 200_000,
    "n01440764 tench, Tinca tinca",
]
WORDS = [*SHORT.split(), *CONTROL, *LONG]


def scribbled(rng: random.Random, text: str) -> bytes:
    """A text with changed words, lines and encoding."""
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        text = _changed_text(rng, text)
    encoding = rng.choice((*["utf-8"] * 6, "utf-8-sig", "utf-16", "utf-32", "latin-1"))
    data = text.encode(encoding, "surrogateescape" if encoding == "utf-8" else "replace")
    return damaged(rng, data) if rng.random() < 0.2 else data


def _changed_text(rng: random.Random, text: str) -> str:
    cells, word = re.split(r"(\W)", text), rng.choice(WORDS if rng.random() < 0.5 else COMMON)
    at = rng.randrange(len(cells))
    cells[at] = rng.choice((word, cells[at] + word, cells[at] * 2, rng.choice(cells)))
    text = "".join(cells)
    if rng.random() < 0.3:
        lines = text.splitlines(keepends=True)
        rng.shuffle(lines)
        text = "".join(lines + lines[: rng.randrange(2)])
    return text


# Damage to arrays


def npz(rng: random.Random, arrays: dict[str, np.ndarray]) -> bytes:
    """An `.npz` that is damaged in its bytes, its arrays, or its members."""
    file, how = io.BytesIO(), rng.random()
    if how < 0.35:
        rng.choice((np.savez, np.savez_compressed))(file, allow_pickle=False, **arrays)
        return damaged(rng, file.getvalue())
    if how < 0.7:
        np.savez(file, **changed(rng, arrays))
        return file.getvalue()
    if how < 0.74:
        return bomb(
            rng.choice(list(arrays)[:2]),
            rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
            arrays,
        )
    victim = rng.choice(list(arrays))
    with zipfile.ZipFile(
        file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as archive:
        for name, array in arrays.items():
            entry, data = (
                (f"{name}.npy", npy(array)) if name != victim else _odd_member(rng, name, array)
            )
            archive.writestr(entry, data)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    """An array as NumPy writes it."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


@functools.cache
def _zeros(kind: int) -> bytes:
    """An archive of a third of a gigabyte of zeros."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", kind) as archive,
        archive.open("zeros.npy", "w", force_zip64=True) as member,
    ):
        member.write(
            _header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': (300, {MIB}), }}")
        )
        for _ in range(300):
            member.write(bytes(MIB))
    return file.getvalue()


def bomb(name: str, kind: int, arrays: dict[str, np.ndarray]) -> bytes:
    """An `.npz` of which one array unpacks to a thousand times its bytes, or more."""
    file = io.BytesIO(_zeros(kind).replace(b"zeros.npy", f"{name[:5]:z<5}.npy".encode()))
    with zipfile.ZipFile(file, "a") as archive:
        for other, array in arrays.items():
            if other != name:
                archive.writestr(f"{other}.npy", npy(array))
    return file.getvalue()


SHAPES = (
    10**12,
    (10**12,),
    (10**6, 10**6),
    (2**62, 2),
    (2**64,),
    (2**31, 8, 8, 3),
    (-1,),
    (0,),
    (1.5,),
    "x",
    None,
)
TYPES = (
    "|O",
    "<f3",
    "<U999999999",
    "|V0",
    "<M8",
    ">f4",
    "<c8",
    "|S1",
    "<f16",
    [("a", "<f4")],
    "",
    7,
)
NO_HEADERS = (
    "",
    "{}",
    "[" * 200,
    "(" * 9000,
    "{'descr': 1}",
    "import os",
    "\0",
    "x" * 60000,
    "{'descr': '\\d'}",
)


def _odd_member(rng: random.Random, name: str, array: np.ndarray) -> tuple[str, bytes]:
    """Name and bytes of a member that an honest writer does not write."""
    entry, data = f"{name}.npy", npy(array)

    def lying(descr, shape):
        return (
            _header(f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}")
            + data[128:]
        )

    return rng.choice(
        (
            lambda: (entry, lying(array.dtype.str, rng.choice(SHAPES))),
            lambda: (entry, lying(rng.choice(TYPES), (3,))),
            lambda: (entry, _header(rng.choice(NO_HEADERS)) + data),
            lambda: (entry, data[: rng.randrange(len(data))]),
            lambda: (entry, damaged(rng, data)),
            lambda: (name, data),
            lambda: (f"../{entry}", data),
            lambda: (f"{name}.txt", b"not an array"),
            lambda: (f"{name}/", b""),
            lambda: (f"{rng.choice(WORDS)[:999]}.npy".encode("utf-8", "replace").decode(), data),
        )
    )()


def _header(text: str) -> bytes:
    line = text.encode("latin-1", "replace") + b"\n"
    return (
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(line)) + line
        if len(line) < 2**16
        else b"\x93NUMPY\x09\x00"
    )


ODD = (np.nan, np.inf, -np.inf, -1, 1e38, 0.5, 2**31, 2**40, 255, 256, 1e-40)


def changed(rng: random.Random, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of which one is another, has another name, or is missing."""
    name = rng.choice(list(arrays))
    others = {key: array for key, array in arrays.items() if key != name}
    if (how := rng.random()) < 0.08:
        return others
    if how < 0.16:
        beside = (
            "",
            "x",
            name.upper(),
            f"{name}.",
            f"module.{name}",
            f"a/{name}",
            "é",
            "\n",
            "option/name",
            "option/depth",
            f"{name}\x1b",
        )
        return others | {rng.choice(beside): arrays[name]}
    with np.errstate(all="ignore"):
        return others | {name: _changed_array(rng, arrays[name])}


def _changed_array(rng: random.Random, a: np.ndarray) -> np.ndarray:
    numbers = a.dtype.kind in "fiub"
    types = (
        "f2",
        "f4",
        "f8",
        "i1",
        "i4",
        "i8",
        "u1",
        "u2",
        "u8",
        "?",
        "c8",
        "U3",
        "S2",
        "O",
        "M8[s]",
        ">f4",
        ">i8",
    )

    def with_odd_value():
        found = np.array(a, rng.choice((np.float32, np.float64)) if numbers else object)
        if found.size:
            found.reshape(-1)[rng.randrange(found.size)] = rng.choice(ODD)
        return found.astype(a.dtype) if rng.random() < 0.5 and a.dtype.kind in "f" else found

    of_any_shape = (
        lambda: a.astype("f8").astype(rng.choice(types)) if numbers else a.astype("O"),
        with_odd_value,
        with_odd_value,
        lambda: a[None],
        lambda: a[..., None],
        lambda: a.reshape(-1),
        lambda: np.asfortranarray(a),
        lambda: np.zeros_like(a),
        lambda: np.array(rng.choice(("text", "resnet50", "", -1, 10**9, np.nan, 2.5, True))),
        lambda: np.array([None, {}, "x"], object),
        lambda: np.zeros((1,) * rng.choice((5, 33)), a.dtype),
        lambda: np.zeros(a.shape, [("r", "f4"), ("g", "f4")]),
        lambda: np.zeros((*a.shape, 0), a.dtype),
    )
    with_axes = (
        lambda: a[0],
        lambda: a[:0],
        lambda: a[:1],
        lambda: a[..., :1],
        lambda: np.concatenate([a, a]),
        lambda: a.swapaxes(0, -1),
    )
    return rng.choice(of_any_shape + with_axes if a.ndim else of_any_shape)()


DTYPES = [
    *("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "C64", "F4", "X"),
    *("dtype", "shape", "data_offsets", "__metadata__"),
]


def tensors(rng: random.Random, arrays: dict[str, np.ndarray]) -> bytes:
    """A `.safetensors` that is damaged in its bytes, its header, or its arrays."""
    how = rng.random()
    if how < 0.3:
        wanted = {
            k: np.ascontiguousarray(v)
            for k, v in changed(rng, arrays).items()
            if v.dtype.kind in "fiub" and v.dtype.isnative
        }
        return safetensors.save(wanted)
    data = safetensors.save(arrays)
    if how < 0.6:
        return damaged(rng, data)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if rng.random() < 0.3:
        lengths = (0, 1, size - 1, size + 1, len(data), 10**8, 10**12, 2**63, 2**64 - 1)
        return struct.pack("<Q", rng.choice(lengths)) + data[8:]
    header = tampered(rng, header, DTYPES)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = b'{"a":' * 5000 + b"1" + b"}" * 5000
    return struct.pack("<Q", len(text)) + text + body


ODD_JSON = [
    None,
    True,
    0,
    1,
    -1,
    3,
    1.5,
    1e300,
    2**63,
    10**30,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [1, 2],
    {"x": 1},
]
ODD_JSON += ["", "x", "é\n", "9" * 400]


def tampered(rng: random.Random, tree: object, words: Sequence[str]) -> object:
    """A JSON tree in which one node is another."""
    nodes: list[tuple[object, object]] = []

    def walk(node):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            nodes.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    tree = json.loads(json.dumps(tree))
    walk(tree)
    for node, key in rng.sample(nodes, min(len(nodes), rng.choice((1, 1, 2)))):
        with contextlib.suppress(LookupError):  # the other change took it away
            if (how := rng.random()) < 0.25:
                del node[key]
            elif how < 0.4 and isinstance(node, dict):
                node[rng.choice(("x", "", "é\n", *words))] = node.pop(key)
            else:
                node[key] = rng.choice((*ODD_JSON, *words))
    return tree


# Pictures

FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "bmp": "BMP",
    "gif": "GIF",
    "tif": "TIFF",
    "webp": "WEBP",
    "ppm": "PPM",
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


EXIF = (
    b"garbage!",
    b"MM\0*\0\0\0\x08\xff\xff",
    b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",
)
SIZES = ((8, 8), (8, 8), (12, 10), (1, 1), (1, 4000), (4000, 1), (3, 200))


def picture(rng: random.Random, kind: str) -> tuple[bytes, int]:
    """A picture in a format, and the pixels that it may be said to have."""
    mode, (w, h) = rng.choice(MODES[kind]), rng.choice(SIZES)
    image = _in_mode(PIL.frombytes("L", (w, h), rng.randbytes(w * h)), mode)
    options = {}
    if kind in ("GIF", "TIFF", "PNG", "WEBP") and rng.random() < 0.08:
        options = {"save_all": True, "append_images": [image, image]}
    if kind in ("PNG", "JPEG", "WEBP") and rng.random() < 0.15:
        options["exif"] = b"Exif\0\0" + rng.choice(EXIF)
    if kind == "TIFF" and rng.random() < 0.5 and mode not in ("LAB", "F", "I", "I;16"):
        options["compression"] = rng.choice(("tiff_deflate", "tiff_lzw", "packbits"))
    file = io.BytesIO()
    image.save(file, kind, **options)
    data = file.getvalue()
    return _said_to_be_large(rng, kind, data) if rng.random() < 0.25 else (data, w * h)


def _in_mode(image, mode):
    if mode in ("LA", "LAB"):
        return PIL.merge(mode, [image] * len(mode))
    if mode == "I;16":
        return PIL.fromarray(np.asarray(image).astype(np.uint16) * 257)
    return (image.convert("RGB") if mode in ("CMYK", "YCbCr", "P", "RGBA") else image).convert(mode)


def _said_to_be_large(rng: random.Random, kind: str, data: bytes) -> tuple[bytes, int]:
    """A picture whose header says that it is larger than it is."""
    word, sides = 2**16 - 1, (0, 2, 40, 1000, 9000, 2**16 - 1, 2**20, 2**31 - 1, 2**31)
    w, h = rng.choice(((9000, 9000), (rng.choice(sides), rng.choice(sides))))
    small = min(w, word), min(h, word)
    if kind == "PNG":
        head = b"IHDR" + struct.pack(">II", w, h) + data[24:29]
        data = data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    elif kind == "BMP":
        data = data[:18] + struct.pack("<II", w, h) + data[26:]
    elif kind == "GIF":
        at = data.find(b",")
        data = data[:6] + struct.pack("<HH", *small) + data[10:]
        data = (
            data[: at + 5] + struct.pack("<HH", *small) + data[at + 9 :]
            if at > 0 and rng.random() < 0.7
            else data
        )
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
        data = (
            data[: at + 3] + struct.pack("<HH", 16383, 16383) + data[at + 7 :] if at > 0 else data
        )
    return data, min(w * h, MOST)
