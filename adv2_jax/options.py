"""Options as values: functions and factories whose equal options give equal objects, which print
and pickle.

`jit` knows a static argument again if it is equal to one before: then nothing is compiled twice.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from operator import attrgetter
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def shared(factory: Callable[P, T]) -> Callable[P, T]:
    """Decorator: a factory called again with equal options, defaults spelt out or not, returns the
    object it made before.

    The last 256 objects are remembered. What is made anew after that is equal to what it was if all
    in it compares by value.
    """
    signature = inspect.signature(factory)

    @lru_cache(maxsize=256)
    def made(options: tuple[tuple[str, Any], ...]) -> T:
        return factory(**dict(options))  # type: ignore[call-arg]

    @wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return made(tuple(bound.arguments.items()))

    return make


@dataclasses.dataclass(frozen=True, repr=False)
class Bound:
    """A function with some of its keyword arguments set, made by `bind`; unlike `functools.partial`
    it compares by value.

    Not a tuple: JAX keeps weak references to functions.
    """

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function, of the rest of its arguments."""
        return self.function(*args, **dict(self.options), **kwargs)

    def __repr__(self) -> str:
        return f"{shown(self.function)}({', '.join(f'{name}={shown(value)}' for name, value in self.options)})"

    def __reduce__(self) -> Any:
        names, values = [name for name, _ in self.options], [value for _, value in self.options]
        return _bind_all, (_name(self.function), names, list(map(_name, values)))


def bind(function: Callable[..., Any], /, **options: Any) -> Bound:
    """The function with some of its keyword arguments set; equal arguments give equal objects."""
    return Bound(function, tuple(options.items()))


class _Name(NamedTuple):
    """Where a function is found; what JAX makes of functions (`jit`, `custom_jvp`) does not pickle otherwise."""

    module: str
    name: str


def _name(value: Any) -> Any:
    found = _Name(getattr(value, "__module__", ""), getattr(value, "__qualname__", ""))
    try:
        return found if _found(found) is value else value
    except (ImportError, AttributeError, ValueError):
        return value


def _found(value: Any) -> Any:
    return (
        attrgetter(value.name)(importlib.import_module(value.module))
        if isinstance(value, _Name)
        else value
    )


def _bind_all(function: Any, names: list[str], values: list[Any]) -> Bound:
    return bind(_found(function), **dict(zip(names, map(_found, values), strict=True)))


def shown(value: Any) -> str:
    """A value as one would write it: functions by their names, and no field that has its default."""
    if isinstance(value, Bound):
        return repr(value)
    if hasattr(value, "_field_defaults"):
        fields, defaults = value._asdict(), value._field_defaults
    elif dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        defaults = {field.name: field.default for field in dataclasses.fields(value)}
    else:
        return (
            getattr(value, "__name__", repr(value)).strip("_") if callable(value) else repr(value)
        )
    written = [
        f"{name}={shown(own)}"
        for name, own in fields.items()
        if name not in defaults or own != defaults[name]
    ]
    return f"{type(value).__name__}({', '.join(written)})"
