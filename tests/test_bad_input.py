"""What users get wrong: one plain line, an exit code, and nothing half-written."""

import gzip
import json
import shutil
import sys

import nibabel
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from fvae_deploy.cli import main as cli

SHAPE = (20, 12, 11)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, fake_bundle):
    """Sound inputs, made once; each test damages a copy."""
    folder = tmp_path_factory.mktemp("shelf")
    values = np.random.default_rng(0).integers(-1100, 900, SHAPE).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-1, -1, 2, 1])), folder / "ct.nii")
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-1, -1, 2, 1])), folder / "ct.nii.gz")
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-1, -1, 3, 1])), folder / "moved.nii")
    for suffix in ("ckpt", "safetensors"):
        (folder / f"text.{suffix}").write_text("no weights at all, but text for a while")
    shutil.copytree(fake_bundle, folder / "bundle")
    assert run(["encode", folder / "ct.nii", "-o", folder / "z.zarr", *fake(folder)]) == 0
    assert run(["phantom", "-o", folder / "p.zarr", "--shape", "8,8,3"]) == 0
    return folder


def fake(folder):
    return ["-m", folder / "bundle", "-e", "fake", "-q"]


def run(arguments):
    """Exit code of the command line, in this process."""
    before = sys.argv
    sys.argv = ["fvae", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stopped:
        return stopped.code or 0
    finally:
        sys.argv = before
    return 0


def image(folder, values, affine=None, name="bad.nii.gz"):
    affine = np.diag([-1.0, -1, 2, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(values, affine), folder / name)
    return folder / name


def patched(folder, offset, data, name="bad.nii"):
    raw = bytearray((folder / "ct.nii").read_bytes())
    raw[offset : offset + len(data)] = data
    (folder / name).write_bytes(raw)
    return folder / name


def written(path, data):
    path.write_bytes(data)
    return path


def with_value(value):
    values = np.full(SHAPE, -500.0, np.float32)
    values[3, 4, 5] = value
    return values


def attribute(store, name, value):
    path = store / "zarr.json"
    content = json.loads(path.read_text())
    content["attributes"][name] = value
    path.write_text(json.dumps(content))
    return store


def without(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return path


def flipped(path, at=-5):
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    return path


def manifest(folder, **changes):
    path = folder / "bundle" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def chunk(f, t=1):
    return f / "z.zarr" / "c" / "0" / str(t) / "0" / "0"


def rgb(folder):
    values = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "bad.nii")
    return folder / "bad.nii"


def four_d_zarr(folder):
    zarr.create_array(str(folder / "bad.zarr"), shape=(4, 4, 4, 2), dtype="int16")
    return folder / "bad.zarr"


def dicom(folder, *slices):
    """A folder of DICOM slices; each is a dictionary of what is not usual about it."""
    (folder / "dicom").mkdir()
    for number, changes in enumerate(slices):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"1.2.3.{number + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / "dicom" / f"{number}.dcm"
        data = FileDataset(path, {}, file_meta=meta, preamble=bytes(128))
        usual = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": f"1.2.3.{number + 1}",
            "SeriesInstanceUID": "1.2.840.1",
            "Modality": "CT",
            "ImagePositionPatient": [0, 0, 2.5 * number],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.75, 0.5],
            "Rows": 4,
            "Columns": 6,
            "BitsAllocated": 16,
            "BitsStored": 12,
            "HighBit": 11,
            "PixelRepresentation": 0,
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
            "PixelData": bytes(48),
        }
        for name, value in (usual | changes).items():
            setattr(data, name, value)
        data.save_as(path, enforce_file_format=True)
    return folder / "dicom"


RECONSTRUCT = {  # input -> (what makes it, exit code, fragment of the message)
    "nothing is there": (lambda f: f / "none.nii.gz", 3, "found nothing"),
    "one slice of a series": (
        lambda f: next(dicom(f, {}, {}).iterdir()), 3, "give its folder"),
    "one slice without pixels": (
        lambda f: written(f / "IM0001.dcm", bytes(128) + b"DICM"), 3, "IM0001.dcm"),
    "a suffix that is no volume": (lambda f: written(f / "ct.gipl", b"x"), 3, "dcm2niix"),
    "an empty file": (lambda f: written(f / "bad.nii.gz", b""), 3, "bad.nii.gz"),
    "an empty .nii": (lambda f: written(f / "bad.nii", b""), 3, "bad.nii"),
    "text named .nii": (lambda f: written(f / "bad.nii", b"hello " * 100), 3, "NIfTI"),
    "a folder named .nii": (lambda f: (f / "dir.nii").mkdir() or f / "dir.nii", 3, "dir.nii"),
    "a truncated .nii": (
        lambda f: written(f / "bad.nii", (f / "ct.nii").read_bytes()[:-100]), 3, "bad.nii"),
    "a truncated .nii.gz": (
        lambda f: written(f / "bad.nii.gz", (f / "ct.nii.gz").read_bytes()[:-900]), 3, "bad"),
    "a damaged gzip checksum": (
        lambda f: flipped(shutil.copy(f / "ct.nii.gz", f / "bad.nii.gz") and f / "bad.nii.gz"),
        3, "bad.nii.gz"),
    "plain data named .gz": (
        lambda f: written(f / "bad.nii.gz", (f / "ct.nii").read_bytes()), 3, "gzip"),
    "gzip data named .nii": (
        lambda f: written(f / "bad.nii", (f / "ct.nii.gz").read_bytes()), 3, "bad.nii"),
    "four dimensions": (
        lambda f: image(f, np.zeros((4, 4, 4, 3), np.int16)), 3, "4-D"),
    "RGB voxels": (rgb, 3, "data type 128"),
    "a DICOM series with a slice missing": (
        lambda f: dicom(f, {}, {}, {"ImagePositionPatient": [0, 0, 9]}, {
            "ImagePositionPatient": [0, 0, 11.5]}), 3, "missing slices"),
    "a DICOM slice twice": (
        lambda f: dicom(f, {}, {}, {}, {}, {"ImagePositionPatient": [0, 0, 2.5]}),
        3, "both at 2.500 mm"),
    "two DICOM series": (
        lambda f: dicom(f, {}, {}, {"SeriesInstanceUID": "1.2.840.2"}), 3, "--series"),
    "DICOM of MR": (lambda f: dicom(f, *[{"Modality": "MR"}] * 3), 3, "found MR"),
    "a DICOM slice of other size": (
        lambda f: dicom(f, {}, {"Rows": 2, "PixelData": bytes(24)}), 3, "the same size"),
    "DICOM with its pixels cut off": (
        lambda f: dicom(f, {}, {}, {"PixelData": bytes(20)}), 3, "could not decode"),
    "DICOM without positions": (
        lambda f: dicom(f, *[{"ImagePositionPatient": None}] * 2), 3, "ImagePositionPatient"),
    "a Zarr array of four dimensions": (four_d_zarr, 3, "4-D 4x4x4x2"),
    "complex voxels": (lambda f: image(f, np.zeros((4, 4, 4), np.complex64)), 3, "data type 32"),
    "NaN": (lambda f: image(f, with_value(np.nan)), 3, "slice 5"),
    "infinity": (lambda f: image(f, with_value(np.inf)), 3, "slice 5"),
    "dimensions that lie": (
        lambda f: patched(f, 42, np.array([30000] * 3, "<i2").tobytes()), 3, "30000"),
    "a dimension of zero": (lambda f: patched(f, 42, b"\0\0"), 3, "bad.nii"),
    "another magic": (lambda f: patched(f, 344, b"xyz\0"), 3, "bad.nii"),
    "an affine of NaN": (
        lambda f: patched(f, 280, np.full(12, np.nan, "<f4").tobytes()), 3, "affine"),
    "values scaled to 0..1": (
        lambda f: image(f, np.random.default_rng(0).random(SHAPE, np.float32)), 3, "0"),
    "HU + 1024": (
        lambda f: image(f, np.full(SHAPE, 24, np.int16) + 1024), 3, "--any-range"),
    "a folder without DICOM": (lambda f: (f / "d").mkdir() or f / "d", 3, "DICOM"),
    "latents where a CT is wanted": (lambda f: f / "z.zarr", 3, "fvae decode"),
    "a Zarr group without arrays": (
        lambda f: written((f / "g.zarr").mkdir() or f / "g.zarr" / "zarr.json",
            b'{"zarr_format": 3, "node_type": "group", "attributes": {}}').parent, 3, "g.zarr"),
    "a folder named .zarr": (lambda f: (f / "e.zarr").mkdir() or f / "e.zarr", 3, "e.zarr"),
    "a Zarr array with a broken zarr.json": (
        lambda f: written(f / "p.zarr" / "zarr.json", b"{").parent, 3, "p.zarr"),
}  # fmt: skip

OPTIONS = {  # arguments after `reconstruct ct.nii` -> exit code, fragment
    "an output without a known suffix": (["-o", "{f}/out.gipl"], 3, "out.gipl"),
    "an output in a folder that is not there": (["-o", "{f}/no/out.nii.gz"], 3, "no"),
    "an output below a file": (["-o", "{f}/ct.nii/out.nii.gz"], 3, "ct.nii"),
    "an output that is a folder": (["-o", "{f}/bundle/.."], 2, "apart from the input"),
    "a foreign folder named .zarr": (["-o", "{f}/foreign.zarr"], 3, "foreign.zarr"),
    "memory that is no amount": (["-o", "{f}/o.nii", "--memory", "lots"], 2, "700MiB"),
    "memory that cannot do": (["-o", "{f}/o.nii", "--memory", "1MiB"], 6, "at least"),
    "latents in the place of the output": (
        ["-o", "{f}/z.zarr", "--overwrite"],
        3,
        "a volume that fvae wrote",
    ),
    "an output that exists": (["-o", "{f}/z.zarr"], 3, "pass --overwrite"),
    "a report over the scan": (["-o", "{f}/o.nii", "--json", "{f}/ct.nii"], 2, ".json"),
    "an unknown protocol": (["-o", "{f}/o.nii", "--protocol", "waves"], 2, "causal, windows"),
    "an unknown engine": (["-o", "{f}/o.nii", "-e", "magic"], 2, "openvino"),
    "an unknown precision": (["-o", "{f}/o.nii", "-p", "fp8"], 5, "bf16"),
    "a device that is not there": (
        ["-o", "{f}/o.nii", "-m", "tiny", "-e", "openvino", "--device", "npu7"], 5, "npu7"),
    "an unknown model": (["-o", "{f}/o.nii", "-m", "huge"], 4, "tiny"),
    "a bundle folder without manifest": (["-o", "{f}/o.nii", "-m", "{f}/p.zarr"], 4, "manifest"),
    "an unknown dtype": (["-o", "{f}/o.nii", "--dtype", "int8"], 2, "float32"),
}  # fmt: skip

DECODE = {
    "no store": (lambda f: without(f / "z.zarr"), [], 3, "found nothing"),
    "a CT where latents are wanted": (lambda f: None, ["{f}/p.zarr"], 3, "such as a CT"),
    "a store still incomplete": (
        lambda f: attribute(f / "z.zarr", "complete", False), [], 3, "--resume"),
    "only the partial store of a stopped run": (
        lambda f: (f / "z.zarr").rename(f / "z.zarr.partial"), [], 3, "--resume"),
    "a missing chunk": (lambda f: without(chunk(f)), [], 3, "missing"),
    "a flipped byte": (lambda f: flipped(chunk(f), 9), [], 3, "undamaged"),
    "a truncated chunk": (
        lambda f: chunk(f).write_bytes(chunk(f).read_bytes()[:20]), [], 3, "undamaged"),
    "broken metadata": (lambda f: (f / "z.zarr/zarr.json").write_text("{"), [], 3, "z.zarr"),
    "attributes that lost the affine": (
        lambda f: attribute(f / "z.zarr", "affine", None), [], 3, "attributes"),
    "another format": (
        lambda f: attribute(f / "z.zarr", "fvae_latents", 99), [], 3, "format"),
    "latents of another model": (
        lambda f: attribute(f / "z.zarr", "identity", "0" * 16), [], 3, "--model"),
    "a slice that is no range": (lambda f: None, ["--slices", "5"], 2, "a:b"),
    "slices backwards": (lambda f: None, ["--slices", "9:3"], 2, "9:3"),
    "slices beyond the end": (lambda f: None, ["--slices", "5:99"], 2, "0:11"),
    "a bundle with changed weights": (
        lambda f: flipped(f / "bundle/weights.safetensors", 0), [], 4, "sha256"),
    "a bundle of another schema": (lambda f: manifest(f, schema=99), [], 4, "schema"),
    "a bundle with a field of another type": (lambda f: manifest(f, parts=3), [], 4, "parts"),
    "a manifest that is no JSON": (
        lambda f: (f / "bundle/manifest.json").write_text("{"), [], 4, "JSON"),
    "a bundle without its weights": (
        lambda f: without(f / "bundle/weights.safetensors"), [], 4, "weights"),
}  # fmt: skip

OTHERS = {
    "reconstruct over the scan itself": (
        ["reconstruct", "{f}/ct.nii", "-o", "{f}/bundle/../ct.nii"], 2, "apart from the input"),
    "decode over the latents": (
        ["decode", "{f}/z.zarr", "-o", "{f}/z.zarr"], 2, "apart from the input"),
    "encode to a name that is no .zarr": (["encode", "{f}/ct.nii", "-o", "{f}/z.h5"], 2, ".zarr"),
    "encode over a CT in Zarr": (["encode", "{f}/ct.nii", "-o", "{f}/p.zarr"], 3, "another name"),
    "compare with another shape": (["compare", "{f}/ct.nii", "{f}/p.zarr"], 3, "shape"),
    "compare with labels of another grid": (
        ["compare", "{f}/ct.nii", "{f}/ct.nii", "--labels", "{f}/p.zarr"], 3, "shape"),
    "compare with another affine": (
        ["compare", "{f}/ct.nii", "{f}/moved.nii"], 3, "resample it"),
    "compare with nothing": (["compare", "{f}/ct.nii", "{f}/none.nii"], 3, "found nothing"),
    "compare into a folder that is not there": (
        ["compare", "{f}/ct.nii", "{f}/ct.nii.gz", "--json", "{f}/no/a.json"], 2, "a.json"),
    "a report into a folder that is not there": (
        ["encode", "{f}/ct.nii", "-o", "{f}/new.zarr", "--json", "{f}/no/a.json"],
        2, "a.json"),
    "encode into a folder that is not there": (
        ["encode", "{f}/ct.nii", "-o", "{f}/no/z.zarr"], 3, "create it"),
    "encode over a foreign folder": (
        ["encode", "{f}/ct.nii", "-o", "{f}/foreign.zarr"], 3, "another name"),
    "encode in steps and memory that do not go together": (
        ["encode", "{f}/ct.nii", "-o", "{f}/new.zarr", "--memory", "1KiB"], 6, "at least"),
    "compare with labels that are HU": (
        ["compare", "{f}/ct.nii", "{f}/ct.nii", "--labels", "{f}/ct.nii"], 3, "labels"),
    "compare into a picture that is no .png": (
        ["compare", "{f}/ct.nii", "{f}/ct.nii", "--png", "{f}/a.gif"], 2, ".png"),
    "a phantom of nonsense": (["phantom", "-o", "{f}/a.nii", "--shape", "a,b"], 2, "--shape"),
    "a phantom too small": (["phantom", "-o", "{f}/a.nii", "--shape", "2,2,2"], 2, "8x8x1"),
    "a phantom of two numbers": (["phantom", "-o", "{f}/a.nii", "--shape", "9,9"], 2, "--shape"),
    "a phantom of an unknown suffix": (
        ["phantom", "-o", "{f}/a.gipl", "--shape", "9,9,9"], 3, "a.gipl"),
    "export of text named .ckpt": (
        ["export", "-m", "{f}/text.ckpt", "-o", "{f}/new"], 4, "text.ckpt"),
    "export of text named .safetensors": (
        ["export", "-m", "{f}/text.safetensors", "-o", "{f}/new"], 4, "text.safetensors"),
    "export of weights without a configuration": (
        ["export", "-m", "{f}/bundle/weights.safetensors", "-o", "{f}/new"], 4, "args"),
    "export with unknown channels": (
        ["export", "-m", "{f}/text.ckpt", "-o", "{f}/new", "--channels", "cmyk"], 2, "gray, rgb"),
    "export of nothing": (["export", "-m", "{f}/w.ckpt", "-o", "{f}/new"], 4, "found nothing"),
    "export of an unknown suffix": (["export", "-m", "{f}/ct.nii", "-o", "{f}/new"], 4, ".ckpt"),
}  # fmt: skip


@pytest.fixture(scope="module")
def small_weights(small_model, tmp_path_factory):
    """The small random network as a checkpoint."""
    import dataclasses

    import torch

    path = tmp_path_factory.mktemp("weights") / "small.ckpt"
    content = {"args": dataclasses.asdict(small_model.config)}
    torch.save(content | {"state_dict": small_model.state_dict()}, path)
    return path


@pytest.fixture
def desk(shelf, tmp_path):
    """A copy of the shelf to damage, and a watch on what is left behind."""
    folder = tmp_path / "desk"
    shutil.copytree(shelf, folder)
    (folder / "foreign.zarr").mkdir()
    (folder / "foreign.zarr" / "thesis.txt").write_text("mine")
    return folder


def refused(capsys, desk, arguments, code, fragment):
    """Run it; assert one line, the exit code, and a folder that holds what it held."""
    capsys.readouterr()
    before = sorted(desk.rglob("*"))
    arguments = [str(a).replace("{f}", str(desk)) for a in arguments]
    found = run(arguments)
    message = capsys.readouterr().err
    assert found == code, message
    assert fragment in message
    assert message.count("\n") == 1, message
    assert "Traceback" not in message
    assert sorted(desk.rglob("*")) == before


@pytest.mark.parametrize("name", RECONSTRUCT)
def test_reconstruct_refuses(name, desk, capsys):
    make, code, fragment = RECONSTRUCT[name]
    arguments = ["reconstruct", make(desk), "-o", desk / "out.nii.gz", *fake(desk)]
    refused(capsys, desk, arguments, code, fragment)


@pytest.mark.parametrize("name", [n for n in RECONSTRUCT if n != "latents where a CT is wanted"])
def test_encode_refuses(name, desk, capsys):
    make, code, fragment = RECONSTRUCT[name]
    arguments = ["encode", make(desk), "-o", desk / "out.zarr", *fake(desk)]
    refused(capsys, desk, arguments, code, fragment)


@pytest.mark.parametrize("name", OPTIONS)
def test_reconstruct_refuses_options(name, desk, capsys):
    options, code, fragment = OPTIONS[name]
    arguments = ["reconstruct", desk / "ct.nii", *fake(desk), *options]
    refused(capsys, desk, arguments, code, fragment)


@pytest.mark.parametrize("name", DECODE)
def test_decode_refuses(name, desk, capsys):
    damage, options, code, fragment = DECODE[name]
    damage(desk)
    store = options[0] if options and options[0].startswith("{f}") else desk / "z.zarr"
    rest = [o for o in options if o is not store]
    arguments = ["decode", store, "-o", desk / "out.nii.gz", *fake(desk), *rest]
    refused(capsys, desk, arguments, code, fragment)


@pytest.mark.parametrize("name", OTHERS)
def test_other_verbs_refuse(name, desk, capsys):
    arguments, code, fragment = OTHERS[name]
    extra = fake(desk) if arguments[0] == "encode" else ["-q"]
    refused(capsys, desk, [*arguments, *extra], code, fragment)


def test_a_checkpoint_that_runs_code_is_not_run(desk, capsys):
    torch = pytest.importorskip("torch", reason="needs the export extra")

    class Trap:
        def __reduce__(self):
            return (print, ("the trap sprang",))

    torch.save({"args": {}, "state_dict": Trap()}, desk / "trap.ckpt")
    arguments = ["export", "-m", desk / "trap.ckpt", "-o", desk / "new", "-q"]
    refused(capsys, desk, arguments, 4, "contains only tensors")


@pytest.mark.parametrize("existing", ["bundle", "ct.nii"])
def test_an_export_never_replaces_what_is_there(desk, capsys, existing, small_weights):
    arguments = ["export", "-m", small_weights, "-o", desk / existing, "-q"]
    refused(capsys, desk, arguments, 4, "choose another name or pass --overwrite")


def test_weights_of_another_shape_are_refused(desk, capsys, small_weights):
    torch = pytest.importorskip("torch", reason="needs the export extra")
    content = torch.load(small_weights, weights_only=True)
    content["state_dict"].popitem()
    torch.save(content, desk / "short.ckpt")
    arguments = ["export", "-m", desk / "short.ckpt", "-o", desk / "new", "-q"]
    refused(capsys, desk, arguments, 4, "found 1 keys missing")
    content["args"]["embedding_dim"] = 48
    torch.save(content, desk / "short.ckpt")
    refused(capsys, desk, arguments, 4, "embedding_dim")


def test_a_checkpoint_of_another_network_is_refused(desk, capsys):
    torch = pytest.importorskip("torch", reason="needs the export extra")
    torch.save({"model": {"w": torch.zeros(3)}}, desk / "other.ckpt")
    arguments = ["export", "-m", desk / "other.ckpt", "-o", desk / "new", "-q"]
    refused(capsys, desk, arguments, 4, "state_dict")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    at=st.integers(0, 351),
    value=st.binary(min_size=1, max_size=8),
    cut=st.none() | st.integers(0, 2000),
)
def test_any_damage_to_a_header_ends_in_a_volume_or_in_one_line(
    at, value, cut, shelf, tmp_path, capsys
):
    raw = bytearray((shelf / "ct.nii").read_bytes())
    raw[at : at + len(value)] = value
    path = tmp_path / "fuzz.nii.gz"
    path.write_bytes(gzip.compress(bytes(raw[:cut] if cut is not None else raw), 1))
    out = tmp_path / "out.nii.gz"
    out.unlink(missing_ok=True)
    capsys.readouterr()
    code = run(["reconstruct", path, "-o", out, "--memory", "1GiB", *fake(shelf)])
    message = capsys.readouterr().err
    assert code in (0, 3, 6), message
    assert "Traceback" not in message
    assert out.exists() == (code == 0)
    assert message.count("\n") == (code != 0)


def test_nothing_but_zeros_is_a_volume(shelf, tmp_path):
    """A window of air that was cropped to zero is no reason to refuse."""
    image(tmp_path, np.zeros(SHAPE, np.int16))
    out = tmp_path / "out.nii"
    assert run(["reconstruct", tmp_path / "bad.nii.gz", "-o", out, *fake(shelf)]) == 0


def test_values_never_below_zero_are_accepted_when_one_insists(shelf, tmp_path):
    image(tmp_path, np.full(SHAPE, 500, np.int16))
    out = tmp_path / "out.nii"
    arguments = ["reconstruct", tmp_path / "bad.nii.gz", "-o", out, "--any-range", *fake(shelf)]
    assert run(arguments) == 0
