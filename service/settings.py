"""Settings: every option of the service with its default; the only file that reads the environment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, SecretStr, ValidationError, field_serializer, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

PREFIX = "CLICKSERVE_"
ADMIN = "admin"  # the name of whoever has `admin_token`
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
ORIGIN = r"^(\*|https?://[^\s/,*]+)$"


class SettingsError(ValueError):
    """A setting that cannot be used: which one, and what was expected."""


class Settings(BaseSettings):
    """Every setting of the service. Each is also an environment variable: `CLICKSERVE_` and its name in capitals."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX, env_ignore_empty=True)

    artifacts_dir: Path = Field(default=Path("artifacts"), description="Folder of the artifacts, <model>/<version>.")
    experiment: Path | dict[str, Any] | None = Field(
        default=None, description="The experiment: the name of its file, or what would stand in it."
    )
    redis_url: str | None = Field(
        default=None, description="URL of the behaviour store; without one clicks live in this process only."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    workers: int = Field(
        default=0, ge=0, le=256, description="Number of processes; 0 means one a core, and one without redis_url."
    )
    max_candidates: int = Field(default=1000, ge=1, le=10_000, description="Most candidates of one request.")
    max_explained: int = Field(
        default=20, ge=1, le=1000, description="Most candidates of one request for explanations."
    )
    max_queued_candidates: int = Field(
        default=10_000, ge=1, description="Most candidates that wait for the model thread; beyond it requests get 503."
    )
    max_batch_candidates: int = Field(
        default=1000, ge=1, le=10_000, description="Most candidates of one model run; a larger request is cut."
    )
    inline_run_ms: float = Field(
        default=5,
        ge=0,
        le=1000,
        description="A request that is expected to take at most this long is scored by the event loop itself; longer"
        " ones go to the model thread. With 0 all of them do.",
    )
    # A thousand candidates with twenty features each take about half a megabyte.
    max_body_bytes: int = Field(default=2 * 2**20, ge=1024, description="Largest body of a request, in bytes.")
    timeout_ms: float = Field(
        default=1000, gt=0, le=60_000, description="Deadline of a request that names none, in milliseconds."
    )
    store_timeout_ms: float = Field(
        default=50, gt=0, le=10_000, description="A prediction does without the store after so many milliseconds."
    )
    store_write_timeout_ms: float = Field(
        default=1000, gt=0, le=10_000, description="Events are refused with 503 after so many milliseconds."
    )
    event_durability: Literal["memory", "disk", "replica"] = Field(
        default="memory",
        description="What an event that was taken has reached: the store's memory, its disk or a replica.",
    )
    item_cache_rows: int = Field(
        default=100_000,
        ge=1,
        le=10_000_000,
        description="Candidates, and as many clicks, that are kept encoded for each loaded model.",
    )
    item_cache_s: float = Field(
        default=300,
        ge=0,
        le=86_400,
        description="Seconds for which stored features of a candidate are kept if no change of them is announced; 0"
        " keeps none.",
    )
    keep_behaviours: int = Field(
        default=100, ge=1, le=10_000, description="Clicks of a user that the store keeps, the newest."
    )
    keep_behaviours_bytes: int = Field(
        default=32_768, ge=4096, le=2**20, description="Bytes that they may take: of the newest, as many as fit."
    )
    keep_behaviours_days: float = Field(
        default=30,
        gt=0,
        le=36_500,
        description="Days for which Redis keeps a user's clicks after the last one; older events are not taken.",
    )
    keep_features_days: float = Field(
        default=90, gt=0, le=3650, description="Days for which Redis keeps features of a user or item after a load."
    )
    redis_prefix: str = Field(
        default="cs", pattern=r"^[A-Za-z0-9_.-]{1,32}$", description="What this deployment's keys begin with."
    )
    require_store: bool = Field(default=False, description="Whether a service is unready while the store is down.")
    max_connection_s: float = Field(
        default=60,
        ge=0,
        le=86_400,
        description="Seconds after which a kept connection ends, so that load evens out; 0 means never.",
    )
    cors_origins: Annotated[tuple[Annotated[str, Field(pattern=ORIGIN)], ...], NoDecode] = Field(
        default=(), description="Origins whose pages may ask from a browser, or `*` for any; with none, no page may."
    )
    fallback: Literal["none", "prior"] = Field(
        default="none",
        description="Answer where the model is late, overloaded or broken: a refusal, or 200 with its click rate.",
    )
    admin_token: SecretStr | None = Field(
        default=None, min_length=1, description="Token of admin; without any token nothing can be changed."
    )
    admin_tokens: Annotated[dict[Annotated[str, Field(pattern=NAME)], SecretStr], NoDecode] = Field(
        default={}, description="Further admin tokens, by the name that the audit trail shows."
    )
    state_dir: Path | None = Field(
        default=None, description="Folder of the last decision, for a restart without the store; none keeps none."
    )
    watchdog_s: float = Field(
        default=10,
        ge=0,
        le=3600,
        description="Seconds after which a process whose event loop hangs is ended; 0 means never.",
    )
    keep_versions: int = Field(
        default=2, ge=0, le=10, description="Previous versions of each arm's model that stay loaded."
    )
    drain_s: float = Field(default=5, ge=0, le=300, description="Seconds for which a stopping service keeps answering.")

    @field_validator("experiment", mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        """What stands in an experiment file may come as text too, as from the environment: as YAML, so as JSON too.

        Its values stay text, as in an experiment file: `on` and 1.10 are names there.
        """
        if not isinstance(value, str) or not ("\n" in value or value.lstrip().startswith("{")):
            return value
        content = _parsed(value, yaml.BaseLoader)
        if not isinstance(content, dict):
            raise PydanticCustomError("no_experiment", "expected a file's name, or YAML as it would stand there")
        return content

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """From the environment they come as text: with commas between."""
        return [origin.strip() for origin in value.split(",")] if isinstance(value, str) else value

    @field_validator("admin_tokens", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """From the environment they come as text: as YAML, so as JSON too."""
        content = _parsed(value) if isinstance(value, str) else value
        if not isinstance(content, dict):
            raise PydanticCustomError("no_tokens", "expected tokens by name, as `{alice: ..., bob: ...}`")
        return content

    @field_validator("admin_token")
    @classmethod
    def _sendable(cls, token: SecretStr | None) -> SecretStr | None:
        """Others never arrive as they were: a header is trimmed, and clients disagree on what is not ASCII."""
        if token is not None and not all("!" <= char <= "~" for char in token.get_secret_value()):
            raise PydanticCustomError("unsendable", "expected visible ASCII characters and no spaces")
        return token

    @field_validator("admin_tokens")
    @classmethod
    def _all_sendable(cls, tokens: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, token in tokens.items():
            if not token.get_secret_value():
                raise PydanticCustomError("empty", "expected a token of {name}, got an empty one", {"name": name})
            cls._sendable(token)
        return tokens

    @model_validator(mode="after")
    def _tokens_differ(self) -> Self:
        """Or the audit trail could not say who it was."""
        if self.admin_token is not None and ADMIN in self.admin_tokens:
            raise ValueError(f"admin_tokens names {ADMIN}, which is the name of admin_token: choose another")
        names: dict[str, str] = {}
        for name, token in self.tokens_by_name.items():
            other = names.setdefault(token.get_secret_value(), name)
            if other != name:
                raise ValueError(f"admin_tokens of {other} and {name} are the same: each needs its own")
        return self

    @property
    def tokens_by_name(self) -> dict[str, SecretStr]:
        """Every admin token; none where nothing can be changed."""
        return self.admin_tokens if self.admin_token is None else {**self.admin_tokens, ADMIN: self.admin_token}

    @field_serializer("admin_token", when_used="json-unless-none")
    def _readable(self, token: SecretStr) -> str:
        """The supervisor tells its workers the settings as JSON; a log or a traceback shows asterisks."""
        return token.get_secret_value()

    @field_serializer("admin_tokens", when_used="json")
    def _all_readable(self, tokens: dict[str, SecretStr]) -> dict[str, str]:
        return {name: token.get_secret_value() for name, token in tokens.items()}


def load(file: Path | None = None, **flags: Any) -> Settings:
    """The settings by precedence: flags (None is not given), the environment, the YAML file, the defaults.

    Raises SettingsError in one sentence.
    """
    from_file = _read(file) if file is not None else {}

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, from_file)

    overrides = {name: value for name, value in flags.items() if value is not None}
    try:
        return Layered(**overrides)
    except ValidationError as err:
        raise SettingsError(_sentence(err, file, overrides)) from None


def _parsed(text: str, loader: type[yaml.SafeLoader | yaml.BaseLoader] = yaml.SafeLoader) -> Any:
    try:
        return yaml.load(text, Loader=loader)  # noqa: S506 - one that makes plain values, or text only
    except yaml.YAMLError:
        return None


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise SettingsError(f"{file}: not a readable YAML file: {' '.join(str(err).split())}") from None
    if content is not None and not (isinstance(content, dict) and all(isinstance(name, str) for name in content)):
        raise SettingsError(f"{file}: expected settings as `name: value`, got a {type(content).__name__}")
    if content and isinstance(content.get("experiment"), dict):
        content["experiment"] = _parsed(text, yaml.BaseLoader)["experiment"]
    return content or {}


def _sentence(err: ValidationError, file: Path | None, flags: Mapping[str, Any]) -> str:
    errors = err.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    if not first["loc"]:  # settings that do not fit together
        return first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{file}: no setting is called {name}; there are {', '.join(sorted(Settings.model_fields))}"
    variable = f"{PREFIX}{name.upper()}"
    source = f"--{name}" if name in flags else f"{file} or {variable}" if file else variable
    # Only what is out of a number's bounds is repeated: anything else may be a secret, also in a wrong place.
    got = f", got {first['input']}" if first.get("ctx", {}).keys() & {"gt", "ge", "lt", "le"} else ""
    return f"{source}: setting {name}: {first['msg']}{got}"
