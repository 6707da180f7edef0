"""Series on a DICOMweb server: pulled by WADO-RS before a run, results pushed by STOW-RS after.

    dicomweb+https://host/dicom-web/studies/1.2.3/series/4.5.6    a series, as CT
    dicomweb+https://host/dicom-web                               where a result goes

What the environment variable FVAE_DICOMWEB_AUTHORIZATION holds is sent as the header
Authorization: secrets on a command line are seen by others. Slices wait in a private folder of
the system's place for temporary files.
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

# A path has lost one of two slashes.
_URL = re.compile(r"dicomweb\+(https?):/+(.+?)(?:/studies/([0-9.]+)/series/([0-9.]+))?/*")
_BATCH = 16  # slices in a request: 8 MiB of 512 x 512


def is_remote(path: Path) -> bool:
    """Whether this names something on a DICOMweb server."""
    return str(path).startswith("dicomweb+")


@contextmanager
def at_hand(ct: Path, output: Path, *, push: bool = True) -> Iterator[tuple[Path, Path]]:
    """Bring a series here, and afterwards the result to where it goes; yields local paths.

    Local paths are passed through. Raises UsageError for what is no such URL, VolumeError where
    the server refuses or cannot be reached.
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
            _parse(output)  # refuses now, not after the work
        yield source, target
        if push and is_remote(output):
            _push(target, output)


def _parse(path: Path) -> tuple[str, str | None, str | None]:
    """Split into the server's URL, study and series."""
    match = _URL.fullmatch(str(path))
    if match is None:
        raise UsageError(
            f"expected dicomweb+https://HOST/ROOT/studies/UID/series/UID, found {path}: correct it"
        )
    scheme, place, study, series = match.groups()
    return f"{scheme}://{place}", study, series


def _client(url: str) -> DICOMwebClient:
    from fvae_deploy.optional import require

    require("dicomweb_client", extra="dicomweb")
    from dicomweb_client.api import DICOMwebClient

    secret = os.environ.get("FVAE_DICOMWEB_AUTHORIZATION")
    client = DICOMwebClient(url, headers={"Authorization": secret} if secret else None)
    client.set_http_retry_params(max_attempts=3, wait_exponential_multiplier=200)  # milliseconds
    return client


@contextmanager
def _speaking(path: Path, what: str) -> Iterator[None]:
    from requests import RequestException

    try:
        yield
    except (RequestException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VolumeError(
            f"expected to {what} {path}, found: {reason}; check server and UID"
        ) from None


def _pull(path: Path, folder: Path) -> None:
    url, study, series = _parse(path)
    if study is None or series is None:
        raise UsageError(f"expected …/studies/UID/series/UID, found {path}: name a series")
    client = _client(url)
    folder.mkdir()
    count = 0
    with _speaking(path, "fetch"):
        for count, data in enumerate(client.iter_series(study, series), start=1):
            file = folder / f"{count:06}.dcm"
            data.save_as(file, enforce_file_format=True)
            os.utime(file, (0, 0))  # fetched again it is the same input, which --resume asks for
    if not count:
        raise VolumeError(f"expected slices of {path}, found none: check the UIDs")


def _push(folder: Path, path: Path) -> None:
    import pydicom

    client = _client(_parse(path)[0])
    files = sorted(folder.glob("*.dcm"))
    for begin in range(0, len(files), _BATCH):
        batch = [pydicom.dcmread(file) for file in files[begin : begin + _BATCH]]
        with _speaking(path, "store at"):
            answer: Any = client.store_instances(batch)
        refused = answer.get("FailedSOPSequence") if answer is not None else None
        if refused:
            raise VolumeError(
                f"expected {path} to take {len(files)} slices, found {len(refused)} refused after "
                f"{begin}: remove the series there, and try again"
            )
