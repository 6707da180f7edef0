"""Names of series on a server, and what is refused before anything is asked of it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.volume.dicomweb import _parse, at_hand, is_remote

SERIES = "dicomweb+https://pacs.example:8443/dicom-web/studies/1.2.3/series/4.5"


@pytest.mark.parametrize("text", [SERIES, SERIES + "/", str(Path(SERIES))])
def test_a_series_is_found_in_its_name_even_as_a_path(text):
    assert _parse(Path(text)) == ("https://pacs.example:8443/dicom-web", "1.2.3", "4.5")


def test_a_place_for_results_needs_no_series():
    assert _parse(Path("dicomweb+http://pacs/dicom-web")) == ("http://pacs/dicom-web", None, None)


def test_local_names_pass_through(tmp_path):
    assert not is_remote(tmp_path)
    with at_hand(tmp_path / "a.nii", tmp_path / "b.nii") as names:
        assert names == (tmp_path / "a.nii", tmp_path / "b.nii")


@pytest.mark.parametrize(
    ("name", "message"),
    [("dicomweb+ftp://x/y", "expected dicomweb"), ("dicomweb+http://x/y", "name a series")],
)
def test_what_is_no_series_is_refused(name, message, tmp_path):
    pytest.importorskip("dicomweb_client", reason="needs the dicomweb extra")
    with pytest.raises(UsageError, match=message), at_hand(Path(name), tmp_path / "b.nii"):
        pass


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    pytest.importorskip("dicomweb_client", reason="needs the dicomweb extra")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        name = f"dicomweb+http://127.0.0.1:{free.getsockname()[1]}/studies/1/series/2"
        with pytest.raises(VolumeError, match="expected to fetch"), at_hand(Path(name), tmp_path):
            pass
