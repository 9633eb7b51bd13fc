"""What the API takes and gives. The answers have the fields of the commands' ``--json``; a test compares them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from cdc.contrib.ui.operations import Operations
from cdc.core.errors import UsageError
from cdc.core.limits import PERMITS_MAX, Limit, check_handler, check_path
from cdc.core.units import parse_duration
from cdc.postgres.actions import BECAUSE_BYTES
from cdc.postgres.bulk import Wanted

Text = Annotated[str, StringConstraints(min_length=1, max_length=1_000, pattern=r"^[^\x00]*$")]
Because = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=BECAUSE_BYTES // 4,
                                           pattern=r"^[^\x00]*$")]  # fmt: skip
State = Literal["fresh", "waiting", "dead", "processed"]
Seq = Annotated[int, Field(ge=1, le=2**63 - 1)]
CHANGES_MAX = 1_000


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """What makes no sense is an answer of 422."""
    try:
        yield
    except UsageError as error:
        raise ValueError(str(error)) from None


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Filters(_Given):
    """Each narrows the others."""

    type: Text | None = Field(None, description="Of this entity type.")
    key: Text | None = Field(None, description="Of this entity.")
    handler: Text | None = Field(None, description="What this handler gets, where the handlers are known.")
    error: Text | None = Field(None, description="What error_summary begins with, such as the name of a class.")
    text: Text | None = Field(None, description="What the key or the error has in it.")
    since: datetime | None = Field(None, description="Changed at this time or later; in UTC if it has no zone.")
    until: datetime | None = Field(None, description="Changed before this time.")

    def wanted(self, operations: Operations) -> Wanted:
        """Raises UsageError for a handler that nobody knows."""
        return operations.wanted(
            handler=self.handler, entity_type=self.type, entity_id=self.key, error=self.error, text=self.text,
            since=self.since, until=self.until,
        )  # fmt: skip


class ChangesAsked(Filters):
    state: State = "dead"
    subscription: Text | None = Field(None, description="None: the default one.")
    limit: int = Field(50, ge=1, le=1_000)
    after: str | None = Field(None, max_length=100, description="`next` of the page before.")


class DecisionGiven(_Given):
    """Either changes by their numbers or ids, or all that match the filters."""

    changes: list[Seq | UUID] | None = Field(None, min_length=1, max_length=CHANGES_MAX)
    filters: Filters | None = Field(None, description="{} is all of them.")
    subscription: Text | None = Field(None, description="None: the default one.")
    because: Because = Field(description="Why: for the log of actions.")
    dry_run: bool = Field(False, description="Count them, and change nothing.")
    at_most: int = Field(10_000_000, ge=0, description="Where more match, nothing is done.")

    @model_validator(mode="after")
    def _names_or_describes(self) -> DecisionGiven:
        if (self.changes is None) == (self.filters is None):
            raise ValueError("either changes or filters")
        return self


class StateDecisionGiven(DecisionGiven):
    state: Literal["dead", "waiting"] = Field("dead", description="What filters find.")


class ReplayGiven(DecisionGiven):
    latest_per_key: bool = False
    unless_replayed_since: datetime | None = Field(
        None, description="Without those that were replayed since: to go on. Left out: now."
    )


class PauseTarget(_Given):
    """What is paused; all four left out: everything."""

    subscription: Text | None = None
    type: Text | None = None
    handler: Text | None = None
    key: Text | None = Field(None, description="Of a type, without a handler.")

    @model_validator(mode="after")
    def _fits_together(self) -> PauseTarget:
        if self.key is not None and (self.type is None or self.handler is not None):
            raise ValueError("a key is named with its type, and without a handler")
        if "*" in (self.type, self.handler):
            raise ValueError("* is no name here: left out, everything is paused")
        return self


class PauseGiven(PauseTarget):
    because: Because
    for_: str | None = Field(None, alias="for", description="It ends by itself after this time, such as 30m.")

    @model_validator(mode="after")
    def _is_a_duration(self) -> PauseGiven:
        _ = self.for_s
        return self

    @property
    def for_s(self) -> float | None:
        if self.for_ is None:
            return None
        with _as_value_errors():
            return parse_duration(self.for_)


class ResumeGiven(PauseTarget):
    all: bool = Field(False, description="Every pause.")
    because: Because


class LimitTarget(_Given):
    handler: Text = Field(description="Its name, as in metrics and logs.")
    subscription: Text | None = Field(None, description="None: in all.")

    @model_validator(mode="after")
    def _is_a_name(self) -> LimitTarget:
        with _as_value_errors():
            check_handler(self.handler)
        return self


class LimitGiven(LimitTarget):
    """A rate, `at_once`, or both."""

    rate: Annotated[str, StringConstraints(max_length=50)] | None = Field(
        None, description="Calls for a time, over all consumers: 14/s, 100/m, 1000/h."
    )
    burst: int | None = Field(None, ge=1, le=PERMITS_MAX, description="How many of them may come together.")
    at_once: int | None = Field(None, ge=1, le=PERMITS_MAX, description="How many may run at a time.")
    by: Text | None = Field(None, description="For each value of this by itself, such as new.tenant.")
    because: Because

    @model_validator(mode="after")
    def _is_a_limit(self) -> LimitGiven:
        _ = self.limit
        return self

    @property
    def limit(self) -> Limit:
        with _as_value_errors():
            return Limit(self.rate, self.burst, self.at_once, None if self.by is None else check_path(self.by))


class ClearGiven(_Given):
    """One limit, named as it was set, or all of them."""

    handler: Text | None = None
    subscription: Text | None = None
    all: bool = False
    because: Because

    @model_validator(mode="after")
    def _names_one_or_all(self) -> ClearGiven:
        if (self.handler is None) != self.all or (self.all and self.subscription is not None):
            raise ValueError("either a handler or all")
        return self


class BecauseGiven(_Given):
    because: Because


class DropGiven(BecauseGiven):
    number: int | None = Field(
        None, ge=1, le=2**15 - 1, description="Of the one that is meant: another one of its name is not dropped."
    )


class ChangeShape(BaseModel):
    seq: int
    id: UUID
    state: State
    blocked: bool
    blocked_by: int | None
    pauses_key: bool
    entity_type: str
    entity_id: str
    shard: int
    table_schema: str | None
    table: str
    operation: str
    changed_at: datetime | None
    error_count: int
    last_error: str | None
    error_summary: str | None
    error_kind: str | None
    subscription: int | None
    next_attempt_at: datetime | None
    processed_at: datetime | None
    dead_at: datetime | None
    caused_by: UUID | None
    depth: int
    replay_of: UUID | None


class Changes(BaseModel):
    """``next``: for ``after``, where there is more; ``complete``: these are all that match."""

    changes: list[ChangeShape]
    complete: bool
    next: str | None


class Link(BaseModel):
    seq: int
    id: UUID
    entity_type: str
    entity_id: str
    operation: str
    state: State
    changed_at: datetime | None
    caused_by: UUID | None
    replay_of: UUID | None


class AttemptMade(BaseModel):
    attempt: int
    subscription: str
    consumer: UUID | None
    handler: str | None
    started_at: datetime | None
    ended_at: datetime | None
    outcome: str
    kind: str
    error: str
    text: str
    frames: list[str]


class ChangeShown(ChangeShape):
    """``old``, ``new`` and ``metadata`` where they were asked for."""

    chain: list[Link]
    attempts: list[AttemptMade]
    old: Any = None
    new: Any = None
    metadata: Any = None


class OneChange(BaseModel):
    change: ChangeShown


class Decided(BaseModel):
    """``left``: what matched and is not decided about yet: ask again. ``others``: others have, or are at work."""

    matching: int
    done: int
    others: int
    left: int
    command: UUID | None
    unless_replayed_since: datetime | None = None


class PauseShape(BaseModel):
    id: int
    scope: Literal["everything", "type", "handler", "key"]
    subscription: str | None
    entity_type: str | None
    handler: str | None
    entity_id: str | None
    because: str
    set_by: str
    role: str
    age_s: float
    ends_in_s: float | None
    set_at: datetime
    until: datetime | None


class LimitShape(BaseModel):
    id: int
    handler: str
    subscription: str | None
    rate: str | None
    burst: int | None
    at_once: int | None
    by: str | None
    because: str
    set_by: str
    role: str
    set_at: datetime


class LimitUse(BaseModel):
    """What consumers have leased now, of so many `keys`; `permits_of_key` and `slots_of_key`: all that each key has."""

    subscription: str
    handler: str
    keys: int
    consumers: int
    permits: int
    permits_of_key: int
    slots: int
    slots_of_key: int
    wants: int


class ProcessedOf(BaseModel):
    """Of the last minute, by the default subscription. `handler`: where handlers are known. Latencies in seconds."""

    handler: str | None
    entity_type: str
    operation: str
    per_s: float
    latency_p50_s: float | None
    latency_p99_s: float | None


class FailedOf(BaseModel):
    """Of the last hour. `dead`: after so many of the attempts the change was dead. `more`: than were looked at."""

    subscription: str
    handler: str | None
    error_kind: str
    attempts: int
    dead: int
    last_at: datetime
    more: bool


class ActivityFound(BaseModel):
    """`failed` is null where the role may not see it."""

    processed: list[ProcessedOf]
    failed: list[FailedOf] | None


class ControlsInForce(BaseModel):
    controls: list[PauseShape]
    limits: list[LimitShape]


class LimitsInForce(BaseModel):
    """`in_use`: also those in the code of handlers; null: the role may not see it."""

    limits: list[LimitShape]
    in_use: list[LimitUse] | None


class LimitSet(BaseModel):
    limit: LimitShape


class LimitsCleared(BaseModel):
    cleared: list[LimitShape]


class Paused(BaseModel):
    paused: PauseShape


class Resumed(BaseModel):
    resumed: list[PauseShape]
    left: list[PauseShape]


class ActionTaken(BaseModel):
    id: int
    command: UUID
    at: datetime
    ended_at: datetime
    role: str
    login: str
    person: str
    via: str
    action: str
    target: dict[str, Any]
    because: str | None
    count: int


class ActionsTaken(BaseModel):
    actions: list[ActionTaken]


class FindingGiven(BaseModel):
    id: str
    severity: Literal["ok", "warn", "fail", "unknown", "skip"]
    detail: str
    remedies: list[str]


class Findings(BaseModel):
    findings: list[FindingGiven]


class Problem(BaseModel):
    """What happened, and what to do."""

    error: str
    hint: str = ""
