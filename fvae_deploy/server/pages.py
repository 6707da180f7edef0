"""The web page at `/` and the API documentation at `/docs`: files of the package, all local.

The viewer (NiiVue) and Swagger UI are in `page/vendor`, where `make page` puts them. A package that
was built without them still serves both pages, which then say what is missing and how to get it.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from fvae_deploy.organs import ORGANS

FOLDER = Path(__file__).parent / "page"
VENDOR = FOLDER / "vendor"
VIEWER = ("niivue.umd.js",)  # what the page at / loads
API_VIEWER = ("swagger-ui-bundle.js", "swagger-ui.css")  # what /docs loads
REMEDY = "run make page in the source folder of fvae, then install fvae from that folder again"
routes = APIRouter(include_in_schema=False)
files = StaticFiles(directory=FOLDER)


def missing_viewer() -> str | None:
    """Return which files of the viewers are missing and how to get them, or None."""
    absent = _absent(VIEWER + API_VIEWER)
    if not absent:
        return None
    return f"expected the viewer of the page in {VENDOR}, found no {', '.join(absent)}: {REMEDY}"


@routes.get("/")
async def index() -> Response:
    """Return the web page."""
    notice = "This server has no image viewer: you can save a reconstruction, but not look at it."
    return _page("index.html", "<main>", VIEWER, notice)


@routes.get("/docs")
async def docs() -> Response:
    """Return the page with the API documentation."""
    notice = "This server has no viewer for the API: read openapi.json."
    return _page("docs.html", '<div id="ui">', API_VIEWER, notice)


@routes.get("/page/organs.json")
async def organs() -> JSONResponse:
    """Return the organ names of a label map by label number."""
    return JSONResponse(ORGANS)


def _absent(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not (VENDOR / name).is_file()]


def _page(name: str, before: str, needs: tuple[str, ...], notice: str) -> Response:
    """Return a page, with a notice inserted before a tag of it if files it needs are missing."""
    if not _absent(needs):
        return FileResponse(FOLDER / name)
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert before in text, before
    paragraph = f'<p class="bad" role="alert">{escape(f"{notice} To add one: {REMEDY}.")}</p>\n'
    return HTMLResponse(text.replace(before, paragraph + before, 1))
