"""The command line: arguments -> experiment -> report. No logic of its own."""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from adv2_jax import __version__, data, models, report, threats
from adv2_jax.attack import OnStep
from adv2_jax.experiments.files import output_directory, write_run, write_summary
from adv2_jax.experiments.run import Outcome, Settings, environment, run
from adv2_jax.experiments.train import BATCH_SIZE, EPOCHS, LEARNING_RATE, accuracy, train_classifier, training_sets
from adv2_jax.files import atomic
from adv2_jax.interpreters import INTERPRETERS
from adv2_jax.presets import PRESETS

EMBEDDED = "the embedded network"
DEMO = ["attack", "--images", "shapes:20", "--limit", "8", "--batch-size", "8", "--epsilon", "0.063", "--steps", "100"]


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
    try:
        arguments = _parser().parse_args(words)
        arguments.run(arguments, shlex.join(["adv2", *words]))
    except (ValueError, OSError) as error:
        print(f"adv2: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("adv2: out of memory; a smaller --batch-size or fewer --steps needs less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("adv2: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(prog="adv2", description="Adversarial inputs that fool a classifier and its interpreter at once (ADV²).")
    parser.add_argument("--version", action="version", version=f"adv2 {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    demo = commands.add_parser("demo", help="attack eight embedded images under every interpreter")
    demo.add_argument("--out", default="demo", metavar="DIR", help="where to write (default: %(default)s)")
    demo.set_defaults(run=_demo)

    attack = commands.add_parser("attack", help="attack your images and your network")
    _attack_arguments(attack)
    attack.set_defaults(run=_attack)

    train = commands.add_parser("train", help="train a network")
    kinds = train.add_subparsers(metavar="KIND", required=True, parser_class=Parser)
    classifier = kinds.add_parser("classifier", help="train a classifier")
    _train_arguments(classifier)
    classifier.set_defaults(run=_train_classifier)
    return parser


def _attack_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"one of {', '.join(models.MODELS)} (default: {EMBEDDED})")
    add("--weights", metavar="FILE", help="torch-style state dict, .npz or .safetensors")
    add("--images", default="shapes", metavar="SOURCE", help="shapes, shapes:N, or FILE.npz (default: %(default)s)")
    add("--interpreter", nargs="+", default=list(INTERPRETERS), choices=list(INTERPRETERS), help="default: all")
    add("--threat", default="linf", choices=["linf"], help="threat model (default: %(default)s)")
    add("--target-map", default="benign", choices=["benign"], help="the map to be shown (default: %(default)s)")
    add("--preset", default="default", choices=list(PRESETS), help="the attack's numbers (default: %(default)s)")
    add("--epsilon", type=float, default=0.031, metavar="E", help="radius of the threat model (default: %(default)s)")
    add("--warm-steps", type=_whole, metavar="N", help="steps of plain PGD first (default: the preset's)")
    add("--steps", type=_whole, metavar="N", help="joint steps (default: the preset's)")
    add("--limit", type=_positive, metavar="N", help="attack at most N images of those the network gets right")
    add("--batch-size", type=_positive, default=32, metavar="N", help="images at a time (default: %(default)s)")
    add("--seed", type=_seed, default=0, metavar="N", help="of the target classes (default: %(default)s)")
    add("--out", required=True, metavar="DIR", help="where to write summary.json, results.npz and report.html")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _seed(text: str) -> int:
    if _whole(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 2**32")
    return int(text)


def _positive(text: str) -> int:
    if _whole(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _attack(arguments: argparse.Namespace, command: str) -> None:
    model = _model(arguments.model, arguments.weights)
    arguments.interpreter = list(dict.fromkeys(arguments.interpreter))
    _run(
        model,
        data.load(arguments.images),
        Settings(
            interpreters=arguments.interpreter,
            threat=threats.linf(arguments.epsilon),
            preset=arguments.preset,
            warm_steps=arguments.warm_steps,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
        ),
        config=_config(arguments, command) | {"model": arguments.model or EMBEDDED},
        limit=arguments.limit,
    )


def _demo(arguments: argparse.Namespace, command: str) -> None:
    _attack(_parser().parse_args([*DEMO, "--out", arguments.out]), command)
    with atomic(Path(arguments.out) / "picture.png") as file:
        file.write(report.gallery(arguments.out))


def _model(name: str | None, weights: str | None) -> models.ResNet:
    if name is None and weights is None:
        return models.embedded()
    if name is None or weights is None:
        raise ValueError("--model and --weights go together; without both, the embedded network is used")
    return models.load(name, weights)


def _train_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", default="cifar_resnet20", metavar="NAME", help=f"one of {', '.join(models.MODELS)} (default: %(default)s)")
    add("--images", default="shapes", metavar="SOURCE", help="shapes or FILE.npz (default: %(default)s)")
    add("--epochs", type=_positive, default=EPOCHS, metavar="N", help="passes over the images (default: %(default)s)")
    add("--batch-size", type=_positive, default=BATCH_SIZE, metavar="N", help="images a step (default: %(default)s)")
    add("--learning-rate", type=float, default=LEARNING_RATE, metavar="R", help="its peak (default: %(default)s)")
    add("--seed", type=_seed, default=0, metavar="N", help="of weights, order and augmentation (default: %(default)s)")
    add("--out", required=True, metavar="DIR", help="where to write weights.npz and summary.json")


def _train_classifier(arguments: argparse.Namespace, command: str) -> None:
    sets = training_sets(arguments.images, seed=arguments.seed)
    classes = int(max(sets.train.labels.max(), sets.held_out.labels.max())) + 1
    model = models.build(arguments.model, seed=arguments.seed, num_classes=classes)
    options = {"epochs": arguments.epochs, "batch_size": arguments.batch_size, "learning_rate": arguments.learning_rate}
    with output_directory(arguments.out) as directory:
        with _progress() as start:
            steps = arguments.epochs * (len(sets.train.images) // arguments.batch_size)
            tick = start("train", steps)
            model, losses = train_classifier(
                model,
                sets.train.images,
                sets.train.labels,
                seed=arguments.seed,
                on_step=lambda step, loss: tick(1),
                **options,
            )
        held_out = accuracy(model, sets.held_out.images, sets.held_out.labels)
        models.convert.save(model, directory / "weights.npz")
        write_summary(
            directory,
            {
                "config": _config(arguments, command),
                "environment": environment(),
                "counts": {"train": len(sets.train.images), "held_out": len(sets.held_out.images)},
                "accuracy": held_out,
                "losses": [float(loss) for loss in losses],
            },
        )
    print(f"held-out accuracy {held_out:.4f} on {len(sets.held_out.images)} images; weights: {directory / 'weights.npz'}")


def _config(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    return {key: value for key, value in vars(arguments).items() if key != "run"} | {"command": command}


def _run(model: models.ResNet, images: data.ImageSet, settings: Settings, *, config: dict[str, Any], limit: int | None) -> None:
    with output_directory(config["out"]) as directory:
        with _progress() as start:
            outcome = run(model, images, settings, limit=limit, progress=start)
        write_run(directory, _summary(outcome, images, config), outcome.arrays)
        page = report.write(directory)
    _print_table(outcome)
    print(f"{outcome.left_out} of {len(images.images)} images left out: the network gets them wrong")
    print(f"report: {page}")


def _summary(outcome: Outcome, images: data.ImageSet, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": config,
        "environment": environment(),
        "counts": {"images": len(images.images), "left_out": outcome.left_out},
        "classes": images.classes,
        "rows": outcome.rows,
    }


def _print_table(outcome: Outcome) -> None:
    table = Table(title="PGD against ADV² on the same images")
    columns = {
        "n": "n",
        "asr": "ASR",
        "mc": "MC",
        "map_l1": "map L1",
        "map_iou75": "IoU 75th pct",
        "gradient_evaluations": "gradients",
        "seconds": "seconds",
    }
    for heading in ("interpreter", "attack", *columns.values()):
        table.add_column(heading, justify="right" if heading in columns.values() else "left")
    for row in outcome.rows:
        numbers = [row[key] for key in columns]
        table.add_row(row["interpreter"], row["attack"], *(_number(number) for number in numbers))
    Console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """(title, steps) -> function called with the steps newly done; a bar each on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda title, steps: lambda done: None
        return
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:

        def start(title: str, steps: int) -> OnStep:
            task = bars.add_task(title, total=steps)
            return lambda done: bars.advance(task, done)

        yield start


def script() -> NoReturn:
    """Entry point of the `adv2` command."""
    sys.exit(main())
