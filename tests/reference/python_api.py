"""docs/reference/python-api.md, from the docstrings of what authors of handlers and tests import."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import cdc
from cdc import sinks, testing
from cdc.app import consumers
from tests.reference.markdown import WRITTEN, code, prose, table

_HEAD = f"""\
# Python API

{WRITTEN}
`import cdc` is all that an author of handlers needs; it loads neither the database driver nor an event loop.
`cdc.sinks` sends to brokers, `cdc.testing` is for tests. What is not on this page is not public: it may change in any
release.
"""
_WHERE_IT_IS = {"run": consumers.run}
"""What the package loads only when it is called."""


def page() -> str:
    parts = [_HEAD, "\n## cdc\n"]
    parts += [_entry(f"cdc.{name}", _WHERE_IT_IS.get(name) or getattr(cdc, name)) for name in cdc.__all__]
    parts += ["\n## cdc.sinks\n\n", prose((sinks.__doc__ or "").partition("\n\n")[0]), "\n"]
    parts += [_entry(f"cdc.sinks.{name}", found) for name, found in _public(sinks)]
    parts += ["\n## cdc.testing\n"]
    parts += [_entry(f"cdc.testing.{name}", found) for name, found in _public(testing)]
    return "".join(parts)


def _public(module: Any) -> Iterator[tuple[str, Any]]:
    """What it defines, in the order of the source."""
    for name, found in vars(module).items():
        if not name.startswith("_") and getattr(found, "__module__", None) == module.__name__:
            yield name, found


def _entry(name: str, found: Any) -> str:
    if not inspect.isclass(found):
        is_async = "async " if inspect.iscoroutinefunction(found) else ""
        return f"\n### {name}\n\n```python\n{is_async}{_signature(name, found)}\n```\n\n{_docstring(found)}\n"
    text = f"\n### {name}\n\n{_docstring(found)}\n"
    if issubclass(found, enum.StrEnum):
        return text + f"\nOne of {', '.join(code(value) for value in found)}; each compares equal to its text.\n"
    if dataclasses.is_dataclass(found):
        fields = [[code(field.name), code(field.type), _default(field)] for field in dataclasses.fields(found)]
        text += "\n" + table(["field", "type", "default"], fields)
    elif "__init__" in vars(found):
        text += f"\n```python\n{_signature(name, found)}\n```\n"
    return text + "".join(_member(found, attribute) for attribute in vars(found) if not attribute.startswith("_"))


def _member(owner: type, name: str) -> str:
    member = inspect.getattr_static(owner, name)
    if isinstance(member, property) and member.fget is not None and inspect.getdoc(member.fget):
        return f"\n`{name}`: {_docstring(member.fget)}\n"
    if isinstance(member, FunctionType) and inspect.getdoc(member):
        return f"\n```python\n{_signature(name, member)}\n```\n\n{_docstring(member)}\n"
    return ""


class _Text(str):
    """An annotation as it is written, without quotes around it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _signature(name: str, found: Any) -> str:
    """On one line where it fits into 100 letters, else a line for each parameter."""
    signature = inspect.signature(found)
    shown = [
        one.replace(annotation=_Text(one.annotation)) for one in signature.parameters.values() if one.name != "self"
    ]
    returned = _Text(signature.return_annotation)
    one_line = f"{name}{signature.replace(parameters=shown, return_annotation=returned)}"
    if len(one_line) <= 100:
        return one_line
    head, _, rest = one_line.partition("(")
    inside, _, tail = rest.rpartition(")")
    return f"{head}(\n    " + re.sub(r", (?=\*|\w+:)", ",\n    ", inside) + f",\n){tail}"


def _default(field: dataclasses.Field[Any]) -> str:
    return "" if field.default is dataclasses.MISSING else code(field.default)


def _docstring(found: Any) -> str:
    text = prose(inspect.cleandoc((vars(found).get("__doc__") if inspect.isclass(found) else found.__doc__) or ""))
    return re.sub(r"((?:^(?:>>>|\.\.\.) .*\n?)+)", r"```pycon\n\1\n```\n", text, flags=re.MULTILINE).strip()
