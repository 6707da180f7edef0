"""Pictures of a score: a sheet of each set, and the closest pairs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from fvae_deploy.quality.picture import SOFT, window
from fvae_deploy.report.pictures import thumbnail
from fvae_deploy.score.examine import Seen
from fvae_deploy.score.planes import SMALL

SHOWN = 8  # CTs on a sheet
GAP = 4  # pixels


def sheet(cases: Sequence[Seen]) -> str:
    """Return the axial and coronal pictures of the first CTs of a set, as the data URI of a PNG."""
    from PIL import Image

    shown = cases[:SHOWN]
    step = SMALL + GAP
    whole = Image.new("RGB", (step * len(shown) - GAP, 2 * step - GAP), (255, 255, 255))
    for column, one in enumerate(shown):
        for row in range(2):
            grey = Image.fromarray(window(one.pictures[row].T, *SOFT)).convert("RGB")
            whole.paste(grey, (column * step, row * step))
    stream = io.BytesIO()
    whole.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def pair(generated: Seen, real: Seen) -> list[str]:
    """Return the real CT, the generated one and their difference, axial and coronal."""
    return [thumbnail(real.pictures[k], generated.pictures[k], *SOFT) for k in range(2)]
