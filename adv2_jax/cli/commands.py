"""What the commands do, but for training: assemble, run, print."""

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adv2_jax import models, report
from adv2_jax.attacks import missing
from adv2_jax.cli import arguments as options_of
from adv2_jax.cli.arguments import EMBEDDED, Parser
from adv2_jax.cli.console import print_sheet, progress_bars
from adv2_jax.cli.subject import Subject, masker_of, model_of, other_model, subject_of
from adv2_jax.errors import listed
from adv2_jax.files import atomic, output_directory, read_summary
from adv2_jax.metrics import probabilities
from adv2_jax.runs.run import Outcome, run
from adv2_jax.runs.schema import ATTACKS, Row
from adv2_jax.runs.select import predict
from adv2_jax.runs.store import UNFINISHED
from adv2_jax.runs.tables import TABLES, after_a_run, by_matrix, by_model, make_table
from adv2_jax.runs.transfer import add, check_network, load_run, transfer_matrix, transfer_to

# few images, and a batch of one shape: most of the demo's time goes to compiling programs
DEMO = [
    "--images",
    "shapes:8",
    "--limit",
    "3",
    "--batch-size",
    "3",
    "--epsilon",
    "16/255",
    "--preset",
    "quick",
]
DEMO += ["--snapshots", "0"]


def attack(arguments: argparse.Namespace, command: str) -> tuple[Subject, Outcome]:
    """Run `adv2 attack`; return what was attacked and what was found."""
    check_out(arguments, "summary.json", "results.npz", "report.html", unfinished=UNFINISHED)
    subject = subject_of(arguments)
    with _running(arguments, command) as (directory, options):
        outcome = run(*subject, directory, **options)
    if not arguments.quiet:
        print_sheet(after_a_run(outcome.rows))
        print(
            f"{outcome.left_out} of {len(subject.images.images)} images left out: the network gets them wrong"
        )
        if outcome.left_out and subject.images.advice:
            print(subject.images.advice)
        if outcome.failed:
            names = listed([str(name) for name in outcome.failed], ", ")
            print(
                f"{len(outcome.failed)} failed, the network gives numbers that are not finite on them: {names}"
            )
        print(f"report: {directory / 'report.html'}")
    return subject, outcome


def table(arguments: argparse.Namespace, command: str) -> None:
    """Run `adv2 table`."""
    table = TABLES[arguments.table]
    names = ("table.md", "summary.json", f"{table.run}/summary.json", f"{table.run}/results.npz")
    check_out(arguments, *names, unfinished=f"{table.run}/{UNFINISHED}")
    arguments.threat, arguments.target_map = table.threat, table.target_map
    subject = subject_of(arguments)
    with _running(arguments, command) as (directory, options):
        sheet = make_table(arguments.table, *subject, directory, **options)
    if not arguments.quiet:
        print_sheet(sheet)
        print(f"table: {directory / 'table.md'}")
        print(f"report: {directory / table.run / 'report.html'}")


def transfer(arguments: argparse.Namespace, command: str) -> None:
    """Run `adv2 transfer`."""
    model, masker, name = model_of(arguments), masker_of(arguments), arguments.to_model
    other = other_model(arguments)
    finished = load_run(Path(arguments.run_directory))
    seen = model if masker is None else models.ClassifierWithMasker(model, masker)
    check_network(finished, seen)
    found: dict[str, Any] = {
        "transfer": transfer_matrix(finished, seen, batch_size=arguments.batch_size)
    }
    sheets = [by_matrix(TABLES["transfer"].title, found["transfer"])]
    if other is not None:
        # it has no masker, say
        able = [
            name for name, made in finished.interpreters.items() if missing(other, made) is None
        ]
        found["models"] = transfer_to(
            finished, other, name, interpreters=able, batch_size=arguments.batch_size
        )
        sheets.append(by_model(f"The same images shown to {name}", found["models"]))
    add(finished, publish=report.write, **found)
    if not arguments.quiet:
        for sheet in sheets:
            print_sheet(sheet)
        print(f"report: {finished.directory / 'report.html'}")


def convert(arguments: argparse.Namespace, command: str) -> None:
    """Run `adv2 convert`."""
    if os.path.exists(arguments.out) and not arguments.overwrite:
        raise ValueError(
            f"{arguments.out} is there already: --overwrite replaces it, another --out keeps it"
        )
    for line in models.convert_file(
        arguments.file, arguments.model, arguments.out, key=arguments.weights_key
    ):
        print(line)


def demo(arguments: argparse.Namespace, command: str) -> None:
    """Run `adv2 demo`: an attack of fixed settings, a picture, three sentences."""
    resume = ["--resume"] if arguments.resume else []
    overwrite = ["--overwrite"] if arguments.overwrite or _is_demo(arguments.out) else []
    parser = Parser(prog="adv2 demo")
    options_of.attack(parser)
    asked = parser.parse_args([*DEMO, *resume, *overwrite, "--out", arguments.out])
    _show_demo(asked, *attack(asked, command))


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


@contextlib.contextmanager
def _running(arguments: argparse.Namespace, command: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The directory of a run, and the options that every run takes."""
    with output_directory(arguments.out) as directory, progress_bars(arguments.quiet) as start:
        yield (
            directory,
            {
                "limit": arguments.limit,
                "config": config_of(arguments, command) | {"model": arguments.model or EMBEDDED},
                "resume": arguments.resume,
                "progress": lambda images, steps, done: start(
                    "attack", steps, done=done, images=images
                ),
                "publish": report.write,
            },
        )


def check_out(arguments: argparse.Namespace, *names: str, unfinished: str) -> None:
    """Refuses, before any work, to write over what a run left in --out when it was over."""
    there = [name for name in names if os.path.exists(os.path.join(arguments.out, name))]
    # there are other rules for these
    goes_on = arguments.resume or os.path.exists(os.path.join(arguments.out, unfinished))
    if there and not goes_on and not arguments.overwrite:
        raise ValueError(
            f"{arguments.out} holds a finished run ({', '.join(there)}): --overwrite replaces it, another --out keeps it"
        )


def config_of(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Return what was asked for, by name, for the summary."""
    return {key: value for key, value in vars(arguments).items() if key != "run"} | {
        "command": command
    }
