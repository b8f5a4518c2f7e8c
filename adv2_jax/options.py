"""Options as values: equal options give equal objects, which print and pickle.

`jit` compiles once for all static arguments that are equal; functions made by lambda or
`functools.partial` never are.
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
    """Decorator that memoises a factory by its options, whether defaults are given or left out.

    The last 256 objects are cached. An object made again after that is a new one, but equal to the
    first if all its parts compare by value.
    """
    signature = inspect.signature(factory)

    @lru_cache(maxsize=256)
    def cached(options: tuple[tuple[str, Any], ...]) -> T:
        return factory(**dict(options))  # type: ignore[call-arg]

    @wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        # `f()` and `f(x=default)` must give one object, or each would be compiled
        bound.apply_defaults()
        return cached(tuple(bound.arguments.items()))

    return make


@dataclasses.dataclass(frozen=True, repr=False)
class Bound:
    """Function with some of its keyword arguments set, made by `bind`; it compares by value."""

    # a dataclass, not a NamedTuple: JAX keeps weak references to functions, and tuples have none
    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the remaining arguments."""
        return self.function(*args, **dict(self.options), **kwargs)

    def __repr__(self) -> str:
        return (
            f"{shown(self.function)}("
            f"{', '.join(f'{name}={shown(value)}' for name, value in self.options)})"
        )

    def __reduce__(self) -> Any:
        names, values = [name for name, _ in self.options], [value for _, value in self.options]
        # flat lists: pickle must not see the functions themselves
        return _bind_all, (_reference(self.function), names, list(map(_reference, values)))


def bind(function: Callable[..., Any], /, **options: Any) -> Bound:
    """Return the function with some of its keyword arguments set, as a value."""
    return Bound(function, tuple(options.items()))


class _Reference(NamedTuple):
    """Import path of a function: the results of `jit` and `custom_jvp` do not pickle themselves."""

    module: str
    name: str


def _reference(value: Any) -> Any:
    """Return the reference of a value that can be imported, else the value itself."""
    reference = _Reference(getattr(value, "__module__", ""), getattr(value, "__qualname__", ""))
    try:
        return reference if _resolve(reference) is value else value
    except (ImportError, AttributeError, ValueError):
        return value


def _resolve(value: Any) -> Any:
    return (
        attrgetter(value.name)(importlib.import_module(value.module))
        if isinstance(value, _Reference)
        else value
    )


def _bind_all(function: Any, names: list[str], values: list[Any]) -> Bound:
    return bind(_resolve(function), **dict(zip(names, map(_resolve, values), strict=True)))


def shown(value: Any) -> str:
    """Return a value as Python code would write it: functions by name, default fields left out."""
    if isinstance(value, Bound):
        return repr(value)
    # NamedTuples, and then dataclasses, have no common way to list fields and defaults
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
        f"{name}={shown(field)}"
        for name, field in fields.items()
        if name not in defaults or field != defaults[name]
    ]
    return f"{type(value).__name__}({', '.join(written)})"
