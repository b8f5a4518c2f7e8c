"""A finished run, or training, as one self-contained HTML page, read from its files.

The page needs nothing but itself: style and script are inline, every picture is a PNG inside a
`data:` address, and it opens offline. Without its script nothing is lost but sorting, filtering and
the slider over the steps. No network is run here, and nothing is needed but NumPy, Pillow for
`gallery`, and matplotlib for the pictures of curvature. Shapes: N images, H x W pixels, maps of
h x w values in [0, 1].
"""

from adv2_jax.report.comparison import write_comparison
from adv2_jax.report.labelled import gallery
from adv2_jax.report.page import render, write, write_curvature
from adv2_jax.report.pictures import amplified_difference, colour_map, png
from adv2_jax.report.training import write_training

__all__ = [
    "amplified_difference",
    "colour_map",
    "gallery",
    "png",
    "render",
    "write",
    "write_comparison",
    "write_curvature",
    "write_training",
]
