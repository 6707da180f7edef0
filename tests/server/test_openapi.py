"""schemathesis against the OpenAPI document: whatever is asked, no answer is a 5xx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import requests

pytest.importorskip("schemathesis")


@pytest.mark.parametrize(
    "effort",
    [
        pytest.param(["--max-examples", "3", "--phases", "examples,fuzzing"], id="briefly"),
        pytest.param(
            ["--max-examples", "40", "--phases", "examples,coverage,fuzzing,stateful"],
            id="at length",
            marks=pytest.mark.e2e,
        ),
    ],
)
def test_no_request_that_the_document_allows_or_forbids_is_a_5xx(server, tmp_path, effort):
    command = [str(Path(sys.executable).parent / "schemathesis"), "run"]
    command += [f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {server.token}"]
    command += ["--checks", "not_a_server_error", "--seed", "1", "--no-color", *effort]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "Traceback" not in (server.folder / "stderr.log").read_text()


def test_the_document_names_every_route(server):
    paths = requests.get(f"{server.url}/openapi.json", timeout=9).json()["paths"]
    verbs = {f"/v1/{verb}" for verb in ("encode", "decode", "reconstruct", "generate")}
    assert verbs | {"/healthz", "/readyz", "/metrics", "/v1/jobs"} <= set(paths)
