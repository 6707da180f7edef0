"""Every command that README and docs show exists, with its options and their values."""

from __future__ import annotations

import pytest
import typer
from documented import shown
from typer.exceptions import TyperException

from fvae_deploy.cli.console import Terminal
from fvae_deploy.cli.main import app
from fvae_deploy.errors import UsageError

COMMANDS = shown()


def parse(words):
    """Parse a command line as `fvae` does, without running anything."""
    command, context = typer.main.get_command(app), None
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"no command {name}"
        context = typer.Context(command, parent=context, obj=Terminal())
        command = command.commands[name]
    command.make_context(command.name, list(words), parent=context)


def test_the_pages_show_many_commands():
    assert len(COMMANDS) > 90
    assert {command.page for command in COMMANDS} >= {"README.md", "docs/commands.md"}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_documented_command_is_one_that_fvae_takes(command):
    parse(command.words)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["encode", "ct.nii.gz", "-o"], "'-o' requires an argument"),
        (["encode", "ct.nii.gz", "--outptu", "ct.zarr"], "No such option: --outptu"),
        (["encode", "ct.nii.gz", "-o", "ct.zarr", "--engine", "openvin"], "found 'openvin'"),
        (["encoed", "ct.nii.gz"], "no command encoed"),
    ],
)
def test_what_fvae_does_not_take_is_found(words, found):
    with pytest.raises((UsageError, TyperException, AssertionError), match=found):
        parse(words)
