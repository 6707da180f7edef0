"""The documentation builds as a site, without warnings, and needs no network to be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the docs extra")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the built site, as HTML by name."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {str(p.relative_to(folder)): p.read_text("utf-8") for p in folder.rglob("*.html")}


def test_every_page_of_docs_is_on_the_site(site):
    pages = {
        str(p.relative_to(ROOT / "docs").with_suffix(".html"))
        for p in (ROOT / "docs").rglob("*.md")
    }
    assert pages < set(site)


def test_the_reference_has_every_option_error_and_name(site):
    options, errors, python = (
        site[f"reference/{name}.html"] for name in ("options", "errors", "python")
    )
    assert all(f">fvae {verb}<" in options for verb in ("encode", "kernels check", "token"))
    assert "--max-error" in options
    assert errors.count("<tr>") > 200
    assert "a folder … to write … into" in errors
    assert re.search(r'id="fvae_deploy\.api\.encode"', python)
    assert "LatentDataset" in python


def test_pages_load_nothing_from_the_network(site):
    for name, text in site.items():
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://', text), name


def test_links_to_sources_lead_to_files_of_the_site(site):
    assert 'href="files/deploy/fvae.service"' in site["operating.html"]
