"""What an upload holds is judged from its bytes, and before it can fill anything."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest

from fvae_deploy.server.contents import settle
from fvae_deploy.server.refusals import RefusedError
from fvae_deploy.server.settings import Limits


def with_zip64(names, end):
    """A zip whose end says `end` of (count, bytes), and its ZIP64 record the truth."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    whole = body.getvalue()
    place = whole.index(b"PK\x01\x02")  # the directory
    stop = whole.find(b"PK\6\6", place) if len(names) > 0xFFFF else whole.rindex(b"PK\5\6")
    directory, listed = whole[place:stop], (len(names), len(names), stop - place, place)
    record64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *listed)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, place + len(directory), 1)
    ending = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, end[0], end[0], end[1], place, 0)
    return whole[:place] + directory + record64 + locator + ending


def settled(content, tmp_path):
    (tmp_path / "upload").write_bytes(content)
    return settle(tmp_path / "upload", "zip", tmp_path, "reconstruct", Limits())


def test_a_directory_of_64_bits_is_judged_by_its_own_numbers(tmp_path):
    names = [f"{number}/" for number in range(66_000)]
    with pytest.raises(RefusedError, match="at most 65534 files, found more") as refused:
        settled(with_zip64(names, (1, 47)), tmp_path)
    assert refused.value.status == 413
    assert [path.name for path in tmp_path.iterdir()] == ["upload"]


def test_a_small_one_of_64_bits_is_taken(tmp_path):
    assert settled(with_zip64(["a", "b"], (0xFFFF, 0xFFFFFFFF)), tmp_path) == "dicom"


def test_one_that_points_elsewhere_is_refused(tmp_path):
    content = bytearray(with_zip64(["a", "b"], (2, 94)))
    content[content.rindex(b"PK\6\7") + 8] ^= 1
    with pytest.raises(RefusedError, match="expected a sound zip"):
        settled(bytes(content), tmp_path)
