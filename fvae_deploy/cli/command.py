"""Registers commands with their own parameters and the shared options, each declared once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import typer
from typer.core import TyperGroup

from fvae_deploy.cli.console import Terminal
from fvae_deploy.cli.options import COMMON, Debug, Quiet, Verbose
from fvae_deploy.errors import StoppedError
from fvae_deploy.interrupts import TerminatedError, free_quietly, terminable
from fvae_deploy.stream.options import RunOptions

RESUMABLE = ("encode", "decode", "reconstruct", "generate")
SHARED = {"quiet": Quiet, "verbose": Verbose, "debug": Debug}
F = TypeVar("F", bound=Callable[..., None])


class Verbs(TyperGroup):
    """A group of commands; Ctrl-C, SIGTERM and SIGHUP end a command with one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with terminable():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as interrupt:
                free_quietly(interrupt)
                resume = ctx.invoked_subcommand in RESUMABLE
                error = StoppedError(
                    "Interrupted." + " Run again with --resume to continue." * resume
                )
                if isinstance(interrupt, TerminatedError):
                    error.exit_code = 128 + interrupt.args[0]
                raise error from None


def command(
    app: typer.Typer, panel: str, common: Sequence[str] = (), name: str | None = None
) -> Callable[[F], F]:
    """Register a function as a command, shown in a panel of the help.

    The function takes `terminal: Terminal` and, if `common` names keys of COMMON, `options:
    RunOptions` with those options. All other parameters are its own options and arguments.
    """

    def register(function: F) -> F:
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(function).parameters.values()
            if parameter.name not in ("options", "terminal")
        ]
        fields = [COMMON[key] for key in common]
        shared = [
            *(_parameter(option.field, option.kind, option.default) for option in fields),
            *(_parameter(flag, kind, False) for flag, kind in SHARED.items()),
        ]

        def run(ctx: typer.Context, **values: Any) -> None:
            terminal = ctx.ensure_object(Terminal)
            terminal.set_up(*(values.pop(flag) for flag in SHARED))
            passed: dict[str, Any] = {"terminal": terminal}
            if fields:
                chosen = {option.field: values.pop(option.field) for option in fields}
                passed["options"] = RunOptions(**chosen)
            function(**values, **passed)

        context = _parameter("ctx", typer.Context, inspect.Parameter.empty)
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        signature = inspect.Signature([context, *own, *shared])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        app.command(name, rich_help_panel=panel)(run)
        return function

    return register


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
