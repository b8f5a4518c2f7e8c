"""`adv2 train`: assemble, train with a bar and checkpoints, measure, print."""

import argparse
import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx

from adv2_jax import models, report
from adv2_jax.capabilities import num_classes
from adv2_jax.cli.arguments import EMBEDDED
from adv2_jax.cli.commands import check_out, config_of
from adv2_jax.cli.console import progress_bars
from adv2_jax.cli.subject import model_of, normalisation, source_options, weights_options
from adv2_jax.data.splits import PLAIN, TrainingSets, training_sets
from adv2_jax.descent import OnStep
from adv2_jax.files import output_directory, write_summary
from adv2_jax.identity import environment
from adv2_jax.runs import faithfulness
from adv2_jax.training.classifier import ClassifierRecipe, accuracy, train_classifier
from adv2_jax.training.loop import Checkpointing, Losses, Recipe
from adv2_jax.training.masker import MaskerRecipe, train_masker
from adv2_jax.types import Classifier

CHECKPOINTS = "checkpoints"  # of a training, in its --out
T = TypeVar("T")


def classifier(arguments: argparse.Namespace, command: str) -> None:
    """Run `adv2 train classifier`."""
    check_out(arguments, "weights.npz", "summary.json", "report.html", unfinished=CHECKPOINTS)
    sets = _training_sets(arguments, models.image_size(arguments.model), plain=PLAIN)
    start, images, labels = _start(arguments, sets), sets.held_out.images, sets.held_out.labels
    assert labels is not None
    before = accuracy(start, images, labels) if arguments.weights else None

    def finish(model: models.Network, directory: Path) -> dict[str, Any]:
        after = accuracy(model, images, labels)
        models.convert.save(model, directory / "weights.npz")
        print(
            f"held-out accuracy {after:.4f} on {len(images)} images; weights: {directory / 'weights.npz'}"
        )
        return {"classes": sets.classes, "accuracy": after, "accuracy_before": before}

    _training(
        arguments,
        config_of(arguments, command),
        sets,
        partial(train_classifier, start),
        ClassifierRecipe,
        finish,
    )


def rts(arguments: argparse.Namespace, command: str) -> None:
    """Run `adv2 train rts`."""
    check_out(arguments, "masker.npz", "summary.json", "report.html", unfinished=CHECKPOINTS)
    network = model_of(arguments)
    name, encoder = _encoder(arguments, network)
    start = models.Masker(encoder, rngs=nnx.Rngs(arguments.seed))
    sets = _training_sets(arguments, getattr(network, "image_size", None))
    shown = faithfulness.to_explain(network, sets.held_out)  # before the work: there may be none

    def finish(masker: models.Masker, directory: Path) -> dict[str, Any]:
        models.save_masker(masker, name, directory / "masker.npz")
        found = faithfulness.qualities(models.ClassifierWithMasker(network, masker), shown)
        own = found["rts"]
        print(
            f"{own.n} held-out images: confidence kept {own.confidence_kept:.3f}, removed to {own.confidence_removed:.3f}"
        )
        print(f"masker: {directory / 'masker.npz'}")
        return {"quality": [{"interpreter": key} | value._asdict() for key, value in found.items()]}

    config = config_of(arguments, command) | {"model": arguments.model or EMBEDDED}
    _training(arguments, config, sets, partial(train_masker, start, network), MaskerRecipe, finish)


def _encoder(arguments: argparse.Namespace, classifier: Classifier) -> tuple[str, models.Encoder]:
    """What the masker sees through, and its name: a network of its own, or the one to be explained."""
    name, weights = arguments.encoder, arguments.encoder_weights
    if (name is None) != (weights is None):
        raise ValueError(
            "--encoder and --encoder-weights go together; without both, the network itself is the encoder"
        )
    if name is not None:
        return name, models.check_encoder(models.load(name, weights, **normalisation(arguments)))
    if arguments.model is not None and models.user.is_reference(arguments.model):
        raise ValueError(
            f"--model {arguments.model} needs --encoder and --encoder-weights: a ResNet of adv2 with the same classes"
        )
    return arguments.model or models.EMBEDDED, models.check_encoder(classifier)


def _training_sets(
    arguments: argparse.Namespace, image_size: int | None, plain: float = 0.0
) -> TrainingSets:
    options = source_options(arguments, image_size)
    return training_sets(arguments.images, held_out=arguments.held_out, plain=plain, **options)


def _training(
    arguments: argparse.Namespace,
    config: dict[str, Any],
    sets: TrainingSets,
    run: Callable[..., tuple[T, Losses]],
    kind: type[Recipe],
    finish: Callable[[T, Path], dict[str, Any]],
) -> None:
    """Train with a bar and checkpoints, then write what `finish` saves, measures and prints, summary and report."""
    recipe = {
        field.name: getattr(arguments, field.name)
        for field in fields(kind)
        if hasattr(arguments, field.name)
    }
    with (
        output_directory(arguments.out) as directory,
        _kept(directory / CHECKPOINTS) as checkpoints,
    ):
        with progress_bars() as start:
            bar = start(
                "train", arguments.epochs * (len(sets.train.images) // arguments.batch_size)
            )
            checkpointing = Checkpointing(
                checkpoints, arguments.checkpoint_every, arguments.resume, _advance(bar)
            )
            trained, losses = run(
                sets.train.images, sets.train.labels, checkpointing=checkpointing, **recipe
            )
        counts = {"train": len(sets.train.images), "held_out": len(sets.held_out.images)}
        summary = {
            "config": config,
            "environment": environment(),
            "counts": counts,
            **finish(trained, directory),
        }
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
        return models.build(
            arguments.model,
            seed=arguments.seed,
            num_classes=sets.num_classes,
            **normalisation(arguments),
        )
    model = models.load(arguments.model, arguments.weights, **weights_options(arguments))
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
            raise KeyboardInterrupt(
                "; the last checkpoint is kept, --resume goes on from it"
            ) from None
        raise
