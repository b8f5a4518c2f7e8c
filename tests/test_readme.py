"""What the README shows is run."""

import re
from pathlib import Path

import pytest

from adv2_jax.cli.arguments import parser
from adv2_jax.cli.main import RUN

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run_one_after_the_other(capsys):
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"__name__": "readme"}
    for code in examples:
        exec(compile(code, "README.md", "exec"), names)
    assert len(examples) == 2 and capsys.readouterr().out


@pytest.mark.parametrize("command", re.findall(r"^    adv2 ([^#\n]*)", README, re.MULTILINE))
def test_the_commands_are_understood(command):
    assert parser().parse_args(command.split()).run in RUN
