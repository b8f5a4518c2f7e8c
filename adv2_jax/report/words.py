"""What things are called on a page, and how numbers and pieces of HTML are written."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

DASH = "–"
MINUS = "−"

INTERPRETERS = {
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
    "rts": ("RTS", "Real-time saliency: a second network, trained to predict the map."),
    "mask": ("MASK", "The smallest mask whose removal from the image destroys the class."),
}


def title(interpreter: str) -> str:
    """The name of an interpreter as readers know it."""
    return INTERPRETERS.get(interpreter, (interpreter, ""))[0]


def description(interpreter: str) -> str:
    """What an interpreter shows, in one sentence; nothing of a user's own."""
    return INTERPRETERS.get(interpreter, (interpreter, ""))[1]


def anchor(interpreter: str) -> str:
    """The address of an interpreter's section on the page."""
    return f"maps-{quote(interpreter, safe='')}"


def class_name(classes: Sequence[str] | None, label: int) -> str:
    """The name of a class, or its number."""
    if classes is None or not 0 <= label < len(classes):
        return f"class {label}"
    return str(classes[label])


def heading(key: str) -> str:
    """A key of a file as the heading of its column."""
    return "IoU" if key == "iou" else key.replace("_", " ").capitalize()


def number(value: float | None, decimals: int) -> str:
    """A number with so many decimals, or a dash."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:,.{decimals}f}"


def signed(value: float | None, decimals: int) -> str:
    """A difference: `number` with a plus or a minus sign."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:+,.{decimals}f}".replace("-", MINUS)


def text(value: object) -> str:
    """A value of a file as words."""
    if value is None or value == "":
        return DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def definitions(values: Mapping[str, object], kind: str) -> str:
    """Names and values as a list of the given style."""
    entries = (
        f"<div><dt>{escape(key)}</dt><dd>{escape(text(value))}</dd></div>"
        for key, value in values.items()
    )
    return f'<dl class="{kind}">{"".join(entries)}</dl>'
