"""Run the command line; whatever goes wrong becomes one line and an exit code."""

import argparse
import io
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

from adv2_jax.cli import commands, training
from adv2_jax.cli.arguments import HOSTS, parser
from adv2_jax.cli.console import check_devices, one_line, warnings_on_stderr
from adv2_jax.devices import keep_programs
from adv2_jax.hosts import connect, processes

RUN: dict[str, Callable[[argparse.Namespace], object]] = {
    "demo": commands.demo,
    "attack": commands.attack,
    "table": commands.table,
    "curvature": commands.curvature,
    "transfer": commands.transfer,
    "compare": commands.compare,
    "detect": commands.detect,
    "train classifier": training.classifier,
    "train rts": training.rts,
    "convert": commands.convert,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; `sys.argv[1:]` unless given.

    Returns:
        0 done, 2 bad input (one line on stderr), 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # a terminal that does not know ² or λ shows a ? instead of failing
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's takes every character
            stream.reconfigure(errors="replace")
    try:
        options = vars(parser().parse_args(words))
        run = RUN[options.pop("run")]
        distributed, *hosts = (options.get(flag[2:]) for flag in HOSTS)
        if distributed:
            connect(*hosts)
        elif any(value is not None for value in hosts):
            raise ValueError("--coordinator, --processes and --process need --distributed")
        if processes().index > 0:
            options["quiet"] = True
        with warnings_on_stderr(options.get("quiet", False)):
            check_devices()
            keep_programs()
            run(argparse.Namespace(**options, command=shlex.join(["adv2", *words])))
            processes().finish()
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(f"out of memory: {str(error) or 'what was asked for is too large'}")
    except jax.errors.JaxRuntimeError as error:
        # XLA has one error for everything; another is a bug, whose traceback is wanted
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail("out of memory; a smaller --batch-size or fewer --steps needs less")
    except KeyboardInterrupt as interrupt:
        # 130 as shells have it, 128 + SIGINT; the exception holds a hint how to go on
        return _fail(f"interrupted{interrupt}", 130)
    return 0


def _fail(message: str, code: int = 2) -> int:
    print(f"adv2: {one_line(message)}", file=sys.stderr)
    return code


def script() -> NoReturn:
    """Entry point of the `adv2` command."""
    sys.exit(main())
