"""Train `tiny-ldm`, the embedded latent diffusion model, on phantoms.

    python tools/train_tiny_ldm/data.py build/tiny_ldm/data
    torchrun --nproc-per-node 2 tools/train_tiny_ldm/train.py \
        --data build/tiny_ldm/data --out build/tiny_ldm

A process for every core; `python` in place of torchrun makes one that uses them all, slower.

Predicts velocity under a noise schedule that ends in pure noise (zero terminal SNR). Windows of 17
latent frames are cut anywhere in a causal stream. What reads the text learns faster, for it is
heard in few places of an image.

Noise has no mean in any frame. One channel carries most of the brightness, and a mean of 0.03
deviations in it, half of what chance gives 256 positions, is 12 HU of the whole slice.

The loss has two parts. One is the squared error at any time, weighted by min-SNR and by what an
error in a channel means in HU. The other is the mean HU of organs and slices (`brightness.py`) in
what the network makes of its own samples, half of them told of another contrast phase than the
window's. Noised from the truth, latents show how bright they are to be; sampled, they show what
the step before got wrong, and the network has to learn that there the mask is right.

Checkpoints every `--save-every` steps; running it again continues. The learning rate falls with
the time spent, to end when `--minutes` do. `build/tiny_ldm/tiny_ldm.safetensors` holds the
averaged weights, `build/tiny_ldm/log.jsonl` the log.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

# Big activations are allocated and freed every step; returning them to the system each
# time costs half the step in page faults, so keep them (must be set before libc starts).
if os.environ.get("MALLOC_MMAP_MAX_") is None and sys.platform == "linux":
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np
import torch
import torch.distributed as ranks
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).parent))
from brightness import Brightness, Voxels
from palette import OFFSET, palette
from words import TOKENS, tokenizer

from fvae_deploy.codec import open_codec
from fvae_deploy.export.generator import waves
from fvae_deploy.export.models.denoiser import DenoiserConfig, UNet
from fvae_deploy.export.models.lean_vae import STRIDE
from fvae_deploy.patient import PHASES

WINDOW = 17  # latent frames: 65 slices
UNET = {
    "in_channels": 32,
    "out_channels": 16,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2, 4],
    "channel_mult": [2, 3, 3],
    "num_head_channels": 32,
    "context_dim": 64,
    "transformer_depth": 1,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
GAMMA = 5.0  # of min-SNR
FLOOR = 0.5  # least weight of a time
TEXT = 10.0  # times the rate, for what reads the text
NAMES = {"unet.": "model.diffusion_model.", "text.": "text_transformer."}  # ours and theirs
PURE = SCHEDULE["num_train_timesteps"] - 1  # the time that is noise alone
STEPS = 8  # of the sampler
KINDS = ("noised", "first", "later")  # of steps, in turn: what the loss is of
WARM = 100  # steps
MEANS = 0.01  # weight of organs' and slices' means
SHARE = 0.7  # of the loss that counts a channel by what it means in HU


class Generator(nn.Module):
    """Denoiser and text encoder under the names of a published checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.words = tokenizer()
        self.unet = UNet(DenoiserConfig.read(UNET))
        self.text = BertModel(
            BertConfig(
                vocab_size=self.words.get_vocab_size(),
                hidden_size=UNET["context_dim"],
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=128,
                max_position_embeddings=TOKENS,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )

    def forward(self, x: Tensor, mask: Tensor, t: int, text: str) -> Tensor:
        """Predict the velocity of x [f, D, h, w] at time t."""
        coded = self.words.encode(text)
        ids, attended = (torch.tensor([v]) for v in (coded.ids, coded.attention_mask))
        context = self.text(input_ids=ids, attention_mask=attended).last_hidden_state[0]
        time_ = torch.from_numpy(waves(t, UNET["model_channels"]))
        result: Tensor = self.unet(x, mask, time_, *self.unet.keys_values(context))
        return result

    def published(self) -> dict[str, Tensor]:
        """Weights by the names of the published checkpoints."""
        return {
            NAMES[k[: k.index(".") + 1]] + k[k.index(".") + 1 :]: v.contiguous()
            for k, v in self.state_dict().items()
        }

    def begin_from(self, path: Path) -> dict[str, list[float]]:
        """Take published weights; returns the normalisation of latents that goes with them."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            weights = {
                ours + name.removeprefix(theirs): file.get_tensor(name).float()
                for ours, theirs in NAMES.items()
                for name in file.keys()  # noqa: SIM118
                if name.startswith(theirs)
            }
        self.load_state_dict(weights)
        return {kind: json.loads(metadata[kind]) for kind in ("latent_shift", "latent_scale")}

    def groups(self, rate: float) -> list[dict[str, object]]:
        """Parameters by their rates."""
        reads = {True: [], False: []}  # type: dict[bool, list[nn.Parameter]]
        for name, parameter in self.named_parameters():
            reads[name.startswith("text.") or ".attn2." in name].append(parameter)
        return [
            {"params": reads[False], "base": rate},
            {"params": reads[True], "base": TEXT * rate},
        ]


class Window(NamedTuple):
    """Latents [f, D, h, w] of a CT and its mask, the report, and what the voxels are."""

    z: Tensor
    mask: Tensor
    text: str
    voxels: Voxels


def phase_of(text: str) -> str | None:
    """Name the contrast phase that a text tells of."""
    return next((phase for phase in PHASES if phase in text.lower()), None)


class Data:
    """Windows of all patients in a folder, normalised by channel."""

    def __init__(self, folder: Path, moments: dict[str, list[float]] | None = None) -> None:
        self.patients = []
        for path in sorted(folder.glob("*.npz")):
            with np.load(path) as file:
                self.patients.append({name: file[name] for name in file})
        self.moments = moments or self._measured()
        self.phases = self._phases()

    def _measured(self) -> dict[str, list[float]]:
        """Mean and deviation of every channel, of latents and of masks."""
        found = {}
        for name, key in (("latent", "ct"), ("mask", "ill")):
            rows = [p[key][::3].astype(np.float32) for p in self.patients[:400]]
            every = np.concatenate(
                [r.transpose(1, 0, 2, 3).reshape(r.shape[1], -1) for r in rows], 1
            )
            found[f"{name}_shift"] = [round(float(v), 5) for v in every.mean(1)]
            found[f"{name}_scale"] = [round(float(1 / v), 5) for v in every.std(1)]
        return found

    def _phases(self) -> dict[str, dict[str, np.ndarray]]:
        """Mean HU under every label by contrast phase; from patient to patient they vary little."""
        totals = {
            phase: {name: np.zeros(256) for name in ("drawn", "reconstructed", "voxels")}
            for phase in PHASES
        }
        for patient in self.patients:
            total = totals[phase_of(str(patient["reports"][0]))]
            for name in ("drawn", "reconstructed"):
                total[name] += patient[name].sum(0)
            total["voxels"] += np.bincount(patient["labels"].ravel(), minlength=256)
        return {
            phase: {
                name: total[name] / total["voxels"].clip(1) for name in total if name != "voxels"
            }
            for phase, total in totals.items()
        }

    def retold(self, window: Window, random: np.random.Generator) -> Window | None:
        """Tell of another contrast phase; the window's sums are what they would be in it.

        None where the text tells of none.
        """
        phase = phase_of(window.text)
        if phase is None:
            return None
        other = str(random.choice([name for name in PHASES if name != phase]))
        start = window.text.lower().index(phase)
        text = window.text[:start] + other + window.text[start + len(phase) :]
        labels = window.voxels.labels.numpy()
        counts = np.stack([np.bincount(plane.ravel(), minlength=256) for plane in labels])
        drawn, reconstructed = (
            torch.from_numpy(
                (counts * (self.phases[other][name] - self.phases[phase][name])).astype(np.float32)
            )
            + getattr(window.voxels, name)
            for name in ("drawn", "reconstructed")
        )
        voxels = window.voxels._replace(drawn=drawn, reconstructed=reconstructed)
        return window._replace(text=text, voxels=voxels)

    def gains(self) -> Tensor:
        """HU (root mean square) that noise of one deviation in each channel makes of a volume."""
        random = np.random.default_rng(0)
        total = np.zeros(len(self.moments["latent_scale"]))
        with open_codec("tiny") as codec:
            for patient in self.patients[:4]:
                z = patient["ct"][:9].astype(np.float32).transpose(1, 0, 2, 3)
                clean = codec.decode(z)
                for channel, scale in enumerate(self.moments["latent_scale"]):
                    changed = z.copy()
                    changed[channel] += random.standard_normal(z[0].shape, np.float32) / scale
                    total[channel] += np.square(2000 * (codec.decode(changed) - clean)).mean() / 4
        return torch.from_numpy(np.sqrt(total)).float()

    def normal(self, kind: str, latent: np.ndarray) -> Tensor:
        """Bring a window [f, D, h, w] to mean 0 and deviation 1 in every channel."""
        shift, scale = (
            torch.tensor(self.moments[f"{kind}_{what}"])[:, None, None]
            for what in ("shift", "scale")
        )
        return (torch.from_numpy(latent.astype(np.float32)) - shift) * scale

    def window(self, random: np.random.Generator) -> Window:
        """Draw a window; half of them begin a volume."""
        patient = self.patients[int(random.integers(len(self.patients)))]
        spare = len(patient["ct"]) - WINDOW
        start = int(random.integers(spare + 1)) if spare and random.random() < 0.7 else 0
        cut = slice(start, start + WINDOW)
        mask = patient["ill" if random.random() < 0.65 else "organs"][cut]
        text = str(random.choice(patient["reports"]))
        sentences = text.split(". ")
        if random.random() < 0.15:
            text = ". ".join(sentences[:-1]) + "."  # the phase left out
        if random.random() < 0.3:
            text = text.rstrip(".").lower()
        if random.random() < 0.05:
            text = ""
        slices = slice(max(0, STRIDE * start - STRIDE + 1), STRIDE * (start + WINDOW - 1) + 1)
        names = ("labels", "drawn", "reconstructed")
        voxels = (torch.from_numpy(patient[name][slices]) for name in names)
        return Window(
            self.normal("latent", patient["ct"][cut]),
            self.normal("mask", mask),
            text,
            Voxels(*voxels, start == 0),
        )


def centred_noise(z: Tensor, seeded: torch.Generator) -> Tensor:
    """Draw unit noise in the shape of z, of mean 0 in every channel of every frame."""
    noise = torch.randn(z.shape, generator=seeded)
    return noise - noise.mean((2, 3), keepdim=True)


def clean(scheduler: DDIMScheduler, x: Tensor, velocity: Tensor, t: int) -> Tensor:
    """Latents without the noise that the velocity tells of."""
    signal = scheduler.alphas_cumprod[t]
    return signal.sqrt() * x - (1 - signal).sqrt() * velocity


def sampled(
    model: Generator, scheduler: DDIMScheduler, window: Window, noise: Tensor, index: int
) -> Tensor:
    """Take the sampler's steps up to `index`, then predict; only that has a gradient."""
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps[:index]:
            velocity = model(x, window.mask, int(t), window.text)
            x = scheduler.step(velocity, t, x).prev_sample
    t = int(scheduler.timesteps[index])
    return clean(scheduler, x, model(x, window.mask, t, window.text), t)


def loss_at(
    model: Generator,
    scheduler: DDIMScheduler,
    window: Window,
    t: int,
    noise: Tensor,
    emphasis: Tensor,
) -> Tensor:
    """Weighted squared error of the velocity of one window at time t."""
    time_ = torch.tensor([t])
    x = scheduler.add_noise(window.z, noise, time_)
    wanted = scheduler.get_velocity(window.z, noise, time_)
    found = model(x, window.mask, t, window.text)
    signal = float(scheduler.alphas_cumprod[t])
    # Min-SNR, signal / (1 - signal), gives pure noise no weight; but what is decided there,
    # anatomy and brightness, stays.
    weight = max(min(signal, GAMMA * (1 - signal)), FLOOR)
    return weight * (emphasis[:, None, None] * (found - wanted).square()).mean()


@torch.no_grad()
def summed(model: Generator, took: Tensor) -> Tensor:
    """Sum gradients over all processes, and the time that the first one took."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    flat = torch.cat([g.reshape(-1) for g in gradients] + [took])
    ranks.all_reduce(flat)
    parts = flat.split([g.numel() for g in gradients] + [1])
    for parameter, part in zip(model.parameters(), parts[:-1], strict=True):
        parameter.grad = part.view_as(parameter)
    return parts[-1]


@torch.no_grad()
def judge(
    model: Generator, scheduler: DDIMScheduler, data: Data, gains: Tensor, brightness: Brightness
) -> dict[str, float]:
    """Errors in HU of held-out windows: of latents at four times, of samples' means."""
    errors = dict[str, float]()
    for t in (PURE, 700, 400, 100):
        random, total = np.random.default_rng(5), 0.0
        seeded = torch.Generator().manual_seed(5)
        for _ in range(8):
            z, mask, text, _ = data.window(random)
            noise = centred_noise(z, seeded)
            x = scheduler.add_noise(z, noise, torch.tensor([t]))
            error = clean(scheduler, x, model(x, mask, t, text), t) - z
            total += (error * gains[:, None, None]).square().mean((0, 2, 3)).sum().item() / 8
        errors[f"latents at {t}"] = math.sqrt(total)
    organs, slices = list[Tensor](), list[Tensor]()
    random, seeded = np.random.default_rng(5), torch.Generator().manual_seed(5)
    for _ in range(12):
        window = data.window(random)
        noise = centred_noise(window.z, seeded)
        z = sampled(model, scheduler, window, noise, STEPS - 1)
        off = brightness.off(z, window.voxels)
        organs.append(off[0].abs())
        slices.append(off[1].abs())
    every = torch.cat(organs)
    errors |= {
        "organs": every.mean().item(),
        "organs beyond 40": (every > 40).float().mean().item(),
        "slices": torch.cat(slices).mean().item(),
        "worst slice": torch.stack([off.max() for off in slices]).mean().item(),
    }
    return {name: round(value, 3) for name, value in errors.items()}


def main() -> None:
    """Train, resuming from a checkpoint when there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=110, help="in all, stops not counted; the rate falls to it"
    )
    parser.add_argument("--windows", type=int, default=2, help="in a step")
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="published weights to begin from")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model, average = Generator(), Generator()
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(STEPS)
    data = Data(options.data)
    kept_out = options.out / "held_out"
    held_out = Data(kept_out, data.moments) if kept_out.is_dir() else data
    if options.weights:
        data.moments |= model.begin_from(options.weights)
    average.load_state_dict(model.state_dict())
    for network in (model, average):
        network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.groups(options.rate), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    step, minutes, saved = 0, 0.0, options.out / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, minutes = state["step"], state["minutes"]
        data.moments = held_out.moments = state["moments"]
    brightness = Brightness(data.moments["latent_shift"], data.moments["latent_scale"])
    gains = data.gains()
    energy = gains.square() / gains.square().mean()
    emphasis = SHARE * energy + (1 - SHARE)
    rank, world = 0, 1
    if "WORLD_SIZE" in os.environ:
        ranks.init_process_group("gloo")
        rank, world = ranks.get_rank(), ranks.get_world_size()
    random = np.random.default_rng([options.seed, step, rank])
    seeded = torch.Generator().manual_seed(options.seed + step + 1_000_003 * rank)
    average.eval()

    def log(**row: object) -> None:
        print(json.dumps(row), flush=True)
        with (options.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    if rank == 0:
        log(
            step=step,
            patients=len(data.patients),
            parameters=sum(p.numel() for p in model.parameters()),
            held_out_hu=judge(average, scheduler, held_out, gains, brightness),
        )
    begin, losses = time.monotonic(), defaultdict[str, list[float]](list)
    began = begin
    while minutes < options.minutes:
        progress = minutes / options.minutes
        warm = min(1.0, (step + 1) / WARM)
        falling = warm * (0.5 * (1 + math.cos(math.pi * progress)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * falling
        optimizer.zero_grad(set_to_none=True)
        for _ in range(options.windows // world):
            window = data.window(random)
            # All processes of one kind, and as many steps, that none waits for another.
            kind, turn = KINDS[step % len(KINDS)], step // len(KINDS)
            if kind == "noised":
                t = PURE if random.random() < 0.25 else int(random.integers(1000))
                noise = centred_noise(window.z, seeded)
                loss = loss_at(model, scheduler, window, t, noise, emphasis)
            else:
                if random.random() < 0.5:
                    window = data.retold(window, random) or window
                index = 0 if kind == "first" else 1 + turn % (STEPS - 1)
                noise = centred_noise(window.z, seeded)
                z = sampled(model, scheduler, window, noise, index)
                loss = MEANS * brightness.loss(z, window.voxels)
            (loss / options.windows).backward()
            losses[kind].append(loss.item())
        # By the first process's clock, which stands still while it judges and saves.
        now = time.monotonic()
        took, began = torch.tensor([0.0 if rank else (now - began) / 60]), now
        if world > 1:
            took = summed(model, took)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            decay = min(0.995, (1 + step) / (10 + step))
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        minutes += took.item()
        if rank == 0 and (step % options.save_every == 0 or minutes >= options.minutes):
            facts = {
                "unet_config": UNET,
                "text_config": model.text.config.to_diff_dict(),
                "tokenizer": json.loads(model.words.to_str()),
                "schedule": SCHEDULE,
                "centred_noise": True,
                "palette": {str(label): hu for label, hu in palette().items()},
                "finding_offset": OFFSET,
                **data.moments,
            }
            metadata = {name: json.dumps(value) for name, value in facts.items()}
            save_file(average.published(), options.out / "tiny_ldm.safetensors", metadata)
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "minutes": minutes,
                "moments": data.moments,
            }
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
            log(
                step=step,
                minutes=round(minutes, 1),
                loss={kind: round(sum(of) / len(of), 5) for kind, of in losses.items()},
                held_out_hu=judge(average, scheduler, held_out, gains, brightness),
                steps_per_second=round(
                    sum(map(len, losses.values()))
                    * world
                    / options.windows
                    / (time.monotonic() - begin),
                    3,
                ),
            )
            begin, losses = time.monotonic(), defaultdict[str, list[float]](list)
            began = begin


if __name__ == "__main__":
    main()
