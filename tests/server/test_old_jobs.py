"""A server goes on from the folder of a killed server of a released version."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the serve extra")
from live_server import LiveServer

from fvae_deploy.server.store import VERSION, Store

ARCHIVES = sorted(Path(__file__).parent.glob("jobs-*.zip"))


def refused(*arguments: object) -> tuple[int, str]:
    line = [sys.executable, "-m", "fvae_deploy", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


def test_there_is_an_archive() -> None:
    assert ARCHIVES


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: path.stem)
def test_jobs_of_an_old_server_are_kept_and_go_on(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "server"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    facts = json.loads((folder / "facts.json").read_text())
    (note,) = folder.rglob("request.json")  # of the job that was running
    note.write_text(json.dumps(json.loads(note.read_text()) | {"fvae": "0.0.9"}))
    century = "876000"  # the archived jobs ended long ago: a day's retention would delete them
    server = LiveServer(folder, "--keep-hours", century)
    server.token = facts["token"]
    server.start()
    try:
        assert server.get(facts["done"]).json()["report"]["volume"]["slices"] == 5
        result = server.get(f"{facts['done']}/result").content
        assert result == (folder / "jobs" / facts["done"] / "result.nii.gz").read_bytes()
        cut = server.wait(facts["cut"])
        assert (cut["state"], cut["attempts"]) == ("done", 2)
        assert server.wait(facts["waiting"])["state"] == "done"
    finally:
        server.kill()
    with closing(sqlite3.connect(folder / "store.db")) as sql:
        assert sql.execute("PRAGMA user_version").fetchone() == (VERSION,)


@pytest.mark.parametrize("verb", ["serve", "token list"])
def test_a_store_of_a_later_version_is_refused_and_left_alone(tmp_path: Path, verb: str) -> None:
    Store(tmp_path)
    with closing(sqlite3.connect(tmp_path / "store.db")) as sql:
        sql.execute(f"PRAGMA user_version = {VERSION + 1}")
        sql.execute("DROP TABLE totals")
    code, err = refused(*verb.split(), "--folder", tmp_path)
    assert code == 3
    assert f"version {VERSION} at most, found {VERSION + 1}" in err
    with closing(sqlite3.connect(tmp_path / "store.db")) as sql:
        tables = sql.execute("SELECT name FROM sqlite_master WHERE name = 'totals'").fetchall()
    assert tables == []


@pytest.mark.parametrize("verb", ["serve", "token list"])
def test_a_file_that_is_no_store_is_refused(tmp_path: Path, verb: str) -> None:
    (tmp_path / "store.db").write_bytes(b"no database" * 1000)
    code, err = refused(*verb.split(), "--folder", tmp_path)
    assert code == 3
    assert "found: file is not a database" in err
    assert (tmp_path / "store.db").read_bytes() == b"no database" * 1000
