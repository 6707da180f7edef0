"""Adds to the documentation site what is not in docs/: see mkdocs.yml.

README, changelog, model cards    pages of their own, with links that fit their new places
reference/options.md              every option of every command, from the command line's code
reference/errors.md               every error message, from the source code
files/                            sources that pages link to, as files to read
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads hooks without their folder

import reference

ROOT = Path(__file__).parents[2]
PAGES = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "tools/train_tiny/README.md": "models/tiny.md",
    "tools/train_tiny_ldm/README.md": "models/tiny-ldm.md",
}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the decisions in the navigation."""
    adr = sorted(path.name for path in Path(config.docs_dir, "adr").glob("*.md"))
    config.nav.append({"Decisions": [f"adr/{name}" for name in adr]})  # type: ignore[union-attr]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    made = {
        "reference/options.md": reference.options(),
        "reference/python.md": reference.python(),
        "reference/errors.md": reference.errors(),
    }
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to their places on the site."""
    sources = {target: source for source, target in PAGES.items()}
    here = page.file.src_uri
    source = sources.get(here, f"docs/{here}")

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        path = ROOT / target
        if not path.exists():
            return match[0]  # mkdocs warns
        place = _place(target, config, files)
        relative = posixpath.relpath(place, posixpath.dirname(here) or ".")
        return f"{match[1]}{relative}{match[3] or ''}{match[4]}"

    return LINK.sub(lead, markdown)


def on_env(env: Any, config: MkDocsConfig, files: Files) -> None:
    """Write the files that pages link to."""
    for file in files:
        if file.src_uri.startswith("files/"):
            file.copy_file()


def _place(target: str, config: MkDocsConfig, files: Files) -> str:
    """Return the place on the site of a file of the repository; it is added if it has none."""
    if target in PAGES:
        return PAGES[target]
    if target == "docs/adr":
        return min(f.src_uri for f in files if f.src_uri.startswith("adr/"))
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    place = f"files/{target.replace('/.', '/').lstrip('.')}"
    if files.get_file_from_path(place) is None:
        files.append(File.generated(config, place, content=(ROOT / target).read_bytes()))
    return place
