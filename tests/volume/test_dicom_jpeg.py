"""Slices in lossless JPEG and in JPEG-LS, as scanners and archives store them, give the same HU."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from dicom_series import put, refusal, values
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLossless, JPEGLosslessSV1, JPEGLSLossless

CODES = 17  # of differences, by their number of bits: 0 to 16


def lossless_jpeg(pixels: NDArray[np.uint16], bits: int) -> bytes:
    """Encode by ITU-T T.81, annex H: each pixel less its left neighbour, in Huffman codes.

    The first pixel of a row is predicted by the one above it. All codes have five bits.
    """
    before = np.empty_like(pixels)
    before[:, 1:] = pixels[:, :-1]
    before[1:, 0] = pixels[:-1, 0]
    before[0, 0] = 1 << (bits - 1)
    differences = (pixels.astype(int) - before + 32768) % 65536 - 32768
    text = ""
    for difference in differences.ravel().tolist():
        size = 16 if difference == -32768 else abs(difference).bit_length()
        text += f"{size:05b}"
        if 0 < size < 16:
            low = difference if difference > 0 else difference + (1 << size) - 1
            text += f"{low:0{size}b}"
    text += "1" * (-len(text) % 8)
    coded = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = struct.pack(">HBHHBBBB", 11, bits, *pixels.shape, 1, 1, 0x11, 0)
    table = struct.pack(">HB", 19 + CODES, 0) + bytes([0, 0, 0, 0, CODES, *[0] * 11, *range(CODES)])
    scan = struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 0, 0)
    segments = ((0xC3, frame), (0xC4, table), (0xDA, scan))
    return b"\xff\xd8" + b"".join(b"\xff%c" % m + s for m, s in segments) + coded + b"\xff\xd9"


def pixels_of(bits: int, signed: bool) -> NDArray[np.uint16]:
    """Return random numbers, a smooth area and both ends of the range."""
    rng = np.random.default_rng(bits)
    pixels = rng.integers(0, 1 << bits, (24, 31)).astype(np.uint16)
    pixels[8:16] = 1000 + np.arange(31)
    pixels[0, :4] = 0, (1 << bits) - 1, 0, 1 << (bits - 1)
    return pixels if not signed else pixels.astype(np.int16).astype(np.uint16)


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLossless, JPEGLSLossless])
@pytest.mark.parametrize(("bits", "signed"), [(12, False), (16, False), (16, True)])
def test_lossless_jpeg_gives_the_hu_of_plain_pixels(
    tmp_path: Path, syntax: str, bits: int, signed: bool
) -> None:
    if syntax == JPEGLSLossless:
        pytest.importorskip("jpeg_ls", reason="needs pip install pyjpegls to write the slices")
    facts = {"BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": int(signed)}
    for folder in ("plain", "jpeg"):
        (tmp_path / folder).mkdir()
        for k in range(3):
            pixels = np.roll(pixels_of(bits, signed), k)
            path = tmp_path / folder / f"{k}.dcm"
            data = put(path, k, pixels, **facts)
            if folder == "plain":
                continue
            if syntax == JPEGLSLossless:
                data.compress(syntax)
            else:
                data.file_meta.TransferSyntaxUID = syntax
                data.PixelData = encapsulate([lossless_jpeg(pixels, bits)])
                data["PixelData"].VR = "OB"
            data.save_as(path)
    np.testing.assert_array_equal(values(tmp_path / "jpeg"), values(tmp_path / "plain"))


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_cut_lossless_jpeg_is_refused(tmp_path: Path, kept: float) -> None:
    pixels = pixels_of(12, signed=False)
    for k in range(3):
        data = put(tmp_path / f"{k}.dcm", k, pixels, BitsStored=12, HighBit=11)
        coded = lossless_jpeg(pixels, 12)
        data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        # The element is whole, its content is not.
        data.PixelData = encapsulate([coded[: int(len(coded) * (kept if k == 1 else 1))]])
        data["PixelData"].VR = "OB"
        data.save_as(tmp_path / f"{k}.dcm")
    assert "1.dcm" in refusal(tmp_path)


@pytest.mark.parametrize("frames", ["x", r"1\2", ""])
def test_fragments_an_empty_item_and_odd_numbers_of_frames(tmp_path: Path, frames: str) -> None:
    """One picture in two items, and an empty one after it, is whole; its last item decides."""
    pixels = pixels_of(12, signed=False)
    for k in range(3):
        data = put(tmp_path / f"{k}.dcm", k, pixels, BitsStored=12, HighBit=11)
        coded = lossless_jpeg(pixels, 12)
        half = len(coded) // 4 * 2
        items = [b"", coded[:half], coded[half:] + b"\0" * (len(coded) % 2), b""]
        data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        data.PixelData = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(i)) + i for i in items)
        data["PixelData"].VR = "OB"
        data["PixelData"].is_undefined_length = True
        if frames:
            data.add_new("NumberOfFrames", "LO", frames)
        data.save_as(tmp_path / f"{k}.dcm")
    if not frames:
        assert values(tmp_path).shape[0] == 3
    else:
        assert "Traceback" not in refusal(tmp_path)
