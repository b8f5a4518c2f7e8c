"""A finished run as one labelled picture, for a README. The only part of the report that needs Pillow."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adv2_jax.files import read_arrays, read_summary
from adv2_jax.names import ATTACKS, attack_name
from adv2_jax.report import words
from adv2_jax.report.pictures import Pixels, images_of, overview

Look = Callable[[Pixels], NDArray[np.floating]]

SIDE, GAP = 192, 6  # of a tile, and white around it
# of the row labels, the column heads, and what is written below a row
LEFT, TOP, BELOW = (150, 52, 40)
# of the letters; at a README's 850 pixels for 1600 they are half as large
SIZES = {"label": 30, "caption": 26, "power": 20}
INK, WARNING = (30, 30, 30), (176, 0, 32)


def gallery(directory: Path | str, look: Look) -> bytes:
    """Draws a typical image of a finished run under every interpreter: the one in the middle of the
    order by ADV²'s map distance.

    Args:
        directory: the folder of the run.
        look: the network, uint8 [N, H, W, 3] -> probabilities [N, K].

    Returns:
        A PNG file: a line of `overview` for each interpreter; below each image the class that the
        network predicts (red where it is not the true one) and its probability, below the maps of
        the attacks their L1 distance from the target map.
    """
    from PIL import Image, ImageDraw, ImageFont

    results, summary = read_arrays(Path(directory) / "results.npz"), read_summary(Path(directory))
    label, caption, power = (ImageFont.load_default(size) for size in SIZES.values())
    names = list(dict.fromkeys(row["interpreter"] for row in summary["rows"]))
    typical = [
        np.argsort(results[f"{name}/adv2/map_l1"])[(len(results["labels"]) - 1) // 2]
        for name in names
    ]
    seen = look(
        np.stack(
            [
                image
                for name, i in zip(names, typical, strict=True)
                for image in images_of(results, name, i)
            ]
        )
    )
    strips = [
        overview(results, name, [i], side=SIDE, gap=GAP)
        for name, i in zip(names, typical, strict=True)
    ]
    height, width, _ = strips[0].shape
    image_width = (width - 20 * GAP) // 7  # four images with two gaps each, three maps with four
    columns = (
        np.cumsum([LEFT + GAP, *[image_width + 2 * GAP, image_width + 4 * GAP] * 3])
        + image_width / 2
    )

    canvas = Image.new("RGB", (LEFT + width, TOP + len(names) * (height + BELOW)), "white")
    pen = ImageDraw.Draw(canvas)
    plain, joint = (attack_name(attack, summary["rows"][0].get("threat")) for attack in ATTACKS)
    for x, head in zip(
        columns,
        ("benign", "its map", plain, "its map", joint, "its map", "change x10"),
        strict=True,
    ):
        word, square, _ = head.partition("²")  # which Pillow's own font lacks
        pen.text((x, TOP / 2), word, INK, label, anchor="mm")
        if square:
            pen.text((x + pen.textlength(word, label) / 2, TOP / 2), "2", INK, power, anchor="lb")
    for line, (name, i, strip) in enumerate(zip(names, typical, strips, strict=True)):
        top = TOP + line * (height + BELOW)
        canvas.paste(Image.fromarray(strip), (LEFT, top))
        pen.text((GAP, top + height / 2), words.title(name), INK, label, anchor="lm")
        for x, probabilities in zip(columns[:6:2], seen[3 * line :], strict=False):
            found = int(probabilities.argmax())
            text = f"{words.class_name(summary['classes'], found)} {words.number(float(probabilities[found]), 2)}"
            colour = INK if found == results["labels"][i] else WARNING
            pen.text((x, top + height + BELOW / 2 - GAP), text, colour, caption, anchor="mm")
        for x, attack in zip(columns[3::2], ATTACKS, strict=True):
            text = f"L1 {words.number(float(results[f'{name}/{attack}/map_l1'][i]), 3)}"
            pen.text((x, top + height + BELOW / 2 - GAP), text, INK, caption, anchor="mm")
    file = io.BytesIO()
    canvas.save(file, "png", optimize=True)
    return file.getvalue()
