from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """The folder of real CT beside the checkout; tests that want it are skipped without it."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not (folder / "torso_3mm.nii.gz").is_file():
        pytest.skip("real CT is not here: expected ../shared/data beside the checkout")
    return folder
