"""The real server behind Debian's nginx, with the file in deploy/ and TLS on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import requests
from live_server import LiveServer

import fvae_deploy as fvae

pytestmark = pytest.mark.e2e
SITE = Path(__file__).parents[2] / "deploy" / "nginx.conf"
MIB = 1 << 20


def program(name):
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        pytest.skip(f"needs {name}: make e2e installs it")
    return found


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for localhost and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    cert, key = folder / "fvae.crt", folder / "fvae.key"
    line = [program("openssl"), "req", "-x509", "-newkey", "ec", "-nodes", "-subj", "/CN=localhost"]
    line += ["-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", key, "-out", cert]
    line += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(line, check=True, capture_output=True)
    return cert, key


def site(port, upstream, certificate):
    """The file in deploy/ with the ports and the certificate of this test, and nothing else."""
    text = SITE.read_text(encoding="utf-8")
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("    listen [::]:443 ssl;\n", ""),
        ("/etc/ssl/fvae.crt", certificate[0]),
        ("/etc/ssl/private/fvae.key", certificate[1]),
        ("127.0.0.1:8080", f"127.0.0.1:{upstream}"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, str(new))
    return text


def write_settings(folder, text):
    """Write a whole configuration around a site; everything that nginx writes is in `folder`."""
    temporary = "".join(
        f"    {name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off;\nmaster_process off;\nuser root;\npid {folder}/pid;\n"
        f"error_log {folder}/error.log info;\n"
        f"events {{}}\nhttp {{\n{temporary}{text}}}\n"
    )
    return path


@pytest.fixture(scope="module")
def server(fake_bundle, tmp_path_factory):
    """A server with a small limit that believes a proxy."""
    options = ["-m", str(fake_bundle), "-e", "fake", "--behind-proxy", "--max-upload", "8MiB"]
    live = LiveServer(tmp_path_factory.mktemp("server"), *options)
    live.start()
    yield live
    live.kill()


@pytest.fixture(scope="module")
def proxy(server, certificate, tmp_path_factory):
    """nginx before the server; yields a function that sends requests through it."""
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    path = write_settings(folder, site(port, server.port, certificate))
    process = subprocess.Popen([program("nginx"), "-e", folder / "early.log", "-c", path])

    def send(method, path, **options):
        headers = server.headers | options.pop("headers", {})
        url = f"https://localhost:{port}{path}"
        return requests.request(
            method, url, headers=headers, verify=str(certificate[0]), timeout=60, **options
        )

    for _ in range(200):
        try:
            send("GET", "/healthz")
            break
        except requests.ConnectionError:
            time.sleep(0.05)
    else:
        pytest.fail((folder / "error.log").read_text())
    send.folder, send.port = folder, port
    yield send
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    path = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    fvae.write_phantom(path, (128, 128, 200))
    return path


def test_nginx_takes_the_file(certificate, tmp_path):
    nginx = program("nginx")
    path = write_settings(tmp_path, site(free_port(), 8080, certificate))
    done = subprocess.run([nginx, "-t", "-c", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path.write_text(path.read_text().replace("proxy_buffering off", "proxy_buffering of"))
    assert subprocess.run([nginx, "-t", "-c", path], capture_output=True, check=False).returncode


def test_the_limit_of_nginx_is_the_default_of_the_server():
    from inspect import signature

    from fvae_deploy.cli.serve import serve
    from fvae_deploy.parse import parse_bytes

    default = signature(serve).parameters["upload"].default
    (limit,) = re.findall(r"client_max_body_size (\d+)g;", SITE.read_text())
    assert int(limit) << 30 >= parse_bytes(default)


def test_a_job_goes_through_the_proxy_and_back(proxy, ct, fake_bundle, tmp_path):
    with ct.open("rb") as body:
        answer = proxy("POST", "/v1/reconstruct", data=body)
    assert answer.status_code == 202, answer.text
    ident = answer.json()["id"]
    states, times = [], []
    with proxy("GET", f"/v1/jobs/{ident}/events", stream=True) as events:
        for line in events.iter_lines(decode_unicode=True):
            if line.startswith("data: "):
                states.append(json.loads(line[6:])["state"])
                times.append(time.monotonic())
    assert states[-1] == "done"
    assert states[0] in ("queued", "running")
    assert times[-1] - times[0] > 0.1  # they came one by one, not together at the end
    whole = proxy("GET", f"/v1/jobs/{ident}/result").content
    rest = proxy("GET", f"/v1/jobs/{ident}/result", headers={"Range": "bytes=100-"})
    assert (rest.status_code, rest.content) == (206, whole[100:])
    (tmp_path / "recon.nii.gz").write_bytes(whole)
    fvae.reconstruct(ct, tmp_path / "direct.nii.gz", model=fake_bundle, engine="fake")
    np.testing.assert_array_equal(
        nibabel.load(tmp_path / "recon.nii.gz").dataobj,
        nibabel.load(tmp_path / "direct.nii.gz").dataobj,
    )


def test_an_upload_reaches_the_server_while_it_is_sent(proxy, server, ct):
    content, seen = ct.read_bytes(), []

    def body():
        yield content[:MIB]
        end = time.monotonic() + 20
        while not seen and time.monotonic() < end:
            paths = [path for path in server.store.files.glob("*/upload") if path.stat().st_size]
            seen.extend(paths)
            time.sleep(0.02)
        yield content[MIB:]

    answer = proxy("POST", "/v1/reconstruct", data=body())  # chunked, of unknown length
    assert seen, "nothing had reached the server before the upload ended"
    assert answer.status_code == 202, answer.text
    assert server.wait(answer.json()["id"])["state"] == "done"


@pytest.mark.parametrize(
    ("token", "length", "status"),
    [("right", 9 * MIB, b"413"), ("wrong", MIB, b"401")],
)
def test_a_refusal_comes_before_the_upload(proxy, server, certificate, token, length, status):
    """Only the head is sent; a proxy that waits for the body would not answer."""
    context = ssl.create_default_context(cafile=str(certificate[0]))
    secret = server.token if token == "right" else "wrong"
    head = "POST /v1/reconstruct HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Authorization: Bearer {secret}\r\nContent-Length: {length}\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=15) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(head.encode())
        first = connection.recv(64)
    assert first.split()[1] == status


def test_no_part_of_a_scan_lies_in_a_file_of_the_proxy(proxy, server, ct):
    with ct.open("rb") as body:
        job = proxy("POST", "/v1/reconstruct", data=body, params={"format": "nii"}).json()
    server.wait(job["id"])
    with proxy("GET", f"/v1/jobs/{job['id']}/result", stream=True) as answer:
        time.sleep(1)  # a client that reads slowly
        assert sum(map(len, answer.iter_content(MIB))) > 6 * MIB
    # nginx removes such a file when the request ends, and warns of it.
    log = (proxy.folder / "error.log").read_text()
    assert "temporary file" not in log, log


def test_the_page_of_another_site_is_refused_and_the_own_one_is_not(proxy):
    own = f"https://localhost:{proxy.port}"
    assert proxy("GET", "/v1/jobs", headers={"Origin": own}).status_code == 200
    assert proxy("GET", "/v1/jobs", headers={"Origin": "https://elsewhere"}).status_code == 403


def test_the_audit_log_has_the_address_that_the_proxy_saw(proxy, server):
    proxy("GET", "/v1/jobs", headers={"X-Forwarded-For": "192.0.2.7"})
    lines = (server.folder / "audit.log").read_text().splitlines()
    last = [json.loads(line) for line in lines if "/v1/jobs" in line][-1]
    assert last["client"] == "127.0.0.1"


def test_there_is_no_answer_without_tls(proxy):
    answer = requests.get(f"http://localhost:{proxy.port}/healthz", timeout=10)
    assert answer.status_code == 400
