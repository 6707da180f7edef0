"""Zips with a damaged or huge directory are refused before they fill memory or disk."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest

from fvae_deploy.server.contents import store_upload
from fvae_deploy.server.refusals import RefusedError
from fvae_deploy.server.settings import Limits


def with_zip64(names, end):
    """Return a zip whose end record has `end`, (count, bytes), and whose ZIP64 record is true."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    whole = body.getvalue()
    start = whole.index(b"PK\x01\x02")  # the directory
    stop = whole.find(b"PK\6\6", start) if len(names) > 0xFFFF else whole.rindex(b"PK\5\6")
    directory, true_values = whole[start:stop], (len(names), len(names), stop - start, start)
    record64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *true_values)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
    ending = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, end[0], end[0], end[1], start, 0)
    return whole[:start] + directory + record64 + locator + ending


def stored(content, tmp_path):
    (tmp_path / "upload").write_bytes(content)
    return store_upload(tmp_path / "upload", "zip", tmp_path, "reconstruct", Limits())


def test_a_zip64_directory_is_checked_by_its_own_record(tmp_path):
    names = [f"{number}/" for number in range(66_000)]
    with pytest.raises(RefusedError, match=r"at most 65534 files .* found more") as refused:
        stored(with_zip64(names, (1, 47)), tmp_path)
    assert refused.value.status == 413
    assert [path.name for path in tmp_path.iterdir()] == ["upload"]


def test_a_small_zip64_is_accepted(tmp_path):
    assert stored(with_zip64(["a", "b"], (0xFFFF, 0xFFFFFFFF)), tmp_path) == "dicom"


def test_a_zip64_locator_with_a_wrong_offset_is_refused(tmp_path):
    content = bytearray(with_zip64(["a", "b"], (2, 94)))
    content[content.rindex(b"PK\6\7") + 8] ^= 1
    with pytest.raises(RefusedError, match="expected a valid zip"):
        stored(bytes(content), tmp_path)
