"""Other people's errors, and long lists, in one line."""

from collections.abc import Sequence

NAMED = 8  # items in one message


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    try:
        lines = str(error).splitlines()
    except Exception:  # of a class of the user's
        lines = []
    return next((line for line in lines if line.strip()), type(error).__name__)


def listed(items: Sequence[str], separator: str = "; ", limit: int = NAMED) -> str:
    """The first few items, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
