"""The page at `/` and the documents at `/docs`: fixed files of the package, none from elsewhere.

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
    """Show the page."""
    return FileResponse(FOLDER / "index.html")


@routes.get("/docs")
async def docs() -> FileResponse:
    """Show the API's documents."""
    return FileResponse(FOLDER / "docs.html")


@routes.get("/page/organs.json")
async def organs() -> JSONResponse:
    """Name the organs of a label map, by number."""
    return JSONResponse(ORGANS)
