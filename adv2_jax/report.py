"""A finished run as one self-contained HTML page.

The page needs nothing but itself: the style is inline, every picture is a PNG inside a `data:` address, and it opens
offline. This module needs nothing but NumPy. Shapes: N images, H x W pixels, maps of h x w values in [0, 1].
"""

import base64
import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adv2_jax.files import SCHEMA, atomic, read_arrays

Pixels = NDArray[np.uint8]
Arrays = Mapping[str, NDArray[Any]]

MAX_SIDE = 112  # half of 224: larger pictures are shrunk, or 64 photographs would make a page of 100 MB
DASH = "–"

# The inferno colour map at 0, 1/8, ..., 1: its lightness rises, for colour-blind readers and in grey print too.
INFERNO = np.array(
    [
        [0, 0, 4],
        [31, 12, 72],
        [85, 15, 109],
        [136, 34, 106],
        [186, 54, 85],
        [227, 89, 51],
        [249, 140, 10],
        [249, 201, 50],
        [252, 255, 164],
    ]
)

INTERPRETERS = {
    "grad": ("GRAD", "How strongly each pixel moves the score of the class: the absolute gradient."),
    "cam": ("CAM", "Class activation mapping: the last feature maps, weighted by the linear layer."),
    "grad_cam": ("Grad-CAM", "The last feature maps, weighted by the mean gradient of the class score."),
    "rts": ("RTS", "Real-time saliency: a second network, trained to predict the map."),
    "mask": ("MASK", "The smallest mask whose removal from the image destroys the class."),
}
ATTACKS = ("pgd", "adv2")


class Column(NamedTuple):
    """One column of numbers: the key in `rows`, the heading, decimals, and the factor from file to page."""

    key: str
    heading: str
    decimals: int
    factor: float = 1.0


COLUMNS = (
    Column("n", "Images", 0),
    Column("asr", "ASR ↑", 3),
    Column("mc", "MC ↑", 3),
    Column("map_l1", "Map L1 ↓", 4),
    Column("map_l2", "Map L2 ↓", 4),
    Column("map_iou75", "IoU@75 ↑", 3),
    Column("map_iou50", "IoU@.5 ↑", 3),
    Column("linf", "L∞ · 255", 2, 255.0),
    Column("l2", "L2", 3),
    Column("gradient_evaluations", "Gradients", 0),
    Column("seconds", "Seconds", 1),
)
ROW_NAMES = ("interpreter", "attack", "threat")


def write(directory: Path | str) -> Path:
    """Reads `summary.json` and `results.npz` of a finished run and writes `report.html` next to them.

    Args:
        directory: the folder of the run.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if there is no summary.
        ValueError: if the summary has another schema, or the results cannot be read.
    """
    folder = Path(directory)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    page = folder / "report.html"
    with atomic(page, "w") as file:
        file.write(render(summary, read_arrays(folder / "results.npz")))
    return page


def render(summary: Mapping[str, Any], results: Arrays, *, limit: int = 64) -> str:
    """Renders a run as one HTML page.

    Args:
        summary: the content of `summary.json`.
        results: the content of `results.npz`; only the pictures that are there are shown.
        limit: number of images shown per interpreter; the page says so when it cuts.

    Returns:
        The page.

    Raises:
        ValueError: if the summary has another schema.
    """
    _check_schema(summary)
    total = len(results["images"])
    shown = _first(results, limit)
    rows, config = summary["rows"], summary.get("config", {})
    names = dict.fromkeys(row["interpreter"] for row in rows)
    interpreters = [name for name in names if f"{name}/benign_maps" in shown]
    title = f"ADV² against {config.get('model', 'a classifier')}"
    return PAGE.substitute(
        title=escape(title),
        style=STYLE + _page_variables(shown["images"]),
        facts=_definitions(_facts(summary, total), "facts"),
        navigation="".join(f'<a href="#{_anchor(name)}">{escape(_title(name))}</a>' for name in interpreters),
        table=_table(rows),
        sections="".join(_section(name, summary, shown, total) for name in interpreters),
        reproduction=_reproduction(config, summary.get("environment", {})),
    )


def write_training(directory: Path | str) -> Path:
    """Reads `summary.json` of a finished training and writes `report.html` next to it: loss curve, and what was measured.

    Args:
        directory: the folder of the training.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if there is no summary.
        ValueError: if the summary has another schema.
    """
    folder = Path(directory)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    _check_schema(summary)
    page = folder / "report.html"
    config, counts = summary["config"], summary["counts"]
    facts = {"Model": config["model"], "Images trained on": counts["train"], "Held out": counts["held_out"]}
    for key, name in (("accuracy", "Held-out accuracy"), ("accuracy_before", "Before")):
        if summary.get(key) is not None:
            facts[name] = f"{summary[key]:.4f}"
    with atomic(page, "w") as file:
        file.write(
            TRAINING.substitute(
                style=STYLE,
                facts=_definitions(facts, "facts"),
                curve=_curve(summary["losses"]),
                quality=_quality(summary.get("quality", [])),
                reproduction=_reproduction(config, summary.get("environment", {})),
            )
        )
    return page


def overview(results: Arrays, interpreter: str, rows: Iterable[int], *, side: int = 112, gap: int = 6) -> Pixels:
    """Draws some images of a run as one picture without text, for a README.

    One line per image: benign image and map, PGD image and map, ADV² image and map, difference of the ADV² image (x10).

    Args:
        results: the content of `results.npz`.
        interpreter: the interpreter whose maps are shown.
        rows: positions in `results["images"]`; at least one.
        side: height of every tile.
        gap: white pixels around every tile, more to the right of a map.

    Returns:
        The picture, uint8 [len(rows) * (side + 2 gap), *, 3].
    """
    arrays = {name: results[name] for name in results if name == "images" or name.startswith(f"{interpreter}/")}
    strips = [_strip(interpreter, _one(arrays, i)) for i in rows]
    return np.concatenate([np.concatenate([_tile(*tile, side, gap) for tile in strip], axis=1) for strip in strips])


def gallery(directory: Path | str, *, images: int = 2) -> bytes:
    """Draws typical images of a finished run under every interpreter, as a PNG file.

    Typical are the images in the middle of the order by ADV²'s map distance.

    Args:
        directory: the folder of the run.
        images: lines an interpreter, at most.

    Returns:
        The PNG file: the lines of `overview`, one interpreter below the other.
    """
    results = read_arrays(Path(directory) / "results.npz")
    interpreters = dict.fromkeys(key.split("/")[0] for key in results if key.endswith("/benign_maps"))

    def typical(name: str) -> NDArray[Any]:
        order = np.argsort(results[f"{name}/adv2/map_l1"])
        return order[max((len(order) - images) // 2, 0) :][:images]

    return png(np.concatenate([overview(results, name, typical(name)) for name in interpreters]))


def colour_map(values: ArrayLike) -> Pixels:
    """Colours of map values, dark to light.

    Args:
        values: numbers [...] in [0, 1]; others are clipped.

    Returns:
        uint8 [..., 3].
    """
    anchors = np.linspace(0.0, 1.0, len(INFERNO))
    channels = [np.interp(np.asarray(values, np.float64), anchors, channel) for channel in INFERNO.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def amplified_difference(image: Pixels, benign: Pixels, *, gain: float = 10.0) -> Pixels:
    """The change of an image around mid grey, uint8 [H, W, 3]: grey is unchanged, clipped where it leaves the range."""
    difference = image.astype(np.float64) - benign
    return np.clip(128 + gain * difference, 0, 255).astype(np.uint8)


def png(image: Pixels) -> bytes:
    """Encodes uint8 [H, W, 3] as a PNG file."""
    height, width, _ = image.shape
    filtered = image.copy()
    filtered[:, 1:] -= image[:, :-1]  # filter 1, the difference to the left modulo 256: photographs get smaller
    lines = np.insert(filtered.reshape(height, -1), 0, 1, axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _check_schema(summary: Mapping[str, Any]) -> None:
    if summary.get("schema") != SCHEMA:
        raise ValueError(f"summary has schema {summary.get('schema')!r}; this report reads schema {SCHEMA}")


def _curve(losses: Sequence[float], *, points: int = 200) -> str:
    """The loss of every step as a line, in at most `points` means of consecutive steps; the axes carry their ends."""
    means = np.array([part.mean() for part in np.array_split(np.asarray(losses, float), min(points, len(losses)))])
    low, high = float(means.min()), float(means.max())
    x = np.linspace(0, 600, len(means)) if len(means) > 1 else np.zeros(1)
    y = 200 - 190 * (means - low) / ((high - low) or 1)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return CURVE.substitute(line=line, low=f"{low:.3g}", high=f"{high:.3g}", steps=len(losses), last=f"{means[-1]:.3g}")


def _quality(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    headings = "".join(f'<th scope="col">{escape(key.replace("_", " ").capitalize())}</th>' for key in rows[0])
    cells = ("".join(f"<td>{escape(_quality_cell(key, value))}</td>" for key, value in row.items()) for row in rows)
    table = f"<table><thead><tr>{headings}</tr></thead><tbody><tr>{'</tr><tr>'.join(cells)}</tr></tbody></table>"
    return QUALITY.substitute(table=table)


def _quality_cell(key: str, value: object) -> str:
    if key == "interpreter":
        return _title(str(value))
    return f"{value:.3f}" if isinstance(value, float) else _text(value)


def _first(results: Arrays, limit: int) -> dict[str, NDArray[Any]]:
    """The first entries of every per-image array, each read once: an open .npz file decompresses at every access."""
    total = len(results["images"])
    arrays = ((name, results[name]) for name in results)
    return {name: array[:limit].copy() for name, array in arrays if array.shape[:1] == (total,)}


def _one(arrays: Arrays, i: int) -> dict[str, Any]:
    """The entries of image i alone."""
    return {name: array[i] for name, array in arrays.items()}


# Pictures


def _weights(old: int, new: int) -> NDArray[np.float64]:
    """Linear interpolation from `old` to `new` samples as a matrix [new, old]; averages when it shrinks."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    distance = np.abs(centres[:, None] - np.arange(old)) / max(1.0, old / new)
    weights = np.maximum(0.0, 1.0 - distance)
    return weights / weights.sum(axis=1, keepdims=True)


def _resample(pixels: Pixels, height: int, width: int) -> Pixels:
    rows, columns = _weights(pixels.shape[0], height), _weights(pixels.shape[1], width)
    resampled: NDArray[np.float64] = np.einsum("yh,hwc,xw->yxc", rows, pixels, columns, optimize=True)
    return resampled.round().astype(np.uint8)


def _thumbnail(pixels: Pixels) -> Pixels:
    """Averages blocks of pixels until the picture is small enough for a page of many."""
    height, width, _ = pixels.shape
    block = math.ceil(max(height, width) / MAX_SIDE)
    if block == 1 or block > min(height, width):
        return pixels
    height, width = height // block, width // block
    blocks = pixels[: height * block, : width * block].reshape(height, block, width, block, 3)
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)


def _strip(interpreter: str, one: Mapping[str, Any]) -> list[tuple[Pixels, bool]]:
    """The pictures of one image in the order of `overview`, each with whether it is a map (to be scaled smoothly)."""
    images = [one["images"], *(one[f"{interpreter}/{attack}/images"] for attack in ATTACKS)]
    maps = [one[f"{interpreter}/benign_maps"], *(one[f"{interpreter}/{attack}/maps"] for attack in ATTACKS)]
    pairs = zip(images, map(colour_map, maps), strict=True)
    tiles = [tile for image, colours in pairs for tile in ((image, False), (colours, True))]
    return [*tiles, (amplified_difference(images[-1], images[0]), False)]


def _tile(pixels: Pixels, is_map: bool, side: int, gap: int) -> Pixels:
    height, width = pixels.shape[:2]
    new_width = round(side * width / height)
    if is_map or height > side:
        pixels = _resample(pixels, side, new_width)
    else:
        pixels = pixels[np.arange(side) * height // side][:, np.arange(new_width) * width // new_width]
    return np.pad(pixels, ((gap, gap), (gap, 3 * gap if is_map else gap), (0, 0)), constant_values=255)


def _img(pixels: Pixels, alt: str, *, is_map: bool = False) -> str:
    picture = _thumbnail(pixels)
    kind = "map" if is_map else "pixels" if picture is pixels else "photo"
    data = base64.b64encode(png(picture)).decode("ascii")
    return f'<img class="{kind}" src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def _map_img(values: ArrayLike, alt: str) -> str:
    return _img(colour_map(values), alt, is_map=True)


# Cards


def _figure(pictures: Sequence[str], heading: str, lines: Iterable[str] = ()) -> str:
    details = "".join(f"<span>{escape(line)}</span>" for line in lines)
    return f"<figure>{''.join(pictures)}<figcaption><b>{escape(heading)}</b>{details}</figcaption></figure>"


def _section(interpreter: str, summary: Mapping[str, Any], arrays: Arrays, total: int) -> str:
    shown = len(arrays["images"])
    threat = next(row.get("threat") for row in summary["rows"] if row["interpreter"] == interpreter)
    classes = summary.get("classes")
    return SECTION.substitute(
        anchor=_anchor(interpreter),
        title=escape(_title(interpreter)),
        description=INTERPRETERS.get(interpreter, ("", ""))[1],
        cut=f"Pictures of the first {shown} of {total} images; the table counts all." if shown < total else "",
        cards="".join(_card(interpreter, threat, classes, _one(arrays, i)) for i in range(shown)),
    )


def _card(interpreter: str, threat: str | None, classes: Sequence[str] | None, one: Mapping[str, Any]) -> str:
    true_class, target = _class_name(classes, one["labels"]), _class_name(classes, one["targets"])
    present = [attack for attack in ATTACKS if f"{interpreter}/{attack}/images" in one]
    figures = [_benign(interpreter, true_class, one)]
    figures += [_attacked(interpreter, attack, _attack_name(attack, threat), target, one) for attack in present]
    if "adv2" in present:
        figures.append(_difference(interpreter, one))
    name = f" ({one['names']})" if "names" in one else ""
    heading = f"Image {one['indices']}{name}: {true_class} → {target}"
    return f'<article class="card"><h3>{escape(heading)}</h3><div class="strip">{"".join(figures)}</div></article>'


def _benign(interpreter: str, true_class: str, one: Mapping[str, Any]) -> str:
    number = one["indices"]
    pictures = [
        _img(one["images"], f"Benign image {number}, class {true_class}"),
        _map_img(one[f"{interpreter}/benign_maps"], f"{_title(interpreter)} map of benign image {number}"),
    ]
    return _figure(pictures, "Benign", [true_class])


def _attacked(interpreter: str, attack: str, name: str, target: str, one: Mapping[str, Any]) -> str:
    number, key = one["indices"], f"{interpreter}/{attack}"
    pictures = [
        _img(one[f"{key}/images"], f"{name} image {number}, target class {target}"),
        _map_img(one[f"{key}/maps"], f"{_title(interpreter)} map of {name} image {number}"),
    ]
    lines = [
        "✓ success" if one[f"{key}/success"] else "✗ failed",
        f"p({target}) {_number(one[f'{key}/confidence'], 2)}",
        f"map L1 {_number(one[f'{key}/map_l1'], 3)}",
    ]
    return _figure(pictures, name, lines)


def _difference(interpreter: str, one: Mapping[str, Any]) -> str:
    """The ADV² perturbation; then the target map where it is not the benign map, or else the true object if known."""
    number, target_map = one["indices"], one.get(f"{interpreter}/target_maps")
    change = amplified_difference(one[f"{interpreter}/adv2/images"], one["images"])
    pictures = [_img(change, f"Difference of ADV² image {number} to the benign image, times ten around mid grey")]
    lines = ["ADV² − benign"]
    if target_map is not None and not np.array_equal(target_map, one[f"{interpreter}/benign_maps"]):
        pictures.append(_map_img(target_map, f"Target map of image {number}"))
        lines.append("and the target map")
    elif "masks" in one:
        pictures.append(_map_img(one["masks"], f"True object in image {number}"))
        lines.append("and the true object")
    return _figure(pictures, "Difference ×10", lines)


# Words and numbers


def _title(interpreter: str) -> str:
    return INTERPRETERS.get(interpreter, (interpreter, ""))[0]


def _anchor(interpreter: str) -> str:
    return "maps-" + "".join(letter if letter.isalnum() else "-" for letter in interpreter)


def _attack_name(attack: str, threat: str | None) -> str:
    names = {"pgd": "StAdv" if threat == "flow" else "PGD", "adv2": "ADV²"}
    return names.get(attack, attack)


def _class_name(classes: Sequence[str] | None, label: int) -> str:
    if classes is None or not 0 <= label < len(classes):
        return f"class {label}"
    return str(classes[label])


def _number(value: float | None, decimals: int) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:,.{decimals}f}"


def _text(value: object) -> str:
    if value is None or value == "":
        return DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    known = {column.key for column in COLUMNS}
    extra = dict.fromkeys(key for row in rows for key in row if key not in known and key not in ROW_NAMES)
    columns = [*COLUMNS, *(Column(key, key.replace("_", " ").capitalize(), 4) for key in extra)]
    headings = ["Interpreter", "Attack", *(column.heading for column in columns)]
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    groups = groupby(rows, key=lambda row: row["interpreter"])
    bodies = "".join(_table_group(name, list(group), columns) for name, group in groups)
    return f"<table><thead><tr>{head}</tr></thead>{bodies}</table>"


def _table_group(interpreter: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    lines = []
    for row in rows:
        name = escape(_attack_name(row["attack"], row.get("threat")))
        cells = "".join(f"<td>{escape(_cell(row.get(column.key), column))}</td>" for column in columns)
        lines.append(f'<th scope="row">{name}</th>{cells}')
    first = f'<th scope="rowgroup" rowspan="{len(rows)}">{escape(_title(interpreter))}</th>'
    return f"<tbody><tr>{first}{'</tr><tr>'.join(lines)}</tr></tbody>"


def _cell(value: object, column: Column) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(value * column.factor, column.decimals)
    return _text(value)


def _facts(summary: Mapping[str, Any], attacked: int) -> dict[str, object]:
    config, counts = summary.get("config", {}), summary.get("counts", {})
    facts: dict[str, object] = {"Images attacked": attacked}
    if "left_out" in counts:
        facts["Left out, already misclassified"] = counts["left_out"]
    for key, name in (("model", "Model"), ("threat", "Threat"), ("epsilon", "Epsilon"), ("preset", "Preset")):
        if config.get(key) is not None:
            facts[name] = config[key]
    return facts


def _definitions(values: Mapping[str, object], kind: str) -> str:
    entries = (f"<div><dt>{escape(key)}</dt><dd>{escape(_text(value))}</dd></div>" for key, value in values.items())
    return f'<dl class="{kind}">{"".join(entries)}</dl>'


def _reproduction(config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    options = {key: value for key, value in config.items() if key != "command"}
    parts = [("Configuration", options), ("Environment", environment)]
    lists = "".join(f"<div><h3>{name}</h3>{_definitions(values, 'list')}</div>" for name, values in parts if values)
    command = f"<pre><code>{escape(_text(config['command']))}</code></pre>" if "command" in config else ""
    return f'{command}<div class="columns">{lists}</div>'


def _page_variables(images: Pixels) -> str:
    """The picture format, so that maps of another size fill the same frame, and the colours of the scale."""
    height, width = images.shape[1:3]
    colours = ",".join(f"rgb({r},{g},{b})" for r, g, b in INFERNO)
    return f":root{{--ratio:{width}/{height};--scale:linear-gradient(90deg,{colours})}}"


STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b2028;--soft:#566070;--line:#dde1e8;--accent:#8a2a6b}
@media(prefers-color-scheme:dark){:root{--page:#13161b;--card:#1c2027;--ink:#e8ebf0;--soft:#a5afbd;--line:#323944;
--accent:#f0a3cf}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:1rem/1.55 system-ui,sans-serif}
header,main{max-width:78rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
h1{font-size:clamp(1.6rem,4vw,2.3rem);line-height:1.2;margin:0 0 .75rem;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:3rem 0 .5rem;letter-spacing:-.01em}
h3{font-size:.95rem;margin:0 0 .6rem}
p{max-width:46rem;margin:.5rem 0}
.note{color:var(--soft);font-size:.875rem}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin-top:1rem}
dl,dd,figure{margin:0}
dt{color:var(--soft);font-size:.8rem}
dd{overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:.75rem 2.25rem;margin-top:1.5rem}
.facts dd{font-weight:600}
.list div{display:grid;grid-template-columns:minmax(7rem,1fr) 2fr;gap:1rem;padding:.3rem 0}
.list div{border-top:1px solid var(--line)}
.list dd{font-size:.875rem}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem 3rem}
.columns{margin-top:1.5rem}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:.75rem;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.55rem .7rem;text-align:right;white-space:nowrap}
th[scope=rowgroup],th[scope=row],th:first-child,th:nth-child(2){text-align:left}
th[scope=rowgroup]{vertical-align:top}
th[scope=row]{font-weight:500}
thead th{color:var(--soft);font-weight:500}
tbody{border-top:1px solid var(--line)}
tbody tr:last-child :is(td,th[scope=row]){font-weight:600}
pre{background:var(--card);border:1px solid var(--line);border-radius:.75rem;padding:1rem;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.875rem}
.scale{display:flex;align-items:center;gap:.5rem}
.scale i{width:10rem;height:.7rem;border-radius:.35rem;background:var(--scale);print-color-adjust:exact;
-webkit-print-color-adjust:exact}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,32rem),1fr));gap:1rem;margin-top:1rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:.75rem;padding:1rem;break-inside:avoid}
.strip{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:.75rem}
img{display:block;width:100%;aspect-ratio:var(--ratio);border-radius:.3rem;margin-bottom:.35rem}
.pixels{image-rendering:pixelated}
figcaption{font-size:.78rem;line-height:1.4;overflow-wrap:anywhere}
figcaption b,figcaption span{display:block}
figcaption span{color:var(--soft)}
main{padding-bottom:4rem}
@media(max-width:36rem){header{padding-top:1.5rem}.card{padding:.8rem}
.strip,.strip figure:nth-child(4){grid-template-columns:repeat(3,minmax(0,1fr))}
.strip figure:nth-child(4){grid-column:1/-1;display:grid;gap:.75rem}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--accent:#000;color-scheme:light}
nav{display:none}.scroll{overflow:visible}table{font-size:.62rem}th,td{padding:.25rem .3rem}
.cards{grid-template-columns:1fr 1fr}figcaption{font-size:.58rem}}
"""

SECTION = Template("""<section aria-labelledby="$anchor">
<h2 id="$anchor">$title</h2>
<p>$description <span class="note">$cut</span></p>
<div class="cards">$cards</div>
</section>
""")

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>ADV² changes an image so little that it is hard to see, yet the classifier names the class the attacker chose while
the attribution map, which tells an analyst where the classifier looked, still shows what the attacker wants.
Each card sets the benign image beside the same image under the plain attack, which gives itself away in the map, and
under ADV²: the closer its map stays to the target map (map L1 near 0, IoU near 1), the better the attack hides.</p>
$facts
<nav aria-label="Interpreters">$navigation</nav>
</header>
<main>
<section aria-labelledby="summary">
<h2 id="summary">Summary</h2>
<div class="scroll" role="region" aria-label="Summary table" tabindex="0">$table</div>
<p class="note">ASR: share of images that get the target class. MC: mean confidence of those, p in the captions.
Map L1, L2 and IoU (of the maps above their own 75th percentile, and above .5) compare with the target map.
L∞ and L2 measure the change of the image. Arrows point to the attacker's advantage; – marks a missing value.</p>
<p class="note scale">Maps: 0 <i role="img" aria-label="colour scale from dark to light"></i> 1</p>
</section>
$sections
<section aria-labelledby="reproduce">
<h2 id="reproduce">Reproduce</h2>
$reproduction
</section>
</main>
</body>
</html>
""")

CURVE = Template("""<svg viewBox="-4 0 608 230" role="img" aria-label="loss from $high to $last over $steps steps">
<polyline points="$line" fill="none" stroke="currentColor" stroke-width="1.5"/>
<g font-size="12" fill="currentColor"><text x="0" y="224">step 1</text>
<text x="600" y="224" text-anchor="end">step $steps, loss $last</text>
<text x="600" y="12" text-anchor="end">highest $high, lowest $low</text></g></svg>
""")

QUALITY = Template("""<section aria-labelledby="quality">
<h2 id="quality">Do the maps explain?</h2>
<div class="scroll" role="region" aria-label="Quality table" tabindex="0">$table</div>
<p class="note">On N held-out images that the network gets right. Kept: the share of its confidence that is left where only what
the map marks is shown. Removed: its confidence where that is hidden. Inside, outside: the map on the object and beside it.
Pointing game: share of maps that peak on the object. IoU: of the map at .5 and the object.</p>
</section>
""")

TRAINING = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training</title>
<style>$style</style>
</head>
<body>
<header>
<h1>Training</h1>
$facts
</header>
<main>
<section aria-labelledby="loss">
<h2 id="loss">Loss</h2>
$curve
</section>
$quality
<section aria-labelledby="reproduce">
<h2 id="reproduce">Reproduce</h2>
$reproduction
</section>
</main>
</body>
</html>
""")
