"""The page of fvae report in a real Chromium, from a file: sections, slider and windows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fvae_deploy.phantom.torso import write_phantom

pytestmark = pytest.mark.e2e
playwright = pytest.importorskip("playwright.sync_api", reason="needs the dev extra")
PICTURES = Path(os.environ.get("FVAE_PICTURES", "build/pictures"))
SECTIONS = ("summary", "verdicts", "pictures", "errors", "organs", "structure", "surfaces",
            "low-contrast", "texture", "radiomics", "seams", "cost", "scans")  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report on a phantom through the built-in model."""
    pytest.importorskip("openvino", reason="needs the cpu extra")
    folder = tmp_path_factory.mktemp("report")
    ct, labels = folder / "ct.nii.gz", folder / "organs.nii.gz"
    write_phantom(ct, (192, 192, 40), labels=labels)
    page = folder / "report.html"
    command = [sys.executable, "-m", "fvae_deploy", "report", ct, "--labels", labels, "-o", page]
    subprocess.run([*map(str, command)], check=True, timeout=900)
    return page


@pytest.fixture
def page(report):
    """Open the page from its file; console errors and any request elsewhere fail the test."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs the Debian package chromium: apt-get install chromium")
    with playwright.sync_playwright() as programs:
        browser = programs.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        errors, urls = [], []
        page.on("console", lambda m: m.type == "error" and errors.append(m.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(report.as_uri())
        page.wait_for_selector("#planes[data-drawn]")
        yield page
        assert errors == []
        assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
        browser.close()


def shades(page, plane: int = 0) -> np.ndarray:
    """The pixels of a plane as drawn, [row, column, rgb]."""
    script = """n => {
      const c = document.querySelectorAll('.plane canvas')[n];
      const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      return [c.height, c.width, ...d];
    }"""
    height, width, *values = page.evaluate(script, plane)
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3].astype(int)


def slide(page, value: float, name: str = "wipe") -> None:
    drawn = page.evaluate("document.getElementById('planes').dataset.drawn")
    page.evaluate(
        """([name, value]) => {
          const slider = document.getElementById(name);
          slider.value = value;
          slider.dispatchEvent(new Event('input'));
        }""",
        [name, value],
    )
    page.wait_for_function("n => document.getElementById('planes').dataset.drawn !== n", arg=drawn)


def test_every_section_is_shown(page):
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in SECTIONS:
        part = page.locator(f"#{name}")
        assert part.bounding_box()["height"] > 60
        part.screenshot(path=PICTURES / f"report-{name}.png")
    links = page.locator(".contents a").all_inner_texts()
    assert len(links) == len(SECTIONS)


def test_the_slider_goes_from_original_to_reconstruction_to_error(page):
    slide(page, 0)
    original = shades(page)
    assert (original[..., 0] == original[..., 2]).all()
    slide(page, 1)
    after = shades(page)
    assert (after[..., 0] == after[..., 2]).all()
    assert 0 < (after != original).any(-1).mean() < 1
    slide(page, 0.5)
    half = shades(page)
    middle = half.shape[1] // 2
    np.testing.assert_array_equal(half[:, : middle - 2], after[:, : middle - 2])
    np.testing.assert_array_equal(half[:, middle + 2 :], original[:, middle + 2 :])
    slide(page, 2)
    error = shades(page)
    assert (error[..., 0] != error[..., 2]).mean() > 0.05


def test_windows_positions_and_planes_are_linked(page):
    slide(page, 0)
    before = [shades(page, plane) for plane in range(3)]
    page.click("button:has-text('lung')")
    page.wait_for_timeout(300)
    lung = [shades(page, plane) for plane in range(3)]
    assert all((one != two).any() for one, two in zip(before, lung, strict=True))
    slide(page, 0, "place")
    moved = [shades(page, plane) for plane in range(3)]
    assert all((one != two).any() for one, two in zip(lung, moved, strict=True))
