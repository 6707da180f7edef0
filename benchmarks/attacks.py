"""Attack a running `fvae serve` and print its responses: `python benchmarks/attacks.py`.

Starts a server on loopback with low limits, tries each attack and prints a table. The exit status
is 1 if any response is not the expected one.
"""

from __future__ import annotations

import gzip
import io
import json
import socket
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import requests
from live_server import LiveServer
from openjpeg.utils import encode_array
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, JPEG2000Lossless

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fake_engine import register, write_fake_bundle

LIMITS = ("--max-upload", "1MiB", "--max-volume", "64MiB", "--memory", "200MiB", "--queue", "4")
LIMITS += ("--silence", "3")
Outcome = tuple[str, bool]  # the response as text, and whether it is an expected one
ATTACKS: dict[str, Callable[[LiveServer], Outcome]] = {}


def attack(title: str) -> Callable[[Callable[[LiveServer], Outcome]], None]:
    """Return a decorator that adds a function to the table of attacks."""

    def register(function: Callable[[LiveServer], Outcome]) -> None:
        ATTACKS[title] = function

    return register


def nifti(shape: tuple[int, ...], voxels: bytes | None = None) -> bytes:
    """Return a NIfTI file whose header has this shape; `voxels` follow it as they are."""
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    image.header.set_data_shape(shape)
    image.header["vox_offset"] = 352
    image.header["magic"] = b"n+1\0"
    body = b"" if voxels is None else voxels
    return bytes(image.header.binaryblock) + bytes(4) + body


def packed(entries: dict[str, bytes]) -> bytes:
    """Return a zip of these entries."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return target.getvalue()


def outcome(response: requests.Response, *expected: int) -> Outcome:
    """Return an HTTP response as text, and whether its status is one of those expected."""
    detail = response.json().get("detail", "") if "json" in response.headers["content-type"] else ""
    text = detail if isinstance(detail, str) else detail[0]["msg"]
    return f"{response.status_code} {text}", response.status_code in expected


def raw(server: LiveServer, data: bytes, wait: float = 40) -> str:
    """Send bytes unchanged over TCP; return the first line of the response."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as connection:
        try:
            connection.sendall(data)
            answer = connection.recv(65536)
        except OSError as error:
            return f"closed ({type(error).__name__})"
    return answer.partition(b"\r\n")[0].decode("latin-1") or "closed"


def head(server: LiveServer, *lines: str) -> bytes:
    """Return the head of an upload request, with the token and these header lines."""
    first = ["POST /v1/reconstruct HTTP/1.1", f"Host: 127.0.0.1:{server.port}"]
    return "\r\n".join([*first, f"Authorization: Bearer {server.token}", *lines, "", ""]).encode()


def outcome_of_job(server: LiveServer, response: requests.Response) -> Outcome:
    """Wait for the job of an accepted upload: it must fail, and its error reveal no path."""
    if response.status_code != 202:
        return outcome(response, 413, 415, 422)
    job = server.wait(response.json()["id"])
    safe = job["state"] == "failed" and str(server.folder) not in job["error"]
    return f"202, then failed: {job['error']}", safe


@attack("no token")
def _(server: LiveServer) -> Outcome:
    return outcome(requests.get(f"{server.url}/v1/jobs", timeout=30), 401)


@attack("a wrong token")
def _(server: LiveServer) -> Outcome:
    headers = {"Authorization": f"Bearer {server.token[:-1]}x"}
    return outcome(requests.get(f"{server.url}/v1/jobs", headers=headers, timeout=30), 401)


@attack("the token's hash as a token")
def _(server: LiveServer) -> Outcome:
    headers = {"Authorization": f"Bearer {server.store.tokens()[0][1]}"}
    return outcome(requests.get(f"{server.url}/v1/jobs", headers=headers, timeout=30), 401)


@attack("another user's job")
def _(server: LiveServer) -> Outcome:
    job = server.post("reconstruct", nifti((8, 8, 2), bytes(256))).json()["id"]
    server.wait(job)
    from fvae_deploy.server.auth import make_token

    other = make_token(server.store, f"other{time.time_ns()}")
    headers = {"Authorization": f"Bearer {other}"}
    url = f"{server.url}/v1/jobs/{job}/result"
    return outcome(requests.get(url, headers=headers, timeout=30), 404)


@attack("path traversal in a job ID")
def _(server: LiveServer) -> Outcome:
    lines = f"Authorization: Bearer {server.token}\r\nHost: 127.0.0.1\r\n\r\n"
    path = "/v1/jobs/..%2f..%2f..%2fetc%2fpasswd/result"
    answer = raw(server, f"GET {path} HTTP/1.1\r\n{lines}".encode())
    return answer, answer.startswith(("HTTP/1.1 404", "HTTP/1.1 422"))


@attack("path traversal in the file names of a zip")
def _(server: LiveServer) -> Outcome:
    outside = [server.store.files, *server.store.files.parents][:4]  # above the job's folder
    name = "fvae_was_here"
    body = packed({f"{'../' * n}{name}": b"x" * 2000 for n in range(2, 2 + len(outside))})
    answer = outcome_of_job(server, server.post("reconstruct", body))
    return answer[0], answer[1] and not any((folder / name).exists() for folder in outside)


@attack("path traversal in the chunk names of a latent store")
def _(server: LiveServer) -> Outcome:
    body = packed({"zarr.json": b"{}", "c/../../../x": b"y"})
    return outcome(server.post("decode", body), 415)


@attack("a gzip bomb: 60 MiB of zeros, declared in the header, in 60 KiB")
def _(server: LiveServer) -> Outcome:
    body = gzip.compress(nifti((512, 512, 120), bytes(60 << 20)))
    return outcome(server.post("reconstruct", body), 413)


@attack("a gzip bomb: the header declares more than --max-volume")
def _(server: LiveServer) -> Outcome:
    body = gzip.compress(nifti((512, 512, 2000), bytes(1 << 20)))
    return outcome(server.post("reconstruct", body), 413)


@attack("a gzip bomb after a small volume: 512 MiB that the header does not declare")
def _(server: LiveServer) -> Outcome:
    pack = zlib.compressobj(9, wbits=31)
    ct = np.random.default_rng(0).integers(-1000, 1000, 32 * 32 * 8, np.int16).tobytes()
    pieces = [pack.compress(nifti((32, 32, 8), ct))]
    pieces += [pack.compress(bytes(1 << 20)) for _ in range(512)]
    body = b"".join([*pieces, pack.flush()])
    start = time.monotonic()
    response = server.post("reconstruct", body)
    job = server.wait(response.json()["id"])
    largest = max(server.resident().values()) >> 20
    took = time.monotonic() - start
    text = f"{response.status_code}, then {job['state']} after {took:.1f} s, the rest not unpacked"
    return f"{text}; largest process {largest} MiB", took < 10 and largest < 400


@attack("a zip bomb: 300 MiB in 300 KiB")
def _(server: LiveServer) -> Outcome:
    return outcome(server.post("reconstruct", packed({"a.dcm": bytes(300 << 20)})), 413)


@attack("a DICOM slice of 16x16 whose JPEG 2000 data has 9000x9000 pixels")
def _(server: LiveServer) -> Outcome:
    pixels = bytes(encode_array(np.zeros((9000, 9000), np.uint16)))
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = JPEG2000Lossless
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.SeriesInstanceUID, data.Modality, data.Rows, data.Columns = "1.2", "CT", 16, 16
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness = [1, 1], 1
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 15, 0, 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.PixelData = encapsulate([pixels])
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return outcome_of_job(server, server.post("reconstruct", packed({"a.dcm": file.getvalue()})))


@attack("a zip whose directory states wrong sizes")
def _(server: LiveServer) -> Outcome:
    body = bytearray(packed({"a.dcm": bytes(30 << 20)}))
    entry = body.rindex(b"PK\x01\x02")
    struct.pack_into("<I", body, entry + 24, 2000)  # states 2000 bytes, contains 30 MiB
    return outcome_of_job(server, server.post("reconstruct", bytes(body)))


@attack("a truncated zip")
def _(server: LiveServer) -> Outcome:
    return outcome(server.post("reconstruct", packed({"a.dcm": b"x" * 2000})[:-30]), 415)


@attack("a body with Content-Encoding: gzip")
def _(server: LiveServer) -> Outcome:
    body = gzip.compress(bytes(1 << 20))
    return outcome(server.post("reconstruct", body, headers={"Content-Encoding": "gzip"}), 415)


@attack("a body that is too large, with its length declared")
def _(server: LiveServer) -> Outcome:
    answer = raw(server, head(server, "Content-Length: 99999999"))
    return answer, answer.startswith("HTTP/1.1 413")


@attack("a body that is too large, in endless chunks")
def _(server: LiveServer) -> Outcome:
    chunk = b"10000\r\n" + nifti((64, 64, 64)).ljust(65536, b"\0") + b"\r\n"
    answer = raw(server, head(server, "Transfer-Encoding: chunked") + 20 * chunk)
    return answer, answer.startswith(("HTTP/1.1 413", "closed"))


@attack("a body that ends before its declared length")
def _(server: LiveServer) -> Outcome:
    before = set(server.store.files.iterdir())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(server, "Content-Length: 100000") + nifti((8, 8, 8)))
    time.sleep(1)
    leftover = set(server.store.files.iterdir()) - before
    return f"connection closed; {len(leftover)} files left", not leftover


@attack("a body longer than its declared length")
def _(server: LiveServer) -> Outcome:
    data = head(server, "Content-Length: 10") + bytes(4096)
    answer = raw(server, data)
    return answer, answer.startswith("HTTP/1.1 4")


@attack("two different Content-Length headers")
def _(server: LiveServer) -> Outcome:
    lines = ("Content-Length: 10", "Content-Length: 20")
    answer = raw(server, head(server, *lines) + bytes(20))
    return answer, answer.startswith("HTTP/1.1 400")


@attack("an upload that stalls")
def _(server: LiveServer) -> Outcome:
    start = time.monotonic()
    answer = raw(server, head(server, "Content-Length: 100000") + bytes(10))
    took = time.monotonic() - start
    return f"{answer} after {took:.0f} s", answer.startswith("HTTP/1.1 408") and took < 10


@attack("a header of 100 kB")
def _(server: LiveServer) -> Outcome:
    answer = raw(server, head(server, "X-Large: " + 100000 * "x"))
    return answer, answer.startswith(("HTTP/1.1 4", "closed")) and "422" not in answer


@attack("a request head that never ends")
def _(server: LiveServer) -> Outcome:
    answer = raw(server, b"GET / HTTP/1.1\r\nX: " + 100000 * b"y")
    return answer, answer.startswith(("HTTP/1.1 4", "closed")) and "422" not in answer


@attack("bytes that are not HTTP")
def _(server: LiveServer) -> Outcome:
    answer = raw(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
    return answer, answer.startswith(("HTTP/1.1 400", "closed"))


@attack("a request from another site's page")
def _(server: LiveServer) -> Outcome:
    return outcome(server.post("reconstruct", b"", headers={"Origin": "http://evil.example"}), 403)


@attack("more uploads at the same time than the queue holds")
def _(server: LiveServer) -> Outcome:
    connections = []
    try:
        for _ in range(4):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(head(server, "Content-Length: 100000") + nifti((8, 8, 8)))
            connections.append(connection)
        time.sleep(0.5)
        response = server.post("reconstruct", nifti((8, 8, 2), bytes(256)))
        text, expected = outcome(response, 429)
        return f"{text} (Retry-After {response.headers.get('Retry-After')})", expected
    finally:
        for connection in connections:
            connection.close()


@attack("an unknown option")
def _(server: LiveServer) -> Outcome:
    return outcome(server.post("reconstruct", b"x", output="/etc/passwd"), 422)


@attack("text instead of a volume")
def _(server: LiveServer) -> Outcome:
    return outcome(server.post("reconstruct", b"hello " * 1000), 415)


@attack("a NIfTI file with too few voxels")
def _(server: LiveServer) -> Outcome:
    return outcome_of_job(server, server.post("reconstruct", nifti((64, 64, 10), bytes(1000))))


@attack("a damaged latent store")
def _(server: LiveServer) -> Outcome:
    shape = {"shape": [10**9] * 4, "zarr_format": 3, "node_type": "array"}
    return outcome_of_job(
        server, server.post("decode", packed({"zarr.json": json.dumps(shape).encode()}))
    )


def main() -> None:
    """Try every attack; exit with status 1 if any response was not an expected one."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        register(patch)
        write_fake_bundle(Path(folder) / "fake")
        fake = ("-m", str(Path(folder) / "fake"), "-e", "fake")
        server = LiveServer(Path(folder) / "server", *fake, *LIMITS)
        server.start()
        try:
            print("| attack | response | |\n|---|---|---|")
            for title, function in ATTACKS.items():
                text, expected = function(server)
                failures += not expected
                verdict = "as expected" if expected else "**NOT AS EXPECTED**"
                print(f"| {title} | {text} | {verdict} |", flush=True)
        finally:
            server.kill()
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
