"""Write the reference of the command line: `python tests/make_cli_reference.py > docs/cli.md`."""

import sys
from typing import Any

from adv2_jax.cli.arguments import COMMANDS, Command

HEAD = """# Command line

<!-- Made by `python tests/make_cli_reference.py > docs/cli.md`; do not edit by hand. -->

`adv2 COMMAND --help` prints the same in a terminal. Numbers may be fractions, such as 8/255. The
exit code is 0 when all is done, 2 for bad input (one line on stderr says what is wrong), and 130
after Ctrl-C.
"""
SECTION = """
## {name}

{summary}.

    {usage}

For example:

```sh
{examples}
```

| argument | default | meaning |
|---|---|---|
{rows}
"""


def reference() -> str:
    """Return the reference as Markdown, one section for each command.

    It is made of the data that the parser is made of, and not by argparse, whose layout depends on
    the version of Python and on the width of the terminal.
    """
    return HEAD + "".join(_section(f"adv2 {name}", command) for name, command in COMMANDS.items())


def _section(name: str, command: Command) -> str:
    forms = {key: _form(key, options) for key, options in command.arguments.items()}
    required = [
        f"[{form}]" if command.arguments[key].get("nargs") == "?" else form
        for key, form in forms.items()
        if not key.startswith("-") or command.arguments[key].get("required")
    ]
    return SECTION.format(
        name=name,
        summary=command.summary[0].upper() + command.summary[1:],
        examples="\n".join(command.examples),
        usage=" ".join([name, *required, "[options]"]),
        rows="\n".join(
            f"| `{forms[key]}` | {_default_and_meaning(options)} |"
            for key, options in command.arguments.items()
        ),
    )


def _form(key: str, options: dict[str, Any]) -> str:
    """Return an argument as it is typed: `--flag VALUE`, or `VALUE` alone."""
    if "action" in options:  # a flag without a value
        return key
    value = options.get("metavar") or f"{{{','.join(options['choices'])}}}"
    if isinstance(value, tuple):
        value = " ".join(value)
    if options.get("nargs") == "+":
        value += " ..."
    return f"{key} {value}" if key.startswith("-") else value


def _default_and_meaning(options: dict[str, Any]) -> str:
    """Return two cells of a row: the default, or the words for it in the help text; and the rest."""
    meaning, _, words = options["help"].partition(" (default: ")
    default = f"`{options['default']}`" if "default" in options else words.removesuffix(")")
    return f"{default} | {meaning}"


if __name__ == "__main__":
    sys.stdout.buffer.write(reference().encode())
