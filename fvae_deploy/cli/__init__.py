"""The command line: parse, call, print, exit code. Only this package imports typer and rich."""
