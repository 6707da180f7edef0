"""Jobs of `gpu.py` on whole networks: their speed, memory and errors, and those of their peers."""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_chain import (
    DIRECTIONS,
    Chain,
    Graphed,
    Stage,
    captured,
    chain_of,
    channels_last,
    clip_of,
    errors,
    flops,
    kernels_of,
    model_of,
    peak,
    precisions,
    seconds_of,
    share,
    side_of,
    stream,
    wan_of,
)
from gpu_work import DTYPES, recorded, synchronize, timed
from random_weights import UNETS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fvae_deploy.export.models.denoiser import DenoiserConfig, UNet
from fvae_deploy.export.models.family import Model
from fvae_deploy.kernels.dispatch import compute_in_float32

if TYPE_CHECKING:
    from gpu import Setting
    from gpu_job import Rows

SMALL_UNET = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2]}


@torch.inference_mode()
def network(rows: Rows, how: Setting, name: str) -> None:
    """Time a VAE on kernels and on torch's operations, with and without a CUDA graph.

    Errors are against torch's operations in float64, on slices of 128x128; in float32, if the GPU
    cannot compute the convolutions in float64.
    """
    compute_in_float32()
    model, small = model_of(name, how), side_of(how) if how.rehearse else 128
    exact: dict[str, list[Tensor]] = {}
    for kind in (torch.float64, torch.float32):
        with recorded(rows, network=name, form=f"reference in {kind}"):
            for direction in DIRECTIONS:
                clip = clip_of(model, direction, small, 3, how, kind)
                exact[direction] = stream(chain_of(model, direction, how, kind, None), clip)
            break
    work = {direction: flops(name, direction, how) for direction in DIRECTIONS}
    for precision in precisions(how):
        for form in ("kernels", "torch"):
            for direction in DIRECTIONS:
                facts: dict[str, Any] = {"network": name, "form": form, "precision": precision}
                facts |= {"direction": direction}
                with recorded(rows, **facts):
                    kernels = kernels_of(name, how) if form == "kernels" else None
                    chain = chain_of(model, direction, how, DTYPES[precision], kernels)
                    clip = clip_of(model, direction, small, 3, how, DTYPES[precision])
                    more = errors(stream(chain, clip), exact[direction])
                    clip = clip_of(model, direction, side_of(how), 3, how, DTYPES[precision])
                    for row in _timed_steps(chain, clip, work[direction], model, how):
                        rate = share(row["flop_per_second"], precision)
                        rows.add(**facts, **more, **row, share=rate)


def _timed_steps(
    chain: Chain, clip: list[Tensor], work: float, model: Model, how: Setting
) -> Iterator[dict[str, Any]]:
    """Time steps of a chain, launched one by one and as a CUDA graph."""
    expected = stream(chain, clip)[1:]
    for graphed in (False, True):
        row: dict[str, Any] = {"cuda_graph": graphed}
        with peak() as facts:
            chain.first(clip[0])
            runner = Graphed(chain, clip[1]) if graphed else chain
            if graphed:
                results = [runner.step(x).clone() for x in clip[1:]]
                row["same_bits"] = all(map(torch.equal, results, expected))
            seconds, spread = timed(lambda: runner.step(clip[1]), seconds_of(how))  # noqa: B023
        row |= {"seconds": seconds, "spread": spread, **facts}
        row["slices_per_second"] = model.geometry.temporal / seconds
        yield row | {"flop_per_second": work / seconds, "gflop": work / 1e9}


@torch.inference_mode()
def compiling(rows: Rows, how: Setting, name: str, precision: str) -> None:
    """Compile the kernels of a network, by two steps on slices of full size."""
    if precision not in precisions(how):
        return
    model = model_of(name, how)
    for direction in DIRECTIONS:
        begin, dtype = time.perf_counter(), DTYPES[precision]
        chain = chain_of(model, direction, how, dtype, kernels_of(name, how))
        stream(chain, clip_of(model, direction, side_of(how), 2, how, dtype))
        synchronize()
        seconds = time.perf_counter() - begin
        rows.add(network=name, precision=precision, direction=direction, seconds=seconds)


@torch.inference_mode()
def tuned(rows: Rows, how: Setting, name: str) -> None:
    """Time a VAE on kernels whose blocks the tuner has measured."""
    model, precision = model_of(name, how), precisions(how)[0]
    with tempfile.TemporaryDirectory() as folder:
        for direction in DIRECTIONS:
            facts: dict[str, Any] = {"network": name, "form": "kernels, tuned"}
            facts |= {"precision": precision, "direction": direction}
            with recorded(rows, **facts):
                begin, work = time.perf_counter(), flops(name, direction, how)
                kernels = kernels_of(name, how, Path(folder))
                chain = chain_of(model, direction, how, DTYPES[precision], kernels)
                clip = clip_of(model, direction, side_of(how), 3, how, DTYPES[precision])
                stream(chain, clip)
                synchronize()
                facts["tuning_seconds"] = time.perf_counter() - begin
                for row in _timed_steps(chain, clip, work, model, how):
                    rows.add(**facts, **row, share=share(row["flop_per_second"], precision))


@torch.inference_mode()
def by_compiler(rows: Rows, how: Setting, name: str) -> None:
    """Time torch's operations after torch.compile; compiling is timed apart."""
    model, precision = model_of(name, how), precisions(how)[0]
    options = {"backend": "eager"} if how.rehearse else {"mode": "max-autotune"}

    def cloned(stage: Any) -> Stage:  # its CUDA graphs overwrite the results of the last call
        return lambda *inputs: tuple(value.clone() for value in stage(*inputs))

    for direction in DIRECTIONS:
        facts: dict[str, Any] = {"network": name, "form": "torch.compile"}
        facts |= {"precision": precision, "direction": direction}
        with recorded(rows, **facts):
            stages = chain_of(model, direction, how, DTYPES[precision], None).stages
            chain = Chain([cloned(torch.compile(stage, **options)) for stage in stages])
            clip = clip_of(model, direction, side_of(how), 2, how, DTYPES[precision])
            begin = time.perf_counter()
            stream(chain, clip)
            synchronize()
            facts["compile_seconds"] = time.perf_counter() - begin
            with peak() as memory:
                seconds, spread = timed(lambda: chain.step(clip[1]), seconds_of(how))  # noqa: B023
            rate = flops(name, direction, how) / seconds
            speed = {"slices_per_second": model.geometry.temporal / seconds, "seconds": seconds}
            speed |= {"spread": spread, "flop_per_second": rate}
            rows.add(**facts, **speed, share=share(rate, precision), **memory)


@torch.inference_mode()
def tiled(rows: Rows, how: Setting, name: str) -> None:
    """Compare a quarter of a slice, computed with a margin of two quarters, with the whole slice.

    That is more than the reach of LeanVAE, and of the outermost stages of Wan; its inner stages
    need the whole plane.
    """
    compute_in_float32()
    model = model_of(name, how)
    side = 64 if how.rehearse else 512
    for precision in precisions(how):
        for form in ("kernels", "torch"):
            for direction in DIRECTIONS:
                facts: dict[str, Any] = {"kind": "tiled", "network": name, "form": form}
                facts |= {"precision": precision, "direction": direction}
                with recorded(rows, **facts):
                    kernels = kernels_of(name, how) if form == "kernels" else None
                    chain = chain_of(model, direction, how, DTYPES[precision], kernels)
                    clip = clip_of(model, direction, side, 3, how, DTYPES[precision])
                    whole, part = _tile(chain, clip, direction, local=name == "lean16")
                    same = all(map(torch.equal, part, whole))
                    rows.add(**facts, same_bits=same, **errors(part, whole))


def _tile(
    chain: Chain, clip: list[Tensor], direction: str, local: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the left quarter of the results of a clip, and of three quarters of the clip.

    All stages of a local network run, otherwise only the outermost.
    """
    stages = chain.stages
    if not local and direction == "decode":
        clip, stages = stream(Chain(stages[:-1]), clip), stages[-1:]
    elif not local:
        stages = stages[:1]
    width = clip[0].shape[-1]
    part = [x[..., : width // 4 * 3].contiguous() for x in clip]
    whole, results = stream(Chain(stages), clip), stream(Chain(stages), part)
    kept = [y.shape[-1] // 4 for y in whole]
    return (
        [y[..., :n] for y, n in zip(whole, kept, strict=True)],
        [y[..., :n] for y, n in zip(results, kept, strict=True)],
    )


@torch.inference_mode()
def denoiser(rows: Rows, how: Setting, name: str) -> None:
    """Time a step of the generator's U-Net on torch's operations, and its error against float64."""
    compute_in_float32()
    config = UNETS[name] | (SMALL_UNET if how.rehearse else {})
    plane = 8 if how.rehearse else 64 if name == "unet482" else 32
    frames, tokens = (3, 8) if how.rehearse else (17, 512)  # of the published window and text
    torch.manual_seed(0)
    with torch.device(how.device):
        unet = UNet(DenoiserConfig.read(config)).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    shapes = [(frames, 16, plane, plane)] * 2 + [(1, config["model_channels"])]
    inputs = [torch.randn(shape, generator=random) for shape in shapes]
    context = torch.randn((tokens, config["context_dim"]), generator=random)
    unet.fold()

    def in_type(dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
        own = copy.deepcopy(unet).to(how.device, dtype)
        text = own.keys_values(context.to(how.device, dtype))
        return own, [*(x.to(how.device, dtype) for x in inputs), *text]

    own, given = in_type(torch.float32)
    with FlopCounterMode(display=False) as counter:
        own(*given)
    work = float(counter.get_total_flops())
    own, given = in_type(torch.float64)
    exact = own(*given)
    for precision in precisions(how):
        for graphed in (False, True):
            facts: dict[str, Any] = {"network": name, "form": "torch", "precision": precision}
            facts |= {"cuda_graph": graphed}
            with recorded(rows, **facts):
                own, given = in_type(DTYPES[precision])
                more = errors([own(*given)], [exact])
                run: Callable[[], Any] = functools.partial(own, *given)
                with peak() as memory:
                    seconds, spread = timed(captured(run) if graphed else run, seconds_of(how))
                speed = {"seconds": seconds, "spread": spread, "steps_per_second": 1 / seconds}
                speed |= {"flop_per_second": work / seconds, "gflop": work / 1e9}
                rate = share(work / seconds, precision)
                rows.add(**facts, **more, **speed, share=rate, **memory)


@torch.inference_mode()
def peer(rows: Rows, how: Setting, name: str) -> None:
    """Time diffusers' own network on 17 slices at once, without and with its tiling."""
    precision = precisions(how)[0]
    dtype, side = DTYPES[precision], side_of(how)
    vae = wan_of(name, how).eval().requires_grad_(False).to(how.device, dtype)
    channels_last(vae)
    slices = 5 if how.rehearse else 17
    x = torch.randn(1, 3, slices, side, side, device=how.device, dtype=dtype).clamp(-1, 1)
    z = vae.encode(x).latent_dist.mean
    runs = {"encode": lambda: vae.encode(x), "decode": lambda: vae.decode(z)}
    for form in ("diffusers", "diffusers, tiling"):
        for direction, run in runs.items():
            facts = {"network": name, "form": form, "precision": precision, "direction": direction}
            with recorded(rows, **facts):
                with peak() as memory:
                    seconds, spread = timed(run, seconds_of(how))
                speed = {"slices_per_second": slices / seconds, "seconds": seconds}
                rows.add(**facts, **speed, spread=spread, **memory)
        vae.enable_tiling()
