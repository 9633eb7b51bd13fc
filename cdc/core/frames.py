"""Where an error came from, or what a thread does: frames, and never a text, a value or a line of source. Pure.

The *place* is the innermost frame of the handler's own code: neither cdc's, nor the standard library's, nor an
installed package's, unless the handler's function is of that package. So an error inside a library names the line that
called the library.

A handler makes the error: none of its methods is called, and every text it holds is cut and made printable.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from cdc.core.printable import printable

_FIRST, _LAST = 4, 12
"""Frames shown: the outermost, the innermost, and the place between them."""
_FILE_MAX, _FUNCTION_MAX, _NAME_MAX = 120, 60, 100
"""Bytes."""
_WALK_MAX = 100_000
"""Frames walked, which takes some milliseconds: the innermost of more are not found."""
_CAUSES_MAX = 3

_OURS, _STANDARD = (f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(os.__file__).parent))
_INSTALLED = tuple(f"{os.sep}{folder}{os.sep}" for folder in ("site-packages", "dist-packages"))


class Trace(NamedTuple):
    """``error``: the class's name. ``place`` and ``frames``: ``file:line in function``, the innermost frame last.

    Below them, as ``from KeyError at ...``: what it was raised from, or the first error of a group, and so on.

    ``own``: the place is in the handler's own code; else it is the innermost frame, None if there is none.
    """

    error: str
    place: str | None = None
    frames: tuple[str, ...] = ()
    own: bool = False

    def __str__(self) -> str:
        return f"{self.error} at {self.place}" if self.place else self.error


def trace(error: BaseException, function: Any = None) -> Trace:
    """``function``: the handler's, whose package is its own code wherever it is installed."""
    try:
        package = _package(getattr(function, "__module__", None))
        found = _alone(error, package)
        causes = (f"from {_alone(cause, package)}" for cause in _causes(error))
        return found._replace(frames=(*found.frames, *causes))
    except BaseException as unreadable:  # noqa: BLE001 - what is hostile about it must not take its outcome away
        return Trace(f"an error that cannot be read ({type(unreadable).__name__})")


def doing(innermost: FrameType) -> Sequence[str]:
    """What a thread does, by its innermost frame: the frames of what cdc has called, else of all; that one last."""
    frames: list[str] = []
    at: FrameType | None = innermost
    while at is not None and len(frames) < _LAST:
        if frames and at.f_code.co_filename.startswith(_OURS):
            break
        frames.append(_shown(at, at.f_lineno))
        at = at.f_back
    return frames[::-1]


def class_name(error: BaseException) -> str:
    """The name that Python keeps, whatever the metaclass says."""
    name: str = vars(type)["__name__"].__get__(type(error))
    return name


def _alone(error: BaseException, package: str | None) -> Trace:
    found: TracebackType | None = _of(BaseException, "__traceback__", error)
    begin = next((each for each in _walk(found) if not _is_ours(each)), found)
    return _trace(_head(class_name(error), _NAME_MAX), begin, package)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Without ``__context__``: that may be an error which is being handled around the call."""
    at: BaseException | None = error
    for _ in range(_CAUSES_MAX):
        is_group = issubclass(type(at), BaseExceptionGroup)
        at = _of(BaseExceptionGroup, "exceptions", at)[0] if is_group else _of(BaseException, "__cause__", at)
        if at is None:
            return
        yield at


def _of(of: type, name: str, error: BaseException | None) -> Any:
    """An attribute as Python keeps it: a class may define a property of that name."""
    return vars(of)[name].__get__(error)


def _trace(name: str, begin: TracebackType | None, package: str | None) -> Trace:
    first: list[tuple[int, TracebackType]] = []
    last: deque[tuple[int, TracebackType]] = deque(maxlen=_LAST)
    own = None
    for number, each in enumerate(_walk(begin)):
        (first if number < _FIRST else last).append((number, each))
        if _is_own(each, package):
            own = number, each
    shown = dict([*first, *([own] if own else []), *last])
    if not shown:
        return Trace(name)
    frames: list[str] = []
    after = 0
    for number in sorted(shown):
        if number > after:
            frames.append(f"... {number - after:,} more")
        frames.append(_shown(shown[number].tb_frame, shown[number].tb_lineno))
        after = number + 1
    place = _shown(own[1].tb_frame, own[1].tb_lineno) if own else frames[-1]
    return Trace(name, place, tuple(frames), own is not None)


def _walk(begin: TracebackType | None) -> Iterator[TracebackType]:
    def each() -> Iterator[TracebackType]:
        at = begin
        while at is not None:
            yield at
            at = at.tb_next

    return islice(each(), _WALK_MAX)


def _is_ours(at: TracebackType) -> bool:
    return at.tb_frame.f_code.co_filename.startswith(_OURS)


def _is_own(at: TracebackType, package: str | None) -> bool:
    path = at.tb_frame.f_code.co_filename
    if path.startswith((_OURS, "<")):  # generated code has no line to look at
        return False
    if not path.startswith(_STANDARD) and not any(folder in path for folder in _INSTALLED):
        return True
    return package is not None and package == _package(dict.get(at.tb_frame.f_globals, "__name__"))


def _package(module: object) -> str | None:
    return module.partition(".")[0] if isinstance(module, str) else None


def _shown(frame: FrameType, line: int) -> str:
    code = frame.f_code
    function = code.co_qualname[-1_000:].rpartition("<locals>.")[2]
    return f"{_tail(code.co_filename, _FILE_MAX)}:{line} in {_head(function, _FUNCTION_MAX)}"


def _head(text: str, bytes_max: int) -> str:
    shown = printable(text[:bytes_max]).encode()
    cut = len(text) > bytes_max or len(shown) > bytes_max
    return shown[: bytes_max - 3 if cut else bytes_max].decode("utf-8", "ignore") + ("..." if cut else "")


def _tail(text: str, bytes_max: int) -> str:
    """The end of a path identifies it."""
    shown = printable(text[-bytes_max:]).encode()
    cut = len(text) > bytes_max or len(shown) > bytes_max
    return ("..." if cut else "") + shown[-(bytes_max - 3 if cut else bytes_max) :].decode("utf-8", "ignore")
