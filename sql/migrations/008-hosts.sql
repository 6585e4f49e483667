-- Hosts and databases that scripts/collect.ts watches: samples as JSON, and who sent them. Tables of
-- these names that are there already are used as they are, if they fit.

do $$
declare
    wanted record;
    lacks text;
begin
    for wanted in
        select *
        from (values
            (
                'hosts',
                'host text, first_seen timestamptz, last_seen timestamptz, last_time timestamptz, os text, '
                    'version text, interval interval, tags jsonb, clock_offset float8, lost int8, role name',
                $ddl$(
    host text primary key,
    -- null: bound to a role, and has sent nothing yet
    first_seen timestamptz,
    -- when its newest batch came, by the clock of the database
    last_seen timestamptz,
    -- of its newest sample, by its own clock
    last_time timestamptz,
    os text,
    -- of collect.ts
    version text,
    "interval" interval,
    tags jsonb not null default '{}',
    -- seconds that its clock was ahead of the database's when the newest sample came
    clock_offset double precision,
    -- samples that its spool had to drop
    lost bigint not null default 0,
    -- the login role that alone may send its samples: pgpulse.bind_host; null: any collector
    role name
-- Written with each batch: there is room beside each row, and no index on what changes.
) with (fillfactor = 50)$ddl$,
                'Hosts that have sent samples; written by pgpulse.collect'
            ),
            (
                'system_metrics',
                'time timestamptz, host text, tags jsonb, metrics jsonb, cpu float8, iowait float8, '
                    'steal float8, load1 float8, memory_used float8, swap_used float8, '
                    'filesystem_used float8, inodes_used float8, disk_busy float8, disk_bytes float8, '
                    'received_bytes float8, sent_bytes float8',
                $ddl$(
    "time" timestamptz not null,
    host text not null,
    tags jsonb not null default '{}',
    -- all that was measured: see the views host_cpu, host_memory and so on
    metrics jsonb not null,
    -- What most queries want, as collect.ts sums it up: parts of 1, and bytes a second.
    cpu double precision,
    iowait double precision,
    steal double precision,
    load1 double precision,
    memory_used double precision,
    swap_used double precision,
    -- the fullest one
    filesystem_used double precision,
    inodes_used double precision,
    -- the busiest one
    disk_busy double precision,
    -- read and written, of all disks
    disk_bytes double precision,
    -- of all network interfaces
    received_bytes double precision,
    sent_bytes double precision,
    primary key (host, "time")
)$ddl$,
                'Samples of hosts; rollup.hosts has them by minute, hour and day'
            ),
            (
                'postgresql_metrics',
                'time timestamptz, instance text, host text, metrics jsonb',
                $ddl$(
    "time" timestamptz not null,
    -- database@host:port
    instance text not null,
    -- where the collector runs
    host text not null,
    metrics jsonb not null,
    primary key (instance, "time")
)$ddl$,
                'Samples of PostgreSQL databases; rollup.postgresql has them by minute, hour and day'
            ),
            (
                'postgresql_instances',
                'instance text, host text, last_seen timestamptz, last_time timestamptz',
                $ddl$(
    instance text primary key,
    -- whose collector its newest sample came from
    host text not null,
    -- when that was taken, by the clock of the database as far as it can tell
    last_seen timestamptz not null,
    -- the same by the clock of the host
    last_time timestamptz not null
) with (fillfactor = 50)$ddl$,
                'PostgreSQL databases that have been sampled; written by pgpulse.collect'
            )
        ) as tables (name, columns, ddl, note)
    loop
        if to_regclass('public.' || wanted.name) is null then
            execute format('create table public.%I %s', wanted.name, wanted.ddl);
            execute format('comment on table public.%I is %L', wanted.name, 'pgpulse: ' || wanted.note);
            continue;
        end if;
        select string_agg(item, ', ' order by i)
        into lacks
        from string_to_table(wanted.columns, ', ') with ordinality as list (item, i)
        where not exists (
            select
            from pg_attribute a
            where a.attrelid = to_regclass('public.' || wanted.name)
                and a.attname = split_part(item, ' ', 1)
                and not a.attisdropped
                and a.atttypid = to_regtype(split_part(item, ' ', 2))
        );
        if lacks is not null then
            raise exception 'Cannot use public.% that is there: it has another shape', wanted.name
                using detail = format('It lacks %s', lacks),
                    hint = 'Add what it lacks, or rename it; or use another database';
        end if;
    end loop;
end
$$;

-- Each sample once; by its key, and whatever is sent again.
do $$
declare
    wanted record;
begin
    for wanted in
        select name::regclass as name, keys
        from (values
            ('public.system_metrics', '{host,time}'::name[]),
            ('public.postgresql_metrics', '{instance,time}')
        ) as tables (name, keys)
    loop
        -- A view is what an earlier migrate has stored; behind it all is as it should be.
        continue when (select relkind from pg_class where oid = wanted.name) = 'v';
        if not exists (
            select
            from pg_index i
            where i.indrelid = wanted.name
                and i.indisunique
                and i.indpred is null
                and wanted.keys @> array(
                    select attname from pg_attribute where attrelid = i.indrelid and attnum = any (i.indkey::int2[])
                )
        ) then
            execute format(
                'create unique index on %s (%I, %I)', wanted.name, wanted.keys[1], wanted.keys[2]
            );
        end if;
        -- Quicker to read than the default, where PostgreSQL has it.
        begin
            execute format('alter table %s alter column metrics set compression lz4', wanted.name);
        exception when feature_not_supported then
            null;
        end;
        execute format('create index on %s ("time")', wanted.name);
    end loop;
end
$$;

create index if not exists hosts_role on public.hosts (role) where role is not null;

-- A sample on its way from JSON into a table.
create type pgpulse.sample as (
    "time" timestamptz,
    host text,
    instance text,
    tags jsonb,
    metrics jsonb,
    os text,
    version text,
    "interval" double precision,
    clock timestamptz,
    lost bigint,
    cpu double precision,
    iowait double precision,
    steal double precision,
    load1 double precision,
    memory_used double precision,
    swap_used double precision,
    filesystem_used double precision,
    inodes_used double precision,
    disk_busy double precision,
    disk_bytes double precision,
    received_bytes double precision,
    sent_bytes double precision
);

alter table pgpulse.streams
    -- beat of the channels of a split stream that nobody watches; null: the same as of all
    add column slow interval check (slow >= beat);

-- Who looks at what. Unlogged, as it is renewed every minute.
create unlogged table pgpulse.watches (
    stream text not null,
    -- of the column that splits the stream
    value text not null,
    until timestamptz not null,
    primary key (stream, value)
) with (fillfactor = 50);

comment on table pgpulse.watches is
    'Channels of split streams that somebody looks at, and until when that is believed.';

-- They give and take something else from now on.
drop function if exists pgpulse.add_stream(text, interval, interval, int, interval, text, text);
drop function if exists pgpulse.stream_plans();
