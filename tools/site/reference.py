"""Pages that are written from the code: options, the Python interface, error messages."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import fvae_deploy
from fvae_deploy import errors as tree
from fvae_deploy.cli.main import app

ROOT = Path(__file__).parents[2]
FOLDERS = ("fvae_deploy", "export", "engines", "kernels")


def options() -> str:
    """Return the page of all commands with their arguments and options."""
    lines = ["# All options", "", "`fvae COMMAND --help` shows the same in a terminal.", ""]
    for name, command in _commands(typer.main.get_command(app), "fvae"):
        lines += [f"## {name}", "", *_help(command), ""]
        lines += ["| option | | default |", "|---|---|---|"]
        lines += [_row(parameter) for parameter in command.params if not parameter.hidden]
        lines.append("")
    return "\n".join(lines)


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _help(command: Any) -> list[str]:
    """Return the paragraphs of a help text, without the breaks that belong to the source."""
    text = re.sub(r"[ \t]+", " ", (command.help or "").strip())
    return [part.replace("\n", " ") + "\n" for part in re.split(r"\n\s*\n", text)]


def _row(parameter: Any) -> str:
    """Return a parameter as a row of the table."""
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        names = [names[0].upper()]
    default = parameter.default
    shown = "" if default in (None, False, (), []) or callable(default) else f"`{default}`"
    if parameter.required:
        shown = "required"
    text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    return f"| {', '.join(f'`{name}`' for name in names)} | {text} | {shown} |"


def python() -> str:
    """Return the page of the names in `fvae_deploy`, whose docstrings mkdocstrings takes."""
    lines = [
        "# Python",
        "",
        "These names are the public interface, and so are their arguments and results. Everything",
        "else may change in any version; use it, but pin fvae's version then. What is public",
        "changes in a version with a new second number, after one version with a warning.",
        "",
    ]
    for name, module in fvae_deploy._MODULES.items():
        lines += [f"::: fvae_deploy.{module}.{name}", "    options:", "      heading_level: 2", ""]
    return "\n".join(lines)


def errors() -> str:
    """Return the page of all error messages, by the kind of error and its exit code."""
    found: dict[str, set[str]] = defaultdict(set)
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    text = " ".join(_text(argument) for argument in node.args)
                    if text.startswith("expected "):
                        found[node.func.id].add(text)
    lines = [
        "# Error messages",
        "",
        "Every error is one line: what was expected, what was found, and after the last colon the",
        "remedy. An ellipsis stands for what depends on the case. `--debug` adds a traceback.",
        "",
    ]
    for name, messages in sorted(found.items(), key=lambda item: (_code(item[0]), item[0])):
        kind = getattr(tree, name, None)
        if kind is None:
            continue
        lines += [f"## {name}, exit code {_code(name)}", "", (kind.__doc__ or "").strip(), ""]
        lines += ["| expected | found | remedy |", "|---|---|---|"]
        lines += [_cells(message) for message in sorted(messages)]
        lines.append("")
    return "\n".join(lines)


def _code(name: str) -> int:
    return int(getattr(getattr(tree, name, None), "exit_code", 1))


def _text(node: ast.AST) -> str:
    """Return the text of a string expression, with an ellipsis for what varies."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…"


def _cells(message: str) -> str:
    """Return a message as a row of what was expected, found, and the remedy."""
    rest, _, remedy = message.rpartition(": ")
    if not rest:
        rest, remedy = message, ""
    expected, _, found = rest.removeprefix("expected ").partition(", found ")
    cells = (re.sub(r"([|<>*_`\[\]])", r"\\\1", cell) for cell in (expected, found, remedy))
    return f"| {' | '.join(cells)} |"
