"""The sections of a page: for each interpreter its curves, and a card for each image.

A joint attack has a section of its own: one image above its maps by all interpreters.
"""

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike

from adv2_jax.report import charts, words
from adv2_jax.report.pictures import (
    MAX_SIDE,
    Pixels,
    amplified_difference,
    colour_map,
    grey,
    levels,
    png,
    resample,
    thumbnail,
)
from adv2_jax.runs.schema import JOINT, Attacked, Results, attack_name

# a page is one file with every picture in it: a film has eight frames of image and map each, and
# each attack of a card has one
SMALL_SIDE = 64  # longest side of a frame of a film, and of what lies below a map
PALETTE = colour_map(np.arange(256) / 255)

# Curves of an attack: their key, title, and numbers that the vertical axis must reach.
CURVES = (
    ("loss", "Loss of the attack", ()),
    ("confidence", "Confidence in the target class", (0.0, 1.0)),
    ("map_l1", "Map L1", (0.0,)),
)


class Subject(NamedTuple):
    """An interpreter of a run, with all that its cards have in common."""

    interpreter: str
    threat: str | None
    classes: Sequence[str] | None
    results: Results

    @property
    def title(self) -> str:
        """Return the interpreter's name as readers know it."""
        return words.title(self.interpreter)

    @property
    def anchor(self) -> str:
        """Return the identifier of the section."""
        # a user's interpreter is called path/to/file.py:name, which is no identifier
        return f"maps-{quote(self.interpreter, safe='')}"

    def name(self, attack: str) -> str:
        """Return the name of an attack under this threat model."""
        return attack_name(attack, self.threat)

    def attacks(self) -> list[tuple[str, Attacked]]:
        """Return the attacks that there are, with their arrays."""
        return [
            (name, self.results.attacked(self.interpreter, name))
            for name in self.results.attacks(self.interpreter)
        ]


def section(subject: Subject, *, total: int, limit: int) -> str:
    """Draw the curves over all images, `total` in number, and cards of the first `limit`."""
    shown = min(limit, total)
    notes = []
    if shown < total:
        notes.append(f"Pictures of the first {shown} of {total} images; the table counts all.")
    if any(attacked.flow is not None for _, attacked in subject.attacks()):
        notes.append(
            "Arrows point to where a pixel is taken from, enlarged; the caption says how far."
        )
    return SECTION.substitute(
        anchor=subject.anchor,
        title=escape(subject.title),
        description=words.description(subject.interpreter),
        notes=" ".join(notes),
        curves=_curves(subject),
        cards="".join(_card(subject, i) for i in range(shown)),
    )


def _curves(subject: Subject) -> str:
    figures: list[str] = []
    styles: dict[str, charts.Line] = {}  # of the legend: a line for each attack
    for key, title, limits in CURVES:
        curves = [
            charts.over_images(subject.name(attack), attack, attacked.curve_steps, values)
            for attack, attacked in subject.attacks()
            if attacked.curve_steps is not None
            and (values := getattr(attacked, f"curve_{key}")) is not None
        ]
        if lines := [line for line in curves if line is not None]:
            anchor = f"{subject.anchor}-{key}"
            figures.append(charts.chart(lines, anchor=anchor, title=title, limits=limits))
            styles |= {line.kind: line for line in lines}
    if not figures:
        return ""
    legend = charts.legend(styles.values(), "Mean over the images; band: quartiles.")
    return f'<div class="charts">{"".join(figures)}</div>{legend}'


def _card(subject: Subject, i: int) -> str:
    """Draw image i: benign, as each attack made it, the change, and the films of the attacks."""
    results, benign_map = subject.results, subject.results.aim(subject.interpreter).benign_maps[i]
    number, benign = results.indices[i], results.images[i]
    true_class = words.class_name(subject.classes, results.labels[i])
    tiles = [
        _tile(_picture(benign, f"Benign image {number}, class {true_class}")),
        _overlay(benign, benign_map, f"{subject.title} map of benign image {number}"),
    ]
    figures, data, films = [_figure(tiles, "Benign", [true_class])], "", ""
    for attack, attacked in subject.attacks():
        if attack == JOINT:  # has a section of its own
            continue
        figures.append(_attacked(subject, attack, attacked, i))
        data += _data(attack, attacked.success[i], attacked.map_l1[i], attacked.confidence[i])
        if attacked.snapshot_images is not None and i < len(attacked.snapshot_images):
            films += _film(subject, attack, attacked, i)
        if attack == "adv2":
            figures.append(_difference(subject, attacked, i))
    name = "" if results.names is None else f" ({results.names[i]})"
    return CARD.substitute(
        data=data,
        heading=escape(f"Image {number}{name}: {_aim(results, subject.classes, i)}"),
        strips=_strip(figures),
        # the slider is for those with a script; it takes its pictures from the films
        steps=STEPS.substitute(anchor=f"{subject.anchor}-{i}", films=films) if films else "",
    )


def _aim(results: Results, classes: Sequence[str] | None, i: int) -> str:
    """Return the class of an image, and what it is to be taken for if that is another one."""
    label, target = (words.class_name(classes, of[i]) for of in (results.labels, results.targets))
    return label if target == label else f"{label} → {target}"


def _data(attack: str, success: Any, map_l1: Any, confidence: Any) -> str:
    """Return what the script sorts and filters a card by; NaN is left out."""
    numbers = {"success": int(success), "l1": map_l1, "p": confidence}
    return "".join(
        f' data-{attack}-{key}="{value:.6g}"'
        for key, value in numbers.items()
        if math.isfinite(value)
    )


def joint_section(subjects: Sequence[Subject], *, total: int, limit: int) -> str:
    """Draw cards of the joint attack: image and maps of all interpreters, benign and attacked."""
    shown = min(limit, total)
    return SECTION.substitute(
        anchor=JOINT,
        title="One image for all interpreters",
        description="Each image is made against the classifier and all interpreters at once.",
        notes=f"Pictures of the first {shown} of {total} images." if shown < total else "",
        curves="",
        cards="".join(_joint_card(subjects, i) for i in range(shown)),
    )


def _joint_card(subjects: Sequence[Subject], i: int) -> str:
    results, classes = subjects[0].results, subjects[0].classes
    number, name = results.indices[i], subjects[0].name(JOINT)
    attacked = [results.attacked(one.interpreter, JOINT) for one in subjects]
    first, worst = attacked[0], max(one.map_l1[i] for one in attacked)
    true_class, target = (
        words.class_name(classes, labels[i])
        for labels in (results.labels, results.classes(subjects[0].interpreter, JOINT))
    )
    benign_maps = [results.aim(one.interpreter).benign_maps[i] for one in subjects]
    # name, image, class, maps, and what is said of each map
    rows = (
        ("Benign", results.images[i], true_class, benign_maps, [""] * len(subjects)),
        (
            name,
            first.images[i],
            f"p({target}) {words.number(first.confidence[i], 2)}",
            [one.maps[i] for one in attacked],
            [f"map L1 {words.number(one.map_l1[i], 3)}" for one in attacked],
        ),
    )
    strips = []
    for heading, image, caption, maps, said in rows:
        alt = f"{heading} image {number}"
        figures = [_figure([_tile(_picture(image, alt))], heading, [caption], JOINT)]
        figures += [
            _figure([_overlay(image, m, f"{one.title} map of {alt}")], one.title, [line])
            for one, m, line in zip(subjects, maps, said, strict=True)
        ]
        strips.append(_strip(figures, JOINT))
    return CARD.substitute(
        data=_data("adv2", first.success[i], worst, first.confidence[i]),
        heading=escape(f"Image {number}: {_aim(results, classes, i)}"),
        strips="".join(strips),
        steps="",
    )


def _attacked(subject: Subject, attack: str, attacked: Attacked, i: int) -> str:
    classes = subject.results.classes(subject.interpreter, attack)
    target = words.class_name(subject.classes, classes[i])
    number, name, image = subject.results.indices[i], subject.name(attack), attacked.images[i]
    tiles = [
        _tile(_picture(image, f"{name} image {number}, target class {target}")),
        _overlay(image, attacked.maps[i], f"{subject.title} map of {name} image {number}"),
    ]
    lines = [
        "✓ success" if attacked.success[i] else "✗ failed",
        f"p({target}) {words.number(attacked.confidence[i], 2)}",
        f"map L1 {words.number(attacked.map_l1[i], 3)}",
    ]
    if attacked.flow is not None:
        flow = attacked.flow[i]
        # arrows are enlarged to be seen: their length on the page says nothing
        longest = f"{np.linalg.norm(flow, axis=-1).max():.2f} px"
        alt = f"Flow of {name} image {number}, at most {longest}"
        tiles.append(_tile(_base(subject.results.images[i]) + charts.arrows(flow, alt)))
        lines.append(f"shift up to {longest}")
    return _figure(tiles, name, lines, attack)


def _difference(subject: Subject, attacked: Attacked, i: int) -> str:
    """Draw the ADV² perturbation, and the target map where it is another than the benign map.

    Where it is the same, the true object takes its place if it is known.
    """
    results, aim = subject.results, subject.results.aim(subject.interpreter)
    number, image = results.indices[i], results.images[i]
    change = amplified_difference(attacked.images[i], image)
    alt = f"Difference of ADV² image {number} to the benign image, times ten around mid grey"
    tiles, lines = [_tile(_picture(change, alt))], ["ADV² − benign"]
    # usual attacks aim at the benign map: the same picture twice would tell nothing
    if not np.array_equal(aim.target_maps[i], aim.benign_maps[i]):
        tiles.append(_overlay(image, aim.target_maps[i], f"Target map of image {number}"))
        lines.append("and the target map")
    elif results.masks is not None:
        tiles.append(_tile(_map(results.masks[i], f"True object in image {number}")))
        lines.append("and the true object")
    return _figure(tiles, "Difference ×10", lines)


def _film(subject: Subject, attack: str, attacked: Attacked, i: int) -> str:
    """Draw image i and its map at some steps of an attack, side by side."""
    steps, images, maps, confidences = (
        getattr(attacked, f"snapshot_{key}") for key in ("steps", "images", "maps", "confidence")
    )
    name, shown = subject.name(attack), [words.number(p, 2) for p in confidences[i]]
    frames = [thumbnail(frame, max_side=SMALL_SIDE) for frame in images[i]]
    # maps in the size of their images: a browser that scaled their film would mix neighbours
    height, width, _ = frames[0].shape
    map_frames = [resample(one[..., None], height, width)[..., 0] for one in maps[i]]
    alt = f"{name} image {subject.results.indices[i]} after steps {', '.join(map(str, steps))}"
    return FILM.substitute(
        attack=attack,
        name=escape(name),
        frames=len(steps),
        steps=" ".join(map(str, steps)),
        confidence=" ".join(shown),
        images=_img(np.concatenate(frames, axis=1), alt, _kind(images[i][0], SMALL_SIDE)),
        maps=_img(
            levels(np.concatenate(map_frames, axis=1)), f"{subject.title} maps of {alt}", "map"
        ),
        captions="".join(f"<li>{step}<br>{p}</li>" for step, p in zip(steps, shown, strict=True)),
    )


def _figure(tiles: Iterable[str], heading: str, lines: Iterable[str], attack: str = "") -> str:
    details = "".join(f"<span>{escape(line)}</span>" for line in lines)
    caption = f"<figcaption><b>{escape(heading)}</b>{details}</figcaption>"
    return f'<figure data-attack="{attack}">{"".join(tiles)}{caption}</figure>'


def _strip(figures: Iterable[str], kind: str = "") -> str:
    return f'<div class="{f"strip {kind}".rstrip()}">{"".join(figures)}</div>'


def _tile(content: str) -> str:
    return f'<div class="tile">{content}</div>'


def _overlay(image: Pixels, values: ArrayLike, alt: str) -> str:
    """Draw a map over its image in grey; the style says how much of the image is seen."""
    return _tile(_base(image) + _map(values, alt))


def _base(image: Pixels) -> str:
    """Draw an image in grey, to lay something upon; the picture above it has the description."""
    style = f"base {_kind(image, SMALL_SIDE)}"
    return _img(thumbnail(grey(image), max_side=SMALL_SIDE), "", style)


def _picture(pixels: Pixels, alt: str) -> str:
    return _img(thumbnail(pixels), alt, _kind(pixels, MAX_SIDE))


def _map(values: ArrayLike, alt: str) -> str:
    return _img(thumbnail(levels(values)), alt, "map")


def _kind(pixels: Pixels, max_side: int) -> str:
    """Return the style: a picture that was shrunk is smoothed, another shows its pixels."""
    # browsers blur what they enlarge, which would hide the pixels of small images
    return "pixels" if max(pixels.shape[:2]) <= max_side else "photo"


def _img(pixels: Pixels, alt: str, kind: str) -> str:
    # in the page itself: a report is one file that can be sent, and loads nothing
    file = base64.b64encode(png(pixels, palette=PALETTE if kind == "map" else None))
    return f'<img class="{kind}" src="data:image/png;base64,{file.decode()}" alt="{escape(alt)}">'


SECTION = Template("""<section aria-labelledby="$anchor">
<h2 id="$anchor">$title</h2>
<p>$description <span class="note">$notes</span></p>
$curves<div class="cards">$cards</div>
<p class="none" hidden>None of these images passes the filter.</p>
</section>
""")

CARD = Template("""<article class="card"$data><h3>$heading</h3>\
$strips$steps</article>
""")

STEPS = Template("""<p class="slider" hidden><label for="$anchor-step">Step</label>
<input type="range" id="$anchor-step" min="0" step="1"><output for="$anchor-step"></output></p>
<details class="steps"><summary>The attack, step by step</summary>$films</details>""")

FILM = Template("""<div class="film" data-attack="$attack" data-name="$name" data-steps="$steps" \
data-confidence="$confidence"
style="--frames:$frames">
<h4>$name</h4>$images$maps\
<ol aria-label="Step, and confidence in the target class">$captions</ol></div>""")
