"""What holds between files that no import ties together."""

import argparse
import ast
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
METRIC = re.compile(r"\bclickserve_[a-z_]+")
README = ROOT / "README.md"
# The lab log names commands and files as they were on the day.
DOCUMENTS = [
    README,
    *(file for file in sorted((ROOT / "docs").glob("*.md")) if file.name != "LOG.md"),
    *sorted((ROOT / "deploy" / "bench" / "results").glob("*.md")),
]


def name_in_repository(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


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

    required = {name.lower().replace("_", "-") for name in names(dependencies_of(*EXTRAS))}

    assert required <= locked


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

    queried = set(METRIC.findall(dashboard))

    assert queried
    assert queried <= exposed


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
def test_the_tree_in_the_readme_has_every_file_at_its_path_once_and_no_other(package: str) -> None:
    existing = [
        file.relative_to(ROOT / package).as_posix()
        for suffix in ("py", "lua", "md", "csv")
        for file in (ROOT / package).rglob(f"*.{suffix}")
        if file.name != "__init__.py"
    ]

    assert tree_files(package) == Counter(existing)


def tree_files(package: str) -> Counter[str]:
    """Paths in the README's tree, below a package. A line two columns in names a room, or files of the package itself;
    a line further in goes on with the one above.
    """
    tree = section(README, "## The tree")
    lines = re.search(rf"^{package}/.*\n((?: .*\n)+)", tree, re.MULTILINE)
    assert lines is not None
    room, files = "", Counter[str]()
    for line in lines[1].splitlines():
        if not line.startswith("   "):
            name = re.match(r"  (\w+/)", line)
            room = name[1] if name else ""
        files.update(room + file for file in re.findall(r"\b\w+\.(?:py|lua|md|csv)\b", line))
    return files


def test_the_operating_manual_has_every_setting_and_its_default() -> None:
    from service.settings import Settings

    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section(ROOT / "docs/operating.md", "## Settings"), re.MULTILINE)

    defaults = {name: str(field.default) for name, field in Settings.model_fields.items()}
    assert len(rows) == len(dict(rows))
    assert {name: default.strip("`").capitalize() for name, default in rows} == {
        name: default.capitalize() for name, default in defaults.items()
    }


def test_the_operating_manual_has_every_metric_with_its_labels_and_no_other() -> None:
    table = section(ROOT / "docs/operating.md", "## Metrics").partition("\n### ")[0]
    rows = re.findall(r"^\| `(clickserve_\w+)(?:\{([\w,]+)\})?` \|", table, re.MULTILINE)

    assert Counter((name, frozenset(filter(None, labels.split(",")))) for name, labels in rows) == Counter(
        exposed_metrics().items()
    )
    for document in DOCUMENTS:
        families = {name.removesuffix("_total") for name in exposed_metrics()}
        for name in METRIC.findall(document.read_text()):
            assert re.sub("_(total|bucket|sum|count)$", "", name) in families, f"{document.name} names {name}"


def exposed_metrics() -> dict[str, frozenset[str]]:
    """Label names by metric, of a service that has counted everything once."""
    import numpy as np
    from prometheus_client import generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    from service.observability.metrics import Metrics

    metrics = Metrics()
    metrics.declare_routes(["/predict"])
    metrics.arm("a").scored(np.array([0.5]))
    metrics.model_serves(arm="a", model="m", version="1")
    metrics.declare_causes(["oom"])
    labels: dict[str, frozenset[str]] = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        if METRIC.match(family.name):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels[name] = frozenset().union(*(sample.labels for sample in family.samples)) - {"le"}
    return labels


def test_the_api_reference_has_every_reason_of_a_refusal_with_its_status_codes() -> None:
    from service.errors import Reason

    table = section(ROOT / "docs/api.md", "## Refusals")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE)

    assert Counter(reason for reason, _ in rows) == Counter(reason.value for reason in Reason)
    statuses = refusal_statuses()
    for reason, column in rows:
        if reason in statuses:
            assert set(map(int, re.findall(r"\d+", column))) == statuses[reason], reason


def refusal_statuses() -> dict[str, set[int]]:
    """Status codes by reason. Not those of the framework, which come with each error."""
    from service.errors import Refusal
    from service.http.problems import RULES, FrameworkError

    def subclasses(kind: type[Refusal]) -> Iterator[type[Refusal]]:
        for subclass in kind.__subclasses__():
            if subclass.__module__.startswith("service."):
                yield subclass
            yield from subclasses(subclass)

    statuses: defaultdict[str, set[int]] = defaultdict(set)
    for kind in set(subclasses(Refusal)) - {FrameworkError}:
        if "reason" in vars(kind) or not kind.__subclasses__():  # else it is a base that nobody raises
            statuses[kind.reason].add(next(RULES[base] for base in kind.__mro__ if base in RULES).status)
    return statuses


def test_the_api_reference_has_everything_that_an_answer_can_go_without() -> None:
    from service.errors import Degraded

    table = section(ROOT / "docs/api.md", "### What an answer went without")

    assert Counter(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == Counter(
        degradation.value for degradation in Degraded
    )


def test_the_api_reference_has_every_route() -> None:
    from service.http.routes import Api
    from service.observability.metrics import Metrics
    from service.settings import Settings

    routes = Api(Settings(), Metrics()).router().routes
    paths = {re.sub(r"\{\w+(:path)?\}", "{}", route.path) for route in routes}  # type: ignore[attr-defined] # all have one
    text = (ROOT / "docs/api.md").read_text()

    named = {re.sub(r"\{\w+\}", "{}", path) for path in re.findall(r"(?:GET|POST|PUT|DELETE) (/[\w/{}.]*)", text)}

    assert {path for path in paths if "/versions/" not in path} <= named


PAPERS = {"MIAN": (18, 4), "STEC": (12, 6), "DeepMR": (11, 5), "DynInt": (12, 4), "FESeq": (17, 11)}
"""{paper: how many equations and tables it has}"""


@pytest.mark.parametrize("paper", PAPERS)
def test_the_page_of_papers_has_every_equation_and_every_table(paper: str) -> None:
    components, experiments = (
        re.findall(r"^\| [^|]+ \| ([^|]+) \|", part, re.MULTILINE)
        for part in section(ROOT / "docs/papers.md", f"## {paper}").split("| experiment |")
    )
    equations, tables = PAPERS[paper]

    assert numbers_in("; ".join(c for c in components if c[0].isdigit())) == set(range(1, equations + 1))
    shown = re.findall(r"(?<!\w)tables? ([\d, to]+)", "; ".join((*components, *experiments)))
    # Sections tell of production and of settings what has a table.
    assert numbers_in("; ".join(shown)) == set(range(1, tables + 1))


def numbers_in(text: str) -> set[int]:
    """Of `2, 4 to 6; 8`: 2, 4, 5, 6 and 8. What follows a word is no number of this kind: `3, figure 2b`."""
    found = re.findall(r"(?:^|[,;] ?)\s*(\d+)(?: to (\d+))?(?=$|[,; ])", text)
    return {number for first, last in found for number in range(int(first), int(last or first) + 1)}


def test_the_page_of_papers_names_recipes_and_options_that_there_are_and_every_recipe_of_a_paper() -> None:
    from models import zoo
    from training.comparison.compare import variants
    from training.config import override
    from training.recipes import RECIPES
    from training.recipes.deviations import DEVIATIONS

    text = (ROOT / "docs/papers.md").read_text()
    options = {key for model in ("mian", "stec", "deepmr", "dynint", "feseq") for key in vars(zoo.configure(model, {}))}

    named = set(re.findall(r"\b(?:pin|mian|stec|deepmr|dynint|feseq)_\w+\b", text))

    assert named <= RECIPES.keys()
    assert {name for name in DEVIATIONS if name.endswith("_paper")} - {"bst_paper"} <= named
    assert set(re.findall(r"\bmodel\.(\w+)", text)) <= options
    for words in re.findall(r"`compare (--[^`]+)`", text):
        command = ["compare", "--data", "DIR", "--out", "DIR", *shlex.split(words)]
        parsed = module_parser("training").parse_args(command)
        for variant in variants(parsed.models, parsed.variants):
            assert variant.recipe, command
            override(RECIPES[variant.recipe](), variant.settings)


def test_the_page_of_papers_has_no_figure_of_its_own() -> None:
    known = (ROOT / "docs/measured.md").read_text() + (ROOT / "training/comparison/published.csv").read_text()
    figures = re.findall(r"\b0\.\d{4}\b", (ROOT / "docs/papers.md").read_text())

    assert figures
    assert [figure for figure in figures if figure not in known] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_in_repository)
def test_every_command_in_a_document_has_the_options_it_is_shown_with(document: Path) -> None:
    blocks = re.findall(r"^```\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.split(r"\n| && ", block.replace("\\\n", " "))]
    spans = re.findall(r"`((?:python|make|pytest) [^`\n]+)`", document.read_text())

    for line in lines:
        if line.startswith(("python ", "make ", "pytest ")):
            parse_command(shlex.split(line, comments=True))
    for span in spans:
        check_options(span)


@pytest.mark.parametrize("recipe", sorted((ROOT / "training" / "recipes").glob("*.py")), ids=lambda file: file.stem)
def test_every_command_in_a_recipe_can_be_run_as_it_stands(recipe: Path) -> None:
    for function in ast.parse(recipe.read_text()).body:
        docstring = ast.get_docstring(function) if isinstance(function, ast.FunctionDef) else None
        for command in re.findall(r"`((?:python|make) [^`]+)`", docstring or ""):
            parse_command(shlex.split(command))


def parse_command(words: list[str]) -> None:
    """Fails for a command that its own parser refuses."""
    match words:
        case ["python", "-m", module, *arguments]:
            try:
                module_parser(module).parse_args(arguments)
            except (SystemExit, ValueError) as err:
                pytest.fail(f"{shlex.join(words)}: {err}")
    check_options(shlex.join(words))  # argparse takes abbreviations


def check_options(usage: str) -> None:
    """Fails for a file, a make target or an option that does not exist. Brackets and placeholders may stand in it."""
    match usage.split():
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), usage
        case ["pytest", *paths]:
            assert all((ROOT / path).exists() for path in paths), usage
        case ["python", "-m", module, command, *_]:
            subparsers = next(a for a in module_parser(module)._actions if isinstance(a, argparse._SubParsersAction))
            assert options_of(usage) <= set(subparsers.choices[command]._option_string_actions), usage
        case ["python", script, *_]:
            assert options_of(usage) <= script_options(ROOT / script), usage
        case _:
            pytest.fail(f"no command of this project: {usage}")


def options_of(usage: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", usage))


def module_parser(module: str) -> argparse.ArgumentParser:
    parser: Callable[[], argparse.ArgumentParser] = importlib.import_module(f"{module}.__main__")._parser
    return parser()


@cache
def script_options(script: Path) -> set[str]:
    """Options that a script adds, or a package beside it. Read, not run: some scripts import what takes seconds."""
    imported = re.findall(r"^(?:from|import) (\w+)", script.read_text(), re.MULTILINE)
    sources = [script, *(file for name in imported for file in (script.parent / name).glob("*.py"))]
    calls = [n for file in sources for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
    adding = [call for call in calls if ast.unparse(call.func).split(".")[-1] in ("add", "add_argument")]
    constants = [argument.value for call in adding for argument in call.args if isinstance(argument, ast.Constant)]
    return {value for value in constants if isinstance(value, str) and value.startswith("--")}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "docs" / "LOG.md"], ids=name_in_repository)
def test_every_link_in_a_document_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document

        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


def anchors(document: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_in_repository)
def test_every_file_of_ours_that_a_document_names_by_its_path_exists(document: Path) -> None:
    paths = re.findall(r"`((?:models|training|service|tests|deploy|docs)/[\w./-]*)`", document.read_text())

    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_document_that_a_file_names_exists() -> None:
    written = {f.name for f in sources("*.md")}
    # Commands write these where they are told to; a benchmark's has the benchmark's name.
    benchmarks = (ROOT / "deploy" / "bench").glob("*.py")
    outputs = {"compare.md", "FILE.md", *(f"{script.stem}.md" for script in benchmarks)}

    for file in (*sources("*.py"), *sources("*.md")):
        for name in re.findall(r"[A-Za-z0-9_-]+\.md\b", file.read_text()):
            assert name in written | outputs, f"{file.relative_to(ROOT)} names {name}"


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "docs" / "LOG.md"], ids=name_in_repository)
def test_a_document_begins_with_its_title_and_with_what_it_holds(document: Path) -> None:
    title, blank, first, *_ = document.read_text().splitlines()

    assert title.startswith("# ")
    assert blank == ""
    assert first
    assert not first.startswith(("#", "|", "`", "-"))


def section(document: Path, heading: str) -> str:
    """What stands under a heading, up to the next one of the same or a higher level."""
    _, found, after = document.read_text().partition(f"\n{heading}\n")
    assert found, f"{document.name} has no {heading}"
    level = len(heading.partition(" ")[0])
    return re.split(rf"^#{{1,{level}}} ", after, maxsplit=1, flags=re.MULTILINE)[0]


def sources(pattern: str) -> list[Path]:
    folders = [ROOT / name for name in ("models", "training", "service", "tests", "deploy", "docs")]
    return [*ROOT.glob(pattern), *(file for folder in folders for file in folder.rglob(pattern))]
