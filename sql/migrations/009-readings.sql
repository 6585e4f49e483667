-- Readings: documents that scripts/etl.ts takes out of MongoDB, or is sent. A table reading_analytics that
-- is there already is used as it is, if it fits.

do $$
declare
    lacks text;
begin
    if to_regclass('public.reading_analytics') is null then
        create table public.reading_analytics (
            -- of the reading, not of its coming
            "time" timestamptz not null,
            -- database.collection of MongoDB, or what a POST says
            source text not null,
            -- _id: the 24 hex digits of an ObjectId, else as etl.ts --help says
            source_id text not null,
            -- What public.transform_reading makes of the document.
            device text,
            metric text,
            value double precision,
            unit text,
            received timestamptz not null,
            processed timestamptz not null default clock_timestamp(),
            -- the whole document
            payload jsonb not null,
            primary key ("time", source, source_id)
        );
        comment on table public.reading_analytics is
            'pgpulse: Readings; rollup.readings has their values by minute, hour and day';
        comment on column public.reading_analytics."time" is 'Of the reading; when it came, where it says none.';
        comment on column public.reading_analytics.source is 'database.collection of MongoDB, or api.';
        comment on column public.reading_analytics.received is 'When it was read from its source, or sent.';
        comment on column public.reading_analytics.processed is 'When it was written here.';
        comment on column public.reading_analytics.payload is
            'The document: JSON as etl.ts --help says, which loses nothing of BSON.';
    end if;
    select string_agg(item, ', ' order by i)
    into lacks
    from string_to_table(
        'time timestamptz, source text, source_id text, device text, metric text, value float8, unit text, '
            'received timestamptz, processed timestamptz, payload jsonb', ', '
    ) with ordinality as list (item, i)
    where not exists (
        select
        from pg_attribute a
        where a.attrelid = 'public.reading_analytics'::regclass
            and a.attname = split_part(item, ' ', 1)
            and not a.attisdropped
            and a.atttypid = to_regtype(split_part(item, ' ', 2))
    );
    if lacks is not null then
        raise exception 'Cannot use public.reading_analytics that is there: it has another shape'
            using detail = format('It lacks %s', lacks),
                hint = 'Add what it lacks, or rename it; or use another database';
    end if;
    -- A view is what an earlier migrate has stored; behind it all is as it should be.
    if (select relkind from pg_class where oid = 'public.reading_analytics'::regclass) <> 'v' then
        if not exists (
            select
            from pg_index i
            where i.indrelid = 'public.reading_analytics'::regclass
                and i.indisunique
                and i.indpred is null
                and array(
                    select attname
                    from unnest(i.indkey::int2[]) with ordinality as key (attnum, n)
                    join pg_attribute a on a.attrelid = i.indrelid and a.attnum = key.attnum
                    order by n
                ) = '{time,source,source_id}'
        ) then
            create unique index on public.reading_analytics ("time", source, source_id);
        end if;
        create index on public.reading_analytics (source, "time", source_id);
        create index on public.reading_analytics using gin (payload jsonb_path_ops);
        -- Quicker than the default, where PostgreSQL has it.
        begin
            alter table public.reading_analytics alter column payload set compression lz4;
        exception when feature_not_supported then
            null;
        end;
    end if;
end
$$;

-- As it is read: a type of its own, as the table may become a view, and the other way round.
create type pgpulse.reading as (
    "time" timestamptz,
    source text,
    source_id text,
    device text,
    metric text,
    value double precision,
    unit text,
    received timestamptz,
    processed timestamptz,
    payload jsonb
);

-- One id is one row, though each partition knows its own rows only: this ledger says where its row is.
create table if not exists public.reading_keys (
    source text,
    source_id text,
    "time" timestamptz not null,
    -- where its row was before it moved to time
    previous timestamptz,
    primary key (source_id, source)
);
create index if not exists reading_keys_time on public.reading_keys ("time");
comment on table public.reading_keys is
    'pgpulse: Time of each reading, by its key; written by pgpulse.take_readings';
insert into public.reading_keys (source, source_id, "time")
select source, source_id, max("time")
from public.reading_analytics
group by source, source_id
on conflict do nothing;

create table if not exists public.reading_failures (
    source text,
    source_id text,
    failed timestamptz not null default clock_timestamp(),
    tries int not null default 1,
    reason text not null,
    -- of the document, where it is known to be this one
    field text,
    -- null: it cannot be made JSON of
    document jsonb,
    -- as MongoDB gave it, where that is kept
    bson bytea,
    primary key (source, source_id)
);
create index if not exists reading_failures_failed on public.reading_failures (failed);
comment on table public.reading_failures is
    'pgpulse: Dead letters: documents that could not be taken; etl.ts replay tries again';

-- What is on its way: alive as long as its worker's lease "etl/<worker>".
create table pgpulse.reading_claims (
    id bigint generated always as identity primary key,
    source text not null,
    worker text not null,
    -- as the sync writes them: each _id as hexadecimal digits of its BSON
    ids text[] not null,
    claimed timestamptz not null default clock_timestamp()
);
create index on pgpulse.reading_claims (source);
comment on table pgpulse.reading_claims is
    'Batches that workers of etl.ts have in hand; a dead worker''s come back by pgpulse.recover_readings.';

-- What a continuous sync looks after. A row stays until somebody deletes it, so that its silence is seen.
create table if not exists public.reading_sources (
    source text primary key,
    first_seen timestamptz not null default clock_timestamp(),
    -- when a worker last found MongoDB and said so
    last_seen timestamptz not null default clock_timestamp(),
    -- when the last reading was taken
    last_taken timestamptz,
    worker text not null,
    -- null: the worker could not count
    backlog bigint,
    lag_seconds double precision
) with (fillfactor = 50);
comment on table public.reading_sources is
    'pgpulse: Collections that a continuous sync looks after; delete a row to forget one';

create table if not exists public.reading_flow (
    -- the end of five seconds
    "time" timestamptz,
    source text,
    backlog bigint,
    lag_seconds double precision,
    -- in these five seconds, by all workers
    read bigint not null,
    taken bigint not null,
    replaced bigint not null,
    same bigint not null,
    failed bigint not null,
    primary key (source, "time")
) with (fillfactor = 80);
create index if not exists reading_flow_time on public.reading_flow ("time");
comment on table public.reading_flow is
    'pgpulse: What the sync does, each five seconds and source; kept for 30 days';

create table if not exists public.sync_runs (
    id bigint generated always as identity primary key,
    worker text not null,
    -- once, continuous, http, replay
    trigger text not null,
    started timestamptz not null default clock_timestamp(),
    -- null: under way
    ended timestamptz,
    read bigint not null default 0,
    taken bigint not null default 0,
    replaced bigint not null default 0,
    same bigint not null default 0,
    failed bigint not null default 0,
    -- null: it did all there was
    error text
);
create index if not exists sync_runs_started on public.sync_runs (started);
comment on table public.sync_runs is 'pgpulse: Runs of the sync; kept for 90 days';
