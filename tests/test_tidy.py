"""What the project holds itself to, read from its own source. The import contracts are in pyproject.toml."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from cdc.app.config import SETTINGS
from cdc.cli import cdc as root_command
from cdc.core.model import SHARDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "cdc").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SQL = sorted((ROOT / "sql").glob("*.sql"))

FUNCTION_LINES_MAX = 60
MODULE_LINES_MAX = 500
ATTRIBUTES_MAX = 15

MAY_PRINT = {
    "cdc/cli/output.py": "the one place: what it prints is printable",
    "cdc/cli/watch.py": "moves the cursor of a terminal",
    "cdc/cli/demo.py": "the demo shows the rows it has written itself",
}
MAY_SLEEP = {
    "tests/eventually.py": "the one place where tests let time pass",
    "tests/handlers.py": "a handler that takes as long as a test says",
    "tests/bench/handlers.py": "a handler that waits, as one for a remote call does; the waiting is what is measured",
    "tests/pictures/dashboard.py": "no test: it writes some twenty changes a second for three minutes",
    "tests/pictures/handlers.py": "a handler that takes some milliseconds",
}
DRIVES_LIBPQ = {
    "cdc/replication/connection.py": "the replication connection",
    "cdc/postgres/connect.py": "libpq's version, and which link a refused connect was about",
    "cdc/postgres/link.py": "closes a link that is silent, whatever waits on it",
    "cdc/postgres/lent.py": "COMMIT and what resets the session in one message, each with an answer of its own",
    "cdc/postgres/watched.py": "a statement in fewer steps than a cursor's, prepared once for a connection",
}
EXPLAINED_ELSEWHERE = {("cdc/core/router.py", "B004"): "the docstring of the function says what it unwraps"}
PURE = (
    "core/*", "observability/history", "observability/failures", "postgres/tracked_tables", "postgres/remarks",
    "replication/slot_health", "replication/refusals", "replication/protocol", "replication/wal2json",
    "replication/pgoutput", "replication/lsn_tracker", "diagnostics/f*", "diagnostics/check_*", "http/endpoint_url",
    "http/webhook_signature", "http/responses", "contrib/whatsapp/events", "contrib/whatsapp/rows",
)  # fmt: skip
LINKED_HOSTS = {"127.0.0.1", "localhost", "no-color.org", "toml.io", "keepachangelog.com", "semver.org",
                "www.postgresql.org", "www.w3.org", "cloudevents.io", "www.standardwebhooks.com"}  # fmt: skip
"""Whom the files may link to. Anything else is a place somebody fetched from, or a machine somebody worked on."""
PRIVATE_WORDS = {
    "lane": "the queue of a key, or the window",
    "rung|rang|rings?|bell|doorbell|deaf": "a wake-up, to notify; a slot that delivers nothing",
    "intake": "the read planner",
    "read apart": "a throttled type",
    "quota": "a limit",
    "journal": "a durable log, which is what others mean by it",
    "verdict": "a severity, a status, a health",
    "careful|carefully": "the crash guard; recorded before it starts",
    "stirred|stumbled|misfits?": "a metaphor: say what happened",
    "mends?|mended": "to repair, to fix, to remedy",
    "anew": "again, or to recreate",
    "told|heard|asleep": "logged, reported, named; received, decoded; idle",
    "in the way": "it blocks, or conflicts with",
}
"""Words of a dialect of our own, which no stranger can look up, and what is said instead."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), name(path))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """The last name of what is called, and the call."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            yield (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id), node


def comments(path: Path) -> dict[int, str]:
    with path.open("rb") as source:
        tokens = list(tokenize.tokenize(source.readline))
    return {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """String constants of the code; docstrings are talk."""
    talk = {id(node.value) for node in ast.walk(tree(path)) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in talk:
            yield node.lineno, node.value


def git(*arguments: str) -> str:
    """What it prints; nothing where there is no git, or no history."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout


@cache
def project_files() -> list[Path]:
    """What is, or would be, under version control; without git or its history, what looks like it."""
    if listing := git("ls-files", "-co", "--exclude-standard"):
        return [ROOT / line for line in listing.splitlines() if (ROOT / line).is_file()]
    built = {"__pycache__", "build", "dist"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(part in built or part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


# --- shape ---------------------------------------------------------------------------------------------------------


def test_functions_fit_on_a_screen() -> None:
    lengths = {
        f"{name(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in (*PACKAGE, *TESTS)
        for node in functions(path)
    }
    assert {where: length for where, length in lengths.items() if length > FUNCTION_LINES_MAX} == {}


def test_modules_of_the_package_stay_readable() -> None:
    lengths = {name(path): len(path.read_text("utf-8").splitlines()) for path in PACKAGE}
    assert {where: length for where, length in lengths.items() if length > MODULE_LINES_MAX} == {}


def test_a_class_has_few_attributes() -> None:
    """Counted where there is state. What is frozen, or a model of pydantic, is a list of what others name."""
    counted = {
        node.name: len(_attributes(node))
        for path in PACKAGE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and not _is_value(node)
    }
    assert {each: count for each, count in counted.items() if count > ATTRIBUTES_MAX} == {}


def _is_value(node: ast.ClassDef) -> bool:
    of_fields = {"NamedTuple", "TypedDict", "BaseModel", "_Section"}
    return any("frozen=True" in ast.unparse(each) for each in node.decorator_list) or any(
        ast.unparse(each) in of_fields for each in node.bases
    )


def _attributes(node: ast.ClassDef) -> set[str]:
    """Those of an instance: assigned to ``self`` anywhere, and the fields of a dataclass."""
    assigned = {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and ast.unparse(each.value) == "self"
    }
    fields = {
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    return assigned | (fields if any("dataclass" in ast.unparse(each) for each in node.decorator_list) else set())


def test_a_class_name_means_one_thing() -> None:
    defined: dict[str, list[str]] = {}
    for path in PACKAGE:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                defined.setdefault(node.name, []).append(name(path))
    assert {each: places for each, places in defined.items() if len(places) > 1} == {}


@pytest.mark.parametrize("words", PRIVATE_WORDS)
def test_the_package_speaks_the_words_of_its_field(words: str) -> None:
    """In identifiers, comments, docstrings, messages and the page."""
    word = rf"(?:{words})s?"
    capitalized = rf"(?:{'|'.join(each.capitalize() for each in words.split('|'))})s?"
    found = re.compile(rf"(?<![A-Za-z]){word}(?![a-z])|(?i:(?<![a-z]){word}(?![a-z]))|{capitalized}(?![a-z])")
    texts_of = [*PACKAGE, *sorted((ROOT / "cdc").rglob("*.sql")), *sorted((ROOT / "cdc").rglob("*.html"))]
    lines = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in texts_of
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if found.search(line)
    ]
    assert lines == [], PRIVATE_WORDS[words]


def test_nothing_rings_a_bell_in_tests_and_docs_either() -> None:
    found = re.compile(r"\b(?:door)?bells?\b", re.IGNORECASE)
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "sql").rglob("*.sql")]
    named = [name(path) for path in files if path != Path(__file__) and found.search(path.read_text("utf-8"))]
    assert named == []


def test_a_logger_is_named_after_what_is_there() -> None:
    topics = {"handlers", "consumer", "deliver", "listener"}
    """Of several modules, or of what a user knows by that name."""
    there = {path.stem for path in PACKAGE} | topics
    named = {
        found[1] for path in PACKAGE for found in re.finditer(r"getLogger\(\"cdc\.(\w+)\"\)", path.read_text("utf-8"))
    }
    assert named - there == set()


def test_package_files_below_the_root_are_empty_except_the_command_line_and_the_application() -> None:
    """``--handlers cdc.contrib.whatsapp:router`` names a thing of the package."""
    inits = [path for path in PACKAGE if path.name == "__init__.py" and path.read_text("utf-8")]
    assert [name(path) for path in inits] == [
        "cdc/__init__.py",
        "cdc/cli/__init__.py",
        "cdc/contrib/whatsapp/__init__.py",
    ]


def test_the_application_stands_on_the_public_names_of_the_package() -> None:
    """All but its package file, which reads the settings, and the smoke test, which looks at the outbox."""
    inner = set()
    for path in PACKAGE:
        if path.parent.name == "whatsapp" and path.name not in {"__init__.py", "smoke.py"}:
            for node in ast.walk(tree(path)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                inner |= {
                    each for each in names if each.startswith("cdc.") and not each.startswith("cdc.contrib.whatsapp.")
                }
    assert inner <= {"cdc.runtime"}, "which hears the signals"


def test_every_module_is_used_by_another() -> None:
    used = set(re.findall(r"cdc(?:\.\w+)+", "\n".join(path.read_text("utf-8") for path in PACKAGE)))
    for path in PACKAGE:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module:
                used |= {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {name(path).removesuffix(".py").replace("/", ".") for path in PACKAGE if path.stem[:2] != "__"}
    assert modules - used == {"cdc.sinks", "cdc.testing"}, "which are for others"


def test_all_that_is_printed_goes_through_what_makes_it_printable() -> None:
    """Logs have their formatters: cdc/observability/logs.py."""
    printing = {name(path) for path in PACKAGE for called, call in calls(path) if _prints(called, call)}
    named = {name(path) for path in PACKAGE if re.search(r"\bclick\.echo\b|sys\.__?std", path.read_text("utf-8"))}
    assert printing | named == set(MAY_PRINT)


def _prints(called: str, call: ast.Call) -> bool:
    if called in ("print", "echo", "secho", "print_exc"):
        return True
    return called == "write" and isinstance(call.func, ast.Attribute) and "std" in ast.unparse(call.func.value)


# --- time and chance -----------------------------------------------------------------------------------------------


def test_nothing_sleeps_that_nothing_can_wake() -> None:
    """A task is woken by its cancellation; a thread by nothing. A test that sleeps guesses how long something takes."""
    sleeping = {name(path) for path in TESTS for called, _ in calls(path) if called == "sleep"}
    assert sleeping == set(MAY_SLEEP), "wait for an event with a deadline instead; or an exception nobody needs"
    blocking = {
        f"{name(path)}:{node.lineno}"
        for path in PACKAGE
        for called, node in calls(path)
        if called == "sleep" and ast.unparse(node.func) != "asyncio.sleep"
    }
    assert blocking == set()


def test_limits_of_time_are_those_that_hold_on_every_python() -> None:
    users = {name(path) for path in PACKAGE for called, _ in calls(path) if called in {"timeout", "timeout_at"}}
    # A request of the application's is a task of its own, and the application stands on the public names.
    assert users - {"cdc/runtime/deadline.py", "cdc/contrib/whatsapp/web.py"} == set(), "cdc.runtime.deadline says why"


@pytest.mark.parametrize("modules", PURE)
def test_what_is_pure_asks_no_clock_and_rolls_no_dice(modules: str) -> None:
    paths = list((ROOT / "cdc").glob(f"{modules}.py"))
    assert paths, modules
    asked = {
        f"{name(path)}: {called}"
        for path in paths
        for called, _ in calls(path)
        if called in {"now", "today", "utcnow", "monotonic", "random"}
    }
    assert asked == set(), "time and chance are arguments"


def test_importing_the_package_loads_no_driver_and_no_event_loop() -> None:
    heavy = ["psycopg", "asyncio", "pydantic", "prometheus_client", "click", "logging", "socket"]
    code = f"import sys, cdc; print([name for name in {heavy} if name in sys.modules])"
    # -I: neither this folder nor the environment's PYTHON* variables have a say.
    loaded = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


# --- one file for each outside thing -------------------------------------------------------------------------------


def test_only_the_replication_connection_drives_libpq() -> None:
    drivers = set()
    for path in PACKAGE:
        named = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        named |= {
            alias.name for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        commands = any(
            re.search("START_REPLICATION|COPY_BOTH|CREATE_REPLICATION_SLOT", text) for _, text in texts(path)
        )
        if named & {"pq", "pgconn"} or commands:
            drivers.add(name(path))
    assert drivers <= set(DRIVES_LIBPQ)


def test_entity_changes_is_written_by_the_named_statements_and_by_sql_alone() -> None:
    writes = re.compile(r"\b(INSERT INTO|UPDATE|DELETE FROM|TRUNCATE)\s+\S*entity_changes", re.IGNORECASE)
    found = [f"{name(path)}:{line}" for path in PACKAGE for line, text in texts(path) if writes.search(text)]
    assert found == []


def test_every_named_statement_is_described_and_used() -> None:
    queries = (ROOT / "cdc/postgres/outbox.sql").read_text("utf-8")
    store = (ROOT / "cdc/postgres/outbox.py").read_text("utf-8")
    blocks = re.findall(r"^-- name: (\w+)\n(.*)$", queries, re.MULTILINE)
    assert len(blocks) >= 5
    for statement, first_line in blocks:
        assert first_line.startswith("-- "), f"{statement} has no description"
        assert f'"{statement}"' in store or f"{{{statement}}}" in queries, f"{statement} is not used"


def test_no_statement_is_put_together_by_an_f_string() -> None:
    found = [
        f"{name(path)}:{node.lineno}"
        for path in (*PACKAGE, *TESTS)
        for called, node in calls(path)
        if called in {"execute", "executemany", "stream", "copy"}
        and node.args
        and isinstance(node.args[0], ast.JoinedStr)
    ]
    assert found == [], "values are parameters, names are psycopg.sql.Identifier"


def test_a_row_without_columns_is_not_asked_whether_it_is_true() -> None:
    """It is an empty tuple, as true as no row: the rows are counted instead."""
    asked = re.compile(r'"SELECT FROM [^"]*"[^)]*\)\.fetchone\(\)(:| or| and)')
    assert asked.search('if db.execute("SELECT FROM t WHERE i = %s", [1]).fetchone():')
    found = [name(path) for path in (*PACKAGE, *TESTS) if asked.search(path.read_text("utf-8"))]
    assert found == ["tests/test_tidy.py"]


# --- reasons -------------------------------------------------------------------------------------------------------


def test_catching_everything_has_a_reason() -> None:
    """``except Exception`` raises again, or says why it does not: on its line or on the next."""
    silent = []
    for path in PACKAGE:
        said = comments(path)
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and _catches_everything(node.type):
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                if not raises and not (said.get(node.lineno) or said.get(node.lineno + 1)):
                    silent.append(f"{name(path)}:{node.lineno}")
    assert silent == []


def _catches_everything(caught: ast.expr | None) -> bool:
    names = {node.id for node in ast.walk(caught) if isinstance(node, ast.Name)} if caught else {"BaseException"}
    return bool(names & {"Exception", "BaseException"})


def test_every_lint_exception_carries_its_reason() -> None:
    """After the code, as ``# noqa: S101 - why`` or ``# type: ignore[misc]  # why``, or in a comment just above."""
    exception = re.compile(r"# (?:noqa: (?P<codes>[A-Z0-9, ]+)|type: ignore\[[^]]+\])(?P<reason>.*)")
    missing = []
    for path in PACKAGE:
        said = comments(path)
        for line, comment in said.items():
            found = exception.search(comment)
            if found and not re.search(r"\w", found["reason"]) and line - 1 not in said:
                missing.append((name(path), (found["codes"] or "type").strip()))
    assert set(missing) - set(EXPLAINED_ELSEWHERE) == set()
    assert not re.search(r"# noqa(?!:)|# type: ignore(?!\[)", "".join(path.read_text("utf-8") for path in PACKAGE))


# --- one truth in two languages ------------------------------------------------------------------------------------


def test_the_number_of_shards_is_the_same_everywhere() -> None:
    assert SHARDS & (SHARDS - 1) == 0, "the functions compute the modulo with &"
    masks = re.findall(r"hashtext\(.*?\) & (\d+)\)::smallint", _sql(), re.DOTALL)
    assert set(map(int, masks)) == {SHARDS - 1}
    queries = {path: path.read_text("utf-8") for path in [*PACKAGE, *(ROOT / "cdc").rglob("*.sql")]}
    assert any("generate_series(0, %(shards)s" in text for text in queries.values())
    assert [name(path) for path, text in queries.items() if re.search(r"generate_series\(0, \d+\)", text)] == []


def test_a_schema_stands_in_no_literal_unquoted() -> None:
    """``@schema@`` is an identifier: within a literal, a quote in the schema's name would end it."""
    scripts = sorted((ROOT / "sql").rglob("*.sql"))
    assert scripts
    found = [
        f"{path.name}: {line.strip()}"
        for path in scripts
        for line in path.read_text("utf-8").splitlines()
        if any("@schema" in literal for literal in line.partition("--")[0].split("'")[1::2])
    ]
    assert found == [], "use @schema_literal@, or format('%I', @schema_literal@)"


def _sql() -> str:
    return "\n".join(path.read_text("utf-8") for path in SQL)


def test_no_hint_installs_what_somebody_else_has_published_as_cdc() -> None:
    """Neither a distribution nor an image: ours are cdc-consumer."""
    for path in project_files():
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ""} and path.name != Path(__file__).name:
            text = path.read_text("utf-8", "replace")
            assert not re.search(
                r"(?<![\w-])cdc\[(?:http|whatsapp|demo|fast)\]|image: cdc\s|pip install cdc\s", text
            ), path


# --- what strangers read -------------------------------------------------------------------------------------------


def test_files_name_no_machine_and_no_place_they_were_fetched_from() -> None:
    found = []
    for path in project_files():
        text = path.read_text("utf-8", errors="replace")
        hosts = set(re.findall(r"https?://(?:[^/\s@]*@)?([\w.-]+\.\w+|localhost)", text))
        found += [f"{name(path)}: {host}" for host in sorted(hosts - LINKED_HOSTS) if not _is_an_example(host)]
        found += [
            f"{name(path)}: {path_}" for path_ in re.findall(r"(?<![\w.$}])/(?:home|root|Users|work|opt)/\S+", text)
        ]
    assert found == []


def _is_an_example(host: str) -> bool:
    """Reserved for documentation by RFC 2606 and RFC 5737, or no name of the public net at all."""
    return host.endswith((".example", ".invalid", ".test", "example.org", "example.com")) or host.startswith("10.")


def test_files_name_no_committer() -> None:
    names = set(git("log", "--format=%an%n%ae").splitlines())
    if not names:
        pytest.skip("not a checkout, or no git")
    found = [
        name(path) for path in project_files() for who in names if who in path.read_text("utf-8", errors="replace")
    ]
    assert found == []


def test_no_file_is_a_link() -> None:
    """Which would lead to a place on somebody's machine."""
    assert [line for line in git("ls-files", "--stage").splitlines() if line.startswith("120000")] == []


def _documents() -> str:
    paths = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "tests/README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
    return "\n".join(path.read_text("utf-8") for path in paths if path.exists())


def test_pages_that_are_named_anywhere_exist_with_their_headings() -> None:
    """As docs/operations/alerts.md#cdcabsent, in code, alerts, manifests and messages; the site checks its links."""
    missing = []
    for path in project_files():
        if path.suffix in {".svg", ".png"}:
            continue
        for page, heading in re.findall(
            r"\b(docs/[\w./-]+\.md)(?:#([\w-]+))?", path.read_text("utf-8", errors="replace")
        ):
            found = (ROOT / page).read_text("utf-8") if (ROOT / page).exists() else None
            if found is None or (heading and heading not in _anchors(found)):
                missing.append(f"{name(path)}: {page}#{heading}")
    assert missing == []


def test_every_room_of_the_package_is_in_the_architecture() -> None:
    rooms = {f"{path.parent.name}/" for path in (ROOT / "cdc").glob("*/__init__.py")}
    page = (ROOT / "docs/explanation/architecture.md").read_text("utf-8")
    assert rooms == set(re.findall(r"^\| `(\w+/)` \|", page, re.MULTILINE))


def test_files_that_the_documents_name_exist() -> None:
    named = set(
        re.findall(r"\b((?:(?:cdc|tests|sql|deploy|examples)/[\w/-]+|test_\w+)\.(?:py|sql|yaml))", _documents())
    )
    known = [name(path) for path in project_files()]
    assert {one for one in named if not any(f"/{path}".endswith(f"/{one}") for path in known)} == set()


def _anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z]+)", _documents(), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named - targets == set()


def test_commands_in_the_documents_exist() -> None:
    """``cdc slot create`` at the start of an indented line or of an inline code."""
    named = re.findall(r"(?:^ {4}|`|^\$ )cdc((?: [a-z][a-z-]*)+)", _documents(), re.MULTILINE)
    unknown = {" ".join(words.split()) for words in named if not _resolves(words.split())}
    assert unknown == set()


def _resolves(words: list[str]) -> bool:
    """Whether the words lead to a command. What follows a command that is no group are its arguments."""
    command: click.Command | None = root_command
    context = click.Context(root_command, info_name="cdc")
    for word in words:
        if not isinstance(command, click.Group):
            return True
        group, command = command, command.get_command(context, word)
        if command is None:
            return hasattr(group, "default")
    return True


def test_every_command_explains_itself() -> None:
    context = click.Context(root_command, info_name="cdc")
    for command in root_command.list_commands(context):
        found = root_command.get_command(context, command)
        assert found is not None
        assert found.get_help(click.Context(found, info_name=command)).startswith("Usage:"), command


def test_variables_in_the_documents_are_settings() -> None:
    known = {setting.variable for setting in SETTINGS.values()}
    known |= {f"{setting.variable}_FILE" for setting in SETTINGS.values() if setting.secret}
    known |= {"CDC_CONFIG", "CDC_TEST_DSN", "CDC_REQUIRE_PG", "CDC_REQUIRE_PROMETHEUS", "CDC_REQUIRE_DOCKER"}
    assert set(re.findall(r"\bCDC_[A-Z_]*[A-Z]", _documents())) - known == set()


def test_decisions_are_numbered_and_listed_in_that_order() -> None:
    folder = ROOT / "docs" / "adr"
    files = sorted(path.name for path in folder.glob("0*.md"))
    assert len({name[:4] for name in files}) == len(files)
    listed = re.findall(r"^\| (\d+) \| \[.*\]\((.*)\) \|$", (folder / "index.md").read_text(), re.MULTILINE)
    assert [(f"{int(number):04}", name) for number, name in listed] == [(name[:4], name) for name in files]
