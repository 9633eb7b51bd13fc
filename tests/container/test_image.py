"""The consumer's image, looked at from outside: what is in it, whom it runs as, how large it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cdc
from cdc.contrib.demo.temp_server import free_port
from tests.container.containers import run
from tests.container.images import CONSUMER, Bases, build, with_images

pytestmark = pytest.mark.timeout(900)  # whichever comes first has the images built

_OWN_BYTES_MAX = 100_000_000
"""What the image adds to its base: a third of it for the clients of the brokers, a tenth for the web interface."""
_LOOK_AROUND = """
import json, os, pathlib, shutil
tools = [tool for tool in ("cc", "gcc", "make", "pip") if shutil.which(tool, path="/venv/bin:/usr/bin")]
caches = [str(path) for path in (pathlib.Path.home() / ".cache", pathlib.Path("/wheel"), pathlib.Path("/source"),
                                 pathlib.Path("/build")) if path.exists()]
print(json.dumps({"tools": tools, "caches": caches, "pip": bool(list(pathlib.Path("/venv").rglob("pip")))}))
"""
_WRITE = """
import json, os, pathlib
written = []
for folder in ("/", "/app", "/tmp", "/var/tmp", "/venv/bin", pathlib.Path(json.__file__).parent):
    try:
        pathlib.Path(folder, "written").touch()
        written.append(str(folder))
    except OSError:
        pass
print(json.dumps({"user": os.getuid(), "groups": [os.getgid(), *os.getgroups()], "written": written}))
"""


@pytest.fixture(scope="session")
def image(images: Bases) -> dict[str, Any]:
    """What the engine knows about it."""
    attributes: dict[str, Any] = with_images(lambda all_of_them: all_of_them.get(CONSUMER).attrs)
    return attributes


def _python(code: str, **options: Any) -> Any:
    """What the code prints as JSON, run in the image."""
    ended_with, said = run(CONSUMER, "-c", code, entrypoint="python", **options)
    assert ended_with == 0, said
    return json.loads(said)


def test_the_process_is_the_consumer_itself_and_its_user_is_not_root(image: dict[str, Any]) -> None:
    config = image["Config"]
    assert (config["Entrypoint"], config["Cmd"]) == (["cdc"], ["run"]), "no shell between SIGTERM and the consumer"
    assert config["User"] == "65532:65532"
    assert list(config["ExposedPorts"]) == ["9464/tcp"]


def test_the_labels_describe_the_image(image: dict[str, Any]) -> None:
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in image["Config"]["Labels"].items()}
    assert (labels["title"], labels["licenses"], labels["version"]) == ("cdc", "MIT", cdc.__version__)
    assert labels["description"]
    assert labels["revision"]


def test_it_is_little_more_than_its_base(image: dict[str, Any], images: Bases) -> None:
    base = with_images(lambda all_of_them: all_of_them.get(images.python).attrs["Size"])
    assert image["Size"] - base < _OWN_BYTES_MAX


def test_what_it_was_built_with_is_not_in_it(image: dict[str, Any]) -> None:
    assert _python(_LOOK_AROUND, user="0") == {"tools": [], "caches": [], "pip": False}


def test_nothing_of_it_can_be_changed_by_its_user(image: dict[str, Any]) -> None:
    seen = _python(_WRITE)
    assert seen["user"] == 65532
    assert set(seen["groups"]) == {65532}
    assert set(seen["written"]) == {"/tmp", "/var/tmp"}, "and what anybody may write, a read-only root takes away"
    assert _python(_WRITE, read_only=True)["written"] == []


def test_the_authorities_of_the_system_are_found(image: dict[str, Any]) -> None:
    """By libpq with sslrootcert=system, whose own default leads nowhere."""
    found = _python(
        "import json, os, pathlib; print(json.dumps(pathlib.Path(os.environ['SSL_CERT_FILE']).stat().st_size))"
    )
    assert found > 10_000


def test_the_health_check_fails_where_nothing_answers(image: dict[str, Any]) -> None:
    _, *check = image["Config"]["Healthcheck"]["Test"]

    def ended_with(port: int) -> int:
        env = {"CDC_HTTP_PORT": str(port)}
        return run(CONSUMER, *check[1:], entrypoint=check[0], env=env, read_only=True)[0]

    assert ended_with(free_port()) == 1
    assert ended_with(0) == 0, "switched off"


def test_a_setting_that_is_wrong_ends_it_with_a_sentence(images: Bases) -> None:
    code, said = run(CONSUMER, "run", env={"CDC_WINDOWS": "5"}, read_only=True)
    assert code == 2
    assert "the variable CDC_WINDOWS is not a setting" in said
    assert "Traceback" not in said


def test_handlers_can_be_built_in(images: Bases, tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text("import cdc\nrouter = cdc.Router()\n")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {CONSUMER}\nCOPY handlers.py /app/\nENV CDC_HANDLERS=handlers:router CDC_DSN='host=127.0.0.1 port=9'\n"
    )
    derived = build(tmp_path, "cdc-test/derived")
    try:
        code, said = run("cdc-test/derived", env={"CDC_HTTP_PORT": str(free_port())}, read_only=True)
    finally:
        derived.remove()
    assert "handlers: none" in said, "they were loaded"
    assert code == 3, "no database there"
