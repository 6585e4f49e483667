-- PostgreSQL as collect.ts --postgres samples it: read as columns, and live. What a role with few rights
-- does not see is null. Values a second where no other unit is said.

create or replace view public.postgresql_activity as
select
    "time",
    instance,
    pgpulse.number(metrics -> 'connections') as connections,
    pgpulse.number(metrics -> 'max_connections') as max_connections,
    pgpulse.number(metrics -> 'connections_used') as connections_used,
    pgpulse.number(metrics -> 'active') as active,
    pgpulse.number(metrics #> '{states,idle}') as idle,
    pgpulse.number(metrics #> '{states,idle_in_transaction}') as idle_in_transaction,
    pgpulse.number(metrics #> '{states,idle_in_transaction_aborted}') as idle_in_transaction_aborted,
    pgpulse.number(metrics #> '{waits,Lock}') as waiting_for_locks,
    pgpulse.number(metrics -> 'blocked') as blocked,
    pgpulse.number(metrics -> 'oldest_transaction_seconds') as oldest_transaction_seconds,
    pgpulse.number(metrics -> 'notify_queue') as notify_queue,
    pgpulse.number(metrics -> 'uptime') as uptime,
    metrics ->> 'version' as version,
    (metrics -> 'sees_all') = 'true' as sees_all
from public.postgresql_metrics;

create or replace view public.postgresql_transactions as
select
    "time",
    instance,
    pgpulse.number(metrics -> 'commits') as commits,
    pgpulse.number(metrics -> 'rollbacks') as rollbacks,
    pgpulse.number(metrics -> 'deadlocks') as deadlocks,
    pgpulse.number(metrics -> 'conflicts') as conflicts,
    pgpulse.number(metrics -> 'tuples_returned') as tuples_returned,
    pgpulse.number(metrics -> 'tuples_fetched') as tuples_fetched,
    pgpulse.number(metrics -> 'tuples_inserted') as tuples_inserted,
    pgpulse.number(metrics -> 'tuples_updated') as tuples_updated,
    pgpulse.number(metrics -> 'tuples_deleted') as tuples_deleted,
    pgpulse.number(metrics -> 'tuples_written') as tuples_written,
    pgpulse.number(metrics -> 'temporary_bytes') as temporary_bytes,
    pgpulse.number(metrics -> 'blocks_hit') as blocks_hit,
    pgpulse.number(metrics -> 'blocks_read') as blocks_read,
    pgpulse.number(metrics -> 'cache_hit') as cache_hit
from public.postgresql_metrics;

create or replace view public.postgresql_wal as
select
    "time",
    instance,
    pgpulse.number(metrics -> 'wal_bytes') as wal_bytes,
    pgpulse.number(metrics -> 'checkpoints') as checkpoints,
    pgpulse.number(metrics -> 'checkpoints_timed') as checkpoints_timed,
    pgpulse.number(metrics -> 'checkpoints_requested') as checkpoints_requested,
    pgpulse.number(metrics -> 'checkpoint_write') as checkpoint_write,
    pgpulse.number(metrics -> 'checkpoint_sync') as checkpoint_sync,
    pgpulse.number(metrics -> 'checkpoint_buffers') as checkpoint_buffers,
    pgpulse.number(metrics -> 'archived') as archived,
    pgpulse.number(metrics -> 'archive_failures') as archive_failures
from public.postgresql_metrics;

create or replace view public.postgresql_storage as
select
    "time",
    instance,
    pgpulse.number(metrics -> 'database_bytes') as database_bytes,
    pgpulse.number(metrics -> 'wraparound') as wraparound,
    metrics ->> 'wraparound_database' as wraparound_database
from public.postgresql_metrics;

create or replace view public.postgresql_lag as
select
    "time",
    instance,
    (metrics -> 'recovery') = 'true' as standby,
    pgpulse.number(metrics -> 'replication_lag_seconds') as replication_lag_seconds,
    pgpulse.number(metrics -> 'replication_lag_bytes') as replication_lag_bytes
from public.postgresql_metrics;

create or replace view public.postgresql_waits as
select m."time", m.instance, e.key as kind, pgpulse.number(e.value) as sessions
from public.postgresql_metrics m,
    jsonb_each(case when jsonb_typeof(m.metrics -> 'waits') = 'object' then m.metrics -> 'waits' end) as e;

create or replace view public.postgresql_locks as
select m."time", m.instance, e.key as mode, pgpulse.number(e.value) as locks
from public.postgresql_metrics m,
    jsonb_each(case when jsonb_typeof(m.metrics -> 'locks') = 'object' then m.metrics -> 'locks' end) as e;

create or replace view public.postgresql_blocked as
select
    m."time",
    m.instance,
    pgpulse.number(s -> 'pid')::int as pid,
    s ->> 'user' as "user",
    s ->> 'application' as application,
    s ->> 'database' as database,
    pgpulse.number(s -> 'seconds') as seconds,
    s ->> 'lock' as lock,
    s ->> 'on' as "on",
    s ->> 'statement' as statement,
    -- 0: a prepared transaction
    pgpulse.number(b -> 'pid')::int as by_pid,
    b ->> 'user' as by_user,
    b ->> 'application' as by_application,
    b ->> 'state' as by_state,
    pgpulse.number(b -> 'seconds') as by_seconds,
    b ->> 'statement' as by_statement
from public.postgresql_metrics m,
    jsonb_path_query(m.metrics, '$.blocked_sessions[*]') as s
left join lateral jsonb_path_query(s, '$.by[*]') as b on true;

create or replace view public.postgresql_long_transactions as
select
    m."time",
    m.instance,
    pgpulse.number(e -> 'pid')::int as pid,
    e ->> 'user' as "user",
    e ->> 'application' as application,
    e ->> 'database' as database,
    e ->> 'state' as state,
    pgpulse.number(e -> 'seconds') as seconds,
    e ->> 'statement' as statement
from public.postgresql_metrics m, jsonb_path_query(m.metrics, '$.transactions[*]') as e;

create or replace view public.postgresql_statements as
select
    m."time",
    m.instance,
    e ->> 'id' as id,
    e ->> 'statement' as statement,
    pgpulse.number(e -> 'calls') as calls,
    pgpulse.number(e -> 'seconds') as seconds,
    pgpulse.number(e -> 'mean_seconds') as mean_seconds,
    pgpulse.number(e -> 'rows') as rows,
    pgpulse.number(e -> 'cache_hit') as cache_hit
from public.postgresql_metrics m, jsonb_path_query(m.metrics, '$.statements[*]') as e;

create or replace view public.postgresql_tables as
select
    m."time",
    m.instance,
    e ->> 'name' as "table",
    pgpulse.number(e -> 'bytes') as bytes,
    pgpulse.number(e -> 'heap') as heap,
    pgpulse.number(e -> 'indexes') as indexes,
    pgpulse.number(e -> 'rows') as rows,
    pgpulse.number(e -> 'dead') as dead,
    pgpulse.number(e -> 'bloat') as bloat,
    pgpulse.number(e -> 'inserted') as inserted,
    pgpulse.number(e -> 'updated') as updated,
    pgpulse.number(e -> 'deleted') as deleted,
    pgpulse.number(e -> 'sequential_scans') as sequential_scans,
    to_timestamp(pgpulse.number(e -> 'vacuumed')) as vacuumed
from public.postgresql_metrics m, jsonb_path_query(m.metrics, '$.tables[*]') as e;

create or replace view public.postgresql_standbys as
select
    m."time",
    m.instance,
    e ->> 'name' as name,
    e ->> 'address' as address,
    e ->> 'state' as state,
    e ->> 'sync' as sync,
    pgpulse.number(e -> 'lag_seconds') as lag_seconds,
    pgpulse.number(e -> 'lag_bytes') as lag_bytes
from public.postgresql_metrics m, jsonb_path_query(m.metrics, '$.standbys[*]') as e;

create or replace view public.postgresql_slots as
select
    m."time",
    m.instance,
    e ->> 'name' as name,
    e ->> 'kind' as kind,
    (e -> 'active') = 'true' as active,
    e ->> 'status' as status,
    pgpulse.number(e -> 'held_bytes') as held_bytes
from public.postgresql_metrics m, jsonb_path_query(m.metrics, '$.slots[*]') as e;

create or replace view public.postgresql_now as
select
    i.instance,
    i.host,
    i.last_seen < now() - greatest(3 * coalesce(h."interval", '5 seconds'), '15 seconds') as silent,
    i.last_seen,
    i.last_time,
    -- of its collector
    h."interval",
    s.metrics ->> 'version' as version,
    (s.metrics -> 'recovery') = 'true' as standby,
    (s.metrics -> 'sees_all') = 'true' as sees_all,
    pgpulse.number(s.metrics -> 'uptime') as uptime,
    pgpulse.number(s.metrics -> 'connections') as connections,
    pgpulse.number(s.metrics -> 'connections_used') as connections_used,
    pgpulse.number(s.metrics -> 'commits') as commits,
    pgpulse.number(s.metrics -> 'rollbacks') as rollbacks,
    pgpulse.number(s.metrics -> 'cache_hit') as cache_hit,
    pgpulse.number(s.metrics -> 'wal_bytes') as wal_bytes,
    pgpulse.number(s.metrics -> 'blocked') as blocked,
    pgpulse.number(s.metrics -> 'oldest_transaction_seconds') as oldest_transaction_seconds,
    pgpulse.number(s.metrics -> 'replication_lag_seconds') as replication_lag_seconds,
    pgpulse.number(s.metrics -> 'database_bytes') as database_bytes,
    pgpulse.number(s.metrics -> 'wraparound') as wraparound,
    pgpulse.number(s.metrics -> 'notify_queue') as notify_queue
from public.postgresql_instances i
left join lateral (
    select m.metrics
    from public.postgresql_metrics m
    where m.instance = i.instance
        and m."time" = i.last_time
        -- not in packed history, which would be unpacked for it
        and pgpulse.recent(m."time", '1 day')
    limit 1
) as s on true
left join public.hosts h on h.host = i.host;

comment on view public.postgresql_activity is
    'pgpulse: sessions of the whole server; waiting_for_locks of active ones.';
comment on view public.postgresql_transactions is
    'pgpulse: transactions, rows and blocks of the database, a second; '
    'cache_hit: part of the blocks that was in memory.';
comment on view public.postgresql_wal is
    'pgpulse: write-ahead log and checkpoints of the whole server, a second; '
    'checkpoint_write and checkpoint_sync: part of the time.';
comment on view public.postgresql_storage is
    'pgpulse: size of the database; wraparound: age of the oldest transaction id, part of 2^31.';
comment on view public.postgresql_lag is
    'pgpulse: replication: of a standby its own lag, else that of the slowest standby.';
comment on view public.postgresql_waits is 'pgpulse: what active sessions wait for, by kind.';
comment on view public.postgresql_locks is 'pgpulse: locks of the whole server, by mode.';
comment on view public.postgresql_blocked is
    'pgpulse: sessions that wait for a lock, a row for each that holds it (by_...); '
    'statements without literals.';
comment on view public.postgresql_long_transactions is
    'pgpulse: the five longest transactions over 10 s, once a sample.';
comment on view public.postgresql_statements is
    'pgpulse: the ten statements that took the longest, once a minute; seconds: spent a second.';
comment on view public.postgresql_tables is
    'pgpulse: the twenty largest tables, once a minute; bytes: with indexes and TOAST; '
    'bloat: bytes of the heap, an estimate.';
comment on view public.postgresql_standbys is 'pgpulse: standbys and subscribers that are connected.';
comment on view public.postgresql_slots is
    'pgpulse: replication slots, and the WAL that they hold back.';
comment on view public.postgresql_now is
    'pgpulse: every database with its newest values (of the last day); '
    'silent: nothing came for three intervals of its collector, or for 15 s.';

-- A stream of this name that is somebody's own stays as it is.
do $$
begin
    if coalesce(obj_description(to_regclass('live.postgresql'), 'pg_class') not like 'pgpulse:%',
        to_regclass('live.postgresql') is not null) then
        raise warning 'Leaves live.postgresql as it is: migrate did not make it';
        return;
    end if;
    create or replace view live.postgresql as
    select
        "time",
        instance,
        pgpulse.number(metrics -> 'connections') as connections,
        pgpulse.number(metrics -> 'active') as active,
        pgpulse.number(metrics -> 'blocked') as blocked,
        pgpulse.number(metrics -> 'commits') as commits,
        pgpulse.number(metrics -> 'rollbacks') as rollbacks,
        pgpulse.number(metrics -> 'wal_bytes') as wal_bytes,
        pgpulse.number(metrics -> 'cache_hit') as cache_hit
    from public.postgresql_metrics
    -- not the packed history, which would be unpacked for it
    where pgpulse.recent("time", '1 day');
    comment on view live.postgresql is 'pgpulse: a channel for each database';
    perform pgpulse.add_stream(
        'postgresql', split => 'instance', beat => '1 second', slow => '5 minutes'
    );
end
$$;
