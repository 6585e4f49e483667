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

create or replace function pgpulse.quoted(names text[]) returns text[]
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(array_agg(quote_ident(name) order by i), '{}')
    from unnest(names) with ordinality as n (name, i)
$$;

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

-- Times, keys and measures under the rollup's own names. Numbers that would spoil a whole sum count
-- as none: NaN, the infinities, beyond 1e300.
create or replace function pgpulse.rows_query(
    r pgpulse.rollups,
    relation text,
    tx text default 'tx'
) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select format(
        $q$select "time"%1$s%2$s, tx
from (select %3$I as "time"%4$s%5$s, %7$s as tx from %6$s) as source
where "time" >= '1900-01-01 00:00:00+00' and "time" < '2200-01-01 00:00:00+00'$q$,
        pgpulse.each(pgpulse.quoted(r.keys), ', {}'),
        pgpulse.each(r.measures, ', case when abs("{}") <= 1e300 then "{}" end as "{}"'),
        r.time_column,
        (select coalesce(string_agg(format(', %s as %I', e, n), ''), '')
            from unnest(r.keys, r.key_expressions) as k (n, e)),
        (select string_agg(format(', (%s)::float8 as %I', e, n), '')
            from unnest(r.measures, r.measure_expressions) as m (n, e)),
        relation,
        tx
    )
$$;

-- The rows that are not packed: those that can be new. By the text of the view <name>_rows, in which all
-- names are resolved; of the table behind, no view must hinder that it is dropped.
create or replace function pgpulse.fresh_query(r pgpulse.rollups) returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when pgpulse.rows_of(r.source) = r.source then format('select * from %s', view)
        else rtrim(replace(
            pg_get_viewdef(view),
            format(' FROM %s', r.source),
            format(' FROM %s %I', pgpulse.rows_of(r.source), (select relname from pg_class where oid = r.source))
        ), ';')
    end
    from cast(format('rollup.%I', r.rollup || '_rows') as regclass) as view
$$;

-- The [epoch, value] of each measure.
create or replace function pgpulse.pairs(r pgpulse.rollups) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select pgpulse.each(r.measures, $q$,
    case when "{}" is not null then array[date_part('epoch', "time"), "{}"] end as "{}_pair"$q$)
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

-- Brings partial rows into one of the tables; fresh: none of them is there yet, which is cheaper.
-- Sorted they cost the index less, and later the readers of one series.
create or replace function pgpulse.put_partials(
    r pgpulse.rollups,
    suffix text,
    partials text,
    fresh boolean default false
) returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select format(
        $q$insert into rollup.%1$I as t (bucket%2$s, points%4$s)
select bucket%2$s, points%5$s
from %3$s
order by %7$s
$q$ || case when not fresh then $q$on conflict (%8$s) do update set
    points = t.points + excluded.points%6$s$q$ else '' end,
        r.rollup || suffix,
        pgpulse.each(pgpulse.quoted(r.keys), ', {}'),
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
        string_agg(
            quote_ident(c.name) || case when a.attcollation <> 0 then ' collate "C"' else '' end,
            ', ' order by i
        ),
        string_agg(quote_ident(c.name), ', ' order by i)
    )
    from unnest(r.keys || 'bucket'::text) with ordinality as c (name, i)
    join pg_attribute a
        on a.attrelid = format('rollup.%I', r.rollup || suffix)::regclass and a.attname = c.name
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

-- Brings the triggers to the table that holds the rows and to those of its partitions that have none
-- yet. rolled: a partition without them may hold rows from before this transaction that came unseen,
-- by attach partition for example; these are counted anew. Without it, nothing is.
create or replace function pgpulse.capture_changes(r pgpulse.rollups, rolled bigint default null)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    part record;
    name text := 'pgpulse_rollup_' || r.rollup;
begin
    for part in
        select c.oid::regclass as relation, a.atthasdef, c.relkind = 'r' as has_rows
        from pgpulse.parts_of(r.source) as p
        join pg_class c on c.oid = p
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
        if rolled is not null and part.has_rows then
            execute pgpulse.mark_changed(r, format(
                '(select * from %s where tx is null or tx < %s) as rows', part.relation, rolled
            )) using 0::bigint;
        end if;
    end loop;
end
$$;

create or replace function pgpulse.make_rollup_rows(r pgpulse.rollups) returns void
language plpgsql
as $$
begin
    execute format(
        'create or replace view rollup.%I as %s',
        r.rollup || '_rows',
        pgpulse.rows_query(
            r, r.source::text, case when pgpulse.is_hypertable(r.source) then '0::bigint' else 'tx' end
        )
    );
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
    if pgpulse.is_hypertable(r.source) then
        perform pgpulse.make_cagg_view(r);
        return;
    end if;
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
            $q$select interval %1$L, bucket%2$s, points%3$s
from rollup.%4$I
where bucket < (select %6$s)
union all
select interval %1$L, bucket%2$s, points%9$s
from (
    with tail as materialized (select %7$s as bucket, * from rollup.%5$I()),
    begins as materialized (select coalesce(min(bucket), 'infinity') as at from tail)
    select bucket%2$s, %10$s
    from (
        select bucket%2$s, %11$s
        from rollup.%4$I
        where bucket >= (select at from begins)
        union all
        select bucket%2$s, 1%8$s
        from tail
    ) as parts
    group by bucket%2$s
) as newest$q$,
            step.step,
            keys,
            read_columns,
            r.rollup || step.suffix,
            r.rollup || '_tail',
            pgpulse.minute_of(format('rollup.%I()', r.rollup || '_begins'), step.step::interval),
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
    -- Functions, as the planner would take the rows for many and call up parallel workers; and
    -- without "parallel safe" for the same reason: starting them costs more than most panels. The
    -- begin of the tail is a function of its own so that the parts of the view stay simple enough
    -- for the planner to leave out columns that nobody asked for.
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
    return query select * from (%4$s) as fresh where tx >= done;
end
$f$;
create or replace function rollup.%5$I() returns timestamptz
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $f$
declare
    done bigint;
begin
    select rolled_tx into done from pgpulse.rollups where rollup = %3$L;
    -- "offset 0", or an index on the time would be read from its begin until such a row is found.
    return (
        select coalesce(min("time"), 'infinity')
        from (select "time" from (%4$s) as fresh where tx >= done offset 0) as tail
    );
end
$f$
$q$,
        r.rollup || '_tail',
        r.rollup || '_rows',
        r.rollup,
        pgpulse.fresh_query(r),
        r.rollup || '_begins'
    );
    execute format(
        'revoke execute on function rollup.%I, rollup.%I from public',
        r.rollup || '_tail', r.rollup || '_begins'
    );
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
    rows regclass;
    columns text;
    suffix text;
begin
    r.source := pgpulse.name_of(add_rollup.source);
    r.time_column := add_rollup.time_column;
    r.rollup := coalesce(add_rollup.name, (select relname from pg_class where oid = r.source));
    if r.rollup !~ '^[a-z_][a-z0-9_]{0,50}$' then
        raise exception 'Cannot add rollup "%": a name has a-z, 0-9 and _, 51 at most', r.rollup
            using hint = 'Give one: name => ''a_name''';
    end if;
    rows := pgpulse.rows_of(r.source);
    select relkind into kind from pg_class where oid = rows;
    if kind not in ('r', 'p') or exists (select from pg_inherits where inhrelid = rows) then
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
        perform pgpulse.remake_rollup(old.rollup);
        return;
    end if;

    if pgpulse.is_hypertable(r.source) then
        perform pgpulse.add_caggs(r);
        return;
    end if;
    -- txid_current() is stable: no row is rewritten. BRIN: next to nothing for each insert.
    if not exists (
        select from pg_attribute where attrelid = r.source and attname = 'tx' and not attisdropped
    ) then
        if rows <> r.source then
            raise exception 'Cannot add rollup "%": % has no column tx', r.rollup, r.source
                using hint = 'Add the rollup before the storage';
        end if;
        execute format('alter table %s add column tx bigint default txid_current()', rows);
        execute format('comment on column %s.tx is %L', rows,
            'Transaction that inserted the row: how rollups find what is new. Never write it.');
    end if;
    if not exists (
        select
        from pg_index i
        join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
        where i.indrelid = rows and a.attname = 'tx'
    ) then
        execute format('create index on %s using brin (tx) with (pages_per_range = 32)', rows);
    end if;
    perform pgpulse.make_rollup_rows(r);
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
    insert into pgpulse.rollups
        (rollup, source, time_column, keys, key_expressions, measures, measure_expressions, cluster)
    values (
        r.rollup,
        r.source,
        r.time_column,
        r.keys,
        r.key_expressions,
        r.measures,
        r.measure_expressions,
        pgpulse.cluster()
    )
    returning * into r;
    perform pgpulse.make_rollup_view(r);
    perform pgpulse.capture_changes(r);
    -- Graded windows of streams may read it.
    perform pg_notify('pgpulse', 'pgpulse.streams');
end
$$;

comment on function pgpulse.add_rollup is
    'Rolls a table up by minute, hour and day, to be read as rollup.<name>. time_column: a timestamptz. '
    'keys, measures: columns or ''expression as name''; keys tell series apart, measures are cast to '
    'double precision. The table gets a last column tx and triggers; pgpulse.refresh_rollups keeps up.';

create or replace function pgpulse.remake_rollup(name text) returns void
language plpgsql
as $$
declare
    r pgpulse.rollups;
    trigger record;
begin
    select * into r from pgpulse.rollups known where known.rollup = remake_rollup.name;
    if r.rollup is null then
        raise exception 'Cannot remake rollup "%": there is none of that name', name
            using hint = 'select rollup from pgpulse.rollups lists them';
    end if;
    for trigger in
        select tgrelid::regclass as relation, tgname
        from pg_trigger
        where tgfoid = 'pgpulse.rollup_changed'::regproc
            and tgname ~ ('^pgpulse_rollup_' || r.rollup || '_[udt]$')
            and not exists (select from pgpulse.parts_of(r.source) as p where p = tgrelid)
    loop
        execute format('drop trigger %I on %s', trigger.tgname, trigger.relation);
    end loop;
    perform pgpulse.make_rollup_rows(r);
    perform pgpulse.make_rollup_view(r);
    if not pgpulse.is_hypertable(r.source) then
        perform pgpulse.capture_changes(r, r.rolled_tx);
    end if;
end
$$;

comment on function pgpulse.remake_rollup is
    'Puts a rollup''s views and triggers on what its source is now: after it became a view, or got '
    'other partitions. What was rolled up stays.';

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
    perform pg_notify('pgpulse', 'pgpulse.streams');
    if coalesce(
        (select relkind from pg_class where oid = to_regclass(format('rollup.%I', r.rollup || '_1m'))), 'v'
    ) <> 'r' then
        perform pgpulse.drop_caggs(r);
        return;
    end if;
    for trigger in
        select tgrelid::regclass as relation, tgname
        from pg_trigger
        where tgfoid = 'pgpulse.rollup_changed'::regproc
            and tgname ~ ('^pgpulse_rollup_' || r.rollup || '_[udt]$')
    loop
        execute format('drop trigger %I on %s', trigger.tgname, trigger.relation);
    end loop;
    execute format('drop view if exists rollup.%I', r.rollup);
    execute format('drop function if exists rollup.%I(), rollup.%I()', r.rollup || '_tail', r.rollup || '_begins');
    execute format('drop view if exists rollup.%I', r.rollup || '_rows');
    foreach suffix in array array['_1m', '_1h', '_1d', '_changed'] loop
        execute format('drop table rollup.%I', r.rollup || suffix);
    end loop;
    if not exists (select from pgpulse.rollups o where o.source = r.source)
        and exists (
            select
            from pg_attribute a
            where a.attrelid = r.source
                and a.attname = 'tx'
                and col_description(a.attrelid, a.attnum) like 'Transaction that inserted the row: how rollups%'
        ) then
        execute format('alter table %s drop column tx', r.source);
    end if;
end
$$;

comment on function pgpulse.drop_rollup is
    'Drops a rollup with what it has rolled up, its triggers, and with the last one the column tx.';

-- Restored into another cluster transaction numbers start anew. Rows that were not rolled up yet, and
-- those whose number may be of either cluster, are counted again with all of their minute.
create or replace function pgpulse.adopt_rollup(r pgpulse.rollups, upto bigint) returns pgpulse.rollups
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    ahead bigint := txid_snapshot_xmax(txid_current_snapshot());
    rows regclass := pgpulse.rows_of(r.source);
begin
    if r.cluster = pgpulse.cluster() and r.rolled_tx <= ahead then
        return r;
    end if;
    execute pgpulse.mark_changed(r, format(
        '(select * from %s where tx > 0 and (tx < %s or tx >= %s)) as rows', rows, ahead, r.rolled_tx
    )) using 0::bigint;
    set local pgpulse.keep_rollups = on;
    execute format('update %s set tx = 0 where tx >= $1', rows) using ahead;
    set local pgpulse.keep_rollups = off;
    execute format('update rollup.%I set tx = 0', r.rollup || '_changed');
    r.rolled_tx := upto;
    return r;
end
$$;

-- How far to go so that there are no more than so many rows; all those of one transaction go at once.
create or replace function pgpulse.refresh_upto(r pgpulse.rollups, upto bigint, most int) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    piece text := format(
        'from (select tx from %s where tx >= $1 and tx < $2 limit $3) as piece', pgpulse.rows_of(r.source)
    );
    found bigint;
    half bigint;
begin
    loop
        execute 'select count(*) ' || piece into found using r.rolled_tx, upto, most;
        exit when found < most;
        execute 'select greatest(percentile_disc(0.5) within group (order by tx), min(tx) + 1) ' || piece
            into half using r.rolled_tx, upto, most;
        exit when half >= upto;
        upto := half;
    end loop;
    return upto;
end
$$;

-- Adds rows, given as a query of the form of pgpulse.rows_query, to what there is. Who calls it has the
-- rollup's lock.
create or replace function pgpulse.add_rows(r pgpulse.rollups, rows text) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
-- Groups of a few rows each: hashing beats sorting by text keys, whatever the planner thinks.
set enable_sort = off
set work_mem = '64MB'
set jit = off
as $$
declare
    keys text := pgpulse.each(pgpulse.quoted(r.keys), ', {}');
    added bigint;
    latest timestamptz;
begin
    -- "offset 0" makes the pairs once a row and not anew for each use, which costs half of a refresh.
    execute format(
        $q$with _1m as materialized (
    select %1$s as bucket%2$s, %3$s
    from (
        select *%4$s
        from (%5$s) as rows
        offset 0
    ) as fresh
    group by 1%2$s
), _1h as materialized (
    select %6$s as bucket%2$s, %8$s
    from _1m
    group by 1%2$s
), _1d as materialized (
    select %7$s as bucket%2$s, %8$s
    from _1h
    group by 1%2$s
), fresh_1m as (
%9$s
), put_1m as (
%10$s
), put_1h as (
%11$s
), put_1d as (
%12$s
)
select (select coalesce(sum(points)::bigint, 0) from _1d), (select max(bucket) from _1m)$q$,
        pgpulse.minute_of('"time"'),
        keys,
        pgpulse.partial_of_rows(r),
        pgpulse.pairs(r),
        rows,
        pgpulse.minute_of('_1m.bucket', '1 hour'),
        pgpulse.minute_of('_1h.bucket', '1 day'),
        pgpulse.partial_of_partials(r),
        pgpulse.put_partials(
            r, '_1m', format('_1m where bucket > %L and bucket >= %L', r.newest, r.since_1m), true
        ),
        pgpulse.put_partials(
            r, '_1m', format('_1m where bucket <= %L and bucket >= %L', r.newest, r.since_1m)
        ),
        pgpulse.put_partials(r, '_1h', format('_1h where bucket >= %L', r.since_1h)),
        pgpulse.put_partials(r, '_1d', format('_1d where bucket >= %L', r.since_1d))
    ) into added, latest;
    update pgpulse.rollups known
    set newest = greatest(known.newest, latest)
    where known.rollup = r.rollup and latest > known.newest;
    return added;
end
$$;

comment on function pgpulse.add_rows is
    'Adds rows to a rollup that no refresh will see come, as they are packed or purged at once.';

-- Counts again what was noted as changed, at most so many series and minutes of it, day by day, so
-- that the planner knows where the rows are. What a step has of a day is made of the next finer one
-- that still has that day; a day whose rows are gone stays as it is.
create or replace function pgpulse.recount_changed(r pgpulse.rollups, upto bigint, most int)
returns table (recounted bigint, more boolean)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_sort = off
set work_mem = '64MB'
set jit = off
as $$
declare
    keys text := pgpulse.each(pgpulse.quoted(r.keys), ', {}');
    same text;
    "day" timestamptz;
    finer text;
    time_column text;
    step record;
    n bigint;
begin
    recounted := 0;
    execute format('select exists (select from rollup.%I where tx < $1)', r.rollup || '_changed')
        into more using upto;
    if not more then
        return next;
        return;
    end if;
    execute format(
        'create temp table pgpulse_changed on commit drop as select bucket%s from rollup.%I limit 0',
        keys, r.rollup || '_changed'
    );
    execute format(
        $q$with taken as (
    delete from rollup.%1$I
    where ctid = any (array(select ctid from rollup.%1$I where tx < $1 limit $2))
    returning bucket%2$s
)
insert into pg_temp.pgpulse_changed select distinct bucket%2$s from taken$q$,
        r.rollup || '_changed', keys
    ) using upto, most;
    analyze pg_temp.pgpulse_changed;
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
    left join pg_attribute a on a.attrelid = pgpulse.rows_of(r.source) and quote_ident(a.attname) = k.e;
    for "day" in
        execute format('select distinct %s from pg_temp.pgpulse_changed', pgpulse.minute_of('bucket', '1 day'))
    loop
        continue when "day" < r.since_rows;
        finer := '_rows';
        for step in
            select *
            from (values
                ('1 minute'::interval, '_1m', r.since_1m),
                ('1 hour', '_1h', r.since_1h),
                ('1 day', '_1d', r.since_1d)
            ) as steps (step, suffix, since)
            where "day" >= since
        loop
            execute format(
                $q$delete from rollup.%1$I s
using (
    select distinct %2$s as bucket%3$s
    from pg_temp.pgpulse_changed
    where bucket >= $1 and bucket < $1 + interval '1 day'
) as d
where s.bucket = d.bucket%4$s$q$,
                r.rollup || step.suffix, pgpulse.minute_of('bucket', step.step), keys, same
            ) using "day";
            time_column := case finer when '_rows' then 'time' else 'bucket' end;
            execute format(
                $q$with partials as materialized (
    select d.bucket%1$s, %2$s
    from (
        select distinct %3$s as bucket%4$s
        from pg_temp.pgpulse_changed
        where bucket >= %5$L and bucket < %6$L
    ) as d
    join (
        select %7$s
        from rollup.%8$I
        where %9$I >= %5$L and %9$I < %6$L%10$s
    ) as s
        on %11$s = d.bucket and s.%9$I >= d.bucket and s.%9$I < d.bucket + interval %12$L%13$s
    group by d.bucket%1$s
)
%14$s$q$,
                pgpulse.each(pgpulse.quoted(r.keys), ', d.{}'),
                case finer when '_rows' then pgpulse.partial_of_rows(r)
                    else pgpulse.partial_of_partials(r) end,
                pgpulse.minute_of('bucket', step.step),
                keys,
                "day",
                "day" + interval '1 day',
                case finer when '_rows' then '*' || pgpulse.pairs(r)
                    else 'bucket' || keys || ', ' || pgpulse.partial_of_stored(r) end,
                r.rollup || finer,
                time_column,
                case finer when '_rows' then format(' and (tx is null or tx < %s)', upto) end,
                pgpulse.minute_of(format('s.%I', time_column), step.step),
                step.step,
                same,
                pgpulse.put_partials(r, step.suffix, 'partials')
            );
            if finer = '_rows' then
                get diagnostics n = row_count;
                recounted := recounted + n;
            end if;
            finer := step.suffix;
        end loop;
    end loop;
    execute format('select exists (select from rollup.%I where tx < $1)', r.rollup || '_changed')
        into more using upto;
    update pgpulse.rollups known
    set newest = greatest(known.newest, (select max(bucket) from pg_temp.pgpulse_changed))
    where known.rollup = r.rollup;
    drop table pg_temp.pgpulse_changed;
    return next;
end
$$;

-- One at a time moves a rollup; held to the end of the transaction, as poolers need it.
create or replace function pgpulse.lock_rollup(name text, wait boolean) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    key bigint := hashtextextended('pgpulse rollup ' || name, 0);
begin
    if wait then
        perform pg_advisory_xact_lock(key);
        return true;
    end if;
    return pg_try_advisory_xact_lock(key);
end
$$;

create or replace function pgpulse.refresh_rollup(
    r pgpulse.rollups,
    upto bigint,
    most int default null,
    -- nobody has written more meanwhile
    few boolean default false
) returns table (added bigint, recounted bigint, more boolean)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    goal bigint := upto;
begin
    r := pgpulse.adopt_rollup(r, upto);
    if most is not null and not few then
        upto := pgpulse.refresh_upto(r, upto, most);
    end if;
    refresh_rollup.added := pgpulse.add_rows(r, format(
        'select * from (%s) as fresh where tx >= %s and tx < %s',
        pgpulse.fresh_query(r), r.rolled_tx, upto
    ));
    select f.recounted, f.more or refresh_rollup.upto < goal
    into refresh_rollup.recounted, refresh_rollup.more
    from pgpulse.recount_changed(r, upto, (most + 19) / 20) f;
    update pgpulse.rollups s
    set rolled_tx = upto,
        cluster = pgpulse.cluster(),
        since_rows = r.since_rows,
        -- While a transaction stays open, rows of later ones wait, and grow many.
        refreshed_at = case
            when refresh_rollup.more or upto = r.rolled_tx then refreshed_at
            else clock_timestamp()
        end,
        fault = null
    where s.rollup = r.rollup;
    return next;
end
$$;

comment on function pgpulse.refresh_rollup is
    'Adds rows of transactions before upto and recounts what changed; about most rows of it, or all.';

-- Makes known which pages of new rows have which transactions, so that not all of them are read.
create or replace function pgpulse.summarize(tables regclass[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    set local lock_timeout = '100ms';
    perform brin_summarize_new_values(i.indexrelid)
    from pg_index i
    join pg_class c on c.oid = i.indexrelid and c.relkind = 'i'
    join pg_am m on m.oid = c.relam and m.amname = 'brin'
    join pg_attribute a on a.attrelid = c.oid and a.attname in ('tx', 'bucket')
    where i.indrelid = any (tables);
    set local lock_timeout = default;
exception when lock_not_available or insufficient_privilege or undefined_table or undefined_object then
    -- A vacuum is at work: it does the same, or the next call does.
    null;
end
$$;

create or replace function pgpulse.refresh_rollups(name text default null, most int default null)
returns table (rollup text, added bigint, recounted bigint, more boolean, fault text)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    r pgpulse.rollups;
    done pgpulse.rollups[];
begin
    for r in
        select * from pgpulse.rollups known
        where known.rollup = coalesce(refresh_rollups.name, known.rollup)
        order by 1
    loop
        continue when not pgpulse.lock_rollup(r.rollup, false);
        -- Another refresher may have been quicker: read again, now that we alone move it.
        select * into r from pgpulse.rollups known where known.rollup = r.rollup;
        continue when r.rollup is null;
        if pgpulse.is_hypertable(r.source) then
            return query select r.rollup, 0::bigint, 0::bigint, false, pgpulse.tend_caggs(r);
            continue;
        end if;
        done := done || r;
        refresh_rollups.rollup := r.rollup;
        refresh_rollups.fault := null;
        begin
            if not exists (select from pg_class where oid = r.source) then
                raise exception 'The table of rollup "%" does not exist any more', r.rollup;
            end if;
            perform pgpulse.summarize(array(select pgpulse.parts_of(r.source)));
            select f.added, f.recounted, f.more
            into refresh_rollups.added, refresh_rollups.recounted, refresh_rollups.more
            from pgpulse.refresh_rollup(
                r,
                txid_snapshot_xmin(txid_current_snapshot()),
                coalesce(most, 2000000),
                most is null and r.refreshed_at > clock_timestamp() - interval '2 minutes'
            ) f;
        exception when others then
            refresh_rollups.added := 0;
            refresh_rollups.recounted := 0;
            refresh_rollups.more := false;
            refresh_rollups.fault := sqlerrm;
            update pgpulse.rollups s set fault = sqlerrm where s.rollup = r.rollup;
        end;
        return next;
    end loop;
    -- Last, as it takes locks: who must wait for them waits until the next call instead.
    foreach r in array coalesce(done, '{}') loop
        begin
            set local lock_timeout = '100ms';
            perform pgpulse.capture_changes(r, r.rolled_tx);
        exception when lock_not_available or undefined_table then
            null;
        end;
    end loop;
    set local lock_timeout = default;
end
$$;

comment on function pgpulse.refresh_rollups is
    'Rolls up what has come, changed and gone since the last call; safe to call from many places. '
    'added: rows; recounted: rows of one minute made again because of updates and deletes; more: there '
    'is more than the most rows that a call takes, and a twentieth of that of recounts. Without most '
    'these are 2,000,000, and what came in the two minutes since it was up to date is taken uncounted. '
    'Rows of one transaction go in one piece.';

revoke execute on function pgpulse.refresh_rollups from public;

-- Retention --------------------------------------------------------------------------------------

create or replace function pgpulse.keep_rollup(name text, step text, keep interval) returns void
language plpgsql
as $$
declare
    steps text[] := '{1m,1h,1d}';
    suffix text;
    r pgpulse.rollups;
begin
    if not exists (select from pgpulse.rollups known where known.rollup = name) then
        raise exception 'Cannot set what rollup "%" keeps: there is none of that name', name
            using hint = 'select rollup from pgpulse.rollups lists them';
    end if;
    begin
        suffix := steps[array_position('{1 minute,1 hour,1 day}'::interval[], step::interval)];
    exception when invalid_datetime_format then
        null;
    end;
    if suffix is null then
        raise exception 'Cannot set what rollup "%" keeps: it has no step "%"', name, step
            using hint = 'Its steps are 1m, 1h and 1d';
    end if;
    if keep < interval '1 day' then
        raise exception 'Cannot keep rollup "%" for %: a day is the least', name, keep
            using hint = 'Days go as a whole; null keeps them for ever';
    end if;
    execute format('update pgpulse.rollups set keep_%s = $1 where rollup = $2', suffix) using keep, name;
    perform pg_notify('pgpulse', 'pgpulse.streams');
    select * into r from pgpulse.rollups known where known.rollup = name;
    if pgpulse.is_hypertable(r.source) then
        perform pgpulse.set_retention(r);
    end if;
end
$$;

comment on function pgpulse.keep_rollup is
    'For how long a rollup keeps a step (1m, 1h or 1d); null: for ever. Older days are deleted by '
    'pgpulse.upkeep, by UTC days. Coarser steps keep what was made of them.';

-- Rows of before that are gone, or will be within a day: then a refresh that is at work cannot meet them
-- going.
create or replace function pgpulse.kept_since(source regclass) returns timestamptz
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if to_regclass('pgpulse.storage') is null then
        return null;
    end if;
    return (
        select now() - s.keep + interval '1 day' from pgpulse.storage s where s.source = kept_since.source
    );
end
$$;

create or replace function pgpulse.rows_retired(source regclass, before timestamptz) returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    r pgpulse.rollups;
begin
    for r in select * from pgpulse.rollups known where known.source = pgpulse.name_of(rows_retired.source) loop
        perform pgpulse.lock_rollup(r.rollup, true);
        update pgpulse.rollups known
        set since_rows = greatest(since_rows, before)
        where known.rollup = r.rollup;
    end loop;
end
$$;

comment on function pgpulse.rows_retired is
    'Retention of your own says so before it deletes or drops rows of that time: what was rolled up of '
    'them stays, whatever happens to late rows. That of pgpulse.add_storage need not. Waits for a refresh '
    'that is at work.';

revoke execute on function pgpulse.rows_retired from public;

-- Declares what retention ends gone, then deletes at most so many rows of it.
create or replace function pgpulse.retire_rollup(r pgpulse.rollups, most int)
returns table (deleted bigint, more boolean)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    step record;
    n bigint;
begin
    if pgpulse.is_hypertable(r.source) then
        return query select * from pgpulse.retire_caggs(r, most);
        return;
    end if;
    deleted := 0;
    more := false;
    for step in
        select suffix, greatest(since, date_bin('1 day', now() - keep, '2000-01-01 00:00:00+00')) as since
        from (values
            ('1m', r.keep_1m, r.since_1m),
            ('1h', r.keep_1h, r.since_1h),
            ('1d', r.keep_1d, r.since_1d)
        ) as steps (suffix, keep, since)
        where r.retiring or date_bin('1 day', now() - keep, '2000-01-01 00:00:00+00') > since
    loop
        execute format('update pgpulse.rollups set since_%s = $1 where rollup = $2', step.suffix)
            using step.since, r.rollup;
        execute format(
            'delete from rollup.%1$I
            where ctid = any (array(select ctid from rollup.%1$I where bucket < $1 limit $2))',
            r.rollup || '_' || step.suffix
        ) using step.since, most;
        get diagnostics n = row_count;
        deleted := deleted + n;
        more := more or n = most;
        -- New rows take the place of the old ones: what the index knows of the pages is outdated.
        if n between 1 and most - 1 then
            perform pgpulse.summarize_anew(format('rollup.%I', r.rollup || '_' || step.suffix)::regclass);
        end if;
    end loop;
    update pgpulse.rollups known
    set retiring = retire_rollup.more
    where known.rollup = r.rollup and known.retiring <> retire_rollup.more;
    return next;
end
$$;

create or replace function pgpulse.summarize_anew(relation regclass) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    set local lock_timeout = '100ms';
    perform brin_desummarize_range(i.indexrelid, page)
    from pg_index i
    join pg_class c on c.oid = i.indexrelid
    join pg_am m on m.oid = c.relam and m.amname = 'brin',
        generate_series(0, pg_relation_size(relation) / current_setting('block_size')::int - 1, 128) as page
    where i.indrelid = relation;
    perform pgpulse.summarize(array[relation]);
    set local lock_timeout = default;
exception when lock_not_available then
    null;
end
$$;

-- Upkeep -----------------------------------------------------------------------------------------

create or replace function pgpulse.upkeep()
returns table (what text, name text, detail text, more boolean, fault text)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    r pgpulse.rollups;
    part record;
    done text[] := '{}';
begin
    for part in select * from pgpulse.refresh_rollups() loop
        what := 'refresh';
        name := part.rollup;
        detail := case
            when part.added + part.recounted > 0
                then format('%s rows added, %s recounted', part.added, part.recounted)
        end;
        more := part.more;
        fault := part.fault;
        done := done || part.rollup;
        return next;
    end loop;
    for r in select * from pgpulse.rollups known where known.rollup <> all (done) order by 1 loop
        what := 'refresh';
        name := r.rollup;
        detail := null;
        more := null;
        fault := null;
        return next;
    end loop;
    for r in
        select * from pgpulse.rollups known
        where known.retiring or coalesce(known.keep_1m, known.keep_1h, known.keep_1d) is not null
        order by 1
    loop
        continue when not pgpulse.lock_rollup(r.rollup, false);
        select * into r from pgpulse.rollups known where known.rollup = r.rollup;
        continue when r.rollup is null;
        what := 'retention';
        name := r.rollup;
        more := false;
        fault := null;
        begin
            select format('%s rows of old days deleted', f.deleted), f.more into detail, more
            from pgpulse.retire_rollup(r, 100000) f;
            continue when detail like '0 %';
        exception when others then
            detail := null;
            fault := sqlerrm;
        end;
        return next;
    end loop;
    -- Last, as it takes locks that writers notice if they are held for long.
    if to_regprocedure('pgpulse.upkeep_storage()') is not null then
        begin
            for part in
                execute 'select action, "table"::text as name, detail, more, fault from pgpulse.upkeep_storage()'
            loop
                what := part.action;
                name := part.name;
                detail := part.detail;
                more := part.more;
                fault := part.fault;
                return next;
            end loop;
        exception when others then
            what := 'storage';
            name := null;
            detail := null;
            more := false;
            fault := sqlerrm;
            return next;
        end;
    end if;
end
$$;

comment on function pgpulse.upkeep is
    'One bounded piece of all that has to be done again and again: rollups refreshed, their old days '
    'deleted, storage tended. Call it every minute, at once again while one says more (null: another '
    'session is at it); twice at once is safe. scripts/upkeep.ts does so. A fault ends nothing else.';

revoke execute on function pgpulse.upkeep from public;

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
    if pgpulse.is_hypertable(r.source) then
        perform pgpulse.recount_caggs(r, "from", "to");
        return;
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
    'see. What was rolled up of rows that are gone from the source is lost in that range, unless '
    'retention has told pgpulse.rows_retired.';

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

comment on function pgpulse.step(timestamptz, timestamptz, int, interval) is
    'The step of a rollup that suits a range: rows as they are up to raw, then the finest step that '
    'draws at most this many points. where step = pgpulse.step($__timeFrom(), $__timeTo())';

-- Told immutable although it reads the registry: only so the planner leaves out the other steps, and
-- what it reads changes once a day.
create or replace function pgpulse.step(
    "from" timestamptz,
    "to" timestamptz,
    rollup text,
    points int default 500,
    raw interval default '2 hours'
) returns interval
language plpgsql
immutable
parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
    return coalesce(
        (
            select min(steps.step)
            from pgpulse.rollups r,
                lateral (values
                    (interval '0', r.since_rows),
                    ('1 minute', r.since_1m),
                    ('1 hour', r.since_1h),
                    ('1 day', r.since_1d)
                ) as steps (step, since)
            where r.rollup = step.rollup
                and steps.since <= "from"
                and steps.step >= pgpulse.step("from", "to", points, raw)
        ),
        interval '1 day'
    );
end
$$;

comment on function pgpulse.step(timestamptz, timestamptz, text, int, interval) is
    'The same, and coarser where retention has ended the finer steps of that rollup.';
