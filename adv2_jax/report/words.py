"""Words of a page: names of interpreters and classes, numbers, and values of files."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

from adv2_jax.runs.schema import as_text

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
