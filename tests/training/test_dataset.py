"""LatentDataset: windows of stores, in any process; damage, several models and short stores."""

from __future__ import annotations

import importlib.util
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import fvae_deploy as fvae
from fvae_deploy import api
from fvae_deploy.errors import LatentError, UsageError
from fvae_deploy.training.dataset import LatentDataset

torch = pytest.importorskip("torch", reason="needs the train extra")

DEPTHS = {"a": 30, "deep/b": 21, "deep/er/c": 61}


@pytest.fixture(scope="module")
def folder(fake_codec, write_ct, tmp_path_factory):
    """Stores at three depths, one of each size, a partial one and other files."""
    base = tmp_path_factory.mktemp("latents")
    for seed, (name, depth) in enumerate(DEPTHS.items()):
        ct, store = base / f"{seed}.nii", base / "latents" / f"{name}.zarr"
        store.parent.mkdir(parents=True, exist_ok=True)
        write_ct(ct, (17, 24, depth), seed=seed)
        dtype = ("float32", "int8", "float16")[seed]
        api.encode(ct, store, codec=fake_codec, latent_dtype=dtype, max_error=30)
    folder = base / "latents"
    shutil.copytree(folder / "a.zarr", folder / "x.zarr.partial")
    (folder / "notes.txt").write_text("none")
    zarr.create_array(str(folder / "volume.zarr"), shape=(4, 4, 4), dtype="int16")
    return folder


def latents(store):
    z = zarr.open_array(str(store), mode="r")[:].astype(np.float32)
    if (store / "scales").exists():
        z *= zarr.open_array(str(store / "scales"), mode="r")[:][:, :, None, None]
    return z


@given(window=st.integers(1, 6), stride=st.none() | st.integers(1, 9))
def test_windows_cover_every_frame_and_hold_what_the_stores_hold(folder, window, stride):
    data = LatentDataset(folder, window, stride=stride)
    seen = {}
    for item in (data[i] for i in range(len(data))):
        z, start = latents(Path(item["path"])), item["start"]
        np.testing.assert_array_equal(item["latents"].numpy(), z[:, start : start + window])
        assert item["latents"].dtype == torch.float32
        assert item["frames"] == window
        seen.setdefault(item["path"], []).append(start)
    names = [str(Path(path).relative_to(folder).with_suffix("")) for path in seen]
    assert names == sorted(DEPTHS, key=lambda name: folder / f"{name}.zarr")
    for path, starts in seen.items():
        frames = latents(Path(path)).shape[1]
        assert starts == sorted(set(starts))
        assert starts[-1] == frames - window
        assert max(np.diff(starts), default=0) <= (stride or window)


def test_whole_stores_are_items_without_a_window(folder):
    data = LatentDataset(folder, None)
    assert sorted(data[i]["latents"].shape[1] for i in range(3)) == [6, 9, 16]


def test_short_stores_are_an_error_left_out_or_padded(folder):
    with pytest.raises(LatentError, match=r"at least 9 latent frames.*found 6.*short='skip'"):
        LatentDataset(folder, 9)
    data = LatentDataset(folder, 9, short="skip")
    assert [path.name for path in data.skipped] == ["b.zarr"]
    assert len(data.stores) == 2
    data = LatentDataset(folder, 9, short="pad")
    short = next(item for item in map(data.__getitem__, range(len(data))) if item["frames"] < 9)
    assert short["frames"] == 6
    assert (short["latents"][:, 6:] == short["latents"][:, 5:6]).all()


WORKERS = """
import sys
import numpy, torch
from torch.utils.data import DataLoader
from fvae_deploy import LatentDataset

if __name__ == "__main__":
    data = LatentDataset(sys.argv[1], 4, stride=2)
    data[0]  # a reader that is open before the workers start
    batches = list(DataLoader(data, 3, num_workers=2, multiprocessing_context=sys.argv[2]))
    z = torch.cat([batch["latents"] for batch in batches])
    one_by_one = [data[i]["latents"] for i in range(len(data))]
    numpy.testing.assert_array_equal(z, torch.stack(one_by_one))
    paths = [path for batch in batches for path in batch["path"]]
    assert paths == [data[i]["path"] for i in range(len(data))]
    assert batches[0]["spacing"].shape == (3, 3)
    print("read", len(data))
"""


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_one_process_reads(folder, tmp_path, context):
    # In a process of its own: to fork one with the threads of engines in it is not safe.
    (tmp_path / "read.py").write_text(WORKERS)
    command = [sys.executable, tmp_path / "read.py", folder, context]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"read {len(LatentDataset(folder, 4, stride=2))}\n", done.stderr


def test_a_transform_makes_the_item(folder):
    data = LatentDataset(folder, 4, lambda item: item["latents"].mean())
    assert data[0] == LatentDataset(folder, 4)[0]["latents"].mean()


def test_it_is_pickled_without_its_readers(folder):
    data = LatentDataset([folder / "a.zarr"], 4)
    data[1]
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[1]["latents"], data[1]["latents"])
    assert len(pickle.dumps(data)) < 10000


def test_only_the_frames_of_a_window_are_read(folder, tmp_path):
    store = shutil.copytree(folder / "a.zarr", tmp_path / "a.zarr")
    chunk = store / "c/0/8/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    data = LatentDataset(tmp_path, 3)
    data[0]
    with pytest.raises(LatentError, match="undamaged latent frames"):
        data[len(data) - 1]
    chunk.unlink()
    with pytest.raises(LatentError, match="frame 8 missing"):
        LatentDataset(tmp_path, 3)


def test_several_models_none_and_bad_options_are_refused(folder, write_ct, tmp_path):
    with pytest.raises(LatentError, match="found none"):
        LatentDataset(tmp_path / "nowhere")
    with pytest.raises(LatentError, match="fvae encode"):
        LatentDataset(tmp_path)
    for options in ({"window": 0}, {"stride": 0}, {"short": "cut"}):
        with pytest.raises(UsageError):
            LatentDataset(folder, **options)
    pytest.importorskip("openvino")
    shutil.copytree(folder / "a.zarr", tmp_path / "a.zarr")
    write_ct(tmp_path / "ct.nii", (16, 16, 9))
    api.encode(tmp_path / "ct.nii", tmp_path / "b.zarr")
    with pytest.raises(LatentError, match=r"of one model, found fake in .*tiny in"):
        LatentDataset(tmp_path, 2)


def test_the_package_is_imported_without_torch():
    code = "import sys, fvae_deploy as f; f.EncodeLatentd; f.LatentDataset; "
    code += "print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_the_example_learns_and_draws_a_ct(tmp_path):
    pytest.importorskip("openvino")
    fvae.write_phantom(tmp_path / "ct.nii", (128, 128, 33))
    (tmp_path / "latents").mkdir()
    api.encode(tmp_path / "ct.nii", tmp_path / "latents/z.zarr", latent_dtype="int8")
    path = Path(__file__).parents[2] / "examples" / "train_latent_diffusion.py"
    spec = importlib.util.spec_from_file_location("train_latent_diffusion", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    arguments = [str(tmp_path / "latents"), "-o", str(tmp_path / "drawn.nii.gz")]
    arguments += ["--window", "3", "--side", "8", "--width", "16", "--batch", "4"]
    losses = example.main([*arguments, "--steps", "60", "--draws", "5", "--rate", "4e-3"])
    assert len(losses) == 60
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:5])
    drawn = nibabel.load(tmp_path / "drawn.nii.gz").get_fdata()
    assert drawn.shape == (64, 64, 9)
    assert -1000 <= drawn.min() < drawn.max() <= 1000
