"""The pictures of a run: a section for each interpreter with its curves, and a card for each image."""

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from adv2_jax.report import charts, words
from adv2_jax.report.pictures import (
    MAX_SIDE,
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
from adv2_jax.runs.schema import Attacked, Results, attack_name

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
    results: Results

    @property
    def title(self) -> str:
        """Return the interpreter's name as readers know it."""
        return words.title(self.interpreter)

    @property
    def anchor(self) -> str:
        """Return the address of the section."""
        return words.anchor(self.interpreter)

    def name(self, attack: str) -> str:
        """Return the name of an attack under this threat."""
        return attack_name(attack, self.threat)

    def attacks(self) -> list[tuple[str, Attacked]]:
        """Return the attacks that there are, with their arrays."""
        names = self.results.attacks(self.interpreter)
        return [(name, self.results.attacked(self.interpreter, name)) for name in names]


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
    known: dict[str, charts.Line] = {}
    for key, title, limits in CURVES:
        lines = []
        for attack, attacked in subject.attacks():
            values, steps = getattr(attacked, f"curve_{key}"), attacked.curve_steps
            if values is not None and steps is not None:
                line = charts.over_images(subject.name(attack), attack, steps, values)
                lines += [] if line is None else [line]
        if lines:
            anchor = f"{subject.anchor}-{key}"
            figures.append(charts.chart(lines, anchor=anchor, title=title, limits=limits))
            known |= {line.name: line for line in lines}
    if not figures:
        return ""
    legend = charts.legend(known.values(), "Mean over the images; band: quartiles.")
    return f'<div class="charts">{"".join(figures)}</div>{legend}'


def _card(subject: Subject, i: int) -> str:
    """Draw image i: benign, as each attack made it, the change, and the films of the attacks."""
    results, aim = subject.results, subject.results.aim(subject.interpreter)
    number, benign, benign_map = results.indices[i], results.images[i], aim.benign_maps[i]
    true_class, target = (
        words.class_name(subject.classes, labels[i]) for labels in (results.labels, results.targets)
    )
    tiles = [
        _tile(_picture(benign, f"Benign image {number}, class {true_class}")),
        _overlay(benign, benign_map, f"{subject.title} map of benign image {number}"),
    ]
    figures, data, films = [_figure(tiles, "Benign", [true_class])], [], []
    for attack, attacked in subject.attacks():
        figures.append(_attacked(subject, attack, attacked, i, target))
        numbers = {
            "success": int(attacked.success[i]),
            "l1": attacked.map_l1[i],
            "p": attacked.confidence[i],
        }
        # what the script sorts and filters by; what is not a number is left out
        known = {key: value for key, value in numbers.items() if math.isfinite(value)}
        data += [f' data-{attack}-{key}="{value:.6g}"' for key, value in known.items()]
        if attacked.snapshot_images is not None and i < len(attacked.snapshot_images):
            films.append(_film(subject, attack, attacked, i))
        if attack == "adv2":
            figures.append(_difference(subject, attacked, i))
    name = "" if results.names is None else f" ({results.names[i]})"
    # the slider is for those with a script; it takes its pictures from the films
    steps = STEPS.substitute(anchor=f"{subject.anchor}-{i}", films="".join(films)) if films else ""
    return CARD.substitute(
        data="".join(data),
        heading=escape(f"Image {number}{name}: {true_class} → {target}"),
        figures="".join(figures),
        steps=steps,
    )


def _attacked(subject: Subject, attack: str, attacked: Attacked, i: int, target: str) -> str:
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
        longest = f"{np.linalg.norm(flow, axis=-1).max():.2f} px"
        arrows = charts.arrows(flow, f"Flow of {name} image {number}, at most {longest}")
        tiles.append(_tile(_base(subject.results.images[i]) + arrows))
        lines.append(f"shift up to {longest}")
    return _figure(tiles, name, lines, attack)


def _difference(subject: Subject, attacked: Attacked, i: int) -> str:
    """Draw the ADV² perturbation; then the target map where it is another than the benign map,
    or else the true object if it is known.
    """
    results, aim = subject.results, subject.results.aim(subject.interpreter)
    number, image, masks = results.indices[i], results.images[i], results.masks
    change = amplified_difference(attacked.images[i], image)
    told = f"Difference of ADV² image {number} to the benign image, times ten around mid grey"
    tiles, lines = [_tile(_picture(change, told))], ["ADV² − benign"]
    if not np.array_equal(aim.target_maps[i], aim.benign_maps[i]):
        tiles.append(_overlay(image, aim.target_maps[i], f"Target map of image {number}"))
        lines.append("and the target map")
    elif masks is not None:
        object_map = _map(thumbnail(levels(masks[i])), f"True object in image {number}")
        tiles.append(_tile(object_map))
        lines.append("and the true object")
    return _figure(tiles, "Difference ×10", lines)


def _film(subject: Subject, attack: str, attacked: Attacked, i: int) -> str:
    """Draw what image i and its map were at some steps, side by side."""
    images, maps, confidences, at = (
        attacked.snapshot_images,
        attacked.snapshot_maps,
        attacked.snapshot_confidence,
        attacked.snapshot_steps,
    )
    assert images is not None and maps is not None and confidences is not None and at is not None
    name, steps = subject.name(attack), at.tolist()
    shown = [words.number(p, 2) for p in confidences[i]]
    sheet = film(images[i], max_side=SMALL_SIDE)
    height, width = sheet.shape[0], sheet.shape[1] // len(steps)
    # maps in the size of their images: a browser that scaled their film would mix neighbours
    frames = [levels(resample(one[..., None], height, width)[..., 0]) for one in maps[i]]
    told = f"{name} image {subject.results.indices[i]} after steps {', '.join(map(str, steps))}"
    captions = [f"<li>{step}<br>{p}</li>" for step, p in zip(steps, shown, strict=True)]
    return FILM.substitute(
        attack=attack,
        name=escape(name),
        frames=len(steps),
        steps=" ".join(map(str, steps)),
        confidence=" ".join(shown),
        images=_img(sheet, told, kind=_kind(images[i][0], SMALL_SIDE)),
        maps=_map(np.concatenate(frames, axis=1), f"{subject.title} maps of {told}"),
        captions="".join(captions),
    )


def _figure(tiles: Iterable[str], heading: str, lines: Iterable[str], attack: str = "") -> str:
    details = "".join(f"<span>{escape(line)}</span>" for line in lines)
    data = f' data-attack="{attack}"' if attack else ""
    caption = f"<figcaption><b>{escape(heading)}</b>{details}</figcaption>"
    return f"<figure{data}>{''.join(tiles)}{caption}</figure>"


def _tile(content: str) -> str:
    return f'<div class="tile">{content}</div>'


def _overlay(image: Pixels, values: ArrayLike, alt: str) -> str:
    """Draw a map over its image in grey; how much of the image is seen is a matter of style."""
    return _tile(_base(image) + _map(thumbnail(levels(values)), alt))


def _base(image: Pixels) -> str:
    """Draw an image in grey, to lay something upon; the picture above says what it is."""
    small = thumbnail(grey(image), max_side=SMALL_SIDE)
    return _img(small, "", kind=f"base {_kind(image, SMALL_SIDE)}")


def _picture(pixels: Pixels, alt: str) -> str:
    return _img(thumbnail(pixels), alt, kind=_kind(pixels, MAX_SIDE))


def _map(values: Pixels, alt: str) -> str:
    return _img(values, alt, kind="map", palette=PALETTE)


def _kind(pixels: Pixels, max_side: int) -> str:
    """Return the style: pixels are shown as they are; what was shrunk, smoothly."""
    return "pixels" if max(pixels.shape[:2]) <= max_side else "photo"


def _img(pixels: Pixels, alt: str, *, kind: str, palette: Pixels | None = None) -> str:
    data = base64.b64encode(png(pixels, palette=palette)).decode("ascii")
    return f'<img class="{kind}" src="data:image/png;base64,{data}" alt="{escape(alt)}">'


SECTION = Template("""<section aria-labelledby="$anchor">
<h2 id="$anchor">$title</h2>
<p>$description <span class="note">$notes</span></p>
$curves<div class="cards">$cards</div>
<p class="none" hidden>None of these images passes the filter.</p>
</section>
""")

CARD = Template("""<article class="card"$data><h3>$heading</h3>\
<div class="strip">$figures</div>$steps</article>
""")

STEPS = Template("""<p class="slider" hidden><label for="$anchor-step">Step</label>
<input type="range" id="$anchor-step" min="0" step="1"><output for="$anchor-step"></output></p>
<details class="steps"><summary>The attack, step by step</summary>$films</details>""")

FILM = Template("""<div class="film" data-attack="$attack" data-name="$name" data-steps="$steps" \
data-confidence="$confidence"
style="--frames:$frames">
<h4>$name</h4>$images$maps\
<ol aria-label="Step, and confidence in the target class">$captions</ol></div>""")
