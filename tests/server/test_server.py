"""Jobs over HTTP on a real server: results, access control, recovery, metrics and the log."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import requests
from dicom_series import write_series
from live_server import LiveServer

import fvae_deploy as fvae
from fvae_deploy.cli import main as cli
from fvae_deploy.server.auth import make_token
from fvae_deploy.volume.open import open_volume

LONG = 3000  # slices: enough to keep the fake engine busy for seconds, even on fast processors


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    path = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    fvae.write_phantom(path, (40, 48, 21))
    return path


@pytest.fixture(scope="module")
def long_ct(tmp_path_factory, write_ct):
    path = tmp_path_factory.mktemp("ct") / "long.nii.gz"
    write_ct(path, (32, 32, LONG))
    return path


def finished_job(server, response):
    assert response.status_code == 202, response.text
    job = server.wait(response.json()["id"])
    assert job["state"] == "done", job["error"]
    return job


def wait_until_empty(folder):
    """Wait until a job's folder is empty: its worker may clear it after the job has ended."""
    for _ in range(200):
        if not list(folder.iterdir()):
            return
        time.sleep(0.05)
    raise AssertionError(list(folder.iterdir()))


def test_a_reconstruction_equals_that_of_the_api(server, ct, fake_bundle, tmp_path):
    job = finished_job(server, server.post("reconstruct", ct.read_bytes(), format="nii"))
    fvae.reconstruct(ct, tmp_path / "r.nii", model=fake_bundle, engine="fake")
    assert server.get(f"{job['id']}/result").content == (tmp_path / "r.nii").read_bytes()
    assert (job["done"], job["total"], job["attempts"]) == (21, 21, 1)
    assert job["report"]["volume"]["shape"] == [40, 48, 21]
    assert str(server.folder) not in json.dumps(job)


def test_windows_and_published_ways_are_those_of_the_api(server, ct, fake_bundle, tmp_path):
    given = {"hu_window": "soft", "published": True}
    query = {"hu_window": "soft", "published": "true", "format": "nii"}
    job = finished_job(server, server.post("reconstruct", ct.read_bytes(), **query))
    fvae.reconstruct(ct, tmp_path / "r.nii", model=fake_bundle, engine="fake", **given)
    assert server.get(f"{job['id']}/result").content == (tmp_path / "r.nii").read_bytes()
    assert job["report"]["clipped"]["window_hu"] == [-175, 250]
    for wrong in ({"hu_window": "9:1"}, {"published": "true", "protocol": "causal"}):
        assert server.post("reconstruct", ct.read_bytes(), **wrong).status_code == 422
    wrong = {"rounding": "truncate", "dtype": "float32"}
    assert server.post("decode", b"", **wrong).status_code == 422


def test_latents_are_downloaded_as_a_zip_and_decoded_from_it(server, ct, fake_bundle, tmp_path):
    job = finished_job(server, server.post("encode", ct.read_bytes()))
    latents = server.get(f"{job['id']}/result").content
    zipfile.ZipFile(io.BytesIO(latents)).extractall(tmp_path / "z.zarr")
    job = finished_job(server, server.post("decode", latents, slices="3:9", format="nii"))
    fake = {"model": fake_bundle, "engine": "fake"}
    fvae.decode(tmp_path / "z.zarr", tmp_path / "d.nii", slices=(3, 9), **fake)
    assert server.get(f"{job['id']}/result").content == (tmp_path / "d.nii").read_bytes()


def test_a_bound_holds_over_http(server, ct, tmp_path):
    job = finished_job(server, server.post("encode", ct.read_bytes(), max_error="7"))
    assert job["report"]["bound"]["max_error_hu"] == 7
    latents = server.get(f"{job['id']}/result").content
    job = finished_job(server, server.post("decode", latents, format="nii"))
    assert job["report"]["bound"]["checked"]
    (tmp_path / "d.nii").write_bytes(server.get(f"{job['id']}/result").content)
    volumes = [np.concatenate([*open_volume(p).slabs(8)]) for p in (ct, tmp_path / "d.nii")]
    assert np.abs(volumes[0].astype(int) - volumes[1]).max() <= 7
    job = finished_job(server, server.post("decode", latents, no_residual="true", format="nii"))
    assert "bound" not in job["report"]


def test_a_zip_of_dicom_slices_is_accepted_as_a_ct(server, fake_bundle, tmp_path):
    write_series(tmp_path / "series", (16, 24, 5))
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (tmp_path / "series").iterdir():
            archive.write(path, f"a patient's name/{path.name}")
    job = finished_job(server, server.post("reconstruct", body.getvalue(), format="nii"))
    fvae.reconstruct(tmp_path / "series", tmp_path / "r.nii", model=fake_bundle, engine="fake")
    assert server.get(f"{job['id']}/result").content == (tmp_path / "r.nii").read_bytes()
    job = finished_job(server, server.post("reconstruct", body.getvalue(), format="dcm"))
    series = io.BytesIO(server.get(f"{job['id']}/result").content)
    zipfile.ZipFile(series).extractall(tmp_path / "r.dcm")
    np.testing.assert_array_equal(
        np.concatenate([*open_volume(tmp_path / "r.dcm").slabs(5)]),
        np.concatenate([*open_volume(tmp_path / "r.nii").slabs(5)]),
    )


def test_a_result_can_be_downloaded_in_ranges(server, ct):
    job = finished_job(server, server.post("reconstruct", ct.read_bytes()))
    path = f"{job['id']}/result"
    whole = server.get(path).content
    part = server.get(path, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    rest = server.get(path, headers={"Range": "bytes=200-"})
    assert whole[:100] + part.content + rest.content == whole
    beyond = server.get(path, headers={"Range": f"bytes={len(whole)}-"})
    assert beyond.status_code == 416


def test_events_report_progress_until_the_job_ends(server, long_ct):
    job = server.post("encode", long_ct.read_bytes()).json()
    with server.get(f"{job['id']}/events", stream=True) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in stream.iter_lines(decode_unicode=True) if line]
    seen = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    done = [event["done"] for event in seen]
    assert done == sorted(done)
    assert any(0 < count < LONG for count in done)
    assert (seen[-1]["state"], seen[-1]["done"], lines[-2]) == ("done", LONG, "event: done")


def test_running_and_queued_jobs_can_be_cancelled(server, long_ct):
    first = server.post("encode", long_ct.read_bytes()).json()["id"]
    second = server.post("encode", long_ct.read_bytes()).json()["id"]
    assert server.get(f"{first}/result").status_code == 409
    for ident in (second, first):  # one may be running by now, the other is queued
        url = f"{server.url}/v1/jobs/{ident}/cancel"
        answer = requests.post(url, headers=server.headers, timeout=9)
        assert answer.status_code == 200
        assert server.wait(ident)["state"] == "cancelled"
        wait_until_empty(server.store.files / ident)


def test_deleting_a_job_removes_its_files(server, ct):
    job = finished_job(server, server.post("reconstruct", ct.read_bytes()))
    url = f"{server.url}/v1/jobs/{job['id']}"
    assert requests.delete(url, headers=server.headers, timeout=9).status_code == 204
    assert requests.delete(url, headers=server.headers, timeout=9).status_code == 404
    assert not (server.store.files / job["id"]).exists()


def test_a_repeated_idempotency_key_creates_one_job(server, ct):
    headers = {"Idempotency-Key": "abc"}
    first = server.post("reconstruct", ct.read_bytes(), headers=headers)
    again = server.post("reconstruct", ct.read_bytes(), headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["id"] == again.json()["id"]
    finished_job(server, first)


def test_a_failed_job_states_the_reason_and_leaves_no_files(server, write_ct, tmp_path):
    write_ct(tmp_path / "mask.nii.gz", (16, 16, 5), low=0, high=5)
    ident = server.post("reconstruct", (tmp_path / "mask.nii.gz").read_bytes()).json()["id"]
    job = server.wait(ident)
    assert (job["state"], job["error_kind"]) == ("failed", "VolumeError")
    assert "expected a CT in HU" in job["error"]
    wait_until_empty(server.store.files / ident)


def test_a_memory_budget_that_is_too_small_fails_with_the_minimum_needed(server, ct):
    job = server.wait(server.post("encode", ct.read_bytes(), memory="1MiB").json()["id"])
    assert (job["state"], job["error_kind"]) == ("failed", "PlanError")
    assert re.search(r"at least \d+ MiB", job["error"])


def test_jobs_are_those_of_ones_own_token(server, ct):
    mine = server.post("reconstruct", ct.read_bytes()).json()["id"]
    other = {"Authorization": f"Bearer {make_token(server.store, 'other')}"}
    assert mine in [job["id"] for job in server.get("").json()]
    assert requests.get(f"{server.url}/v1/jobs", headers=other, timeout=9).json() == []
    assert requests.get(f"{server.url}/v1/jobs/{mine}", headers=other, timeout=9).status_code == 404
    assert server.store.remove_token("other")
    assert requests.get(f"{server.url}/v1/jobs", headers=other, timeout=9).status_code == 401
    server.wait(mine)


def test_the_folder_contains_no_token_and_the_log_no_patient_data(server, ct):
    finished_job(server, server.post("reconstruct", ct.read_bytes(), series="1.2.3.4567"))
    for path in server.folder.rglob("*"):
        if path.is_file():
            assert server.token.encode() not in path.read_bytes(), path
    log = (server.folder / "audit.log").read_text()
    assert "1.2.3.4567" not in log
    events = [json.loads(line) for line in log.splitlines()]
    assert {"request", "server starts"} <= {event["event"] for event in events}
    assert any(event.get("route") == "/v1/reconstruct" and event["job"] for event in events)


def test_metrics_count_jobs_slices_stages_memory_and_failures(server, ct):
    finished_job(server, server.post("reconstruct", ct.read_bytes()))
    server.wait(server.post("encode", ct.read_bytes(), memory="1MiB").json()["id"])
    answer = requests.get(f"{server.url}/metrics", headers=server.headers, timeout=9)
    values = dict(re.findall(r"^(\S+) (\S+)$", answer.text, re.MULTILINE))
    assert float(values['fvae_jobs_ended_total{state="done",verb="reconstruct"}']) >= 1
    assert float(values['fvae_failures_total{kind="PlanError"}']) >= 1
    assert float(values['fvae_stage_seconds_total{stage="decode"}']) > 0
    assert float(values["fvae_slices_total"]) >= 21
    assert float(values['fvae_memory_bytes{process="worker"}']) > 1e7
    assert values["fvae_ready"] == "1.0"


def test_responses_carry_security_headers(server):
    for path in ("/", "/docs", "/page/page.js", "/healthz", "/nowhere", "/v1/jobs"):
        headers = requests.get(server.url + path, timeout=9).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_after_kill_9_results_remain_and_a_job_resumes_to_the_same_bytes(
    serve_fake, ct, long_ct, tmp_path
):
    server = LiveServer(tmp_path / "server", *serve_fake)
    server.start()
    try:
        kept = finished_job(server, server.post("reconstruct", ct.read_bytes()))["id"]
        before = server.get(f"{kept}/result").content
        whole = finished_job(server, server.post("encode", long_ct.read_bytes()))["id"]
        cut = server.post("encode", long_ct.read_bytes()).json()["id"]
        waiting = server.post("reconstruct", ct.read_bytes()).json()["id"]
        while server.get(cut).json()["done"] < 200:
            time.sleep(0.05)
        server.kill()
        server.start()
        assert server.get(f"{kept}/result").content == before
        assert server.wait(cut)["attempts"] == 2
        assert server.wait(waiting)["state"] == "done"
        assert server.get(f"{cut}/result").content == server.get(f"{whole}/result").content
        assert server.get(f"{waiting}/result").content == before
    finally:
        server.kill()


def test_a_dead_worker_is_restarted_and_its_job_resumed(server, ct, long_ct):
    before = finished_job(server, server.post("reconstruct", ct.read_bytes()))["id"]
    leftover = server.store.files / before / "input.nii.gz"
    leftover.write_bytes(b"a scan that a dead worker did not remove")
    ident = server.post("encode", long_ct.read_bytes()).json()["id"]
    server.wait(ident, "running")
    os.kill(server.store.worker()["pid"], signal.SIGKILL)
    job = server.wait(ident)
    assert (job["state"], job["attempts"]) == ("done", 2)
    assert not leftover.exists()
    assert server.get(f"{before}/result").status_code == 200


def test_a_second_server_on_the_same_folder_is_refused(server, serve_fake):
    other = LiveServer(server.folder, *serve_fake)
    with pytest.raises(RuntimeError, match=r"expected no other server on .*, found one"):
        other.start()


def test_a_port_that_another_program_has_is_refused(server, capsys, monkeypatch, tmp_path):
    line = ["fvae", "serve", "--folder", str(tmp_path), "--port", str(server.port)]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert "found none: make one with fvae token add NAME --folder" in err
    assert f"expected to listen on 127.0.0.1:{server.port}, found Address already in use" in err
    assert out == ""


def test_serving_a_network_without_tls_or_tokens_is_refused(capsys, monkeypatch):
    from fvae_deploy.errors import UsageError
    from fvae_deploy.server.settings import check_exposure

    check_exposure("127.0.0.1", authenticated=False, tls=False, proxied=False)
    check_exposure("0.0.0.0", authenticated=True, tls=True, proxied=False)
    check_exposure("10.0.0.1", authenticated=True, tls=False, proxied=True)
    with pytest.raises(UsageError, match="--insecure-no-auth only on a loopback address"):
        check_exposure("0.0.0.0", authenticated=False, tls=True, proxied=False)
    with pytest.raises(UsageError, match="expected TLS"):
        check_exposure("0.0.0.0", authenticated=True, tls=False, proxied=False)


@pytest.mark.e2e  # slow: exports a generator first
def test_generate_reads_findings_as_text_and_not_as_a_path(tmp_path, small_generator):
    from fvae_deploy.phantom.torso import write_phantom

    options = ["--generator", str(small_generator), "-e", "openvino", "--memory", "1GiB"]
    server = LiveServer(tmp_path / "server", *options)
    write_phantom(tmp_path / "ct.nii", (64, 64, 9), labels=tmp_path / "mask.nii.gz")
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.write(tmp_path / "mask.nii.gz", "mask.nii.gz")
        archive.writestr("findings.txt", "/etc/passwd")
    server.start()
    try:
        before = server.store.worker()["baseline"]
        job = finished_job(server, server.post("generate", body.getvalue(), steps=1))
        assert job["report"]["generator"]["findings"] == "/etc/passwd"
        # The libraries it imported do not count against the next job's memory.
        end = time.monotonic() + 20
        while server.store.worker()["baseline"] < before + (64 << 20):
            assert time.monotonic() < end
            time.sleep(0.1)
        path = tmp_path / "generated.nii.gz"
        path.write_bytes(server.get(f"{job['id']}/result").content)
        assert np.concatenate([*open_volume(path).slabs(4)]).shape == (9, 64, 64)
    finally:
        server.kill()


def test_without_tokens_only_loopback_host_names_are_accepted(serve_fake, ct, tmp_path):
    server = LiveServer(tmp_path / "server", *serve_fake, "--insecure-no-auth")
    server.start()
    try:
        for host, status in (
            (f"127.0.0.1:{server.port}", 200),
            (f"localhost:{server.port}", 200),
            (f"[::1]:{server.port}", 200),
            ("evil.example", 403),
            ("[", 403),
        ):
            answer = requests.get(f"{server.url}/v1/jobs", headers={"Host": host}, timeout=9)
            assert answer.status_code == status, host
    finally:
        server.kill()


def test_with_a_certificate_the_server_uses_tls(serve_fake, tmp_path):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the program openssl to create a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    line = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    line += ["-nodes", "-keyout", key, "-out", cert, "-subj", "/CN=localhost"]
    line += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(line, check=True, capture_output=True)
    tls = ["--tls-cert", str(cert), "--tls-key", str(key)]
    server = LiveServer(tmp_path / "server", *serve_fake, *tls)
    server.url, server.verify = server.url.replace("http:", "https:"), str(cert)
    server.start()
    try:
        answer = requests.get(f"{server.url}/healthz", verify=str(cert), timeout=9)
        assert answer.text == "ok"
        assert "max-age" in answer.headers["strict-transport-security"]
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["-m", "nothing"], 4, "expected a built-in model"),
        (["-e", "magic"], 2, "expected --engine as one of auto"),
        (["--tls-cert", "a.pem"], 2, "--tls-cert and --tls-key together"),
        (["--host", "0.0.0.0"], 2, "expected TLS on 0.0.0.0"),
        (["--host", "0.0.0.0", "--insecure-no-auth"], 2, "only on a loopback address"),
    ],
)
def test_a_server_with_invalid_options_does_not_start(
    options, code, message, tmp_path, monkeypatch, capsys
):
    line = ["fvae", "serve", "--folder", str(tmp_path), *options]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == code, error
    assert message in error
    assert error.count("\n") == 1
