from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """Return the folder with real CT next to the checkout; tests are skipped without it."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not (folder / "torso_3mm.nii.gz").is_file():
        pytest.skip("no real CT: expected ../shared/data next to the checkout")
    return folder
