"""What captures: one trigger on a table, and what a second `cdc track` makes of it. Values and decisions; pure.

An option that is not named stays as the trigger has it. A change that captures less than before, or more, is a loss:
the caller decides whether it is intended.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from cdc.core.errors import UsageError
from cdc.core.model import CAPTURED, Operation

LISTS, FLAGS = ("key", "exclude", "columns"), ("virtual", "handled", "schema_in_key")
"""Options of capture_entity_change() that are set here. Any other option of a trigger is kept as it is."""
SCHEMA = "{schema}"
"""Stands for the name of the table's schema, in the entity type that is asked for."""
DOCUMENTED_TYPES: Mapping[str, str] = {
    "whatsapp_message_reactions": "reaction",
    "whatsapp_messages": "message",
    "tasks": "task",
}
"""Entity types by the table's name, as default_entity_type() gives them to a trigger without one."""


class Fires(StrEnum):
    """Which writes fire the trigger: the application's, rows that replication brings, both, or none."""

    ORIGIN = "origin"
    ALWAYS = "always"
    REPLICA = "replica"
    DISABLED = "disabled"


class Truncate(StrEnum):
    """What a TRUNCATE of the table is: a change of its own, an error, or nothing that is captured."""

    EVENT = "event"
    REFUSE = "refuse"
    IGNORE = "ignore"


class Ddl(StrEnum):
    """What DDL that changes the table's columns or its name is: a change of its own, or nothing that is captured."""

    EVENT = "event"
    IGNORE = "ignore"


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncateTrigger:
    """A statement trigger that calls capture_truncate(). ``entity_type`` "": that by the table's name."""

    trigger: str
    entity_type: str
    does: Truncate
    fires: Fires = Fires.ORIGIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """The copy on one partition that PostgreSQL makes of a partitioned table's trigger."""

    namespace: str
    name: str
    spelt: str
    trigger: str
    fires: Fires


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """One capturing trigger. ``table`` is spelt for SQL; an empty ``key`` is looked up at each capture."""

    table: str
    trigger: str
    operations: tuple[Operation, ...]
    entity_type: str | None
    key: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    """The captured columns; empty: all that are not excluded."""
    virtual: bool = False
    """Virtual generated columns are captured with their value, not as null."""
    handled: bool = False
    """Writers may declare by the setting cdc.handled that they handle a change themselves; no handler gets it."""
    schema_in_key: bool = False
    """The key says the schema first: it tells the rows of one table in many schemas apart."""
    function: str = field(default="", compare=False)
    """The name of its function, where that is made for the table; "": capture_entity_change()."""
    fires: Fires = Fires.ORIGIN
    all_schemas: str = ""
    """The pattern by which the table of this name is tracked in each schema that matches."""
    type_template: str = ""
    """The entity type as it was asked for with that pattern, with ``SCHEMA`` in it."""
    ours: bool = True
    """False for a trigger made by hand."""
    more: tuple[tuple[str, str], ...] = ()
    """Further options, each with its JSON."""
    truncate: Truncate = Truncate.IGNORE
    ddl: Ddl = Ddl.IGNORE
    update_of: tuple[str, ...] = ()
    """An UPDATE is captured if it sets one of these; empty: any."""
    when: str = ""
    """The condition of its WHEN, as SQL. Out of the catalogs it has names that are valid on any search_path."""
    broken: str = ""
    """Why every write that it should capture fails, whatever the table's columns are."""
    missing: tuple[str, ...] = ()
    """Columns that its options name and the table does not have."""
    oid: int = field(default=0, compare=False)
    """The table's; what follows describes the table's place:"""
    namespace: str = field(default="", compare=False)
    name: str = field(default="", compare=False)
    root: str = field(default="", compare=False)
    """The name of the partitioned table it belongs to, or its own."""
    above: tuple[int, ...] = field(default=(), compare=False)
    """Oids of the partitioned tables above it."""
    earlier: tuple[str, ...] = field(default=(), compare=False)
    """Other AFTER ROW triggers that fire before it."""
    copies: tuple[Copy, ...] = field(default=(), compare=False)
    truncates: tuple[TruncateTrigger, ...] = field(default=(), compare=False)
    """Those that the table has."""

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the options that it has."""
        ours = [name for name in (*LISTS, *FLAGS) if getattr(self, name)]
        return (*ours, *(name for name, _ in self.more))

    @property
    def key_text(self) -> str:
        """The key for a reader: ``{schema}/order_id,line``; "" if it is looked up at each capture."""
        return (f"{SCHEMA}/" if self.schema_in_key and self.key else "") + named(self.key)

    @property
    def only(self) -> str:
        """Its conditions, as SQL: ``UPDATE OF a``, ``WHEN (...)``."""
        narrowed = [f"UPDATE OF {', '.join(named([column]) for column in self.update_of)}"] if self.update_of else []
        return " ".join([*narrowed, *([f"WHEN ({self.when})"] if self.when else [])])

    @property
    def enabled(self) -> bool:
        """Whether the application's writes fire it."""
        return self.fires in (Fires.ORIGIN, Fires.ALWAYS)

    @property
    def effective_type(self) -> str:
        """The entity type of what it captures."""
        return self.entity_type or self.default_type

    @property
    def default_type(self) -> str:
        """The entity type by the table's name."""
        return DOCUMENTED_TYPES.get(self.root, self.root)

    @property
    def off(self) -> tuple[Copy, ...]:
        """Partitions in which the application's writes do not fire it, while they do in others."""
        silent = (Fires.DISABLED, Fires.REPLICA)
        return tuple(copy for copy in self.copies if copy.fires in silent and self.enabled)

    def captures(self, column: str) -> bool:
        return column not in self.exclude and (not self.columns or column in self.columns)

    def as_json(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "trigger": self.trigger,
            "operations": [operation.lower() for operation in self.operations],
            "entity_type": self.entity_type,
            "key": list(self.key),
            "exclude": list(self.exclude),
            "columns": list(self.columns),
            "virtual": self.virtual,
            "handled": self.handled,
            "schema_in_key": self.schema_in_key,
            "all_schemas": self.all_schemas or None,
            "enabled": self.enabled,
            "fires": self.fires,
            "disabled_partitions": [copy.spelt for copy in self.off],
            "missing": list(self.missing),
            "truncate": self.truncate,
            "ddl": self.ddl,
            "update_of": list(self.update_of),
            "when": self.when,
            "only": self.only,
            "ours": self.ours,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignCast:
    """A cast to JSON of a column's type, whose function's owner is neither a superuser nor the outbox's owner."""

    column: str
    type: str
    function: str
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTable:
    """A table as the catalogs describe it."""

    oid: int
    namespace: str
    name: str
    spelt: str
    kind: str
    """pg_class.relkind."""
    root: str | None
    """The partitioned table that it is a part of."""
    columns: tuple[str, ...]
    types: tuple[str, ...] = ()
    """Of its columns, those of elements for arrays: the server's own by their names in pg_type, any other as ""."""
    virtual: tuple[str, ...] = ()
    """Generated columns that are not stored."""
    primary_key: tuple[str, ...] = ()
    unique_keys: tuple[frozenset[str], ...] = ()
    """Sets of NOT NULL columns whose values are unique."""
    children: tuple[str, ...] = ()
    """Tables that inherit from it and have no capturing trigger."""
    row_security: bool = False
    unlogged: bool = False
    subscribed: bool = False
    """A subscription writes it."""
    casts: tuple[ForeignCast, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options named; None stays as it is, or gets its default. ``entity_type`` "": that by the table's name.

    ``update_of`` counts where ``operations`` are named, and None is then any column. ``when`` "": no condition.
    ``shared_key``: a table of this name in another schema may have the same type, since a key means the same there.
    """

    entity_type: str | None = None
    operations: tuple[Operation, ...] | None = None
    truncate: Truncate | None = None
    ddl: Ddl | None = None
    update_of: tuple[str, ...] | None = None
    when: str | None = None
    key: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None
    always: bool | None = None
    handled: bool | None = None
    schema_in_key: bool | None = None
    all_schemas: str | None = None
    shared_key: bool = False


def arguments(wanted: Tracked) -> tuple[str, str]:
    """The two arguments of capture_entity_change(): entity type ("" = by the table's name) and options."""
    lists = {name: list(value) for name in LISTS if (value := getattr(wanted, name)) or name == "key"}
    flags = {name: True for name in FLAGS if getattr(wanted, name)}
    options = {**lists, **flags, **{name: json.loads(text) for name, text in wanted.more}}
    return wanted.entity_type or "", json.dumps(options, ensure_ascii=False)


def remembered(wanted: Tracked) -> str:
    """The third argument, which the function for rows does not read: how the table came to be tracked, and whether its
    DDL is captured, which capture_ddl() reads. "" for none.
    """
    kept = {"schemas": wanted.all_schemas} if wanted.all_schemas else {}
    kept |= {"type": wanted.type_template} if kept and wanted.type_template else {}
    kept |= {"ddl": wanted.ddl.value} if wanted.ddl == Ddl.EVENT else {}
    return json.dumps(kept) if kept else ""


def all_arguments(wanted: Tracked) -> list[str]:
    return [*arguments(wanted), *filter(None, [remembered(wanted)])]


def read_remembered(text: str) -> dict[str, Any]:
    """Fields of Tracked out of the third argument; none where somebody else wrote it."""
    try:
        kept = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    fields = {"all_schemas": "schemas", "type_template": "type"}
    known = kept if isinstance(kept, dict) else {}
    read: dict[str, Any] = {field: known[name] for field, name in fields.items() if isinstance(known.get(name), str)}
    return read | ({"ddl": Ddl.EVENT} if known.get("ddl") == Ddl.EVENT else {})


def read_options(text: str) -> dict[str, Any]:
    """Fields of Tracked out of the second argument of its trigger. ``broken`` says why it cannot be read."""
    try:
        named = json.loads(text) if text else {}
        if not isinstance(named, dict):
            return {"broken": "its options are no JSON object"}
        more = tuple((name, json.dumps(value)) for name, value in named.items() if name not in (*LISTS, *FLAGS))
    except (ValueError, RecursionError):
        return {"broken": "its options are no JSON"}
    lists = {name: named[name] for name in LISTS if name in named}
    for name, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(column, str) for column in value):
            return {"broken": f"its option {name} is no list of columns"}
    # As the function reads it: any value but true is false.
    flags: dict[str, Any] = {name: True for name in FLAGS if named.get(name) is True}
    return {name: tuple(value) for name, value in lists.items()} | flags | {"more": more}


def matches(pattern: str, schema: str) -> bool:
    """``*`` is any characters, ``?`` one, ``[ab]`` and ``[!ab]`` one of some; all others are themselves."""
    return fnmatchcase(schema, pattern)


def decide(
    source: SourceTable, present: Sequence[Tracked], asked: Asked, trigger: str, like: Sequence[Tracked] = ()
) -> Tracked:
    """The trigger that ``source`` shall have. Raises UsageError for options that do not fit the table or each other.

    ``present``: the triggers that capture it already. ``like``: those of the same table in other schemas, whose
    options it gets where there are none; but no condition, which may be code of the owner of one of them.
    """
    before = _common(source, present or [_templated(each) for each in like], asked)
    if before.when and not present and asked.when is None:
        raise UsageError(
            f"{source.spelt} would be tracked as {like[0].table} is, with its WHEN ({before.when})",
            hint="that is SQL, and the writers of this table would run it; name it: --when SQL, or --when '' for none",
        )
    exclude, columns = _shown(asked, before)
    key = asked.key if asked.key is not None else before.key
    update_of = before.update_of if asked.operations is None else asked.update_of or ()
    for option, named in (("key", key), ("exclude", exclude), ("columns", columns), ("update_of", update_of)):
        _refuse_missing(source, option, named, said=getattr(asked, option) is not None)
    entity_type = (asked.entity_type if asked.entity_type is not None else before.entity_type) or ""
    template = asked.entity_type if asked.entity_type is not None else before.type_template
    all_schemas = before.all_schemas if asked.all_schemas is None else asked.all_schemas
    wanted = Tracked(
        table=source.spelt,
        trigger=trigger,
        operations=tuple(each for each in CAPTURED if each in (asked.operations or before.operations)),
        entity_type=entity_type.replace(SCHEMA, source.namespace) or None,
        key=tuple(dict.fromkeys(key)) or _default_key(source),
        exclude=tuple(dict.fromkeys(exclude)),
        columns=tuple(dict.fromkeys(columns)),
        truncate=before.truncate if asked.truncate is None else asked.truncate,
        ddl=before.ddl if asked.ddl is None else asked.ddl,
        update_of=tuple(dict.fromkeys(update_of)),
        when=before.when if asked.when is None else asked.when,
        fires=_fires(asked.always, before.fires),
        handled=before.handled if asked.handled is None else asked.handled,
        schema_in_key=before.schema_in_key if asked.schema_in_key is None else asked.schema_in_key,
        all_schemas=all_schemas,
        type_template=template if all_schemas and SCHEMA in template else "",
        more=before.more,
        root=source.name,
        oid=source.oid,
        namespace=source.namespace,
        name=source.name,
    )
    _check_key(source, wanted)
    # The type is written out, also where it is the table's name: a table that is renamed keeps its type.
    wanted = replace(wanted, entity_type=wanted.effective_type)
    return replace(wanted, virtual=any(wanted.captures(column) for column in source.virtual))


def losses(source: SourceTable, before: Tracked, wanted: Tracked) -> Iterator[str]:
    """What ``wanted`` would not keep, a clause each. Columns that the table does not have are lost already."""
    if before.entity_type not in (None, before.default_type, wanted.entity_type):
        yield f"its type {before.entity_type} would become {wanted.effective_type}"
    if before.key and before.key != wanted.key and not set(before.key) - set(source.columns):
        yield f"its key {named(before.key)} would become {named(wanted.key)}"
    if before.schema_in_key != wanted.schema_in_key:
        yield f"its key {before.key_text or 'by table'} would become {wanted.key_text}"
    opened = [column for column in source.columns if wanted.captures(column) and not before.captures(column)]
    shown = [column for column in opened if column not in wanted.columns]  # naming a column is consent
    if shown:
        yield f"{named(shown)}, left out until now, would be captured"
    hidden = [column for column in before.columns if column in source.columns and not wanted.captures(column)]
    if hidden:
        yield f"{named(hidden)} would be captured no more"
    if set(before.update_of) - set(wanted.update_of):
        now = f"become UPDATE OF {named(wanted.update_of)}" if wanted.update_of else "go"
        yield f"its UPDATE OF {named(before.update_of)} would {now}"
    if before.when and before.when != wanted.when:
        yield f"its WHEN ({before.when}) would " + (f"become WHEN ({wanted.when})" if wanted.when else "go")


def described(tracked: Tracked) -> str:
    """For a sentence, ``insert,delete; key id; type order; without card``."""
    parts = [",".join(tracked.operations).lower(), f"key {tracked.key_text or 'by table'}"]
    parts += [f"type {tracked.entity_type}"] if tracked.entity_type else []
    parts += [f"only {named(tracked.columns)}"] if tracked.columns else []
    parts += [f"without {named(tracked.exclude)}"] if tracked.exclude else []
    parts += ["writers may handle changes themselves"] if tracked.handled else []
    parts += [f"truncate {tracked.truncate}"] if tracked.truncate != Truncate.IGNORE else []
    parts += [f"ddl {tracked.ddl}"] if tracked.ddl != Ddl.IGNORE else []
    parts += [tracked.only] if tracked.only else []
    parts += [f"fires {tracked.fires}"] if tracked.fires != Fires.ORIGIN else []
    return "; ".join(parts)


def named(columns: Sequence[str]) -> str:
    """Joined by commas; in quotes where a name would be read as several or as another."""
    return ",".join(
        '"' + column.replace('"', '""') + '"'
        if "," in column or column != column.strip() or column[:1] == '"'
        else column
        for column in columns
    )


def _common(source: SourceTable, present: Sequence[Tracked], asked: Asked) -> Tracked:
    """The present triggers, as one. Raises UsageError for an option in which several differ, unless it is named."""
    if not present:
        return Tracked(table=source.spelt, trigger="", operations=CAPTURED, entity_type=None)
    first, *others = present
    for other in others:
        for option in ("entity_type", "key", "exclude", "columns", "handled", "schema_in_key", "update_of", "when"):
            left = asked.operations is None if option == "update_of" else getattr(asked, option) is None
            if left and getattr(first, option) != getattr(other, option):
                flag = {"entity_type": "--type", "update_of": "--on"}.get(option, f"--{option.replace('_', '-')}")
                by = f"is captured by {first.trigger} and {other.trigger}"
                if first.oid != source.oid:
                    by = f"would be tracked as {first.table} and {other.table} are"
                raise UsageError(
                    f"{source.spelt} {by}, which differ in {flag}",
                    hint=f"name it: {flag}" + (f" or --no-{flag[2:]}" if option in FLAGS else " ..."),
                )
    operations = {operation for each in present for operation in each.operations}
    more = () if first.broken else first.more
    return replace(first, operations=tuple(each for each in CAPTURED if each in operations), more=more)


def _templated(like: Tracked) -> Tracked:
    return replace(like, entity_type=like.type_template or like.entity_type)


def _shown(asked: Asked, before: Tracked) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``exclude`` and ``columns``, of which at most one is set: naming one replaces the other."""
    if asked.exclude and asked.columns:
        raise UsageError("--columns names all that is captured, and --exclude what is not", hint="name one of them")
    exclude = asked.exclude if asked.exclude is not None else () if asked.columns else before.exclude
    columns = asked.columns if asked.columns is not None else () if asked.exclude else before.columns
    return exclude, columns


def _fires(always: bool | None, before: Fires) -> Fires:
    if always is None:
        return before if before in (Fires.ALWAYS, Fires.REPLICA) else Fires.ORIGIN
    return Fires.ALWAYS if always else Fires.ORIGIN


def _default_key(source: SourceTable) -> tuple[str, ...]:
    chosen = ("id",) if "id" in source.columns else source.primary_key
    if not chosen:
        raise UsageError(
            f"{source.spelt} has neither a column id nor a primary key to tell its rows apart",
            hint="name the columns that do: --key col[,col]",
        )
    return chosen


def _check_key(source: SourceTable, wanted: Tracked) -> None:
    hidden = [column for column in wanted.key if not wanted.captures(column)]
    if hidden:
        raise UsageError(
            f"column {hidden[0]} is in the key of {source.spelt}, so it cannot be left out",
            hint="choose another --key, or do not leave it out: the key is written into each change as entity_id",
        )
    uncomputed = [column for column in wanted.key if column in source.virtual]
    if uncomputed:
        raise UsageError(
            f"column {uncomputed[0]} of {source.spelt} is a virtual generated column, which has no value when triggers"
            " fire",
            hint="choose another --key, or make the column STORED",
        )


def _refuse_missing(source: SourceTable, option: str, columns: Sequence[str], *, said: bool) -> None:
    for column in columns:
        if column in source.columns:
            continue
        if not said:
            raise UsageError(
                f"{source.spelt} has no column {column} any more, which its --{option} names",
                hint=f"name it again: --{option} ...; its columns: {', '.join(source.columns)}",
            )
        near = difflib.get_close_matches(column.lower(), {name.lower(): name for name in source.columns}, n=3)
        likely = [name for name in source.columns if name.lower() in near]
        raise UsageError(
            f"{source.spelt} has no column {column}",
            hint=f"did you mean {', '.join(likely)}?" if likely else f"its columns: {', '.join(source.columns)}",
        )
