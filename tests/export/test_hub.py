"""Download weights with the real library from a local test hub, over real connections.

Every fetch runs in a separate process, since the library reads its environment when imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("huggingface_hub", reason="needs the export extra")

from hub_server import Hub
from huggingface_hub.utils import validate_repo_id

from fvae_deploy.errors import BundleError
from fvae_deploy.export.hub import is_hub_id, parse

ROOT = Path(__file__).parents[2]
CKPT = random.Random(0).randbytes(200_000)
CONFIG = b'{"_class_name": "AutoencoderKL"}'
MODEL = "diffusion_pytorch_model"
FILE = "hf:owner/net/net.ckpt"
FOLDER = "hf:owner/pipeline/vae"

CODE = """
import json, sys
from fvae_deploy.errors import BundleError
from fvae_deploy.export.hub import fetch
for text in sys.argv[1:]:
    lines = []
    try:
        path, source = fetch(text, lines.append)
        found = {"path": str(path), **vars(source)}
    except BundleError as error:
        found = {"error": str(error)}
    print(json.dumps({"error": "", "lines": lines, **found}))
"""
FetchEach = Callable[..., list[SimpleNamespace]]
Fetch = Callable[..., SimpleNamespace]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.publish("owner/net", {"net.ckpt": CKPT, "other.ckpt": b"another", "README.md": b"#"})
        hub.publish(
            "owner/pipeline",
            {
                "model_index.json": b"{}",
                "vae/config.json": CONFIG,
                f"vae/{MODEL}.safetensors": CKPT,
                f"vae/{MODEL}.fp16.safetensors": b"half",
                f"vae/{MODEL}.bin": b"a pickle",
            },
        )
        yield hub


@pytest.fixture
def fetch_each(hub: Hub, tmp_path: Path) -> FetchEach:
    """Return a function that fetches ids in a separate process and returns each result."""

    def fetch_each(*texts: str, code: str = CODE, **changes: str) -> list[SimpleNamespace]:
        kept = {
            name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ
        }
        home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf")}
        environment = {**kept, **home, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, **changes}
        command = [sys.executable, "-W", "error", "-c", code, *texts]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no bars, no warnings, no traceback
        found = [SimpleNamespace(**json.loads(line)) for line in done.stdout.splitlines()]
        assert all(len(one.error.splitlines()) <= 1 for one in found)
        return found

    return fetch_each


@pytest.fixture
def fetch(fetch_each: FetchEach) -> Fetch:
    """Return a function that does the same for one id."""
    return lambda *texts, **changes: fetch_each(*texts, **changes)[0]


def cached(tmp_path: Path) -> dict[str, bytes]:
    """Return the content of large files in the cache, complete or partial, under any name."""
    files = [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    return {path.name: path.read_bytes() for path in files if path.stat().st_size > 500}


def test_a_file_is_fetched_whole_with_its_commit_and_hash(hub: Hub, fetch: Fetch) -> None:
    found = fetch(FILE)
    assert found.error == ""
    assert Path(found.path).name == "net.ckpt"
    assert Path(found.path).read_bytes() == CKPT
    assert found.id == FILE
    assert found.revision == hub.repositories["owner/net"].branches["main"]
    assert found.sha256 == hashlib.sha256(CKPT).hexdigest()
    assert found.lines == ["downloading net.ckpt, 0.2 MiB, from owner/net"]


def test_only_configuration_and_safetensors_of_a_folder_are_fetched(hub: Hub, fetch: Fetch) -> None:
    found = fetch(FOLDER)
    assert found.error == ""
    names = {path.name: path.read_bytes() for path in Path(found.path).iterdir()}
    assert names == {"config.json": CONFIG, f"{MODEL}.safetensors": CKPT}
    assert found.id == FOLDER
    assert found.revision == hub.repositories["owner/pipeline"].branches["main"]
    assert found.sha256 == hashlib.sha256(CKPT).hexdigest()


def test_a_folder_may_be_the_whole_repository(hub: Hub, fetch: Fetch) -> None:
    hub.publish("owner/vae", {"config.json": CONFIG, f"{MODEL}.safetensors": CKPT})
    found = fetch("hf:owner/vae")
    assert (Path(found.path) / "config.json").read_bytes() == CONFIG
    assert found.id == "hf:owner/vae"


def test_sharded_weights_are_refused_before_the_download(hub: Hub, fetch: Fetch) -> None:
    parts = {f"{MODEL}-0000{i}-of-00002.safetensors": bytes([i]) * 99 for i in (1, 2)}
    index = {f"{MODEL}.safetensors.index.json": b"{}"}
    hub.publish("owner/vae", {"config.json": CONFIG, **parts, **index})
    error = fetch("hf:owner/vae").error
    assert error.startswith(f"expected {MODEL}.safetensors in hf:owner/vae at main, found {MODEL}-")
    assert error.endswith("sharded weights are not supported, save them again as one file")
    assert hub.downloads == []


@pytest.fixture
def bert(tmp_path: Path) -> dict[str, bytes]:
    """Files of a text encoder as transformers saves it, and an image beside them."""
    pytest.importorskip("transformers", reason="needs the export extra")
    from small_generator import TEXT_CONFIG, tokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    BertModel(BertConfig(**TEXT_CONFIG)).save_pretrained(tmp_path / "bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "bert")
    files = {path.name: path.read_bytes() for path in (tmp_path / "bert").iterdir()}
    return {**files, "picture.png": b"no weights"}


@pytest.mark.parametrize("inside", [True, False], ids=["weights in the checkpoint", "on the hub"])
def test_a_text_encoder_is_fetched_with_its_tokenizer(
    hub: Hub, fetch: Fetch, tmp_path: Path, bert: dict[str, bytes], inside: bool
) -> None:
    import torch
    from small_generator import UNET_CONFIG, state

    kept = {name: tensor for name, tensor in state().items() if inside or "diffusion" in name}
    torch.save({"state_dict": kept, "unet_config": UNET_CONFIG}, tmp_path / "unet.ckpt")
    hub.publish("owner/bert", bert)
    code = """
import json, sys
from pathlib import Path
from fvae_deploy.export.generators import load_generator
found = load_generator(Path(sys.argv[2]), text=sys.argv[1], version="0")
print(json.dumps({"error": "", "tokens": found.manifest.tokens}))
"""
    found = fetch("hf:owner/bert", str(tmp_path / "unet.ckpt"), code=code)
    assert found.tokens == 10
    small = {Path(path).name for path in hub.downloads if "/resolve/" in path}
    assert small == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    weights = f"/cdn/{hashlib.sha256(bert['model.safetensors']).hexdigest()}"
    assert [path for path in hub.downloads if "/cdn/" in path] == ([] if inside else [weights])


def test_cached_files_are_not_downloaded_again(hub: Hub, fetch_each: FetchEach) -> None:
    first = fetch_each(FILE, FOLDER)
    assert len(hub.downloads) == 3
    assert [len(one.lines) for one in first] == [1, 2]
    hub.requests.clear()
    again = fetch_each(FILE, FOLDER)
    assert hub.downloads == []
    for before, after in zip(first, again, strict=True):
        assert vars(after) == {**vars(before), "lines": []}


def test_offline_the_cache_is_used_without_a_request(hub: Hub, fetch_each: FetchEach) -> None:
    first = fetch_each(FILE, FOLDER)
    hub.requests.clear()
    pinned = [f"{one.id}@{one.revision}" for one in first]
    again = fetch_each(FILE, FOLDER, *pinned, HF_HUB_OFFLINE="1")
    assert hub.requests == []
    for before, after in zip([*first, *first], again, strict=True):
        assert vars(after) == {**vars(before), "lines": []}


def test_offline_a_file_that_is_not_cached_gives_one_line_with_the_remedy(
    hub: Hub, fetch_each: FetchEach
) -> None:
    found = fetch_each(FILE, FOLDER, HF_HUB_OFFLINE="1")
    assert len(found) == 2
    for one in found:
        assert one.error.startswith("expected hf:owner/")
        assert one.error.endswith(
            "found none, and HF_HUB_OFFLINE is set: unset it and run once with network access"
        )
    assert hub.requests == []


def test_offline_a_partly_cached_folder_is_refused(fetch: Fetch) -> None:
    (Path(fetch(FOLDER).path) / f"{MODEL}.safetensors").unlink()
    error = fetch(FOLDER, HF_HUB_OFFLINE="1").error
    assert error.startswith(f"expected vae/{MODEL}.safetensors in hf:owner/pipeline at main, ")
    assert error.endswith("found no weights: unset HF_HUB_OFFLINE")


def test_the_cache_is_in_hf_home(fetch: Fetch, tmp_path: Path) -> None:
    found = fetch(FILE, HF_HOME=str(tmp_path / "elsewhere"))
    assert Path(found.path).is_relative_to(tmp_path / "elsewhere")
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "home").exists()


def test_a_cut_connection_is_resumed_where_it_broke(hub: Hub, fetch: Fetch) -> None:
    large = CKPT * 60  # the library keeps what it got in blocks of 10 MiB
    hub.publish("owner/net", {"net.ckpt": large})
    hub.cut_at, hub.cuts = 11 * 2**20, 1
    assert fetch(FILE).sha256 == hashlib.sha256(large).hexdigest()
    ranges = [asked for _, path, asked in hub.requests if "/cdn/" in path]
    assert ranges == ["", f"bytes={10 * 2**20}-"]


def test_a_connection_cut_again_and_again_leaves_nothing(
    hub: Hub, fetch: Fetch, tmp_path: Path
) -> None:
    hub.cut_at = 70_000
    error = fetch(FILE).error
    assert error.startswith(f"expected {FILE} from {hub.url}, found RemoteProtocolError, ")
    assert "check the network and run again" in error
    assert cached(tmp_path) == {}
    hub.cut_at = None
    assert Path(fetch(FILE).path).read_bytes() == CKPT


def test_weights_damaged_in_transfer_are_refused_and_removed(
    hub: Hub, fetch: Fetch, tmp_path: Path
) -> None:
    hub.flip_at = 100_000
    error = fetch(FOLDER).error
    assert f"with hash {hashlib.sha256(CKPT).hexdigest()[:12]}…, found " in error
    assert error.endswith("and has been removed; run again")
    assert cached(tmp_path) == {}
    assert "unset it and run once" in fetch(FOLDER, HF_HUB_OFFLINE="1").error
    hub.flip_at = None
    assert fetch(FOLDER).sha256 == hashlib.sha256(CKPT).hexdigest()


@pytest.mark.parametrize(
    ("text", "name", "offline"),
    [(FILE, "net.ckpt", "0"), (FILE, "net.ckpt", "1"), (FOLDER, "config.json", "1")],
    ids=["large", "large, offline", "small, offline"],
)
def test_files_damaged_in_the_cache_are_refused_and_removed(
    fetch: Fetch, text: str, name: str, offline: str
) -> None:
    path = Path(fetch(text).path)
    file = path if path.is_file() else path / name
    content = file.read_bytes()
    file.write_bytes(b"?" + content[1:])
    assert f"expected {name} of {text} with hash" in fetch(text, HF_HUB_OFFLINE=offline).error
    assert not file.is_symlink()
    fetch(text)
    assert file.read_bytes() == content


def test_a_size_that_differs_from_the_listed_one_is_refused(
    hub: Hub, fetch: Fetch, tmp_path: Path
) -> None:
    hub.claimed_size = 200_001
    assert "should be of size 200001 but has size 200000" in fetch(FILE).error
    assert cached(tmp_path) == {}


def test_a_file_larger_than_the_disk_is_refused_before_the_download(hub: Hub, fetch: Fetch) -> None:
    hub.claimed_size = 10**18
    error = fetch(FILE).error
    assert error.startswith("expected 953,674,316,406.2 MiB free in ")
    assert error.endswith("free disk space, or set HF_HOME to a folder elsewhere")
    assert hub.downloads == []


def test_a_full_disk_gives_an_error_of_one_line(fetch: Fetch, tmp_path: Path) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    error = fetch(FILE, code=limit + CODE).error
    assert "found File too large in " in error
    assert error.endswith("free disk space there, or set HF_HOME to a folder elsewhere")
    assert cached(tmp_path) == {}


def test_a_cache_that_cannot_be_created_gives_an_error_of_one_line(
    fetch: Fetch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert "found Not a directory in " in fetch(FILE, HF_HOME=str(tmp_path / "file")).error


def test_a_branch_and_a_commit_are_fetched_and_recorded(hub: Hub, fetch_each: FetchEach) -> None:
    main = hub.repositories["owner/net"].branches["main"]
    branch = hub.publish("owner/net", {"net.ckpt": b"of a branch"}, "pr/1")
    moved = hub.publish("owner/net", {"net.ckpt": b"of a later main"})
    texts = FILE, f"{FILE}@pr/1", f"{FILE}@{main}"
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        found = fetch_each(*texts, **environment)
        assert [one.id for one in found] == [FILE] * 3
        assert [one.revision for one in found] == [moved, branch, main]
        content = [Path(one.path).read_bytes() for one in found]
        assert content == [b"of a later main", b"of a branch", CKPT]


def test_all_files_are_of_one_commit_even_if_the_branch_moves_meanwhile(
    hub: Hub, fetch: Fetch
) -> None:
    first = hub.repositories["owner/pipeline"].branches["main"]
    later = {"vae/config.json": b"{}", f"vae/{MODEL}.safetensors": b"later"}
    hub.on_listing = lambda: hub.publish("owner/pipeline", later)
    found = fetch(FOLDER)
    assert found.revision == first
    assert (Path(found.path) / "config.json").read_bytes() == CONFIG
    assert (Path(found.path) / f"{MODEL}.safetensors").read_bytes() == CKPT


def gated(hub: Hub) -> None:
    hub.repositories["owner/net"].gated = True


def without_commit(hub: Hub) -> None:
    repository = hub.repositories["owner/net"]
    repository.branches["main"] = ""
    repository.commits[""] = {"net.ckpt": CKPT}


def answers(name: str, status: int) -> Callable[[Hub], None]:
    return lambda hub: setattr(hub, name, status)


def test_a_missing_file_gives_one_line_with_the_existing_ones(
    hub: Hub, fetch_each: FetchEach
) -> None:
    wanted = {
        "hf:owner/none/a.ckpt": "no such repository: check the name, and set HF_TOKEN",
        f"{FILE}@v9": "no revision v9: name a branch, a tag or a commit",
        "hf:owner/net/no.ckpt": "net.ckpt, other.ckpt: name a file or folder that exists there",
        "hf:owner/net/vae": "no weights: name a file or folder that exists there",
        "hf:owner/net": "net.ckpt, other.ckpt: name a file or folder that exists there",
        "hf:owner/pipeline": f"vae/{MODEL}.fp16.safetensors, vae/{MODEL}.safetensors: name a file",
    }
    for one, found in zip(fetch_each(*wanted), wanted.values(), strict=True):
        assert one.error.startswith("expected ")
        assert f", found {found}" in one.error
    assert hub.downloads == []


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (gated, "a gated repository: accept its terms at URL/owner/net and set HF_TOKEN"),
        (without_commit, "ValueError, an answer without a commit: check the network"),
        (answers("status", 404), "HTTP 404: run again later"),
        (answers("status", 403), "HTTP 403: set HF_TOKEN to a token that may read URL"),
        (answers("status", 401), "HTTP 401: set HF_TOKEN to a token that may read URL"),
        (answers("api_status", 503), "HTTP 503: run again later"),
        (answers("api_status", 200), "JSONDecodeError, Expecting value: line 1 column 1"),
    ],
)
def test_refusals_of_the_hub_give_an_error_of_one_line(
    hub: Hub, fetch: Fetch, fault: Callable[[Hub], object], found: str
) -> None:
    fault(hub)
    error = fetch(FILE).error.replace(hub.url, "URL")
    assert error.startswith(f"expected {FILE} from URL, found {found}")
    assert hub.downloads == []


def test_a_folder_with_only_pickles_is_refused(hub: Hub, fetch: Fetch) -> None:
    hub.publish("owner/old", {"config.json": CONFIG, f"{MODEL}.bin": b"a pickle"})
    error = fetch("hf:owner/old").error
    assert f"found {MODEL}.bin, a pickle that may run code: save it again as safetensors" in error
    assert hub.downloads == []


def test_without_a_network_the_remedy_is_named(hub: Hub, fetch: Fetch) -> None:
    error = fetch(FILE, HF_ENDPOINT="http://127.0.0.1:1").error
    assert error.startswith(f"expected {FILE} from http://127.0.0.1:1, found ConnectError, ")
    assert error.endswith("or set HF_HUB_OFFLINE=1 to use what is cached")


def test_the_token_is_sent_only_to_the_hub_and_no_telemetry_is_sent(hub: Hub, fetch: Fetch) -> None:
    fetch(FILE, HF_TOKEN="hf_secret", AI_AGENT="1")
    asked = list(zip(hub.requests, hub.headers, strict=True))
    assert any("/cdn/" in path for (_, path, _), _ in asked)
    for (_, path, _), headers in asked:
        assert path.startswith(("/api/models/owner/net", "/owner/net/resolve/", "/cdn/"))
        sent = headers.get("authorization", "")
        assert sent == ("" if "/cdn/" in path else "Bearer hf_secret")
        assert "torch" not in headers["user-agent"]


def test_an_export_sends_no_telemetry_either(hub: Hub, tmp_path: Path) -> None:
    # It imports transformers, and so the library, before it fetches.
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "fvae_deploy", "export", "-q", "-m", FILE]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "bundle")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "expected a file that contains only tensors" in done.stderr
    assert hub.downloads
    assert [h["user-agent"] for h in hub.headers if "torch" in h["user-agent"]] == []


def test_without_the_library_the_error_names_the_pip_line(fetch: Fetch) -> None:
    found = fetch(FILE, code="import sys\nsys.modules['huggingface_hub'] = None\n" + CODE)
    assert found.error.endswith("found none: pip install 'fvae-deploy[export]'")


def test_the_library_is_imported_only_by_a_fetch(fetch: Fetch) -> None:
    code = "import json, sys\nimport fvae_deploy.export.hub\n"
    code += "print(json.dumps({'error': '', 'heavy': 'huggingface_hub' in sys.modules}))"
    assert not fetch("", code=code).heavy


@pytest.mark.parametrize(
    ("text", "repo", "path", "revision", "is_file"),
    [
        (
            "hf:Yumic/LeanVAE/LeanVAE-dim16.ckpt",
            "Yumic/LeanVAE",
            "LeanVAE-dim16.ckpt",
            "main",
            True,
        ),
        ("hf:a/b", "a/b", "", "main", False),
        ("hf:a/b@v1.0", "a/b", "", "v1.0", False),
        ("hf:a/b/c d/e.pt@refs/pr/4", "a/b", "c d/e.pt", "refs/pr/4", True),
        ("hf:a-1/B_2.c/vae", "a-1/B_2.c", "vae", "main", False),
    ],
)
def test_ids_are_parsed(text: str, repo: str, path: str, revision: str, is_file: bool) -> None:
    place = parse(text)
    assert (place.repo, place.path, place.revision) == (repo, path, revision)
    assert place.is_file == is_file
    assert place.id == text.split("@")[0]
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text",
    [
        *("hf:", "hf:a", "hf:/a", "hf:a/", "hf:a/b/", "hf:a//b", "hf:a/b//c", "hf://a/b", "a/b"),
        *("hf:a/b@", "hf:a/b@c@d", "hf:a/b@../../x", "hf:a/b@/etc", "hf:a/b@x/"),
        *("hf:a/b/../../c", "hf:a/b/./c", "hf:a/b/..@main", "hf:a/b/c\\d", "hf:a/b\n", "hf:a/b c"),
        *("hf:a--b/c", "hf:a/b..c", "hf:a/b.git", "hf:-a/b", "hf:a/b-", "hf:ä/b"),
        *(f"hf:a/{'b' * 97}", "https://huggingface.co/a/b"),
    ],
)
def test_malformed_ids_are_refused(text: str) -> None:
    with pytest.raises(BundleError, match=r"^expected hf:OWNER/NAME.*found '.*: check the name$"):
        parse(text)


@given(st.text("ab.-_/@:\\ \nä", max_size=20))
@example("a/b/c@d")
def test_the_library_accepts_every_id_that_is_parsed(rest: str) -> None:
    try:
        place = parse(f"hf:{rest}")
    except BundleError:
        return
    validate_repo_id(place.repo)
    parts = [*place.path.split("/"), *place.revision.split("/")]
    assert not {".", ".."} & set(parts)
    assert parse(f"{place.id}@{place.revision}") == place
