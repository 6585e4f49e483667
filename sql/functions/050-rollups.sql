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

-- Takes the triggers from tables that are no part of the source any more. A detached partition without
-- them is known, once it is attached again, as one with rows that came unseen.
create or replace function pgpulse.release_parts(r pgpulse.rollups) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    trigger record;
begin
    for trigger in
        select tgrelid::regclass as relation, tgname
        from pg_trigger
        where tgfoid = 'pgpulse.rollup_changed'::regproc
            and tgname ~ ('^pgpulse_rollup_' || r.rollup || '_[udt]$')
            and not exists (select from pgpulse.parts_of(r.source) as p where p = tgrelid)
    loop
        execute format('drop trigger %I on %s', trigger.tgname, trigger.relation);
    end loop;
end
$$;

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
        -- "is true" keeps the first bound from the index: a range with an end that the planner does not
        -- know counts as nearly empty, and it would read all series' rows of it for one.
        branches := branches || format(
            $q$select interval %1$L, bucket%2$s, points%3$s
from rollup.%4$I
where (bucket < (select %6$s)) is true
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

create or replace function pgpulse.item_of(view regclass) returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    -- Up to PostgreSQL 15 with the name of the table before each column.
    select replace(substr(body, 9, strpos(body, ' AS "pgpulse item"') - 9), '"pgpulse row".', '')
    from pg_get_viewdef(view) as body
$$;

-- Expressions over a table as they read where no schema is searched: what the names in them mean here
-- and now. Triggers and refreshes know no other names. A column alone stays its quoted name.
create or replace function pgpulse.resolved(source regclass, expressions text[]) returns text[]
language plpgsql
as $$
declare
    expression text;
    found text[] := '{}';
begin
    foreach expression in array expressions loop
        execute format(
            'create temp view pgpulse_item as select %s as "pgpulse item" from %s as "pgpulse row"',
            expression, source
        );
        found := found || pgpulse.item_of('pg_temp.pgpulse_item');
        drop view pg_temp.pgpulse_item;
    end loop;
    return found;
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
    had_tx boolean;
begin
    r.source := pgpulse.name_of(add_rollup.source);
    r.time_column := add_rollup.time_column;
    r.rollup := coalesce(add_rollup.name, (select relname from pg_class where oid = r.source));
    -- So long that names of triggers still differ.
    if r.rollup !~ '^[a-z_][a-z0-9_]{0,45}$' then
        raise exception 'Cannot add rollup "%": a name has a-z, 0-9 and _, 46 at most', r.rollup
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
    r.key_expressions := pgpulse.resolved(r.source, r.key_expressions);
    r.measure_expressions := pgpulse.resolved(r.source, r.measure_expressions);
    select * into old from pgpulse.rollups o where o.rollup = r.rollup;
    if old.rollup is not null then
        if old.source = r.source then
            -- Older versions kept them as they were given.
            old.key_expressions := pgpulse.resolved(old.source, old.key_expressions);
            old.measure_expressions := pgpulse.resolved(old.source, old.measure_expressions);
        end if;
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
        update pgpulse.rollups o
        set key_expressions = r.key_expressions, measure_expressions = r.measure_expressions
        where o.rollup = r.rollup;
        perform pgpulse.remake_rollup(old.rollup);
        return;
    end if;

    if pgpulse.is_hypertable(r.source) then
        perform pgpulse.add_caggs(r);
        return;
    end if;
    -- Whoever packs knows of the rollup then, and leaves what it has not counted.
    if rows <> r.source then
        perform pgpulse.lock_storage(rows, true);
    end if;
    had_tx := exists (
        select from pg_attribute where attrelid = rows and attname = 'tx' and not attisdropped
    );
    perform pgpulse.add_tx(r.source);
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
    -- Rows without transaction are there only where others had the column before.
    perform pgpulse.capture_changes(r, case when had_tx then 0 end);
    -- What is packed already no refresh would find: it is counted day by day.
    if rows <> r.source then
        execute format(
            $q$insert into rollup.%I (bucket, tx)
            select distinct day, -1
            from (select distinct chunk$at as at from %s) as chunks,
                generate_series(at, at + %L::interval - interval '1 microsecond', '24 hours') as day$q$,
            r.rollup || '_changed',
            (select s.packed from pgpulse.storage s where s.source = r.source),
            (select pgpulse.chunk(s) from pgpulse.storage s where s.source = r.source)
        );
    end if;
    -- Graded windows of streams may read it.
    perform pg_notify('pgpulse', 'pgpulse.streams');
end
$$;

comment on function pgpulse.add_rollup is
    'Rolls a table up by minute, hour and day, to be read as rollup.<name>. time_column: a timestamptz. '
    'keys, measures: columns or ''expression as name''; keys tell series apart, measures are cast to '
    'double precision. The table gets a last column tx and triggers; pgpulse.refresh_rollups keeps up. '
    'Readers and writers of a large table wait while the small index of tx is made: one scan. A row of '
    'which an expression fails is left out of all minutes, and told as a fault once; until the next refresh '
    'panels meet it too, and with step 0 always: better guard it, case when ... ~ ... end. Where a key '
    'fails, also UPDATE and DELETE of the row do, unless with set local pgpulse.keep_rollups = on.';

create or replace function pgpulse.remake_rollup(name text) returns void
language plpgsql
as $$
declare
    r pgpulse.rollups;
begin
    select * into r from pgpulse.rollups known where known.rollup = remake_rollup.name;
    if r.rollup is null then
        raise exception 'Cannot remake rollup "%": there is none of that name', name
            using hint = 'select rollup from pgpulse.rollups lists them';
    end if;
    perform pgpulse.release_parts(r);
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
    perform pgpulse.drop_tx(r.source);
end
$$;

comment on function pgpulse.drop_rollup is
    'Drops a rollup with what it has rolled up, its triggers, and the column tx once nothing needs it.';

-- Restored into another cluster transaction numbers start anew. Rows that were not rolled up yet, and
-- those whose number may be of either cluster, are counted again with all of their minute.
create or replace function pgpulse.adopt_rollup(r pgpulse.rollups, upto bigint) returns pgpulse.rollups
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    ahead bigint := txid_snapshot_xmax(txid_current_snapshot());
    rows regclass := pgpulse.rows_of(r.source);
    other pgpulse.rollups;
begin
    if r.cluster = pgpulse.cluster() and r.rolled_tx <= ahead then
        return r;
    end if;
    execute pgpulse.mark_changed(r, format(
        '(select * from %s where tx > 0 and tx < %s) as rows', rows, ahead
    )) using 0::bigint;
    -- What loses its number here is new to none of the rollups any more.
    for other in select * from pgpulse.rollups known where known.source = r.source loop
        execute pgpulse.mark_changed(other, format(
            '(select * from %s where tx >= %s) as rows', rows, greatest(ahead, other.rolled_tx)
        )) using 0::bigint;
    end loop;
    set local pgpulse.keep_rollups = on;
    -- The statement's own snapshot: it sees no row of this cluster with such a number.
    execute format(
        'update %s set tx = 0 where tx >= txid_snapshot_xmax(txid_current_snapshot())', rows
    );
    set local pgpulse.keep_rollups = off;
    execute format('update rollup.%I set tx = 0 where tx > 0', r.rollup || '_changed');
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

-- A row from here on moves no end: one with a clock decades ahead would make each insert dearer for good.
create or replace function pgpulse.far_ahead() returns timestamptz
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select date_bin('1 day', now(), '2000-01-01 00:00:00+00') + interval '48 hours'
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
    ahead timestamptz := pgpulse.far_ahead();
    far timestamptz;
    free text;
begin
    -- Nothing is rolled up between newest and the first day far ahead that has something.
    execute format('select coalesce(min(bucket), ''infinity'') from rollup.%I where bucket > $1', r.rollup || '_1d')
        into far using r.newest;
    if far < ahead or r.newest >= ahead then
        -- That day has come near, or a version that knew of none wrote newest.
        execute format(
            'select
                coalesce(max(bucket) filter (where bucket < $1) + interval ''24 hours'', ''-infinity''),
                coalesce(min(bucket) filter (where bucket >= $1), ''infinity'')
            from rollup.%I',
            r.rollup || '_1d'
        ) into r.newest, far using ahead;
    end if;
    free := format('bucket > %L and bucket < %L', r.newest, far);
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
select (select coalesce(sum(points)::bigint, 0) from _1d),
    (select max(bucket) filter (where bucket < %13$L) from _1m)$q$,
        pgpulse.minute_of('"time"'),
        keys,
        pgpulse.partial_of_rows(r),
        pgpulse.pairs(r),
        rows,
        pgpulse.minute_of('_1m.bucket', '1 hour'),
        pgpulse.minute_of('_1h.bucket', '1 day'),
        pgpulse.partial_of_partials(r),
        pgpulse.put_partials(r, '_1m', format('_1m where %s and bucket >= %L', free, r.since_1m), true),
        pgpulse.put_partials(r, '_1m', format('_1m where not (%s) and bucket >= %L', free, r.since_1m)),
        pgpulse.put_partials(r, '_1h', format('_1h where bucket >= %L', r.since_1h)),
        pgpulse.put_partials(r, '_1d', format('_1d where bucket >= %L', r.since_1d)),
        ahead
    ) into added, latest;
    latest := greatest(latest, r.newest);
    update pgpulse.rollups known
    set newest = latest
    where known.rollup = r.rollup and known.newest <> latest;
    return added;
end
$$;

comment on function pgpulse.add_rows is
    'Adds rows to a rollup that no refresh will see come, as they are packed or purged at once.';

-- Rows of a relation as pgpulse.rows_query gives them, in pg_temp.pgpulse_sound, without those for which
-- an expression fails: one by one, as nothing else tells which they are. The fault says how many.
create or replace function pgpulse.sound_rows(r pgpulse.rollups, relation regclass, condition text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    one record;
    failed bigint := 0;
    reason text;
begin
    if to_regclass('pg_temp.pgpulse_sound') is not null then
        drop table pg_temp.pgpulse_sound;
    end if;
    execute format(
        'create temp table pgpulse_sound on commit drop as select * from rollup.%I limit 0',
        r.rollup || '_rows'
    );
    for one in
        execute format('select pgpulse_row as it from %s as pgpulse_row where %s', relation, condition)
    loop
        begin
            execute 'insert into pg_temp.pgpulse_sound '
                || pgpulse.rows_query(r, '(select ($1).*) as s') using one.it;
        exception when data_exception then
            failed := failed + 1;
            reason := sqlerrm;
        end;
    end loop;
    update pgpulse.rollups known
    set fault = format('%s rows are left out, as an expression fails for them: %s', failed, reason)
    where known.rollup = r.rollup and failed > 0;
end
$$;

-- Counts again what was noted as changed, at most so many series and minutes of it, day by day, so
-- that the planner knows where the rows are; and a whole day (its tx is -1), the newest first. What a
-- step has of a day is made of the next finer one that still has that day; a day whose rows are gone
-- stays as it is. Days have 24 hours, whatever the session's time zone.
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
    whole timestamptz[];
    "day" timestamptz;
    relation text;
    finer text;
    time_column text;
    fine text;
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
        $q$with taken as (
    delete from rollup.%1$I
    where ctid = any (array(select ctid from rollup.%1$I where tx = -1 order by bucket desc limit $1))
    returning bucket
)
select coalesce(array_agg(bucket), '{}') from taken$q$,
        r.rollup || '_changed'
    ) into whole using case when most is not null then 1 end;
    execute format(
        'create temp table pgpulse_changed on commit drop as select bucket%s from rollup.%I limit 0',
        keys, r.rollup || '_changed'
    );
    execute format(
        $q$with taken as (
    delete from rollup.%1$I
    where ctid = any (array(select ctid from rollup.%1$I where tx >= 0 and tx < $1 limit $2))
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
        execute format(
            'select %s from pg_temp.pgpulse_changed union select unnest($1)',
            pgpulse.minute_of('bucket', '1 day')
        ) using whole
    loop
        continue when "day" < r.since_rows;
        relation := format('rollup.%I', r.rollup || '_rows');
        loop
            begin
                finer := '_rows';
                for step in
                    select *
                    from (values
                        ('1 minute'::interval, '_1m', r.since_1m),
                        ('1 hour', '_1h', r.since_1h),
                        ('24 hours', '_1d', r.since_1d)
                    ) as steps (step, suffix, since)
                    where "day" >= since
                loop
                    if "day" = any (whole) then
                        execute format(
                            'delete from rollup.%I where bucket >= $1 and bucket < $1 + interval ''24 hours''',
                            r.rollup || step.suffix
                        ) using "day";
                    else
                        execute format(
                            $q$delete from rollup.%1$I s
using (
    select distinct %2$s as bucket%3$s
    from pg_temp.pgpulse_changed
    where bucket >= $1 and bucket < $1 + interval '24 hours'
) as d
where s.bucket = d.bucket%4$s$q$,
                            r.rollup || step.suffix, pgpulse.minute_of('bucket', step.step), keys, same
                        ) using "day";
                    end if;
                    time_column := case finer when '_rows' then 'time' else 'bucket' end;
                    fine := format(
                        $q$(
        select %1$s
        from %2$s
        where %3$I >= %4$L and %3$I < %5$L%6$s
    ) as s$q$,
                        case finer when '_rows' then '*' || pgpulse.pairs(r)
                            else 'bucket' || keys || ', ' || pgpulse.partial_of_stored(r) end,
                        case finer when '_rows' then relation else format('rollup.%I', r.rollup || finer) end,
                        time_column,
                        "day",
                        "day" + interval '24 hours',
                        case finer when '_rows' then format(' and (tx is null or tx < %s)', upto) end
                    );
                    execute format(
                        $q$with partials as materialized (
    select d.bucket%1$s, %2$s
    from %3$s
    group by d.bucket%1$s
)
%4$s$q$,
                        pgpulse.each(pgpulse.quoted(r.keys), ', d.{}'),
                        case finer when '_rows' then pgpulse.partial_of_rows(r)
                            else pgpulse.partial_of_partials(r) end,
                        case when "day" = any (whole) then format(
                            '%s cross join lateral (select %s as bucket%s) as d',
                            fine,
                            pgpulse.minute_of(format('s.%I', time_column), step.step),
                            pgpulse.each(pgpulse.quoted(r.keys), ', s.{}')
                        ) else format(
                            $q$(
        select distinct %1$s as bucket%2$s
        from pg_temp.pgpulse_changed
        where bucket >= %3$L and bucket < %4$L
    ) as d
    join %5$s
        on %6$s = d.bucket and s.%7$I >= d.bucket and s.%7$I < d.bucket + interval %8$L%9$s$q$,
                            pgpulse.minute_of('bucket', step.step),
                            keys,
                            "day",
                            "day" + interval '24 hours',
                            fine,
                            pgpulse.minute_of(format('s.%I', time_column), step.step),
                            time_column,
                            step.step,
                            same
                        ) end,
                        pgpulse.put_partials(r, step.suffix, 'partials')
                    );
                    if finer = '_rows' then
                        get diagnostics n = row_count;
                        recounted := recounted + n;
                    end if;
                    finer := step.suffix;
                end loop;
                exit;
            exception when data_exception then
                if relation = 'pg_temp.pgpulse_sound' then
                    raise;
                end if;
            end;
            perform pgpulse.sound_rows(r, r.source, format(
                '%1$I >= %2$L and %1$I < %3$L', r.time_column, "day", "day" + interval '24 hours'
            ) || case when "day" = any (whole) then '' else format(
                ' and %s in (select bucket from pg_temp.pgpulse_changed)',
                pgpulse.minute_of(quote_ident(r.time_column))
            ) end);
            relation := 'pg_temp.pgpulse_sound';
        end loop;
    end loop;
    execute format('select exists (select from rollup.%I where tx < $1)', r.rollup || '_changed')
        into more using upto;
    update pgpulse.rollups known
    set newest = greatest(
        known.newest,
        (select max(bucket) from pg_temp.pgpulse_changed where bucket < pgpulse.far_ahead()),
        (select max(at) + interval '24 hours' from unnest(whole) at where at < pgpulse.far_ahead())
    )
    where known.rollup = r.rollup;
    drop table pg_temp.pgpulse_changed;
    return next;
end
$$;

-- One at a time moves a rollup.
create or replace function pgpulse.lock_rollup(name text, wait boolean) returns boolean
language sql
set search_path = pg_catalog, pg_temp
as $$
    select pgpulse.lock('rollup ' || name, wait)
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
    failed bigint;
    size int;
begin
    update pgpulse.rollups s set fault = null where s.rollup = r.rollup and s.fault is not null;
    r := pgpulse.adopt_rollup(r, upto);
    if most is not null and not few then
        upto := pgpulse.refresh_upto(r, upto, most);
    end if;
    -- Where an expression fails for a row: fewer rows, down to some that can be looked at one by one.
    foreach size in array array[200000, 20000, 2000, 200, 0] loop
        if upto is distinct from failed then
            begin
                refresh_rollup.added := pgpulse.add_rows(r, format(
                    'select * from (%s) as fresh where tx >= %s and tx < %s',
                    pgpulse.fresh_query(r), r.rolled_tx, upto
                ));
                exit;
            exception when data_exception then
                failed := upto;
            end;
        end if;
        if most is not null and size > 0 then
            upto := pgpulse.refresh_upto(r, upto, size);
        else
            perform pgpulse.sound_rows(
                r, pgpulse.rows_of(r.source), format('tx >= %s and tx < %s', r.rolled_tx, upto)
            );
            refresh_rollup.added := pgpulse.add_rows(r, 'select * from pg_temp.pgpulse_sound');
            exit;
        end if;
    end loop;
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
        end
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
    told jsonb := '{}';
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
        refresh_rollups.added := 0;
        refresh_rollups.recounted := 0;
        refresh_rollups.more := false;
        refresh_rollups.fault := null;
        begin
            if not exists (select from pg_class where oid = r.source) then
                raise exception 'The table of rollup "%" does not exist any more', r.rollup;
            end if;
            if pgpulse.is_hypertable(r.source) then
                refresh_rollups.fault := pgpulse.tend_caggs(r);
            else
                done := done || r;
                perform pgpulse.summarize(array(select pgpulse.parts_of(r.source)));
                select f.added, f.recounted, f.more
                into refresh_rollups.added, refresh_rollups.recounted, refresh_rollups.more
                from pgpulse.refresh_rollup(
                    r,
                    txid_snapshot_xmin(txid_current_snapshot()),
                    coalesce(most, 2000000),
                    most is null and r.refreshed_at > clock_timestamp() - interval '2 minutes'
                ) f;
                select known.fault into refresh_rollups.fault
                from pgpulse.rollups known
                where known.rollup = r.rollup;
            end if;
        exception when others then
            refresh_rollups.added := 0;
            refresh_rollups.recounted := 0;
            refresh_rollups.more := false;
            refresh_rollups.fault := sqlerrm;
            update pgpulse.rollups s set fault = sqlerrm where s.rollup = r.rollup;
        end;
        told := told || jsonb_build_object(r.rollup, jsonb_build_object(
            'added', refresh_rollups.added,
            'recounted', refresh_rollups.recounted,
            'more', refresh_rollups.more,
            'fault', refresh_rollups.fault
        ));
    end loop;
    -- Last, as it takes locks: who must wait for them waits until the next call instead.
    foreach r in array coalesce(done, '{}') loop
        begin
            set local lock_timeout = '100ms';
            perform pgpulse.release_parts(r);
            perform pgpulse.capture_changes(r, r.rolled_tx);
        exception
            when lock_not_available or undefined_table then
                null;
            -- A partition of somebody else's, or one with a key that fails: it alone waits.
            when others then
                told := jsonb_set(told, array[r.rollup, 'fault'], to_jsonb(sqlerrm));
                update pgpulse.rollups s set fault = sqlerrm where s.rollup = r.rollup;
        end;
    end loop;
    set local lock_timeout = default;
    return query
    select t.key, f.added, f.recounted, f.more, f.fault
    from jsonb_each(told) as t,
        jsonb_to_record(t.value) as f (added bigint, recounted bigint, more boolean, fault text)
    order by 1;
end
$$;

comment on function pgpulse.refresh_rollups is
    'Rolls up what has come, changed and gone since the last call; safe to call from many places. '
    'added: rows; recounted: rows of one minute made again because of updates and deletes; more: there '
    'is more than the most rows that a call takes, and a twentieth of that of recounts. Without most '
    'these are 2,000,000, and what came in the two minutes since it was up to date is taken uncounted. '
    'Rows of one transaction go in one piece, and so does a day of what was packed before the rollup came. '
    'fault: also how many rows were left out, as an expression of the rollup fails for them.';

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
    for part in
        select k.sink, k.source, k.time_column, k.updated_at
        from pgpulse.sinks k
        where k.updated_at < now() - interval '1 hour'
    loop
        execute format(
            'select exists (select from %s where %I between $1 and now())',
            pgpulse.rows_of(part.source), part.time_column
        ) into more using part.updated_at + interval '1 hour';
        continue when not more;
        what := 'sink';
        name := part.sink;
        detail := null;
        more := false;
        fault := format(
            'Nothing was sent since %s, and rows of %s that it has not got are neither packed nor dropped; is '
                'the relay away, or without INFLUX_URL? To give it up: select pgpulse.drop_sink(%L)',
            part.updated_at, part.source, part.sink
        );
        return next;
    end loop;
    -- What parts of pgpulse have to do besides: upkeep_readings and the like.
    for part in
        select proname
        from pg_proc
        where pronamespace = 'pgpulse'::regnamespace
            and proname ~ '^upkeep_'
            and proname <> 'upkeep_storage'
            and pronargs = 0
        order by 1
    loop
        what := substr(part.proname, 8);
        name := null;
        fault := null;
        begin
            execute format('select detail, more from pgpulse.%I()', part.proname) into detail, more;
        exception when others then
            detail := null;
            more := false;
            fault := sqlerrm;
        end;
        if detail is not null or fault is not null then
            return next;
        end if;
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
    points int default 1500,
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
    points int default 1500,
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
