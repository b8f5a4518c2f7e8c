"""What the command line asks to be attacked, and how: network, images, interpreters, threat, preset."""

import argparse
import inspect
from typing import Any, NamedTuple

from adv2_jax import data, models, presets, threats
from adv2_jax.attacks import missing
from adv2_jax.interpreters import INTERPRETERS, Interpreter, rts_interpreter
from adv2_jax.presets import PRESETS, Preset
from adv2_jax.runs.run import Settings, interpreter_of
from adv2_jax.types import Classifier


class Subject(NamedTuple):
    """What the command line asks to be attacked, and how."""

    model: Classifier
    images: data.ImageSet
    settings: Settings


def subject_of(arguments: argparse.Namespace) -> Subject:
    """Assemble what the arguments ask to be attacked. Defaults that depend on others are written into them."""
    threat = _threat(arguments)
    model, masker = model_of(arguments), masker_of(arguments)
    subject = model if masker is None else models.ClassifierWithMasker(model, masker)
    arguments.interpreter = _interpreters(arguments.interpreter, subject)
    images = data.load(
        arguments.images, **source_options(arguments, getattr(model, "image_size", None))
    )
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


def model_of(arguments: argparse.Namespace) -> Classifier:
    """Return the network that the arguments name."""
    name, weights, options = arguments.model, arguments.weights, weights_options(arguments)
    if options and (name is None or models.user.is_reference(name)):
        option = "weights-key" if "key" in options else min(options)
        raise ValueError(
            f"--{option} is for the networks that come with adv2: {', '.join(models.MODELS)}"
        )
    if name is None and weights is None:
        return models.embedded()
    if name is not None and models.user.is_reference(name):
        return models.user.load(name, weights)
    if name is not None:
        models.check_name(name)
    if name is None or weights is None:
        raise ValueError(
            "--model and --weights go together; without both, the embedded network is used"
        )
    return models.load(name, weights, **options)


def other_model(arguments: argparse.Namespace) -> Classifier | None:
    """Return the network that images are shown to, None if there is none."""
    name, weights = arguments.to_model, arguments.to_weights
    if name is None and weights is None:
        return None
    if name is not None and models.user.is_reference(name):
        return models.user.load(name, weights)
    if name is None or weights is None:
        raise ValueError("--to-model and --to-weights go together")
    return models.load(name, weights, **normalisation(arguments))


def masker_of(arguments: argparse.Namespace) -> models.Masker | None:
    """Return its masker, None without one."""
    if arguments.masker is not None:
        return models.load_masker(arguments.masker)
    return (
        models.embedded_masker() if arguments.model is None and arguments.weights is None else None
    )


def _interpreters(chosen: list[str] | None, model: Classifier) -> list[str]:
    """Names, each once; unless chosen, all that can be used."""
    if chosen is None:
        return [name for name, make in INTERPRETERS.items() if missing(model, make()) is None]
    if "rts" in chosen and missing(model, INTERPRETERS["rts"]()):
        raise ValueError(
            "--interpreter rts needs --masker FILE, the network's own masker; adv2 train rts makes one"
        )
    return list(dict.fromkeys(chosen))


def _with_options(name: str, arguments: argparse.Namespace) -> str | Interpreter:
    """An interpreter with the options of the command line, or the name of one that has none: the preset knows its own."""
    if name == "rts":
        return rts_interpreter(
            encoder_loss=arguments.encoder_loss, encoder_weight=arguments.encoder_weight
        )
    return interpreter_of(name)


def _threat(arguments: argparse.Namespace) -> threats.Threat:
    """The threat model. Options of it that were not given take their defaults, so that the summary tells them."""
    factory = threats.THREATS[arguments.threat]
    options = {
        key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()
    }
    for word, key in (("--epsilon", "epsilon"), ("--flow-penalty", "penalty")):
        if getattr(arguments, key) is None:
            setattr(arguments, key, options.get(key))
        elif key not in options:
            raise ValueError(f"{word} is not for --threat {arguments.threat}")
    return factory(**{key: getattr(arguments, key) for key in options})


def _preset(arguments: argparse.Namespace) -> str | dict[str, Preset]:
    """A preset's name, or the presets of a file, whose numbers become a part of what was asked for."""
    if arguments.preset in PRESETS:
        return str(arguments.preset)
    known = presets.read(arguments.preset)
    arguments.numbers = {name: presets.to_dict(preset) for name, preset in known.items()}
    return known


def source_options(arguments: argparse.Namespace, image_size: int | None) -> dict[str, Any]:
    """Return the options of `data.load`; sources of any size are brought to that of the network."""
    options = {
        key: getattr(arguments, key) for key in ("size", "labels", "classes", "sample", "seed")
    }
    if options["size"] is None and data.sizes_vary(arguments.images):
        options["size"] = image_size
    return options


def normalisation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the colours that the arguments normalise by."""
    return {
        key: tuple(getattr(arguments, key)) for key in ("mean", "std") if getattr(arguments, key)
    }


def weights_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """How the file of weights is read."""
    key = {} if arguments.weights_key is None else {"key": arguments.weights_key}
    return normalisation(arguments) | key
