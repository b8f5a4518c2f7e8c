"""The command line: arguments, then the command, then one line and an exit code for whatever goes wrong."""

import io
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

from adv2_jax import __version__
from adv2_jax.cli import arguments, commands, training
from adv2_jax.cli.arguments import Parser
from adv2_jax.cli.console import check_devices, one_line, warnings_on_stderr


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
        parsed = parser().parse_args(words)
        with warnings_on_stderr(getattr(parsed, "quiet", False)):
            check_devices()
            parsed.run(parsed, shlex.join(["adv2", *words]))
    except (ValueError, OSError) as error:
        print(f"adv2: {one_line(str(error))}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(
            f"adv2: out of memory: {one_line(str(error)) or 'what was asked for is too large'}",
            file=sys.stderr,
        )
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            "adv2: out of memory; a smaller --batch-size or fewer --steps needs less",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"adv2: interrupted{interrupt}", file=sys.stderr)
        return 130
    return 0


COMMANDS: dict[str, tuple[str, Callable[[Parser], None], Callable[[Any, str], object]]] = {
    "demo": (
        "attack three embedded images under every interpreter, in about a minute",
        arguments.demo,
        commands.demo,
    ),
    "attack": ("attack your images and your network", arguments.attack, commands.attack),
    "table": (
        "a table of the paper, on the embedded images or on yours",
        arguments.table,
        commands.table,
    ),
    "transfer": (
        "show the images of a finished run to other interpreters, and to another network",
        arguments.transfer,
        commands.transfer,
    ),
    "train classifier": ("train a classifier", arguments.train_classifier, training.classifier),
    "train rts": ("train the masker of RTS, by eq. 8", arguments.train_rts, training.rts),
    "convert": (
        "rewrite torchvision or timm weights in the project's form",
        arguments.convert,
        commands.convert,
    ),
}


def parser() -> Parser:
    """Return the parser of the command line, which hands parsed arguments to `COMMANDS`."""
    top = Parser(
        prog="adv2",
        description="Adversarial inputs that fool a classifier and its interpreter at once (ADV²).",
    )
    top.add_argument("--version", action="version", version=f"adv2 {__version__}")
    options: dict[str, Any] = {"required": True, "parser_class": Parser}
    groups = {"": top.add_subparsers(metavar="COMMAND", **options)}
    for words, (meaning, add_arguments, command) in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group not in groups:
            kinds = groups[""].add_parser(group, help="train a network")
            groups[group] = kinds.add_subparsers(metavar="KIND", **options)
        own = groups[group].add_parser(name, help=meaning)
        add_arguments(own)
        own.set_defaults(run=command)
    return top


def script() -> NoReturn:
    """Entry point of the `adv2` command."""
    sys.exit(main())
