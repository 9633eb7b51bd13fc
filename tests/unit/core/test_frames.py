"""Where an error came from, told without a word of what it says."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from cdc.core.frames import Trace, trace
from cdc.engine.calls import call_here

_HERE = Path(__file__).name


def _failed(function: Callable[..., Any], *arguments: Any, of: Any = None) -> Trace:
    try:
        call_here(function, *arguments)
    except BaseException as error:
        _, _, here = sys.exc_info()
        assert here is not None
        return trace(error.with_traceback(here.tb_next), of)
    raise AssertionError("nothing was raised")


def _parses(_text: str = "{") -> None:
    json.loads(_text)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An application whose package is installed, and a library beside it."""
    for package, source in {
        "shop_app": "import shop_library\ndef handle(change):\n    shop_library.call(change)\n",
        "shop_library": "def call(change):\n    raise ValueError(change)\n",
    }.items():
        folder = tmp_path / "lib" / "site-packages" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "lib" / "site-packages"))
    return __import__("shop_app")


def test_the_place_of_an_error_in_the_standard_library_is_the_line_that_called_it() -> None:
    found = _failed(_parses)
    assert found.error == "JSONDecodeError"
    assert found.own
    assert found.place is not None
    assert found.place.endswith(f"{_HERE}:{_parses.__code__.co_firstlineno + 1} in _parses")
    assert found.place in found.frames
    assert "json/decoder.py" in found.frames[-1]
    assert not any("cdc/engine/calls.py" in frame for frame in found.frames), "what is around every call says nothing"


def test_the_place_is_not_in_an_installed_library_but_in_the_handlers_own_installed_package(
    installed: ModuleType,
) -> None:
    found = _failed(installed.handle, "Ada", of=installed.handle)
    assert str(found.place).endswith("shop_app/__init__.py:3 in handle")
    assert found.frames[-1].endswith("shop_library/__init__.py:2 in call")
    by_a_file = _failed(lambda: installed.handle("Ada"), of=_parses)
    assert _HERE in str(by_a_file.place)
    assert "Ada" not in str((found, by_a_file))


def test_without_a_line_of_its_own_the_place_is_the_innermost_frame(installed: ModuleType) -> None:
    found = _failed(installed.handle, "Ada")
    assert (found.own, found.place) == (False, found.frames[-1])
    assert trace(ValueError("never raised")) == Trace("ValueError")
    assert str(trace(ValueError("never raised"))) == "ValueError"


def _deeper(depth: int, at_the_end: Callable[[], object]) -> None:
    if depth:
        _deeper(depth - 1, at_the_end)
    else:
        at_the_end()


def test_of_many_frames_the_first_and_the_last_are_shown_and_the_number_of_the_others() -> None:
    found = _failed(_deeper, 500, _parses)
    assert len(found.frames) == 17
    [gap] = [frame for frame in found.frames if frame.startswith("... ")]
    assert 480 < int(gap.split()[1]) < 500
    assert found.frames.index(gap) == 4
    assert str(found.place).endswith("in _parses")


def _generated(name: str, file: str) -> Callable[[], None]:
    code = compile("def f():\n    raise ValueError('row')", file, "exec").co_consts[0]
    return FunctionType(code.replace(co_name=name, co_qualname=name), {})


@pytest.mark.parametrize("character", ["a", "ü", "\x1b", "\n", "\U0001f600", "\ud800", "\u202e"])
def test_frames_of_generated_code_are_bounded_and_printable(character: str) -> None:
    function = _generated(character * 100_000, character * 100_000)
    found = _failed(_deeper, 30, function)
    told = "".join(found.frames)
    assert told.isprintable()
    assert len(told.encode()) < 17 * 200


def test_what_is_generated_is_not_the_place() -> None:
    found = _failed(_deeper, 0, _generated("f", "<string>"))
    assert str(found.place).endswith("in _deeper")
    assert found.frames[-1] == "<string>:2 in f"


def _wraps() -> None:
    try:
        _parses()
    except ValueError as error:
        raise LookupError("row") from error


async def _in_a_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_fails())


async def _fails() -> None:
    _wraps()


def test_what_an_error_was_raised_from_and_the_first_of_a_group_are_shown_below() -> None:
    assert _failed(_wraps).frames[-1].startswith("from JSONDecodeError at ")
    assert _failed(_wraps).frames[-1].endswith(" in _parses")
    found = _failed(lambda: asyncio.run(_in_a_group()))
    assert (found.error, str(found.place).endswith(" in _in_a_group")) == ("ExceptionGroup", True)
    assert found.frames[-2].startswith("from LookupError at ")
    assert found.frames[-2].endswith(" in _wraps")
    assert found.frames[-1].startswith("from JSONDecodeError at ")


def test_causes_without_an_end_are_cut() -> None:
    first, second = ValueError(), LookupError()
    first.__cause__, second.__cause__ = second, first
    assert trace(first).frames == ("from LookupError", "from ValueError", "from LookupError")


class _Meta(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("in the name of a class")


class _HostileError(Exception, metaclass=_Meta):
    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("in a traceback")


def test_an_error_that_lies_about_itself_is_described_all_the_same() -> None:
    def raises() -> None:
        raise _HostileError

    found = _failed(raises)
    assert found.error == "_HostileError"
    assert str(found.place).endswith("in raises")
    long = trace(type("E" * 1_000_000, (Exception,), {})())
    assert len(long.error) == 100


class _UnnamedModule:
    @property
    def __module__(self) -> str:  # type: ignore[override]
        raise RuntimeError("in a module's name")


def test_a_function_that_cannot_be_looked_at_costs_the_place_only() -> None:
    assert _failed(_parses, of=_UnnamedModule()).error == "an error that cannot be read (RuntimeError)"
