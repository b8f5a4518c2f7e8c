"""What each command is told: its options, their forms and defaults."""

import argparse
from collections.abc import Callable, Collection
from typing import NoReturn

from adv2_jax import data, models, threats
from adv2_jax.interpreters import INTERPRETERS
from adv2_jax.interpreters.masker_maps import ENCODER_LOSSES
from adv2_jax.presets import PRESETS
from adv2_jax.runs.tables import TABLES
from adv2_jax.training.classifier import ClassifierRecipe
from adv2_jax.training.loop import Recipe
from adv2_jax.training.masker import MaskerRecipe

NAMES = f"one of {', '.join(models.MODELS)}"
WEIGHTS = "state dict under the names of torchvision or timm: .npz, .safetensors, or what torch wrote (.pth, .pth.tar, .ckpt, ...)"
SOURCES = "shapes, shapes:N, FILE.npz, FILE.npz/SPLIT, a folder, or tfds:name/split"
TARGET_MAP = (
    "the map to be shown: of the unchanged image, of another image of the target class, or a random figure; SOURCE's own "
    "target_maps take the place of benign (default: %(default)s)"
)
EMBEDDED = "the embedded network"


class Parser(argparse.ArgumentParser):
    """Refuses bad arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Hand the message to `main`, which prints it and exits with 2."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def demo(parser: Parser) -> None:
    """Add the arguments of `adv2 demo`."""
    parser.add_argument(
        "--out", default="demo", metavar="DIR", help="where to write (default: %(default)s)"
    )
    _resume_argument(parser)
    _overwrite_argument(parser)


def attack(parser: Parser) -> None:
    """Add the arguments of `adv2 attack`."""
    _subject_arguments(parser)
    add = parser.add_argument
    add(
        "--threat",
        default="linf",
        choices=list(threats.THREATS),
        help="what may be changed (default: %(default)s)",
    )
    add("--target-map", default="benign", choices=data.targets.TARGET_MAPS, help=TARGET_MAP)
    _effort_arguments(parser)
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="where to write summary.json, results.npz, report.html and log.jsonl",
    )
    _overwrite_argument(parser)


def table(parser: Parser) -> None:
    """Add the arguments of `adv2 table`."""
    add = parser.add_argument
    add("table", choices=list(TABLES), metavar="NAME", help=f"one of {', '.join(TABLES)}")
    _subject_arguments(parser)
    _effort_arguments(parser)
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="where to write table.md, summary.json, and the run in a folder of its own",
    )
    _overwrite_argument(parser)


def transfer(parser: Parser) -> None:
    """Add the arguments of `adv2 transfer`."""
    add = parser.add_argument
    add(
        "run_directory",
        metavar="DIR",
        help="a finished run of adv2 attack; its summary.json and report.html are added to",
    )
    _network_arguments(parser)
    add(
        "--to-model",
        metavar="NAME",
        help="another network, which the images are shown to (default: none)",
    )
    add("--to-weights", metavar="FILE", help="its weights")
    _batch_size_argument(parser)
    _quiet_argument(parser)


def train_classifier(parser: Parser) -> None:
    """Add the arguments of `adv2 train classifier`."""
    add = parser.add_argument
    add("--model", default="cifar_resnet20", metavar="NAME", help=f"{NAMES} (default: %(default)s)")
    add(
        "--weights",
        metavar="FILE",
        help="weights to start from; the head is made anew if it has other classes (default: none)",
    )
    _weights_key_argument(parser)
    _training_arguments(parser, ClassifierRecipe())
    add("--head-only", action="store_true", help="train the head, keep the features")
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="where to write weights.npz, summary.json and report.html",
    )
    _overwrite_argument(parser)


def train_rts(parser: Parser) -> None:
    """Add the arguments of `adv2 train rts`."""
    add, recipe = parser.add_argument, MaskerRecipe()
    add(
        "--model",
        metavar="NAME",
        help=f"the network to explain: {NAMES}, or path/to/file.py:name (default: {EMBEDDED})",
    )
    add("--weights", metavar="FILE", help="its weights")
    _weights_key_argument(parser)
    add(
        "--encoder",
        metavar="NAME",
        help="a ResNet of the same classes, the start of the masker (default: the network itself)",
    )
    add("--encoder-weights", metavar="FILE", help="its weights; go with --encoder")
    add("--tune", action="store_true", help="train the encoder too")
    _training_arguments(parser, recipe)
    terms = {
        "variation": "of the map's total variation",
        "area": "of the map's mean",
        "removal": "of the confidence where the map hides",
        "power": "of that confidence, its exponent",
    }
    for i, (name, meaning) in enumerate(terms.items(), 1):
        default = getattr(recipe, name)
        add(
            f"--{name}",
            type=_weight,
            default=default,
            metavar="W",
            help=f"λ{i} of eq. 8, {meaning} (default: %(default)s)",
        )
    add(
        "--area-power",
        type=_weight,
        default=recipe.area_power,
        metavar="P",
        help="of the map in its mean (default: %(default)s)",
    )
    add(
        "--absent",
        type=_number,
        default=recipe.absent,
        metavar="P",
        help="share of maps of another class (default: %(default)s)",
    )
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="where to write masker.npz, summary.json and report.html",
    )
    _overwrite_argument(parser)


def convert(parser: Parser) -> None:
    """Add the arguments of `adv2 convert`."""
    add = parser.add_argument
    add("file", metavar="FILE", help=WEIGHTS)
    _weights_key_argument(parser)
    add("--model", required=True, metavar="NAME", help=NAMES)
    add("--out", required=True, metavar="FILE", help="what to write: .safetensors or .npz")
    _overwrite_argument(parser)


def _subject_arguments(parser: Parser) -> None:
    """What is attacked: a network, images, interpreters."""
    _network_arguments(parser)
    _source_arguments(parser)
    add = parser.add_argument
    add(
        "--interpreter",
        nargs="+",
        type=_choice(INTERPRETERS, "path/to/file.py:name", models.user.is_reference),
        metavar="NAME",
        help=f"{', '.join(INTERPRETERS)}, or path/to/file.py:name (default: all that the network has what they need for)",
    )
    add(
        "--encoder-loss",
        default="head",
        choices=list(ENCODER_LOSSES),
        help="what the attack on rts adds (default: %(default)s)",
    )
    add(
        "--encoder-weight",
        type=_weight,
        default=0.1,
        metavar="W",
        help="its weight; 0 leaves it out (default: %(default)s)",
    )


def _network_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"{NAMES}, or path/to/file.py:name (default: {EMBEDDED})")
    add("--weights", metavar="FILE", help=f"{WEIGHTS}; with file.py:name handed to name")
    _weights_key_argument(parser)
    add(
        "--masker",
        metavar="FILE",
        help="masker of the network, for rts, from adv2 train rts (default: the embedded network's)",
    )
    _normalisation_arguments(parser)


def _weights_key_argument(parser: Parser) -> None:
    parser.add_argument(
        "--weights-key",
        metavar="NAME",
        help="which weights of a file that holds several, such as state_dict_ema or module.model",
    )


def _normalisation_arguments(parser: Parser) -> None:
    for name, kind, meaning in (
        ("--mean", _finite, "subtracted from"),
        ("--std", _divisor, "that divides"),
    ):
        parser.add_argument(
            name,
            nargs=3,
            type=kind,
            metavar=("R", "G", "B"),
            help=f"colour {meaning} the [0, 1] image (default: ImageNet's)",
        )


def _source_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--images", default="shapes", metavar="SOURCE", help=f"{SOURCES} (default: %(default)s)")
    add(
        "--size",
        type=_positive,
        metavar="N",
        help="crop images to N x N (default: folders and tfds to what the network wants)",
    )
    add(
        "--labels",
        metavar="FILE.csv",
        help="file name, class, and optional target class of the images of a flat folder",
    )
    add(
        "--classes",
        metavar="FILE.txt",
        help="one class a line, in the network's order; names of sub-folders, numbers too",
    )
    add(
        "--sample",
        type=_positive,
        metavar="N",
        help="read only N images, drawn from the seed (default: all)",
    )


def _effort_arguments(parser: Parser) -> None:
    """How much is done, and how."""
    add = parser.add_argument
    numbers = f"the attack's numbers: {', '.join(PRESETS)}, or file.json of your own (default: %(default)s)"
    add(
        "--preset",
        default="default",
        type=_choice(PRESETS, "file.json", lambda name: name.endswith(".json")),
        metavar="NAME",
        help=numbers,
    )
    add(
        "--epsilon",
        type=_number,
        metavar="E",
        help="radius of linf (default: 8/255) or l2 (default: 0.5), in units of pixel value",
    )
    add(
        "--flow-penalty",
        dest="penalty",
        type=_number,
        metavar="W",
        help="weight of a flow's roughness (default: 0.0005)",
    )
    add(
        "--warm-steps",
        type=_whole,
        metavar="N",
        help="steps of plain PGD first (default: the preset's)",
    )
    add("--steps", type=_whole, metavar="N", help="joint steps (default: the preset's)")
    add(
        "--limit",
        type=_positive,
        metavar="N",
        help="attack at most N images of those the network gets right",
    )
    _batch_size_argument(parser)
    add(
        "--snapshots",
        type=_whole,
        default=16,
        metavar="N",
        help="images whose way the report shows (default: %(default)s)",
    )
    add(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of --sample, target classes and target maps (default: %(default)s)",
    )
    _resume_argument(parser)
    _quiet_argument(parser)


def _training_arguments(parser: Parser, recipe: Recipe) -> None:
    """What every training is told; defaults from the recipe."""
    add = parser.add_argument
    _normalisation_arguments(parser)
    _source_arguments(parser)
    add(
        "--held-out",
        metavar="SOURCE",
        help="images to measure on (default: other scenes for shapes, else a tenth of --images)",
    )
    add(
        "--epochs",
        type=_positive,
        default=recipe.epochs,
        metavar="N",
        help="passes over the images (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=_positive,
        default=recipe.batch_size,
        metavar="N",
        help="images a step (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=_number,
        default=recipe.learning_rate,
        metavar="R",
        help="its peak (default: %(default)s)",
    )
    add(
        "--shift",
        type=_whole,
        default=recipe.shift,
        metavar="N",
        help="largest random shift in pixels (default: %(default)s)",
    )
    add(
        "--no-mirror",
        dest="mirror",
        action="store_false",
        help="do not mirror images at random: for text and digits",
    )
    add(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of --sample, what is held out, weights, order and augmentation (default: %(default)s)",
    )
    add(
        "--checkpoint-every",
        type=_positive,
        metavar="N",
        help="steps between checkpoints (default: an epoch)",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")


def _batch_size_argument(parser: Parser) -> None:
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=32,
        metavar="N",
        help="images at a time (default: %(default)s)",
    )


def _resume_argument(parser: Parser) -> None:
    parser.add_argument(
        "--resume", action="store_true", help="go on with the unfinished run in --out"
    )


def _overwrite_argument(parser: Parser) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is finished in --out (default: refuse to)",
    )


def _quiet_argument(parser: Parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _choice(
    known: Collection[str], form: str, has_form: Callable[[str], bool]
) -> Callable[[str], str]:
    """What argparse's `choices` is to names that may have a form instead."""

    def name_or_form(name: str) -> str:
        if name not in known and not has_form(name):
            raise argparse.ArgumentTypeError(
                f"invalid choice: {name!r} (choose from {', '.join(map(repr, known))}, or {form})"
            )
        return name

    return name_or_form


def _whole(text: str, below: int = 2**31) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    if len(text) > 10 or int(text) >= below:
        raise argparse.ArgumentTypeError(f"{text!r} is not below {below}")
    return int(text)


def _number(text: str) -> float:
    """A real number, or a fraction of two."""
    above, stroke, below = text.partition("/")
    try:
        return float(above) / float(below) if stroke else float(above)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number, such as 0.5 or 8/255"
        ) from None


def _finite(text: str) -> float:
    if not abs(_number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return _number(text)


def _divisor(text: str) -> float:
    if not 0 < _number(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return _number(text)


def _seed(text: str) -> int:
    return _whole(text, 2**32)


def _positive(text: str) -> int:
    if _whole(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _weight(text: str) -> float:
    if not 0 <= _number(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 0 or more")
    return _number(text)
