"""The files in deploy/ are taken by the programs that they are for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fvae_deploy.server.metrics import Metrics
from fvae_deploy.server.store import Store

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def tool(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def run(*words, cwd=None):
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_systemd_takes_the_unit_and_finds_it_confined(tmp_path):
    analyze = tool("systemd-analyze")
    text = (DEPLOY / "fvae.service").read_text()
    program = re.search(r"^ExecStart=(\S+)", text, re.MULTILINE)[1]
    unit = tmp_path / "fvae.service"
    unit.write_text(text.replace(program, "/bin/true"))  # fvae is not installed there here
    run(analyze, "verify", unit)
    exposure = run(analyze, "security", "--offline=true", unit)
    assert float(re.search(r"exposure level for fvae.service: ([\d.]+)", exposure)[1]) < 4


def test_compose_takes_the_file_and_refuses_an_option_that_it_does_not_know(tmp_path):
    compose = tool("docker-compose")
    run(compose, "-f", DEPLOY / "compose.yaml", "config", "-q")
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DEPLOY / "compose.yaml").read_text().replace("mem_limit", "memory_limit"))
    with pytest.raises(AssertionError, match="Unsupported config option"):
        run(compose, "-f", wrong, "config", "-q")


def test_every_alert_fires_where_it_should_and_nowhere_else(tmp_path):
    promtool = tool("promtool")
    alerts = DEPLOY / "alerts.yaml"
    run(promtool, "check", "rules", alerts)
    tests = Path(__file__).with_name("alerts_test.yaml")
    names = re.findall(r"alert: (\w+)", alerts.read_text())
    assert sorted(names) == sorted(re.findall(r"alertname: (\w+)", tests.read_text()))
    for path in (alerts, tests):
        shutil.copy(path, tmp_path)
    run(promtool, "test", "rules", tests.name, cwd=tmp_path)


def test_alerts_and_dashboard_name_metrics_that_the_server_has(tmp_path):
    text = Metrics(Store(tmp_path)).text().decode()
    known = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    known |= {f"{name}{suffix}" for name in known for suffix in ("_bucket", "_count", "_total")}
    board = json.loads((DEPLOY / "dashboard.json").read_text())
    used = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    used += re.findall(r"expr: (.*)", (DEPLOY / "alerts.yaml").read_text())
    names = {name for expression in used for name in re.findall(r"\bfvae_\w+", expression)}
    assert len(names) > 8
    assert names <= known


def test_prometheus_can_parse_every_query_of_the_dashboard(tmp_path):
    promtool = tool("promtool")
    board = json.loads((DEPLOY / "dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]

    def rules(expressions):
        path = tmp_path / "rules.yaml"
        listed = [{"record": f"q:{n}", "expr": text} for n, text in enumerate(expressions)]
        path.write_text(json.dumps({"groups": [{"name": "board", "rules": listed}]}))
        return path

    assert len(queries) > 5
    plain = [re.sub(r"\$__\w+", "5m", query) for query in queries]
    run(promtool, "check", "rules", rules(plain))
    with pytest.raises(AssertionError, match="parse error"):
        run(promtool, "check", "rules", rules([f"{plain[0]})"]))
