"""The command line: arguments -> experiment -> report. No logic of its own."""

import argparse
import contextlib
import inspect
import io
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from adv2_jax import __version__, data, models, presets, report, threats
from adv2_jax.attacks import missing
from adv2_jax.classifier import num_classes
from adv2_jax.descent import OnStep
from adv2_jax.errors import first_line, listed
from adv2_jax.experiments import fit, train, train_masker
from adv2_jax.experiments.batches import UNFINISHED
from adv2_jax.experiments.measures import Row
from adv2_jax.experiments.run import Outcome, environment, run
from adv2_jax.experiments.select import predict
from adv2_jax.experiments.tables import TABLES, WORDS, Sheet, by_matrix, by_model, by_rows, make_table
from adv2_jax.experiments.task import Settings, interpreter_of
from adv2_jax.experiments.train import PLAIN, TrainingSets, accuracy, train_classifier, training_sets
from adv2_jax.experiments.transfer import add, check_network, load_run, transfer_matrix, transfer_to
from adv2_jax.files import atomic, output_directory, read_summary, write_summary
from adv2_jax.interpreters import ENCODER_LOSSES, INTERPRETERS, Interpreter, rts_interpreter
from adv2_jax.metrics import probabilities
from adv2_jax.names import ATTACKS
from adv2_jax.presets import PRESETS, Preset
from adv2_jax.types import Classifier

EMBEDDED = "the embedded network"
NAMES = f"one of {', '.join(models.MODELS)}"
WEIGHTS = "state dict under the names of torchvision or timm: .npz, .safetensors, or what torch wrote (.pth, .pth.tar, .ckpt, ...)"
SOURCES = "shapes, shapes:N, FILE.npz, FILE.npz/SPLIT, a folder, or tfds:name/split"
TARGET_MAP = (
    "the map to be shown: of the unchanged image, of another image of the target class, or a random figure; SOURCE's own "
    "target_maps take the place of benign (default: %(default)s)"
)
TITLE = "PGD against ADV² on the same images (IoU: 75th percentile)"
COLUMNS = {
    "asr": "ASR",
    "mc": "MC",
    "map_l1": "map L1",
    "map_iou75": "IoU",
    "gradient_evaluations": "gradients",
    "seconds": "seconds",
}
LONGEST = 2000  # characters of a message
# few images, and a batch of one shape: most of the demo's time goes to compiling programs
DEMO = ["attack", "--images", "shapes:8", "--limit", "3", "--batch-size", "3", "--epsilon", "16/255", "--preset", "quick"]
DEMO += ["--snapshots", "0"]

CHECKPOINTS = "checkpoints"  # of a training, in its --out
PLUGIN = re.compile(r"jax[-_](cuda|rocm)\d*[-_]plugin|libtpu", re.IGNORECASE)

log = logging.getLogger(__name__)

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Refuses bad arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Hand the message to `main`, which prints it and exits with 2."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; `sys.argv[1:]` unless given.

    Returns:
        0 done, 2 bad input (one line on stderr), 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's takes every character
            stream.reconfigure(errors="replace")
    try:
        arguments = _parser().parse_args(words)
        with _warnings_on_stderr(getattr(arguments, "quiet", False)):
            _check_devices()
            arguments.run(arguments, shlex.join(["adv2", *words]))
    except (ValueError, OSError) as error:
        print(f"adv2: {_line(str(error))}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"adv2: out of memory: {_line(str(error)) or 'what was asked for is too large'}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("adv2: out of memory; a smaller --batch-size or fewer --steps needs less", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"adv2: interrupted{interrupt}", file=sys.stderr)
        return 130
    return 0


def _line(text: str) -> str:
    """A text as one line that a terminal can show: names in it may hold anything, and be of any length."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2]} … {shown[-LONGEST // 2 :]}"


class OneLine(logging.Formatter):
    """A warning as a line of the command's own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return f"adv2: {_line(record.getMessage())}"


@contextlib.contextmanager
def _warnings_on_stderr(quiet: bool) -> Iterator[None]:
    """Prints what the package logs."""
    logger, handler = logging.getLogger("adv2_jax"), logging.StreamHandler()
    handler.setFormatter(OneLine())
    handler.setLevel(logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False  # other handlers would print it again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _check_devices() -> None:
    """Says so when JAX has fallen back to the CPU: a plugin of another version than its own is passed over in silence."""
    wanted = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"JAX has no device of JAX_PLATFORMS={wanted}: {first_line(error)}") from None
    if backend != "cpu" or wanted.startswith("cpu"):
        return
    plugins = [f"{found.name} {found.version}" for found in distributions() if PLUGIN.match(found.name or "")]
    if plugins:
        log.warning(
            "JAX %s runs on the CPU although %s is installed: is there a device, and do the versions fit? (not said if %s)",
            jax.__version__,
            ", ".join(plugins),
            "JAX_PLATFORMS=cpu",
        )


def _parser() -> Parser:
    parser = Parser(prog="adv2", description="Adversarial inputs that fool a classifier and its interpreter at once (ADV²).")
    parser.add_argument("--version", action="version", version=f"adv2 {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    demo = commands.add_parser("demo", help="attack three embedded images under every interpreter, in about a minute")
    demo.add_argument("--out", default="demo", metavar="DIR", help="where to write (default: %(default)s)")
    _resume_argument(demo)
    _overwrite_argument(demo)
    demo.set_defaults(run=_demo)

    attack = commands.add_parser("attack", help="attack your images and your network")
    _attack_arguments(attack)
    attack.set_defaults(run=_attack)

    table = commands.add_parser("table", help="a table of the paper, on the embedded images or on yours")
    _table_arguments(table)
    table.set_defaults(run=_table)

    transfer = commands.add_parser(
        "transfer", help="show the images of a finished run to other interpreters, and to another network"
    )
    _transfer_arguments(transfer)
    transfer.set_defaults(run=_transfer)

    train = commands.add_parser("train", help="train a network")
    kinds = train.add_subparsers(metavar="KIND", required=True, parser_class=Parser)
    classifier = kinds.add_parser("classifier", help="train a classifier")
    _train_arguments(classifier)
    classifier.set_defaults(run=_train_classifier)
    rts = kinds.add_parser("rts", help="train the masker of RTS, by eq. 8")
    _train_rts_arguments(rts)
    rts.set_defaults(run=_train_rts)

    convert = commands.add_parser("convert", help="rewrite torchvision or timm weights in the project's form")
    _convert_arguments(convert)
    convert.set_defaults(run=_convert)
    return parser


def _attack_arguments(parser: Parser) -> None:
    _subject_arguments(parser)
    add = parser.add_argument
    add("--threat", default="linf", choices=list(threats.THREATS), help="what may be changed (default: %(default)s)")
    add("--target-map", default="benign", choices=data.targets.TARGET_MAPS, help=TARGET_MAP)
    _effort_arguments(parser)
    add("--out", required=True, metavar="DIR", help="where to write summary.json, results.npz, report.html and log.jsonl")
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
    add("--encoder-loss", default="head", choices=list(ENCODER_LOSSES), help="what the attack on rts adds (default: %(default)s)")
    add("--encoder-weight", type=_weight, default=0.1, metavar="W", help="its weight; 0 leaves it out (default: %(default)s)")


def _network_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"{NAMES}, or path/to/file.py:name (default: {EMBEDDED})")
    add("--weights", metavar="FILE", help=f"{WEIGHTS}; with file.py:name handed to name")
    _weights_key_argument(parser)
    add("--masker", metavar="FILE", help="masker of the network, for rts, from adv2 train rts (default: the embedded network's)")
    _normalisation_arguments(parser)


def _weights_key_argument(parser: Parser) -> None:
    parser.add_argument(
        "--weights-key", metavar="NAME", help="which weights of a file that holds several, such as state_dict_ema or module.model"
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
        "--epsilon", type=_number, metavar="E", help="radius of linf (default: 8/255) or l2 (default: 0.5), in units of pixel value"
    )
    add("--flow-penalty", dest="penalty", type=_number, metavar="W", help="weight of a flow's roughness (default: 0.0005)")
    add("--warm-steps", type=_whole, metavar="N", help="steps of plain PGD first (default: the preset's)")
    add("--steps", type=_whole, metavar="N", help="joint steps (default: the preset's)")
    add("--limit", type=_positive, metavar="N", help="attack at most N images of those the network gets right")
    _batch_size_argument(parser)
    add("--snapshots", type=_whole, default=16, metavar="N", help="images whose way the report shows (default: %(default)s)")
    add("--seed", type=_seed, default=0, metavar="N", help="of --sample, target classes and target maps (default: %(default)s)")
    _resume_argument(parser)
    _quiet_argument(parser)


def _batch_size_argument(parser: Parser) -> None:
    parser.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="images at a time (default: %(default)s)")


def _resume_argument(parser: Parser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out")


def _overwrite_argument(parser: Parser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what is finished in --out (default: refuse to)")


def _quiet_argument(parser: Parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _table_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("table", choices=list(TABLES), metavar="NAME", help=f"one of {', '.join(TABLES)}")
    _subject_arguments(parser)
    _effort_arguments(parser)
    add("--out", required=True, metavar="DIR", help="where to write table.md, summary.json, and the run in a folder of its own")
    _overwrite_argument(parser)


def _transfer_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("run_directory", metavar="DIR", help="a finished run of adv2 attack; its summary.json and report.html are added to")
    _network_arguments(parser)
    add("--to-model", metavar="NAME", help="another network, which the images are shown to (default: none)")
    add("--to-weights", metavar="FILE", help="its weights")
    _batch_size_argument(parser)
    _quiet_argument(parser)


def _normalisation_arguments(parser: Parser) -> None:
    for name, kind, meaning in (("--mean", _finite, "subtracted from"), ("--std", _divisor, "that divides")):
        parser.add_argument(
            name, nargs=3, type=kind, metavar=("R", "G", "B"), help=f"colour {meaning} the [0, 1] image (default: ImageNet's)"
        )


def _source_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--images", default="shapes", metavar="SOURCE", help=f"{SOURCES} (default: %(default)s)")
    add("--size", type=_positive, metavar="N", help="crop images to N x N (default: folders and tfds to what the network wants)")
    add("--labels", metavar="FILE.csv", help="file name, class, and optional target class of the images of a flat folder")
    add("--classes", metavar="FILE.txt", help="one class a line, in the network's order; names of sub-folders, numbers too")
    add("--sample", type=_positive, metavar="N", help="read only N images, drawn from the seed (default: all)")


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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, such as 0.5 or 8/255") from None


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


class Subject(NamedTuple):
    """What the command line asks to be attacked, and how."""

    model: Classifier
    images: data.ImageSet
    settings: Settings


def _subject(arguments: argparse.Namespace) -> Subject:
    threat = _threat(arguments)
    model, masker = _model(arguments), _masker(arguments)
    subject = model if masker is None else models.Masked(model, masker)
    arguments.interpreter = _interpreters(arguments.interpreter, subject)
    images = data.load(arguments.images, **_source_options(arguments, getattr(model, "image_size", None)))
    settings = Settings(
        interpreters=[_with_options(name, arguments) for name in arguments.interpreter],
        threat=threat,
        preset=_preset(arguments),
        warm_steps=arguments.warm_steps,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        target_map=arguments.target_map,
        snapshots=arguments.snapshots,
    )
    return Subject(subject, images, settings)


def _check_out(arguments: argparse.Namespace, *names: str, unfinished: str) -> None:
    """Refuses, before any work, to write over what a run left in --out when it was over."""
    there = [name for name in names if os.path.exists(os.path.join(arguments.out, name))]
    goes_on = arguments.resume or os.path.exists(os.path.join(arguments.out, unfinished))  # there are other rules for these
    if there and not goes_on and not arguments.overwrite:
        raise ValueError(
            f"{arguments.out} holds a finished run ({', '.join(there)}): --overwrite replaces it, another --out keeps it"
        )


@contextlib.contextmanager
def _running(arguments: argparse.Namespace, command: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The directory of a run, and the options that every run takes."""
    with output_directory(arguments.out) as directory, _progress(arguments.quiet) as start:
        yield (
            directory,
            {
                "limit": arguments.limit,
                "config": _config(arguments, command) | {"model": arguments.model or EMBEDDED},
                "resume": arguments.resume,
                "progress": lambda images, steps, done: start("attack", steps, done=done, images=images),
                "publish": report.write,
            },
        )


def _attack(arguments: argparse.Namespace, command: str) -> tuple[Subject, Outcome]:
    _check_out(arguments, "summary.json", "results.npz", "report.html", unfinished=UNFINISHED)
    subject = _subject(arguments)
    with _running(arguments, command) as (directory, options):
        outcome = run(*subject, directory, **options)
    if not arguments.quiet:
        _print(by_rows(TITLE, COLUMNS, outcome.rows, spread=False))
        print(f"{outcome.left_out} of {len(subject.images.images)} images left out: the network gets them wrong")
        if outcome.left_out and subject.images.advice:
            print(subject.images.advice)
        if outcome.failed:
            names = listed([str(name) for name in outcome.failed], ", ")
            print(f"{len(outcome.failed)} failed, the network gives numbers that are not finite on them: {names}")
        print(f"report: {directory / 'report.html'}")
    return subject, outcome


def _table(arguments: argparse.Namespace, command: str) -> None:
    table = TABLES[arguments.table]
    names = ("table.md", "summary.json", f"{table.run}/summary.json", f"{table.run}/results.npz")
    _check_out(arguments, *names, unfinished=f"{table.run}/{UNFINISHED}")
    arguments.threat, arguments.target_map = table.threat, table.target_map
    subject = _subject(arguments)
    with _running(arguments, command) as (directory, options):
        sheet = make_table(arguments.table, *subject, directory, **options)
    if not arguments.quiet:
        _print(sheet)
        print(f"table: {directory / 'table.md'}")
        print(f"report: {directory / table.run / 'report.html'}")


def _transfer(arguments: argparse.Namespace, command: str) -> None:
    model, masker, name = _model(arguments), _masker(arguments), arguments.to_model
    other = _other_model(arguments)
    finished = load_run(Path(arguments.run_directory))
    seen = model if masker is None else models.Masked(model, masker)
    check_network(finished, seen)
    found: dict[str, Any] = {"transfer": transfer_matrix(finished, seen, batch_size=arguments.batch_size)}
    sheets = [by_matrix(TABLES["transfer"].title, found["transfer"])]
    if other is not None:
        able = [name for name, made in finished.interpreters.items() if missing(other, made) is None]  # it has no masker, say
        found["models"] = transfer_to(finished, other, name, interpreters=able, batch_size=arguments.batch_size)
        sheets.append(by_model(f"The same images shown to {name}", found["models"]))
    add(finished, publish=report.write, **found)
    if not arguments.quiet:
        for sheet in sheets:
            _print(sheet)
        print(f"report: {finished.directory / 'report.html'}")


def _other_model(arguments: argparse.Namespace) -> Classifier | None:
    name, weights = arguments.to_model, arguments.to_weights
    if name is None and weights is None:
        return None
    if name is not None and models.user.is_reference(name):
        return models.user.load(name, weights)
    if name is None or weights is None:
        raise ValueError("--to-model and --to-weights go together")
    return models.load(name, weights, **_normalisation(arguments))


def _threat(arguments: argparse.Namespace) -> threats.Threat:
    """The threat model. Options of it that were not given take their defaults, so that the summary tells them."""
    factory = threats.THREATS[arguments.threat]
    options = {key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()}
    for word, key in (("--epsilon", "epsilon"), ("--flow-penalty", "penalty")):
        if getattr(arguments, key) is None:
            setattr(arguments, key, options.get(key))
        elif key not in options:
            raise ValueError(f"{word} is not for --threat {arguments.threat}")
    return factory(**{key: getattr(arguments, key) for key in options})


def _masker(arguments: argparse.Namespace) -> models.Masker | None:
    if arguments.masker is not None:
        return models.load_masker(arguments.masker)
    return models.embedded_masker() if arguments.model is None and arguments.weights is None else None


def _interpreters(chosen: list[str] | None, model: Classifier) -> list[str]:
    """Names, each once; unless chosen, all that can be used."""
    if chosen is None:
        return [name for name, make in INTERPRETERS.items() if missing(model, make()) is None]
    if "rts" in chosen and missing(model, INTERPRETERS["rts"]()):
        raise ValueError("--interpreter rts needs --masker FILE, the network's own masker; adv2 train rts makes one")
    return list(dict.fromkeys(chosen))


def _with_options(name: str, arguments: argparse.Namespace) -> str | Interpreter:
    """An interpreter with the options of the command line, or the name of one that has none: the preset knows its own."""
    if name == "rts":
        return rts_interpreter(encoder_loss=arguments.encoder_loss, encoder_weight=arguments.encoder_weight)
    return interpreter_of(name)


def _preset(arguments: argparse.Namespace) -> str | dict[str, Preset]:
    """A preset's name, or the presets of a file, whose numbers become a part of what was asked for."""
    if arguments.preset in PRESETS:
        return str(arguments.preset)
    known = presets.read(arguments.preset)
    arguments.numbers = {name: presets.to_dict(preset) for name, preset in known.items()}
    return known


def _choice(known: Collection[str], form: str, has_form: Callable[[str], bool]) -> Callable[[str], str]:
    """What argparse's `choices` is to names that may have a form instead."""

    def name_or_form(name: str) -> str:
        if name not in known and not has_form(name):
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(map(repr, known))}, or {form})")
        return name

    return name_or_form


def _demo(arguments: argparse.Namespace, command: str) -> None:
    resume = ["--resume"] if arguments.resume else []
    overwrite = ["--overwrite"] if arguments.overwrite or _is_demo(arguments.out) else []
    asked = _parser().parse_args([*DEMO, *resume, *overwrite, "--out", arguments.out])
    _show_demo(asked, *_attack(asked, command))


def _show_demo(asked: argparse.Namespace, subject: Subject, outcome: Outcome) -> None:
    """The picture of a demo, and what it shows in words."""
    picture = Path(asked.out) / "picture.png"

    def look(shown: NDArray[np.uint8]) -> NDArray[np.floating]:
        return probabilities(predict(subject.model, shown, asked.batch_size))

    if find_spec("PIL") is None:
        print(f"{picture} needs Pillow: pip install 'adv2_jax[images]'")
    else:
        with atomic(picture) as file:
            file.write(report.gallery(asked.out, look))
        print(f"picture: {picture}")
    print(_in_words(outcome.rows, asked.epsilon, len(subject.images.images)))


def _in_words(rows: Sequence[Row], epsilon: float, scenes: int) -> str:
    """What the demo shows, in three sentences."""
    plain, joint = ([row for row in rows if row["attack"] == attack] for attack in ATTACKS)

    def share(rows: Sequence[Row]) -> str:
        least, most = (f"{pick(row['asr'] for row in rows):.0%}" for pick in (min, max))
        return most if least == most else f"{least} to {most}"

    def off(rows: Sequence[Row]) -> str:
        return " to ".join(f"{pick(row['map_l1'] for row in rows):.3f}" for pick in (min, max))

    times = [a["map_l1"] / b["map_l1"] for a, b in zip(plain, joint, strict=True)]
    return (
        f"Attacked were the first {plain[0]['n']} of {scenes} embedded scenes that the network gets right, each to be taken for "
        f"another class, with no pixel value changed by more than {round(epsilon * 255)}/255. "
        f"Plain PGD succeeds on {share(plain)} of them, but the maps of all {len(plain)} interpreters move, by {off(plain)} (L1), "
        f"and so give it away. "
        f"ADV², with as much computation, succeeds on {share(joint)}, and its maps are off by only {off(joint)}, "
        f"{min(times):.0f} to {max(times):.0f} times less: they hide the attack."
    )


def _is_demo(directory: str) -> bool:
    """Whether a directory holds a demo, which may be made anew."""
    try:
        config = read_summary(Path(directory)).get("config", {})
    except ValueError:
        return False
    return str(config.get("command")).startswith("adv2 demo")


def _model(arguments: argparse.Namespace) -> Classifier:
    name, weights, options = arguments.model, arguments.weights, _weights_options(arguments)
    if options and (name is None or models.user.is_reference(name)):
        option = "weights-key" if "key" in options else min(options)
        raise ValueError(f"--{option} is for the networks that come with adv2: {', '.join(models.MODELS)}")
    if name is None and weights is None:
        return models.embedded()
    if name is not None and models.user.is_reference(name):
        return models.user.load(name, weights)
    if name is not None:
        models.check_name(name)
    if name is None or weights is None:
        raise ValueError("--model and --weights go together; without both, the embedded network is used")
    return models.load(name, weights, **options)


def _normalisation(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: tuple(getattr(arguments, key)) for key in ("mean", "std") if getattr(arguments, key)}


def _weights_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """How the file of weights is read."""
    key = {} if arguments.weights_key is None else {"key": arguments.weights_key}
    return _normalisation(arguments) | key


def _source_options(arguments: argparse.Namespace, image_size: int | None) -> dict[str, Any]:
    options = {key: getattr(arguments, key) for key in ("size", "labels", "classes", "sample", "seed")}
    if options["size"] is None and data.sizes_vary(arguments.images):
        options["size"] = image_size
    return options


def _train_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", default="cifar_resnet20", metavar="NAME", help=f"{NAMES} (default: %(default)s)")
    add("--weights", metavar="FILE", help="weights to start from; the head is made anew if it has other classes (default: none)")
    _weights_key_argument(parser)
    _training_arguments(parser, train.Recipe())
    add("--head-only", action="store_true", help="train the head, keep the features")
    add("--out", required=True, metavar="DIR", help="where to write weights.npz, summary.json and report.html")
    _overwrite_argument(parser)


def _train_rts_arguments(parser: Parser) -> None:
    add, recipe = parser.add_argument, train_masker.Recipe()
    add("--model", metavar="NAME", help=f"the network to explain: {NAMES}, or path/to/file.py:name (default: {EMBEDDED})")
    add("--weights", metavar="FILE", help="its weights")
    _weights_key_argument(parser)
    add("--encoder", metavar="NAME", help="a ResNet of the same classes, the start of the masker (default: the network itself)")
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
        add(f"--{name}", type=_weight, default=default, metavar="W", help=f"λ{i} of eq. 8, {meaning} (default: %(default)s)")
    add("--area-power", type=_weight, default=recipe.area_power, metavar="P", help="of the map in its mean (default: %(default)s)")
    add("--absent", type=_number, default=recipe.absent, metavar="P", help="share of maps of another class (default: %(default)s)")
    add("--out", required=True, metavar="DIR", help="where to write masker.npz, summary.json and report.html")
    _overwrite_argument(parser)


def _training_arguments(parser: Parser, recipe: fit.Recipe) -> None:
    """What every training is told; defaults from the recipe."""
    add = parser.add_argument
    _normalisation_arguments(parser)
    _source_arguments(parser)
    add("--held-out", metavar="SOURCE", help="images to measure on (default: other scenes for shapes, else a tenth of --images)")
    add("--epochs", type=_positive, default=recipe.epochs, metavar="N", help="passes over the images (default: %(default)s)")
    add("--batch-size", type=_positive, default=recipe.batch_size, metavar="N", help="images a step (default: %(default)s)")
    add("--learning-rate", type=_number, default=recipe.learning_rate, metavar="R", help="its peak (default: %(default)s)")
    add("--shift", type=_whole, default=recipe.shift, metavar="N", help="largest random shift in pixels (default: %(default)s)")
    add("--no-mirror", dest="mirror", action="store_false", help="do not mirror images at random: for text and digits")
    add(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of --sample, what is held out, weights, order and augmentation (default: %(default)s)",
    )
    add("--checkpoint-every", type=_positive, metavar="N", help="steps between checkpoints (default: an epoch)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")


def _train_classifier(arguments: argparse.Namespace, command: str) -> None:
    _check_out(arguments, "weights.npz", "summary.json", "report.html", unfinished=CHECKPOINTS)
    sets = _training_sets(arguments, models.image_size(arguments.model), plain=PLAIN)
    start, (images, labels, _) = _start(arguments, sets), sets.held_out
    before = accuracy(start, images, labels) if arguments.weights else None

    def finish(model: models.Network, directory: Path) -> dict[str, Any]:
        after = accuracy(model, images, labels)
        models.convert.save(model, directory / "weights.npz")
        print(f"held-out accuracy {after:.4f} on {len(images)} images; weights: {directory / 'weights.npz'}")
        return {"classes": sets.classes, "accuracy": after, "accuracy_before": before}

    _training(arguments, _config(arguments, command), sets, partial(train_classifier, start), train.Recipe, finish)


def _train_rts(arguments: argparse.Namespace, command: str) -> None:
    _check_out(arguments, "masker.npz", "summary.json", "report.html", unfinished=CHECKPOINTS)
    classifier = _model(arguments)
    name, encoder = _encoder(arguments, classifier)
    start = models.Masker(encoder, rngs=nnx.Rngs(arguments.seed))
    sets = _training_sets(arguments, getattr(classifier, "image_size", None))
    shown = train_masker.to_explain(classifier, sets.held_out)  # before the work: there may be none

    def finish(masker: models.Masker, directory: Path) -> dict[str, Any]:
        models.save_masker(masker, name, directory / "masker.npz")
        found = train_masker.qualities(models.Masked(classifier, masker), shown)
        own = found["rts"]
        print(f"{own.n} held-out images: confidence kept {own.kept:.3f}, removed to {own.removed:.3f}")
        print(f"masker: {directory / 'masker.npz'}")
        return {"quality": [{"interpreter": key} | value._asdict() for key, value in found.items()]}

    config = _config(arguments, command) | {"model": arguments.model or EMBEDDED}
    _training(arguments, config, sets, partial(train_masker.train_masker, start, classifier), train_masker.Recipe, finish)


def _encoder(arguments: argparse.Namespace, classifier: Classifier) -> tuple[str, models.Encoder]:
    """What the masker sees through, and its name: a network of its own, or the one to be explained."""
    name, weights = arguments.encoder, arguments.encoder_weights
    if (name is None) != (weights is None):
        raise ValueError("--encoder and --encoder-weights go together; without both, the network itself is the encoder")
    if name is not None:
        return name, models.check_encoder(models.load(name, weights, **_normalisation(arguments)))
    if arguments.model is not None and models.user.is_reference(arguments.model):
        raise ValueError(f"--model {arguments.model} needs --encoder and --encoder-weights: a ResNet of adv2 with the same classes")
    return arguments.model or models.EMBEDDED, models.check_encoder(classifier)


def _training_sets(arguments: argparse.Namespace, image_size: int | None, plain: float = 0.0) -> TrainingSets:
    options = _source_options(arguments, image_size)
    return training_sets(arguments.images, held_out=arguments.held_out, plain=plain, **options)


def _training(
    arguments: argparse.Namespace,
    config: dict[str, Any],
    sets: TrainingSets,
    run: Callable[..., tuple[T, fit.Losses]],
    kind: type[fit.Recipe],
    finish: Callable[[T, Path], dict[str, Any]],
) -> None:
    """Train with a bar and checkpoints, then write what `finish` saves, measures and prints, summary and report."""
    recipe = {field.name: getattr(arguments, field.name) for field in fields(kind) if hasattr(arguments, field.name)}
    with output_directory(arguments.out) as directory, _kept(directory / CHECKPOINTS) as checkpoints:
        with _progress() as start:
            bar = start("train", arguments.epochs * (len(sets.train.images) // arguments.batch_size))
            kept = fit.Kept(checkpoints, arguments.checkpoint_every, arguments.resume, _advance(bar))
            trained, losses = run(sets.train.images, sets.train.labels, kept=kept, **recipe)
        counts = {"train": len(sets.train.images), "held_out": len(sets.held_out.images)}
        summary = {"config": config, "environment": environment(), "counts": counts, **finish(trained, directory)}
        write_summary(directory, summary | {"losses": [float(loss) for loss in losses]})
        page = report.write_training(directory)
        shutil.rmtree(checkpoints)
    print(f"report: {page}")


def _advance(bar: OnStep) -> Callable[[int, float], None]:
    """A bar that is told the number of the step: a resumed run begins in the middle."""
    seen = 0

    def on_step(step: int, loss: float) -> None:
        nonlocal seen
        bar(step - seen)
        seen = step

    return on_step


def _start(arguments: argparse.Namespace, sets: TrainingSets) -> models.Network:
    """The network that training starts from."""
    if arguments.weights is None:
        if arguments.weights_key is not None:
            raise ValueError("--weights-key goes with --weights")
        return models.build(arguments.model, seed=arguments.seed, num_classes=sets.num_classes, **_normalisation(arguments))
    model = models.load(arguments.model, arguments.weights, **_weights_options(arguments))
    if num_classes(model, sets.train.images.shape[1:]) == sets.num_classes:
        return model
    return models.with_new_head(model, sets.num_classes, seed=arguments.seed)


@contextlib.contextmanager
def _kept(checkpoints: Path) -> Iterator[Path]:
    """Tells whoever interrupts a run how to go on with it."""
    try:
        yield checkpoints
    except KeyboardInterrupt:
        if checkpoints.exists():
            raise KeyboardInterrupt("; the last checkpoint is kept, --resume goes on from it") from None
        raise


def _convert_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help=WEIGHTS)
    _weights_key_argument(parser)
    add("--model", required=True, metavar="NAME", help=NAMES)
    add("--out", required=True, metavar="FILE", help="what to write: .safetensors or .npz")
    _overwrite_argument(parser)


def _convert(arguments: argparse.Namespace, command: str) -> None:
    if os.path.exists(arguments.out) and not arguments.overwrite:
        raise ValueError(f"{arguments.out} is there already: --overwrite replaces it, another --out keeps it")
    for line in models.convert_file(arguments.file, arguments.model, arguments.out, key=arguments.weights_key):
        print(line)


def _config(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    return {key: value for key, value in vars(arguments).items() if key != "run"} | {"command": command}


def _print(sheet: Sheet) -> None:
    table = Table(title=sheet.title, box=SIMPLE, pad_edge=False, collapse_padding=True)  # as narrow as a terminal of 80 columns
    for heading in sheet.headings:
        table.add_column(heading, justify="left" if heading in WORDS else "right")
    for line in sheet.lines:
        table.add_row(*line)
    Console().print(table)


class Rate(ProgressColumn):
    """Images a second, from the steps a second of a task that knows its images."""

    def render(self, task: Task) -> Text:
        """The column of one bar."""
        speed, images = task.finished_speed or task.speed, task.fields["images"]
        return Text(f"{speed * images / task.total:.2f} images/s" if speed and images and task.total else "")


@contextlib.contextmanager
def _progress(quiet: bool = False) -> Iterator[Any]:
    """(title, steps) -> function called with the steps newly done; a bar each on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda title, steps, **more: lambda new: None
        return
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), Rate())
    with Progress(*columns, console=console) as bars:

        def start(title: str, steps: int, done: int = 0, images: int | None = None) -> OnStep:
            task = bars.add_task(title, total=steps, completed=done, images=images)
            return lambda new: bars.advance(task, new)

        yield start


def script() -> NoReturn:
    """Entry point of the `adv2` command."""
    sys.exit(main())
