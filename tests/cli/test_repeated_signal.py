"""A signal that comes twice at once ends a command once, after its clean-up."""

from __future__ import annotations

import signal

import pytest
import typer

from fvae_deploy import interrupts
from fvae_deploy.cli.command import Verbs
from fvae_deploy.errors import StoppedError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_clean_up_is_not_interrupted_by_the_same_signal_again(number: int) -> None:
    app, done = typer.Typer(cls=Verbs), []

    @app.command()
    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            done.append("cleaned up")

    @app.command()
    def other() -> None: ...

    before = signal.signal(number, signal.SIG_DFL)  # nohup would have had it ignored
    try:
        with pytest.raises(StoppedError, match="Interrupted") as stopped:
            app(["work"], standalone_mode=False)
    finally:
        signal.signal(number, before)
    assert stopped.value.exit_code == 128 + number
    assert done == ["cleaned up"]


def test_a_later_signal_ends_a_command_that_went_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "REPEATED", 0.0)
    app, done = typer.Typer(cls=Verbs), []

    @app.command()
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)
        done.append("went on")

    @app.command()
    def other() -> None: ...

    with pytest.raises(StoppedError):
        app(["work"], standalone_mode=False)
    assert not done
