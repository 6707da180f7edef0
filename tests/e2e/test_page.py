"""The web page in a real Chromium: upload a CT, see three linked views and errors by organ."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from live_server import LiveServer

import fvae_deploy as fvae
from fvae_deploy.phantom.torso import write_phantom

pytestmark = pytest.mark.e2e
playwright = pytest.importorskip("playwright.sync_api", reason="needs the dev extra")
PICTURES = Path(os.environ.get("FVAE_PICTURES", "build/pictures"))
GRAPHICS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running server with the built-in model."""
    pytest.importorskip("openvino", reason="needs the cpu extra")
    live = LiveServer(tmp_path_factory.mktemp("server"), "--memory", "1GiB")
    live.start()
    yield live
    live.kill()


@pytest.fixture
def page(server):
    """Open a page; console errors and requests to other hosts fail the test."""
    chromium = shutil.which("chromium")
    assert chromium, "needs the Debian package chromium: make e2e"
    with playwright.sync_playwright() as programs:
        browser = programs.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", *GRAPHICS]
        )
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        errors, urls = [], []
        page.on("console", lambda m: m.type == "error" and errors.append(m.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        yield page
        client_error = "Failed to load resource: the server responded with a status of 4"
        assert [text for text in errors if not text.startswith(client_error)] == []
        own = (server.url, "blob:", "data:")  # no requests to any other host
        assert [url for url in urls if not url.startswith(own)] == []
        browser.close()


def test_an_uploaded_ct_is_reconstructed_and_shown_with_its_errors(server, page, tmp_path):
    ct, labels = tmp_path / "ct.nii.gz", tmp_path / "organs.nii.gz"
    write_phantom(ct, (160, 160, 96), labels=labels)
    page.goto(server.url)
    page.fill("#token", server.token)
    page.set_input_files("#labels", labels)
    page.set_input_files("#ct", ct)
    page.wait_for_selector("#errors:not([hidden])", timeout=120_000)
    page.wait_for_timeout(1500)  # until the views are drawn
    assert page.inner_text("#say").startswith("Done: ")
    rows = page.locator("#errors tbody tr").all_inner_texts()
    cells = {}
    for row in rows:
        name, *numbers = row.split("\t")
        cells[name] = [float(number.replace(",", "")) for number in numbers]
    fvae.reconstruct(ct, tmp_path / "r.nii.gz")
    comparison = fvae.compare(ct, tmp_path / "r.nii.gz", labels=labels)
    expected = {"Whole volume": comparison} | {organ.name: organ for organ in comparison.organs}
    for name, errors in expected.items():
        values = [errors.psnr, errors.mae, errors.max, errors.bias]
        assert cells[name][0] == errors.voxels
        assert cells[name][1:] == pytest.approx(values, abs=0.006), name
    canvas_size = "(n) => { const c = document.getElementById(n); return [c.width, c.height]; }"
    assert min(page.evaluate(canvas_size, "error")) > 100
    pixels = page.locator("#views").screenshot()
    assert len(set(pixels)) > 200  # not a single colour
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / "page.png")


def test_the_crosshair_moves_in_all_views_together(server, page, tmp_path):
    ct = tmp_path / "ct.nii.gz"
    write_phantom(ct, (64, 64, 32))
    page.goto(server.url)
    page.fill("#token", server.token)
    page.set_input_files("#ct", ct)
    page.wait_for_selector("#errors:not([hidden])", timeout=120_000)
    crosshairs = (
        "() => ['original', 'reconstruction', 'error'].map((n) => [...view[n].scene.crosshairPos])"
    )
    before = page.evaluate(crosshairs)
    box = page.locator("#original").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.3)
    page.wait_for_timeout(500)
    after = page.evaluate(crosshairs)
    assert after[0] != before[0]
    assert after[1] == pytest.approx(after[0], abs=1e-4)
    assert after[2] == pytest.approx(after[0], abs=1e-4)
    page.select_option("#window", "-1350,150")
    window = "() => [view.original.volumes[0].cal_min, view.reconstruction.volumes[0].cal_max]"
    assert page.evaluate(window) == [-1350, 150]


@pytest.mark.parametrize(
    ("token", "content", "message"),
    [("wrong", b"x", "bearer token"), (None, b"no volume", "expected")],
)
def test_the_page_shows_why_an_upload_is_rejected(server, page, token, content, message, tmp_path):
    (tmp_path / "a.nii").write_bytes(content)
    page.goto(server.url)
    page.fill("#token", token or server.token)
    page.set_input_files("#ct", tmp_path / "a.nii")
    page.wait_for_selector("#say.bad", timeout=30_000)
    assert message in page.inner_text("#say")


def test_the_api_documentation_is_shown(server, page):
    page.goto(f"{server.url}/docs")
    page.wait_for_selector("[data-path='/v1/reconstruct']", timeout=30_000)
