"""A finished run as one labelled picture, for a README. This part of the report needs Pillow."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adv2_jax.files import read_summary
from adv2_jax.report import words
from adv2_jax.report.pictures import Pixels, amplified_difference, colour_map
from adv2_jax.runs.schema import ATTACKS, Results, attack_name, read_results

SIDE, GAP = 192, 6  # height of a picture, and the white around it
LEFT, TOP, BELOW = 150, 52, 40  # row labels, column heads, what is written below a row
LABEL, CAPTION, POWER = 30, 26, 20  # letters; a README shows 1600 pixels on 850
INK, WARNING = (30, 30, 30), (176, 0, 32)


def gallery(directory: Path | str, look: Callable[[Pixels], NDArray[np.floating]]) -> bytes:
    """Draw a typical image of a finished run under every interpreter.

    Typical is the image in the middle of the order by ADV²'s map distance.

    Args:
        directory: the folder of the run.
        look: the network, uint8 [N, H, W, 3] -> probabilities [N, K].

    Returns:
        A PNG file. A line for each interpreter: benign image and map, PGD image and map, ADV² image
        and map, change of the ADV² image (x10). Below each image the predicted class (red where it
        is not the true one) and its probability, below the maps of the attacks their L1 distance
        from the target map.
    """
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(directory)
    results, summary = Results(read_results(folder)), read_summary(folder)
    label, caption, power = (ImageFont.load_default(size) for size in (LABEL, CAPTION, POWER))
    names = list(dict.fromkeys(row["interpreter"] for row in summary["rows"]))
    height, width = results.images.shape[1:3]
    step = round(SIDE * width / height) + 2 * GAP
    canvas = Image.new("RGB", (LEFT + 7 * step, TOP + len(names) * (SIDE + BELOW)), "white")
    pen = ImageDraw.Draw(canvas)

    def write(column: int, y: float, text: str, font: Any, colour: Any = INK) -> None:
        pen.text((LEFT + (column + 0.5) * step, y), text, colour, font, anchor="mm")

    plain, joint = (attack_name(one, summary["rows"][0].get("threat")) for one in ATTACKS)
    heads = ("benign", "its map", plain, "its map", joint, "its map", "change x10")
    for column, head in enumerate(heads):
        # Pillow's own font lacks the ², which is drawn as a small 2
        word, square, _ = head.partition("²")
        write(column, TOP / 2, word, label)
        if square:
            end = LEFT + (column + 0.5) * step + pen.textlength(word, label) / 2
            pen.text((end, TOP / 2), "2", INK, power, anchor="lb")
    for line, name in enumerate(names):
        top = TOP + line * (SIDE + BELOW)
        attacked = [results.attacked(name, one) for one in ATTACKS]
        i = int(np.argsort(attacked[-1].map_l1)[(len(results.labels) - 1) // 2])
        images = [results.images[i], *(one.images[i] for one in attacked)]
        maps = [results.aim(name).benign_maps[i], *(one.maps[i] for one in attacked)]
        pictures = [one for pair in zip(images, map(colour_map, maps), strict=True) for one in pair]
        pictures.append(amplified_difference(images[-1], images[0]))
        pen.text((GAP, top + SIDE / 2), words.title(name), INK, label, anchor="lm")
        for column, pixels in enumerate(pictures):
            # maps are smooth; small images show their pixels
            smooth = column in (1, 3, 5) or height > SIDE
            method = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
            picture = Image.fromarray(pixels).resize((step - 2 * GAP, SIDE), method)
            canvas.paste(picture, (LEFT + column * step + GAP, top))
        below = top + SIDE + BELOW / 2 - GAP
        for column, probabilities in zip((0, 2, 4), look(np.stack(images)), strict=True):
            predicted = int(probabilities.argmax())
            class_name = words.class_name(summary["classes"], predicted)
            colour = INK if predicted == results.labels[i] else WARNING
            write(column, below, f"{class_name} {probabilities[predicted]:.2f}", caption, colour)
        for column, one in zip((3, 5), attacked, strict=True):
            write(column, below, f"L1 {one.map_l1[i]:.3f}", caption)
    file = io.BytesIO()
    canvas.save(file, "png", optimize=True)
    return file.getvalue()
