"""The page of fvae score in a real Chromium, from a file: sections, links and pictures."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from fvae_deploy.phantom.patient import varied
from fvae_deploy.phantom.torso import write_phantom

pytestmark = pytest.mark.e2e
playwright = pytest.importorskip("playwright.sync_api", reason="needs the dev extra")
SECTIONS = ["summary", "pictures", "features", "hounsfield", "adherence", "nearest", "scans"]


def test_the_page_shows_all_sections_and_pictures_without_a_network(tmp_path):
    pytest.importorskip("openvino", reason="needs the cpu extra")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs the Debian package chromium: apt-get install chromium")
    for name, first in (("real", 0), ("made", 10)):
        for folder in (name, f"{name}_labels"):
            (tmp_path / folder).mkdir()
        for seed in range(first, first + 3):
            file = f"{seed}.nii.gz"
            labels = tmp_path / f"{name}_labels" / file
            patient = varied(seed)
            write_phantom(tmp_path / name / file, (96, 96, 20), labels, seed=seed, patient=patient)
    output = tmp_path / "score.html"
    command = [sys.executable, "-m", "fvae_deploy", "score", tmp_path / "real", tmp_path / "made",
               "--real-labels", tmp_path / "real_labels", "--masks", tmp_path / "made_labels",
               "-o", output, "--bootstrap", 20]  # fmt: skip
    subprocess.run([*map(str, command)], check=True, timeout=900)
    with playwright.sync_playwright() as programs:
        browser = programs.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        errors, urls = [], []
        page.on("console", lambda m: m.type == "error" and errors.append(m.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(output.as_uri())
        ids = page.eval_on_selector_all("body > section", "all => all.map(one => one.id)")
        assert ids == SECTIONS
        assert page.locator(".contents a").count() == len(SECTIONS)
        widths = page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
        assert len(widths) == 2 + 2 * 3
        assert min(widths) > 100
        rows = page.locator("#summary tbody tr")
        assert rows.count() == 12
        assert "Fréchet distance of latents (tiny)" in rows.first.inner_text()
        browser.close()
    assert errors == []
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []
