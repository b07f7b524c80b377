"""What holds between files that no import ties together."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
METRIC = re.compile(r"\bclickserve_[a-z_]+")


def dependencies_of(*extras: str) -> str:
    """What the images install for these extras."""
    script = ROOT / "deploy" / "docker" / "dependencies.py"
    command = [sys.executable, str(script), *extras]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def names(requirements: str) -> set[str]:
    return {re.split(r"[<>=\[ ]", line)[0] for line in requirements.splitlines()}


def test_an_install_has_one_onnxruntime_never_both():
    cpu, gpu = names(dependencies_of("serve", "train", "dev")), names(dependencies_of("gpu", "train", "dev"))

    assert "onnxruntime" in cpu
    assert "onnxruntime-gpu" not in cpu
    assert gpu == cpu - {"onnxruntime"} | {"onnxruntime-gpu"}


def test_the_serving_image_has_no_torch():
    assert "torch" not in names(dependencies_of("serve"))


def test_everything_that_is_installed_is_locked():
    locked = names((ROOT / "requirements.lock").read_text().replace("_", "-").lower())

    wanted = {name.lower().replace("_", "-") for name in names(dependencies_of(*EXTRAS))}

    assert wanted <= locked


def test_no_other_installed_package_owns_our_import_names():
    owners = importlib.metadata.packages_distributions()

    for name in ("models", "training", "service"):
        assert set(owners.get(name, ["clickserve"])) == {"clickserve"}


def test_every_metric_on_the_dashboard_is_one_the_service_has():
    from prometheus_client import generate_latest

    from service.metrics import Metrics

    exposed = set(METRIC.findall(generate_latest(Metrics().registry).decode()))
    exposed |= {f"{name}{suffix}" for name in exposed for suffix in ("_bucket", "_sum", "_count", "_total")}
    dashboard = (ROOT / "deploy" / "grafana" / "dashboards" / "clickserve.json").read_text()

    wanted = set(METRIC.findall(dashboard))

    assert wanted
    assert wanted <= exposed


def test_the_dashboard_asks_for_the_provisioned_data_source():
    sources = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/clickserve.json").read_text())

    provisioned = {source["uid"] for source in sources["datasources"]}

    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == provisioned


def test_prometheus_scrapes_the_port_the_service_listens_on():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"][0]

    host, _, port = scrape["static_configs"][0]["targets"][0].partition(":")

    assert compose[host]["ports"][0].endswith(f":{port}")


@pytest.mark.parametrize("package", ["models", "training", "service"])
def test_the_readme_names_every_file_of_the_tree(package):
    readme = (ROOT / "README.md").read_text()

    for file in (ROOT / package).rglob("*.py"):
        assert file.name in readme or file.name == "__init__.py", f"{file.relative_to(ROOT)} is missing in the README"


def test_the_readme_names_every_setting():
    from service.settings import Settings

    readme = (ROOT / "README.md").read_text()

    for name in Settings.model_fields:
        assert f"`{name}`" in readme
