"""The commands as data: options, defaults, examples; and the parser that is made of them."""

import argparse
import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

from adv2_jax import __version__, data, models, threats
from adv2_jax.curvature import WIDTH
from adv2_jax.descent import GOALS
from adv2_jax.detectors import DETECTORS
from adv2_jax.interpreters import INTERPRETERS, PAPER
from adv2_jax.interpreters.masker_maps import ENCODER_LOSSES
from adv2_jax.precision import PRECISIONS
from adv2_jax.presets import PRESETS
from adv2_jax.runs.curvature import CLASSES, SCORES
from adv2_jax.runs.detection import FITTED_ON
from adv2_jax.runs.schema import FORMS, KEPT
from adv2_jax.runs.tables import TABLES
from adv2_jax.training.classifier import ClassifierRecipe
from adv2_jax.training.loop import Recipe
from adv2_jax.training.masker import MaskerRecipe
from adv2_jax.training.robust import PENALTIES, ROBUST

Number = TypeVar("Number", int, float)
# name or flag -> keyword arguments of `add_argument`; `parser` adds the default to the help text
Arguments = dict[str, dict[str, Any]]

AUTO = "auto"  # --batch-size that is measured
EMBEDDED = "the embedded network"
NAMES = f"one of {', '.join(models.MODELS)}"
SOURCES = "shapes, shapes:N, FILE.npz, FILE.npz/SPLIT, a folder, or tfds:name/split"
WEIGHTS = (
    "state dict under the names of torchvision or timm: .npz, .safetensors, or a file that torch "
    "wrote (.pth, .pth.tar, .ckpt, ...)"
)


class Parser(argparse.ArgumentParser):
    """A parser that refuses bad arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Hand the message to `main`, which prints it and exits with 2."""
        raise ValueError(f"{message} (see {self.prog} --help)")


class Command(NamedTuple):
    """What the command line knows of a command.

    Attributes:
        summary: what it does, one line.
        arguments: its arguments, in the order in which the help lists them.
        examples: whole command lines.
    """

    summary: str
    arguments: Arguments
    examples: Sequence[str]


def _number(
    form: str, read: Callable[[str], Number], in_range: Callable[[Number], bool]
) -> Callable[[str], Number]:
    """Return the `type` of a number for argparse; `form` names it in the error message."""

    def number(text: str) -> Number:
        value: Number | None = None
        # float('inf') and 1/0 are caught here or by the range: one message for all
        with contextlib.suppress(ValueError, ZeroDivisionError):
            value = read(text)
        if value is None or not in_range(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
        return value

    return number


def _fraction(text: str) -> float:
    """Read a real number, or a fraction of two."""
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / float(denominator) if slash else float(numerator)


def _positive(more: str = "") -> Callable[[str], int]:
    """Return the `type` of a whole number above 0; `more` is appended to its error message."""
    form = f"a whole number above 0 and below 2**31{more}"
    return _number(form, int, lambda n: 0 < n < 2**31)


# the range of a REAL is checked by the function that takes it; NaN fails every comparison
REAL = _number("a number, such as 0.5 or 8/255", _fraction, lambda x: True)
FINITE = _number("a finite number", _fraction, lambda x: abs(x) < float("inf"))
ABOVE_0 = _number("a number above 0", _fraction, lambda x: 0 < x < float("inf"))
WEIGHT = _number("a number, 0 or more", _fraction, lambda x: 0 <= x < float("inf"))
# steps and places are int32 in compiled programs; a JAX key is made from 32 bits
COUNT = _number("a whole number, 0 or more and below 2**31", int, lambda n: 0 <= n < 2**31)
POSITIVE = _positive()
SEED = _number("a whole number, 0 or more and below 2**32", int, lambda n: 0 <= n < 2**32)


def _or_positive(word: str, value: str | None) -> Callable[[str], int | str | None]:
    """Return the `type` of a whole number above 0, or a word that stands for a value."""
    number = _positive(f", or {word}")
    return lambda text: value if text == word else number(text)


def _choice(
    known: Collection[str], form: str, has_form: Callable[[str], bool]
) -> Callable[[str], str]:
    """Return the `type` of a name for argparse: one that is known, or one of a form."""

    def name_or_form(name: str) -> str:
        if name not in known and not has_form(name):
            raise argparse.ArgumentTypeError(
                f"invalid choice: {name!r} (choose from {', '.join(map(repr, known))}, or {form})"
            )
        return name

    return name_or_form


def _path(text: str) -> str:
    """Refuse the empty path, which the file system takes for the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("'' names no file or directory")
    return text


def _out(meaning: str, metavar: str = "DIR") -> Arguments:
    """Return --out and --overwrite of a command that writes to a path of its own."""
    out = {"required": True, "type": _path, "metavar": metavar, "help": meaning}
    return {"--out": out, **OVERWRITE}


# Groups of arguments that several commands share; their order is that of the help
OVERWRITE: Arguments = {
    "--overwrite": {
        "action": "store_true",
        "help": "replace finished results in --out (default: refuse)",
    },
}
RESUME: Arguments = {
    "--resume": {"action": "store_true", "help": "continue the unfinished run in --out"},
}
QUIET: Arguments = {"--quiet": {"action": "store_true", "help": "print nothing but errors"}}
BATCH_SIZE: Arguments = {
    "--batch-size": {
        "type": POSITIVE,
        "default": 32,
        "metavar": "N",
        "help": "images that are computed at a time, on each device",
    },
}
BATCH_SIZE_OR_AUTO: Arguments = {
    "--batch-size": BATCH_SIZE["--batch-size"]
    | {
        "type": _or_positive(AUTO, AUTO),
        "help": "images that are computed at a time, on each device; auto: the most that fit into "
        "its memory",
    },
}
DEVICES: Arguments = {
    "--devices": {
        "type": _or_positive("all", None),
        "metavar": "N",
        "help": "number of devices of this machine to use, or all (default: all)",
    },
}
HOSTS: Arguments = {
    "--distributed": {
        "action": "store_true",
        "help": "share the run with other hosts or processes, each of which is given the same "
        "command, and sees the same --out (Slurm, Kubernetes, TPU pods)",
    },
    "--coordinator": {
        "metavar": "HOST:PORT",
        "help": "with --distributed, where JAX does not detect the hosts: an address of process 0",
    },
    "--processes": {
        "type": POSITIVE,
        "metavar": "N",
        "help": "with --coordinator: number of processes",
    },
    "--process": {
        "type": COUNT,
        "metavar": "I",
        "help": "with --coordinator: number of this process, from 0",
    },
}
WEIGHTS_KEY: Arguments = {
    "--weights-key": {
        "metavar": "NAME",
        "help": "which weights to take from a --weights file that holds several, "
        "such as state_dict_ema or module.model",
    },
}
NORMALISATION: Arguments = {
    "--mean": {
        "nargs": 3,
        "type": FINITE,
        "metavar": ("R", "G", "B"),
        "help": "colour subtracted from the image in [0, 1] (default: ImageNet's)",
    },
    "--std": {
        "nargs": 3,
        "type": ABOVE_0,
        "metavar": ("R", "G", "B"),
        "help": "colour that the difference is divided by (default: ImageNet's)",
    },
}
NETWORK: Arguments = {
    "--model": {
        "metavar": "NAME",
        "help": f"the network: {NAMES}, or path/to/file.py:name (default: {EMBEDDED})",
    },
    "--weights": {
        "metavar": "FILE",
        "help": f"its weights, a {WEIGHTS}; one that adv2 train wrote needs no --model; "
        "path/to/file.py:name gets the path as its argument",
    },
    **WEIGHTS_KEY,
    "--masker": {
        "metavar": "FILE",
        "help": "masker of the network for rts, made by adv2 train rts "
        "(default: the embedded network's)",
    },
    **NORMALISATION,
}
IMAGES: Arguments = {
    "--images": {
        "default": "shapes",
        "metavar": "SOURCE",
        "help": f"where the images come from: {SOURCES}",
    },
    "--size": {
        "type": POSITIVE,
        "metavar": "N",
        "help": "crop images to N x N pixels (default: folders and tfds to the network's size)",
    },
    "--labels": {
        "metavar": "FILE.csv",
        "help": "for a flat folder: file name, class and optional target class of each image",
    },
    "--classes": {
        "metavar": "FILE.txt",
        "help": "one class name a line, in the network's order; sub-folders and classes of a data "
        "set are matched to it by name",
    },
    "--sample": {
        "type": POSITIVE,
        "metavar": "N",
        "help": "read only N images, drawn at random (default: all)",
    },
}
INTERPRETER: Arguments = {
    "--interpreter": {
        "nargs": "+",
        "type": _choice(INTERPRETERS, "path/to/file.py:name", models.user.is_reference),
        "metavar": "NAME",
        "help": f"interpreters to fool: {', '.join(INTERPRETERS)}, or path/to/file.py:name "
        f"(default: those of {', '.join(PAPER)} whose needs the network meets)",
    },
    "--encoder-loss": {
        "default": "head",
        "choices": list(ENCODER_LOSSES),
        "help": "loss that the attack on rts adds for the masker's encoder: cross-entropy of its "
        "head, or distance from the mean features of the target class",
    },
    "--encoder-weight": {
        "type": WEIGHT,
        "default": 0.1,
        "metavar": "W",
        "help": "weight of that loss; 0 leaves it out",
    },
}
# epsilon and penalty have no default here: each threat model has its own, and an option that it
# does not take is refused
EFFORT: Arguments = {
    "--precision": {
        "default": "high",
        "choices": list(PRECISIONS),
        "help": "of products in attack steps: float32, or as accelerators round them; bfloat16 "
        "computes the whole step in it; what is reported is always computed at highest",
    },
    "--preset": {
        "default": "default",
        # a `type`, not `choices`: a file is allowed, too
        "type": _choice(PRESETS, "file.json", lambda name: name.endswith(".json")),
        "metavar": "NAME",
        "help": f"the attack's numbers: {', '.join(PRESETS)}, or a file.json of your own",
    },
    "--epsilon": {
        "type": REAL,
        "metavar": "E",
        "help": "largest change under linf and l2, for pixel values in [0, 1] "
        "(default: 8/255, and 0.5 for l2)",
    },
    "--flow-penalty": {
        # the name of the parameter of the threat models
        "dest": "penalty",
        "type": REAL,
        "metavar": "W",
        "help": "weight of a flow's roughness in the loss (default: 0.0005)",
    },
    "--warm-steps": {
        "type": COUNT,
        "metavar": "N",
        "help": "steps of plain PGD before the joint steps (default: the preset's)",
    },
    "--steps": {
        "type": COUNT,
        "metavar": "N",
        "help": "joint steps, against classifier and interpreter (default: the preset's)",
    },
    "--restarts": {
        "type": POSITIVE,
        "metavar": "N",
        "help": "attack each image N times, from random changes, and keep the best (default: the "
        "preset's, 1)",
    },
    "--limit": {
        "type": POSITIVE,
        "metavar": "N",
        "help": "attack at most N of the images that the network gets right (default: all)",
    },
    **BATCH_SIZE,
    **DEVICES,
    "--results": {
        "default": "auto",
        "choices": list(FORMS),
        "help": "write arrays into results.npz, or into a folder of shards; auto: above 2 GB",
    },
    "--snapshots": {
        "type": COUNT,
        "default": 16,
        "metavar": "N",
        "help": "number of images that the report shows at several steps of the attack",
    },
    "--seed": {
        "type": SEED,
        "default": 0,
        "metavar": "N",
        "help": "seed of --sample, target classes and target maps",
    },
    **RESUME,
    **QUIET,
}


def _training(recipe: Recipe) -> Arguments:
    """Return the arguments of every training, with the defaults of a recipe."""
    return {
        **NORMALISATION,
        **IMAGES,
        "--held-out": {
            "metavar": "SOURCE",
            "help": "images to evaluate on (default: other scenes for shapes, else a tenth of "
            "--images)",
        },
        "--epochs": {
            "type": POSITIVE,
            "default": recipe.epochs,
            "metavar": "N",
            "help": "passes over the images",
        },
        "--batch-size": {
            "type": POSITIVE,
            "default": recipe.batch_size,
            "metavar": "N",
            "help": "images a step, of all devices together",
        },
        **DEVICES,
        "--learning-rate": {
            "type": REAL,
            "default": recipe.learning_rate,
            "metavar": "R",
            "help": "its peak; it rises for a twentieth of the steps, then falls to zero",
        },
        "--shift": {
            "type": COUNT,
            "default": recipe.shift,
            "metavar": "N",
            "help": "largest random shift of an image, in pixels",
        },
        "--no-mirror": {
            "dest": "mirror",
            "action": "store_false",
            "help": "do not mirror images at random: for text and digits",
        },
        "--seed": {
            "type": SEED,
            "default": 0,
            "metavar": "N",
            "help": "seed of --sample, of the held-out images, of weights, order and augmentation",
        },
        "--checkpoint-every": {
            "type": POSITIVE,
            "metavar": "N",
            "help": "steps from one checkpoint to the next (default: an epoch)",
        },
        "--resume": {
            "action": "store_true",
            "help": "continue from the last checkpoint in --out",
        },
    }


def _robust(recipe: ClassifierRecipe | MaskerRecipe, choices: Sequence[str], how: str) -> Arguments:
    """Return --robust and the options of its attack, with the defaults of a recipe."""
    return {
        "--robust": {"choices": choices, "help": f"{how} (default: none)"},
        "--epsilon": {
            "type": REAL,
            "default": f"{round(255 * recipe.epsilon)}/255",
            "metavar": "E",
            "help": "largest change of a pixel value in the training of --robust",
        },
        "--attack-steps": {
            "type": POSITIVE,
            "default": recipe.attack_steps,
            "metavar": "N",
            "help": "steps of the attack on each batch",
        },
    }


# defaults come from the recipes, so that the command and the Python call train alike
CLASSIFIER = ClassifierRecipe()
MASKER = MaskerRecipe()
TERMS = {
    "variation": "λ1 of eq. 8, weight of the map's total variation",
    "area": "λ2 of eq. 8, weight of the map's mean",
    "removal": "λ3 of eq. 8, weight of the confidence where the map's region is hidden",
    "power": "λ4 of eq. 8, exponent of that confidence",
    "area_power": "exponent of the map in its mean",
}
# also the source of docs/cli.md, which a test compares with it
COMMANDS = {
    "demo": Command(
        "attack three embedded images under the interpreters of the paper, in about a minute",
        {
            "--out": {"default": "demo", "type": _path, "metavar": "DIR", "help": "where to write"},
            **RESUME,
            **OVERWRITE,
        },
        ["adv2 demo"],
    ),
    "attack": Command(
        "attack your images and your network",
        {
            **NETWORK,
            **IMAGES,
            **INTERPRETER,
            "--threat": {
                "default": "linf",
                "choices": list(threats.THREATS),
                "help": "threat model: what may be changed, pixel values or their places",
            },
            "--target-map": {
                "default": "benign",
                "choices": data.targets.TARGET_MAPS,
                "help": "map that the interpreter is to show: that of the unchanged image, that of "
                "another image of the target class, or a random figure; target_maps of the source "
                "take the place of benign",
            },
            **EFFORT,
            **BATCH_SIZE_OR_AUTO,
            "--joint": {
                "action": "store_true",
                "help": "attack all these interpreters by one image, too: rows with joint true, "
                "beside each one's own attack; plain PGD then has the budget of the joint attack",
            },
            "--goal": {
                "default": "targeted",
                "choices": list(GOALS),
                "help": "what the network is to say: the target class, any class but the true one, "
                "or what it says already (keep: only the map is to move)",
            },
            "--keep": {
                "default": "all",
                "choices": list(KEPT),
                "help": "what the results hold: all, or adversarial images and their numbers only, "
                "without maps, curves and steps on the way, which the report then lacks",
            },
            "--evade": {
                "nargs": "+",
                "type": _path,
                "metavar": "FILE.npz",
                "help": "evade these detectors of adv2 detect, too: an attack that knows of them "
                "(default: none)",
            },
            **HOSTS,
            **_out("where to write summary.json, results.npz, report.html and log.jsonl"),
        },
        [
            "adv2 attack --images shapes:20 --limit 16 --epsilon 16/255 --out run",
            "adv2 attack --model resnet50 --weights resnet50.pth --images photos/ "
            "--classes imagenet.txt --out run",
            "adv2 attack --model my_network.py:network --weights mine.npz --images photos/ "
            "--size 224 --interpreter grad cam --out run",
        ],
    ),
    "table": Command(
        "make a table of the paper, on the embedded images or on yours",
        {
            "table": {
                # metavar: argparse would write all names again into the usage
                "choices": list(TABLES),
                "metavar": "NAME",
                "help": f"one of {', '.join(TABLES)}",
            },
            **NETWORK,
            **IMAGES,
            **INTERPRETER,
            **EFFORT,
            **_out("where to write table.md, summary.json, and the run in a folder of its own"),
        },
        [
            "adv2 table effectiveness --limit 16 --out tables",
            "adv2 table maps --limit 16 --out tables --resume",
        ],
    ),
    "curvature": Command(
        "measure the curvature at the images of a finished run, or of a source; the network is that "
        "of the run unless another is named",
        {
            "run_directory": {
                "nargs": "?",
                "type": _path,
                "metavar": "DIR",
                "help": "a finished run of adv2 attack, to whose folder and report.html the results "
                "are added (default: benign images of --images, into --out)",
            },
            **NETWORK,
            **IMAGES,
            # whether it is given tells a run from a source
            "--images": {
                "metavar": "SOURCE",
                "help": f"where the images come from: {SOURCES} (default: shapes)",
            },
            "--label": {
                "choices": CLASSES,
                "help": "class whose score is studied: the image's own, or its target class "
                "(default: true; target for the attacked images of a run)",
            },
            "--interpreter": INTERPRETER["--interpreter"]
            | {
                # one interpreter here, where an attack takes several
                "nargs": None,
                "help": "interpreter whose map's Jacobian is measured and, of a run, against which "
                f"the images were made: {', '.join(INTERPRETERS)}, or path/to/file.py:name "
                "(default: grad, or the first of a run without it)",
            },
            "--score": {
                "default": "log_odds",
                "choices": list(SCORES),
                "help": "score that is differentiated; cross_entropy is the negative logarithm of "
                "the probability",
            },
            "--tau": {
                "type": ABOVE_0,
                "default": WIDTH,
                "metavar": "T",
                "help": "squared width of the surrogate's second derivative",
            },
            "--depth": {
                "type": POSITIVE,
                "default": 32,
                "metavar": "N",
                "help": "Hessian-vector products that an eigenvalue takes",
            },
            "--probes": {
                "type": POSITIVE,
                "default": 32,
                "metavar": "N",
                "help": "random vectors that a trace takes, 2 or more",
            },
            "--compare": {
                "type": POSITIVE,
                "default": 8,
                "metavar": "N",
                "help": "number of benign images at which surrogates are compared with the true "
                "network",
            },
            "--limit": EFFORT["--limit"]
            | {
                "help": "at most N images of the run, or that the network gets right (default: all)"
            },
            **BATCH_SIZE,
            "--seed": EFFORT["--seed"]
            | {"help": "seed of --sample, target classes and random vectors"},
            **RESUME,
            **QUIET,
            "--out": {
                "type": _path,
                "metavar": "DIR",
                "help": "where to write curvature.json, curvature.npz and report.html (default: "
                "the folder of the run)",
            },
            **OVERWRITE,
        },
        [
            "adv2 curvature --images shapes:20 --limit 8 --out curvature",
            "adv2 curvature run",
            "adv2 curvature run --model cifar_resnet20 --weights resnet20.npz --interpreter cam",
        ],
    ),
    "transfer": Command(
        "show the images of a finished run to other interpreters, by the network of the run, and to "
        "another network",
        {
            "run_directory": {
                "type": _path,
                "metavar": "DIR",
                "help": "a finished run of adv2 attack; the results are added to its summary.json "
                "and report.html",
            },
            **NETWORK,
            "--to-model": {
                "metavar": "NAME",
                "help": f"another network to show the images to: {NAMES}, or path/to/file.py:name "
                "(default: none)",
            },
            "--to-weights": {
                "metavar": "FILE",
                "help": "weights of --to-model; --mean and --std hold for it too, --weights-key "
                "does not",
            },
            **BATCH_SIZE,
            **QUIET,
        },
        [
            "adv2 transfer run",
            "adv2 transfer run --to-model cifar_resnet56 --to-weights resnet56.npz",
        ],
    ),
    "compare": Command(
        "set finished runs on one image set side by side: of one attack on several networks, or of "
        "one network at several --epsilon, --steps or --restarts",
        {
            "run_directories": {
                "type": _path,
                "nargs": "+",
                "metavar": "DIR",
                "help": "finished runs of adv2 attack, two or more; their names name the networks",
            },
            **QUIET,
            **_out("where to write table.md, summary.json and report.html"),
        },
        ["adv2 compare plain robust --out compared", "adv2 compare eps-2 eps-4 eps-8 --out sweep"],
    ),
    "detect": Command(
        "fit detectors of adversarial images on benign ones, and show them the images of finished "
        "runs, blind and adaptive (adv2 attack --evade)",
        {
            "run_directory": {
                "nargs": "+",
                "type": _path,
                "metavar": "DIR",
                "help": "finished runs of one network; results, and detectors that are fitted, are "
                "added to the folder of the first",
            },
            **NETWORK,
            "--detector": {
                "nargs": "+",
                "required": True,
                "type": _choice(DETECTORS, "file.npz", lambda name: name.endswith(".npz")),
                "metavar": "NAME",
                "help": f"detectors: {', '.join(DETECTORS)}, each written to NAME.npz, or a file.npz "
                "that was written so",
            },
            "--benign": {
                "metavar": "SOURCE",
                "help": f"images to fit on, but for those of the runs: {SOURCES}; half are the "
                "reference, half set the threshold",
            },
            **{name: value for name, value in IMAGES.items() if name != "--images"},
            "--interpreter": {
                "nargs": "+",
                "choices": list(INTERPRETERS),
                "metavar": "NAME",
                "help": "interpreters that agreement and discrepancy look at (default: grad cam)",
            },
            "--teacher": {
                "type": _path,
                "metavar": "DIR",
                "help": "a finished run on other images, whose attacks teach a logistic head "
                "(default: none, a threshold of the score)",
            },
            "--teacher-attack": {
                "nargs": "+",
                "default": ["pgd"],
                "choices": list(FITTED_ON),
                "metavar": "NAME",
                "help": f"which of them: {', '.join(FITTED_ON)}",
            },
            **BATCH_SIZE,
            "--seed": EFFORT["--seed"] | {"help": "seed of --sample and of intervals"},
            **QUIET,
            "--overwrite": {
                "action": "store_true",
                "help": "replace NAME.npz in the folder of the run (default: refuse)",
            },
        },
        [
            "adv2 detect run --detector squeezing lid agreement discrepancy --benign shapes:200",
            "adv2 attack --evade run/squeezing.npz --images shapes:20 --out adaptive",
            "adv2 detect run adaptive --detector run/squeezing.npz",
        ],
    ),
    "train classifier": Command(
        "train a classifier",
        {
            "--model": {"default": "cifar_resnet20", "metavar": "NAME", "help": NAMES},
            "--weights": {
                "metavar": "FILE",
                "help": "weights to start from; where they have other classes, the head is made "
                "anew (default: none)",
            },
            **WEIGHTS_KEY,
            **_training(CLASSIFIER),
            "--head-only": {
                "action": "store_true",
                "help": "train the head only; the features stay as they are",
            },
            **_robust(
                CLASSIFIER,
                ROBUST,
                "train on images of plain PGD or ADV², or with a penalty on the slope of the loss "
                "in the image, on its change along an attack, or on its largest curvature",
            ),
            "--interpreter": {
                "default": CLASSIFIER.interpreter,
                "choices": list(INTERPRETERS),
                "help": "that --robust adv2 attacks",
            },
            "--penalty": {
                "type": WEIGHT,
                "metavar": "W",
                "help": "weight of the penalty (default: "
                + ", ".join(f"{weight:g} for {name}" for name, (_, weight) in PENALTIES.items())
                + ")",
            },
            **_out("where to write weights.npz, summary.json and report.html"),
        },
        [
            "adv2 train classifier --images shapes --out trained",
            "adv2 train classifier --images tfds:cifar10/train --held-out tfds:cifar10/test "
            "--epochs 30 --out cifar",
            "adv2 train classifier --model resnet18 --weights resnet18.safetensors --head-only "
            "--images photos/ --out tuned",
            "adv2 train classifier --images shapes --robust pgd --out robust",
        ],
    ),
    "train rts": Command(
        "train the masker of RTS, by eq. 8",
        {
            "--model": NETWORK["--model"],
            "--weights": {"metavar": "FILE", "help": "its weights"},
            **WEIGHTS_KEY,
            "--encoder": {
                "metavar": "NAME",
                "help": "a ResNet of the same classes that the masker starts from "
                "(default: the network itself)",
            },
            "--encoder-weights": {
                "metavar": "FILE",
                "help": "weights of --encoder; --mean and --std hold for it too, --weights-key "
                "does not",
            },
            "--masker": {
                "metavar": "FILE",
                "help": "a masker to start from (default: a new one on --encoder)",
            },
            "--tune": {"action": "store_true", "help": "train the encoder too"},
            **_training(MASKER),
            **{
                # flags have dashes; argparse turns them into underscores again, the names of the
                # fields
                f"--{name.replace('_', '-')}": {
                    "type": WEIGHT,
                    "default": getattr(MASKER, name),
                    "metavar": "W",
                    "help": meaning,
                }
                for name, meaning in TERMS.items()
            },
            "--absent": {
                "type": REAL,
                "default": MASKER.absent,
                "metavar": "P",
                "help": "share of the images of which the map of another class is asked",
            },
            **_robust(MASKER, ["adv2"], "train on images of ADV² too: interpretation distillation"),
            "--distillation": {
                "type": FINITE,
                "default": MASKER.distillation,
                "metavar": "W",
                "help": "weight of the distance to the benign map; below 0 it is to be large",
            },
            **_out("where to write masker.npz, summary.json and report.html"),
        },
        [
            "adv2 train rts --images shapes --out masker",
            "adv2 train rts --model resnet50 --weights resnet50.safetensors --images photos/ "
            "--out masker",
            "adv2 train rts --images shapes --robust adv2 --out robust",
        ],
    ),
    "convert": Command(
        "check weights of torchvision or timm, and write them as .npz or .safetensors",
        {
            "file": {"metavar": "FILE", "help": WEIGHTS},
            "--weights-key": {
                "metavar": "NAME",
                "help": "which weights to take from a FILE that holds several, "
                "such as state_dict_ema or module.model",
            },
            "--model": {"required": True, "metavar": "NAME", "help": NAMES},
            **_out("file to write: .safetensors or .npz", "FILE"),
        },
        ["adv2 convert resnet50.pth --model resnet50 --out resnet50.safetensors"],
    ),
}


def parser() -> Parser:
    """Return the parser of the command line; `run` of what it parses is a key of `COMMANDS`."""
    top = Parser(
        prog="adv2",
        description="Adversarial inputs that fool a classifier and its interpreter at once (ADV²).",
    )
    top.add_argument("--version", action="version", version=f"adv2 {__version__}")
    groups = {"": top.add_subparsers(metavar="COMMAND", required=True)}
    for name, command in COMMANDS.items():
        # `train classifier` is a command of a group, made with its first one
        group, _, word = name.rpartition(" ")
        if group not in groups:
            subparser = groups[""].add_parser(group, help="train a network")
            groups[group] = subparser.add_subparsers(metavar="KIND", required=True)
        subparser = groups[group].add_parser(
            word,
            help=command.summary,
            epilog="\n  ".join(["examples:", *command.examples]),
            # the lines of the examples stay as they are
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for argument, options in command.arguments.items():
            # not ArgumentDefaultsHelpFormatter: it writes `(default: None)` and `(default: False)`
            # too
            default = " (default: %(default)s)" if "default" in options else ""
            subparser.add_argument(argument, **options | {"help": options["help"] + default})
        subparser.set_defaults(run=name)
    return top
