"""Assemble the subject of a run: network, images, interpreters, threat model and preset."""

import argparse
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adv2_jax import data, detectors, models, presets, threats
from adv2_jax.attacks import check_interpreter, missing
from adv2_jax.cli.arguments import EMBEDDED, HOSTS, NETWORK
from adv2_jax.data.class_files import ClassList
from adv2_jax.interpreters import INTERPRETERS, PAPER, Interpreter, rts_interpreter
from adv2_jax.presets import PRESETS
from adv2_jax.runs import curvature
from adv2_jax.runs.run import Settings, interpreter_of
from adv2_jax.runs.transfer import Run, check_network, load_run
from adv2_jax.types import Classifier

log = logging.getLogger(__name__)

SOURCE = ("images", "size", "labels", "classes", "sample")  # options of a source of images


class Subject(NamedTuple):
    """What is attacked, and how.

    Attributes:
        model: the network, with its masker if it has one.
        images: the images of the source.
        settings: of the run.
        config: every option of the command line by name, for the summary; options that were not
            given hold the values that were used in their place.
    """

    model: Classifier
    images: data.ImageSet
    settings: Settings
    config: dict[str, Any]


def subject_of(arguments: argparse.Namespace) -> Subject:
    """Assemble what the arguments ask to be attacked.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
    """
    threat, threat_options = _threat(arguments)
    preset, numbers = arguments.preset, {}
    if preset not in PRESETS:  # before the network, which takes a second to load
        preset = presets.read(preset)
        # a run is known by its numbers: it is not resumed after its preset file has changed
        numbers["numbers"] = {name: presets.to_dict(known) for name, known in preset.items()}
    network = model_of(arguments)
    model = with_masker(network, arguments)
    names = _interpreters(arguments.interpreter, model)
    images = _images(arguments.images, arguments, network)
    if arguments.evade is not None:
        model = _guarded(model, arguments.evade, images.images.shape[1:])
    config = config_of(arguments) | threat_options | {"interpreter": names} | numbers
    settings = Settings(
        interpreters=[_interpreter(name, arguments) for name in names],
        threat=threat,
        preset=preset,
        warm_steps=arguments.warm_steps,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        target_map=arguments.target_map,
        snapshots=arguments.snapshots,
        precision=arguments.precision,
        devices=arguments.devices,
        keep=arguments.keep,
        joint=arguments.joint,
        goal=arguments.goal,
        restarts=arguments.restarts,
        results=arguments.results,
    )
    return Subject(model, images, settings, config)


class Measured(NamedTuple):
    """What is measured: network, images, options; and all options of the command line by name."""

    model: Classifier
    images: curvature.Study
    options: curvature.Options
    config: dict[str, Any]


def measured_of(arguments: argparse.Namespace) -> Measured:
    """Assemble the network and the images whose curvature is asked for.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
    """
    run = None
    if arguments.run_directory is not None:
        run = load_run(Path(arguments.run_directory))
        arguments = with_network_of_run(arguments, run)
    network = model_of(arguments)
    model = with_masker(network, arguments)
    config = config_of(arguments)
    chosen: dict[str, Any] = {"label": arguments.label, "limit": arguments.limit}
    if run is None:
        name = arguments.interpreter or "grad"
        interpreter = interpreter_of(name)
        # the default is set here, not by the parser: whether --images was given tells a source from
        # a run
        config["images"] = arguments.images or "shapes"
        chosen |= {"batch_size": arguments.batch_size, "seed": arguments.seed}
        source = _images(config["images"], arguments, network)
        images = curvature.of_source(model, source, **chosen)
        if isinstance(interpreter, str):
            interpreter = INTERPRETERS[interpreter]()
    else:
        check_network(run, model)
        name = curvature.interpreter_of_run(run, arguments.interpreter)
        interpreter = run.interpreters[name]
        images = curvature.of_run(run, name, **chosen)
    options = curvature.Options(
        interpreter=interpreter,
        score=curvature.SCORES[arguments.score],
        **{key: getattr(arguments, key) for key in ("tau", "depth", "probes")},
    )
    return Measured(model, images, options, config | {"interpreter": name})


def with_network_of_run(arguments: argparse.Namespace, run: Run) -> argparse.Namespace:
    """Return the options with the network that a finished run was made with, unless one is named."""
    if arguments.model is not None or arguments.weights is not None:
        return arguments
    made = run.summary.get("config", {})
    keys = [flag[2:].replace("-", "_") for flag in NETWORK]
    filled = {key: getattr(arguments, key) or made.get(key) for key in keys}
    # a run in Python has no such options: its network is named, or the embedded one
    if filled["model"] == EMBEDDED:
        filled["model"] = None
    return argparse.Namespace(**vars(arguments) | filled)


def _guarded(model: Classifier, paths: Sequence[str], shape: tuple[int, ...]) -> Classifier:
    """Return the network with the detectors of some files, which an attack on it evades."""
    found = []
    for path in paths:
        detector, record = detectors.load(path)
        detectors.check(detector, record, model, shape)
        for name in detector.kind.interpreters:
            check_interpreter(model, shape, INTERPRETERS[name](), attacked=True)
        found.append(detector)
    return detectors.Guarded(model, detectors.Ensemble(tuple(found)))


def benign_of(arguments: argparse.Namespace, network: Classifier, run: Run) -> data.ImageSet:
    """Return the images of --benign, in the size and with the classes of a run's."""
    made = run.summary.get("config", {})
    filled = {key: getattr(arguments, key) or made.get(key) for key in ("size", "classes")}
    return _images(arguments.benign, argparse.Namespace(**vars(arguments) | filled), network)


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return every option by name, for the summary; results do not depend on the hosts."""
    options = {name: value for name, value in vars(arguments).items() if f"--{name}" not in HOSTS}
    return options | {"model": name_of(arguments) or EMBEDDED}


def name_of(arguments: argparse.Namespace) -> str | None:
    """Return the name of the network: that of --model, or of a file of weights that says it."""
    if arguments.model is not None or arguments.weights is None:
        return arguments.model
    return models.saved_options(arguments.weights).get("name")


def model_of(arguments: argparse.Namespace) -> Classifier:
    """Return the network of --model and --weights, the embedded one without both."""
    options = weights_options(arguments)
    name = name_of(arguments)
    if options and (name is None or models.user.is_reference(name)):
        option = "weights-key" if "key" in options else min(options)
        raise ValueError(
            f"--{option} is for the networks that come with adv2: {', '.join(models.MODELS)}"
        )
    rule = "--model and --weights go together; without both, the embedded network is used"
    model = network_of(name, arguments.weights, rule, options)
    return models.embedded() if model is None else model


def network_of(
    name: str | None, weights: str | None, rule: str, options: dict[str, Any]
) -> Classifier | None:
    """Return the network of a name and its weights, None without both.

    Args:
        name: key of `models.MODELS`, or `path/to/file.py:name`, which may do without weights.
        weights: path of the file.
        rule: the error message where only one of the two is given.
        options: of `models.load`.
    """
    if name is None and weights is None:
        return None
    if name is not None and models.user.is_reference(name):
        return models.user.load(name, weights)
    if name is not None:
        models.check_name(name)
    if name is None or weights is None:
        raise ValueError(rule)
    return models.load(name, weights, **options)


def with_masker(model: Classifier, arguments: argparse.Namespace) -> Classifier:
    """Return the network with its masker, if it has one: that of --masker, or the embedded one."""
    file = arguments.masker
    # the embedded masker was trained with the embedded network, and fits no other
    if file is None and name_of(arguments) is not None:
        return model
    masker = models.embedded_masker() if file is None else models.load_masker(file)
    return models.ClassifierWithMasker(model, masker)


def _interpreters(chosen: list[str] | None, model: Classifier) -> list[str]:
    """Return the names, each once; unless chosen, those of the paper whose needs the model meets."""
    lacking = {name: missing(model, make()) for name, make in INTERPRETERS.items()}
    if chosen is None:
        return [name for name in PAPER if lacking[name] is None]
    for name in chosen:
        if lacking.get(name) == "masker":
            raise ValueError(
                f"--interpreter {name} needs --masker FILE, the network's own masker; "
                "adv2 train rts makes one"
            )
    # each once: results of a second one of that name would take the place of the first
    return list(dict.fromkeys(chosen))


def _interpreter(name: str, arguments: argparse.Namespace) -> str | Interpreter:
    """Return an interpreter; one that the command line has no options for stays a name.

    A preset knows the options of the interpreters that it names.
    """
    if name == "rts":
        return rts_interpreter(
            encoder_loss=arguments.encoder_loss, encoder_weight=arguments.encoder_weight
        )
    return interpreter_of(name)


def _threat(arguments: argparse.Namespace) -> tuple[threats.Threat, dict[str, Any]]:
    """Return the threat model and its options, defaults included."""
    factory = threats.THREATS[arguments.threat]
    options = {
        # from the signature: the summary holds what was used, and no default is written twice
        key: parameter.default
        for key, parameter in inspect.signature(factory).parameters.items()
    }
    for flag, key in (("--epsilon", "epsilon"), ("--flow-penalty", "penalty")):
        value = getattr(arguments, key)
        # refused, not ignored: the user would believe that it held
        if value is not None and key not in options:
            raise ValueError(f"{flag} is not for --threat {arguments.threat}")
        if value is not None:
            options[key] = value
    return factory(**options), options


def _images(source: str, arguments: argparse.Namespace, network: Classifier) -> data.ImageSet:
    """Return the images of a source, in the size and with the classes of the network."""
    asked = argparse.Namespace(**vars(arguments) | {"images": source})
    options = source_options(asked, getattr(network, "image_size", None))
    weights = arguments.weights
    said = {} if weights is None else models.saved_options(weights)
    if options["classes"] is None and "classes" in said:
        options["classes"] = ClassList(str(weights), said["classes"])
    images = data.load(source, **options)
    side, size = said.get("image_size"), images.images.shape[1:3]
    if side is not None and max(size) != side:
        log.warning(
            "the network was trained at %d x %d pixels, the images of %s have %d x %d: "
            "--size %d makes them alike",
            *(side, side, source, *size, side),
        )
    return images


def source_options(arguments: argparse.Namespace, image_size: int | None) -> dict[str, Any]:
    """Return the options of `data.load`; images of varying sizes are cropped to the network's."""
    # a file's own size is its author's choice; photographs have no common one
    cropped = arguments.size is None and data.sizes_vary(arguments.images)
    names = ("labels", "classes", "sample", "seed")
    return {
        "size": image_size if cropped else arguments.size,
        **{name: getattr(arguments, name) for name in names},
    }


def normalisation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return mean and std of the input, as far as they are given."""
    return {
        key: tuple(getattr(arguments, key)) for key in ("mean", "std") if getattr(arguments, key)
    }


def weights_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `models.load` for --weights."""
    key = arguments.weights_key
    return normalisation(arguments) | ({} if key is None else {"key": key})
