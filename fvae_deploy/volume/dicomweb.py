"""Input and output on a DICOMweb server.

    dicomweb+https://host/dicom-web/studies/1.2.3/series/4.5.6    a CT series to read
    dicomweb+https://host/dicom-web                               a server to store the result on

The series is downloaded with WADO-RS before a run, and the result is uploaded with STOW-RS after
it. The value of the environment variable FVAE_DICOMWEB_AUTHORIZATION is sent as the Authorization
header; it is no command-line option because other users of the machine can see those. Slices are
kept in a private temporary folder during the run.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvae_deploy.errors import UsageError, VolumeError

if TYPE_CHECKING:
    from dicomweb_client.api import DICOMwebClient

# pathlib.Path turns the "//" after the scheme into "/".
_URL = re.compile(r"dicomweb\+(https?):/+(.+?)(?:/studies/([0-9.]+)/series/([0-9.]+))?/*")
_BATCH = 16  # slices per request: 8 MiB at 512 x 512


def is_remote(path: Path) -> bool:
    """Return True for a DICOMweb URL."""
    return str(path).startswith("dicomweb+")


@contextmanager
def local_copies(ct: Path, output: Path, *, push: bool = True) -> Iterator[tuple[Path, Path]]:
    """Download a remote input, yield local paths, then upload the result to a remote output.

    Local paths are yielded unchanged. Raises UsageError for a malformed URL, VolumeError if the
    server refuses a request or cannot be reached.
    """
    if not (is_remote(ct) or is_remote(output)):
        yield ct, output
        return
    with tempfile.TemporaryDirectory(prefix="fvae-") as folder:
        source, target = ct, output
        if is_remote(ct):
            source = Path(folder) / "series"
            _pull(ct, source)
        if is_remote(output):
            target = Path(folder) / "result.dcm"
            _parse(output)  # refuses a malformed URL now, not after the work
        yield source, target
        if push and is_remote(output):
            _push(target, output)


def _parse(path: Path) -> tuple[str, str | None, str | None]:
    """Split a DICOMweb path into the server's URL, study UID and series UID."""
    match = _URL.fullmatch(str(path))
    if match is None:
        raise UsageError(
            f"expected dicomweb+https://HOST/ROOT/studies/UID/series/UID, found {path}: correct "
            "the URL"
        )
    scheme, server, study, series = match.groups()
    return f"{scheme}://{server}", study, series


def _client(url: str) -> DICOMwebClient:
    from fvae_deploy.optional import require

    require("dicomweb_client", extra="dicomweb")
    from dicomweb_client.api import DICOMwebClient

    secret = os.environ.get("FVAE_DICOMWEB_AUTHORIZATION")
    client = DICOMwebClient(url, headers={"Authorization": secret} if secret else None)
    client.set_http_retry_params(max_attempts=3, wait_exponential_multiplier=200)  # milliseconds
    return client


@contextmanager
def _network_errors(path: Path, action: str) -> Iterator[None]:
    from requests import RequestException

    try:
        yield
    except (RequestException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VolumeError(
            f"expected to {action} {path}, found: {reason}: check the server and the UIDs"
        ) from None


def _pull(path: Path, folder: Path) -> None:
    url, study, series = _parse(path)
    if study is None or series is None:
        raise UsageError(
            f"expected …/studies/UID/series/UID, found {path}: add the UIDs of study and series"
        )
    client = _client(url)
    folder.mkdir()
    count = 0
    with _network_errors(path, "fetch"):
        for count, data in enumerate(client.iter_series(study, series), start=1):
            file = folder / f"{count:06}.dcm"
            data.save_as(file, enforce_file_format=True)
            os.utime(file, (0, 0))  # a fixed mtime, so that --resume accepts a second download
    if not count:
        raise VolumeError(f"expected slices in {path}, found none: check the UIDs")


def _push(folder: Path, path: Path) -> None:
    import pydicom

    client = _client(_parse(path)[0])
    files = sorted(folder.glob("*.dcm"))
    for begin in range(0, len(files), _BATCH):
        batch = [pydicom.dcmread(file) for file in files[begin : begin + _BATCH]]
        with _network_errors(path, "store the result at"):
            response: Any = client.store_instances(batch)
        refused = response.get("FailedSOPSequence") if response is not None else None
        if refused:
            raise VolumeError(
                f"expected {path} to store {len(files)} slices, found {len(refused)} refused after "
                f"the first {begin}: delete the incomplete series there and run again"
            )
