"""The pictures of a run: a section for each interpreter with its curves, and a card for each image."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adv2_jax.names import ATTACKS, attack_name
from adv2_jax.report import charts, words
from adv2_jax.report.pictures import (
    MAX_SIDE,
    Arrays,
    Pixels,
    amplified_difference,
    colour_map,
    film,
    grey,
    levels,
    png,
    resample,
    thumbnail,
)

SMALL_SIDE = 64  # of a frame of a film, and of what lies below a map
PALETTE = colour_map(np.arange(256) / 255)

CURVES = (
    ("loss", "Loss of the attack", ()),
    ("confidence", "Confidence in the target class", (0.0, 1.0)),
    ("map_l1", "Map L1", (0.0,)),
)


class Subject(NamedTuple):
    """What the cards of one interpreter have in common."""

    interpreter: str
    threat: str | None
    classes: Sequence[str] | None

    @property
    def title(self) -> str:
        """The interpreter's name as readers know it."""
        return words.title(self.interpreter)

    @property
    def anchor(self) -> str:
        """The address of the section."""
        return words.anchor(self.interpreter)

    def name(self, attack: str) -> str:
        """The name of an attack under this threat."""
        return attack_name(attack, self.threat)


def section(subject: Subject, results: Arrays, *, total: int, limit: int) -> str:
    """The curves of an interpreter over all images, `total` in number, and the cards of the first `limit` of them."""
    shown = min(limit, total)
    notes = (
        [f"Pictures of the first {shown} of {total} images; the table counts all."]
        if shown < total
        else []
    )
    if any(f"{subject.interpreter}/{attack}/flow" in results for attack in ATTACKS):
        notes.append(
            "Arrows point to where a pixel is taken from, enlarged; the caption says how far."
        )
    return SECTION.substitute(
        anchor=subject.anchor,
        title=escape(subject.title),
        description=words.description(subject.interpreter),
        notes=" ".join(notes),
        curves=_curves(subject, results),
        cards="".join(_card(subject, results, i) for i in range(shown)),
    )


def _curves(subject: Subject, results: Arrays) -> str:
    drawn = [
        (f"{subject.anchor}-{key}", title, limits, _lines(subject, results, key))
        for key, title, limits in CURVES
    ]
    figures = [
        charts.chart(lines, anchor=name, title=title, limits=limits)
        for name, title, limits, lines in drawn
        if lines
    ]
    if not figures:
        return ""
    known = {line.name: line for *_, lines in drawn for line in lines}
    return f'<div class="charts">{"".join(figures)}</div>' + charts.legend(
        known.values(), "Mean over the images; band: quartiles."
    )


def _lines(subject: Subject, results: Arrays, key: str) -> list[charts.Line]:
    lines = []
    for attack in ATTACKS:
        prefix = f"{subject.interpreter}/{attack}/curve"
        if f"{prefix}_{key}" in results:
            lines.append(
                charts.over_images(
                    subject.name(attack),
                    attack,
                    results[f"{prefix}_steps"],
                    results[f"{prefix}_{key}"],
                )
            )
    return [line for line in lines if line is not None]


def _card(subject: Subject, results: Arrays, i: int) -> str:
    one = _one(subject.interpreter, results, i)
    true_class, target = (
        words.class_name(subject.classes, one[key]) for key in ("labels", "targets")
    )
    present = [attack for attack in ATTACKS if f"{attack}/images" in one]
    figures = [
        _benign(subject, true_class, one),
        *(_attacked(subject, attack, target, one) for attack in present),
    ]
    if "adv2" in present:
        figures.append(_difference(one))
    name = f" ({one['names']})" if "names" in one else ""
    heading = f"Image {one['indices']}{name}: {true_class} → {target}"
    return CARD.substitute(
        data="".join(_data(attack, one) for attack in present),
        heading=escape(heading),
        figures="".join(figures),
        steps=_steps(subject, present, results, i, one["indices"]),
    )


def _one(interpreter: str, results: Arrays, i: int) -> dict[str, Any]:
    """What is known of image i, under this interpreter, by names without the interpreter's."""
    names = {key: key for key in OF_IMAGE} | {
        f"{interpreter}/{key}": key for key in UNDER_INTERPRETER
    }
    return {key: results[name][i] for name, key in names.items() if name in results}


def _data(attack: str, one: Mapping[str, Any]) -> str:
    """What the script sorts and filters by; what is not a number is left out."""
    values = {
        "success": int(one[f"{attack}/success"]),
        "l1": one[f"{attack}/map_l1"],
        "p": one[f"{attack}/confidence"],
    }
    return "".join(
        f' data-{attack}-{key}="{value:.6g}"'
        for key, value in values.items()
        if math.isfinite(value)
    )


def _benign(subject: Subject, true_class: str, one: Mapping[str, Any]) -> str:
    number = one["indices"]
    tiles = [
        _tile(_picture(one["images"], f"Benign image {number}, class {true_class}")),
        _overlay(
            one["images"], one["benign_maps"], f"{subject.title} map of benign image {number}"
        ),
    ]
    return _figure(tiles, "Benign", [true_class])


def _attacked(subject: Subject, attack: str, target: str, one: Mapping[str, Any]) -> str:
    number, image, name = one["indices"], one[f"{attack}/images"], subject.name(attack)
    tiles = [
        _tile(_picture(image, f"{name} image {number}, target class {target}")),
        _overlay(image, one[f"{attack}/maps"], f"{subject.title} map of {name} image {number}"),
    ]
    lines = [
        "✓ success" if one[f"{attack}/success"] else "✗ failed",
        f"p({target}) {words.number(one[f'{attack}/confidence'], 2)}",
        f"map L1 {words.number(one[f'{attack}/map_l1'], 3)}",
    ]
    if f"{attack}/flow" in one:
        flow = one[f"{attack}/flow"]
        longest = f"{np.linalg.norm(flow, axis=-1).max():.2f} px"
        tiles.append(
            _tile(
                _base(one["images"])
                + charts.arrows(flow, f"Flow of {name} image {number}, at most {longest}")
            )
        )
        lines.append(f"shift up to {longest}")
    return _figure(tiles, name, lines, attack)


def _difference(one: Mapping[str, Any]) -> str:
    """The ADV² perturbation; then the target map where it is not the benign map, or else the true object if known."""
    number, target_map = one["indices"], one.get("target_maps")
    change = amplified_difference(one["adv2/images"], one["images"])
    tiles = [
        _tile(
            _picture(
                change,
                f"Difference of ADV² image {number} to the benign image, times ten around mid grey",
            )
        )
    ]
    lines = ["ADV² − benign"]
    if target_map is not None and not np.array_equal(target_map, one["benign_maps"]):
        tiles.append(_overlay(one["images"], target_map, f"Target map of image {number}"))
        lines.append("and the target map")
    elif "masks" in one:
        tiles.append(_tile(_map(thumbnail(levels(one["masks"])), f"True object in image {number}")))
        lines.append("and the true object")
    return _figure(tiles, "Difference ×10", lines)


def _steps(subject: Subject, attacks: Sequence[str], results: Arrays, i: int, number: int) -> str:
    """The slider, for those with a script, and the films it takes its pictures from; nothing without snapshots of image i."""
    films = [
        _film(subject, attack, results, i, number)
        for attack in attacks
        if i < len(results.get(f"{subject.interpreter}/{attack}/snapshot_images", ()))
    ]
    if not films:
        return ""
    return STEPS.substitute(anchor=f"{subject.anchor}-{i}", films="".join(films))


def _film(subject: Subject, attack: str, results: Arrays, i: int, number: int) -> str:
    prefix, name = f"{subject.interpreter}/{attack}/snapshot", subject.name(attack)
    steps = results[f"{prefix}_steps"].tolist()
    frames, maps, confidence = (
        results[f"{prefix}_{key}"][i] for key in ("images", "maps", "confidence")
    )
    sheet = film(frames, max_side=SMALL_SIDE)
    told = f"{name} image {number} after steps {', '.join(map(str, steps))}"
    return FILM.substitute(
        attack=attack,
        name=escape(name),
        frames=len(steps),
        steps=" ".join(map(str, steps)),
        confidence=" ".join(words.number(p, 2) for p in confidence),
        images=_img(sheet, told, kind=_kind(frames[0], SMALL_SIDE)),
        maps=_map(
            _film_of_maps(maps, sheet.shape[0], sheet.shape[1] // len(steps)),
            f"{subject.title} maps of {told}",
        ),
        captions="".join(
            f"<li>{step}<br>{words.number(p, 2)}</li>"
            for step, p in zip(steps, confidence, strict=True)
        ),
    )


def _film_of_maps(maps: NDArray[Any], height: int, width: int) -> Pixels:
    """Maps in the size of their images, because a browser that scaled a film of maps smoothly would mix neighbours."""
    return np.concatenate(
        [levels(resample(one[..., None], height, width)[..., 0]) for one in maps], axis=1
    )


def _figure(tiles: Iterable[str], heading: str, lines: Iterable[str] = (), attack: str = "") -> str:
    details = "".join(f"<span>{escape(line)}</span>" for line in lines)
    data = f' data-attack="{attack}"' if attack else ""
    return f"<figure{data}>{''.join(tiles)}<figcaption><b>{escape(heading)}</b>{details}</figcaption></figure>"


def _tile(content: str) -> str:
    return f'<div class="tile">{content}</div>'


def _overlay(image: Pixels, values: ArrayLike, alt: str) -> str:
    """A map over its image in grey; how much of the image is seen is a matter of style."""
    return _tile(_base(image) + _map(thumbnail(levels(values)), alt))


def _base(image: Pixels) -> str:
    """The image in grey, to lay something upon; the picture above says what it is."""
    return _img(
        thumbnail(grey(image), max_side=SMALL_SIDE), "", kind=f"base {_kind(image, SMALL_SIDE)}"
    )


def _picture(pixels: Pixels, alt: str) -> str:
    return _img(thumbnail(pixels), alt, kind=_kind(pixels, MAX_SIDE))


def _map(values: Pixels, alt: str) -> str:
    return _img(values, alt, kind="map", palette=PALETTE)


def _kind(pixels: Pixels, max_side: int) -> str:
    """Pixels are shown as they are; what was shrunk, as smoothly as can be."""
    return "pixels" if max(pixels.shape[:2]) <= max_side else "photo"


def _img(pixels: Pixels, alt: str, *, kind: str, palette: Pixels | None = None) -> str:
    data = base64.b64encode(png(pixels, palette=palette)).decode("ascii")
    return f'<img class="{kind}" src="data:image/png;base64,{data}" alt="{escape(alt)}">'


OF_IMAGE = ("images", "labels", "targets", "indices", "masks", "names")
UNDER_INTERPRETER = (
    "benign_maps",
    "target_maps",
    *(
        f"{attack}/{key}"
        for attack in ATTACKS
        for key in ("images", "maps", "confidence", "success", "map_l1", "flow")
    ),
)

SECTION = Template("""<section aria-labelledby="$anchor">
<h2 id="$anchor">$title</h2>
<p>$description <span class="note">$notes</span></p>
$curves<div class="cards">$cards</div>
<p class="none" hidden>None of these images passes the filter.</p>
</section>
""")

CARD = Template("""<article class="card"$data><h3>$heading</h3><div class="strip">$figures</div>$steps</article>
""")

STEPS = Template("""<p class="slider" hidden><label for="$anchor-step">Step</label>
<input type="range" id="$anchor-step" min="0" step="1"><output for="$anchor-step"></output></p>
<details class="steps"><summary>The attack, step by step</summary>$films</details>""")

FILM = Template("""<div class="film" data-attack="$attack" data-name="$name" data-steps="$steps" data-confidence="$confidence"
style="--frames:$frames">
<h4>$name</h4>$images$maps<ol aria-label="Step, and confidence in the target class">$captions</ol></div>""")
