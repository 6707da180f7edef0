"""Fuzz the server with schemathesis from its OpenAPI document: no response may be a 5xx."""

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
def test_no_valid_or_invalid_request_gets_a_5xx(server, tmp_path, effort):
    command = [str(Path(sys.executable).parent / "schemathesis"), "run"]
    command += [f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {server.token}"]
    command += ["--checks", "not_a_server_error", "--seed", "1", "--no-color", *effort]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    assert "Traceback" not in (server.folder / "stderr.log").read_text()


def test_the_openapi_document_lists_every_route(server):
    paths = requests.get(f"{server.url}/openapi.json", timeout=9).json()["paths"]
    verbs = {f"/v1/{verb}" for verb in ("encode", "decode", "reconstruct", "generate")}
    assert verbs | {"/healthz", "/readyz", "/metrics", "/v1/jobs"} <= set(paths)
