"""Train `tiny-ldm`, the built-in latent diffusion model, on phantoms.

    python tools/train_tiny_ldm/data.py build/tiny_ldm/data
    torchrun --nproc-per-node 2 tools/train_tiny_ldm/train.py \
        --data build/tiny_ldm/data --out build/tiny_ldm

torchrun starts one process per core. With plain `python` there is one process, which uses all
cores; it is slower.

The network predicts velocity under a noise schedule that ends in pure noise (zero terminal SNR).
Windows of 17 latent frames are cut anywhere in a causal stream. The layers that read the text have
a higher learning rate, because the text affects only a small part of an image.

Noise has no mean in any frame. One channel carries most of the brightness. In it a mean of 0.03
standard deviations, half of what chance gives for 256 positions, is 12 HU in the whole slice.

The loss has two parts. The first is the squared error at any time, weighted by min-SNR and by the
effect of an error in each channel in HU. The second compares the mean HU of organs and slices
(`brightness.py`) in samples of the network itself; half of them get the text of another contrast
phase. A noised true latent reveals how bright the result should be. A sample contains the errors of
the steps before, so there the network has to learn that the mask is right.

Saves a checkpoint every `--save-every` steps; the same command continues from it. The learning rate
decays with the training time and ends after `--minutes`. `build/tiny_ldm/tiny_ldm.safetensors`
contains the averaged weights, `build/tiny_ldm/log.jsonl` is the log.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Large activations are allocated and freed in every step. Returning them to the system each time
# costs half of the step in page faults, so they are kept. This must be set before libc starts.
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
from brightness import OUTSIDE, Brightness, Voxels
from palette import OFFSET, palette
from words import TOKENS, tokenizer

from fvae_deploy.export.generator import timestep_embedding
from fvae_deploy.export.models.denoiser import DenoiserConfig, UNet
from fvae_deploy.export.models.lean_vae import STRIDE
from fvae_deploy.phantom.patient import PHASES
from fvae_deploy.stream.codec import open_codec

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
FLOOR = 0.5  # minimum weight of a time
TEXT = 4.0  # factor on the rate of the layers that read the text
NAMES = {"unet.": "model.diffusion_model.", "text.": "text_transformer."}  # here: published
PURE = SCHEDULE["num_train_timesteps"] - 1  # the time of pure noise
STEPS = 8  # sampling steps
# Steps, in turn: a noised true latent, or a sample at the sampler's first or a later step.
KINDS = ("noised", "first", "later")
WARM = 100  # warm-up steps
MEANS = 0.02  # weight of the loss on means of organs and slices
SHARE = 0.7  # share of the loss in which a channel is weighted by its effect in HU
DECAY = 0.998  # decay of the averaged weights


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

    def forward(
        self, x: Tensor, mask: Tensor, times: Sequence[int], texts: Sequence[str]
    ) -> Tensor:
        """Predict the velocity of x [B, D, f, h, w], with one time per window."""
        coded = self.words.encode_batch(list(texts))
        ids, attended = (
            torch.tensor(rows, device=x.device)
            for rows in ([c.ids for c in coded], [c.attention_mask for c in coded])
        )
        context = self.text(input_ids=ids, attention_mask=attended).last_hidden_state
        keys_values = [
            tensor.repeat_interleave(x.shape[2], 0)
            for layer in self.unet.text_attention
            for tensor in layer.keys_values(context)
        ]
        waves = np.concatenate([timestep_embedding(t, UNET["model_channels"]) for t in times])
        embedding = self.unet.time_embed(torch.from_numpy(waves).to(x.device))
        result: Tensor = self.unet.predict(torch.cat([x, mask], dim=1), embedding, keys_values)
        return result

    def published(self) -> dict[str, Tensor]:
        """Return weights under the names of the published checkpoints."""
        return {
            NAMES[k[: k.index(".") + 1]] + k[k.index(".") + 1 :]: v.contiguous()
            for k, v in self.state_dict().items()
        }

    def begin_from(self, path: Path) -> dict[str, list[float]]:
        """Load published weights; return the normalisation of latents that belongs to them."""
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
        """Return the parameters in groups with their learning rates."""
        reads = {True: [], False: []}  # type: dict[bool, list[nn.Parameter]]
        for name, parameter in self.named_parameters():
            reads[name.startswith("text.") or ".attn2." in name].append(parameter)
        return [
            {"params": reads[False], "base": rate},
            {"params": reads[True], "base": TEXT * rate},
        ]


class Windows(NamedTuple):
    """Latents [B, D, f, h, w] of CTs and of their masks, the reports, and the voxels."""

    z: Tensor
    mask: Tensor
    texts: list[str]
    voxels: Voxels


def phase_of(text: str) -> str | None:
    """Return the contrast phase that a text names, or None."""
    return next((phase for phase in PHASES if phase in text.lower()), None)


class Data:
    """Windows of all patients in a folder, normalised by channel."""

    def __init__(
        self, folder: Path, device: torch.device, moments: dict[str, list[float]] | None = None
    ) -> None:
        self.device = device
        self.reports: list[list[str]] = []
        self.patients: list[dict[str, Tensor]] = []
        for path in sorted(folder.glob("*.npz")):
            with np.load(path) as file:
                arrays = {name: file[name] for name in file}
            self.reports.append([str(report) for report in arrays.pop("reports")])
            self.patients.append(self._padded(arrays))
        self.moments = moments or self._measured()
        self.phases = self._phases()

    def _padded(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Add the slices that the first latent frame lacks; return tensors on the device."""
        for name in ("labels", "counts", "drawn", "reconstructed"):
            lacking = ((STRIDE - 1, 0), *[(0, 0)] * (arrays[name].ndim - 1))
            blank = OUTSIDE if name == "labels" else 0
            arrays[name] = np.pad(arrays[name], lacking, constant_values=blank)
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    def _measured(self) -> dict[str, list[float]]:
        """Return shift and scale of every channel, of latents and of masks."""
        moments = {}
        for name, key in (("latent", "ct"), ("mask", "ill")):
            rows = [p[key][::3].float() for p in self.patients[:400]]
            every = torch.cat([r.transpose(0, 1).flatten(1) for r in rows], 1)
            moments[f"{name}_shift"] = [round(float(v), 5) for v in every.mean(1)]
            moments[f"{name}_scale"] = [round(float(1 / v), 5) for v in every.std(1)]
        return moments

    def _phases(self) -> dict[str, dict[str, Tensor]]:
        """Return the mean HU of every label by contrast phase; patients differ little."""
        names = ("drawn", "reconstructed", "counts")
        totals = {
            phase: {name: torch.zeros(256, device=self.device) for name in names}
            for phase in PHASES
        }
        for patient, reports in zip(self.patients, self.reports, strict=True):
            for name, total in totals[phase_of(reports[0])].items():
                total += patient[name].sum(0)
        return {
            phase: {name: total[name] / total["counts"].clamp(min=1) for name in names[:2]}
            for phase, total in totals.items()
        }

    def with_other_phases(self, windows: Windows, random: np.random.Generator) -> Windows:
        """Replace the contrast phase in the texts of half of the windows.

        The sums of HU change accordingly. A text that names no phase stays.
        """
        texts, voxels = list(windows.texts), windows.voxels
        changes = {
            name: torch.zeros_like(voxels.counts[:, 0]) for name in ("drawn", "reconstructed")
        }
        for i, text in enumerate(texts):
            phase = phase_of(text)
            if phase is None or random.random() < 0.5:
                continue
            other = str(random.choice([name for name in PHASES if name != phase]))
            start = text.lower().index(phase)
            texts[i] = text[:start] + other + text[start + len(phase) :]
            for name, change in changes.items():
                change[i] = self.phases[other][name] - self.phases[phase][name]
        changed = {
            name: getattr(voxels, name) + voxels.counts * change[:, None]
            for name, change in changes.items()
        }
        return windows._replace(texts=texts, voxels=voxels._replace(**changed))

    def gains(self) -> Tensor:
        """Return the RMS change in HU by noise of one standard deviation in each channel."""
        random = np.random.default_rng(0)
        total = np.zeros(len(self.moments["latent_scale"]))
        with open_codec("tiny") as codec:
            for patient in self.patients[:4]:
                z = patient["ct"][:9].float().transpose(0, 1).cpu().numpy()
                clean = codec.decode(z)
                for channel, scale in enumerate(self.moments["latent_scale"]):
                    changed = z.copy()
                    changed[channel] += random.standard_normal(z[0].shape, np.float32) / scale
                    total[channel] += np.square(2000 * (codec.decode(changed) - clean)).mean() / 4
        return torch.from_numpy(np.sqrt(total)).float().to(self.device)

    def normal(self, kind: str, latents: list[Tensor]) -> Tensor:
        """Stack windows [f, D, h, w] to [B, D, f, h, w], with mean 0 and deviation 1 by channel."""
        shift, scale = (
            torch.tensor(self.moments[f"{kind}_{what}"], device=self.device)[:, None, None, None]
            for what in ("shift", "scale")
        )
        return (torch.stack(latents).float().transpose(1, 2) - shift) * scale

    def draw(self, windows: int, random: np.random.Generator) -> Windows:
        """Draw random windows, some of them at the beginning of a volume."""
        latents, masks, texts, begins = [], [], [], []
        voxels: dict[str, list[Tensor]] = {
            name: [] for name in ("labels", "counts", "drawn", "reconstructed")
        }
        for _ in range(windows):
            number = int(random.integers(len(self.patients)))
            patient = self.patients[number]
            spare = len(patient["ct"]) - WINDOW
            start = int(random.integers(spare + 1)) if spare and random.random() < 0.7 else 0
            cut = slice(start, start + WINDOW)
            latents.append(patient["ct"][cut])
            masks.append(patient["ill" if random.random() < 0.65 else "organs"][cut])
            texts.append(_varied_report(str(random.choice(self.reports[number])), random))
            begins.append(start == 0)
            slices = slice(STRIDE * start, STRIDE * (start + WINDOW))
            for name, kept in voxels.items():
                kept.append(patient[name][slices])
        stacked = {name: torch.stack(kept) for name, kept in voxels.items()}
        stacked["labels"] = stacked["labels"].long()
        return Windows(
            self.normal("latent", latents),
            self.normal("mask", masks),
            texts,
            Voxels(**stacked, begins=torch.tensor(begins, device=self.device)),
        )


def _varied_report(text: str, random: np.random.Generator) -> str:
    """Return a report as it is, without the phase, in lower case, or empty, at random."""
    sentences = text.split(". ")
    if random.random() < 0.15:
        text = ". ".join(sentences[:-1]) + "."  # the phase left out
    if random.random() < 0.3:
        text = text.rstrip(".").lower()
    return "" if random.random() < 0.05 else text


def centred_noise(z: Tensor, seeded: torch.Generator) -> Tensor:
    """Draw unit noise in the shape of z, with mean 0 in every channel of every frame."""
    noise = torch.randn(z.shape, generator=seeded, device=seeded.device).to(z.device)
    return noise - noise.mean((3, 4), keepdim=True)


def clean(scheduler: DDIMScheduler, x: Tensor, velocity: Tensor, t: int) -> Tensor:
    """Return latents without the noise, as the predicted velocity gives them."""
    signal = scheduler.alphas_cumprod[t]
    return signal.sqrt() * x - (1 - signal).sqrt() * velocity


def sampled(
    model: Generator, scheduler: DDIMScheduler, windows: Windows, noise: Tensor, index: int
) -> Tensor:
    """Sample up to step `index`, then predict the result; only that prediction has a gradient."""
    x, texts = noise, windows.texts

    def predicted(t: int) -> Tensor:
        return model(x, windows.mask, [t] * len(texts), texts)

    with torch.no_grad():
        for t in scheduler.timesteps[:index].tolist():
            x = scheduler.step(predicted(t), t, x).prev_sample
    t = int(scheduler.timesteps[index])
    return clean(scheduler, x, predicted(t), t)


def loss_at(
    model: Generator,
    scheduler: DDIMScheduler,
    windows: Windows,
    times: list[int],
    noise: Tensor,
    emphasis: Tensor,
) -> Tensor:
    """Return the weighted squared error of the velocity, with one time per window."""
    t = torch.tensor(times, device=noise.device)
    x = scheduler.add_noise(windows.z, noise, t)
    expected = scheduler.get_velocity(windows.z, noise, t)
    predicted = model(x, windows.mask, times, windows.texts)
    signal = scheduler.alphas_cumprod.to(noise.device)[t]
    # Min-SNR, signal / (1 - signal), would give pure noise no weight. But the prediction there
    # determines anatomy and brightness.
    weight = torch.minimum(signal, GAMMA * (1 - signal)).clamp(min=FLOOR)
    errors = (emphasis[:, None, None, None] * (predicted - expected).square()).mean((1, 2, 3, 4))
    return (weight * errors).mean()


@torch.no_grad()
def summed(model: Generator, took: Tensor) -> Tensor:
    """Sum gradients over all processes; return the time that the first one took."""
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
    """Return errors of held-out windows in HU: latents at four times, and means of samples."""
    errors = dict[str, float]()
    windows = data.draw(8, np.random.default_rng(5))
    noise = centred_noise(windows.z, torch.Generator().manual_seed(5))
    for t in (PURE, 700, 400, 100):
        times = [t] * len(noise)
        x = scheduler.add_noise(windows.z, noise, torch.tensor(times, device=noise.device))
        found = clean(scheduler, x, model(x, windows.mask, times, windows.texts), t)
        error = (found - windows.z) * gains[:, None, None, None]
        errors[f"latents at {t}"] = math.sqrt(error.square().mean((0, 2, 3, 4)).sum().item())
    windows = data.draw(12, np.random.default_rng(5))
    noise = centred_noise(windows.z, torch.Generator().manual_seed(5))
    off = brightness.off(sampled(model, scheduler, windows, noise, STEPS - 1), windows.voxels)
    organs, slices = off.organs[off.several].abs(), off.slices.abs() * off.there
    errors |= {
        "organs": organs.mean().item(),
        "organs beyond 40": (organs > 40).float().mean().item(),
        "slices": slices[off.there].mean().item(),
        "worst slice": slices.amax(1).mean().item(),
    }
    return {name: round(value, 3) for name, value in errors.items()}


def main() -> None:
    """Train; continue from a checkpoint if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of weights and log")
    parser.add_argument(
        "--minutes", type=float, default=110, help="training time, interruptions not counted"
    )
    parser.add_argument(
        "--windows", type=int, default=2, help="windows per step, over all processes"
    )
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="published weights to start from")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    model, average = Generator(), Generator()
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(STEPS)
    data = Data(options.data, device)
    held_out_folder = options.out / "held_out"
    held_out = Data(held_out_folder, device, data.moments) if held_out_folder.is_dir() else data
    if options.weights:
        data.moments |= model.begin_from(options.weights)
    average.load_state_dict(model.state_dict())
    for network in (model, average):
        network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.groups(options.rate), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    step, minutes, saved = 0, 0.0, options.out / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, minutes = state["step"], state["minutes"]
        data.moments = held_out.moments = state["moments"]
    brightness = Brightness(data.moments["latent_shift"], data.moments["latent_scale"], device)
    gains = data.gains()
    energy = gains.square() / gains.square().mean()
    emphasis = SHARE * energy + (1 - SHARE)
    rank, world = 0, 1
    if "WORLD_SIZE" in os.environ:
        ranks.init_process_group("gloo")
        rank, world = ranks.get_rank(), ranks.get_world_size()
    random = np.random.default_rng([options.seed, step, rank])
    seeded = torch.Generator(device).manual_seed(options.seed + step + 1_000_003 * rank)
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
    begin, losses = time.monotonic(), defaultdict[str, list[Tensor]](list)
    began = begin
    while minutes < options.minutes:
        progress = minutes / options.minutes
        warm = min(1.0, (step + 1) / WARM)
        falling = warm * (0.5 * (1 + math.cos(math.pi * progress)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * falling
        optimizer.zero_grad(set_to_none=True)
        windows = data.draw(options.windows // world, random)
        # All processes take the same kind and number of steps, so that none waits for another.
        kind, turn = KINDS[step % len(KINDS)], step // len(KINDS)
        noise = centred_noise(windows.z, seeded)
        if kind == "noised":
            times = [PURE if random.random() < 0.25 else int(random.integers(1000)) for _ in noise]
            loss = loss_at(model, scheduler, windows, times, noise, emphasis)
        else:
            windows = data.with_other_phases(windows, random)
            index = 0 if kind == "first" else 1 + turn % (STEPS - 1)
            z = sampled(model, scheduler, windows, noise, index)
            loss = MEANS * brightness.loss(z, windows.voxels)
        (loss / world).backward()
        losses[kind].append(loss.detach())
        # Measured by the first process, without the time in which it evaluates and saves.
        now = time.monotonic()
        took, began = torch.tensor([0.0 if rank else (now - began) / 60]), now
        if world > 1:
            took = summed(model, took)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            decay = min(DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
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
                loss={
                    kind: round(float(torch.stack(values).mean()), 5)
                    for kind, values in losses.items()
                },
                held_out_hu=judge(average, scheduler, held_out, gains, brightness),
                steps_per_second=round(
                    sum(map(len, losses.values())) / (time.monotonic() - begin), 3
                ),
            )
            begin, losses = time.monotonic(), defaultdict[str, list[Tensor]](list)
            began = begin


if __name__ == "__main__":
    main()
