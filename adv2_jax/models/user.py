"""Networks from a user's Python file, named `path/to/file.py:name`."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from adv2_jax.errors import first_line
from adv2_jax.types import Classifier

T = TypeVar("T")


def is_reference(name: str) -> bool:
    """Return whether a name has the form `file.py:name`."""
    return ".py:" in name or name.endswith(".py")


def load(reference: str, weights: str | os.PathLike[str] | None = None) -> Classifier:
    """Load the network `name` of a Python file; importing runs the file.

    Args:
        reference: `path/to/file.py:name`. The name is a network, or a function (or class) that
            makes one.
        weights: passed to the function, `name(weights)`; without, `name()` is called.

    Raises:
        ValueError: there is no such file or name, the file or the function fails (gives its error),
            or weights are given with a network.
    """
    made = named("model", reference)
    path, _, name = reference.rpartition(":")
    # a class has the methods of its networks, but is none: it is called below
    if not inspect.isclass(made) and _is_network(made):
        if weights is not None:
            raise ValueError(
                f"{reference} is a network with its weights; --weights goes with a function that makes one"
            )
        return made
    # a coroutine function gives a coroutine that nobody awaits
    if not callable(made) or inspect.iscoroutinefunction(made):
        raise ValueError(
            f"{reference} is neither a network nor a function that makes one, but {type(made).__name__}"
        )
    call = f"{path}:{name}({'' if weights is None else weights})"
    network = attempt(f"{call} failed", made, *(() if weights is None else (weights,)))
    if not _is_network(network):
        raise ValueError(
            f"{call} gives no network, which has features and head, or logits, "
            f"but {type(network).__name__}"
        )
    return network


def named(kind: str, reference: str) -> Any:
    """Return the object of a name in a Python file; importing runs the file.

    Args:
        kind: of the object, for the message.
        reference: `path/to/file.py:name`.

    Raises:
        ValueError: there is no such file or name, or the file fails (gives its error).
    """
    path, _, name = reference.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{kind} {reference!r} must be path/to/file.py:name")
    module = attempt(f"cannot import {path}", _import, path)
    if not attempt(f"cannot import {name} from {path}", hasattr, module, name):
        # what the file defines itself, not what it imports
        names = [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__
        ]
        raise ValueError(
            f"{path} has no {name!r}; it has {', '.join(names) or 'nothing of its own'}"
        )
    return getattr(module, name)


def _is_network(made: Any) -> bool:
    # `hasattr` runs a user's `__getattr__`, which may fail
    failure = f"a {type(made).__name__} cannot be asked for its"
    return any(attempt(f"{failure} {name}", hasattr, made, name) for name in ("features", "logits"))


def _import(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise ValueError("no such file")
    spec = importlib.util.spec_from_file_location(f"adv2_user_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    folder = str(Path(path).resolve().parent)
    if sys.path[:1] != [folder]:
        # as `python file.py` does; left there, since functions may import when they are called
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    return module


def attempt(failure: str, f: Callable[..., T], *arguments: Any) -> T:
    """Return f(*arguments); raise any error of it as a ValueError of one line."""
    try:
        return f(*arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too, by which scripts end
        reason, kind = first_line(error), type(error).__name__
        known = isinstance(error, ValueError) or reason == kind
        raise ValueError(f"{failure}: {reason if known else f'{kind}: {reason}'}") from error
