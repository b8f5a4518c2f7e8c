"""Other people's errors in one line."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
