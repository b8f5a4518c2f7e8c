"""Texts of messages: the first line of an exception, and lists cut to a few items."""

from collections.abc import Sequence

NAMED = 8  # items in one message


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if the message is empty."""
    try:
        lines = str(error).splitlines()
    except Exception:  # the `__str__` of a user's class may fail
        lines = []
    return next((line for line in lines if line.strip()), type(error).__name__)


def listed(items: Sequence[str], separator: str = "; ", limit: int = NAMED) -> str:
    """Return the first few items, and the number of the others."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
