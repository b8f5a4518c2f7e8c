"""Factories whose equal options give the same object, so that `jit` knows a static argument again."""

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def shared(factory: Callable[P, T]) -> Callable[P, T]:
    """Decorator: a factory called again with equal options, defaults spelt out or not, returns the object it made before."""
    signature = inspect.signature(factory)

    @cache
    def made(options: tuple[tuple[str, Any], ...]) -> T:
        return factory(**dict(options))  # type: ignore[call-arg]

    @wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return made(tuple(bound.arguments.items()))

    return make
