"""Where settings come from, in which order, and what a wrong one is told."""

from pathlib import Path

import pytest
import yaml

from service.settings import SettingsError, load


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "service.yaml"


def test_flags_win_over_the_environment_over_the_file_over_defaults(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("host: from-file\nport: 1\ndrain_s: 2\n")
    monkeypatch.setenv("CLICKSERVE_PORT", "11")
    monkeypatch.setenv("CLICKSERVE_HOST", "from-environment")

    settings = load(file, host="from-flag", port=None)

    assert (settings.host, settings.port, settings.drain_s, settings.max_candidates) == ("from-flag", 11, 2, 1000)


def test_an_experiment_is_a_path_or_written_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("experiment: {experiment: x}\n")
    written = load(file).experiment
    monkeypatch.setenv("CLICKSERVE_EXPERIMENT", '{"experiment": "x"}')
    as_json = load().experiment
    monkeypatch.setenv("CLICKSERVE_EXPERIMENT", "experiment: x\n")
    as_yaml = load().experiment
    monkeypatch.setenv("CLICKSERVE_EXPERIMENT", "experiment: [x\n")
    with pytest.raises(SettingsError, match="setting experiment: expected a file's name, or YAML as it would stand"):
        load()

    assert written == as_json == as_yaml == {"experiment": "x"}
    monkeypatch.setenv("CLICKSERVE_EXPERIMENT", "deploy/experiment.yaml")
    assert load().experiment == Path("deploy/experiment.yaml")


@pytest.mark.parametrize("source", ["file", "environment"])
def test_a_written_out_experiment_keeps_what_is_written(
    file: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    written = "{experiment: on, arms: [{name: 1.10, version: 20261128_1}]}"
    if source == "file":
        file.write_text(f"port: 9\nexperiment: {written}\n")
    else:
        monkeypatch.setenv("CLICKSERVE_EXPERIMENT", written)

    settings = load(file if source == "file" else None)

    assert settings.experiment == {"experiment": "on", "arms": [{"name": "1.10", "version": "20261128_1"}]}


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLICKSERVE_REDIS_URL", "")

    assert load().redis_url is None


def test_an_empty_file_sets_nothing(file: Path) -> None:
    file.write_text("# nothing\n")

    assert load(file).model_dump() == load().model_dump()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("prot: 9\nport: x", "no setting is called prot; there are admin_token, admin_tokens, artifacts_dir,"),
        ("port: nine", "CLICKSERVE_PORT: setting port: Input should be a valid integer"),
        ("port: 99999", "setting port: Input should be less than or equal to 65535, got 99999"),
        ("item_cache_s: .inf", "setting item_cache_s: Input should be less than or equal to 86400, got inf"),
        ("max_connection_s: .inf", "setting max_connection_s: Input should be less than or equal to 86400, got inf"),
        ("item_cache_rows: 99999999999", "setting item_cache_rows: Input should be less than or equal to 10000000"),
        ("experiment: 3", "setting experiment: "),
        ("{", "not a readable YAML file"),
        ("- port", "expected settings as `name: value`, got a list"),
        ("8000: port", "expected settings as `name: value`"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(file: Path, content: str, told: str) -> None:
    file.write_text(content)

    with pytest.raises(SettingsError, match=told) as wrong:
        load(file)

    assert str(file) in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_a_flag_is_told_by_its_own_name(file: Path) -> None:
    file.write_text("port: 9000\n")

    with pytest.raises(SettingsError, match="^--workers: setting workers: Input should be .* to 0, got -1$"):
        load(file, workers=-1, port=None)


@pytest.mark.parametrize("token", ["s3cret\n", " s3cret", "s3 cret", "s3cr\u00e9t"])
def test_a_token_that_no_header_brings_as_it_is_is_refused_and_not_repeated(file: Path, token: str) -> None:
    file.write_text(yaml.safe_dump({"admin_token": token}))

    with pytest.raises(SettingsError, match="setting admin_token: expected visible ASCII") as wrong:
        load(file)

    assert token not in str(wrong.value)


def test_a_token_of_digits_that_yaml_takes_for_a_number_is_not_repeated(file: Path) -> None:
    file.write_text("admin_token: 8675309\n")

    with pytest.raises(SettingsError, match="setting admin_token: ") as wrong:
        load(file)

    assert "8675309" not in str(wrong.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"admin_tokens": {"alice": "s3 cret"}}, "setting admin_tokens: expected visible ASCII"),
        ({"admin_tokens": {"alice": ""}}, "setting admin_tokens: expected a token of alice, got an empty one"),
        ({"admin_tokens": {"a b": "s3cret"}}, "setting admin_tokens: String should match pattern"),
        ({"admin_tokens": ["s3cret"]}, "setting admin_tokens: expected tokens by name"),
        ({"admin_tokens": "s3cret"}, "setting admin_tokens: expected tokens by name"),
        ({"admin_tokens": {"alice": 8675309}}, "setting admin_tokens: Input should be a valid string"),
        ({"admin_token": "s3cret", "admin_tokens": {"admin": "other"}}, "admin_tokens names admin, which is the name"),
        ({"admin_token": "s3cret", "admin_tokens": {"alice": "s3cret"}}, "alice and admin are the same"),
        ({"admin_tokens": {"alice": "s3cret", "bob": "s3cret"}}, "alice and bob are the same"),
    ],
)
def test_wrong_admin_tokens_are_refused_and_not_repeated(file: Path, content: dict[str, object], told: str) -> None:
    file.write_text(yaml.safe_dump(content))

    with pytest.raises(SettingsError, match=told) as wrong:
        load(file)

    assert not any(secret in str(wrong.value) for secret in ("s3cret", "s3 cret", "8675309"))
    assert "\n" not in str(wrong.value)


def test_an_absent_file_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="absent.yaml"):
        load(tmp_path / "absent.yaml")


def test_a_password_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLICKSERVE_PORT", "redis://:secret@host")

    with pytest.raises(SettingsError) as wrong:
        load()

    assert "secret" not in str(wrong.value)
