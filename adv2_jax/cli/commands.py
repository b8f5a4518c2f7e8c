"""The commands that do not train: assemble, run, print."""

import argparse
import contextlib
import inspect
import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adv2_jax import detectors, models, report
from adv2_jax.attacks import fitting_batch_size, missing
from adv2_jax.cli.arguments import AUTO, BATCH_SIZE, parser
from adv2_jax.cli.console import print_sheet, progress_bars
from adv2_jax.cli.subject import (
    SOURCE,
    Subject,
    benign_of,
    measured_of,
    model_of,
    network_of,
    normalisation,
    subject_of,
    with_masker,
    with_network_of_run,
)
from adv2_jax.detectors import DETECTORS
from adv2_jax.devices import number_of_devices
from adv2_jax.errors import listed
from adv2_jax.files import (
    atomic,
    intact,
    output_directory,
    read_summary,
    restored,
    write_summary,
)
from adv2_jax.identity import environment
from adv2_jax.metrics import probabilities
from adv2_jax.report import words
from adv2_jax.runs import compare as comparison
from adv2_jax.runs import curvature as laboratory
from adv2_jax.runs.detection import fit_detector, judge, unseen
from adv2_jax.runs.run import Outcome, joint_preset_of, presets_of, run
from adv2_jax.runs.schema import INDEX, RESULTS, SHARDS, results_path
from adv2_jax.runs.select import predict
from adv2_jax.runs.store import CURVATURE_FILES, UNFINISHED
from adv2_jax.runs.tables import (
    TABLES,
    after_a_run,
    by_curvature,
    by_detection,
    by_fidelity,
    by_matrix,
    by_model,
    by_network,
    make_table,
)
from adv2_jax.runs.transfer import add, check_network, load_run, transfer_matrix, transfer_to

FINISHED = ("summary.json", RESULTS, f"{SHARDS}/{INDEX}")  # of a run, in either form of results
# few images, and a batch of one shape: most of the demo's time goes to compiling programs
DEMO = shlex.split(
    "--images shapes:8 --limit 3 --batch-size 3 --epsilon 16/255 --preset quick --snapshots 0"
)


def attack(arguments: argparse.Namespace) -> tuple[Subject, Outcome]:
    """Run `adv2 attack`; return what was attacked and what came out."""
    check_out(arguments, *FINISHED, "report.html", unfinished=UNFINISHED)
    subject = subject_of(arguments)
    if arguments.batch_size == AUTO:
        subject = _with_batch_size(subject, arguments)
    model, images, settings, config = subject
    with _running(arguments) as (directory, options):
        options["limit"] = arguments.limit
        outcome = run(model, images, settings, directory, config=config, **options)
    if not arguments.quiet:
        print_sheet(after_a_run(outcome.rows))
        for sentence in words.doubts(outcome.rows):
            print(sentence)
        print(
            f"{outcome.left_out} of {len(images.images)} images left out: "
            "the network gets them wrong"
        )
        if outcome.left_out and images.advice:
            print(images.advice)
        _print_failed(outcome.failed)
        _print_files(directory)
    return subject, outcome


def _with_batch_size(subject: Subject, arguments: argparse.Namespace) -> Subject:
    """Put a number in place of --batch-size auto: what fits, or that of the run that is resumed."""
    if arguments.distributed:
        raise ValueError(
            f"--batch-size {AUTO} with --distributed: hosts may have other memories; say a number"
        )
    model, images, settings, config = subject
    n, *shape = images.images.shape
    path = Path(arguments.out, UNFINISHED)
    if arguments.resume and path.exists():
        with intact(path):
            size = int(json.loads(path.read_text(encoding="utf-8"))["batch_size"])
    else:
        presets = [*presets_of(settings).values(), *joint_preset_of(settings)]
        fits = fitting_batch_size(model, presets, settings.threat, tuple(shape), settings.precision)
        size = fits or BATCH_SIZE["--batch-size"]["default"]
        share = min(n, arguments.limit or n) / number_of_devices(settings.devices)
        size = min(size, math.ceil(share))
    if not arguments.quiet:
        print(f"--batch-size {AUTO}: {size} images at a time on each device")
    return subject._replace(
        settings=settings._replace(batch_size=size), config=config | {"batch_size": size}
    )


def _print_files(directory: Path) -> None:
    if (results := results_path(directory)).is_dir():
        print(f"results: {results}, a folder of shards in place of {RESULTS}")
    print(f"report: {directory / 'report.html'}")


def _print_failed(names: Sequence[object]) -> None:
    if names:
        print(
            f"{len(names)} failed, the network gives numbers that are not finite on them: "
            + listed(list(map(str, names)), ", ")
        )


def table(arguments: argparse.Namespace) -> None:
    """Run `adv2 table`."""
    name, table = arguments.table, TABLES[arguments.table]
    files = ("table.md", "summary.json", *(f"{table.run}/{file}" for file in FINISHED))
    check_out(arguments, *files, unfinished=f"{table.run}/{UNFINISHED}")
    # a table fixes these: its command has no options of theirs
    chosen = {
        "threat": table.threat,
        "target_map": table.target_map,
        "keep": "all",
        "joint": False,
        "goal": "targeted",
        "evade": None,
    }
    model, images, settings, config = subject_of(argparse.Namespace(**vars(arguments), **chosen))
    with _running(arguments) as (directory, options):
        options["limit"] = arguments.limit
        sheet = make_table(name, model, images, settings, directory, config=config, **options)
    if not arguments.quiet:
        print_sheet(sheet)
        print(f"table: {directory / 'table.md'}")
        _print_files(directory / table.run)


def curvature(arguments: argparse.Namespace) -> None:
    """Run `adv2 curvature`."""
    of_run = arguments.run_directory is not None
    # argparse cannot say which options go together: these depend on a positional
    given = [key for key in ("out", *SOURCE) if getattr(arguments, key) is not None]
    if of_run and given:
        raise ValueError(f"--{given[0]} is not for a finished run, whose own images are measured")
    if not of_run and arguments.out is None:
        raise ValueError("without a finished run, --out DIR says where to write")
    files = [*CURVATURE_FILES, *([] if of_run else ["report.html"])]
    check_out(arguments, *files, unfinished=laboratory.UNFINISHED)
    model, images, options, config = measured_of(arguments)
    publish = report.write if of_run else report.write_curvature
    with _running(arguments, "curvature", publish) as (directory, running):
        summary = laboratory.study(
            model,
            images,
            options,
            directory,
            compared=arguments.compare,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            config=config,
            **running,
        )
    if not arguments.quiet:
        print_sheet(by_curvature(summary["rows"]))
        print_sheet(by_fidelity(summary["fidelity"]))
        _print_failed(summary["failed"])
        print(f"report: {directory / 'report.html'}")


def transfer(arguments: argparse.Namespace) -> None:
    """Run `adv2 transfer`."""
    finished, batch_size = load_run(Path(arguments.run_directory)), arguments.batch_size
    arguments = with_network_of_run(arguments, finished)
    model = with_masker(model_of(arguments), arguments)
    name, rule = arguments.to_model, "--to-model and --to-weights go together"
    other = network_of(name, arguments.to_weights, rule, normalisation(arguments))
    check_network(finished, model)
    results: dict[str, Any] = {"transfer": transfer_matrix(finished, model, batch_size=batch_size)}
    sheets = [by_matrix(TABLES["transfer"].title, results["transfer"])]
    if other is not None:
        # the other network may lack what some interpreters need, such as a masker
        able = [key for key, one in finished.interpreters.items() if missing(other, one) is None]
        results["models"] = transfer_to(
            finished, other, name, interpreters=able, batch_size=batch_size
        )
        sheets.append(by_model(f"The same images shown to {name}", results["models"]))
    add(finished, publish=report.write, **results)
    if not arguments.quiet:
        for sheet in sheets:
            print_sheet(sheet)
        print(f"report: {finished.directory / 'report.html'}")


def compare(arguments: argparse.Namespace) -> None:
    """Run `adv2 compare`."""
    check_out(arguments, "table.md", "summary.json", "report.html")
    summary = comparison.compare([Path(one) for one in arguments.run_directories])
    both = summary["networks"], summary["rows"]
    config = {"command": arguments.command, "runs": arguments.run_directories}
    with output_directory(arguments.out) as directory:
        with atomic(directory / "table.md", "w") as file:
            file.write(by_network(*both).markdown())
        write_summary(directory, {"config": config, "environment": environment(), **summary})
        report.write_comparison(directory)
    if not arguments.quiet:
        print_sheet(by_network(*both, spread=False))
        print(f"report: {directory / 'report.html'}")


def detect(arguments: argparse.Namespace) -> None:
    """Run `adv2 detect`."""
    runs = [load_run(Path(directory)) for directory in arguments.run_directory]
    arguments = with_network_of_run(arguments, runs[0])
    network = model_of(arguments)
    model = with_masker(network, arguments)
    teacher = None if arguments.teacher is None else load_run(Path(arguments.teacher))
    for finished in (*runs, *([] if teacher is None else [teacher])):
        check_network(finished, model)
    kinds = {name: DETECTORS[name] for name in arguments.detector if name in DETECTORS}
    files = {name: runs[0].directory / f"{name}.npz" for name in kinds}
    for file in files.values():
        if file.exists() and not arguments.overwrite:
            raise ValueError(f"{file} is there already: judge it, or replace it by --overwrite")
    found = {name: detectors.load(name) for name in arguments.detector if name not in kinds}
    if kinds:
        if arguments.benign is None:
            raise ValueError(f"{', '.join(kinds)}: fitted on benign images, give --benign SOURCE")
        everyone = [*runs, *([] if teacher is None else [teacher])]
        benign = benign_of(arguments, network, runs[0])
        benign = unseen(model, benign, everyone, batch_size=arguments.batch_size)
    for name, make in kinds.items():
        looks = arguments.interpreter and "interpreters" in inspect.signature(make).parameters
        found[name] = fit_detector(
            model,
            make(interpreters=tuple(arguments.interpreter)) if looks else make(),
            benign,
            teacher=teacher,
            attacks=arguments.teacher_attack,
            batch_size=arguments.batch_size,
        )
    options = {"batch_size": arguments.batch_size, "seed": arguments.seed}
    rows = [
        row
        for detector, record in found.values()
        for finished in runs
        for row in judge(model, detector, record, finished, **options)
    ]
    with restored(*files.values()):
        for name, file in files.items():
            detectors.save(file, *found[name])
        add(runs[0], publish=report.write, detection=rows)
    if not arguments.quiet:
        print_sheet(by_detection(rows))
        for file in files.values():
            print(f"detector: {file}")
        print(f"report: {runs[0].directory / 'report.html'}")


def convert(arguments: argparse.Namespace) -> None:
    """Run `adv2 convert`."""
    if os.path.exists(arguments.out) and not arguments.overwrite:
        raise ValueError(
            f"{arguments.out} is there already: --overwrite replaces it, another --out keeps it"
        )
    lines = models.convert_file(
        arguments.file, arguments.model, arguments.out, key=arguments.weights_key
    )
    print(*lines, sep="\n")


def demo(arguments: argparse.Namespace) -> None:
    """Run `adv2 demo`: an attack of fixed settings, a picture, what it shows in words."""
    # joined by =, so that a folder whose name begins with a dash is no option
    line = ["attack", *DEMO, f"--out={arguments.out}"]
    # what the demo is told are options of the attack, too: they take the place of its defaults
    options = vars(parser().parse_args(line)) | vars(arguments)
    # a second `adv2 demo` replaces its own folder without being told; any other folder is safe
    options["overwrite"] |= _is_demo(arguments.out)
    del options["run"]
    asked = argparse.Namespace(**options)
    _show_demo(asked, *attack(asked))


def _show_demo(asked: argparse.Namespace, subject: Subject, outcome: Outcome) -> None:
    """Draw the picture of a demo, and print what it shows in words."""
    picture = Path(asked.out) / "picture.png"

    def confidences(images: NDArray[np.uint8]) -> NDArray[np.floating]:
        return probabilities(predict(subject.model, images, asked.batch_size))

    # Pillow is optional; the demo's words need no picture
    if find_spec("PIL") is None:
        print(f"{picture} needs Pillow: pip install 'adv2_jax[images]'")
    else:
        with atomic(picture) as file:
            file.write(report.gallery(asked.out, confidences))
        print(f"picture: {picture}")
    print(words.verdict(outcome.rows, epsilon=asked.epsilon))


def _is_demo(directory: str) -> bool:
    """Return whether a directory holds a demo, which may be replaced."""
    try:
        config = read_summary(Path(directory)).get("config", {})
    except ValueError:
        return False
    return str(config.get("command")).startswith("adv2 demo")


@contextlib.contextmanager
def _running(
    arguments: argparse.Namespace,
    title: str = "attack",
    publish: Callable[[Path], object] = report.write,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Open the directory of a run; yield it with the options that every run takes."""
    directory, bars = output_directory(_folder(arguments)), progress_bars(arguments.quiet)
    # the directory is left last: after an error it is removed again if it is empty
    with directory as path, bars as start:
        options = {
            "resume": arguments.resume,
            "progress": lambda images, steps, done: start(title, steps, done=done, images=images),
            "publish": publish,
        }
        yield path, options


def _folder(arguments: argparse.Namespace) -> str:
    """Return the folder that is written to: of --out, or of a finished run that is added to."""
    return str(arguments.out or arguments.run_directory)


def check_out(arguments: argparse.Namespace, *names: str, unfinished: str | None = None) -> None:
    """Refuse, before any work, to write over the files of a finished run."""
    folder = _folder(arguments)
    # of these names only: a folder may hold other files of the user's
    there = [name for name in names if os.path.exists(os.path.join(folder, name))]
    # an unfinished run has rules of its own, and messages of its own, where it is continued
    goes_on = unfinished is not None and (
        arguments.resume or os.path.exists(os.path.join(folder, unfinished))
    )
    if there and not goes_on and not arguments.overwrite:
        raise ValueError(
            f"{folder} holds a finished run ({', '.join(there)}): --overwrite replaces it"
            + (", another --out keeps it" if arguments.out else "")
        )
