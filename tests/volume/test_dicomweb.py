"""URLs of series on a server, and errors that are raised before any request is sent."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.volume.dicomweb import _parse, is_remote, local_copies

SERIES = "dicomweb+https://pacs.example:8443/dicom-web/studies/1.2.3/series/4.5"


@pytest.mark.parametrize("text", [SERIES, SERIES + "/", str(Path(SERIES))])
def test_server_and_uids_are_read_from_a_url_even_as_a_path(text):
    assert _parse(Path(text)) == ("https://pacs.example:8443/dicom-web", "1.2.3", "4.5")


def test_a_url_for_results_needs_no_series():
    assert _parse(Path("dicomweb+http://pacs/dicom-web")) == ("http://pacs/dicom-web", None, None)


def test_local_paths_pass_through(tmp_path):
    assert not is_remote(tmp_path)
    with local_copies(tmp_path / "a.nii", tmp_path / "b.nii") as paths:
        assert paths == (tmp_path / "a.nii", tmp_path / "b.nii")


@pytest.mark.parametrize(
    ("name", "message"),
    [("dicomweb+ftp://x/y", "expected dicomweb"), ("dicomweb+http://x/y", "add the UIDs")],
)
def test_a_malformed_url_is_refused(name, message, tmp_path):
    pytest.importorskip("dicomweb_client", reason="needs the dicomweb extra")
    with pytest.raises(UsageError, match=message), local_copies(Path(name), tmp_path / "b.nii"):
        pass


def test_an_unreachable_server_gives_a_one_line_error(tmp_path):
    pytest.importorskip("dicomweb_client", reason="needs the dicomweb extra")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        name = f"dicomweb+http://127.0.0.1:{free.getsockname()[1]}/studies/1/series/2"
        with (
            pytest.raises(VolumeError, match="expected to fetch"),
            local_copies(Path(name), tmp_path),
        ):
            pass
