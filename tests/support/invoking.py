"""The command line, run in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from engine.commands.main import cli


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])
