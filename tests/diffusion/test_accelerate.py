"""Pipelines of diffusers with their VAE in an engine, against the same pipelines without."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for _package in ("torch", "diffusers", "onnx", "onnxscript", "openvino"):
    pytest.importorskip(_package, reason="needs the export extra")
import torch  # noqa: E402
from tiny_pipeline import tiny_pipeline, tiny_vae  # noqa: E402

import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.diffusion.engine_vae import EngineVAE  # noqa: E402
from fvae_deploy.diffusion.moments import fingerprint  # noqa: E402
from fvae_deploy.errors import BundleError, UsageError, VolumeError  # noqa: E402

ROOT = Path(__file__).parents[2]
TEXT = "StableDiffusionPipeline"
IMAGE = "StableDiffusionImg2ImgPipeline"
PROMPT = "a lighthouse in a storm"
FORMS = {
    "like Stable Diffusion": {},
    "like SD3, without quant_conv and with a shift": {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latent_channels": 16,
        "shift_factor": 0.06,
        "scaling_factor": 1.5,
    },
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The cache of all tests here, so that a VAE is exported once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVAE_CACHE", str(folder))
        yield folder


def seeded():
    return torch.Generator().manual_seed(5)


def pictures(count=1, size=32):
    return torch.rand(count, 3, size, size + 8, generator=seeded()) * 2 - 1


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_text_to_image_gives_the_same_pictures(engine):
    ask = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 48}
    plain = tiny_pipeline(TEXT)
    expected = plain([PROMPT] * 2, generator=seeded(), **ask).images
    pipeline = fvae.accelerate(tiny_pipeline(TEXT), engine=engine)
    assert isinstance(pipeline.vae, EngineVAE)
    found = pipeline([PROMPT] * 2, generator=seeded(), **ask).images
    assert found.shape == (2, 32, 48, 3)
    assert found.std() > 0.01
    close(found, expected)


def test_image_to_image_gives_the_same_pictures():
    ask = {
        "num_inference_steps": 4,
        "strength": 0.6,
        "output_type": "np",
        "image": (pictures() + 1) / 2,
    }
    expected = tiny_pipeline(IMAGE)(PROMPT, generator=seeded(), **ask).images
    pipeline = fvae.accelerate(tiny_pipeline(IMAGE))
    found = pipeline(PROMPT, generator=seeded(), **ask).images
    close(found, expected)
    other = pipeline(PROMPT, generator=torch.Generator().manual_seed(6), **ask).images
    assert np.abs(other - expected).max() > 1e-3  # samples of the posterior are drawn


@pytest.mark.parametrize("form", FORMS)
def test_every_answer_is_that_of_the_network(form):
    vae = tiny_vae(**FORMS[form])
    ours = fvae.accelerate(tiny_pipeline(TEXT, copy.deepcopy(vae))).vae
    x = pictures(3)
    with torch.no_grad():
        theirs = vae.encode(x).latent_dist
        found = ours.encode(x).latent_dist
        close(found.mode(), theirs.mode())
        close(found.sample(seeded()), theirs.sample(seeded()))
        close(found.logvar, theirs.logvar)
        z = 3 * theirs.sample(seeded())  # beyond the range of pictures, which is not clamped
        sample = vae.decode(z).sample
        assert sample.abs().max() > 1
        close(ours.decode(z).sample, sample)
        close(ours.decode(z, return_dict=False, generator=seeded())[0], sample)
        close(ours.encode(x, return_dict=False)[0].mode(), theirs.mode())
    for name in ("scaling_factor", "shift_factor", "block_out_channels", "latent_channels"):
        assert getattr(ours.config, name) == getattr(vae.config, name)
    assert (ours.dtype, ours.device) == (torch.float32, torch.device("cpu"))
    assert ours.to("cpu", torch.float16) is ours.eval().requires_grad_(False)
    assert ours.dtype == torch.float32


def test_results_come_back_in_the_type_of_what_was_given():
    ours = fvae.accelerate(tiny_pipeline(TEXT)).vae
    z = torch.randn(1, 4, 4, 4, generator=seeded()).to(torch.float16)
    half = ours.decode(z).sample
    assert half.dtype == torch.float16
    close(half.float(), ours.decode(z.float()).sample.to(torch.float16).float())
    assert ours.encode(pictures().bfloat16()).latent_dist.mean.dtype == torch.bfloat16


def test_switches_of_diffusers_are_taken_and_tiling_is_answered():
    pipeline = fvae.accelerate(tiny_pipeline(TEXT))
    with pytest.warns(UserWarning, match="every picture whole: tiling is not enabled"):
        pipeline.vae.enable_tiling()
    pipeline.vae.disable_tiling()
    pipeline.vae.enable_slicing()
    pipeline.vae.disable_slicing()
    assert fvae.accelerate(pipeline) is pipeline  # a second time changes nothing
    pipeline.to("cpu")
    pipeline.vae.close()


def test_a_vae_is_exported_once_and_another_one_anew(cache):
    fvae.accelerate(tiny_pipeline(TEXT))
    before = {path: path.stat().st_mtime_ns for path in (cache / "pipelines").iterdir()}
    fvae.accelerate(tiny_pipeline(IMAGE))
    assert {p: p.stat().st_mtime_ns for p in (cache / "pipelines").iterdir()} == before
    changed = tiny_vae()
    with torch.no_grad():
        changed.decoder.conv_out.bias[0] += 1e-6
    assert fingerprint(changed) != fingerprint(tiny_vae())
    assert fingerprint(tiny_vae(scaling_factor=0.5)) != fingerprint(tiny_vae())
    fvae.accelerate(tiny_pipeline(TEXT, changed))
    assert len(list((cache / "pipelines").iterdir())) == len(before) + 1


def test_a_bundle_has_a_folder_of_its_own_and_must_be_that_of_the_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fvae.accelerate(tiny_pipeline(TEXT), bundle=tmp_path / "vae")
    weights = (tmp_path / "vae" / "weights.safetensors").stat().st_mtime_ns
    again = fvae.accelerate(tiny_pipeline(TEXT), bundle=str(tmp_path / "vae"))
    assert (tmp_path / "vae" / "weights.safetensors").stat().st_mtime_ns == weights
    close(
        again.vae.decode(torch.ones(1, 4, 4, 4)).sample,
        tiny_vae().decode(torch.ones(1, 4, 4, 4)).sample.detach(),
    )
    other = tiny_pipeline(TEXT, tiny_vae(seed=7))
    original = other.vae
    with pytest.raises(BundleError, match=r"with results that differ by .*: leave bundle out"):
        fvae.accelerate(other, bundle=tmp_path / "vae")
    assert other.vae is original
    with pytest.raises(
        BundleError, match=r"found tiny at .* with a lean_vae network of other sizes"
    ):
        fvae.accelerate(other, bundle="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_what_cannot_be_accelerated_is_refused():
    from diffusers import AutoencoderTiny

    class Nothing:
        pass

    with pytest.raises(UsageError, match="found NoneType"):
        fvae.accelerate(Nothing())
    tiny = Nothing()
    tiny.vae = AutoencoderTiny()
    with pytest.raises(UsageError, match="found AutoencoderTiny"):
        fvae.accelerate(tiny)


@pytest.mark.parametrize(
    ("verb", "shape"),
    [
        ("encode", (1, 3, 31, 32)),
        ("encode", (3, 32, 32)),
        ("encode", (1, 1, 32, 32)),
        ("decode", (1, 3, 4, 4)),
        ("decode", (4, 4, 4)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(verb, shape):
    ours = fvae.accelerate(tiny_pipeline(TEXT)).vae
    with pytest.raises(VolumeError, match=r"^expected "):
        getattr(ours, verb)(torch.zeros(shape))


def test_the_example_of_the_documentation_runs(tmp_path, cache):
    text = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    code, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    tiny_pipeline(TEXT).save_pretrained(tmp_path / "pipeline")
    code = f"{code}\nfrom fvae_deploy.diffusion.engine_vae import EngineVAE\n"
    code += "assert isinstance(pipeline.vae, EngineVAE)\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "lighthouse.png").stat().st_size > 0


def test_the_benchmark_runs_on_a_small_network(tmp_path):
    words = ["--size", "32", "--widths", "8,16", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "pipeline_vae.py"), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"\| decode \| [\d.e-]+ \| [\d.e-]+ \| [\d.]+ \|", done.stdout)
    assert float(done.stdout.split()[-1]) < 1e-4
