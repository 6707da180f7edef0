"""Jobs of `gpu.py` on the machine, on single kernels, and on `tiny` through the engines."""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fvae_deploy import selftest
from fvae_deploy.kernels import timing
from fvae_deploy.kernels.chips import Chip, rated
from fvae_deploy.kernels.dispatch import KERNELS, Kernels, compute_in_float32
from fvae_deploy.kernels.trials import run_trials
from fvae_deploy.stream.codec import BUILT_IN, Codec, open_codec
from fvae_deploy.stream.intensity import ClippingTally, to_hu, to_int16, to_model
from fvae_deploy.stream.report import machine as facts_of_machine
from fvae_deploy.stream.schedule import steps
from fvae_deploy.stream.stages import CausalStream, whole_grids
from fvae_deploy.stream.threads import Behind, ahead

if TYPE_CHECKING:
    from gpu import Setting
    from gpu_job import Rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUERY = (
    "name,driver_version,memory.total,memory.used,power.limit,clocks.max.sm,clocks.max.memory,"
    "clocks.current.sm,temperature.gpu,persistence_mode,ecc.mode.current"
)


def synchronize() -> None:
    """Wait until the GPU has nothing left to do; without a GPU, do nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ceiling_of_card() -> Chip | None:
    """Return the data sheet's rates for this machine's GPU; None if the card is unknown."""
    if not torch.cuda.is_available():
        return None
    return rated(Kernels("cuda").target, torch.cuda.get_device_name())


def timed(work: Any, seconds: float) -> tuple[float, float]:
    """Run work for about so many seconds; return the median of its times and their spread.

    It runs at least five times, or once if there are no seconds. The spread is the difference of
    the longest and the shortest time over the median.
    """
    work()
    synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < (5 if seconds else 1) or time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begin)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


@contextmanager
def recorded(rows: Rows, **facts: Any) -> Iterator[None]:
    """Add a row with the failure if the block raises one; the job goes on."""
    try:
        yield
    except Exception as error:  # an untested GPU can fail in any way
        rows.add(**facts, failure=timing.describe(error))


def machine(rows: Rows, how: Setting) -> None:
    """Note the facts of the machine and of the GPU, and measure matrix products and a copy."""
    rows.add(kind="machine", **facts_of_machine(), torch=torch.__version__)
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    rows.add(kind="triton", version=triton)
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError as error:
        output = str(error)
    rows.add(kind="nvidia-smi", output=output)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        rows.add(
            kind="gpu",
            name=properties.name,
            target=Kernels("cuda").target,
            memory=properties.total_memory,
            processors=properties.multi_processor_count,
            cudnn=torch.backends.cudnn.version(),
            cuda=torch.version.cuda,
        )
    card = ceiling_of_card()
    rows.add(kind="data sheet", **(asdict(card) if card else {"card": None}))
    compute_in_float32()
    n = 512 if how.rehearse else 8192
    for precision, dtype in DTYPES.items():
        a = torch.randn(n, n, dtype=dtype, device=how.device)
        seconds, _ = timed(lambda: a @ a, 0.1 if how.rehearse else 0.5)  # noqa: B023
        rows.add(
            kind="product", precision=precision, tflop_per_second=2 * n**3 / seconds / 1e12, n=n
        )
    a = torch.empty(1 << (20 if how.rehearse else 30), dtype=torch.uint8, device=how.device)
    b = torch.empty_like(a)
    seconds, _ = timed(lambda: b.copy_(a), 0.1)
    rows.add(kind="copy", gb_per_second=2 * a.numel() / seconds / 1e9)
    for pinned in (False, True) if torch.cuda.is_available() else (False,):
        host = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=pinned)
        seconds, _ = timed(lambda: host.to(how.device, non_blocking=True), 0.1)  # noqa: B023
        rows.add(kind="to the device", pinned=pinned, gb_per_second=host.numel() / seconds / 1e9)


def trials(rows: Rows, how: Setting, kernel: str, kind: str) -> None:
    """Compare a kernel with its reference, in one type, with its default blocks."""
    target = Kernels(how.device, "triton").target
    results = run_trials([kernel], how.device, target, types=[getattr(torch, kind)])
    for result in results:
        rows.add(**asdict(result), passed=result.passed)


def compiling(rows: Rows, how: Setting, kernel: str) -> None:
    """Compile a kernel with all blocks that it is offered for the launches of networks."""
    begin = time.perf_counter()
    for name, spec in timing.compile_all([kernel]):
        rows.add(kernel=name, spec=spec, seconds=time.perf_counter() - begin)


def speeds(rows: Rows, how: Setting, kernel: str) -> None:
    """Time a kernel with all its blocks, and torch's operations on the same tensors."""
    if how.rehearse:
        _stand_in()
    for row in timing.timed([kernel]):
        best = row.best
        rows.add(
            kernel=row.kernel,
            spec=row.spec,
            seconds=best.seconds if best else None,
            default_seconds=row.tried[0].seconds,
            torch_seconds=row.torch.seconds,
            torch_failure=row.torch.failure,
            tflop_per_second=row.flops / best.seconds / 1e12 if best and best.seconds else None,
            share=row.roofline / best.seconds if row.roofline and best and best.seconds else None,
            blocks=str(best.blocks) if best and best.blocks else "",
            failures=row.failures,
        )


def _stand_in() -> None:
    """Let `timing` choose and count as on an H100, with times that are numbered, not measured."""
    number = iter(range(1, 1000))

    class Specs:
        def __init__(self, module: Any) -> None:
            self.module = module

        def specs(self, device: str) -> Iterator[Any]:
            yield from self.module.specs(device="meta")

    stand_ins: dict[str, Any] = {
        "require_gpu": lambda: None,
        "require_context": lambda after: None,
        "Kernels": lambda device, backend: type("Here", (), {"target": "sm_90"}),
        "named": lambda names: {name: Specs(KERNELS[name]) for name in names},
        "rated": lambda target, name: rated(target, "H100"),
        "median": lambda work, blocks=None: timing.Median(next(number) / 1e3, blocks=blocks),
    }
    for name, stand_in in stand_ins.items():
        setattr(timing, name, stand_in)
    timing.torch.cuda.get_device_name = lambda: "stand-in"


def engine(rows: Rows, how: Setting) -> None:
    """Run `tiny` through the torch engine, from and to host memory, as commands do.

    Compares with float32 on the CPU, tiled with untiled, and steps of one latent frame with steps
    of four, whose latents must be the same to rounding.
    """
    _small(how)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(shutil.copytree(BUILT_IN / "tiny", Path(folder) / "tiny"))
        for precision in ("fp32",) if how.rehearse else DTYPES:
            about = {"kind": "engine", "engine": "torch", "precision": precision}
            with recorded(rows, **about):
                facts = selftest.check_engine(bundle, "torch", precision, how.device)
                facts["streamed_difference"] = _streamed(bundle, precision, how)
                rows.add(**about, **facts)


def _small(how: Setting) -> None:
    if how.rehearse:
        selftest.SIDE, selftest.ROUNDS = 64, 2


def _streamed(bundle: Path, precision: str, how: Setting) -> float:
    """Return the largest difference of latents from steps of 1 and 4 frames, over the largest."""
    with open_codec(bundle, engine="torch", precision=precision, device=how.device) as codec:
        x = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 17, 64, 64)).astype(np.float32)
        one, four = codec.encode(x, k=1), codec.encode(x, k=4)
    return float(np.abs(one - four).max() / np.abs(one).max())


def volume(rows: Rows, how: Setting) -> None:
    """Pass a volume from one .npy file through `tiny` to another, read and written in threads."""
    shape = (33, 64, 64) if how.rehearse else (300, 512, 512)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random = np.random.default_rng(0)
        source = np.lib.format.open_memmap(folder / "ct.npy", "w+", np.int16, shape)
        for frame in source:  # HU of noise in a window of soft tissue
            frame[...] = random.normal(40, 30, shape[1:])
        source.flush()
        bundle = Path(shutil.copytree(BUILT_IN / "tiny", folder / "tiny"))
        for precision in ("fp32",) if how.rehearse else ("bf16", "fp16", "fp32"):
            options = {"engine": "torch", "precision": precision, "device": how.device}
            about = {"kind": "volume", "precision": precision, "shape": list(shape)}
            with recorded(rows, **about), open_codec(bundle, **options) as codec:
                seconds, again = (_through(codec, folder) for _ in range(2))
                rows.add(
                    **about,
                    kernels=getattr(codec.engine, "kernels", None),
                    first_seconds=seconds,  # compiling and tuning included
                    seconds=again,
                    slices_per_second=shape[0] / again,
                )


def _through(codec: Codec, folder: Path) -> float:
    """Encode and decode ct.npy to recon.npy; return the seconds."""
    begin = time.perf_counter()
    manifest = codec.manifest
    source = np.load(folder / "ct.npy", mmap_mode="r")
    shape = source.shape
    result = np.lib.format.open_memmap(folder / "recon.npy", "w+", np.int16, shape)
    plane = (shape[1] // manifest.geometry.spatial, shape[2] // manifest.geometry.spatial)
    encoder, decoder = (
        CausalStream(codec.engine, manifest, d, whole_grids(manifest, (d,), plane))
        for d in ("encode", "decode")
    )
    planned = steps(shape[0], "causal", 4, manifest.geometry)

    def read() -> Iterator[tuple[Any, Any]]:
        for step in planned:
            frames = source[slice(*step.slices)]
            missing = step.depth - len(frames)
            frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
            yield (
                step,
                to_model(frames, manifest.intensity, shape[1], shape[2], ClippingTally()),
            )

    def keep(item: tuple[Any, Any]) -> None:
        step, frames = item
        hu = to_hu(frames, manifest.intensity, shape[1], shape[2])
        result[slice(*step.slices)] = to_int16(hu)[: step.slices[1] - step.slices[0]]

    with Behind(keep) as writer:
        for step, x in ahead(read()):
            writer.put((step, decoder.run(encoder.run(x, step.first), step.first)))
    result.flush()
    return time.perf_counter() - begin


def tensorrt(rows: Rows, how: Setting) -> None:
    """Build TensorRT's engines of `tiny` for this GPU, and compare and time them."""
    from fvae_deploy.engines.devices import unfit

    if why := unfit("tensorrt"):
        rows.add(kind="tensorrt", left_out=why)
        return
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(shutil.copytree(BUILT_IN / "tiny", Path(folder) / "tiny"))
        built = selftest.build_engines(bundle, selftest.require_gpu())
        rows.add(kind="built", **built)
        for precision in DTYPES:
            about = {"kind": "engine", "engine": "tensorrt", "precision": precision}
            with recorded(rows, **about):
                facts = selftest.check_engine(bundle, "tensorrt", precision, how.device)
                rows.add(**about, **facts)
