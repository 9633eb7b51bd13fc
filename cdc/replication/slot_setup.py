"""From an open replication connection to a running stream: the slot, created or recreated if needed, and its plugin.

A process starts to read a slot at the present end of the WAL, not where the last reader stopped: a message there that
took all memory may have killed that reader. Each start is followed by a sweep, which finds the changes before it. A
later session of the same process goes on where the one before stopped.

A slot of ours is read with the plugin it was created with. A new one gets the first of the wanted plugins that the
server has and allows. Where that is not the old slot's plugin, the slot is recreated: no change is lost with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cdc.core.errors import StreamError
from cdc.core.lsn import ZERO, Lsn
from cdc.core.stream_reason import Reason
from cdc.replication.connection import ReplicationSession
from cdc.replication.protocol import Plugin
from cdc.replication.refusals import SlotAction, SlotPolicy, next_step, why_broken

log = logging.getLogger("cdc.stream")

_TRY_ANOTHER_PLUGIN = frozenset({Reason.PLUGIN_MISSING, Reason.PLUGIN_REFUSED, Reason.PUBLICATION_MISSING})


@dataclass(frozen=True, slots=True)
class OpenedSlot:
    """``instead``: why the preferred plugin is not used."""

    plugin: Plugin
    recreated: bool
    instead: StreamError | None = None


def begin(session: ReplicationSession, plugins: Mapping[str, Plugin], policy: SlotPolicy) -> OpenedSlot:
    """Start the stream. Raises StreamError, after which the connection is still usable."""
    session.refuse_a_standby()
    found = session.look()
    # In this order: while another consumer reads the slot, its position may pass an end that was read earlier.
    end = session.server_end()
    step = next_step(found, end, session.names, policy)
    keeps = step in (SlotAction.START, SlotAction.NO_FAILOVER)
    name = found.plugin if found and found.plugin and keeps else policy.plugins[0]
    if found and step is SlotAction.RECREATE:
        log.warning("%s; it is recreated, and no change is lost", why_broken(found, end, session.names, policy))
    if found and step is SlotAction.NO_FAILOVER:
        log.warning(
            "the slot %s waits for the standby slots %s, which no standby reads, and would deliver nothing; it goes on"
            " without failover. When they are back: cdc slot recreate %s --failover",
            session.names.slot, found.held_by, session.names.slot,
        )  # fmt: skip
    if found and found.failover and not found.held_by and not policy.temporary:
        policy = replace(policy, failover=True)
    try:
        position = end if policy.from_end else ZERO
        _start(session, plugins[name], step, position, policy)
    except StreamError as refused:
        opened = _begin_with_another(session, plugins, policy, name, refused)
        return replace(opened, recreated=opened.recreated or step is SlotAction.RECREATE)
    return OpenedSlot(plugins[name], recreated=step is SlotAction.RECREATE)


def _start(session: ReplicationSession, plugin: Plugin, step: SlotAction, position: Lsn, policy: SlotPolicy) -> None:
    # The publication first: pgoutput cannot decode WAL written before the publication existed.
    if plugin.publication is not None:
        session.publish_nothing(plugin.publication)
    if step is SlotAction.RECREATE:
        session.drop()
    if step is SlotAction.NO_FAILOVER:
        session.end_failover()
    if step in (SlotAction.CREATE, SlotAction.RECREATE):
        # A new slot starts at the end of the WAL; the sweep finds the changes before.
        session.create(plugin, temporary=policy.temporary, failover=policy.failover)
        log.info("created the slot %s (%s)", session.names.slot, plugin.name)
    session.start(plugin, position)


def _begin_with_another(
    session: ReplicationSession, plugins: Mapping[str, Plugin], policy: SlotPolicy, name: str, refused: StreamError
) -> OpenedSlot:
    others = tuple(other for other in policy.plugins if other != name)
    if refused.reason not in _TRY_ANOTHER_PLUGIN or not others:
        raise refused
    try:
        opened = begin(session, plugins, replace(policy, plugins=others, refused=(*policy.refused, name)))
    except StreamError as also:
        if also.reason not in _TRY_ANOTHER_PLUGIN:
            raise
        hint = f"{refused.hint}; or {also.hint}"
        raise StreamError(f"{refused}; {also}", reason=refused.reason, hint=hint, permanent=True) from also
    return replace(opened, instead=refused)
