"""Words of a page: names of interpreters and classes, numbers, and values of files."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

from adv2_jax.runs.doubts import DOUBTS
from adv2_jax.runs.schema import KINDS, Row, as_text, attack_name, kind_of, row_name

DASH = "–"

INTERPRETERS = {  # name, and what the map shows
    "grad": (
        "GRAD",
        "How strongly each pixel moves the score of the class: the absolute gradient.",
    ),
    "cam": (
        "CAM",
        "Class activation mapping: the last feature maps, weighted by the linear layer.",
    ),
    "grad_cam": (
        "Grad-CAM",
        "The last feature maps, weighted by the mean gradient of the class score.",
    ),
    "grad_cam_pp": (
        "Grad-CAM++",
        "The last feature maps, weighted by gradients that raise the score, in powers of them.",
    ),
    "layer_cam": (
        "LayerCAM",
        "The last feature maps, each entry weighted by its own gradient where that is positive.",
    ),
    "occlusion": (
        "Occlusion",
        "How far the score of the class drops where a grey patch hides the image.",
    ),
    "rts": ("RTS", "Real-time saliency: a second network, trained to predict the map."),
    "mask": ("MASK", "The smallest mask whose removal from the image destroys the class."),
    "input_x_gradient": ("Input × gradient", "The gradient of GRAD, times the pixel value."),
    "integrated_gradients": (
        "Integrated Gradients",
        "The mean gradient on the way from a black image to this one, times the pixel value.",
    ),
    "smooth_grad": ("SmoothGrad", "The gradient of GRAD, averaged over noisy copies of the image."),
    "attention_rollout": (
        "Attention rollout",
        "What flows from each patch to the class token, whatever the class.",
    ),
    "gradient_rollout": (
        "Gradient rollout",
        "What flows from each patch to the class token, weighted by what it does for the class.",
    ),
    "lrp": ("LRP", "The score of the class, handed down layer by layer to the pixels."),
    "guided_backprop": (
        "Guided backprop",
        "The gradient of GRAD, but only what is positive passes back through a ReLU.",
    ),
}


GOALS = {
    "targeted": "each to be taken for another class",
    "untargeted": "each to be taken for any class but its own",
    "keep": "each to keep its class while its map changes",
}


def verdict(rows: Sequence[Row], *, goal: str = "targeted", epsilon: float | None = None) -> str:
    """Return what the rows of a run show, in sentences; nothing where they lack the numbers.

    Args:
        rows: of the summary.
        goal: of the attack.
        epsilon: its radius, which is said under `linf`.
    """
    known = [row for row in rows if None not in (row.get("asr"), row.get("map_l1"))]
    noise, plain, own, together = (
        {row["interpreter"]: row for row in known if kind_of(row) == kind} for kind in KINDS
    )
    if not own or own.keys() != plain.keys():
        return ""
    first = next(iter(own.values()))
    name = attack_name("pgd", first.get("threat"))
    said = f"{first['n']} images were attacked, {GOALS[goal]}"
    if epsilon is not None and first.get("threat") == "linf":
        said += f", with no pixel value changed by more than {levels(epsilon)}"
    far = max(own, key=lambda one: own[one]["map_l1"])
    sentences = [
        f"{said}.",
        f"{name} alone succeeds on {_span(plain, 'asr', '.0%')}; its maps are {_off(plain)} (L1) away "
        "from what they should show.",
        f"ADV² succeeds on {_span(own, 'asr', '.0%')}; its maps are {_off(own)} away.",
        f"The farthest is that of {title(far)}, {own[far]['map_l1'] / plain[far]['map_l1']:.0%} of "
        f"what {name} leaves"
        + (
            f"; random changes as large leave {number(noise[far]['map_l1'], 3)}"
            if far in noise
            else ""
        )
        + "."
        if plain[far]["map_l1"] > 0
        else "",
        f"One image for all interpreters succeeds on {_span(together, 'asr', '.0%')}; its maps are "
        f"{_off(together)} away."
        if together
        else "",
        f"ADV² took {_span(own, 'gradient_evaluations', ',.0f')} gradients an image, {name} "
        + (_span(plain, "gradient_evaluations", ",.0f") if together else "as many")
        + ".",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def doubts(rows: Sequence[Row]) -> list[str]:
    """Return sentences on what missed for a numerical reason, or without any (`runs.doubts`)."""

    def of(row: Row, n: int) -> str:
        return f"{n} of {row['n']} ({title(row['interpreter'])}, {row_name(row)})"

    said = []
    for doubt in DOUBTS:
        where = [of(row, n) for row in rows if (n := row.get("doubts", {}).get(doubt.key))]
        if where:
            said.append(f"{', '.join(where)} {doubt.said}.")
    once = [row for row in rows if (row.get("preset") or {}).get("restarts") == 1]
    withstood = [
        of(row, round((1 - row["asr"]) * row["n"]))
        for row in once
        if not row.get("doubts") and (row["asr"] or 0) < 1 and row["n"]
    ]
    if withstood:
        said.append(
            f"{', '.join(withstood)} were missed without a numerical reason: "
            "before a network is called robust, --restarts 5 and more --steps."
        )
    return said


def _off(rows: Mapping[str, Row]) -> str:
    return _span(rows, "map_l1", ".3f")


def _span(rows: Mapping[str, Row], key: str, form: str) -> str:
    """Return the least and the largest number of some rows."""
    least, most = (f"{pick(row[key] for row in rows.values()):{form}}" for pick in (min, max))
    return most if least == most else f"{least} to {most}"


def title(interpreter: str) -> str:
    """Return the name of an interpreter as readers know it."""
    return INTERPRETERS.get(interpreter, (interpreter, ""))[0]


def description(interpreter: str) -> str:
    """Return what an interpreter shows, in one sentence; nothing for one of a user's own."""
    return INTERPRETERS.get(interpreter, (interpreter, ""))[1]


def class_name(classes: Sequence[str] | None, label: int) -> str:
    """Return the name of a class, or its number where there is no name."""
    names = classes or ()
    # -1 would be the last name
    return str(names[label]) if 0 <= label < len(names) else f"class {label}"


def heading(key: str) -> str:
    """Return a key of a file as the heading of its column."""
    return "IoU" if key == "iou" else key.replace("_", " ").capitalize()


def number(value: float | None, decimals: int | None, *, sign: str = "") -> str:
    """Return a rounded number, or a dash where there is none; with `sign="+"` always signed."""
    if value is None or not math.isfinite(value):
        return DASH
    return as_text(value, decimals, f"{sign},").replace("-", "−")  # as wide as the plus


def levels(epsilon: float) -> str:
    """Return an ε as papers write it, in levels of an 8-bit image: 8/255."""
    return f"{epsilon * 255:.3g}/255"


def text(value: object) -> str:
    """Return a value of a file as text: JSON, but for a string as it is and nothing as a dash."""
    if value is None or value == "":
        return DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def definitions(values: Mapping[str, object], style: str) -> str:
    """Return names and values as an HTML list of the given style: facts or list."""
    entries = (
        f"<div><dt>{escape(key)}</dt><dd>{escape(text(value))}</dd></div>"
        for key, value in values.items()
    )
    return f'<dl class="{style}">{"".join(entries)}</dl>'
