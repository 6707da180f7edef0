"""The web page at `/` and the API documentation at `/docs`: files of the package, all local.

What others made (NiiVue, Swagger UI) lies in `page/vendor`, where `make page` puts it.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse
from starlette.staticfiles import StaticFiles

from fvae_deploy.organs import ORGANS

FOLDER = Path(__file__).parent / "page"
routes = APIRouter(include_in_schema=False)
files = StaticFiles(directory=FOLDER)


@routes.get("/")
async def index() -> FileResponse:
    """Return the web page."""
    return FileResponse(FOLDER / "index.html")


@routes.get("/docs")
async def docs() -> FileResponse:
    """Return the page with the API documentation."""
    return FileResponse(FOLDER / "docs.html")


@routes.get("/page/organs.json")
async def organs() -> JSONResponse:
    """Return the organ names of a label map by label number."""
    return JSONResponse(ORGANS)
