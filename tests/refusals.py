"""Statements that the server refuses with any SQLSTATE, for as long as a test wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

_INSTALL = """
CREATE TABLE public.refused (what text NOT NULL, code text NOT NULL);
CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  found text;
BEGIN
  SELECT code INTO found FROM public.refused WHERE what = TG_ARGV[0] LIMIT 1;
  IF found IS NOT NULL THEN
    RAISE EXCEPTION 'refused for a while' USING ERRCODE = found;
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER refuse BEFORE UPDATE ON public.entity_changes
  FOR EACH STATEMENT EXECUTE FUNCTION public.refuse('entity_changes');
CREATE TRIGGER refuse BEFORE INSERT OR UPDATE OR DELETE ON public.cdc_subscription_changes
  FOR EACH STATEMENT EXECUTE FUNCTION public.refuse('entity_changes');
CREATE TRIGGER refuse BEFORE INSERT OR UPDATE OR DELETE ON public.cdc_shards
  FOR EACH STATEMENT EXECUTE FUNCTION public.refuse('cdc_shards');
CREATE TRIGGER refuse BEFORE UPDATE ON public.cdc_positions
  FOR EACH STATEMENT EXECUTE FUNCTION public.refuse('cdc_shards');
"""
MARKS, SHARDS = "entity_changes", "cdc_shards"


def install(connection: psycopg.Connection) -> None:
    """For the outbox in ``public``; ``connection`` commits each statement."""
    connection.execute(_INSTALL)


@contextmanager
def refusing(connection: psycopg.Connection, what: str, code: str) -> Iterator[None]:
    """All MARKS, also those of subscriptions, or all words about SHARDS and positions; changes are captured as ever."""
    connection.execute("INSERT INTO public.refused VALUES (%s, %s)", [what, code])
    try:
        yield
    finally:
        connection.execute("DELETE FROM public.refused")
