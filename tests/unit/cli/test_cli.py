import importlib
import io
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from uuid import UUID

import click
import pytest
from click.testing import CliRunner, Result

import cdc.cli
from cdc import __version__
from cdc.app.application import App
from cdc.app.config import SETTINGS, Settings, from_options
from cdc.cli import output, run
from cdc.cli.options import database_options, json_option, yes_option
from cdc.core.errors import CdcError, ConnectError, NotFoundError, RefusedError, SchemaError, UsageError
from cdc.core.lsn import Lsn
from cdc.core.router import Router

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, no settings from outside, and the import path as before afterwards."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("CDC_", "PG"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


@pytest.fixture
def cli() -> Cli:
    def call(*arguments: str, **environ: str) -> Result:
        return CliRunner().invoke(cdc.cli.cdc, arguments, env=environ, prog_name="cdc")

    return call


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[click.Command], None]:
    """Makes a command of the test's own known as ``cdc probe``."""

    def register(probe: click.Command) -> None:
        module = types.ModuleType("probe_commands")
        module.probe = probe  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "probe_commands", module)
        monkeypatch.setitem(cdc.cli.COMMANDS, "probe", ("probe_commands", "Probe."))

    return register


def _raising(error: BaseException) -> click.Command:
    @click.command()
    def probe() -> None:
        raise error

    return probe


def test_the_version_and_the_help_are_there(cli: Cli) -> None:
    assert cli("--version").stdout == f"cdc {__version__}\n"
    for flag in ("--help", "-h"):
        shown = cli(flag)
        assert shown.exit_code == 0
        assert "run     " in shown.stdout


@pytest.mark.parametrize("name", cdc.cli.COMMANDS)
def test_each_command_listed_exists_and_explains_itself(name: str, cli: Cli) -> None:
    module, _ = cdc.cli.COMMANDS[name]
    assert isinstance(getattr(importlib.import_module(module), name), click.Command)
    shown = cli(name, "--help")
    assert shown.exit_code == 0
    assert "\n  " in shown.stdout


def test_help_loads_neither_the_driver_nor_an_event_loop() -> None:
    program = (
        "import sys, cdc.cli; print(sorted({'psycopg', 'pydantic', 'prometheus_client', 'asyncio'} & {*sys.modules}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize("group", ["config", "db", "outbox", "slot", "whatsapp"])
def test_a_list_of_commands_is_not_cut(group: str, cli: Cli) -> None:
    _, _, listed = cli(group, "--help").stdout.partition("Commands:")
    assert listed
    assert "..." not in listed


def test_the_module_is_a_program_as_well() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "cdc", "config", "nosuch"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "nosuch" in ended.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CdcError("it failed", hint="fix it"), 1),
        (SchemaError("it failed", hint="fix it"), 1),
        (UsageError("it failed", hint="fix it"), 2),
        (ConnectError("it failed", hint="fix it"), 3),
        (NotFoundError("it failed", hint="fix it"), 4),
        (RefusedError("it failed", hint="fix it"), 5),
    ],
)
def test_an_error_is_a_sentence_a_hint_and_an_exit_code(
    error: CdcError, code: int, cli: Cli, command: Callable[[click.Command], None]
) -> None:
    command(_raising(error))
    result = cli("probe")
    assert (result.stdout, result.stderr, result.exit_code) == ("", "Error: it failed\n  fix it\n", code)


def test_an_error_without_a_hint_is_one_line(cli: Cli, command: Callable[[click.Command], None]) -> None:
    command(_raising(CdcError("it failed")))
    assert cli("probe").stderr == "Error: it failed\n"


def test_an_unexpected_error_is_one_line_that_quotes_nothing(
    cli: Cli, command: Callable[[click.Command], None]
) -> None:
    command(_raising(KeyError("hunter")))
    result = cli("probe")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: unexpected KeyError")
    assert "--debug" in result.stderr
    assert "hunter" not in result.stderr
    debugged = cli("--debug", "probe")
    assert debugged.exit_code == 1
    assert "Traceback" in debugged.stderr
    assert "KeyError: 'hunter'" in debugged.stderr


def test_what_an_error_quotes_is_no_command_to_the_terminal(cli: Cli, command: Callable[[click.Command], None]) -> None:
    command(_raising(CdcError("no table \x1b]0;owned\x07\nError: forged", hint="\x9b2J")))
    for arguments in (("probe",), ("--debug", "probe")):
        assert all(line.isprintable() for line in cli(*arguments).stderr.split("\n"))
    assert "\nError: forged" not in cli("probe").stderr


@pytest.mark.parametrize("arguments", [["run", "postgresql://u:geheim@h/db"], ["postgresql://u:geheim@h/db"]])
def test_a_dsn_in_the_wrong_place_is_quoted_without_its_password(arguments: list[str], cli: Cli) -> None:
    result = cli(*arguments)
    assert result.exit_code == 2
    assert "geheim" not in result.output


def test_ctrl_c_ends_quietly(cli: Cli, command: Callable[[click.Command], None]) -> None:
    command(_raising(KeyboardInterrupt()))
    result = cli("probe")
    assert (result.exit_code, result.stderr) == (130, "")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    shown = subprocess.run(
        f"{sys.executable} -m cdc config schema | true", shell=True, capture_output=True, text=True, check=False
    )
    assert shown.stderr == ""


def test_database_options_give_settings_and_leave_unset_ones_to_the_environment(
    cli: Cli, command: Callable[[click.Command], None], folder: Path
) -> None:
    @click.command()
    @click.argument("table")
    @database_options
    @json_option
    @yes_option
    def probe(table: str, settings: Settings, as_json: bool, yes: bool) -> None:
        click.echo(f"{table} {settings.dsn_text} {settings.schema_} {settings.threads} {as_json} {yes}")

    command(probe)
    (folder / "other.toml").write_text("threads = 7\nschema = 'in_file'\n")
    assert cli("probe", "t").stdout == "t None public 20 False False\n"
    assert cli("probe", "t", CDC_SCHEMA="x").stdout == "t None x 20 False False\n"
    shown = cli("probe", "t", "--dsn", "host=a", "--config", "other.toml", "--json", "--yes", CDC_DSN="host=b")
    assert shown.stdout == "t host=a in_file 7 True True\n"
    wrong = cli("probe", "t", "--schema", "")
    assert (wrong.exit_code, wrong.stderr[:16]) == (2, "Error: --schema:")


def test_config_show_names_value_and_source_and_hides_the_secret(cli: Cli, folder: Path) -> None:
    (folder / "cdc.toml").write_text("[http]\nport = 1\n")
    arguments = ("config", "show", "--no-stream")
    table = cli(*arguments, CDC_DSN="postgresql://u:hunter@db/app")
    assert table.exit_code == 0, table.stderr
    lines = {line.split()[0]: line.split() for line in table.stdout.splitlines()}
    assert lines["http.port"] == ["http.port", "1", "http.port", "in", "cdc.toml"]
    assert lines["stream"] == ["stream", "no", "--no-stream"]
    assert lines["dsn"] == ["dsn", "(secret)", "host=db", "dbname=app", "user=u", "CDC_DSN"]
    assert lines["threads"] == ["threads", "20", "default"]
    assert set(lines) == {"setting", *SETTINGS}
    shown = json.loads(cli(*arguments, "--json", CDC_DSN="postgresql://u:hunter@db/app").stdout)
    assert shown["schema"] == 1
    assert shown["settings"]["http.port"] == {"value": 1, "source": "http.port in cdc.toml"}
    assert "hunter" not in f"{table.output}{shown}"


@pytest.mark.parametrize("group", [(), ("outbox",), ("slot",), ("db",)], ids="-".join)
def test_for_an_option_before_the_command_the_error_names_its_place(cli: Cli, group: tuple[str, ...]) -> None:
    told = cli(*group, "--dsn=postgresql://u:hunter@db/app", "run")
    assert f"write {' '.join(('cdc', *group))} COMMAND --dsn" in told.stderr
    assert (told.exit_code, "hunter" in told.output) == (2, False)


def test_a_mistake_in_a_command_or_a_reference_is_recognised(cli: Cli) -> None:
    assert "did you mean run?" in cli("runn").stderr
    assert cli("runn").exit_code == 2
    assert "write it as my.handlers:router" in cli("run", "--handlers", "my/handlers.py:router").stderr
    sqlalchemy = cli("config", "show", "--dsn", "postgresql+psycopg://u:hunter@db/app")
    assert "write postgresql:// instead" in sqlalchemy.stderr
    assert "hunter" not in sqlalchemy.output


SECRET = "hunter"
WITH_SECRET = (
    f"https://host/path?token={SECRET}", f"https://host/path?x=1&sig={SECRET}", f"https://user:{SECRET}@host/path",
    f"unix:///run/app.sock:/x?key={SECRET}", f"postgresql://host/db?password={SECRET}", f"password={SECRET} host=db",
    f"postgresql://host/db?sslpassword={SECRET}", f"postgresql://host/db?%70assword={SECRET}", f"x?api_key={SECRET}",
    f"host=db options='-c my.password={SECRET}'", f"host=db sslpassword={SECRET}",
)  # fmt: skip


@pytest.mark.parametrize("value", WITH_SECRET)
def test_a_secret_in_whatever_setting_is_shown_nowhere(cli: Cli, value: str) -> None:
    for setting in SETTINGS.values():
        for as_json in ([], ["--json"]):
            shown = cli("config", "show", *as_json, **{setting.variable: value})
            assert SECRET not in shown.output, setting.name
            assert SECRET not in str(shown.exception), setting.name


@pytest.mark.parametrize("value", WITH_SECRET)
def test_a_secret_in_an_argument_is_shown_in_no_error(cli: Cli, value: str) -> None:
    for arguments in (
        ("run", "--handlers", value), ("run", "--handlers", f"x:{value}"), ("run", value), ("run", f"--{value}"),
        (value,), ("run", "--deliver-to", value, "--handlers", "x"), ("run", "--http-port", value),
        ("run", "--config", value), ("outbox", "show", value), ("outbox", "list", "--since", value),
    ):  # fmt: skip
        shown = cli(*arguments)
        assert shown.exit_code != 0
        assert SECRET not in shown.output, arguments


def test_config_schema_is_a_json_schema(cli: Cli) -> None:
    assert "slot" in json.loads(cli("config", "schema").stdout)["properties"]


# --- printing ---


def test_a_table_is_aligned_and_numbers_stand_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["name", "bytes", "active"], [("a", 5, True), ("longer", 1234, False), ("n", None, None)])
    output.print_table(["bytes"], [(5,), (1234,)])
    output.print_table(["nothing", "here"], [])
    assert capsys.readouterr().out == (
        "name    bytes  active\n"
        "a       5      yes\n"
        "longer  1234   no\n"
        "n       -      -\n"
        "bytes\n"
        "    5\n"
        " 1234\n"
        "nothing  here\n"
    )  # fmt: skip


def test_a_name_cannot_send_codes_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["name"], [("\x1b[31mred\nü",)])
    assert capsys.readouterr().out == "name\n\\x1b[31mred\\nü\n"


def test_json_is_one_object_with_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    east = timezone(timedelta(hours=2))
    data = {
        "lsn": Lsn.parse("16/B374D848"), "at": datetime(2026, 1, 31, 14, tzinfo=east), "id": UUID(int=1),
        "list": [1, (2.5, None)], "nested": {"yes": True}, "text": "ü",
    }  # fmt: skip
    output.print_json(data)
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1, "lsn": "16/B374D848", "at": "2026-01-31T12:00:00Z", "id": str(UUID(int=1)),
        "list": [1, [2.5, None]], "nested": {"yes": True}, "text": "ü",
    }  # fmt: skip
    with pytest.raises(ValueError, match="schema_name"):
        output.print_json({"schema": "public"})


def test_a_table_shows_times_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["at"], [(datetime(2026, 1, 31, 12, tzinfo=UTC),)])
    assert "2026-01-31T12:00:00Z" in capsys.readouterr().out


def test_talk_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output.say("working")
    assert capsys.readouterr() == ("", "working\n")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.paint("fail", "red") == "fail"
    monkeypatch.setattr(sys, "stdout", _Terminal())
    assert output.paint("fail", "red") == "\x1b[31mfail\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.paint("fail", "red") == "fail"


def test_a_confirmation_is_asked_for_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    output.confirm("drop slot cdc", yes=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(RefusedError, match="drop slot cdc") as refused:
        output.confirm("drop slot cdc", yes=False)
    assert "--yes" in refused.value.hint
    monkeypatch.setattr(sys, "stdin", _Terminal("y\nn\n"))
    output.confirm("drop slot cdc", yes=False)
    with pytest.raises(RefusedError, match="nothing was changed"):
        output.confirm("drop slot cdc", yes=False)


# --- handlers ---


@pytest.fixture
def module(folder: Path) -> Iterator[Callable[[str], None]]:
    """Writes a module ``myapp_events`` into the working folder."""

    def write(source: str) -> None:
        (folder / "myapp_events.py").write_text(source)
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("myapp_events", None)


def test_a_router_is_found_in_the_working_folder(module: Callable[[str], None]) -> None:
    module("from cdc.core.router import Router\nrouter = Router()\nclass holder: inner = router\n")
    assert isinstance(run.load_router("myapp_events:router", Settings()), Router)
    assert isinstance(run.load_router("myapp_events:holder.inner", Settings()), Router)


def test_a_router_can_be_made_by_a_function_that_gets_the_settings(module: Callable[[str], None]) -> None:
    module("from cdc import Router\ndef make(settings):\n    assert settings.threads == 3\n    return Router()\n")
    assert isinstance(run.load_router("myapp_events:make", Settings(threads=3)), Router)


@pytest.mark.parametrize("reference", ["", "router", "myapp:", ":router", "my-app:router", "a..b:router"])
def test_what_is_no_reference_is_refused_with_an_example(reference: str) -> None:
    with pytest.raises(UsageError, match="no reference to a router") as refused:
        run.load_router(reference, Settings())
    assert "package.module:router" in refused.value.hint


def test_a_dsn_in_the_place_of_a_reference_is_not_quoted_with_its_password() -> None:
    with pytest.raises(UsageError, match="no reference to a router") as refused:
        run.load_router("postgresql://app:hunter2@db/app?sslpassword=hunter2", Settings())
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "reference", "said"),
    [
        (None, "nosuch_module:router", "there is no module nosuch_module"),
        (None, "nosuch_package.events:router", "there is no module nosuch_package"),
        ("import nosuch_thing", "myapp_events:router", "ModuleNotFoundError: No module named 'nosuch_thing' (*:1)"),
        ("\n\n1/0", "myapp_events:router", "ZeroDivisionError: division by zero (*:3)"),
        ("\ndef f(:", "myapp_events:router", "SyntaxError: invalid syntax (*:2)"),
        ("import sys; sys.exit(3)", "myapp_events:router", "SystemExit: 3 (*:1)"),
        ("x = 1", "myapp_events:router", "module myapp_events has no router"),
        ("router = 3", "myapp_events:router", "myapp_events:router is a int, not a cdc.Router"),
        ("def make(settings): return 3", "myapp_events:make", "myapp_events:make is a int, not a cdc.Router"),
        (
            "\ndef make(settings): 1/0",
            "myapp_events:make",
            "myapp_events:make cannot make a router: ZeroDivisionError: division by zero (*:2)",
        ),
    ],
)
def test_a_wrong_handler_reference_is_one_sentence(
    source: str | None, reference: str, said: str, cli: Cli, module: Callable[[str], None]
) -> None:
    if source is not None:
        module(source)
    result = cli("run", "--handlers", reference)
    sentence = result.stderr.splitlines()[0]
    assert said.replace("*", str(Path.cwd() / "myapp_events.py")) in sentence
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_a_router_of_another_name_is_suggested(module: Callable[[str], None]) -> None:
    module("from cdc.core.router import Router\nevents = Router()\n")
    with pytest.raises(UsageError, match="has no router") as refused:
        run.load_router("myapp_events:router", Settings())
    assert refused.value.hint == "it has events"


def test_two_handlers_for_one_change_are_one_sentence(cli: Cli, module: Callable[[str], None]) -> None:
    module(
        "from cdc.core.router import Router\nrouter = Router()\n"
        "@router.on('task')\ndef a(change): ...\n@router.on('task')\ndef b(change): ...\n"
    )
    result = cli("run", "--handlers", "myapp_events:router")
    assert result.exit_code == 2
    assert "two handlers" in result.stderr


def test_run_without_handlers_says_which_option_is_missing(cli: Cli) -> None:
    result = cli("run")
    assert result.exit_code == 2
    assert "--handlers" in result.stderr


def test_every_setting_is_an_option_of_the_command_that_it_is_for(cli: Cli) -> None:
    shown = "".join(cli(*command, "--help").stdout for command in (["run"], ["whatsapp", "serve"], ["ui"]))
    assert [name for name, setting in SETTINGS.items() if f"{setting.option} " not in shown] == []


# --- cdc run --deliver-to ---


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, object]]:
    """What the consumer would be started with."""
    given: list[tuple[Settings, object]] = []
    monkeypatch.setattr("cdc.app.serve.serve", given.extend)
    return given


def test_a_delivery_is_described_on_the_command_line(cli: Cli, served: list[tuple[Settings, object]]) -> None:
    options = ["--deliver-to", "http://127.0.0.1:3000/changes", "--type", "order", "--type", "task", "--batch", "50"]
    assert cli("run", *options).exit_code == 0
    [(settings, router)] = served
    assert router is None
    assert settings.deliver.to == "http://127.0.0.1:3000/changes"
    assert settings.deliver.types == ("order", "task")
    assert settings.deliver.batch == 50


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--type", "order"], "a delivery has settings and no URL"),
        (["--handlers", "tests.handlers:router", "--batch", "5"], "a delivery has settings and no URL"),
        (["--deliver-to", "http://app/", "--handlers", "a:b"], "handlers and deliver.to are both set"),
        (["--deliver-to", "http://user:hunter@app/"], "--deliver-to: a URL with a user or a password in it"),
        (["--deliver-to", "http://app/", "--deliver-secret", "hunter"], "--deliver-secret: a secret is whsec_"),
        ([], "no handlers are named"),
    ],
)
def test_a_delivery_that_cannot_be_is_refused_before_anything_starts(
    options: list[str], said: str, cli: Cli, served: list[tuple[Settings, object]]
) -> None:
    refused = cli("run", *options)
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert "hunter" not in refused.stderr
    assert served == []


def test_the_settings_of_a_delivery_are_shown_without_its_secrets(cli: Cli) -> None:
    secret = "whsec_" + "hunter00" * 5
    shown = cli("config", "show", "--deliver-to", "http://app/", "--type", "order", "--type", "task",
                "--deliver-secret", secret)  # fmt: skip
    assert shown.exit_code == 0
    assert re.search(r"deliver\.types +order, task +--type", shown.stdout)
    assert re.search(r"deliver\.secret +\(secret\) +--deliver-secret", shown.stdout)
    assert "hunter" not in shown.output


async def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "cdc.http.delivery", raising=False)
    with pytest.raises(UsageError, match="delivering over HTTP needs aiohttp") as refused:
        App(from_options({"deliver_to": "http://app/"}), None)
    assert refused.value.hint == "pip install 'cdc-consumer[http]'"


@pytest.mark.parametrize(("router", "settings"), [(None, {}), (Router(), {"deliver_to": "http://app/"})])
async def test_a_consumer_in_a_program_has_a_router_or_delivers(
    router: Router | None, settings: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match="either a router or deliver_to"):
        App(from_options(settings), router)
