"""The verbs about networks, not scans: export, models, doctor, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fvae_deploy.cli.console import say, show
from fvae_deploy.cli.options import Debug, Model, Quiet, Verbs
from fvae_deploy.cli.tables import bench_table, models_table, noise_table, parity_table
from fvae_deploy.errors import EngineError, UsageError
from fvae_deploy.optional import require
from fvae_deploy.version import __version__

app = typer.Typer(cls=Verbs)


@app.command()
def export(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A name of fvae models, a .ckpt or .safetensors, a folder of diffusers, "
            "hf:OWNER/NAME/PATH@REVISION, or package.module:factory.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.")],
    name: Annotated[str | None, typer.Option("--name", help="[default: the weights' name]")] = None,
    channels: Annotated[
        str, typer.Option("--channels", help="gray folds three channels into one; rgb keeps them.")
    ] = "gray",
    opset: Annotated[int, typer.Option("--opset", min=18, max=23, help="ONNX opset.")] = 18,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="With a factory: its weights.")
    ] = None,
    window: Annotated[
        int, typer.Option("--window", min=1, help="With a factory: slices that it takes at once.")
    ] = 65,
    value_range: Annotated[
        str, typer.Option("--range", help="With a factory: what -1000 and 1000 HU become.")
    ] = "-1,1",
    config: Annotated[
        Path | None, typer.Option("--config", help="With a generator: the reference's YAML.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help="With a generator: folder or hub id of its text encoder."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Export weights to a bundle, and measure parity and memory in every engine here.

    Example: `fvae export -m wan2.1 -o wan21`
    """
    require("torch", "onnx", "onnxscript", "safetensors", "diffusers", "transformers")
    from fvae_deploy.export.generators import is_generator
    from fvae_deploy.export.sources import Foreign
    from fvae_deploy.make.bundle import make_bundle, make_generator_bundle

    if is_generator(Path(model)):
        of_vaes = {"--channels": channels != "gray", "--weights": weights is not None}
        of_vaes |= {"--window": window != 65, "--range": value_range != "-1,1"}
        for option in (name for name, given in of_vaes.items() if given):
            raise UsageError(f"expected no {option} with a generator, {model}: leave it out")
        made = make_generator_bundle(
            Path(model),
            output,
            name=name,
            config=config,
            text=text,
            opset=opset,
            progress=say(quiet),
        )
        if not quiet:
            show(noise_table(made))
        return
    if config or text:
        raise UsageError(
            f"expected a generator's checkpoint with --config or --text, found {model}: leave "
            "them out"
        )

    try:
        low, high = (float(n) for n in value_range.split(","))
    except ValueError:
        raise UsageError(f"expected --range as -1,1, found {value_range!r}") from None
    manifest = make_bundle(
        model,
        output,
        name=name,
        channels=channels,
        foreign=Foreign(weights, window, (low, high)),
        opset=opset,
        progress=say(quiet),
    )
    if not quiet:
        show(parity_table(manifest))


@app.command()
def models(debug: Debug = False) -> None:
    """List the built-in models with their measured parity, and the published ones.

    Example: `fvae models`
    """
    from fvae_deploy.export.bundle import kind_of
    from fvae_deploy.export.generator import GeneratorManifest
    from fvae_deploy.export.known import KNOWN
    from fvae_deploy.export.manifest import Manifest
    from fvae_deploy.stream.codec import BUILT_IN

    for path in sorted(BUILT_IN.glob("*/manifest.json")):
        if kind_of(path.parent) == GeneratorManifest.KIND:
            found = GeneratorManifest.load(path.parent)
            print(f"{found.name}: {found.description}")
            print(
                f"  latents of {found.vae}, windows of {found.window} latent frames, licence "
                f"{found.licence}, weights {found.identity}"
            )
            show(noise_table(found))
            continue
        manifest = Manifest.load(path.parent)
        g = manifest.geometry
        print(f"{manifest.name}: {manifest.description}")
        print(
            f"  {g.temporal}x{g.spatial}x{g.spatial} voxels to {g.latent_channels} channels, "
            f"licence {manifest.licence}, weights {manifest.identity}"
        )
        show(parity_table(manifest))
    show(models_table(KNOWN))
    print("fvae export -m NAME -o BUNDLE fetches and exports one of those with weights on a hub;")
    print("fvae reconstruct ct.nii.gz -o recon.nii.gz --model BUNDLE uses it.")


@app.command()
def doctor(debug: Debug = False) -> None:
    """Say which engines can run here, and what would make the others run.

    Example: `fvae doctor`
    """
    from fvae_deploy.engines.base import AUTO, ENGINES, choose, obstacle, precisions
    from fvae_deploy.engines.devices import problems, remarks
    from fvae_deploy.stream.report import machine

    facts = machine()
    print(f"fvae {__version__}, Python {facts['python']}, {facts['system']}")
    print(f"{facts['cores']} cores, {facts['processor']}")
    print("on the CPU:")
    for name in AUTO["cpu"]:
        problem = obstacle(name)
        verdict = f"runs: {', '.join(precisions(name))}" if problem is None else problem
        print(f"  {name:12} {verdict}")
    print("on a GPU (the authors ran torch alone on one, an H100):")
    for name in ENGINES:
        device = "gpu" if name == "openvino" else "cuda"
        lacking = problems(name) or ["nothing is missing: fvae selftest --gpu tries it"]
        for i, line in enumerate([*lacking, *remarks(name)]):
            print(f"  {name + ' --device ' + device if not i else '':26} {line}")
    print("auto takes {}, since {}".format(*choose()))


@app.command()
def bench(
    model: Model = "tiny",
    engines: Annotated[
        str,
        typer.Option(
            "--engines",
            help="Comma-separated, as openvino:fp32 [default: all, torch on a CPU in fp32 alone].",
        ),
    ] = "",
    size: Annotated[int, typer.Option("--size", min=8, help="Side of a slice in pixels.")] = 512,
    slices: Annotated[int, typer.Option("--slices", min=1, help="Slices of the clip.")] = 17,
    step: Annotated[int, typer.Option("--step", min=1, help="Latent frames a step.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Repetitions in turn.")] = 3,
    repeats: Annotated[
        int, typer.Option("--repeats", min=0, help="Timed passes a process; 0: the first.")
    ] = 3,
    peer: Annotated[
        Path | None,
        typer.Option("--peer", help="The weights: also run them as their authors do."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Also run every engine planned for this budget."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="cpu, or cuda for engines and peers.")
    ] = "cpu",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure throughput, ceiling, peak memory and error; the last line is JSON.

    Example: `fvae bench --size 256 --peer tools/train_tiny/tiny.safetensors`
    """
    import json
    from dataclasses import replace

    from fvae_deploy.bench.run import Case, Work
    from fvae_deploy.bench.run import bench as run
    from fvae_deploy.engines.base import PRECISIONS
    from fvae_deploy.export.manifest import Manifest
    from fvae_deploy.parse import parse_bytes
    from fvae_deploy.stream.codec import bundle_path
    from fvae_deploy.stream.report import machine

    path = bundle_path(model)
    manifest = Manifest.load(path)
    manifest.check_step(step)
    pairs = _asked(engines, device)
    cases = [Case(e, p, device=device) for e, p in pairs]
    if memory:
        cases += [replace(case, memory=parse_bytes(memory)) for case in cases]
    if peer:
        require("torch", "safetensors")
        from fvae_deploy.export.peer import check_peer, peers

        check_peer(peer, manifest)
        alike = () if device == "cpu" else (p for _, p in pairs if p in PRECISIONS)
        wanted = dict.fromkeys(["fp32", *alike])  # the first is what errors are against
        cases += [Case(name, p, device=device) for p in wanted for name in peers(peer)]
    work = Work(size, slices, step, rounds, repeats)
    rows = run(path, manifest, cases, work, weights=peer, progress=say(quiet))
    if not quiet:
        show(bench_table(rows))
    print(json.dumps({"machine": machine(), "model": str(model), "rows": rows}))


def _asked(engines: str, device: str) -> list[tuple[str, str]]:
    """Read "openvino:fp32,torch"; where it is empty, take all that are installed for the device.

    Not torch in half precision on a CPU, where that takes ten times as long. Raises UsageError
    for what is no engine or precision, EngineError where none is installed.
    """
    from fvae_deploy.engines.base import AUTO, ENGINES, offered
    from fvae_deploy.selftest import cases

    if not engines:
        kind = "cuda" if device.startswith("cuda") else device
        if kind not in AUTO:
            raise UsageError(
                f"expected --engines with --device {device}, found none: name them, as "
                "openvino:fp32"
            )
        found = [(e, p) for e, p in cases(kind) if (kind, e) != ("cpu", "torch") or p == "fp32"]
        if not found:
            raise EngineError(f"expected an engine for {device}, found none: see fvae doctor")
        return found
    pairs = []
    for item in engines.split(","):
        engine, _, precision = item.strip().partition(":")
        if engine not in ENGINES:
            raise UsageError(
                f"expected --engines among {', '.join(ENGINES)}, found {engine!r}: name them, as "
                "openvino:fp32"
            )
        if (precision or "fp32") not in offered(engine):
            raise UsageError(
                f"expected a precision of {engine} among {', '.join(offered(engine))}, found "
                f"{precision!r}"
            )
        pairs.append((engine, precision or "fp32"))
    return pairs
