"""What holds between files that no import ties together."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
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

    from service.observability.metrics import Metrics

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
def test_the_tree_in_the_readme_has_every_file_once_and_no_other(package):
    tree = readme_section("## The tree")
    section = re.search(rf"^{package}/.*?(?=^\S)", tree, re.MULTILINE | re.DOTALL)
    assert section is not None

    named = Counter(re.findall(r"\b[a-z0-9_]+\.py\b", section[0]))

    assert named == Counter(f.name for f in (ROOT / package).rglob("*.py") if f.name != "__init__.py")


def test_the_readme_names_every_setting_and_its_default():
    from service.settings import Settings

    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", readme_section("### Settings"), re.MULTILINE)
    told: dict[str, str] = {}
    for names, defaults in rows:
        told |= zip(re.findall(r"`(\w+)`", names), defaults.replace("`", "").split(", "), strict=True)

    assert told.keys() == Settings.model_fields.keys()
    for name, field in Settings.model_fields.items():
        assert told[name] == {"None": "none", "False": "false"}.get(str(field.default), str(field.default)), name


def test_every_document_that_a_file_names_exists():
    written = {f.name for f in sources("*.md")}
    by_commands = {"compare.md", "figure1.md", "figureN.md", "gpu.md", "FILE.md"}  # where they are told to

    for file in (*sources("*.py"), *sources("*.md")):
        for name in re.findall(r"[A-Za-z0-9_-]+\.md\b", file.read_text()):
            assert name in written | by_commands, f"{file.relative_to(ROOT)} names {name}"


def readme_section(heading: str) -> str:
    level = heading.partition(" ")[0]
    return (ROOT / "README.md").read_text().partition(heading)[2].partition(f"\n{level} ")[0]


def sources(pattern: str) -> list[Path]:
    folders = [ROOT / name for name in ("models", "training", "service", "tests", "deploy")]
    return [*ROOT.glob(pattern), *(file for folder in folders for file in folder.rglob(pattern))]
