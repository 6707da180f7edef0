"""Bundles pushed to and pulled from a stand-in hub, with the real library, command and files.

Every command runs in a process of its own, since the library reads its environment when imported.
The library uploads large files by the Xet protocol where `hf_xet` is installed; here by LFS.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest

pytest.importorskip("huggingface_hub", reason="needs the hub extra")

from hub_server import Hub, hash_of

from fvae_deploy.errors import BundleError, LatentError
from fvae_deploy.export.bundle import origin_of
from fvae_deploy.export.hub_bundles import load
from fvae_deploy.export.model_card import licence_of, model_card

ROOT = Path(__file__).parents[2]
TINY = ROOT / "fvae_deploy" / "bundles" / "tiny"
PLACE = "hf:owner/vae"
Fvae = Callable[..., SimpleNamespace]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.publish("owner/vae", {".gitattributes": b"*.safetensors filter=lfs\n"})
        yield hub


@pytest.fixture
def fvae(hub: Hub, tmp_path: Path) -> Fvae:
    """Return a function that runs a command in `tmp_path`, with a token that may write."""

    def fvae(*words: object, **changes: str) -> SimpleNamespace:
        kept = {n: os.environ[n] for n in ("PATH", "LD_LIBRARY_PATH") if n in os.environ}
        environment = {
            **kept,
            "HOME": str(tmp_path / "home"),
            "HF_HOME": str(tmp_path / "hf"),
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_writer",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            **changes,
        }
        command = [sys.executable, "-m", "fvae_deploy", *map(str, words)]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert "hf_writer" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("fvae: ")]
        assert len(errors) == (done.returncode != 0)
        return SimpleNamespace(
            code=done.returncode, out=done.stdout, err=done.stderr, error="".join(errors)
        )

    return fvae


def on_hub(hub: Hub, repo: str = "owner/vae") -> dict[str, bytes]:
    """The files of a repository at main."""
    repository = hub.repositories[repo]
    return repository.commits[repository.branches["main"]]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def published(hub: Hub, edit: Callable[[dict], object] = lambda m: None, **more: bytes) -> str:
    """Put `tiny` into a repository as a push would, its manifest edited; return the commit."""
    content = {name: data for name, data in files(TINY).items() if not name.endswith(".py")}
    manifest = json.loads(content["manifest.json"])
    edit(manifest)
    content["manifest.json"] = json.dumps(manifest, indent=1).encode() + b"\n"
    return hub.publish("owner/vae", {**content, "README.md": b"#", **more})


def left(folder: Path) -> list[str]:
    """What lies in a folder besides homes and caches of the tests."""
    return sorted(p.name for p in folder.iterdir() if p.name not in ("home", "hf"))


def test_a_bundle_is_pushed_and_pulled_byte_for_byte(hub: Hub, fvae: Fvae, tmp_path: Path) -> None:
    pushed = fvae("push", "tiny", PLACE)
    assert pushed.code == 0, pushed.err
    manifest = load(TINY)
    commit = hub.repositories["owner/vae"].branches["main"]
    assert "licence of the weights: Apache-2.0\n" in pushed.out
    assert pushed.out.endswith(f"{hub.url}/owner/vae now holds tiny at commit {commit}\n")
    assert on_hub(hub).keys() == {".gitattributes", "README.md", "manifest.json", *manifest.files}
    card = on_hub(hub)["README.md"].decode()
    assert hub.cards == [card]
    assert card == model_card(manifest, PLACE)

    pulled = fvae("pull", PLACE, "-o", "bundle", HF_TOKEN="")
    assert pulled.code == 0, pulled.err
    assert f"bundle: tiny of commit {commit}, all " in pulled.out
    content = files(tmp_path / "bundle")
    assert json.loads(content.pop("origin.json")) == {"id": PLACE, "revision": commit}
    assert content == {name: (TINY / name).read_bytes() for name in content}
    assert content.keys() == {"manifest.json", *manifest.files}
    assert origin_of(tmp_path / "bundle") == f"{PLACE}@{commit}"
    load(tmp_path / "bundle")


def test_the_card_tells_licence_source_geometry_and_parity() -> None:
    yaml = pytest.importorskip("yaml")
    manifest = load(TINY)
    front, _, text = model_card(manifest, PLACE).removeprefix("---\n").partition("---\n")
    facts = yaml.safe_load(front)
    assert facts["license"] == "apache-2.0"
    assert facts["library_name"] == "fvae"
    assert "fvae-bundle" in facts["tags"]
    for expected in (
        f"--model {PLACE}",
        "| licence of the weights | Apache-2.0 |",
        manifest.source.sha256,
        "| voxels per latent cell | 4x8x8 |",
        f"| openvino fp32 | {manifest.parity[0].latent_max:.2g} |",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("licence", "known"),
    [
        ("unknown: see the authors' page", ""),
        ("see the source of the weights", ""),
        ("Stability AI Community License", "Stability AI Community License"),
        ('odd"\n---\nlicense: mit\x1b[31m', 'odd" --- license: mit [31m'),
    ],
)
def test_a_licence_cannot_write_into_the_cards_front_matter(licence: str, known: str) -> None:
    yaml = pytest.importorskip("yaml")
    import dataclasses

    manifest = dataclasses.replace(load(TINY), licence=licence)
    assert licence_of(manifest) == known
    front = model_card(manifest, PLACE).split("---\n")[1]
    facts = yaml.safe_load(model_card(manifest, PLACE)[4:].partition("\n---\n")[0])
    assert facts["license"] == "other", front
    assert facts["license_name"] == (known or "unknown")


def test_a_second_push_of_the_same_changes_nothing(hub: Hub, fvae: Fvae) -> None:
    fvae("push", "tiny", PLACE)
    commit = hub.repositories["owner/vae"].branches["main"]
    hub.requests.clear()
    again = fvae("push", "tiny", PLACE)
    assert again.code == 0
    assert again.out.endswith(f"already held tiny at commit {commit}\n")
    assert [method for method, _, _ in hub.requests if method != "GET"] == []


def test_another_bundle_is_replaced_only_with_overwrite_and_its_files_go(
    hub: Hub, fvae: Fvae
) -> None:
    commit = published(
        hub,
        lambda m: m["files"].update({"older.onnx": "0" * 64}) or m.update(name="older"),
        **{"older.onnx": b"a graph", "notes.md": b"mine"},
    )
    refused = fvae("push", "tiny", PLACE)
    assert refused.code == 4
    assert refused.error.endswith(
        f"expected no other bundle at {PLACE}, found older: choose another name or pass --overwrite"
    )
    assert hub.repositories["owner/vae"].branches["main"] == commit
    assert fvae("push", "tiny", PLACE, "--overwrite").code == 0
    assert "older.onnx" not in on_hub(hub)
    assert on_hub(hub)["notes.md"] == b"mine"
    assert json.loads(on_hub(hub)["manifest.json"])["name"] == "tiny"


@pytest.mark.parametrize(
    "content",
    [{"model.safetensors": b"weights"}, {"manifest.json": b'{"name": "an app"}'}],
    ids=["weights", "another manifest"],
)
def test_what_is_no_bundle_is_never_replaced(
    hub: Hub, fvae: Fvae, content: dict[str, bytes]
) -> None:
    hub.publish("owner/vae", content)
    done = fvae("push", "tiny", PLACE, "--overwrite")
    assert done.code == 4
    assert done.error.endswith("choose another name")
    assert on_hub(hub) == content


def test_a_repository_is_created_only_when_asked_and_private(hub: Hub, fvae: Fvae) -> None:
    refused = fvae("push", "tiny", "hf:owner/new")
    assert refused.code == 4
    assert "found no such repository: check the name, or pass --create" in refused.error
    assert "owner/new" not in hub.repositories
    assert fvae("push", "tiny", "hf:owner/new", "--create").code == 0
    assert hub.repositories["owner/new"].private
    assert "manifest.json" in on_hub(hub, "owner/new")


@pytest.mark.parametrize(
    ("words", "environment", "found"),
    [
        ([PLACE], {"HF_TOKEN": ""}, "found none: set HF_TOKEN, or run hf auth login"),
        ([PLACE], {"HF_TOKEN": "hf_reader"}, "found HTTP 403: set HF_TOKEN to a token that may wr"),
        ([PLACE], {"HF_TOKEN": "hf_wrong"}, "found HTTP 401: set HF_TOKEN to a token that may wri"),
        ([PLACE], {"HF_TOKEN": "hf_writär"}, "nothing was changed there, run again"),
        ([PLACE], {"HF_HUB_OFFLINE": "1"}, "found HF_HUB_OFFLINE set: unset it"),
        ([PLACE], {"HF_ENDPOINT": "http://127.0.0.1:1"}, "nothing was changed there, run again"),
        ([f"{PLACE}@v1"], {}, "leave @ out"),
        ([f"{PLACE}/folder"], {}, "leave the path out"),
        (["owner/vae"], {}, "check the name"),
    ],
)
def test_a_push_that_cannot_be_gives_one_line(
    hub: Hub, fvae: Fvae, words: list[str], environment: dict[str, str], found: str
) -> None:
    before = on_hub(hub)
    done = fvae("push", "tiny", *words, **environment)
    assert done.code == 4
    assert found in done.error
    assert "hf_w" not in done.error
    assert on_hub(hub) == before


def test_a_damaged_bundle_is_not_pushed(hub: Hub, fvae: Fvae, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "damaged")
    with (tmp_path / "damaged" / "weights.safetensors").open("r+b") as file:
        file.write(b"?")
    done = fvae("push", "damaged", PLACE)
    assert "expected sha256" in done.error
    assert hub.requests == []


def test_a_connection_cut_during_the_upload_changes_nothing(hub: Hub, fvae: Fvae) -> None:
    before = on_hub(hub)
    hub.cut_upload = True
    done = fvae("push", "tiny", PLACE)
    assert done.code == 4
    assert "nothing was changed there, run again" in done.error
    assert on_hub(hub) == before
    hub.cut_upload = False
    assert fvae("push", "tiny", PLACE).code == 0


def test_a_commit_made_meanwhile_is_not_overwritten(hub: Hub, fvae: Fvae) -> None:
    hub.on_commit = lambda: hub.publish("owner/vae", {"theirs.txt": b"theirs"})
    done = fvae("push", "tiny", PLACE)
    assert "found another commit that was made meanwhile: look at it and run again" in done.error
    assert on_hub(hub) == {"theirs.txt": b"theirs"}


def no_manifest(hub: Hub) -> None:
    hub.publish("owner/vae", {"model.safetensors": b"weights"})


def another_manifest(hub: Hub) -> None:
    hub.publish("owner/vae", {"manifest.json": b'{"schema": 3, "kind": "app"}'})


def another_schema(hub: Hub) -> None:
    published(hub, lambda m: m.update(schema=99))


def exchanged(hub: Hub) -> None:
    published(hub, **{"weights.safetensors": b"other weights"})


def incomplete(hub: Hub) -> None:
    published(hub, lambda m: m["files"].update({"gone.onnx": "0" * 64}))


def with_code(hub: Hub) -> None:
    published(hub, lambda m: m["files"].update({"evil.py": "0" * 64}), **{"evil.py": b"1/0"})


def pretending(hub: Hub) -> None:
    published(hub, lambda m: m["files"].update({"origin.json": "0" * 64}), **{"origin.json": b""})


def in_a_folder(hub: Hub) -> None:
    published(hub, lambda m: m["files"].update({"../x.onnx": "0" * 64}), **{"../x.onnx": b""})


def flipped(hub: Hub) -> None:
    published(hub)
    hub.flip_at = 1000


def cut(hub: Hub) -> None:
    published(hub)
    hub.cut_at = 1000


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (no_manifest, "found no manifest.json, but model.safetensors: name a repository that fvae"),
        (another_manifest, "expected a bundle of kind vae at"),
        (another_schema, "expected bundle schema 3, found 99"),
        (exchanged, "expected weights.safetensors of hf:owner/vae with sha256 "),
        (incomplete, "found no gone.onnx: its owner should push the bundle again"),
        (with_code, "found evil.py in its manifest: its owner should push the bundle again"),
        (pretending, "found origin.json in its manifest"),
        (in_a_folder, "expected plain file names"),
        (flipped, "damaged in transfer or in the cache, and has been removed; run again"),
        (cut, "check the network and run again"),
    ],
)
def test_what_cannot_be_pulled_gives_one_line_and_leaves_nothing(
    hub: Hub, fvae: Fvae, tmp_path: Path, fault: Callable[[Hub], None], found: str
) -> None:
    fault(hub)
    done = fvae("pull", PLACE, "-o", "bundle")
    assert done.code == 4
    assert found in done.error
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "environment", "found"),
    [
        (["hf:owner/none"], {}, "found no such repository: check the name, and set HF_TOKEN"),
        ([f"{PLACE}@v9"], {}, "found no revision v9: name a branch, a tag or a commit"),
        ([PLACE], {"HF_HUB_OFFLINE": "1"}, "found none, and HF_HUB_OFFLINE is set"),
        ([PLACE], {"HF_ENDPOINT": "http://127.0.0.1:1"}, "check the network and run again"),
        ([f"{PLACE}/vae"], {}, "a bundle is a whole repository, leave the path out"),
    ],
)
def test_a_pull_that_cannot_be_gives_one_line(
    fvae: Fvae, tmp_path: Path, words: list[str], environment: dict[str, str], found: str
) -> None:
    done = fvae("pull", *words, "-o", "bundle", **environment)
    assert done.code == 4
    assert found in done.error
    assert left(tmp_path) == []


def test_all_files_are_of_one_commit_and_a_revision_can_be_named(
    hub: Hub, fvae: Fvae, tmp_path: Path
) -> None:
    first = published(hub)
    hub.on_listing = lambda: published(hub, lambda m: m.update(name="later"))
    assert fvae("pull", PLACE, "-o", "a").code == 0
    assert load(tmp_path / "a").name == "tiny"
    hub.on_listing = lambda: None
    assert fvae("pull", PLACE, "-o", "b").code == 0
    assert load(tmp_path / "b").name == "later"
    assert fvae("pull", f"{PLACE}@{first}", "-o", "c").code == 0
    assert load(tmp_path / "c").name == "tiny"
    refused = fvae("pull", PLACE, "-o", "a")
    assert refused.code == 4
    assert "pass --overwrite" in refused.error
    assert fvae("pull", PLACE, "-o", "a", "--overwrite").code == 0
    assert load(tmp_path / "a").name == "later"


def test_a_bundle_and_weights_are_told_apart(hub: Hub, fvae: Fvae, tmp_path: Path) -> None:
    for package in ("torch", "onnx", "onnxscript", "diffusers", "transformers"):
        pytest.importorskip(package, reason="needs the export extra")
    published(hub)
    done = fvae("export", "-m", PLACE, "-o", "bundle")
    assert "found a bundle: fetch it with fvae pull" in done.error
    assert left(tmp_path) == []


def test_a_run_takes_a_bundle_from_the_hub_once_and_then_from_the_cache(
    hub: Hub, fvae: Fvae, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    commit = published(hub)
    values = np.random.default_rng(0).integers(-1000, 900, (16, 16, 5)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "ct.nii")
    ct = ("reconstruct", "ct.nii", "-e", "openvino")
    assert fvae(*ct, "-o", "a.nii", "--model", "tiny").code == 0
    assert fvae(*ct, "-o", "b.nii", "--model", PLACE).code == 0
    kept = tmp_path / "home/.cache/fvae/hub/owner--vae" / commit
    assert origin_of(kept) == f"{PLACE}@{commit}"
    assert len(hub.downloads) > 0
    hub.requests.clear()
    assert fvae(*ct, "-o", "c.nii", "--model", PLACE).code == 0
    assert hub.downloads == []
    hub.requests.clear()
    assert fvae(*ct, "-o", "d.nii", "--model", PLACE, HF_HUB_OFFLINE="1").code == 0
    assert fvae(*ct, "-o", "e.nii", "--model", f"{PLACE}@{commit}").code == 0
    assert hub.requests == []
    results = [(tmp_path / f"{name}.nii").read_bytes() for name in "abcde"]
    assert results == results[:1] * 5


def test_torch_never_runs_code_for_a_bundle_that_was_pulled(
    hub: Hub, fvae: Fvae, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nvae = None\n")
    published(
        hub, lambda m: m.update(network={"family": "any_torch", "config": {"factory": "evil:vae"}})
    )
    assert fvae("pull", PLACE, "-o", "bundle").code == 0
    nibabel.save(
        nibabel.Nifti1Image(np.full((16, 16, 5), -1000, np.int16), np.eye(4)), tmp_path / "ct.nii"
    )
    for model in ("bundle", PLACE):
        for engine in (["-e", "torch"], ["-p", "fp16", "-e", "torch"]):
            done = fvae("reconstruct", "ct.nii", "-o", "a.nii", "--model", model, *engine)
            assert done.code == 5
            assert "for which torch would run code that the bundle only names" in done.error
    assert not (tmp_path / "ran").exists()
    (tmp_path / "bundle" / "origin.json").unlink()  # one's own bundle, by contrast, imports it
    fvae("reconstruct", "ct.nii", "-o", "a.nii", "--model", "bundle", "-e", "torch")
    assert (tmp_path / "ran").exists()


def test_a_damaged_pulled_bundle_names_the_way_back(hub: Hub, fvae: Fvae, tmp_path: Path) -> None:
    published(hub)
    fvae("pull", PLACE, "-o", "bundle")
    (tmp_path / "bundle" / "weights.safetensors").write_bytes(b"?")
    with pytest.raises(BundleError, match="remove the folder and fetch it again"):
        load(tmp_path / "bundle")
    (tmp_path / "bundle" / "origin.json").write_text("[")  # whatever it says
    assert origin_of(tmp_path / "bundle") == "a hub"


def test_a_store_or_generator_never_starts_a_download(tmp_path: Path) -> None:
    from fvae_deploy import api
    from fvae_deploy.storage.latents import LatentReader

    pytest.importorskip("openvino")
    nibabel.save(
        nibabel.Nifti1Image(np.full((16, 16, 5), -1000, np.int16), np.eye(4)), tmp_path / "ct.nii"
    )
    api.encode(tmp_path / "ct.nii", tmp_path / "z.zarr", model="tiny")
    path = tmp_path / "z.zarr" / "zarr.json"
    path.write_text(path.read_text().replace('"tiny"', '"hf:owner/vae"'))
    with pytest.raises(LatentError, match="a model of a hub"):
        LatentReader(tmp_path / "z.zarr")
    generator = tmp_path / "generator"
    shutil.copytree(TINY.parent / "tiny-ldm", generator)
    content = json.loads((generator / "manifest.json").read_text())
    (generator / "manifest.json").write_text(json.dumps({**content, "vae": "hf:owner/vae"}))
    with pytest.raises(BundleError, match="a VAE that is not on a hub"):
        load(generator)


def test_a_generator_is_pushed_with_its_own_card(hub: Hub, fvae: Fvae, tmp_path: Path) -> None:
    assert fvae("push", "tiny-ldm", PLACE).code == 0
    card = on_hub(hub)["README.md"].decode()
    assert "| latents of | tiny |" in card
    assert fvae("pull", PLACE, "-o", "generator").code == 0
    assert load(tmp_path / "generator").kind == "generator"


def test_the_stand_in_lists_a_small_file_as_git_does() -> None:
    assert hash_of("a.json", b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
