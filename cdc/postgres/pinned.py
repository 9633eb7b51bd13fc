"""Which server settings our sessions pin, and why every other setting may have any value.

A setting that reaches an input or output function, the meaning of a name, a lock or a plan is pinned: ``ALTER
DATABASE`` and ``ALTER ROLE`` may hold any value of it. They are passed to the server in this order, and of two values
the later counts: ``LIMITS``, then those of the DSN or PGOPTIONS, then ``PINNED``, then those of the single session.
``NEWER`` is not known to every server, and a server that does not know a setting ends the connection; it is sent once
the server's version is known. Every other setting of a session is in ``HARMLESS``, with the reason; a test compares
this file with ``pg_settings`` of each installed version.

Connections lent to handlers keep the application's settings; what they pin is in ``transactions`` and its statements.
"""

from __future__ import annotations

from collections.abc import Mapping

LIMITS: Mapping[str, str] = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
}
"""The database's values are meant for its application. Each session of ours sets the limits it needs."""

PINNED: Mapping[str, str] = {
    # Names: a role that may CREATE in a schema of the path could add a better match of an operator or function.
    "search_path": "pg_catalog",
    # Filtered rows would look like an empty outbox; an error is seen.
    "row_security": "off",
    # Transactions: each statement sees what is committed, and a default meant for readers does not stop marks.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    # Values, as text in either direction.
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "array_nulls": "on",
    # SQL, as the server parses it and as the catalogs return it.
    "standard_conforming_strings": "on",
    "backslash_quote": "safe_encoding",
    "transform_null_equals": "off",
    "quote_all_identifiers": "off",
    "plpgsql.extra_errors": "none",
    "plpgsql.extra_warnings": "none",
    # Errors and messages.
    "exit_on_error": "off",
    "client_min_messages": "warning",
    # Plans: with one method disabled, a statement written for one plan gets another. See outbox.INDEXED.
    "plan_cache_mode": "auto",
    "enable_bitmapscan": "on",
    "enable_hashagg": "on",
    "enable_hashjoin": "on",
    "enable_indexonlyscan": "on",
    "enable_indexscan": "on",
    "enable_material": "on",
    "enable_mergejoin": "on",
    "enable_nestloop": "on",
    "enable_seqscan": "on",
    "enable_sort": "on",
    "enable_tidscan": "on",
    "from_collapse_limit": "8",
    "join_collapse_limit": "8",
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
}

NEWER: Mapping[str, tuple[int, str]] = {
    "createrole_self_grant": (160_000, ""),
    "transaction_timeout": (170_000, "0"),
}
"""Name to the first version that has it, as ``server_version_num``, and the value."""

HARMLESS: Mapping[str, str] = {
    "nothing is written as text that depends on it": (
        "TimeZone timezone_abbreviations lc_monetary lc_numeric lc_time default_text_search_config xmlbinary xmloption"
    ),
    "connect sets it, or asks for it where it matters": (
        "application_name client_encoding tcp_keepalives_count tcp_keepalives_idle tcp_keepalives_interval"
        " tcp_user_timeout wal_sender_timeout client_connection_check_interval"
    ),
    "of one transaction; the default is pinned": "transaction_deferrable transaction_isolation transaction_read_only",
    "where the owner's new objects are put, and how, is for the owner to say": (
        "default_table_access_method default_tablespace temp_tablespaces default_toast_compression file_copy_method"
        " check_function_bodies icu_validation_level event_triggers"
    ),
    "how much a commit is worth is for the operator to say; what is lost is handled again": (
        "synchronous_commit commit_delay commit_siblings"
    ),
    "how costly a plan looks: statements that must not change theirs have one only": (
        "cpu_index_tuple_cost cpu_operator_cost cpu_tuple_cost effective_cache_size jit_above_cost"
        " jit_inline_above_cost jit_optimize_above_cost min_parallel_index_scan_size min_parallel_table_scan_size"
        " parallel_setup_cost"
        " parallel_tuple_cost random_page_cost seq_page_cost recursive_worktable_factor constraint_exclusion"
        " cursor_tuple_fraction default_statistics_target geqo geqo_effort geqo_generations geqo_pool_size geqo_seed"
        " geqo_selection_bias geqo_threshold"
    ),
    "methods for plans that no statement of ours has": (
        "enable_async_append enable_distinct_reordering enable_gathermerge enable_group_by_reordering"
        " enable_incremental_sort enable_memoize enable_parallel_append enable_parallel_hash enable_partition_pruning"
        " enable_partitionwise_aggregate enable_partitionwise_join enable_presorted_aggregate"
        " enable_self_join_elimination jit_expressions jit_tuple_deforming"
    ),
    "nothing runs in parallel": (
        "force_parallel_mode debug_parallel_query max_parallel_maintenance_workers max_parallel_workers"
        " parallel_leader_participation"
    ),
    "speed and memory, never an answer": (
        "backend_flush_after effective_io_concurrency maintenance_io_concurrency io_combine_limit hash_mem_multiplier"
        " logical_decoding_work_mem maintenance_work_mem temp_buffers vacuum_buffer_usage_limit work_mem"
        " gin_fuzzy_search_limit gin_pending_list_limit synchronize_seqscans wal_skip_threshold"
        " stats_fetch_consistency"
    ),
    "of VACUUM, which no session of ours runs": (
        "vacuum_cost_delay vacuum_cost_limit vacuum_cost_page_dirty vacuum_cost_page_hit vacuum_cost_page_miss"
        " vacuum_failsafe_age vacuum_freeze_min_age vacuum_freeze_table_age vacuum_max_eager_freeze_failure_rate"
        " vacuum_multixact_failsafe_age vacuum_multixact_freeze_min_age vacuum_multixact_freeze_table_age"
        " vacuum_truncate"
    ),
    "of passwords and views, of which no session of ours makes or reads any": (
        "md5_password_warnings password_encryption scram_iterations restrict_nonsystem_relation_kind"
    ),
    "what the server notes down": (
        "debug_pretty_print debug_print_parse debug_print_plan debug_print_rewritten"
        " log_parameter_max_length_on_error trace_notify trace_sort escape_string_warning plpgsql.check_asserts"
        " plpgsql.print_strict_params debug_logical_replication_streaming"
    ),
    "loads what a superuser has put on the server": "local_preload_libraries",
}
"""Reason to settings. Settings for superusers only are missing: our sessions may not set them either."""


def startup(given: str, session: Mapping[str, str], *, user_path: bool = False) -> str:
    """The parameter ``options`` of our sessions; ``given``: those of the DSN or PGOPTIONS."""
    ours = {name: value for name, value in PINNED.items() if not (user_path and name == "search_path")}
    return options(" ".join(filter(None, [*_settings(LIMITS), given, *_settings(ours)])), session)


def options(given: str, session: Mapping[str, str]) -> str:
    """The given options followed by the settings of one session."""
    return " ".join(filter(None, [given, *_settings(session)]))


def once_connected(server_version: int) -> str | None:
    """The statement that sets what this version of the server has besides."""
    known = [f"SET {name} = '{value}'" for name, (since, value) in NEWER.items() if server_version >= since]
    return "; ".join(known) or None


def _settings(settings: Mapping[str, str]) -> list[str]:
    return [_setting(name, value) for name, value in settings.items()]


def _setting(name: str, value: str) -> str:
    """``-c name=value``, with the blanks that would split it and the backslashes escaped as the server expects."""
    escaped = value.replace("\\", "\\\\").replace(" ", "\\ ")
    return f"-c {name}={escaped}"
