"""Networks of published size, cut into stages that stay on one device with their states.

A `Chain` runs the stages of one direction with all maps and states on the device. So it measures
the network itself: the torch engine also copies to and from host memory (`gpu_work.engine`).
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_work import ceiling_of_card
from random_weights import build
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fvae_deploy.export.models.family import ON_KERNELS, Model
from fvae_deploy.export.models.lean_vae import LeanVAE, LeanVAEConfig
from fvae_deploy.export.models.lean_vae_parts import lean_vae_model
from fvae_deploy.kernels.dispatch import Kernels

if TYPE_CHECKING:
    from gpu import Setting

PUBLISHED = {"lean16": "leanvae16", "wan21": "wan2.1", "wan22": "wan2.2"}
SMALL_LEAN = LeanVAEConfig(32, 4, 1, 1, 8, 24, 1, 1)
SMALL_WAN: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
DIRECTIONS = ("encode", "decode")
Stage = Callable[..., tuple[Tensor, ...]]


class Chain:
    """The stages of one direction, with their states on the device."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.states: list[list[Tensor]] = []

    def first(self, x: Tensor) -> Tensor:
        """Start a stream with its first slice or latent frame [1, C, 1, H, W]."""
        self.states = []
        for stage in self.stages:
            x, *state = stage(x)
            self.states.append(state)
        return x

    def step(self, x: Tensor) -> Tensor:
        """Advance by one latent frame: x [1, C, 4 or 1, H, W]."""
        for i, stage in enumerate(self.stages):
            x, *self.states[i] = stage(x, *self.states[i])
        return x


class Graphed:
    """Steps of a chain as one CUDA graph; on a CPU, the same function is called instead."""

    def __init__(self, chain: Chain, x: Tensor) -> None:
        """Record a step on inputs like x, after `chain.first`; no state advances."""
        self._stages, self._x, self._y = chain.stages, x.clone(), x
        self._held = [[state.clone() for state in states] for states in chain.states]
        self._replay = captured(self._advance)
        for held, states in zip(self._held, chain.states, strict=True):
            for state, value in zip(held, states, strict=True):
                state.copy_(value)

    def step(self, x: Tensor) -> Tensor:
        """Advance by one latent frame; the result is valid until the next step."""
        self._x.copy_(x)
        self._replay()
        return self._y

    def _advance(self) -> None:
        y = self._x
        for stage, held in zip(self._stages, self._held, strict=True):
            y, *after = stage(y, *held)
            for state, new in zip(held, after, strict=True):
                state.copy_(new)
        self._y = y


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Record a function in a CUDA graph and return its replay; without a GPU, the function."""
    if not torch.cuda.is_available():
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate in the first runs, which a graph must not
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], Any] = graph.replay
    return replay


def model_of(name: str, how: Setting) -> Model:
    """Return a network cut into stages, for gray slices."""
    if name == "lean16":
        network = LeanVAE(SMALL_LEAN) if how.rehearse else build(PUBLISHED[name])
        assert isinstance(network, LeanVAE)
        return lean_vae_model(network.eval().requires_grad_(False), 1)
    from fvae_deploy.export.models.wan import wan_model

    return wan_model(wan_of(name, how).eval().requires_grad_(False), 1)


def wan_of(name: str, how: Setting) -> Any:
    """Return diffusers' network; raises ModuleNotFoundError without diffusers."""
    if not how.rehearse:
        return build(PUBLISHED[name])
    from diffusers import AutoencoderKLWan
    from random_weights import WAN22

    wide = SMALL_WAN | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    more = WAN22 | wide | {"decoder_base_dim": 8} if name == "wan22" else wide
    return AutoencoderKLWan(**more)


def kernels_of(name: str, how: Setting, tuning: Path | None = None) -> Kernels:
    """Return the kernels for a network; a rehearsal has their references for Wan, to be in time."""
    reference = how.rehearse and name != "lean16"
    return Kernels(how.device, "reference" if reference else "triton", tuning)


def side_of(how: Setting) -> int:
    """Return the pixels along a slice."""
    return 32 if how.rehearse else 512


def chain_of(
    model: Model, direction: str, how: Setting, dtype: torch.dtype, kernels: Kernels | None
) -> Chain:
    """Return one direction with weights of its own, on kernels or on torch's operations.

    With torch's operations, weights are channels last, as in the torch engine.
    """
    stages: list[Stage] = []
    for name, stage in model.stages.items():
        if not name.startswith(direction):
            continue
        own = copy.deepcopy(stage).to(how.device, dtype).eval()
        if kernels is None:
            channels_last(own)
        else:
            family = ON_KERNELS[model.network.family]
            module = importlib.import_module(f"fvae_deploy.export.models.{family}")
            own = module.on_kernels(own, kernels)
        stages.append(own)
    return Chain(stages)


def channels_last(network: nn.Module) -> None:
    """Store the weights of convolutions channels last, in place, as the torch engine does."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in network.parameters():
        if weight.ndim in formats:
            weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])


def clip_of(
    model: Model, direction: str, side: int, count: int, how: Setting, dtype: torch.dtype
) -> list[Tensor]:
    """Return the inputs of a first step and of later ones: noise like slices, or latents."""
    g = model.geometry
    generator = torch.Generator().manual_seed(1)
    encode = direction == "encode"
    channels, cells = (1, side) if encode else (g.latent_channels, side // g.spatial)
    depths = [1, *[g.temporal if encode else 1] * (count - 1)]
    shapes = [(1, channels, depth, cells, cells) for depth in depths]
    noise = [torch.randn(shape, generator=generator) for shape in shapes]
    scale = (model.intensity.model_max - model.intensity.model_min) / 4 if encode else 1.0
    return [(scale * x).to(how.device, dtype) for x in noise]


def flops(name: str, direction: str, how: Setting) -> float:
    """Return the operations of a step, two per multiply-add, counted without computing."""
    with torch.device("meta"):
        model = model_of(name, how)
    stages = [stage for key, stage in model.stages.items() if key.startswith(direction)]
    chain, meta = Chain(list(stages)), dataclasses.replace(how, device="meta")
    first, later = clip_of(model, direction, side_of(how), 2, meta, torch.float32)
    chain.first(first)
    with FlopCounterMode(display=False) as counter:
        chain.step(later)
    return float(counter.get_total_flops())


def share(rate: float | None, precision: str) -> float | None:
    """Return a rate in FLOP/s over that of the card's data sheet; None for an unknown card."""
    card = ceiling_of_card()
    if card is None or rate is None:
        return None
    return rate / 1e12 / (card.single if precision == "fp32" else card.half)


@contextmanager
def peak() -> Iterator[dict[str, float | None]]:
    """Measure the largest GPU memory of torch while the block runs, weights included."""
    facts: dict[str, float | None] = {"peak_mib": None}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield facts
    if torch.cuda.is_available():
        facts["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20


def precisions(how: Setting) -> tuple[str, ...]:
    """Return the precisions to measure, the most important first."""
    return ("fp32",) if how.rehearse else ("bf16",) if how.quick else ("bf16", "fp16", "fp32")


def seconds_of(how: Setting) -> float:
    """Return for how long each row is timed."""
    return 0.0 if how.rehearse else 0.5 if how.quick else 1.0


def stream(chain: Chain, clip: list[Tensor]) -> list[Tensor]:
    """Run a whole clip and return copies of the results."""
    return [chain.first(clip[0]).clone(), *(chain.step(x).clone() for x in clip[1:])]


def errors(results: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Return mean and largest error, in standard deviations of the expected values."""
    a, b = (torch.cat([x.double().flatten() for x in each]) for each in (results, expected))
    difference = (a - b).abs() / b.std()
    return {"error_mean": float(difference.mean()), "error_max": float(difference.max())}
