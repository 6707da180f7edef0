"""After a power failure or a kill at any moment, an output is absent or whole, never half."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fvae_deploy import api
from fvae_deploy.errors import VolumeError
from fvae_deploy.quality.fidelity import compare
from fvae_deploy.storage.journal import Journal
from fvae_deploy.storage.latents import partial_path
from fvae_deploy.stream.report import write_json
from fvae_deploy.volume import publish
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import check_output, create_volume

SHAPE = (9, 11, 10)


class Disk:
    """What a power failure would leave of a folder, in the two worst cases.

    Contents are those of the last fsync of each file; a file without one is empty. Names are
    either those of the last fsync of each folder, or those of now, since a file system may write
    names early. Every inode stays open, so that none is used twice. Threads take turns, so that
    no name goes while another thread notes the states.
    """

    def __init__(self, root: Path, monkeypatch) -> None:
        self.root, self.contents, self.names, self.states = root, {}, {}, []
        self.turn = threading.RLock()
        self.open = [os.open(path, os.O_RDONLY) for path in (root, *root.rglob("*"))]
        for descriptor in self.open[:]:
            self.keep(descriptor)
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.on_fsync)
        for module, name in (
            *((os, name) for name in ("rename", "replace", "unlink", "remove", "rmdir")),
            (publish, "exchange"),
        ):
            monkeypatch.setattr(module, name, self.watched(getattr(module, name)))

    def keep(self, descriptor: int) -> None:
        """Take what an open file or folder holds now as written to disk."""
        path, inode = Path(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_ino
        if not path.is_dir():
            self.contents[inode] = path.read_bytes()
            return
        self.names[inode] = {}
        for entry in path.iterdir():
            self.open.append(os.open(entry, os.O_RDONLY))
            self.names[inode][entry.name] = os.fstat(self.open[-1]).st_ino, entry.is_dir()

    def on_fsync(self, descriptor: int) -> None:
        with self.turn:
            self.fsync(descriptor)
            self.keep(descriptor)
            self.cut()

    def watched(self, function):
        def run(*arguments, **keywords):
            with self.turn:
                self.cut()
                result = function(*arguments, **keywords)
                self.cut()
                return result

        return run

    def cut(self) -> None:
        """Note what a power failure at this moment would leave."""
        self.states += [
            self.early(self.root),
            self.late(os.stat(self.root).st_ino),
        ]

    def early(self, folder: Path):
        return {
            path.name: self.early(path)
            if path.is_dir()
            else self.contents.get(path.stat().st_ino, b"")
            for path in folder.iterdir()
        }

    def late(self, inode: int):
        return {
            name: self.late(inner) if is_folder else self.contents.get(inner, b"")
            for name, (inner, is_folder) in self.names.get(inode, {}).items()
        }


def content(path: Path):
    if path.is_dir():
        return {each.name: content(each) for each in path.iterdir()}
    return path.read_bytes()


def volume(path, seed=0):
    values = np.random.default_rng(seed).integers(-1000, 1000, SHAPE[::-1]).astype(np.int16)
    with create_volume(path, Geometry(SHAPE, np.diag([-1.0, -1.0, 2.0, 1.0]))) as writer:
        writer.write(np.ascontiguousarray(values.transpose(0, 2, 1)))


@pytest.fixture
def makers(fake_bundle, write_ct, tmp_path_factory):
    """By kind: what writes an output of this kind, different for each seed."""
    folder = tmp_path_factory.mktemp("sources")
    for seed in (0, 1):
        write_ct(folder / f"{seed}.nii", SHAPE, seed=seed)
    fake = {"model": fake_bundle, "engine": "fake", "overwrite": True}

    def encode(path, seed):
        api.encode(folder / f"{seed}.nii", path, **fake)

    def reconstruct(path, seed):
        api.reconstruct(folder / f"{seed}.nii", path, **fake)

    def picture(path, seed):
        compare(folder / "0.nii", folder / f"{seed}.nii", picture=path, ssim=False)

    def report(path, seed):
        write_json({"seed": seed}, path)

    return {
        "a.nii": volume,
        "a.nii.gz": volume,
        "a.zarr": volume,
        "a.dcm": volume,
        "latents.zarr": encode,
        "r.nii.gz": reconstruct,
        "r.dcm": reconstruct,
        "errors.png": picture,
        "report.json": report,
    }


KINDS = ["a.nii", "a.nii.gz", "a.zarr", "a.dcm", "latents.zarr", "r.nii.gz", "r.dcm"]
KINDS += ["errors.png", "report.json"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("older", [False, True], ids=["new", "overwrites"])
@pytest.mark.parametrize("exchanging", [True, False], ids=["exchange", "two renames"])
def test_a_power_failure_leaves_nothing_or_the_whole(
    kind, older, exchanging, makers, tmp_path, monkeypatch
):
    output, before = tmp_path / kind, None
    if older:
        makers[kind](output, 1)
        before = content(output)
    if not exchanging:
        monkeypatch.setattr(publish, "exchange", lambda one, other: False)
    disk = Disk(tmp_path, monkeypatch)
    makers[kind](output, 0)
    disk.cut()
    after = content(output)
    assert after != before
    for state in disk.states:
        found = state.get(kind)
        if found is None and older:  # put back by the next run
            (found,) = (state[name] for name in state if name.endswith(".old"))
        assert found in (before, after)
    # All that happened once the output had its name is on disk too.
    assert [state.get(kind) for state in disk.states[-2:]] == [after, after]


@pytest.mark.parametrize("kind", [*KINDS[:4], "report.json"])
@pytest.mark.parametrize("older", [False, True], ids=["new", "overwrites"])
def test_ctrl_c_at_any_moment_of_publishing_leaves_nothing_or_the_whole(
    kind, older, makers, tmp_path, monkeypatch
):
    output, before = tmp_path / kind, None
    if older:
        makers[kind](output, 1)
        before = content(output)
    reached = itertools.count()

    def interrupting(function):
        def run(*arguments, **keywords):
            main = threading.current_thread() is threading.main_thread()  # gets every Ctrl-C
            if main and next(reached) == 0:
                raise KeyboardInterrupt
            return function(*arguments, **keywords)

        return run

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (publish, "exchange")):
        monkeypatch.setattr(module, name, interrupting(getattr(module, name)))
    for moment in itertools.count():
        reached = itertools.count(-moment)
        try:
            makers[kind](output, 0)
        except KeyboardInterrupt:
            assert {path.name for path in tmp_path.iterdir()} <= {kind}
            if output.exists() and content(output) != before:
                break  # it has its name, and what follows is not undone
            assert output.exists() == older
        else:
            break
    assert moment > 0
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_name_works(kind, makers, tmp_path):
    suffix = kind.partition(".")[2]
    for name in ("x" * (254 - len(suffix)), "ü" * ((254 - len(suffix)) // 2)):
        output = tmp_path / f"{name}.{suffix}"
        for seed in (0, 1):
            makers[kind](output, seed)
        assert [p.name for p in tmp_path.iterdir()] == [output.name]
        makers[kind](tmp_path / kind, 1)
        assert type(content(output)) is type(content(tmp_path / kind))
        if not kind.endswith(".dcm"):  # DICOM has new UIDs and times
            assert content(output) == content(tmp_path / kind)
        for path in (output, tmp_path / kind):
            path.rename(tmp_path.parent / path.name[:9])
            subprocess.run(["rm", "-r", tmp_path.parent / path.name[:9]], check=True)


WRITE = """
import sys, time
import numpy as np
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume
writer = create_volume(sys.argv[1], Geometry((9, 11, 10), np.eye(4)))
writer.write(np.full((3, 9, 11), -5, np.int16))
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", KINDS[:4])
def test_what_a_killed_run_left_is_removed_and_that_of_a_live_one_is_not(kind, tmp_path):
    output = tmp_path / kind
    begun = [
        subprocess.Popen([sys.executable, "-c", WRITE, output], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for process in begun:
            assert process.stdout.readline() == b"begun\n"
        left = set(tmp_path.iterdir())
        assert len(left) == 2
        begun[0].kill()
        begun[0].wait()
        volume(output)
        assert len(left & set(tmp_path.iterdir())) == 1
        begun[1].kill()
        begun[1].wait()
        volume(output, seed=1)
        assert list(tmp_path.iterdir()) == [output]
    finally:
        for process in begun:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("kind", KINDS[:4])
def test_two_writers_of_one_process_do_not_share_a_partial_output(kind, tmp_path):
    geometry = Geometry((4, 5, 2), np.eye(4))
    first, second = (create_volume(tmp_path / kind, geometry) for _ in range(2))
    for value, writer in ((-1, first), (-2, second), (-1, first), (-2, second)):
        writer.write(np.full((1, 4, 5), value, np.int16))
    first.commit()
    one = content(tmp_path / kind)
    second.commit()
    assert content(tmp_path / kind) != one
    assert [path.name for path in tmp_path.iterdir()] == [kind]


@pytest.mark.parametrize("kind", ["a.zarr", "a.dcm", "latents.zarr"])
def test_a_kill_between_two_renames_is_recovered(kind, makers, tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    output = tmp_path / kind
    makers[kind](output, 0)
    before, real = content(output), os.rename

    def kill(one, other, **keywords):
        real(one, other, **keywords)
        if str(other).endswith(".old"):
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(publish, "exchange", lambda one, other: False)
        patch.setattr(os, "rename", kill)
        with pytest.raises(KilledError):
            makers[kind](output, 1)
    assert not output.exists()
    with pytest.raises(VolumeError, match="exists"):  # it is there again
        check_output(output, overwrite=False)
    assert content(output) == before
    makers[kind](output, 1)
    assert [p.name for p in tmp_path.iterdir()] == [kind]


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("a.zarr", "notes.txt"),
        ("a.zarr", "c/notes.txt"),
        ("a.zarr", "c/0/0/mask.nii"),
        ("a.zarr", "labels/0/c/0/0/0"),
        ("latents.zarr", "notes.txt"),
        ("latents.zarr", "c/notes.txt"),
        ("a.dcm", "notes.txt"),
        ("a.dcm", "IM0001.dcm"),
        ("a.dcm", "sub.dcm/000001.dcm"),
        ("r.dcm", "sub.dcm/"),
    ],
)
def test_a_users_own_file_in_an_output_is_never_replaced(kind, own, makers, tmp_path):
    output = tmp_path / kind
    makers[kind](output, 0)
    (output / own).parent.mkdir(parents=True, exist_ok=True)
    (output / own).mkdir() if own.endswith("/") else (output / own).write_text("mine")
    before = content(output)
    with pytest.raises(VolumeError, match=own.strip("/")):
        makers[kind](output, 1)
    assert content(output) == before
    assert [path.name for path in tmp_path.iterdir()] == [kind]


def test_a_file_that_appears_during_a_run_is_not_replaced_and_no_slab_is_lost(
    fake_bundle, write_ct, tmp_path
):
    write_ct(tmp_path / "ct.nii", (9, 11, 80))
    output, fake = tmp_path / "out.zarr", {"model": fake_bundle, "engine": "fake"}
    api.reconstruct(tmp_path / "ct.nii", output, **fake)

    def progress(slices):
        (output / "notes.txt").write_text("mine")

    again = {**fake, "dtype": "float32"}
    with pytest.raises(VolumeError, match=r"notes\.txt"):
        api.reconstruct(tmp_path / "ct.nii", output, overwrite=True, progress=progress, **again)
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    done = []
    api.reconstruct(tmp_path / "ct.nii", output, resume=True, progress=done.append, **again)
    assert done == [80]


@pytest.mark.parametrize("place", [0, 5, 60, 130, -5, -1])
@pytest.mark.parametrize("bits", [1, 128])
def test_a_flipped_bit_in_a_slab_is_found(tmp_path, place, bits):
    array = np.arange(30, dtype=np.int16).reshape(2, 3, 5)
    journal = Journal(tmp_path / "out.partial", {}, resume=True)
    journal.keep("slab0", array)
    np.testing.assert_array_equal(journal.found("slab0"), array)
    path = tmp_path / "out.partial" / "slab0.npy"
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)
    assert journal.found("slab0") is None


def test_a_slab_cut_anywhere_or_under_another_name_is_found(tmp_path):
    journal = Journal(tmp_path / "out.partial", {}, resume=True)
    journal.keep("slab0", np.arange(30, dtype=np.float32).reshape(2, 3, 5))
    path = tmp_path / "out.partial" / "slab0.npy"
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert journal.found("slab0") is None
    path.with_name("slab1.npy").write_bytes(data)
    assert journal.found("slab1") is None


def test_a_killed_run_that_overwrites_leaves_the_older_output(fake_bundle, write_ct, tmp_path):
    """A real kill at a random moment, several times."""
    output = tmp_path / "out.zarr"
    write_ct(tmp_path / "ct.nii", (24, 24, 200))
    line = [sys.executable, "-m", "fvae_deploy", "reconstruct", tmp_path / "ct.nii", "-o", output]
    line += ["-m", fake_bundle, "-e", "fake", "-q"]
    subprocess.run(line, check=True)
    before = content(output)
    for number in range(3):
        running = subprocess.Popen([*line, "--overwrite"])
        while not partial_path(output).exists():
            time.sleep(0.01)
            assert running.poll() is None
        time.sleep(0.05 * number)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert content(output) == before
    subprocess.run([*line, "--overwrite"], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"ct.nii", "out.zarr"}
