import re
import tomllib
from pathlib import Path

import pytest

from cdc.app.config import SETTINGS, Resolved, Settings, from_options, load
from cdc.core.errors import UsageError
from cdc.core.model import PLUGINS
from cdc.core.type_filter import TypeFilter


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: no cdc.toml but the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _load(**environ: str) -> Resolved:
    return load(environ=environ)


def test_without_any_source_the_defaults_hold() -> None:
    resolved = _load()
    assert resolved.settings == Settings()
    assert set(resolved.sources.values()) == {"default"}
    assert resolved.settings.dsn_text is None


def test_the_command_line_beats_the_environment_beats_the_file_beats_the_default(folder: Path) -> None:
    (folder / "cdc.toml").write_text("threads = 1\nwindow = 111\nconcurrency = 11\n[slot]\nname = 'in_file'\n")
    resolved = load({"threads": "3", "window": None}, environ={"CDC_THREADS": "2", "CDC_WINDOW": "222"})
    assert resolved.settings.threads == 3
    assert resolved.settings.window == 222
    assert resolved.settings.concurrency == 11
    assert resolved.settings.slot.name == "in_file"
    assert resolved.settings.slot.create is True
    assert resolved.sources["threads"] == "--threads"
    assert resolved.sources["window"] == "CDC_WINDOW"
    assert resolved.sources["slot.name"] == "slot.name in cdc.toml"
    assert resolved.sources["slot.create"] == "default"
    assert resolved.value("slot.name") == "in_file"


def test_the_file_in_the_documents_has_every_setting_and_the_defaults(folder: Path) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "reference" / "settings.md").read_text("utf-8")
    [example] = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (folder / "cdc.toml").write_text(example)
    resolved = _load()
    written = {name for name, source in resolved.sources.items() if source != "default"} - {"dsn", "handlers"}
    assert all(resolved.value(name) == SETTINGS[name].default for name in written)
    document = tomllib.loads(re.sub("^# ", "", example, flags=re.MULTILINE))
    named = {f"{name}.{leaf}" for name, value in document.items() if isinstance(value, dict) for leaf in value}
    named |= {name for name, value in document.items() if not isinstance(value, dict)}
    elsewhere = {"ui.logins", "deliver.password", "deliver.secret", "deliver.previous_secret"}
    assert named == {name for name in SETTINGS if not name.startswith("whatsapp.")} - elsewhere


EXAMPLES = {
    "deliver.to": "http://127.0.0.1:3000/changes",
    "deliver.batch": 20,
    "deliver.secret": "whsec_" + "a" * 44,
    "deliver.previous_secret": "whsec_" + "b" * 44,
    "ui.logins": "anna:" + "a" * 16,
    "ui.proxy_networks": "10.1.2.0/24",
}
"""Of settings that do not take any text."""


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_an_option_a_variable_and_a_line_of_the_file(name: str, folder: Path) -> None:
    setting = SETTINGS[name]
    assert setting.description.endswith(".")
    value = EXAMPLES.get(name, "x") if setting.default is None else setting.default
    for resolved in (load({setting.flat: str(value)}, environ={}), _load(**{setting.variable: str(value)})):
        assert resolved.sources[name] in {setting.option, setting.variable}
    section, _, leaf = name.rpartition(".")
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    (folder / "cdc.toml").write_text((f"[{section}]\n" if section else "") + f"{leaf} = {text}\n")
    assert _load().sources[name] == f"{name} in cdc.toml"


def test_entity_types_are_a_list_on_the_command_line_and_in_the_file_and_names_with_commas_in_a_variable(
    folder: Path,
) -> None:
    assert load({"only": ("a", "b")}, environ={}).settings.scope == TypeFilter(("a", "b"), include=True)
    assert _load(CDC_ONLY="a, b").settings.scope == TypeFilter(("a", "b"), include=True)
    (folder / "cdc.toml").write_text("except = ['a', 'b, c']\n")
    assert _load().settings.scope == TypeFilter(("a", "b, c"))
    assert from_options({"except_": ["a"]}).scope == TypeFilter(("a",))


def test_types_that_are_ours_and_types_that_are_not_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="only and except exclude each other"):
        _load(CDC_ONLY="a", CDC_EXCEPT="b")


def test_auto_is_every_plugin_and_a_name_is_that_one_alone() -> None:
    assert _load().settings.slot.plugins == PLUGINS
    assert _load(CDC_SLOT_PLUGIN="pgoutput").settings.slot.plugins == ("pgoutput",)


def test_a_temporary_slot_without_slot_create_is_refused() -> None:
    with pytest.raises(UsageError, match=r"slot\.create"):
        _load(CDC_SLOT_MODE="temporary", CDC_SLOT_CREATE="no")


def test_an_empty_variable_counts_as_unset() -> None:
    assert _load(CDC_HTTP_PORT="").settings.http.port == 9464


def test_the_variables_of_others_are_let_be() -> None:
    resolved = _load(
        CDC_TEST_DSN="x", CDC_REQUIRE_PG="1", CDC_SERVICE_HOST="10.0.0.1", CDC_SERVICE_PORT="9464",
        CDC_PORT="tcp://10.0.0.1:9464", CDC_PORT_9464_TCP_ADDR="10.0.0.1", CDC_HTTP_PORT="tcp://10.0.0.1:80",
        PATH="/bin",
    )  # fmt: skip
    assert resolved.settings == Settings()


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("CDC_SLOTNAME", "CDC_SLOT_NAME"),
        ("CDC_HTP_PORT", "CDC_HTTP_PORT"),
        ("CDC_DSNFILE", "CDC_DSN_FILE"),
        ("CDC_SLOT_NAME_FILE", "CDC_SLOT_NAME"),
        ("CDC_ZZZZZZZZZZZZZZZZ", "cdc config show --help"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_known_one(variable: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=variable) as refused:
        _load(**{variable: "hunter"})
    assert nearest in refused.value.hint
    assert "hunter" not in f"{refused.value}{refused.value.hint}"


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("[slot]\nnam = 'x'", "slot.nam in cdc.toml", "slot.name"),
        ("slot = 3", "slot in cdc.toml", ""),
        ("slot_name = 'x'", "slot_name in cdc.toml", "slot.name"),
        ("[slots]\nname = 'x'", "slots in cdc.toml", ""),
        ("schema_ = 'x'", "schema_ in cdc.toml", "schema"),
    ],
)
def test_an_unknown_key_of_the_file_is_refused_with_the_nearest_known_one(
    text: str, wrong: str, nearest: str, folder: Path
) -> None:
    (folder / "cdc.toml").write_text(text)
    with pytest.raises(UsageError, match=f"^{wrong} is not a setting$") as refused:
        _load()
    assert nearest in refused.value.hint


def test_a_file_that_is_named_must_be_there_and_be_toml(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no configuration file other\.toml"):
        load(file=Path("other.toml"), environ={})
    with pytest.raises(UsageError, match=r"there is no configuration file third\.toml"):
        _load(CDC_CONFIG="third.toml")
    (folder / "other.toml").write_text("threads = ")
    with pytest.raises(UsageError, match=r"other\.toml is not valid TOML"):
        load(file=Path("other.toml"), environ={})
    with pytest.raises(UsageError, match="cannot be read"):
        load(file=folder, environ={})
    (folder / "other.toml").write_text("threads = 4")
    assert load(file=Path("other.toml"), environ={}).settings.threads == 4


def test_a_secret_comes_from_its_file_without_the_last_line_break(folder: Path) -> None:
    (folder / "dsn").write_text("host=db password=hunter\n")
    resolved = _load(CDC_DSN_FILE=str(folder / "dsn"))
    assert resolved.settings.dsn_text == "host=db password=hunter"
    assert resolved.settings.stream_dsn_text == "host=db password=hunter"
    assert resolved.sources["dsn"] == "CDC_DSN_FILE"
    with pytest.raises(UsageError, match="both CDC_DSN and CDC_DSN_FILE are set"):
        _load(CDC_DSN="host=db", CDC_DSN_FILE=str(folder / "dsn"))
    with pytest.raises(UsageError, match=r"CDC_DSN_FILE=.*nosuch cannot be read: No such file"):
        _load(CDC_DSN_FILE=str(folder / "nosuch"))


def test_the_stream_may_have_a_role_of_its_own() -> None:
    settings = _load(CDC_DSN="user=worker", CDC_STREAM_DSN="user=stream").settings
    assert (settings.dsn_text, settings.stream_dsn_text) == ("user=worker", "user=stream")


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"CDC_HTTP_PORT": "hunter"}, "CDC_HTTP_PORT: input should be a valid integer"),
        ({"CDC_HTTP_PORT": "65536"}, "CDC_HTTP_PORT: input should be less than or equal to 65535"),
        ({"CDC_MAX_CHAIN_DEPTH": "0"}, "CDC_MAX_CHAIN_DEPTH: input should be greater than or equal to 1"),
        ({"CDC_SLOT_NAME": "Hunter"}, "CDC_SLOT_NAME: string should match"),
        ({"CDC_SWEEP_INTERVAL": "0"}, "CDC_SWEEP_INTERVAL: input should be greater than 0"),
        ({"CDC_DRAIN_TIME": "inf"}, "CDC_DRAIN_TIME: input should be a finite number"),
        ({"CDC_STREAM": "hunter"}, "CDC_STREAM: input should be a valid boolean"),
        ({"CDC_LOG_LEVEL": "hunter"}, "CDC_LOG_LEVEL: input should be 'debug', 'info', 'warning' or 'error'"),
        ({"CDC_SCHEMA": "hunter" * 11}, "CDC_SCHEMA: a schema name has at most 63 bytes"),
        ({"CDC_RETENTION": "hunter"}, "CDC_RETENTION: input should be a span of time, such as 30d, 12h, 90m, or off"),
        ({"CDC_RETENTION": "30"}, "CDC_RETENTION: input should be a span of time"),
        ({"CDC_WINDOW": "99"}, "window (99) must be at least concurrency (100)"),
        ({"CDC_BACKOFF_BASE": "4000"}, "backoff.cap (1800.0) must be at least backoff.base (4000.0)"),
        ({"CDC_THREADS": "0", "CDC_HTTP_PORT": "x"}, "CDC_HTTP_PORT: input"),
        ({"CDC_DELIVER_TO": "http://hunter@app/"}, "CDC_DELIVER_TO: a URL with a user or a password in it"),
        ({"CDC_DELIVER_TO": "nats://hunter@app/x"}, "CDC_DELIVER_TO: a URL with a user or a password in it"),
        (
            {"CDC_DELIVER_TO": "nats://app/{hunter}"},
            "CDC_DELIVER_TO: the subject has a placeholder that does not exist",
        ),
        (
            {"CDC_DELIVER_TO": "redis://app/0/x", "CDC_DELIVER_FORMAT": "binary"},
            "deliver: deliver.format is one of structured for this broker",
        ),
        (
            {"CDC_DELIVER_TO": "http://app/", "CDC_DELIVER_PASSWORD": "hunter"},
            "deliver: deliver.format, deliver.user and deliver.password are for brokers, not for HTTP",
        ),
        (
            {"CDC_DELIVER_TO": "nats://app/x", "CDC_DELIVER_SECRET": "whsec_" + "a" * 44},
            "deliver: deliver.secret signs requests over HTTP; a broker has deliver.user and deliver.password",
        ),
        ({"CDC_DELIVER_SECRET": "hunter"}, "CDC_DELIVER_SECRET: a secret is whsec_ and then base64"),
        ({"CDC_DELIVER_BATCH": "0"}, "CDC_DELIVER_BATCH: input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_value_is_a_sentence_with_its_source_and_without_the_value(environ: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        _load(**environ)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "unter" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_entity_types_are_a_list_or_have_commas_between_them(folder: Path) -> None:
    assert _load(CDC_DELIVER_TYPES="order, task").settings.deliver.types == ("order", "task")
    assert load({"deliver_types": ("order", "a,b")}, environ={}).settings.deliver.types == ("order", "a,b")
    (folder / "cdc.toml").write_text('deliver = { types = ["order", "a,b"] }')
    assert _load().settings.deliver.types == ("order", "a,b")
    with pytest.raises(UsageError, match="should have at least 1 character"):
        _load(CDC_DELIVER_TYPES="order,")


def test_a_consumer_calls_handlers_or_delivers() -> None:
    with pytest.raises(UsageError, match=r"handlers and deliver\.to are both set"):
        _load(CDC_HANDLERS="app:router", CDC_DELIVER_TO="http://app/")


def test_both_secrets_sign_and_where_there_is_none_nothing_does(folder: Path) -> None:
    (folder / "secret").write_text(f"{EXAMPLES['deliver.secret']}\n")
    assert _load().settings.deliver.keys() == ()
    both = {"CDC_DELIVER_SECRET_FILE": str(folder / "secret"), "CDC_DELIVER_PREVIOUS_SECRET": "whsec_" + "b" * 44}
    current, previous = _load(**both).settings.deliver.keys()
    assert (current, previous) == (b"\x69\xa6\x9a" * 11, b"\x6d\xb6\xdb" * 11)
    with pytest.raises(UsageError, match="the file that CDC_DELIVER_SECRET_FILE names cannot be read") as refused:
        _load(CDC_DELIVER_SECRET_FILE="whsec_hunter")
    assert refused.value.hint == "the secret itself goes into CDC_DELIVER_SECRET"


@pytest.mark.parametrize("written", ["0", "none", "None", "0.0"])
def test_no_time_limit_is_written_as_zero_or_none(written: str) -> None:
    assert _load(CDC_TIMEOUT=written).settings.timeout_s is None
    assert _load().settings.timeout_s == 60


def test_retention_is_off_until_an_age_is_given() -> None:
    assert _load().settings.retention_s is None
    assert _load(CDC_RETENTION="off").settings.retention_s is None
    assert _load(CDC_RETENTION="30d").settings.retention_s == 30 * 86_400


def test_settings_do_not_show_their_secrets_and_cannot_be_changed() -> None:
    settings = _load(CDC_DSN="password=hunter").settings
    assert "hunter" not in repr(settings)
    assert "hunter" not in settings.model_dump_json()
    with pytest.raises(ValueError, match="frozen"):
        settings.threads = 1  # type: ignore[misc]  # that is the point
