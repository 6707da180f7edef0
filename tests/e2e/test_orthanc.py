"""A series pulled from a real Orthanc over DICOMweb, reconstructed, and pushed back."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
import requests
from dicom_series import write_series

import fvae_deploy as fvae
from fvae_deploy.volume.open import open_volume

pytestmark = pytest.mark.e2e
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    """Run a server of its own, with nothing in it; yields its URL."""
    program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
    assert Path(program).exists(), (
        "needs the Debian packages orthanc and orthanc-dicomweb: make e2e"
    )
    folder, port = tmp_path_factory.mktemp("orthanc"), free_port()
    settings = {
        "Name": "test",
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": port,
        "DicomPort": free_port(),
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"fvae": "secret"},
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    log = (folder / "log").open("wb")
    process = subprocess.Popen([program, folder / "orthanc.json"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            if requests.get(f"{url}/system", auth=("fvae", "secret"), timeout=5).ok:
                break
        except requests.ConnectionError:
            time.sleep(0.1)
    else:
        raise RuntimeError((folder / "log").read_text())
    yield url
    process.kill()
    process.wait()
    log.close()


def send(url, folder):
    for path in folder.iterdir():
        answer = requests.post(
            f"{url}/instances", data=path.read_bytes(), auth=("fvae", "secret"), timeout=30
        )
        assert answer.ok, answer.text
    return pydicom.dcmread(next(folder.iterdir()), stop_before_pixels=True)


def fvae_run(*arguments, secret="Basic ZnZhZTpzZWNyZXQ="):
    line = [sys.executable, "-m", "fvae_deploy", *map(str, arguments)]
    import os

    environment = {**os.environ, "FVAE_DICOMWEB_AUTHORIZATION": secret}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def test_a_series_goes_from_the_server_through_fvae_and_back(orthanc, fake_bundle, tmp_path):
    write_series(tmp_path / "source", (32, 24, 21))
    first = send(orthanc, tmp_path / "source")
    root = f"dicomweb+{orthanc}/dicom-web"
    source = f"{root}/studies/{first.StudyInstanceUID}/series/{first.SeriesInstanceUID}"
    fake = ["-m", fake_bundle, "-e", "fake"]
    done = fvae_run("reconstruct", source, "-o", root, *fake)
    assert done.returncode == 0, done.stderr
    query = {"Level": "Series", "Query": {"StudyInstanceUID": first.StudyInstanceUID}}
    found = requests.post(
        f"{orthanc}/tools/find", json=query, auth=("fvae", "secret"), timeout=30
    ).json()
    assert len(found) == 2
    derived = tmp_path / "derived"
    derived.mkdir()
    for ident in found:
        series = requests.get(
            f"{orthanc}/series/{ident}", auth=("fvae", "secret"), timeout=30
        ).json()
        if series["MainDicomTags"]["SeriesInstanceUID"] == first.SeriesInstanceUID:
            continue
        for n, instance in enumerate(series["Instances"]):
            file = requests.get(
                f"{orthanc}/instances/{instance}/file", auth=("fvae", "secret"), timeout=30
            )
            (derived / f"{n}.dcm").write_bytes(file.content)
    fvae.reconstruct(tmp_path / "source", tmp_path / "r.nii", model=fake_bundle, engine="fake")
    made, wanted = open_volume(derived), open_volume(tmp_path / "r.nii")
    np.testing.assert_array_equal(
        np.concatenate([*made.slabs(5)]), np.concatenate([*wanted.slabs(5)])
    )
    np.testing.assert_allclose(made.geometry.affine, wanted.geometry.affine, atol=1e-4)
    slices = [pydicom.dcmread(path, stop_before_pixels=True) for path in derived.iterdir()]
    assert {tuple(data.ImageType[:2]) for data in slices} == {("DERIVED", "SECONDARY")}
    assert {str(data.PatientName) for data in slices} == {"Doe^Jane"}
    references = {data.SourceImageSequence[0].ReferencedSOPInstanceUID for data in slices}
    originals = [pydicom.dcmread(path) for path in (tmp_path / "source").iterdir()]
    assert references == {data.SOPInstanceUID for data in originals}


@pytest.mark.parametrize(
    ("uid", "secret", "message"),
    [
        ("1.2.3", "Basic ZnZhZTpzZWNyZXQ=", "expected"),
        ("1.2.3", "Basic d3Jvbmc6d3Jvbmc=", "401"),
    ],
)
def test_what_the_server_has_not_or_refuses_is_one_line(orthanc, uid, secret, message, tmp_path):
    source = f"dicomweb+{orthanc}/dicom-web/studies/{uid}/series/{uid}"
    done = fvae_run("reconstruct", source, "-o", tmp_path / "r.nii", secret=secret)
    assert done.returncode == 3
    assert done.stderr.startswith("fvae: expected")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
