"""Settings: command line, then ``CDC_*`` variables, then ``cdc.toml``, then defaults; merged here and nowhere else.

A setting has one name in three spellings: ``slot.name`` is ``--slot-name``, ``CDC_SLOT_NAME``, and ``name`` in the
section ``[slot]`` of cdc.toml. A secret may also come from a file: ``CDC_DSN_FILE=/run/secrets/dsn``. An unknown name
is refused with the nearest known one, because a misspelt setting that is ignored is found in production.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from cdc.app.file_ownership import others_hand
from cdc.app.secret_file import SecretFile
from cdc.app.setting_values import (
    at_commas,
    does_not_ask_for_help,
    fits_a_name,
    is_a_secret,
    is_a_subscription,
    is_a_target,
    is_an_age,
    none_is_zero,
)
from cdc.app.ui_section import UiSection
from cdc.core import broker_url
from cdc.core.broker_url import STRUCTURED
from cdc.core.errors import UsageError
from cdc.core.model import PLUGINS
from cdc.core.subscription import DEFAULT
from cdc.core.type_filter import TypeFilter
from cdc.core.units import parse_duration
from cdc.http import webhook_signature

DEFAULT_FILE = Path("cdc.toml")
"""Read in the working directory, if it is there and no other is named."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


_Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...] | None, BeforeValidator(at_commas)]


class SlotSection(_Section):
    name: str = Field("cdc", pattern=r"^[a-z0-9_]{1,63}$", description="Replication slot; one name a server.")
    create: bool = Field(True, description="Create the slot if it is missing.")
    recreate: bool = Field(True, description="Create a slot again that is lost or cannot be read; needs create.")
    plugin: Literal["auto", "wal2json", "pgoutput"] = Field(
        "auto", description="Output plugin; auto is wal2json, or pgoutput where the server lacks or refuses it."
    )
    mode: Literal["durable", "temporary"] = Field(
        "durable", description="A temporary slot is gone with its consumer, and then keeps no WAL."
    )

    @property
    def plugins(self) -> tuple[str, ...]:
        """The plugins that may be used, the preferred one first."""
        return PLUGINS if self.plugin == "auto" else (self.plugin,)


class HttpSection(_Section):
    host: str = Field("127.0.0.1", min_length=1, description="Address of /metrics and probes; in a container 0.0.0.0.")
    port: int = Field(9464, ge=0, le=65535, description="Their port; 0 switches them off.")
    page: bool = Field(True, description="Show the consumer's figures on a page at /, on the same port.")
    hosts: _Names = Field(None, description="A name to ask for the page by, besides addresses and localhost.")


_Secret = Annotated[SecretStr | None, AfterValidator(is_a_secret)]


class DeliverSection(_Section):
    to: Annotated[str | None, AfterValidator(is_a_target)] = Field(
        None, description="URL of an application or a broker that changes go to, instead of to handlers."
    )
    types: _Names = Field(None, description="Entity types to deliver; left out, all of them.")
    batch: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Changes in one request, 1 if left out; sent together to a broker, 500.",
    )
    linger: float = Field(0.0, ge=0, le=10, description="Seconds that a batch which is not full waits for more.")
    source: str | None = Field(None, min_length=1, description="The events' source; left out, the table.")
    format: Literal["structured", "binary", "debezium"] = Field(
        "structured",
        description="To a broker: an event as JSON, its data with headers, or Debezium's (Kafka).",
    )
    user: str | None = Field(None, min_length=1, description="Logs in to a broker.")
    password: SecretStr | None = Field(None, min_length=1, description="The user's; without a user, a token.")
    secret: _Secret = Field(None, description="Signs what is delivered: whsec_ and base64.")
    previous_secret: _Secret = Field(None, description="The former secret, which signs too while it is being replaced.")

    def current_password(self) -> str | None:
        """That of the moment. A secret."""
        return self.password.get_secret_value() if self.password else None

    @model_validator(mode="after")
    def _fits_the_target(self) -> DeliverSection:
        if self.to is None:
            return self
        if not broker_url.is_broker(self.to):
            if self.format != STRUCTURED or self.user or self.password:
                raise ValueError("deliver.format, deliver.user and deliver.password are for brokers, not for HTTP")
        elif self.secret or self.previous_secret:
            raise ValueError("deliver.secret signs requests over HTTP; a broker has deliver.user and deliver.password")
        else:
            target = broker_url.parse(self.to)
            if self.format not in target.protocol.formats:
                raise ValueError(f"deliver.format is one of {', '.join(target.protocol.formats)} for this broker")
            target.check_login(self.user, has_password=self.password is not None)
        return self

    def keys(self) -> tuple[bytes, ...]:
        """The keys to sign with at the moment, the current one first. Secrets."""
        return tuple(
            webhook_signature.key(one.get_secret_value()) for one in (self.secret, self.previous_secret) if one
        )


class BackoffSection(_Section):
    base: float = Field(1.0, gt=0, description="Seconds: the longest wait before the second attempt; it doubles.")
    cap: float = Field(1800.0, gt=0, description="Seconds: the longest wait before any attempt.")


class WhatsappSection(_Section):
    sender_url: str | None = Field(None, description="The messenger: URL that messages are posted to.")
    sender_token: SecretStr | None = Field(None, min_length=1, description="Bearer token for it.")
    help_text: Annotated[str, AfterValidator(does_not_ask_for_help)] = Field(
        "React to a message with an emoji that has a rule, such as ✅ for a task.",
        min_length=1,
        description="What cdc.contrib.whatsapp answers to a message that asks for help.",
    )
    app_secret: SecretStr | None = Field(None, min_length=1, description="Secret that webhooks are signed with.")
    verify_token: SecretStr | None = Field(
        None, min_length=1, description="What the subscription of the webhook is verified with."
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address of cdc whatsapp serve.")
    port: int = Field(8080, ge=0, le=65535, description="Its port; 0 is any that is free.")
    body_max: int = Field(262_144, ge=1, description="Bytes a webhook may have.")


class LogSection(_Section):
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    format: Literal["text", "json"] = Field("text", description="Lines for people, or one JSON object a line.")


class Settings(_Section):
    """Everything that can be set. Times are seconds."""

    dsn: SecretStr | None = Field(None, description="Database, as libpq reads it. Left out: the PG* variables.")
    stream_dsn: SecretStr | None = Field(None, description="Another role for the replication stream.")
    handlers_dsn: SecretStr | None = Field(None, description="Another way for transactional handlers: a pooler.")
    schema_: Annotated[str, AfterValidator(fits_a_name)] = Field(
        "public", alias="schema", min_length=1, description="Schema of the table entity_changes."
    )
    handlers: str | None = Field(None, description="Your router, as package.module:router.")
    deliver: DeliverSection = DeliverSection()
    only: _Names = Field(None, description="Handle this entity type and no other.")
    except_: _Names = Field(None, alias="except", description="Leave this entity type alone.")
    unhandled: Literal["leave", "discard"] = Field("leave", description="What to do with types that no handler wants.")
    subscription: Annotated[str, AfterValidator(is_a_subscription)] = Field(
        DEFAULT, description="Which subscription's changes are handled; cdc subscription create makes one."
    )
    observe: bool = Field(False, description="Shadow mode: measure everything, run no handler, mark nothing.")
    slot: SlotSection = SlotSection()
    stream: bool = Field(True, description="Listen to the replication slot; without it changes are found by sweeping.")
    http: HttpSection = HttpSection()
    concurrency: int = Field(100, ge=1, description="Handlers that run at the same time.")
    threads: int = Field(20, ge=1, description="Threads for handlers that are not async.")
    transactions: int = Field(10, ge=1, description="Connections for transactional handlers, of each kind.")
    window: int = Field(2000, ge=1, description="Changes held in memory; at least the concurrency.")
    window_bytes: int = Field(33_554_432, ge=1_048_576, description="Bytes of documents held in memory, as JSON.")
    max_attempts: int = Field(20, ge=1, description="Attempts before a change becomes a dead letter.")
    max_chain_depth: int = Field(
        16, ge=1, le=10_000, description="Causes a change may have, each written by the handler of the one before."
    )
    timeout: Annotated[float, BeforeValidator(none_is_zero)] = Field(
        60.0, ge=0, description="Seconds a handler may take for one change; 0 or none is no limit."
    )
    backoff: BackoffSection = BackoffSection()
    drain_time: float = Field(10.0, ge=0, description="Seconds that running handlers get to finish at a stop.")
    sweep_interval: float = Field(5.0, gt=0, description="Seconds between scans for changes without a notification.")
    poll_interval: float = Field(0.5, gt=0, description="Seconds between scans while nothing is streamed.")
    retention: Annotated[str, AfterValidator(is_an_age)] = Field(
        "off", description="Age, such as 30d, at which processed changes are removed for good; off keeps them."
    )
    log: LogSection = LogSection()
    whatsapp: WhatsappSection = WhatsappSection()
    ui: UiSection = UiSection()

    @property
    def dsn_text(self) -> str | None:
        """For connecting; a secret."""
        return self.dsn.get_secret_value() if self.dsn else None

    @property
    def stream_dsn_text(self) -> str | None:
        """For the replication stream: its own DSN, or the general one. A secret."""
        return self.stream_dsn.get_secret_value() if self.stream_dsn else self.dsn_text

    def current_dsn(self) -> str | None:
        """``dsn_text`` of the moment, for components that connect again and again."""
        return self.dsn_text

    def current_stream_dsn(self) -> str | None:
        return self.stream_dsn_text

    @property
    def scope(self) -> TypeFilter:
        """The entity types that this consumer handles."""
        return TypeFilter(self.only, include=True) if self.only else TypeFilter(self.except_ or ())

    @property
    def timeout_s(self) -> float | None:
        """The time limit of a handler; None is no limit."""
        return self.timeout or None

    @property
    def retention_s(self) -> float | None:
        """The age at which processed changes are removed; None: never."""
        return None if self.retention == "off" else parse_duration(self.retention)

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        if self.window < self.concurrency:
            raise ValueError(f"window ({self.window}) must be at least concurrency ({self.concurrency})")
        if self.backoff.cap < self.backoff.base:
            raise ValueError(f"backoff.cap ({self.backoff.cap}) must be at least backoff.base ({self.backoff.base})")
        if self.handlers and self.deliver.to:
            raise ValueError("handlers and deliver.to are both set; a consumer has either, so leave one out")
        if self.only and self.except_:
            raise ValueError("only and except exclude each other: name the types that are ours, or those that are not")
        if self.slot.mode == "temporary" and not self.slot.create:
            raise ValueError("slot.mode temporary needs slot.create: such a slot is made at each connection")
        return self


_SHORT = {"deliver.types": "--type", "deliver.batch": "--batch", "deliver.format": "--format"}
"""Options that are no spelling of the setting's name: those used with --deliver-to."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of Settings. ``name`` is ``slot.name``, ``flat`` is ``slot_name``, ``kind`` its type."""

    name: str
    description: str
    default: Any
    kind: Any

    @property
    def secret(self) -> bool:
        return SecretStr in get_args(self.kind)

    @property
    def switch(self) -> bool:
        return self.kind is bool

    @property
    def repeats(self) -> bool:
        """It may be given several times on the command line; elsewhere it is a list, or has commas."""
        return any(get_origin(kind) is tuple for kind in get_args(self.kind))

    @property
    def flat(self) -> str:
        return self.name.replace(".", "_")

    @property
    def variable(self) -> str:
        return "CDC_" + self.flat.upper()

    @property
    def option(self) -> str:
        return _SHORT.get(self.name) or "--" + self.flat.replace("_", "-")


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    for attribute, each in model.model_fields.items():
        name, kind = prefix + (each.alias or attribute), each.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaves(kind, f"{name}.")
        else:
            yield Setting(name, each.description or "", each.default, kind)


SETTINGS: Mapping[str, Setting] = {setting.name: setting for setting in _leaves(Settings)}
_BY_FLAT = {setting.flat: setting for setting in SETTINGS.values()}


Given = dict[str, tuple[Any, str]]
"""Name in SETTINGS to (value, source)."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings, and what was given. ``found``: in the default file, not a named one. ``sections``: see there."""

    settings: Settings
    given: Given
    warnings: tuple[str, ...] = ()
    found: bool = False
    sections: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sources(self) -> Mapping[str, str]:
        """Each value's source by name in SETTINGS."""
        return {name: self.given[name][1] if name in self.given else "default" for name in SETTINGS}

    def value(self, name: str) -> Any:
        """By the name in SETTINGS; a secret stays a SecretStr."""
        value: Any = self.settings.model_dump(by_alias=True)
        for part in name.split("."):
            value = value[part]
        return value


_ALL_OF_THEM = "cdc config show --help explains every setting"


def load(
    options: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Resolved:
    """Merge the four sources. ``options`` holds the command line by flat name; None there means not given.

    ``file`` must exist if named, here or by CDC_CONFIG. Raises UsageError naming the source of a wrong value, never a
    secret.
    """
    environ = os.environ if environ is None else environ
    named = file or (Path(environ["CDC_CONFIG"]) if environ.get("CDC_CONFIG") else None)
    from_file, sections = _from_file(named)
    reason = others_hand(named) if named else None
    warnings = (f"{named}: {reason}; it is used all the same, as it was named",) if reason else ()
    resolved = resolve({**from_file, **_from_environment(environ), **_from_options(options or {})})
    return replace(resolved, warnings=warnings, found=named is None, sections=sections)


def from_options(options: Mapping[str, Any]) -> Settings:
    """Settings from flat names alone: no environment, no file. Raises UsageError, also for an unknown name."""
    options = {name.removesuffix("_"): value for name, value in options.items()}  # except is a keyword of Python
    for name in options:
        if name not in _BY_FLAT:
            raise UsageError(f"{name!r} is not a setting", hint=_nearest(name, list(_BY_FLAT)))
    return resolve(_from_options(options)).settings


def resolve(given: Given) -> Resolved:
    """Raises UsageError, as ``load``."""
    nested: dict[str, Any] = {}
    for name, (value, _) in given.items():
        section, _, leaf = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    try:
        settings = Settings.model_validate(nested)
    except ValidationError as invalid:
        raise _complaint(invalid, given) from None
    return Resolved(settings, given)


def _from_options(options: Mapping[str, Any]) -> Given:
    known = ((_BY_FLAT[flat], value) for flat, value in options.items() if value is not None)
    return {
        setting.name: (value, f"--no-{setting.option[2:]}" if value is False else setting.option)
        for setting, value in known
    }


_OTHERS_VARIABLES = re.compile(
    r"CDC_(CONFIG|TEST_.*|REQUIRE_.*"
    # Kubernetes sets these in every pod of a namespace with a Service "cdc..."; see also _is_a_service.
    r"|(.+_)?SERVICE_(HOST|PORT)(_.+)?|(.+_)?PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)


def _is_a_service(variable: str, value: str) -> bool:
    """CDC_PORT=tcp://10.0.0.1:9464; a Service named cdc-http even sets a variable with the name of a setting."""
    return variable.endswith("_PORT") and value.startswith(("tcp://", "udp://", "sctp://"))


def _from_environment(environ: Mapping[str, str]) -> Given:
    variables = {setting.variable: setting for setting in SETTINGS.values()}
    files = {f"{setting.variable}_FILE": setting for setting in SETTINGS.values() if setting.secret}
    given: Given = {}
    for variable, value in sorted(environ.items()):
        if not variable.startswith("CDC_") or not value or _is_a_service(variable, value):
            continue  # empty is unset: what ${CDC_X:-} leaves in a compose file
        if setting := variables.get(variable):
            given[setting.name] = (value, variable)
        elif setting := files.get(variable):
            if environ.get(setting.variable):
                raise UsageError(f"both {setting.variable} and {variable} are set", hint="unset one of them")
            given[setting.name] = (SecretFile(value, variable), variable)
        elif not _OTHERS_VARIABLES.fullmatch(variable):
            raise UsageError(f"the variable {variable} is not a setting", hint=_nearest(variable, [*variables, *files]))
    return given


def _from_file(named: Path | None) -> tuple[Given, Mapping[str, Any]]:
    path = named or DEFAULT_FILE
    try:
        if named is None and (reason := others_hand(path)):
            raise UsageError(
                f"there is a {path} here that another user may have written: {reason}",
                hint=f"if you mean it, name it: --config {path}, or CDC_CONFIG={path}",
            )
        document = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if named is None:
            return {}, {}
        raise UsageError(f"there is no configuration file {path}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}", hint="see https://toml.io for the format") from None
    sections = document.pop("subscription") if isinstance(document.get("subscription"), dict) else {}
    return {name: (value, f"{name} in {path}") for name, value in flattened(document, str(path))}, sections


def flattened(document: Mapping[str, Any], path: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names in SETTINGS with their values. Raises UsageError for one that is not there."""
    sections = {name.partition(".")[0] for name in SETTINGS if "." in name}
    for key, value in document.items():
        name = prefix + key
        if name in SETTINGS:
            yield name, value
        elif name in sections and isinstance(value, dict):
            yield from flattened(value, path, f"{name}.")
        else:
            raise UsageError(f"{name} in {path} is not a setting", hint=_nearest(name, list(SETTINGS)))


def _nearest(name: str, known: list[str]) -> str:
    # Low cut-off: a bad suggestion does little harm, and "did you mean" beats reading the manual.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else _ALL_OF_THEM


def _complaint(invalid: ValidationError, given: Given) -> UsageError:
    sentences = []
    for error in invalid.errors(include_url=False, include_input=False, include_context=False):
        name = ".".join(str(part) for part in error["loc"])
        source = given[name][1] if name in given else name
        message = error["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        sentences.append(f"{source}: {message}" if source else message)
    return UsageError("; ".join(sentences), hint=_ALL_OF_THEM)
