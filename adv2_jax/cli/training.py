"""`adv2 train`: assemble, train with a progress bar and checkpoints, measure, print."""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx

from adv2_jax import models, report
from adv2_jax.capabilities import num_classes
from adv2_jax.cli.commands import check_out
from adv2_jax.cli.console import progress_bars
from adv2_jax.cli.subject import (
    config_of,
    model_of,
    name_of,
    network_of,
    normalisation,
    source_options,
    weights_options,
)
from adv2_jax.data.splits import PLAIN, TrainingSets, training_sets
from adv2_jax.descent import OnStep
from adv2_jax.files import output_directory, write_summary
from adv2_jax.identity import environment
from adv2_jax.runs import faithfulness
from adv2_jax.training.classifier import ClassifierRecipe, accuracy, train_classifier
from adv2_jax.training.loop import Checkpointing, Losses, Recipe
from adv2_jax.training.masker import MaskerRecipe, train_masker
from adv2_jax.training.robust import EVALUATED, robust_accuracy
from adv2_jax.types import Classifier

CHECKPOINTS = "checkpoints"  # folder of a training in its --out
T = TypeVar("T")


def classifier(arguments: argparse.Namespace) -> None:
    """Run `adv2 train classifier`."""
    check_out(arguments, "weights.npz", "summary.json", "report.html", unfinished=CHECKPOINTS)
    sets = _training_sets(arguments, models.image_size(arguments.model), plain=PLAIN)
    start, images, labels = _start(arguments, sets), sets.held_out.images, sets.held_out.labels
    assert labels is not None

    def measured(model: models.Network) -> dict[str, float]:
        values = {"accuracy": accuracy(model, images, labels)}
        if arguments.robust is not None:
            values["robust_accuracy"] = robust_accuracy(model, images, labels, arguments.epsilon)
        return values

    # of a network that starts at random it would be chance
    before = measured(start) if arguments.weights else {}

    def finish(model: models.Network, directory: Path) -> dict[str, Any]:
        after, weights = measured(model), directory / "weights.npz"
        models.save(model, arguments.model, weights, classes=sets.classes)
        print(f"held-out accuracy {after['accuracy']:.4f} on {len(images)} images")
        if arguments.robust is not None:
            words = f"under PGD at epsilon {arguments.epsilon:.4g}: {after['robust_accuracy']:.4f}"
            print(f"{words} on {min(len(images), EVALUATED)} images")
        print(f"weights: {weights}")
        earlier = {f"{name}_before": before.get(name) for name in after}
        return {"classes": sets.classes} | after | earlier

    _train(arguments, sets, partial(train_classifier, start), ClassifierRecipe, finish)


def rts(arguments: argparse.Namespace) -> None:
    """Run `adv2 train rts`."""
    check_out(arguments, "masker.npz", "summary.json", "report.html", unfinished=CHECKPOINTS)
    network = model_of(arguments)
    name, start = _first_masker(arguments, network)
    sets = _training_sets(arguments, getattr(network, "image_size", None))
    # before the work: there may be none that the network gets right
    shown = faithfulness.to_explain(network, sets.held_out)

    def finish(masker: models.Masker, directory: Path) -> dict[str, Any]:
        path = directory / "masker.npz"
        models.save_masker(masker, name, path)
        qualities = faithfulness.qualities(models.ClassifierWithMasker(network, masker), shown)
        quality = qualities["rts"]
        print(
            f"{quality.n} held-out images: confidence kept {quality.confidence_kept:.3f}, "
            f"removed to {quality.confidence_removed:.3f}"
        )
        print(f"masker: {path}")
        return {
            "quality": [{"interpreter": key} | value._asdict() for key, value in qualities.items()]
        }

    _train(arguments, sets, partial(train_masker, start, network), MaskerRecipe, finish)


def _first_masker(arguments: argparse.Namespace, network: Classifier) -> tuple[str, models.Masker]:
    """Return the masker that training starts from, and the name of its encoder."""
    if arguments.masker is None:
        name, encoder = _encoder(arguments, network)
        return name, models.Masker(encoder, rngs=nnx.Rngs(arguments.seed))
    if arguments.encoder is not None or arguments.encoder_weights is not None:
        raise ValueError("--masker brings its encoder; --encoder is for a new one")
    start = models.load_masker(arguments.masker)
    return str(models.saved_options(arguments.masker)["name"]), start


def _encoder(arguments: argparse.Namespace, network: Classifier) -> tuple[str, models.Encoder]:
    """Return the network that the masker starts from, and its name: --encoder, or --model."""
    if arguments.encoder is not None:
        models.check_name(arguments.encoder)  # a masker's file names its encoder
    rule = (
        "--encoder and --encoder-weights go together; "
        "without both, the network itself is the encoder"
    )
    options = normalisation(arguments)
    encoder = network_of(arguments.encoder, arguments.encoder_weights, rule, options)
    if encoder is not None:
        return arguments.encoder, models.check_encoder(encoder)
    if arguments.model is not None and models.user.is_reference(arguments.model):
        raise ValueError(
            f"--model {arguments.model} needs --encoder and --encoder-weights: "
            "a ResNet of adv2 with the same classes"
        )
    return name_of(arguments) or models.EMBEDDED, models.check_encoder(network)


def _start(arguments: argparse.Namespace, sets: TrainingSets) -> models.Network:
    """Return the network that training starts from: of --weights, or freshly initialised."""
    name, seed = arguments.model, arguments.seed
    side = max(sets.train.images.shape[1:3])  # what it is trained at, whatever it was made for
    if arguments.weights is None:
        if arguments.weights_key is not None:
            raise ValueError("--weights-key goes with --weights")
        return models.build(
            name,
            seed=seed,
            num_classes=sets.num_classes,
            image_size=side,
            **normalisation(arguments),
        )
    model = models.load(name, arguments.weights, image_size=side, **weights_options(arguments))
    if num_classes(model, sets.train.images.shape[1:]) == sets.num_classes:
        return model
    return models.with_new_head(model, sets.num_classes, seed=seed)


def _training_sets(
    arguments: argparse.Namespace, image_size: int | None, plain: float = 0.0
) -> TrainingSets:
    options = source_options(arguments, image_size)
    return training_sets(arguments.images, held_out=arguments.held_out, plain=plain, **options)


def _train(
    arguments: argparse.Namespace,
    sets: TrainingSets,
    train: Callable[..., tuple[T, Losses]],
    recipe: type[Recipe],
    finish: Callable[[T, Path], dict[str, Any]],
) -> None:
    """Train with a progress bar and checkpoints, then write results, summary and report.

    Args:
        arguments: of the command.
        sets: images to train on, and those held out.
        train: (images, labels, *, checkpointing, devices, **options of the recipe) -> what is
            trained, and the loss of every step.
        recipe: its type; its options are those of the command line.
        finish: (what is trained, directory) -> entries of the summary; saves, measures and prints.

    Raises:
        KeyboardInterrupt: says whether a checkpoint is kept.
    """
    # options of the command line have the names of the recipe's fields: nothing is listed twice
    names = {field.name for field in fields(recipe)}
    options = {name: value for name, value in vars(arguments).items() if name in names}
    images, labels = sets.train.images, sets.train.labels
    with output_directory(arguments.out) as directory:
        checkpoints = directory / CHECKPOINTS
        try:
            with progress_bars() as start:
                on_loss = _advance(start("train", recipe(**options).steps(len(images))))
                checkpointing = Checkpointing(
                    checkpoints, arguments.checkpoint_every, arguments.resume, on_loss
                )
                options["devices"] = arguments.devices
                trained, losses = train(images, labels, checkpointing=checkpointing, **options)
            summary = {
                "config": config_of(arguments),
                "environment": environment(),
                "counts": {"train": len(images), "held_out": len(sets.held_out.images)},
                **finish(trained, directory),
                # JSON has no float32
                "losses": [float(loss) for loss in losses],
            }
            write_summary(directory, summary)
            page = report.write_training(directory)
            shutil.rmtree(checkpoints)  # last: what fails before can be resumed
        except KeyboardInterrupt:
            # the first Ctrl-C may come before the first checkpoint
            hint = "; the last checkpoint is kept, --resume goes on from it"
            raise KeyboardInterrupt(hint if checkpoints.exists() else "") from None
    print(f"report: {page}")


def _advance(bar: OnStep) -> Callable[[int, float], None]:
    """Return a callback for the number of steps done; a bar wants how many are new."""
    seen = 0

    def on_step(step: int, loss: float) -> None:
        nonlocal seen
        # a resumed training begins in the middle
        bar(step - seen)
        seen = step

    return on_step
