"""The page and the API documents, with the viewer files and without them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the serve extra")
from fastapi import FastAPI
from fastapi.testclient import TestClient
from live_server import LiveServer

from fvae_deploy.server import pages

FILES = [*pages.VIEWER, *pages.API_VIEWER]
NOTICE = 'role="alert"'


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the viewer files that has all of them."""
    for name in FILES:
        (tmp_path / name).write_text("")
    monkeypatch.setattr(pages, "VENDOR", tmp_path)
    return tmp_path


@pytest.fixture
def client() -> TestClient:
    app = FastAPI(docs_url=None)
    app.include_router(pages.routes)
    return TestClient(app)


def test_with_the_viewer_files_nothing_is_said(vendor: Path, client: TestClient) -> None:
    assert pages.missing_viewer() is None
    assert NOTICE not in client.get("/").text
    assert NOTICE not in client.get("/docs").text


@pytest.mark.parametrize(
    ("name", "path", "other"),
    [("niivue.umd.js", "/", "/docs"), ("swagger-ui.css", "/docs", "/")],
)
def test_a_page_says_how_to_get_the_viewer_that_it_lacks(
    vendor: Path, client: TestClient, name: str, path: str, other: str
) -> None:
    (vendor / name).unlink()
    message = pages.missing_viewer()
    assert message is not None
    assert f"found no {name}: run make page" in message
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert NOTICE in answer.text
    assert pages.REMEDY in answer.text
    assert str(vendor) not in answer.text  # paths of the server are not for visitors
    assert NOTICE not in client.get(other).text


def test_a_server_without_viewer_files_says_so_when_it_starts(
    serve_fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "code" / "fvae_deploy"
    shutil.copytree(
        Path(pages.__file__).parents[1], package, ignore=shutil.ignore_patterns("vendor", "__py*")
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    server = LiveServer(tmp_path / "server", *serve_fake)
    server.start()
    server.kill()
    lines = (tmp_path / "server" / "stderr.log").read_text().splitlines()
    assert [line for line in lines if "make page" in line] == [
        f"fvae: warning: expected the viewer of the page in {package}/server/page/vendor, "
        f"found no {', '.join(FILES)}: {pages.REMEDY}"
    ]
