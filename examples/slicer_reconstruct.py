"""Send the CT that 3D Slicer shows to a server of fvae, and show its reconstruction.

In Slicer's Python console, with a server that runs anywhere (docs/operating.md):

    import sys; sys.path.append("/path/to/fvae/examples")
    import slicer_reconstruct
    slicer_reconstruct.reconstruct_active_volume("http://127.0.0.1:8080", token="...")

Outside Slicer, on a NIfTI file; the token is read from the environment variable FVAE_TOKEN:

    python examples/slicer_reconstruct.py ct.nii.gz recon.nii.gz --server http://127.0.0.1:8080

Needs Python's standard library alone, 3.9 or later. Only `reconstruct_active_volume` calls Slicer.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import struct
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

TIMEOUT = 60  # seconds without an answer
ENDED = ("done", "failed", "cancelled")


def reconstruct_active_volume(server, token="", **options):
    """Reconstruct the background volume of the red slice view; return the new volume node.

    `options` are those of the server's /v1/reconstruct, such as hu_window="soft". The new volume
    has the axes, the spacing and the transform of the old one, and is shown over it.
    """
    import slicer

    logic = slicer.app.layoutManager().sliceWidget("Red").sliceLogic()
    volume = logic.GetBackgroundLayer().GetVolumeNode()
    if volume is None:
        raise RuntimeError("expected a volume in the red slice view, found none: load a CT first")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "ct.nii.gz", Path(folder) / "recon.nii.gz"
        slicer.util.exportNode(volume, str(source))
        reconstruct(source, target, server, token, slicer.app.processEvents, **options)
        name = f"{volume.GetName()} reconstructed"
        result = slicer.util.loadVolume(str(target), {"name": name, "show": False})
    result.CopyOrientation(volume)  # to the last digit, which NIfTI rounds to float32
    result.SetAndObserveTransformNodeID(volume.GetTransformNodeID())
    slicer.util.setSliceViewerLayers(background=volume, foreground=result, foregroundOpacity=0.5)
    return result


def reconstruct(source, target, server, token="", wait=lambda: None, **options):
    """Reconstruct a NIfTI file on a server, and write the result as .nii or .nii.gz.

    `wait` is called several times a second while the job runs. The target appears when it is
    complete and on the grid of the source. Raises RuntimeError, in one line, for what the server
    refuses, a job that fails, and a server that does not answer.
    """
    source, target = Path(source), Path(target)
    options["format"] = "nii.gz" if target.name.endswith(".gz") else "nii"
    query = urllib.parse.urlencode(options)
    with source.open("rb") as body:
        size, kind = str(source.stat().st_size), "application/octet-stream"
        headers = {"Content-Length": size, "Content-Type": kind}
        job = _json(_ask(server, f"reconstruct?{query}", token, "POST", body, headers))
    place = f"jobs/{job['id']}"
    try:
        while job["state"] not in ENDED:
            wait()
            time.sleep(0.2)
            job = _json(_ask(server, place, token))
        if job["state"] != "done":
            raise RuntimeError(job["error"] or f"the job was {job['state']}")
        partial = target.with_name(f".{os.getpid()}.{target.name}")
        try:
            with _ask(server, f"{place}/result", token) as answer, partial.open("wb") as file:
                while block := answer.read(1 << 20):
                    file.write(block)
            if grid(partial) != grid(source):
                raise RuntimeError("expected the grid of the source, found another: do not use it")
            partial.replace(target)
        finally:
            if partial.exists():
                partial.unlink()
    finally:
        _ask(server, place, token, "DELETE").close()  # the server keeps no copy of the scan


def grid(path):
    """Return the shape of a NIfTI file, and the numbers of its sform, or else of its qform."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        header = file.read(540)
    order = next((o for o in "<>" if struct.unpack(o + "i", header[:4])[0] in (348, 540)), None)
    if order is None:
        raise RuntimeError(f"expected a NIfTI file, found no header in {path}")
    if struct.unpack(order + "i", header[:4])[0] == 348:
        shape, forms = struct.unpack_from(order + "8h", header, 40), (252, "2h", "f", 256, 280, 76)
    else:
        shape, forms = struct.unpack_from(order + "8q", header, 16), (344, "2i", "d", 352, 400, 104)
    codes, kind, number, quaternion, rows, sizes = forms
    sform = struct.unpack_from(order + kind, header, codes)[1]
    affine = struct.unpack_from(f"{order}12{number}", header, rows)
    if not sform:
        affine = struct.unpack_from(f"{order}6{number}", header, quaternion)
        affine += struct.unpack_from(f"{order}4{number}", header, sizes)
    return shape[1:4], affine


def _ask(server, path, token, method="GET", body=None, headers=None):
    """Send a request; return the answer, or raise RuntimeError with the server's own line."""
    headers = {"Connection": "close", **(headers or {})}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        url = urllib.parse.urlsplit(server)
        secure = url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=TIMEOUT)
        # Where a scan is refused before all of it was sent, the answer says why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, f"{url.path.rstrip('/')}/v1/{path}", body, headers)
        answer = connection.getresponse()
        if answer.status < 400:
            return answer
        content = answer.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RuntimeError(f"expected an answer of {server}, found: {error!r}") from None
    try:
        detail = json.loads(content)["detail"]
    except (ValueError, KeyError, TypeError):
        detail = answer.reason
    raise RuntimeError(f"HTTP {answer.status}: {detail}")


def _json(answer):
    with answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[3] != "--server":
        sys.exit(__doc__)
    try:
        reconstruct(sys.argv[1], sys.argv[2], sys.argv[4], os.environ.get("FVAE_TOKEN", ""))
    except RuntimeError as error:
        sys.exit(str(error))
