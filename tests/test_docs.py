"""docs/cli.md is what its program makes of the commands, and the examples in it are understood."""

import shlex
from pathlib import Path

import pytest
from make_cli_reference import reference

from adv2_jax.cli.arguments import COMMANDS, parser

FILE = Path(__file__).parents[1] / "docs" / "cli.md"


def test_the_reference_of_the_command_line_is_up_to_date():
    assert FILE.read_text(encoding="utf-8") == reference(), (
        "docs/cli.md is not what the commands say; "
        "`python tests/make_cli_reference.py > docs/cli.md` writes it anew"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_names_every_option_of_the_parser(name, capsys):
    """The section is made of the same data as the parser; argparse's own help must agree."""
    with pytest.raises(SystemExit):
        parser().parse_args([*name.split(), "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    section = reference().split(f"\n## adv2 {name}\n")[1].split("\n## ")[0]
    rows = [line.split("`")[1].split()[0] for line in section.splitlines() if line[:3] == "| `"]
    assert rows == [
        key if key[0] == "-" else options["metavar"]
        for key, options in COMMANDS[name].arguments.items()
    ]
    assert all(f" {row} " in printed for row in rows)


@pytest.mark.parametrize(
    "example", [example for command in COMMANDS.values() for example in command.examples]
)
def test_the_examples_are_understood_and_stand_in_the_reference(example):
    program, *words = shlex.split(example)
    assert program == "adv2" and parser().parse_args(words).run in COMMANDS
    assert f"\n{example}\n" in reference()
