-- Rollups: any table by minute, hour and day, kept exact, with one call.
--
-- What has to be rolled up is found by transaction, not by time: the last column tx of the source
-- holds the transaction that inserted the row. A refresh aggregates the rows of the transactions
-- that ended since the last one and adds them to what is there, so that a late row costs no more
-- than a new one. Rows of younger transactions belong to the view's tail. Updated and deleted rows
-- cannot be added: triggers note their series and minute, and those minutes are counted again.

-- How a name stands in the templates below: {} is replaced by each name in turn.
create or replace function pgpulse.each(names text[], template text) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(string_agg(replace(template, '{}', name), '' order by i), '')
    from unnest(names) with ordinality as n (name, i)
$$;

comment on function pgpulse.each is 'The template once for each name, put in the place of {}.';

create or replace function pgpulse.minute_of(expression text, step interval default '1 minute')
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select format('date_bin(%L, %s, ''2000-01-01 00:00:00+00'')', step::text, expression)
$$;

comment on function pgpulse.minute_of is
    'SQL for the bucket of a time; days begin at midnight UTC.';

-- Three shapes of a row. Partial: counts, sums, and first and last as [epoch, value], which min()
-- and max() combine without sorting. Stored: the tables. Read: the view.

create or replace function pgpulse.partial_of_rows(r pgpulse.rollups) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select 'count(*) as points' || pgpulse.each(r.measures, $q$,
    count("{}") as {}_count,
    sum("{}") as {}_sum,
    min("{}") as {}_min,
    max("{}") as {}_max,
    min("{}_pair") as {}_first,
    max("{}_pair") as {}_last$q$)
$$;

-- Rows with the [epoch, value] of each measure, made once a row: "offset 0" keeps the planner from
-- making it anew for each use, which costs half of a refresh.
create or replace function pgpulse.rows_with_pairs(r pgpulse.rollups, condition text) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select format(
        'select *%s from rollup.%I where %s offset 0',
        pgpulse.each(r.measures, $q$,
    case when "{}" is not null then array[date_part('epoch', "time"), "{}"] end as "{}_pair"$q$),
        r.rollup || '_rows',
        condition
    )
$$;

create or replace function pgpulse.partial_of_partials(r pgpulse.rollups) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select 'sum(points)::bigint as points' || pgpulse.each(r.measures, $q$,
    sum({}_count)::bigint as {}_count,
    sum({}_sum) as {}_sum,
    min({}_min) as {}_min,
    max({}_max) as {}_max,
    min({}_first) as {}_first,
    max({}_last) as {}_last$q$)
$$;

create or replace function pgpulse.partial_of_stored(r pgpulse.rollups) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select 'points' || pgpulse.each(r.measures, $q$,
    {}_count,
    {}_sum,
    {}_min,
    {}_max,
    case when {}_count > 0 then array[date_part('epoch', {}_first_at), {}_first] end as {}_first,
    case when {}_count > 0 then array[date_part('epoch', {}_last_at), {}_last] end as {}_last$q$)
$$;

-- The rest of an insert into one of the tables, from partial rows.
create or replace function pgpulse.put_partials(
    r pgpulse.rollups,
    suffix text,
    partials text,
    keys text
) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select format(
        $q$insert into rollup.%1$I as t (bucket%2$s, points%4$s)
select bucket%2$s, points%5$s
from %3$s
on conflict (%7$s bucket) do update set
    points = t.points + excluded.points%6$s$q$,
        r.rollup || suffix,
        keys,
        partials,
        pgpulse.each(r.measures, $q$,
    {}_count, {}_sum, {}_min, {}_max, {}_first, {}_first_at, {}_last, {}_last_at$q$),
        pgpulse.each(r.measures, $q$,
    {}_count, {}_sum, {}_min, {}_max,
    {}_first[2], to_timestamp({}_first[1]), {}_last[2], to_timestamp({}_last[1])$q$),
        pgpulse.each(r.measures, $q$,
    {}_count = t.{}_count + excluded.{}_count,
    {}_sum = coalesce(t.{}_sum + excluded.{}_sum, t.{}_sum, excluded.{}_sum),
    {}_min = least(t.{}_min, excluded.{}_min),
    {}_max = greatest(t.{}_max, excluded.{}_max),
    {}_first = case when t.{}_count = 0
        or (excluded.{}_first_at, excluded.{}_first) < (t.{}_first_at, t.{}_first)
        then excluded.{}_first else t.{}_first end,
    {}_first_at = least(t.{}_first_at, excluded.{}_first_at),
    {}_last = case when t.{}_count = 0
        or (excluded.{}_last_at, excluded.{}_last) > (t.{}_last_at, t.{}_last)
        then excluded.{}_last else t.{}_last end,
    {}_last_at = greatest(t.{}_last_at, excluded.{}_last_at)$q$),
        substr(keys, 2) || case when keys <> '' then ',' else '' end
    )
$$;

create or replace function pgpulse.quoted(names text[]) returns text[]
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(array_agg(quote_ident(name) order by i), '{}')
    from unnest(names) with ordinality as n (name, i)
$$;

create or replace function pgpulse.cluster() returns bigint
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    return (select system_identifier from pg_control_system());
exception when insufficient_privilege then
    return 0;
end
$$;

comment on function pgpulse.cluster is 'Identity of this PostgreSQL cluster; 0 where it is hidden.';

-- Notes the series and minutes of these rows ($1: as changed by which transaction).
create or replace function pgpulse.mark_changed(r pgpulse.rollups, rows text) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select format(
        $q$insert into rollup.%1$I (bucket%2$s, tx)
        select distinct %3$s%4$s, $1
        from %5$s
        where %6$I >= '1900-01-01 00:00:00+00' and %6$I < '2200-01-01 00:00:00+00'$q$,
        r.rollup || '_changed',
        pgpulse.each(pgpulse.quoted(r.keys), ', {}'),
        pgpulse.minute_of(quote_ident(r.time_column)),
        pgpulse.each(r.key_expressions, ', {}'),
        rows,
        r.time_column
    )
$$;

create or replace function pgpulse.rollup_changed() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    r pgpulse.rollups;
    rows text;
begin
    select * into r from pgpulse.rollups where rollup = tg_argv[0];
    -- Retention: the rows go, what was made of them stays.
    if r.rollup is null or current_setting('pgpulse.keep_rollups', true) = 'on' then
        return null;
    end if;
    foreach rows in array case tg_op
        when 'UPDATE' then array['old_rows', 'new_rows']
        when 'DELETE' then array['old_rows']
        else array[format('%I.%I', tg_table_schema, tg_table_name)]
    end loop
        execute pgpulse.mark_changed(r, rows) using txid_current();
    end loop;
    return null;
end
$$;

comment on function pgpulse.rollup_changed() is
    'Trigger function: notes which minutes of which series a statement has changed. '
    'set local pgpulse.keep_rollups = on keeps what was rolled up of rows that retention deletes.';

revoke execute on function pgpulse.rollup_changed from public;

-- Brings the triggers to a table and to those of its partitions that have none yet. mark: what they
-- hold came unseen, by attach partition for example, and is counted anew.
create or replace function pgpulse.capture_changes(r pgpulse.rollups, mark boolean) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    part record;
    name text := 'pgpulse_rollup_' || r.rollup;
begin
    for part in
        select c.oid::regclass as relation, a.atthasdef, c.relkind = 'r' as has_rows
        from (
            select relid from pg_partition_tree(r.source)
            union
            select r.source
        ) as tree
        join pg_class c on c.oid = tree.relid
        join pg_attribute a on a.attrelid = c.oid and a.attname = 'tx' and not a.attisdropped
        where c.relkind in ('r', 'p')
            and not exists (select from pg_trigger where tgrelid = c.oid and tgname = name || '_u')
    loop
        if not part.atthasdef then
            execute format(
                'alter table %s alter column tx set default txid_current()', part.relation
            );
        end if;
        execute format(
            $q$create trigger %2$I after update on %1$s
                referencing old table as old_rows new table as new_rows
                for each statement execute function pgpulse.rollup_changed(%5$L);
            create trigger %3$I after delete on %1$s
                referencing old table as old_rows
                for each statement execute function pgpulse.rollup_changed(%5$L);
            create trigger %4$I before truncate on %1$s
                for each statement execute function pgpulse.rollup_changed(%5$L)$q$,
            part.relation, name || '_u', name || '_d', name || '_t', r.rollup
        );
        if mark and part.has_rows then
            execute pgpulse.mark_changed(r, part.relation::text) using 0::bigint;
        end if;
    end loop;
end
$$;

create or replace function pgpulse.make_rollup_view(r pgpulse.rollups) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    keys text := pgpulse.each(pgpulse.quoted(r.keys), ', {}');
    branches text[];
    step record;
    read_columns text := pgpulse.each(r.measures, $q$,
    {}_sum / nullif({}_count, 0) as {}_avg,
    {}_min,
    {}_max,
    {}_sum,
    {}_count,
    {}_first,
    {}_last$q$);
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
    for step in
        select *
        from (values ('1 minute', '_1m'), ('1 hour', '_1h'), ('1 day', '_1d')) as steps (step, suffix)
    loop
        branches := branches || format(
            $q$(with tail as materialized (select %6$s as bucket, * from rollup.%5$I()),
begins as materialized (select coalesce(min(bucket), 'infinity') as at from tail)
select interval %1$L, bucket%2$s, points%3$s
from rollup.%4$I
where bucket < (select at from begins)
union all
select interval %1$L, bucket%2$s, points%8$s
from (
    select bucket%2$s, %9$s
    from (
        select bucket%2$s, %10$s
        from rollup.%4$I
        where bucket >= (select at from begins)
        union all
        select bucket%2$s, 1%7$s
        from tail
    ) as parts
    group by bucket%2$s
) as newest)$q$,
            step.step,
            keys,
            read_columns,
            r.rollup || step.suffix,
            r.rollup || '_tail',
            pgpulse.minute_of('"time"', step.step::interval),
            pgpulse.each(r.measures, $q$,
            ("{}" is not null)::int,
            "{}",
            "{}",
            "{}",
            case when "{}" is not null then array[date_part('epoch', "time"), "{}"] end,
            case when "{}" is not null then array[date_part('epoch', "time"), "{}"] end$q$),
            regexp_replace(read_columns, '(\w+_(?:first|last))', '\1[2] as \1', 'g'),
            pgpulse.partial_of_partials(r),
            pgpulse.partial_of_stored(r)
        );
    end loop;
    -- A function, as the planner would take the rows for many and call up parallel workers; and
    -- without "parallel safe" for the same reason: starting them costs more than most panels.
    execute format(
        $q$create or replace function rollup.%1$I() returns setof rollup.%2$I
language plpgsql
stable
security definer
rows 1000
set search_path = pg_catalog, pg_temp
as $f$
declare
    done bigint;
begin
    select rolled_tx into done from pgpulse.rollups where rollup = %3$L;
    return query select * from rollup.%2$I where tx >= done;
end
$f$
$q$,
        r.rollup || '_tail', r.rollup || '_rows', r.rollup
    );
    execute format('revoke execute on function rollup.%I from public', r.rollup || '_tail');
    execute format(
        'create or replace view rollup.%I as %s', r.rollup, array_to_string(branches, E'\nunion all\n')
    );
end
$$;

create or replace function pgpulse.rollup_items(items text[], what text, rollup text)
returns table (names text[], expressions text[])
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    item text;
    part text[];
begin
    names := '{}';
    expressions := '{}';
    foreach item in array items loop
        part := coalesce(
            regexp_match(item, '^\s*(.+?)\s+as\s+"?(\w+)"?\s*$', 'i'),
            array[quote_ident(item), item]
        );
        if part[2] !~ '^[a-z_][a-z0-9_]{0,40}$'
            or part[2] in ('time', 'step', 'bucket', 'points', 'tx')
            or part[2] = any (names) then
            raise exception 'Cannot add rollup "%": it cannot call a % "%"', rollup, what, part[2]
                using hint = format('Give it another name: array[%L]', part[1] || ' as a_name');
        end if;
        names := names || part[2];
        expressions := expressions || part[1];
    end loop;
    return next;
end
$$;

create or replace function pgpulse.add_rollup(
    source regclass,
    time_column text,
    measures text[],
    keys text[] default '{}',
    name text default null
) returns void
language plpgsql
as $$
#variable_conflict use_column
declare
    r pgpulse.rollups;
    old pgpulse.rollups;
    kind text;
    columns text;
    suffix text;
begin
    r.source := add_rollup.source;
    r.time_column := add_rollup.time_column;
    r.rollup := coalesce(add_rollup.name, (select relname from pg_class where oid = add_rollup.source));
    if r.rollup !~ '^[a-z_][a-z0-9_]{0,50}$' then
        raise exception 'Cannot add rollup "%": a name has a-z, 0-9 and _, 51 at most', r.rollup
            using hint = 'Give one: name => ''a_name''';
    end if;
    select relkind into kind from pg_class where oid = r.source;
    if kind not in ('r', 'p') or exists (select from pg_inherits where inhrelid = r.source) then
        raise exception 'Cannot add rollup "%": % is no table of its own', r.rollup, r.source
            using hint = 'A rollup stands on a table, or on the whole of a partitioned one';
    end if;
    if not exists (
        select
        from pg_attribute
        where attrelid = r.source and attname = r.time_column and atttypid = 'timestamptz'::regtype
    ) then
        raise exception 'Cannot add rollup "%": % has no timestamptz column "%"',
            r.rollup, r.source, r.time_column
            using hint = 'alter table ... alter column ... type timestamptz makes it one';
    end if;
    select names, expressions into r.keys, r.key_expressions
    from pgpulse.rollup_items(add_rollup.keys, 'key', r.rollup);
    select names, expressions into r.measures, r.measure_expressions
    from pgpulse.rollup_items(add_rollup.measures, 'measure', r.rollup);
    if r.keys && r.measures or cardinality(r.measures) = 0 then
        raise exception 'Cannot add rollup "%": it needs measures, named otherwise than its keys', r.rollup
            using hint = 'measures => array[''value as reading'']';
    end if;
    select * into old from pgpulse.rollups o where o.rollup = r.rollup;
    if old.rollup is not null then
        if (old.source, old.time_column, old.keys, old.key_expressions, old.measures,
            old.measure_expressions)
            is distinct from (r.source, r.time_column, r.keys, r.key_expressions, r.measures,
            r.measure_expressions) then
            raise exception 'Cannot change rollup "%"', r.rollup
                using hint = format(
                    'select pgpulse.drop_rollup(%L) drops what was rolled up; then add it again, '
                        'or add the new one under another name', r.rollup
                );
        end if;
        perform pgpulse.make_rollup_view(old);
        perform pgpulse.capture_changes(old, true);
        return;
    end if;

    -- txid_current() is stable: no row is rewritten. BRIN: next to nothing for each insert.
    if not exists (
        select from pg_attribute where attrelid = r.source and attname = 'tx' and not attisdropped
    ) then
        execute format('alter table %s add column tx bigint default txid_current()', r.source);
        execute format('create index on %s using brin (tx) with (pages_per_range = 32)', r.source);
        execute format('comment on column %s.tx is %L', r.source,
            'Transaction that inserted the row: how rollups find what is new. Never write it.');
    end if;
    -- Numbers that would spoil a whole sum count as none: NaN, the infinities, beyond 1e300.
    execute format(
        $q$create view rollup.%1$I as
select "time"%2$s%3$s, tx
from (select %4$I as "time"%5$s%6$s, tx from %7$s) as source
where "time" >= '1900-01-01 00:00:00+00' and "time" < '2200-01-01 00:00:00+00'$q$,
        r.rollup || '_rows',
        pgpulse.each(pgpulse.quoted(r.keys), ', {}'),
        pgpulse.each(r.measures, ', case when abs("{}") <= 1e300 then "{}" end as "{}"'),
        r.time_column,
        (select coalesce(string_agg(format(', %s as %I', e, n), ''), '')
            from unnest(r.keys, r.key_expressions) as k (n, e)),
        (select string_agg(format(', (%s)::float8 as %I', e, n), '')
            from unnest(r.measures, r.measure_expressions) as m (n, e)),
        r.source
    );
    select string_agg(format(E',\n    %I %s', attname, format_type(atttypid, atttypmod)), '' order by attnum)
    into columns
    from pg_attribute
    where attrelid = format('rollup.%I', r.rollup || '_rows')::regclass
        and attname = any (r.keys)
        and attnum > 0;
    foreach suffix in array array['_1m', '_1h', '_1d'] loop
        execute format(
            $q$create table rollup.%1$I (
    bucket timestamptz not null%2$s,
    points bigint not null%3$s
) with (fillfactor = 80)$q$,
            r.rollup || suffix,
            columns,
            pgpulse.each(r.measures, $q$,
    {}_count bigint not null,
    {}_sum float8,
    {}_min float8,
    {}_max float8,
    {}_first float8,
    {}_first_at timestamptz,
    {}_last float8,
    {}_last_at timestamptz$q$)
        );
        execute format(
            'create unique index on rollup.%I (%s) nulls not distinct',
            r.rollup || suffix, substr(pgpulse.each(pgpulse.quoted(r.keys), ', {}') || ', bucket', 3)
        );
        if cardinality(r.keys) > 0 then
            execute format(
                'create index on rollup.%I using %s (bucket)',
                r.rollup || suffix, case suffix when '_1m' then 'brin' else 'btree' end
            );
        end if;
    end loop;
    execute format(
        'create table rollup.%I (bucket timestamptz not null%s, tx bigint not null)',
        r.rollup || '_changed', columns
    );
    r.rolled_tx := 0;
    r.cluster := pgpulse.cluster();
    insert into pgpulse.rollups select r.*;
    perform pgpulse.make_rollup_view(r);
    perform pgpulse.capture_changes(r, false);
end
$$;

comment on function pgpulse.add_rollup is
    'Rolls a table up by minute, hour and day, to be read as rollup.<name>. time_column: a timestamptz. '
    'keys, measures: columns or ''expression as name''; keys tell series apart, measures are cast to '
    'double precision. The table gets a last column tx and triggers; pgpulse.refresh_rollups keeps up.';

create or replace function pgpulse.drop_rollup(name text) returns void
language plpgsql
as $$
declare
    r pgpulse.rollups;
    trigger record;
    suffix text;
begin
    delete from pgpulse.rollups d where d.rollup = drop_rollup.name returning * into r;
    if r.rollup is null then
        raise exception 'Cannot drop rollup "%": there is none of that name', name
            using hint = 'select rollup from pgpulse.rollups lists them';
    end if;
    for trigger in
        select tgrelid::regclass as relation, tgname
        from pg_trigger
        where tgname in (
            'pgpulse_rollup_' || r.rollup || '_u',
            'pgpulse_rollup_' || r.rollup || '_d',
            'pgpulse_rollup_' || r.rollup || '_t'
        )
    loop
        execute format('drop trigger %I on %s', trigger.tgname, trigger.relation);
    end loop;
    execute format('drop view if exists rollup.%I', r.rollup);
    execute format('drop function if exists rollup.%I()', r.rollup || '_tail');
    execute format('drop view if exists rollup.%I', r.rollup || '_rows');
    foreach suffix in array array['_1m', '_1h', '_1d', '_changed'] loop
        execute format('drop table rollup.%I', r.rollup || suffix);
    end loop;
    if not exists (select from pgpulse.rollups o where o.source = r.source)
        and exists (select from pg_class where oid = r.source) then
        execute format('alter table %s drop column tx', r.source);
    end if;
end
$$;

comment on function pgpulse.drop_rollup is
    'Drops a rollup with what it has rolled up, its triggers, and with the last one the column tx.';

create or replace function pgpulse.refresh_rollup(r pgpulse.rollups, upto bigint)
returns table (added bigint, recounted bigint)
language plpgsql
set search_path = pg_catalog, pg_temp
-- Groups of a few rows each: hashing beats sorting by text keys, whatever the planner thinks.
set enable_sort = off
set work_mem = '64MB'
set jit = off
as $$
declare
    keys text := pgpulse.each(pgpulse.quoted(r.keys), ', {}');
    same text;
    changed boolean;
    step record;
begin
    -- Restored into another cluster, where transaction numbers start anew: what there is of raw rows
    -- is counted again, and what was rolled up of rows that are gone stays.
    if r.cluster <> pgpulse.cluster() or r.rolled_tx > txid_snapshot_xmax(txid_current_snapshot()) then
        set local pgpulse.keep_rollups = on;
        execute format('update %s set tx = 0 where tx >= $1', r.source)
            using txid_snapshot_xmax(txid_current_snapshot());
        set local pgpulse.keep_rollups = off;
        execute format('update rollup.%I set tx = 0', r.rollup || '_changed');
        execute pgpulse.mark_changed(r, r.source::text) using 0::bigint;
        r.rolled_tx := upto;
    end if;
    execute format(
        $q$with _1m as materialized (
    select %1$s as bucket%2$s, %3$s
    from (%4$s) as fresh
    group by 1%2$s
), _1h as materialized (
    select %5$s as bucket%2$s, %7$s
    from _1m
    group by 1%2$s
), _1d as materialized (
    select %6$s as bucket%2$s, %7$s
    from _1h
    group by 1%2$s
), put_1m as (
%8$s
), put_1h as (
%9$s
), put_1d as (
%10$s
)
select coalesce(sum(points), 0) from _1d$q$,
        pgpulse.minute_of('"time"'),
        keys,
        pgpulse.partial_of_rows(r),
        pgpulse.rows_with_pairs(r, 'tx >= $1 and tx < $2'),
        pgpulse.minute_of('_1m.bucket', '1 hour'),
        pgpulse.minute_of('_1h.bucket', '1 day'),
        pgpulse.partial_of_partials(r),
        pgpulse.put_partials(r, '_1m', '_1m', keys),
        pgpulse.put_partials(r, '_1h', '_1h', keys),
        pgpulse.put_partials(r, '_1d', '_1d', keys)
    ) into added using r.rolled_tx, upto;

    recounted := 0;
    execute format('select exists (select from rollup.%I where tx < $1)', r.rollup || '_changed')
        into changed using upto;
    if not changed then
        return next;
        return;
    end if;
    execute format(
        'create temp table pgpulse_changed on commit drop as
        select distinct bucket%s from rollup.%I where tx < %s',
        keys, r.rollup || '_changed', upto
    );
    execute format('delete from rollup.%I where tx < $1', r.rollup || '_changed') using upto;
    -- Equality where there can be no null: only that can use an index or a hash.
    select coalesce(string_agg(format(
        case
            when a.attnotnull then ' and s.%1$I = d.%1$I'
            else ' and s.%1$I is not distinct from d.%1$I'
        end,
        k.n
    ), ''), '')
    into same
    from unnest(r.keys, r.key_expressions) as k (n, e)
    left join pg_attribute a on a.attrelid = r.source and quote_ident(a.attname) = k.e;
    for step in
        select
            steps.*,
            case suffix when '_1m' then 'time' else 'bucket' end as time_column,
            case suffix when '_1m' then pgpulse.partial_of_rows(r)
                else pgpulse.partial_of_partials(r) end as partials,
            case suffix when '_1m' then '*' || pgpulse.each(r.measures, $q$,
    case when "{}" is not null then array[date_part('epoch', "time"), "{}"] end as "{}_pair"$q$)
                else 'bucket' || keys || ', ' || pgpulse.partial_of_stored(r) end as columns
        from (values
            ('1 minute', '_1m', '_rows'),
            ('1 hour', '_1h', '_1m'),
            ('1 day', '_1d', '_1h')
        ) as steps (step, suffix, finer)
    loop
        if step.suffix <> '_1m' then
            execute format(
                'create temp table pgpulse_coarser on commit drop as
                select distinct %s as bucket%s from pgpulse_changed',
                pgpulse.minute_of('bucket', step.step::interval), keys
            );
            drop table pg_temp.pgpulse_changed;
            alter table pg_temp.pgpulse_coarser rename to pgpulse_changed;
        end if;
        analyze pg_temp.pgpulse_changed;
        execute format(
            'delete from rollup.%I s using pg_temp.pgpulse_changed d where s.bucket = d.bucket%s',
            r.rollup || step.suffix, same
        );
        execute format(
            $q$with partials as (
    select d.bucket%1$s, %2$s
    from pg_temp.pgpulse_changed d
    join (select %3$s from rollup.%4$I) s
        on %5$s = d.bucket and s.%6$I >= d.bucket and s.%6$I < d.bucket + interval %7$L%8$s
    %9$s
    group by d.bucket%1$s
)
%10$s$q$,
            pgpulse.each(pgpulse.quoted(r.keys), ', d.{}'),
            step.partials,
            step.columns,
            r.rollup || step.finer,
            pgpulse.minute_of(format('s.%I', step.time_column), step.step::interval),
            step.time_column,
            step.step,
            same,
            case step.suffix when '_1m' then format('where s.tx is null or s.tx < %s', upto) end,
            pgpulse.put_partials(r, step.suffix, 'partials', keys)
        );
        if step.suffix = '_1m' then
            get diagnostics recounted = row_count;
        end if;
    end loop;
    drop table pg_temp.pgpulse_changed;
    return next;
end
$$;

create or replace function pgpulse.refresh_rollups(name text default null)
returns table (rollup text, added bigint, recounted bigint, fault text)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    r pgpulse.rollups;
    upto bigint;
begin
    for r in
        select * from pgpulse.rollups known
        where known.rollup = coalesce(refresh_rollups.name, known.rollup)
        order by 1
    loop
        -- Another refresher is at work; held to the end of the transaction, as poolers need it.
        continue when not pg_try_advisory_xact_lock(hashtextextended('pgpulse rollup ' || r.rollup, 0));
        -- It may have been quicker: read again what is rolled up, now that we alone move it.
        select * into r from pgpulse.rollups known where known.rollup = r.rollup;
        continue when r.rollup is null;
        upto := txid_snapshot_xmin(txid_current_snapshot());
        refresh_rollups.rollup := r.rollup;
        refresh_rollups.fault := null;
        begin
            select f.added, f.recounted into refresh_rollups.added, refresh_rollups.recounted
            from pgpulse.refresh_rollup(r, upto) f;
            update pgpulse.rollups s
            set rolled_tx = upto, cluster = pgpulse.cluster(), refreshed_at = clock_timestamp(), fault = null
            where s.rollup = r.rollup;
        exception when others then
            refresh_rollups.fault := sqlerrm;
            update pgpulse.rollups s set fault = sqlerrm where s.rollup = r.rollup;
        end;
        return next;
    end loop;
    -- Last, as these take locks: who must wait for them waits until the next call instead.
    for r in
        select * from pgpulse.rollups known
        where known.rollup = coalesce(refresh_rollups.name, known.rollup)
        order by 1
    loop
        begin
            set local lock_timeout = '100ms';
            perform brin_summarize_new_values(i.indexrelid)
            from (
                select relid from pg_partition_tree(r.source)
                union
                select r.source
            ) as tree
            join pg_index i on i.indrelid = tree.relid
            join pg_class c on c.oid = i.indexrelid and c.relkind = 'i'
            join pg_am m on m.oid = c.relam and m.amname = 'brin'
            join pg_attribute a on a.attrelid = c.oid and a.attname = 'tx';
            perform pgpulse.capture_changes(r, true);
        exception when lock_not_available or undefined_table then
            null;
        end;
    end loop;
    set local lock_timeout = default;
end
$$;

comment on function pgpulse.refresh_rollups is
    'Rolls up what has come, changed and gone since the last call; safe to call from many places. '
    'added: rows; recounted: rows of one minute made again because of updates and deletes.';

revoke execute on function pgpulse.refresh_rollups from public;

create or replace function pgpulse.recount_rollup(name text, "from" timestamptz, "to" timestamptz)
returns void
language plpgsql
as $$
declare
    r pgpulse.rollups;
    keys text;
begin
    select * into r from pgpulse.rollups known where known.rollup = recount_rollup.name;
    if r.rollup is null then
        raise exception 'Cannot recount rollup "%": there is none of that name', name
            using hint = 'select rollup from pgpulse.rollups lists them';
    end if;
    keys := pgpulse.each(pgpulse.quoted(r.keys), ', {}');
    execute pgpulse.mark_changed(r, format(
        '(select * from %s where %I >= %L and %I < %L) as rows',
        r.source, r.time_column, "from", r.time_column, "to"
    )) using 0::bigint;
    execute format(
        'insert into rollup.%1$I (bucket%2$s, tx) select bucket%2$s, 0
        from rollup.%3$I where bucket >= $1 and bucket < $2',
        r.rollup || '_changed', keys, r.rollup || '_1m'
    ) using "from", "to";
end
$$;

comment on function pgpulse.recount_rollup is
    'Has a range counted again from the source at the next refresh: after a write that triggers do not '
    'see. What was rolled up of rows that are gone from the source is lost in that range.';

-- Views follow a new version of this file.
do $do$
declare
    r pgpulse.rollups;
begin
    for r in select * from pgpulse.rollups where to_regclass(source::text) is not null loop
        perform pgpulse.make_rollup_view(r);
    end loop;
end
$do$;

create or replace function pgpulse.step(
    "from" timestamptz,
    "to" timestamptz,
    points int default 500,
    raw interval default '2 hours'
) returns interval
language sql
immutable
parallel safe
as $$
    select case
        when "to" - "from" <= raw then interval '0'
        when "to" - "from" <= points * interval '1 minute' then interval '1 minute'
        when "to" - "from" <= points * interval '1 hour' then interval '1 hour'
        else interval '1 day'
    end
$$;

comment on function pgpulse.step is
    'The step of a rollup that suits a range: rows as they are up to raw, then the finest step that '
    'draws at most this many points. where step = pgpulse.step($__timeFrom(), $__timeTo())';
