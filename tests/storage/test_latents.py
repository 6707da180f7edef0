"""The latent store: its metadata, complete and resumed stores, and detection of damage."""

import json

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from fvae_deploy.errors import LatentError
from fvae_deploy.storage.latent_info import LatentInfo
from fvae_deploy.storage.latents import LatentReader, LatentWriter, partial_path
from fvae_deploy.volume.base import Geometry

SHAPE = (3, 6, 2, 4)
VALUES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def info(**changes):
    affine = np.array([[-0.7, 0, 0.1, 3], [0, 1 / 3, 0, -1e-17], [0, 0, 5, 0], [0, 0, 0, 1]])
    fields = {
        "model": "tiny",
        "identity": "0123456789abcdef",
        "engine": "openvino",
        "precision": "fp32",
        "protocol": "causal",
        "k": 1,
        "slices": 21,
        "geometry": Geometry((16, 30, 21), affine, bytes(range(256)) + bytes(92)),
        "hu_window": (-1000.0, 1000.0),
        "fvae_version": "0.1.0",
    }
    return LatentInfo(**(fields | changes))


def write(path, frames=SHAPE[1], resume=False, close=True, **changes):
    """Write the first frames of VALUES, and commit if that is all of them."""
    writer = LatentWriter(path, info(**changes), SHAPE, resume)
    for t in range(writer.done, frames):
        writer.write(t, VALUES[:, t : t + 1])
    if frames == SHAPE[1]:
        writer.commit()
    if close:
        writer.close()
    return writer


def chunk(store, t):
    return store / "c" / "0" / str(t) / "0" / "0"


def flip(path, at=9):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "z.zarr"


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=12, max_size=12),
    st.one_of(st.none(), st.binary(min_size=348, max_size=348)),
    st.integers(1, 9),
)
def test_metadata_survives_json_bit_for_bit(numbers, header, k):
    affine = np.vstack([np.array(numbers).reshape(3, 4), [0, 0, 0, 1]])
    written = info(geometry=Geometry((5, 6, 7), affine, header), slices=7, k=k)
    loaded = LatentInfo.from_attributes(json.loads(json.dumps(written.to_attributes())), "z.zarr")
    assert loaded.geometry.affine.tobytes() == affine.tobytes()
    assert loaded.geometry.nifti_header == header
    assert loaded.to_attributes() == written.to_attributes()


def test_a_store_returns_the_frames_that_were_written(path):
    write(path)
    reader = LatentReader(path)
    assert reader.shape == SHAPE
    np.testing.assert_array_equal(reader.read(0, 6), VALUES)
    np.testing.assert_array_equal(reader.read(2, 4), VALUES[:, 2:4])
    assert reader.info.to_attributes() == info().to_attributes()


def test_a_store_is_plain_zarr_with_one_chunk_per_latent_frame(path):
    write(path)
    array = zarr.open_array(str(path), mode="r")
    assert array.metadata.zarr_format == 3
    assert array.chunks == (3, 1, 2, 4)
    np.testing.assert_array_equal(array[:], VALUES)
    assert array.attrs["orientation"] == "LAS"
    assert array.attrs["spacing"] == list(info().geometry.spacing)
    assert array.attrs["complete"] is True


def test_frames_of_zeros_are_stored_too(path):
    writer = LatentWriter(path, info(), SHAPE)
    writer.write(0, np.zeros(SHAPE, np.float32))
    writer.commit()
    np.testing.assert_array_equal(LatentReader(path).read(0, 6), 0)


def test_the_final_name_appears_only_when_the_store_is_complete(path):
    writer = write(path, frames=5, close=False)
    assert not path.exists()
    assert partial_path(path).is_dir()
    writer.write(5, VALUES[:, 5:])
    writer.commit()
    assert not partial_path(path).exists()
    LatentReader(path)


def test_an_older_store_stays_until_the_new_one_is_complete(path):
    write(path)
    writer = write(path, frames=5, close=False, model="other")
    assert LatentReader(path).info.model == "tiny"
    writer.write(5, VALUES[:, 5:])
    writer.commit()
    assert LatentReader(path).info.model == "other"
    assert [p.name for p in path.parent.iterdir()] == ["z.zarr"]


def test_discard_leaves_nothing(path):
    write(path, frames=3, close=False).discard()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("frames", [0, 1, 5, 6])
def test_a_resumed_store_has_the_bytes_of_an_uninterrupted_one(path, frames):
    write(path.with_name("whole.zarr"))
    writer = LatentWriter(path, info(), SHAPE)
    writer.write(0, VALUES[:, :frames])
    writer.close()
    assert write(path, resume=True).done == frames
    assert files(path) == files(path.with_name("whole.zarr"))


def test_resume_counts_frames_up_to_the_first_damaged_one(path):
    writer = write(path, frames=5)
    flip(chunk(writer.partial, 3))
    assert write(path, frames=0, resume=True).done == 3
    chunk(writer.partial, 1).unlink()
    assert write(path, frames=0, resume=True).done == 1
    chunk(writer.partial, 0).write_bytes(b"half a")
    assert write(path, frames=0, resume=True).done == 0


def test_resume_removes_temporary_files_of_a_killed_writer(path):
    """Because zarr writes every chunk to a temporary file first."""
    write(path.with_name("whole.zarr"))
    writer = write(path, frames=3)
    (chunk(writer.partial, 3).parent).mkdir(parents=True)
    (chunk(writer.partial, 3).parent / "0.0123abcd.partial").write_bytes(b"half a chunk")
    (writer.partial / "zarr.0123abcd.partial").write_bytes(b"half the metadata")
    write(path, resume=True)
    assert files(path) == files(path.with_name("whole.zarr"))


def test_a_writer_killed_before_its_first_file_or_at_its_last_rename_starts_over(path):
    write(path.with_name("whole.zarr"))
    partial_path(path).mkdir()
    (partial_path(path) / "zarr.0123abcd.partial").write_bytes(b"half the metadata")
    assert write(path, resume=True).done == 0
    path.rename(partial_path(path))  # complete, but not yet renamed
    assert write(path, resume=True).done == 0  # its attributes no longer name the input
    assert files(path) == files(path.with_name("whole.zarr"))


def test_without_resume_a_partial_store_is_started_over(path):
    write(path, frames=5)
    assert write(path, frames=0).done == 0


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"identity": "f" * 16}, id="other weights"),
        pytest.param({"precision": "bf16"}, id="another precision"),
        pytest.param({"engine": "torch"}, id="another engine"),
        pytest.param({"protocol": "windows"}, id="another protocol"),
        pytest.param({"k": 2}, id="another step"),
        pytest.param({"slices": 22}, id="another number of slices"),
        pytest.param({"geometry": Geometry((16, 30, 21), np.eye(4))}, id="another affine"),
        pytest.param({"hu_window": (-160.0, 240.0)}, id="another window"),
        pytest.param({"fvae_version": "9"}, id="another version of fvae"),
    ],
)
def test_a_partial_store_of_another_run_is_not_continued(path, changes):
    write(path, frames=5)
    before = files(partial_path(path))
    with pytest.raises(LatentError, match=r"belong to the same run.*without --resume"):
        LatentWriter(path, info(**changes), SHAPE, resume=True)
    assert files(partial_path(path)) == before


def test_a_foreign_folder_or_file_is_never_replaced(path):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")
    with pytest.raises(LatentError, match="choose another name"):
        LatentWriter(path, info(), SHAPE)
    assert (path / "thesis.txt").read_text() == "mine"
    file = path.with_name("file.zarr")
    file.write_text("mine too")
    with pytest.raises(LatentError, match="choose another name"):
        LatentWriter(file, info(), SHAPE)
    assert file.read_text() == "mine too"


def test_a_foreign_folder_under_the_partial_name_is_never_replaced(path):
    partial_path(path).mkdir()
    (partial_path(path) / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(LatentError, match="move it away"):
            LatentWriter(path, info(), SHAPE, resume)
    assert (partial_path(path) / "thesis.txt").read_text() == "mine"


def test_a_missing_folder_is_named(path):
    with pytest.raises(LatentError, match=r"expected a folder.*create it"):
        LatentWriter(path / "deeper" / "z.zarr", info(), SHAPE)


def change(key, value):
    def damage(store):
        path = store / "zarr.json"
        content = json.loads(path.read_text())
        content["attributes"][key] = value
        path.write_text(json.dumps(content))

    return damage


def rewrite(text):
    return lambda store: (store / "zarr.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda s: chunk(s, 4).unlink(), "frame 4 missing", id="a missing chunk"),
        pytest.param(
            change("complete", False), "marked incomplete.*--resume", id="marked incomplete"
        ),
        pytest.param(rewrite("{"), "latent store", id="metadata not JSON"),
        pytest.param(rewrite(""), "latent store", id="empty metadata"),
        pytest.param(rewrite("[]"), "latent store", id="metadata is a list"),
        pytest.param(lambda s: (s / "zarr.json").unlink(), "latent store", id="no metadata"),
        pytest.param(change("fvae_latents", 3), "format 3", id="another format"),
        pytest.param(change("shape", [1, 2]), "valid attributes", id="a shape of two numbers"),
        pytest.param(change("shape", [0, 0, 21]), "valid attributes", id="a shape with zeros"),
        pytest.param(change("slices", 90), "90 slices for a volume", id="too many slices"),
        pytest.param(change("affine", None), "valid attributes", id="no affine"),
        pytest.param(change("affine", [[1, 2], [3, 4]]), "valid attributes", id="a 2x2 affine"),
        pytest.param(change("nifti_header", "!"), "valid attributes", id="a header not base64"),
        pytest.param(change("k", "many"), "valid attributes", id="a step not a number"),
    ],
)
def test_a_damaged_store_is_refused_at_once(path, damage, words):
    write(path)
    damage(path)
    with pytest.raises(LatentError, match=words) as refused:
        LatentReader(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("at", [0, 40, -1])
def test_a_flipped_bit_is_detected_when_its_chunk_is_read(path, at):
    write(path)
    flip(chunk(path, 2), at)
    reader = LatentReader(path)
    reader.read(0, 2)
    with pytest.raises(LatentError, match=r"undamaged latent frames 2 to 2.*encode the CT again"):
        reader.read(2, 3)


def test_a_partial_output_alone_is_refused_with_a_hint_to_resume(path):
    write(path, frames=5)
    with pytest.raises(LatentError, match=r"partial output z\.zarr\.partial: .*--resume"):
        LatentReader(path)


def test_a_ct_in_zarr_is_refused_as_a_latent_store(path):
    zarr.create_array(str(path), shape=(4, 4, 4), dtype="int16")
    with pytest.raises(LatentError, match="3 dimensions"):
        LatentReader(path)
