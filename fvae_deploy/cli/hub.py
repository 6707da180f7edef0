"""The commands about bundles on a hub: push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fvae_deploy.cli.command import Verbs, command
from fvae_deploy.cli.console import Terminal
from fvae_deploy.cli.options import Overwrite
from fvae_deploy.optional import require

app = typer.Typer(cls=Verbs)


@command(app, "Deploy")
def push(
    model: Annotated[str, typer.Argument(help="Built-in model or folder of a bundle.")],
    place: Annotated[str, typer.Argument(metavar="hf:OWNER/NAME", help="Repository on the hub.")],
    terminal: Terminal,
    create: Annotated[
        bool, typer.Option("--create", help="Create the repository, private, if there is none.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a bundle to a repository on a Hugging Face hub, with a model card, in one commit.

    Example: `fvae push leanvae16 hf:OWNER/NAME --create`
    """
    require("huggingface_hub", extra="hub")
    from fvae_deploy.export.hub_bundles import push as run
    from fvae_deploy.export.model_card import licence_of
    from fvae_deploy.stream.codec import bundle_path

    done = run(bundle_path(model), place, overwrite=overwrite, create=create, progress=terminal.say)
    licence = licence_of(done.bundle)
    terminal.print(
        f"licence of the weights: {licence}"
        if licence
        else "The licence of the weights is not known: ask their authors before others can read "
        "this repository."
    )
    verb = "now holds" if done.changed else "already held"
    terminal.print(f"{done.page} {verb} {done.bundle.name} at commit {done.commit}")


@command(app, "Deploy")
def pull(
    place: Annotated[
        str, typer.Argument(metavar="hf:OWNER/NAME[@REVISION]", help="Repository on the hub.")
    ],
    terminal: Terminal,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Fetch a bundle from a Hugging Face hub, and verify every file of it.

    Example: `fvae pull hf:OWNER/NAME -o bundle`
    """
    require("huggingface_hub", extra="hub")
    from fvae_deploy.export.bundle import own_files
    from fvae_deploy.export.hub_bundles import pull as run
    from fvae_deploy.export.model_card import licence_of
    from fvae_deploy.storage.folders import new_folder

    with new_folder(output, overwrite=overwrite, own=own_files) as folder:
        bundle, commit = run(place, folder, terminal.say)
    terminal.print(
        f"{output}: {bundle.name} of commit {commit}, all {len(bundle.files)} hashes right; "
        f"licence of the weights: {licence_of(bundle) or 'not known'}"
    )
