"""The commands about networks: export, models, doctor, bench."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvae_deploy.cli.command import Verbs, command
from fvae_deploy.cli.console import Terminal
from fvae_deploy.cli.options import Overwrite, Report, engine_pairs
from fvae_deploy.cli.output_options import choice
from fvae_deploy.cli.tables import bench_table, models_table, noise_table, parity_table
from fvae_deploy.errors import EngineError, UsageError
from fvae_deploy.optional import require
from fvae_deploy.version import __version__

if TYPE_CHECKING:
    from fvae_deploy.bench.run import Case
    from fvae_deploy.export.manifest import Manifest

app = typer.Typer(cls=Verbs)
FOREIGN = "Networks from your own code (module:factory)"
GENERATOR = "Generators"
Weights = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A name listed by fvae models, a .ckpt or .safetensors file, a diffusers folder, "
        "hf:OWNER/NAME/PATH@REVISION, or package.module:factory.",
    ),
]
HuWindow = Annotated[
    str | None,
    typer.Option(
        "--hu-window",
        metavar="LOW:HIGH",
        help="HU that become the model's range: two numbers, ct, soft, lung, bone or wide. "
        "[default: ct, -1000:1000]",
    ),
]
Channels = Annotated[
    str,
    choice(
        "--channels",
        names=lambda: ("published", "gray", "rgb"),
        help="published clamps the network's decoded channels, then averages them, as its scripts "
        "do; gray averages them first, which is less exact; rgb keeps them.",
    ),
]

Calibrate = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibrate",
        help="CT from which convolutions get ranges for --precision int8; may be repeated.",
    ),
]
Measured = Annotated[
    str,
    typer.Option(
        "--engines",
        help="Measure in these alone, such as openvino:bf16,torch; always in their fp32 too. "
        "[default: all engines and precisions of this machine]",
    ),
]
ValueRange = Annotated[
    str,
    typer.Option(
        "--range", help="Input values for -1000 and 1000 HU, as a,b.", rich_help_panel=FOREIGN
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="YAML configuration of the checkpoint.", rich_help_panel=GENERATOR
    ),
]
Text = Annotated[
    str | None,
    typer.Option("--text", help="Folder or hub id of the text encoder.", rich_help_panel=GENERATOR),
]
Generator = Annotated[
    str | None,
    choice(
        "--generator",
        names=lambda: ("multi-disease", "healthy"),
        help="Which of the published generators it is. [default: as its configuration says, "
        "else multi-disease]",
        rich_help_panel=GENERATOR,
    ),
]


@command(app, "Make")
def export(
    model: Weights,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.")],
    terminal: Terminal,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the bundle. [default: the name of the weights]"),
    ] = None,
    channels: Channels = "published",
    hu_window: HuWindow = None,
    opset: Annotated[int, typer.Option("--opset", min=18, max=23, help="ONNX opset.")] = 18,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Weights file.", rich_help_panel=FOREIGN)
    ] = None,
    window: Annotated[
        int,
        typer.Option("--window", min=1, help="Slices per window.", rich_help_panel=FOREIGN),
    ] = 65,
    value_range: ValueRange = "-1,1",
    calibrate: Calibrate = None,
    engines: Measured = "",
    config: Config = None,
    text: Text = None,
    generator: Generator = None,
    overwrite: Overwrite = False,
) -> None:
    """Export weights to a bundle, and measure its parity and memory in the installed engines.

    Example: `fvae export -m wan2.1 -o wan21`
    """
    require("torch", "onnx", "onnxscript", "safetensors", "diffusers", "transformers")
    from fvae_deploy.export.bundle import own_files
    from fvae_deploy.export.generators import is_generator
    from fvae_deploy.export.sources import Foreign
    from fvae_deploy.storage.folders import new_folder

    if is_generator(Path(model)):
        given = {"--channels": channels != "published", "--weights": weights is not None}
        given |= {"--window": window != 65, "--range": value_range != "-1,1"}
        given |= {"--hu-window": hu_window is not None, "--calibrate": bool(calibrate)}
        _check_absent(given, f"a generator, {model}")
    else:
        given = {"--config": bool(config), "--text": bool(text), "--generator": bool(generator)}
        _check_absent(given, f"a VAE, {model}")
    pairs = engine_pairs(engines) if engines else None
    with new_folder(output, overwrite=overwrite, own=own_files) as folder:
        if is_generator(Path(model)):
            more = {"config": config, "text": text, "generator": generator, "engines": pairs}
            _export_generator(Path(model), folder, name, opset, terminal, **more)
        else:
            facts: dict[str, Any] = {
                "channels": channels,
                "hu_window": hu_window,
                "calibration": calibrate or (),
                "engines": pairs,
                "foreign": Foreign(weights, window, _range(value_range)),
            }
            _export_vae(model, folder, name, opset, terminal, **facts)


def _check_absent(given: dict[str, bool], what: str) -> None:
    """Raise UsageError for an option that does not apply."""
    for option in (option for option, present in given.items() if present):
        raise UsageError(f"expected no {option} with {what}, found it: leave it out")


def _range(text: str) -> tuple[float, float]:
    """Parse "-1,1"; raises UsageError for anything else."""
    try:
        low, high = (float(n) for n in text.split(","))
    except ValueError:
        raise UsageError(
            f"expected --range as two numbers, found {text!r}: write it like -1,1"
        ) from None
    return low, high


def _export_generator(
    model: Path,
    output: Path,
    name: str | None,
    opset: int,
    terminal: Terminal,
    **facts: Any,
) -> None:
    from fvae_deploy.make.bundle import make_generator_bundle

    manifest = make_generator_bundle(
        model, output, name=name, opset=opset, progress=terminal.say, **facts
    )
    terminal.show(noise_table(manifest))


def _export_vae(
    model: str,
    output: Path,
    name: str | None,
    opset: int,
    terminal: Terminal,
    **facts: Any,
) -> None:
    from fvae_deploy.make.bundle import make_bundle

    manifest = make_bundle(model, output, name=name, opset=opset, progress=terminal.say, **facts)
    terminal.show(parity_table(manifest))


@command(app, "Inspect")
def models(terminal: Terminal) -> None:
    """List the built-in models with their measured parity, and the published ones.

    Example: `fvae models`
    """
    from fvae_deploy.export.bundle import kind_of
    from fvae_deploy.export.generator import GeneratorManifest
    from fvae_deploy.export.known import KNOWN
    from fvae_deploy.export.manifest import Manifest
    from fvae_deploy.export.published import DIVISORS, GENERATORS
    from fvae_deploy.stream.codec import BUILT_IN

    for path in sorted(BUILT_IN.glob("*/manifest.json")):
        if kind_of(path.parent) == GeneratorManifest.KIND:
            generator = GeneratorManifest.load(path.parent)
            terminal.print(f"{generator.name}: {generator.description}")
            terminal.print(
                f"  latents of {generator.vae}, windows of {generator.window} latent frames, "
                f"licence {generator.licence}, weights {generator.identity}"
            )
            findings = "; ".join(f"{f.number} {f.name}" for f in generator.masks.findings)
            terminal.print(f"  findings of disease masks: {findings or 'none'}")
            terminal.print(f"  as published: {', '.join(generator.as_published) or 'nothing'}")
            terminal.show(noise_table(generator))
            continue
        manifest = Manifest.load(path.parent)
        g = manifest.geometry
        terminal.print(f"{manifest.name}: {manifest.description}")
        terminal.print(
            f"  {g.temporal}x{g.spatial}x{g.spatial} voxels to {g.latent_channels} channels, "
            f"licence {manifest.licence}, weights {manifest.identity}"
        )
        terminal.show(parity_table(manifest))
    terminal.show(models_table(KNOWN))
    for name, facts in GENERATORS.items():
        classes = "; ".join(f"{number} {finding}" for number, finding in facts["classes"].items())
        terminal.print(
            f"published generator {name}, weights at hf:qicq1c/Foundation-VAE: latents of "
            f"{facts['vae']}, labels painted as label / {DIVISORS[name]}"
        )
        terminal.print(f"  findings of disease masks: {classes or 'none'}")
        terminal.print(f"  as published by default: {', '.join(facts['as_published'])}")
    terminal.print(
        "fvae export -m NAME -o BUNDLE downloads and exports a published model that is on a hub;"
    )
    terminal.print("fvae reconstruct ct.nii.gz -o recon.nii.gz --model BUNDLE uses it.")


@command(app, "Inspect")
def doctor(terminal: Terminal) -> None:
    """Show which engines run on this machine, and what the others need.

    Example: `fvae doctor`
    """
    from fvae_deploy.engines.base import AUTO, ENGINES, choose, obstacle, precisions
    from fvae_deploy.engines.devices import CHECKS, problems, remarks
    from fvae_deploy.stream.report import machine

    facts = machine()
    terminal.print(f"fvae {__version__}, Python {facts['python']}, {facts['system']}")
    terminal.print(f"{facts['cores']} cores, {facts['processor']}")
    terminal.print("on the CPU:")
    added = [name for name in ENGINES if name not in CHECKS]  # by a program, in this process
    for name in (*AUTO["cpu"], *added):
        problem = obstacle(name)
        verdict = f"runs: {', '.join(precisions(name))}" if problem is None else problem
        terminal.print(f"  {name:12} {verdict}")
    terminal.print("on a GPU (of these, the authors ran only torch on one, an H100):")
    for name in CHECKS:
        device = "gpu" if name == "openvino" else "cuda"
        lacking = problems(name) or ["nothing is missing: fvae selftest --gpu tries it"]
        for i, line in enumerate([*lacking, *remarks(name)]):
            terminal.print(f"  {name + ' --device ' + device if not i else '':26} {line}")
    terminal.print("auto takes {}, since {}".format(*choose()))


@command(app, "Develop")
def bench(
    terminal: Terminal,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", envvar="FVAE_MODEL", help="Built-in model or folder of a bundle."
        ),
    ] = "tiny",
    engines: Annotated[
        str,
        typer.Option(
            "--engines",
            help="Comma-separated, such as openvino:fp32,torch. [default: all engines installed; "
            "on a CPU, torch in fp32 only]",
        ),
    ] = "",
    size: Annotated[int, typer.Option("--size", min=8, help="Side of a slice in pixels.")] = 512,
    slices: Annotated[int, typer.Option("--slices", min=1, help="Slices of the clip.")] = 17,
    step: Annotated[int, typer.Option("--step", min=1, help="Latent frames per step.")] = 1,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Number of rounds; each times every engine once.")
    ] = 3,
    repeats: Annotated[
        int,
        typer.Option("--repeats", min=0, help="Timed passes per process; with 0, the first pass."),
    ] = 3,
    peer: Annotated[
        Path | None,
        typer.Option("--peer", help="Weights file; also times the original implementation."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Also time every engine within this memory budget."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="cpu|cuda", help="Device of engines and peers.")
    ] = "cpu",
    report: Report = None,
) -> None:
    """Measure throughput, share of the machine's ceiling in GFLOP/s, peak memory and error.

    Example: `fvae bench --size 256 --peer tools/train_tiny/tiny.safetensors --json bench.json`
    """
    from fvae_deploy.bench.run import Work
    from fvae_deploy.bench.run import bench as run
    from fvae_deploy.export.manifest import Manifest
    from fvae_deploy.stream.codec import bundle_path
    from fvae_deploy.stream.report import machine

    path = bundle_path(model)
    manifest = Manifest.load(path)
    manifest.check_step(step)
    pairs = _engines(engines, device)
    cases = _cases(pairs, device, memory, peer, manifest)
    work = Work(size, slices, step, rounds, repeats)
    rows = run(path, manifest, cases, work, weights=peer, progress=terminal.say)
    terminal.report({"machine": machine(), "model": str(model), "rows": rows}, report)
    terminal.show(bench_table(rows))


def _cases(
    pairs: list[tuple[str, str]],
    device: str,
    memory: str | None,
    peer: Path | None,
    manifest: Manifest,
) -> list[Case]:
    """Return the cases to measure: engines, the same with a budget, and peers."""
    from fvae_deploy.bench.run import Case
    from fvae_deploy.engines.base import PRECISIONS
    from fvae_deploy.parse import parse_bytes

    cases = [Case(engine, precision, device=device) for engine, precision in pairs]
    if memory:
        cases += [replace(case, memory=parse_bytes(memory)) for case in cases]
    if peer:
        require("torch", "safetensors")
        from fvae_deploy.export.peer import check_peer, peers

        check_peer(peer, manifest)
        half = () if device == "cpu" else (p for _, p in pairs if p in PRECISIONS)
        precisions = dict.fromkeys(["fp32", *half])  # errors are against the first
        cases += [Case(name, p, device=device) for p in precisions for name in peers(peer)]
    return cases


def _engines(engines: str, device: str) -> list[tuple[str, str]]:
    """Parse "openvino:fp32,torch"; an empty text means all engines installed for the device.

    Torch in half precision on a CPU is left out: it is ten times as slow. Raises UsageError
    for an unknown engine or precision, EngineError if none is installed.
    """
    from fvae_deploy.engines.base import AUTO
    from fvae_deploy.selftest import cases

    if not engines:
        kind = "cuda" if device.startswith("cuda") else device
        if kind not in AUTO:
            raise UsageError(
                f"expected --engines with --device {device}, found none: name them, as "
                "openvino:fp32"
            )
        installed = [(e, p) for e, p in cases(kind) if (kind, e) != ("cpu", "torch") or p == "fp32"]
        if not installed:
            raise EngineError(f"expected an engine for {device}, found none: run fvae doctor")
        return installed
    return engine_pairs(engines)
