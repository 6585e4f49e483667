-- TimescaleDB behind the same names, where the extension is installed: add_storage makes hypertables,
-- and add_rollup on one makes continuous aggregates. What the extension has is named in text only,
-- so that nothing of it is parsed where it is missing.

-- Its background jobs on a hypertable or a continuous aggregate; kind: retention, compression,
-- refresh_continuous_aggregate.
create or replace function pgpulse.policy(relation regclass, kind text)
returns table (job_id int, config jsonb, fault text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if not exists (select from pg_extension where extname = 'timescaledb') then
        return;
    end if;
    return query execute $q$
        select
            j.job_id,
            j.config,
            case when s.last_run_status = 'Failed' then (
                select e.err_message
                from timescaledb_information.job_errors e
                where e.job_id = j.job_id
                order by e.finish_time desc
                limit 1
            ) end
        from timescaledb_information.jobs j
        left join timescaledb_information.job_stats s on s.job_id = j.job_id
        where to_regclass(format('%I.%I', j.hypertable_schema, j.hypertable_name)) = $1
            and j.proc_name = 'policy_' || $2
    $q$ using relation, kind;
end
$$;

-- Sets, changes or (null) takes away a policy.
create or replace function pgpulse.set_policy(relation regclass, kind text, setting text, value interval)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    ts text := pgpulse.timescale();
    old interval;
begin
    select (p.config ->> setting)::interval into old from pgpulse.policy(relation, kind) p;
    if old is distinct from value and old is not null then
        execute format('select %s.%I(%L)', ts, format('remove_%s_policy', kind), relation);
    end if;
    if old is distinct from value and value is not null then
        execute format(
            'select %s.%I(%L, %L::interval)', ts, format('add_%s_policy', kind), relation, value
        );
    end if;
end
$$;

create or replace function pgpulse.yield_time_bucket() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    ts text := (
        select quote_ident(extnamespace::regnamespace::text) from pg_extension where extname = 'timescaledb'
    );
    f record;
begin
    if ts is null or to_regnamespace('compat') is null then
        return;
    end if;
    for f in
        select
            oid::regprocedure as signature,
            pg_get_function_arguments(oid) as arguments,
            pg_get_function_result(oid) as result,
            array_to_string(array(select '$' || i from generate_series(1, pronargs) i), ', ') as passed
        from pg_proc
        where pronamespace = 'compat'::regnamespace and proname = 'time_bucket'
    loop
        begin
            execute format('drop function %s', f.signature);
        exception when dependent_objects_still_exist then
            -- People's views call it. Inlined, this is the extension's to the planner.
            execute format(
                'create or replace function compat.time_bucket(%s) returns %s
                language sql immutable parallel safe as %L',
                f.arguments, f.result, format('select %s.time_bucket(%s)', ts, f.passed)
            );
        end;
    end loop;
    if not exists (select from pg_proc where pronamespace = 'compat'::regnamespace) then
        drop schema compat;
    end if;
end
$$;

comment on function pgpulse.yield_time_bucket is
    'Drops our time_bucket where TimescaleDB has brought its own; views that call ours get the real one.';

-- Continuous aggregates ---------------------------------------------------------------------------

-- {} is replaced by the name of each measure, [] by its value in a row. Numbers that would spoil a
-- whole sum count as none, as in rollups on plain PostgreSQL.
create or replace function pgpulse.each_measure(r pgpulse.rollups, template text) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select string_agg(
        replace(replace(template, '{}', n), '[]', format('(%s)::float8', e)), '' order by i
    )
    from unnest(r.measures, r.measure_expressions) with ordinality as m (n, e, i)
$$;

create or replace function pgpulse.add_caggs(r pgpulse.rollups) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    ts text := pgpulse.timescale();
    keys text := pgpulse.each(pgpulse.quoted(r.keys), ', {}');
    step record;
begin
    for step in
        select *
        from (values
            ('1 minute', '_1m', null, '10 days'),
            ('1 hour', '_1h', '_1m', '90 days'),
            ('1 day', '_1d', '_1h', '1800 days')
        ) as steps (width, suffix, finer, chunk)
    loop
        execute format(
            $q$create materialized view rollup.%1$I with (
    timescaledb.continuous,
    timescaledb.materialized_only = false,
    timescaledb.create_group_indexes = false
) as
select %2$s.time_bucket(interval %3$L, %4$I) as bucket%5$s, %6$s
from %7$s
%8$s
group by %9$s
with no data$q$,
            r.rollup || step.suffix,
            ts,
            step.width,
            case step.suffix when '_1m' then r.time_column else 'bucket' end,
            case step.suffix
                when '_1m' then (
                    select string_agg(format(', %s as %I', e, n), '' order by i)
                    from unnest(r.keys, r.key_expressions) with ordinality as k (n, e, i)
                )
                else keys
            end,
            case step.suffix
                when '_1m' then 'count(*) as points' || pgpulse.each_measure(r, format($m$,
    count([]) filter (where abs([]) <= 1e300) as {}_count,
    sum([]) filter (where abs([]) <= 1e300) as {}_sum,
    min([]) filter (where abs([]) <= 1e300) as {}_min,
    max([]) filter (where abs([]) <= 1e300) as {}_max,
    %1$s.first([], %2$I) filter (where abs([]) <= 1e300) as {}_first,
    %1$s.last([], %2$I) filter (where abs([]) <= 1e300) as {}_last$m$, ts, r.time_column))
                else 'sum(points)::bigint as points' || pgpulse.each(r.measures, format($m$,
    sum({}_count)::bigint as {}_count,
    sum({}_sum) as {}_sum,
    min({}_min) as {}_min,
    max({}_max) as {}_max,
    %1$s.first({}_first, bucket) filter (where {}_count > 0) as {}_first,
    %1$s.last({}_last, bucket) filter (where {}_count > 0) as {}_last$m$, ts))
            end,
            case step.suffix
                when '_1m' then r.source::text
                else format('rollup.%I', r.rollup || step.finer)
            end,
            case step.suffix when '_1m' then format(
                'where %1$I >= timestamptz ''1900-01-01 00:00:00+00'' '
                    'and %1$I < timestamptz ''2200-01-01 00:00:00+00''',
                r.time_column
            ) end,
            (select string_agg(i::text, ', ') from generate_series(1, 1 + cardinality(r.keys)) i)
        );
        -- Otherwise a day of the coarse steps costs as much to plan as a day of the fine one.
        execute format(
            'select %s.set_chunk_time_interval(
                format(''%%I.%%I'', materialization_hypertable_schema, materialization_hypertable_name),
                %L::interval
            )
            from timescaledb_information.continuous_aggregates
            where view_schema = ''rollup'' and view_name = %L',
            ts, step.chunk, r.rollup || step.suffix
        );
        if cardinality(r.keys) > 0 then
            execute format(
                'create index on rollup.%I (%s, bucket)', r.rollup || step.suffix, substr(keys, 3)
            );
        end if;
    end loop;
    insert into pgpulse.rollups (
        rollup, source, time_column, keys, key_expressions, measures, measure_expressions
    )
    values (
        r.rollup, r.source, r.time_column, r.keys, r.key_expressions, r.measures, r.measure_expressions
    )
    on conflict do nothing;
    perform pgpulse.make_rollup_rows(r);
    perform pgpulse.make_rollup_view(r);
    perform pgpulse.set_retention(r);
end
$$;

comment on function pgpulse.add_caggs is
    'The rollup of a hypertable: continuous aggregates rollup.<name>_1m, of it _1h, of that _1d.';

-- How far back the policies refresh: all that changed, but nothing whose rows retention has dropped,
-- as that would empty the rollup too.
create or replace function pgpulse.set_refresh(r pgpulse.rollups) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    ts text := pgpulse.timescale();
    finer regclass := r.source;
    cagg regclass;
    reach interval;
    step record;
begin
    for step in
        select *
        from (values
            ('_1m', '1 minute', '1 minute', 1440),
            ('_1h', '1 hour', '10 minutes', 720),
            ('_1d', '1 day', '1 hour', 365)
        ) as steps (suffix, "end", every, batch)
    loop
        cagg := format('rollup.%I', r.rollup || step.suffix)::regclass;
        select (config ->> 'drop_after')::interval into reach from pgpulse.policy(finer, 'retention');
        if not exists (
            select
            from pgpulse.policy(cagg, 'refresh_continuous_aggregate')
            where (config ->> 'start_offset')::interval is not distinct from reach
        ) then
            if exists (select from pgpulse.policy(cagg, 'refresh_continuous_aggregate')) then
                execute format('select %s.remove_continuous_aggregate_policy(%L)', ts, cagg);
            end if;
            execute format(
                'select %1$s.add_continuous_aggregate_policy(%2$L, start_offset => %3$L::interval,
                    end_offset => %4$L::interval, schedule_interval => %5$L::interval%6$s)',
                ts, cagg, reach, step."end", step.every,
                -- Older versions refresh in one go.
                (
                    select max(', buckets_per_batch => ' || step.batch)
                    from pg_proc
                    where proname = 'add_continuous_aggregate_policy'
                        and 'buckets_per_batch' = any (proargnames)
                )
            );
        end if;
        finer := cagg;
    end loop;
end
$$;

comment on function pgpulse.set_refresh is
    'Policies: the last minute, hour and day are refreshed as they end, and whatever changed before.';

create or replace function pgpulse.make_cagg_view(r pgpulse.rollups) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    keys text := pgpulse.each(pgpulse.quoted(r.keys), ', {}');
    branches text[];
    split timestamptz;
    step record;
begin
    branches := array[format(
        $q$select interval '0' as step, "time"%1$s, 1::bigint as points%2$s
from rollup.%3$I$q$,
        keys,
        pgpulse.each(r.measures, $q$,
    "{}" as {}_avg,
    "{}" as {}_min,
    "{}" as {}_max,
    "{}" as {}_sum,
    ("{}" is not null)::int::bigint as {}_count,
    "{}" as {}_first,
    "{}" as {}_last$q$),
        r.rollup || '_rows'
    )];
    -- What was rolled up on plain PostgreSQL of rows that are no more.
    if to_regclass(format('rollup.%I', r.rollup || '_1d_before')) is not null then
        execute format('select max(bucket) + interval ''1 day'' from rollup.%I', r.rollup || '_1d_before')
            into split;
    end if;
    for step in
        select *
        from (values ('1 minute', '_1m'), ('1 hour', '_1h'), ('1 day', '_1d')) as steps (step, suffix)
    loop
        branches := branches || (
            select array_agg(format(
                $q$select interval %1$L, bucket%2$s, points%3$s
from rollup.%4$I%5$s$q$,
                step.step,
                keys,
                pgpulse.each(r.measures, $q$,
    {}_sum / nullif({}_count, 0) as {}_avg,
    {}_min,
    {}_max,
    {}_sum,
    {}_count,
    {}_first,
    {}_last$q$),
                r.rollup || step.suffix || suffix,
                case when split is not null then
                    format(E'\nwhere bucket %s timestamptz %L', case suffix when '' then '>=' else '<' end, split)
                end
            ))
            from unnest(case when split is null then array[''] else array['', '_before'] end) as suffix
        );
    end loop;
    execute format(
        'create or replace view rollup.%I as %s', r.rollup, array_to_string(branches, E'\nunion all\n')
    );
end
$$;

create or replace function pgpulse.drop_caggs(r pgpulse.rollups) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set client_min_messages = warning
as $$
declare
    suffix text;
begin
    execute format('drop view if exists rollup.%I', r.rollup);
    execute format('drop view if exists rollup.%I', r.rollup || '_rows');
    foreach suffix in array array['_1d', '_1h', '_1m'] loop
        execute format('drop materialized view if exists rollup.%I', r.rollup || suffix);
        execute format('drop table if exists rollup.%I', r.rollup || suffix || '_before');
    end loop;
end
$$;

-- What pgpulse.refresh_rollups has to do here: look after the policies, once a minute.
create or replace function pgpulse.tend_caggs(r pgpulse.rollups) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    keep_rows interval;
begin
    if r.fault is null and r.refreshed_at > clock_timestamp() - interval '1 minute' then
        return null;
    end if;
    begin
        perform pgpulse.set_refresh(r);
        execute format(
            'select %s.delete_job(job_id)
            from timescaledb_information.jobs
            where proc_schema = ''pgpulse'' and proc_name = ''recount_job'' and not scheduled',
            pgpulse.timescale()
        );
        select (config ->> 'drop_after')::interval into keep_rows from pgpulse.policy(r.source, 'retention');
        r.since_rows := greatest(
            r.since_rows, date_bin('1 day', now() - keep_rows, '2000-01-01 00:00:00+00')
        );
        select string_agg(format('Job %s: %s (call run_job(%1$s) tries again)', p.job_id, p.fault), '; ')
        into r.fault
        from unnest(array['_1m', '_1h', '_1d']) as suffix,
            unnest(array['refresh_continuous_aggregate', 'retention']) as kind,
            pgpulse.policy(format('rollup.%I', r.rollup || suffix)::regclass, kind) p
        where p.fault is not null;
    exception when others then
        r.fault := sqlerrm;
    end;
    update pgpulse.rollups known
    set refreshed_at = clock_timestamp(), fault = r.fault, since_rows = r.since_rows
    where known.rollup = r.rollup;
    return r.fault;
end
$$;

comment on function pgpulse.tend_caggs is
    'Holds the refresh policies within what retention keeps, and tells why one failed the last time.';

-- Whether all is rolled up of the rows before a time: the newest are, first of all.
create or replace function pgpulse.caggs_filled(r pgpulse.rollups, before timestamptz) returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    cagg text;
    oldest timestamptz;
    filled timestamptz;
begin
    execute format('select min(%1$I) from %2$s where %1$I >= ''1900-01-01 00:00:00+00''', r.time_column, r.source)
        into oldest;
    if oldest < before then
        execute 'select format(''%I.%I'', materialization_hypertable_schema, materialization_hypertable_name)
            from timescaledb_information.continuous_aggregates
            where view_schema = ''rollup'' and view_name = $1'
            into cagg using r.rollup || '_1d';
        execute format('select min(bucket) from %s', cagg) into filled;
        return coalesce(filled <= oldest, false);
    end if;
    return true;
end
$$;

-- Not before the coarser steps have what the finer ones are to lose; upkeep comes again.
create or replace function pgpulse.set_retention(r pgpulse.rollups) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if pgpulse.caggs_filled(r, now() - least(r.keep_1m, r.keep_1h)) then
        perform pgpulse.set_policy(
            format('rollup.%I', r.rollup || suffix)::regclass, 'retention', 'drop_after', keep
        )
        from (values ('_1m', r.keep_1m), ('_1h', r.keep_1h), ('_1d', r.keep_1d)) as steps (suffix, keep);
    end if;
    perform pgpulse.set_refresh(r);
end
$$;

create or replace function pgpulse.retire_caggs(r pgpulse.rollups, most int)
returns table (deleted bigint, more boolean)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    step record;
    n bigint;
begin
    perform pgpulse.set_retention(r);
    deleted := 0;
    more := false;
    for step in
        select suffix, date_bin('1 day', now() - keep, '2000-01-01 00:00:00+00') as since
        from (values ('1m', r.keep_1m), ('1h', r.keep_1h), ('1d', r.keep_1d)) as steps (suffix, keep)
        where keep is not null
    loop
        execute format(
            'update pgpulse.rollups set since_%1$s = greatest(since_%1$s, $1) where rollup = $2', step.suffix
        ) using step.since, r.rollup;
        continue when to_regclass(format('rollup.%I', r.rollup || '_' || step.suffix || '_before')) is null;
        execute format(
            'delete from rollup.%1$I
            where ctid = any (array(select ctid from rollup.%1$I where bucket < $1 limit $2))',
            r.rollup || '_' || step.suffix || '_before'
        ) using step.since, most;
        get diagnostics n = row_count;
        deleted := deleted + n;
        more := more or n = most;
    end loop;
    return next;
end
$$;

create or replace procedure pgpulse.recount_job(job_id int, config jsonb)
language plpgsql
as $$
declare
    suffix text;
begin
    perform set_config('search_path', 'pg_catalog, ' || pgpulse.timescale(), false);
    foreach suffix in array array['_1m', '_1h', '_1d'] loop
        call refresh_continuous_aggregate(
            format('rollup.%I', config ->> 'rollup' || suffix)::regclass,
            (config ->> 'from')::timestamptz,
            (config ->> 'to')::timestamptz,
            force => true
        );
    end loop;
    -- A job that deletes itself ends as failed: tend_caggs does that.
    perform alter_job(job_id, scheduled => false);
end
$$;

comment on procedure pgpulse.recount_job is
    'Job of TimescaleDB that pgpulse.recount_rollup schedules: runs once.';

create or replace function pgpulse.recount_caggs(r pgpulse.rollups, "from" timestamptz, "to" timestamptz)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    execute format(
        'select %s.add_job(''pgpulse.recount_job'', interval ''1 hour'', config => $1)', pgpulse.timescale()
    ) using jsonb_build_object(
        'rollup', r.rollup,
        'from', date_bin('1 day', "from", '2000-01-01 00:00:00+00'),
        'to', date_bin('1 day', "to" + interval '1 day' - interval '1 microsecond', '2000-01-01 00:00:00+00')
    );
end
$$;

-- From a plain rollup to continuous aggregates: the table it stands on is a hypertable by now. What
-- was rolled up before upto stays the older part of the view, in tables <name>_1m_before and so on.
create or replace function pgpulse.turn_rollup(r pgpulse.rollups, upto timestamptz) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    suffix text;
begin
    foreach suffix in array array['_1m', '_1h', '_1d'] loop
        execute format('alter table rollup.%I rename to %I', r.rollup || suffix, r.rollup || suffix || '_before');
        execute format('delete from rollup.%I where bucket >= $1', r.rollup || suffix || '_before') using upto;
    end loop;
    perform pgpulse.add_caggs(r);
    execute format('drop function rollup.%I(), rollup.%I()', r.rollup || '_tail', r.rollup || '_begins');
    execute format('drop table rollup.%I', r.rollup || '_changed');
end
$$;

-- Gives way to the continuous aggregates, now that they are filled, as far as they know as much: only
-- what was rolled up of rows that are no more stays, up to the last day of which some are missing.
create or replace function pgpulse.settle_rollup(r pgpulse.rollups) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    suffix text;
    split timestamptz;
    keep interval;
begin
    select least((config ->> 'drop_after')::interval, r.keep_1m, r.keep_1h)
    into keep
    from (values (1)) one
    left join pgpulse.policy(r.source, 'retention') on true;
    execute format(
        'select max(rolled.bucket) + interval ''1 day''
        from (select bucket, sum(points) as points from rollup.%I group by 1) as rolled
        left join (
            select %s as bucket, count(*) as points from %s group by 1
        ) as kept on kept.bucket = rolled.bucket
        where rolled.points > coalesce(kept.points, 0)',
        r.rollup || '_1d_before', pgpulse.minute_of(quote_ident(r.time_column), '1 day'), r.source
    ) into split;
    -- What the policies do not reach.
    split := greatest(split, date_bin('1 day', now() - keep, '2000-01-01 00:00:00+00') + interval '1 day');
    foreach suffix in array array['_1m', '_1h', '_1d'] loop
        execute format('delete from rollup.%I where bucket >= $1', r.rollup || suffix || '_before')
            using coalesce(split, '-infinity');
    end loop;
    perform pgpulse.make_cagg_view(r);
    if split is null then
        foreach suffix in array array['_1m', '_1h', '_1d'] loop
            execute format('drop table rollup.%I', r.rollup || suffix || '_before');
        end loop;
    end if;
end
$$;

-- Hypertables -------------------------------------------------------------------------------------

create or replace function pgpulse.set_hypertable(
    relation regclass,
    time_column text,
    keys text[],
    pack_after interval,
    keep interval
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    compressed boolean;
    r pgpulse.rollups;
begin
    execute 'select compression_enabled
        from timescaledb_information.hypertables
        where to_regclass(format(''%I.%I'', hypertable_schema, hypertable_name)) = $1'
        into compressed using relation;
    if not compressed then
        execute format(
            'alter table %s set (timescaledb.compress, timescaledb.compress_orderby = %L%s)',
            relation,
            quote_ident(time_column),
            case when cardinality(keys) > 0 then format(
                ', timescaledb.compress_segmentby = %L', array_to_string(pgpulse.quoted(keys), ', ')
            ) end
        );
    end if;
    perform pgpulse.set_policy(relation, 'compression', 'compress_after', pack_after);
    perform pgpulse.set_policy(relation, 'retention', 'drop_after', keep);
    for r in select * from pgpulse.rollups known where known.source = relation loop
        perform pgpulse.set_refresh(r);
    end loop;
end
$$;

create or replace function pgpulse.add_hypertable(
    source regclass,
    time_column text,
    keys text[],
    period interval,
    pack_after interval,
    keep interval
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    ts text := pgpulse.timescale();
    r pgpulse.rollups;
    found text;
    triggers text[];
begin
    if not pgpulse.is_hypertable(source) then
        perform pgpulse.lock_rollup(known.rollup, true)
        from pgpulse.rollups known
        where known.source = add_hypertable.source;
        execute format('lock table %s in access exclusive mode', source);
        for r in select * from pgpulse.rollups known where known.source = add_hypertable.source loop
            -- All that wrote to the table have ended: the lock is ours.
            perform pgpulse.refresh_rollup(r, txid_snapshot_xmax(txid_current_snapshot()));
        end loop;
        -- Rollups need none any more, and those of others shall not fire for rows that move.
        triggers := array(
            select t.piece
            from pgpulse.furniture(source, source::text) as t (piece)
            where t.piece ~ '^CREATE (CONSTRAINT )?TRIGGER '
        );
        for found in select tgname from pg_trigger where tgrelid = source and not tgisinternal loop
            execute format('drop trigger %I on %s', found, source);
        end loop;
        execute format(
            'select from %s.create_hypertable(%L, %L, chunk_time_interval => %L::interval, migrate_data => true)',
            ts, source, time_column, period
        );
        foreach found in array triggers loop
            execute found;
        end loop;
        for r in select * from pgpulse.rollups known where known.source = add_hypertable.source loop
            perform pgpulse.turn_rollup(r, 'infinity');
        end loop;
        if exists (
            select
            from pg_attribute a
            where a.attrelid = source
                and a.attname = 'tx'
                and col_description(a.attrelid, a.attnum) like 'Transaction that inserted the row: how rollups%'
                and not exists (select from pgpulse.sinks k where k.source = add_hypertable.source)
        ) then
            execute format('alter table %s drop column tx', source);
        end if;
    else
        select string_agg(known.rollup, ', ')
        into found
        from pgpulse.rollups known
        where known.source = add_hypertable.source and not pgpulse.caggs_filled(known, now() - keep);
        if found is not null then
            raise exception 'Cannot drop old rows of "%" yet: rollup % does not have them so far', source, found
                using hint = 'TimescaleDB''s jobs are at work on that: try again in some minutes';
        end if;
        execute format('select %s.set_chunk_time_interval(%L, %L::interval)', ts, source, period);
    end if;
    perform pgpulse.set_hypertable(source, time_column, keys, pack_after, keep);
    for r in select * from pgpulse.rollups known where known.source = add_hypertable.source loop
        if to_regclass(format('rollup.%I', r.rollup || '_1d_before')) is not null then
            perform pgpulse.settle_rollup(r);
        end if;
    end loop;
end
$$;

comment on function pgpulse.add_hypertable is
    'What pgpulse.add_storage does where TimescaleDB is installed: the table itself becomes a '
    'hypertable, in one go, with policies that compress and drop its chunks.';


create or replace function pgpulse.drop_hypertable(source regclass) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Also after the hypertable has given it up.
    name text := source::text;
    old pg_class;
    plain regclass;
    ddl text[];
    part text;
begin
    select string_agg(r.rollup, ', ') into part from pgpulse.rollups r where r.source = drop_hypertable.source;
    if part is not null then
        raise exception 'Cannot drop storage of "%": rollup % stands on the hypertable', source, part
            using hint = 'select pgpulse.drop_rollup(...), and add it again to the plain table: of rows '
                'that are gone, nothing is left then';
    end if;
    raise notice 'Copies all rows of "%" into a plain table, in one transaction: writers wait until it ends', source;
    execute format('lock table %s in access exclusive mode', source);
    select * into old from pg_class where oid = source;
    part := format('%s.%I', old.relnamespace::regnamespace, left(old.relname, 50) || '_plain');
    execute format('create table %s (like %s including all excluding indexes)', part, source);
    plain := part::regclass;
    ddl := array(
        select piece from pgpulse.furniture(source, name) piece where piece !~ ' ts_insert_blocker |ts_cagg_invalidation'
    ) || array(
        select piece from pgpulse.views_over(source) piece
    ) || array[
        format('alter table %s owner to %s', name, old.relowner::regrole),
        format('comment on table %s is %L', name, obj_description(source, 'pg_class'))
    ];
    execute format(
        'insert into %s (%2$s) overriding system value select %2$s from %3$s',
        plain,
        (
            select string_agg(quote_ident(attname), ', ')
            from pg_attribute
            where attrelid = source and attnum > 0 and not attisdropped and attgenerated = ''
        ),
        source
    );
    perform pgpulse.take_sequences(source, plain);
    execute format('alter table %s rename to %I', source, left(old.relname, 50) || '_was_stored');
    execute format('alter table %s rename to %I', plain, old.relname);
    -- Its indexes have the names that the new ones want.
    foreach part in array array(select piece from unnest(ddl) piece where piece ~ '^create or replace view ') loop
        execute part;
    end loop;
    update pgpulse.sinks k set source = plain where k.source = drop_hypertable.source;
    execute format('drop table %s', source);
    foreach part in array array(select piece from unnest(ddl) piece where piece !~ '^create or replace view ') loop
        execute part;
    end loop;
end
$$;

-- Time for corrections is not needed here, as compressed rows can be updated and deleted; it is quicker.
create or replace function pgpulse.unpack_hypertable(
    relation regclass,
    "from" timestamptz,
    "to" timestamptz,
    hold interval
) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    ts text := pgpulse.timescale();
    chunk regclass;
    n bigint;
    unpacked bigint := 0;
begin
    for chunk in
        execute 'select format(''%I.%I'', chunk_schema, chunk_name)::regclass
        from timescaledb_information.chunks
        where to_regclass(format(''%I.%I'', hypertable_schema, hypertable_name)) = $1
            and is_compressed
            and range_start < greatest($3, $2 + interval ''1 microsecond'')
            and range_end > $2'
        using relation, "from", "to"
    loop
        execute format('select count(*) from %s', chunk) into n;
        unpacked := unpacked + n;
        execute format('select %s.decompress_chunk(%L)', ts, chunk);
    end loop;
    execute format(
        'select %s.alter_job(job_id, next_start => now() + %L::interval) from pgpulse.policy(%L, ''compression'')',
        ts, hold, relation
    );
    return unpacked;
end
$$;

create or replace function pgpulse.fill_hypertable(relation regclass, from_table regclass) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    filled bigint;
begin
    execute format(
        'insert into %1$s (%2$s) select %2$s from %3$s',
        relation,
        (
            -- Without tx, or a sink would not find them.
            select string_agg(quote_ident(a.attname), ', ')
            from pg_attribute a
            left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
            where a.attrelid = relation and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
                and pg_get_expr(d.adbin, d.adrelid) is distinct from 'txid_current()'
        ),
        from_table
    );
    get diagnostics filled = row_count;
    return filled;
end
$$;

-- The way over ------------------------------------------------------------------------------------
--
-- A stored table gets a twin, the hypertable packed.<name>_hypertable, which the public view reads
-- too. Period by period the rows go there, first the packed ones, each in a transaction that
-- deletes and inserts, so that readers see every row once at any time. Writers go on as they did.
-- At the end the twin takes the public name, and the views on it are pointed to it.

-- Views that read a relation (or one column of it), but for those that a rollup makes.
create or replace function pgpulse.readers_of(relation regclass, "column" text default null)
returns setof regclass
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select distinct w.ev_class::regclass
    from pg_depend d
    join pg_rewrite w on w.oid = d.objid
    where d.classid = 'pg_rewrite'::regclass
        and d.refclassid = 'pg_class'::regclass
        and d.refobjid = relation
        and w.ev_class <> relation
        and ("column" is null or d.refobjsubid = (
            select attnum from pg_attribute where attrelid = relation and attname = "column"
        ))
        and w.ev_class not in (
            select coalesce(to_regclass(format('rollup.%I', k.rollup || '_rows')), 0::regclass)
            from pgpulse.rollups k
        )
$$;

create or replace function pgpulse.refuse_move(name text, s pgpulse.storage) returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    found text;
begin
    if pgpulse.timescale() is null then
        raise exception 'Cannot move "%" to TimescaleDB: this database does not have the extension', name
            using hint = 'create extension timescaledb; its Apache edition will not do';
    elsif s.source is null then
        raise exception 'Cannot move "%" to TimescaleDB: it is not stored', name
            using hint = format('select pgpulse.add_storage(%L, ...) makes it a hypertable at once', name);
    elsif exists (select from pgpulse.sinks k where k.source = s.source) then
        raise exception 'Cannot move "%" to TimescaleDB: a sink reads it by transaction', name
            using hint = 'select pgpulse.drop_sink(...), and add it again afterwards, with since';
    end if;
    select string_agg(v::text, ', ') into found from pgpulse.readers_of(s.source, 'tx') v;
    if found is not null then
        raise exception 'Cannot move "%" to TimescaleDB: % reads its column tx', name, found
            using hint = 'Make it anew without that: a hypertable has no such column';
    end if;
    select concat_ws(', ', found, string_agg(distinct pg_describe_object(d.classid, d.objid, d.objsubid), ', '))
    into found
    from pg_class c
    join pg_type t on t.oid = c.reltype
    join pg_depend d on d.refclassid = 'pg_type'::regclass and d.refobjid in (t.oid, t.typarray)
    where c.oid = s.source and d.deptype = 'n';
    select concat_ws(
        ', ', nullif(found, ''), string_agg(distinct pg_describe_object(d.classid, d.objid, d.objsubid), ', ')
    )
    into found
    from pg_depend d
    left join pg_rewrite w on d.classid = 'pg_rewrite'::regclass and w.oid = d.objid
    left join pg_class v on v.oid = w.ev_class
    where d.refclassid = 'pg_class'::regclass
        and d.refobjid = s.source
        and d.deptype = 'n'
        and v.relkind is distinct from 'v';
    if found <> '' then
        raise exception 'Cannot move "%" to TimescaleDB: % stands on it', name, found
            using hint = 'Views are pointed to the new table; drop this, and make it again afterwards';
    end if;
    execute format('select min(%I) from %s', s.time_column, s.rows) into found;
    if found = '-infinity' then
        raise exception 'Cannot move "%" to TimescaleDB: rows have the time -infinity', name
            using hint = 'Give them another, or delete them: a hypertable takes none';
    end if;
end
$$;

create or replace function pgpulse.make_twin(s pgpulse.storage) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    twin text := pgpulse.twin_of(s);
    ddl text;
begin
    -- Twice, as a column that was dropped would stay a hole.
    execute format('create table packed.pgpulse_twin (like %s including all excluding indexes)', s.rows);
    select format('alter table packed.pgpulse_twin drop column %s', name)
    into ddl
    from pgpulse.packed_columns(s)
    where family = 'tx';
    if ddl is not null then
        execute ddl;
    end if;
    execute format('create table %s (like packed.pgpulse_twin including all)', twin);
    drop table packed.pgpulse_twin;
    execute format(
        'select from %s.create_hypertable(%L, %L, chunk_time_interval => %L::interval,
            create_default_indexes => false)',
        pgpulse.timescale(), twin, s.time_column, pgpulse.chunk(s)
    );
    -- In another schema they may have their names already.
    for ddl in
        select piece
        from pgpulse.furniture(s.rows, twin) piece
        where piece ~ '^create |^alter .* (PRIMARY KEY|UNIQUE) ' and piece !~ '\mtx\M'
    loop
        execute ddl;
    end loop;
    perform pgpulse.set_hypertable(twin::regclass, s.time_column, s.keys, null, null);
    update pgpulse.storage known set hold_until = 'infinity' where known.source = s.source;
    perform pgpulse.remake_storage(s.source);
end
$$;

create or replace function pgpulse.twin_columns(s pgpulse.storage) returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select string_agg(name, ', ') from pgpulse.packed_columns(s) where family <> 'tx' and writable
$$;

create or replace function pgpulse.twin_chunks(s pgpulse.storage)
returns table (chunk regclass, "from" timestamptz, "to" timestamptz, is_compressed boolean)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return query execute 'select format(''%I.%I'', chunk_schema, chunk_name)::regclass, range_start, range_end,
            is_compressed
        from timescaledb_information.chunks
        where to_regclass(format(''%I.%I'', hypertable_schema, hypertable_name)) = $1'
        using pgpulse.twin_of(s)::regclass;
end
$$;

-- Chunks have to be there before the rows: whoever planned a query without them, and runs it when the
-- rows have moved, would miss these. The lock waits for such.
create or replace function pgpulse.make_chunks(s pgpulse.storage, periods timestamptz[]) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '900ms'
as $$
declare
    "period" timestamptz;
    made int := 0;
begin
    execute format('lock table %s in access exclusive mode', pgpulse.twin_of(s));
    foreach "period" in array periods loop
        -- An insert makes one.
        execute format(
            'insert into %1$s (%2$s) overriding system value select %2$s from (
                (select %2$s from %3$s_rows where chunk$at = $1 limit 1)
                union all
                (select %2$s from %4$s where %5$I >= $1 and %5$I < $2 limit 1)
            ) as rows limit 1',
            pgpulse.twin_of(s), pgpulse.twin_columns(s), s.packed, s.rows, s.time_column
        ) using "period", "period" + pgpulse.chunk(s);
        execute format('delete from %s where %I >= $1 and %2$I < $2', pgpulse.twin_of(s), s.time_column)
            using "period", "period" + pgpulse.chunk(s);
        made := made + 1;
    end loop;
    return made;
end
$$;

-- One transaction's worth of the way.
create or replace function pgpulse.timescale_step(name text, out detail text, out more boolean)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    s pgpulse.storage;
    leaf regclass;
    "period" timestamptz;
    periods timestamptz[];
    packed boolean;
    until timestamptz;
    moved bigint;
    waits boolean;
begin
    more := true;
    select * into s from pgpulse.storage known where known.source = to_regclass(name);
    perform pgpulse.lock_storage(s.rows, true);
    select * into s from pgpulse.storage known where known.source = to_regclass(name);
    if s.source is null and pgpulse.is_hypertable(to_regclass(name)) then
        detail := 'is a hypertable';
        more := false;
        return;
    end if;
    perform pgpulse.refuse_move(name, s);
    if to_regclass(pgpulse.twin_of(s)) is null then
        perform pgpulse.make_twin(s);
        detail := format('made %s', pgpulse.twin_of(s));
        return;
    end if;

    perform pgpulse.refresh_rollups(k.rollup) from pgpulse.rollups k where k.source = s.source;
    execute format('select min(chunk$at) from %s', s.packed) into "period";
    packed := "period" is not null;
    if not packed then
        execute format('select min(%I) from %s', s.time_column, s.rows) into "period";
        "period" := pgpulse.chunk_of(s, "period");
    end if;
    -- What is complete.
    for leaf in
        select c.chunk
        from pgpulse.twin_chunks(s) c
        where not c.is_compressed and c."to" <= least("period", now() - pgpulse.chunk(s))
        limit 1
    loop
        begin
            set local lock_timeout = '900ms';
            execute format('select %s.compress_chunk(%L)', pgpulse.timescale(), leaf);
            detail := format('compressed %s', leaf);
            return;
        exception when lock_not_available then
            -- Readers are at it: its policy will do that.
            set local lock_timeout = default;
        end;
    end loop;
    if "period" < now()
        and not exists (select from pgpulse.twin_chunks(s) c where c."from" <= "period" and c."to" > "period") then
        begin
            execute format(
                'select array_agg(at)
                from (
                    select distinct chunk$at as at from %s
                    except
                    select c."from" from pgpulse.twin_chunks($1) c
                    order by 1
                    limit 30
                ) as missing',
                s.packed
            ) into periods using s;
            detail := format('made %s chunks', pgpulse.make_chunks(s, coalesce(periods, array["period"])));
        exception when lock_not_available then
            detail := 'waits for those who read it';
        end;
        return;
    end if;
    -- Unique keys do not see packed rows: of those that repeat one, the first comes over.
    if packed then
        execute format(
            'insert into %s (%2$s) overriding system value select %2$s from %3$s_rows where chunk$at = $1
            on conflict do nothing',
            pgpulse.twin_of(s), pgpulse.twin_columns(s), s.packed
        ) using "period";
        get diagnostics moved = row_count;
        execute format('delete from %s where chunk$at = $1', s.packed) using "period";
        detail := format('moved %s packed rows of %s', moved, "period");
        return;
    end if;

    -- What is not packed goes a period at a time, and in smaller pieces where writers are at work.
    until := "period" + pgpulse.chunk(s);
    if until > now() - interval '1 day' then
        execute format(
            'select %1$I from %2$s where %1$I < $1 order by 1 offset 100000 limit 1', s.time_column, s.rows
        ) into until using until;
        until := coalesce(until, "period" + pgpulse.chunk(s));
    end if;
    if until < now() - interval '10 minutes' then
        -- An update that meets a row on its way would miss it: writers of these partitions wait.
        for leaf in select part from pgpulse.parts_of(s.source) part where part <> s.rows loop
            execute format('select exists (select from only %s where %I < $1)', leaf, s.time_column)
                into waits using until;
            if waits then
                execute format('lock table only %s in share row exclusive mode', leaf);
            end if;
        end loop;
        execute format(
            'select exists (select from %s where %I < $1 and not %s)',
            s.rows, s.time_column, pgpulse.settled(s)
        ) into waits using until;
        if waits then
            detail := 'waits for transactions that are open';
            return;
        end if;
        set local pgpulse.keep_rollups = on;
        execute format(
            'with gone as (delete from %1$s where %2$I < $1 returning *)
            insert into %3$s (%4$s) overriding system value select %4$s from gone on conflict do nothing',
            s.rows, s.time_column, pgpulse.twin_of(s), pgpulse.twin_columns(s)
        ) using until;
        get diagnostics moved = row_count;
        set local pgpulse.keep_rollups = off;
        detail := format('moved %s rows until %s', moved, until);
        return;
    end if;

    begin
        moved := pgpulse.finish_move(s);
        detail := format('moved %s rows, and the hypertable has its name', moved);
    exception when lock_not_available then
        detail := 'waits for those who read or write it';
    end;
end
$$;

create or replace function pgpulse.finish_move(s pgpulse.storage) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    twin regclass := pgpulse.twin_of(s)::regclass;
    -- The public name, also after the view has given it up.
    name text := s.source::text;
    old pg_class;
    r pgpulse.rollups;
    reader regclass;
    c record;
    ddl text[];
    part text;
    moved bigint;
begin
    -- In the order in which readers take their locks; shorter than a deadlock takes to be noticed.
    set local lock_timeout = '900ms';
    for reader in select pgpulse.readers_of(s.source) loop
        execute format('lock table only %s in access exclusive mode', reader);
    end loop;
    execute format('lock table %s in access exclusive mode', s.source);
    set local lock_timeout = default;
    for r in select * from pgpulse.rollups known where known.source = s.source loop
        perform pgpulse.lock_rollup(r.rollup, true);
        select * into r from pgpulse.rollups known where known.rollup = r.rollup;
        perform pgpulse.refresh_rollup(r, txid_snapshot_xmax(txid_current_snapshot()));
    end loop;
    execute format(
        'insert into %s (%2$s) overriding system value select %2$s from %3$s on conflict do nothing',
        twin, pgpulse.twin_columns(s), s.rows
    );
    get diagnostics moved = row_count;

    -- What belongs to the name and to the table behind it.
    select * into old from pg_class where oid = s.source;
    ddl := array(
        select piece
        from pgpulse.furniture(s.rows, name) piece
        where piece !~ '^create (unique )?index |^alter .* (PRIMARY KEY|UNIQUE|EXCLUDE) '
        union
        select piece from pgpulse.furniture(s.source, name) piece where piece ~ '^grant '
        union
        select piece
        from pgpulse.views_over(s.source) piece
        where not exists (
            select
            from pgpulse.rollups known
            where piece like format('create or replace view rollup.%I ', known.rollup || '_rows') || '%'
        )
    ) || array[
        format('alter table %s owner to %s', name, old.relowner::regrole),
        format('comment on table %s is %L', name, obj_description(s.source, 'pg_class'))
    ];
    for c in
        select q.oid::regclass as sequence, q.relname, a.attname, a.attidentity <> '' as is_identity
        from pg_depend d
        join pg_class q on q.oid = d.objid and q.relkind = 'S'
        join pg_attribute a on (a.attrelid, a.attnum) = (d.refobjid, d.refobjsubid)
        where d.classid = 'pg_class'::regclass and d.refobjid = s.rows and d.deptype in ('a', 'i')
    loop
        if c.is_identity then
            execute format(
                'select setval(%L, last_value, is_called) from %s',
                pg_get_serial_sequence(twin::text, c.attname), c.sequence
            );
            continue;
        end if;
        execute format('alter sequence %s owned by none', c.sequence);
        ddl := ddl || array[
            format('alter sequence %s set schema %s', c.sequence, old.relnamespace::regnamespace),
            format('alter sequence %s.%I owned by %s.%I',
                old.relnamespace::regnamespace, c.relname, name, c.attname)
        ];
    end loop;

    execute format('alter view %s rename to %I', s.source, left(old.relname, 50) || '_before');
    execute format('alter table %s set schema %s', twin, old.relnamespace::regnamespace);
    execute format('alter table %s rename to %I', twin, old.relname);
    foreach part in array ddl loop
        execute part;
    end loop;
    for r in
        update pgpulse.rollups known set source = twin where known.source = s.source returning *
    loop
        perform pgpulse.turn_rollup(r, date_bin('1 day', now(), '2000-01-01 00:00:00+00'));
    end loop;
    delete from pgpulse.storage known where known.source = s.source;
    perform pgpulse.drop_parts(s);
    perform pgpulse.set_hypertable(twin, s.time_column, s.keys, s.pack_after, s.keep);
    return moved;
end
$$;

create or replace procedure pgpulse.move_to_timescale(name text)
language plpgsql
as $$
declare
    step record;
    r pgpulse.rollups;
    since timestamptz;
begin
    -- Whose relation changes on the way.
    select format('%I.%I', c.relnamespace::regnamespace::text, c.relname) into name
    from pg_class c
    where c.oid = name::regclass;
    loop
        select * into step from pgpulse.timescale_step(name);
        commit;
        raise notice '%: %', name, step.detail;
        exit when not step.more;
        if step.detail like 'waits %' then
            perform pg_sleep(1);
        end if;
    end loop;
    -- What follows fills the continuous aggregates; until then the view reads the plain rollup.
    for r in select * from pgpulse.rollups where source = to_regclass(name) order by rollup loop
        continue when to_regclass(format('rollup.%I', r.rollup || '_1d_before')) is null;
        execute format(
            'select date_bin(''10 days'', min(%1$I), ''2000-01-01Z'') from %2$s where %1$I >= ''1900-01-01Z''',
            r.time_column, r.source
        ) into since;
        while since < now() loop
            perform set_config('search_path', 'pg_catalog, ' || pgpulse.timescale(), true);
            call refresh_continuous_aggregate(
                format('rollup.%I', r.rollup || '_1m')::regclass, since, least(since + interval '10 days', now())
            );
            since := since + interval '10 days';
        end loop;
        perform set_config('search_path', 'pg_catalog, ' || pgpulse.timescale(), true);
        call refresh_continuous_aggregate(format('rollup.%I', r.rollup || '_1h')::regclass, null, now());
        perform set_config('search_path', 'pg_catalog, ' || pgpulse.timescale(), true);
        call refresh_continuous_aggregate(format('rollup.%I', r.rollup || '_1d')::regclass, null, now());
        perform pgpulse.settle_rollup(r);
        commit;
        raise notice '%: rollup % consists of continuous aggregates', name, r.rollup;
    end loop;
end
$$;

comment on procedure pgpulse.move_to_timescale is
    'Brings a stored table over to TimescaleDB, period by period, with its rollups: a hypertable of the '
    'same name and continuous aggregates. Stop it at any time; the next call goes on. Meanwhile all is '
    'read and written as before, but for updates and deletes of rows that have moved.';
