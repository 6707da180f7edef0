"""Write `jobs-VERSION.zip`: the folder of a killed server, as this version of fvae leaves it.

    PYTHONPATH=benchmarks python tests/server/write_old_jobs.py

Run once for every release. Later versions must go on from it: see test_old_jobs.py.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import zipfile
from contextlib import closing
from pathlib import Path

from live_server import LiveServer

import fvae_deploy
from fvae_deploy.version import __version__

SHAPES = {"done": (16, 16, 5), "cut": (24, 16, 300), "waiting": (16, 16, 5)}


def main() -> None:
    """Kill a server while it has a job that is done, one that runs and one that waits."""
    target = Path(__file__).with_name(f"jobs-{__version__}.zip")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "server"
        server = LiveServer(folder)
        server.start()
        facts = {"token": server.token}
        for name, shape in SHAPES.items():
            ct = Path(temporary) / f"{name}.nii.gz"
            fvae_deploy.write_phantom(ct, shape)
            facts[name] = server.post("reconstruct", ct.read_bytes()).json()["id"]
            if name == "done":
                server.wait(facts[name])
        server.wait(facts["cut"], "running")
        server.kill()
        states = {name: server.store.get(facts[name]).state for name in SHAPES}  # type: ignore[union-attr]
        assert states == {"done": "done", "cut": "running", "waiting": "queued"}, states
        with closing(sqlite3.connect(folder / "store.db")) as sql:
            sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (folder / "facts.json").write_text(json.dumps(facts) + "\n")
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file() and path.suffix in (".json", ".gz", ".db"):
                    archive.write(path, path.relative_to(folder))


if __name__ == "__main__":
    main()
