"""The containers as far as files can tell; with an engine and the built images, those too."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
FROM = re.compile(r"^FROM (\S+) AS (\S+)$", re.MULTILINE)


def instructions(stage: str) -> str:
    """All that makes a stage, what it stands on first."""
    parts = FROM.split(DOCKERFILE)[1:]
    stages = {name: (parent, body) for parent, name, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True)}
    text = ""
    while stage in stages:
        stage, body = stages[stage]
        text = body + text
    return text


def test_every_build_target_of_compose_is_a_stage():
    targets = {service["build"]["target"] for service in COMPOSE.values() if "build" in service}

    assert targets == {"serve", "train"}
    assert targets <= {name for _, name in FROM.findall(DOCKERFILE)}


@pytest.mark.parametrize("target", ["serve", "train"])
def test_an_image_runs_as_nobody_of_importance_and_reports_to_nobody(target):
    text = instructions(target)

    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == "clickserve"
    assert "ORT_DISABLE_TELEMETRY=1" in text


def test_what_the_images_copy_is_let_into_the_build_and_nothing_else():
    ignored, *exceptions = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    allowed = {line[1:] for line in exceptions if line.startswith("!")}
    copied: set[str] = set()
    for words in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        copied |= set(words.split()[:-1])

    assert ignored == "*"
    assert allowed == copied
    assert all((ROOT / path).exists() for path in copied)


def test_the_service_can_write_nothing_and_gain_no_rights():
    service = COMPOSE["service"]

    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(volume.endswith(":ro") for volume in service["volumes"])


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose")
def test_the_compose_file_is_valid_for_the_older_docker_compose():
    checked = subprocess.run(["docker-compose", "config", "-q"], cwd=ROOT, check=False, capture_output=True, text=True)

    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_serving_image_has_all_the_service_needs_and_no_torch():
    if shutil.which("docker") is None or docker("image", "inspect", "clickserve:serve").returncode != 0:
        pytest.skip("needs a Docker engine with the image clickserve:serve")
    program = (
        "import importlib.util as u, os, pathlib, service.app;"
        "print(os.getuid(), os.getgid(), *(u.find_spec(n) is None for n in ('torch', 'training', 'pip', 'setuptools')),"
        "(pathlib.Path(service.app.__file__).parent / 'append.lua').exists())"
    )

    ran = docker(
        "run", "--rm", "--read-only", "--network=none", "--cap-drop=ALL",
        "--entrypoint=/opt/clickserve/bin/python", "clickserve:serve", "-c", program,
    )  # fmt: skip

    assert (ran.stdout, ran.stderr) == ("65532 65532 True True True True True\n", "")


def docker(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["docker", *arguments], check=False, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("values", "holds"), [([0.0], True), ([0.0, 2.5], True), ([float("nan")], False), ([], False)], ids=str
)
def test_a_query_of_the_dashboard_holds_where_it_gives_numbers_and_0_is_one(values, holds, capsys):
    spec = importlib.util.spec_from_file_location("smoke_test", ROOT / "deploy" / "docker" / "smoke_test.py")
    assert spec is not None and spec.loader is not None
    smoke_test = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(smoke_test)
    series = [{"metric": {"arm": f"arm {n}"}, "value": [0, str(value)]} for n, value in enumerate(values)]
    answer = httpx.MockTransport(lambda _: httpx.Response(200, json={"status": "success", "data": {"result": series}}))
    check = smoke_test.Check()

    with httpx.Client(transport=answer, base_url="http://prometheus") as prometheus:
        smoke_test.check_dashboard(check, prometheus)

    assert capsys.readouterr().out.count("\n  ") > 5
    assert (check.failed == []) == holds
