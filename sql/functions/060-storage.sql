-- Storage: partitions made ahead, history packed into arrays, one name for both, with one call.
--
-- The public name becomes a view over rows.<name>, a partitioned table that takes what is new, and
-- packed.<name>, which holds one row for each series and period: its times and values as arrays.
-- Packing is DELETE and INSERT in one transaction, so that no reader misses a row or sees it twice,
-- and no writer waits. What was emptied is dropped when nobody can want to read it any more.
--
-- A plain view of arrays could not be pruned by time: from a condition on unnest() the planner
-- concludes nothing. So the view puts a gate before the packed rows: conditions of its own on time.
-- Where they contradict those of a query, what stands behind is dropped before it is planned. Behind
-- stand functions that are inlined only then, with gates before an eighth of the time each, and so
-- on down to the period: a query plans what it reads, and a query of recent times next to nothing.

-- --- arrays --------------------------------------------------------------------------------------

create or replace function pgpulse.pack_times(
    t timestamptz[],
    out "from" timestamptz,
    out "to" timestamptz,
    out step interval,
    out base bigint,
    out gap bigint,
    out unit float8,
    out i2 int2[],
    out i4 int4[],
    out "all" timestamptz[]
)
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
declare
    n bigint := cardinality(t);
    span bigint;
    off_line bigint[];
begin
    -- Every step the same: nothing but the ends is kept.
    "from" := t[1];
    "to" := t[n];
    span := round(date_part('epoch', "to" - "from") * 1e6);
    if n = 1 or span > 0 and span % (n - 1) = 0 then
        step := greatest(span / greatest(n - 1, 1), 1) * interval '1 microsecond';
        if t = array(select generate_series("from", "to", step)) then
            return;
        end if;
        step := null;
    end if;
    -- How far each is off a straight line, in milliseconds or microseconds.
    select min(e), max(e), case when bool_and(date_part('microseconds', e)::bigint % 1000 = 0) then 1e3 else 1e6 end
    into "from", "to", unit
    from unnest(t) e;
    base := round(date_part('epoch', "from") * unit);
    gap := greatest(round(date_part('epoch', "to" - "from") * unit / greatest(n - 1, 1)), 1);
    off_line := array(
        select round(date_part('epoch', e) * unit)::bigint - base - gap * (i - 1)
        from unnest(t) with ordinality u (e, i)
    );
    if (select min(e) >= -32768 and max(e) <= 32767 from unnest(off_line) e) then
        i2 := off_line;
    elsif (select min(e) >= -2147483648 and max(e) <= 2147483647 from unnest(off_line) e) then
        i4 := off_line;
    end if;
    if packed.times(base, gap, unit, coalesce(i2::int4[], i4)) is distinct from t then
        base := null;
        gap := null;
        unit := null;
        i2 := null;
        i4 := null;
        "all" := t;
    end if;
end
$$;

comment on function pgpulse.pack_times is
    'Times as a series with a step, as distances from a straight line, or as they are.';

-- In schema packed, as the views there shall work without schema pgpulse.
create or replace function packed.times(base bigint, gap bigint, unit float8, off_line int4[])
returns timestamptz[]
language plpgsql
immutable
strict
parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
    return array(
        select to_timestamp((line + distance) / unit)
        from (
            select
                generate_series(base, base + gap * (cardinality(off_line) - 1), gap),
                unnest(off_line)
        ) as times (line, distance)
    );
end
$$;

comment on function packed.times is 'The times that pgpulse.pack_times wrote as distances from a line.';

create or replace function pgpulse.pack_floats(
    v float8[],
    out one float8,
    out base float8,
    out unit float8,
    out i2 int2[],
    out i4 int4[],
    out "all" float8[]
)
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Compared bit by bit: 0 = -0 otherwise, and NaN = NaN.
    bits bytea := array_send(v);
    n int := cardinality(v);
    lowest float8;
    highest float8;
    width float8;
begin
    if v[1] is not distinct from v[n] and bits = array_send(array_fill(v[1], array[n])) then
        one := v[1];
        return;
    end if;
    select min(e), max(e) into lowest, highest from unnest(v) e;
    for digits in 0..6 loop
        unit := 10.0 ^ digits;
        -- Further apart they would be out of range.
        width := case when greatest(highest, -lowest) < 1e300 then highest * unit - lowest * unit else 'infinity' end;
        exit when width not between 0 and 4294967295 or abs(lowest * unit) > 1e15;
        -- A few values find out most units that will not do.
        continue when (select bool_or(round(e * unit) / unit <> e) from unnest(v[1:20]) e);
        if width <= 65535 then
            base := case
                when lowest * unit >= -32768 and highest * unit <= 32767 then 0
                else round(lowest * unit) + 32768
            end;
            i2 := array(select round(e * unit) - base from unnest(v) e);
        else
            base := round(lowest * unit) + 2147483648;
            i4 := array(select round(e * unit) - base from unnest(v) e);
        end if;
        if bits = array_send(array(
            select (base + coalesce(two, four)) / unit from unnest(i2, i4) as u (two, four)
        )) then
            return;
        end if;
        i2 := null;
        i4 := null;
    end loop;
    base := null;
    unit := null;
    "all" := v;
end
$$;

comment on function pgpulse.pack_floats is
    'Numbers as one, as small integers of some decimal unit, or as they are: bit by bit the same.';

create or replace function pgpulse.pack_integers(
    v bigint[],
    out one bigint,
    out base bigint,
    out i2 int2[],
    out i4 int4[],
    out "all" bigint[]
)
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    lowest bigint;
    highest bigint;
begin
    select min(e), max(e) into lowest, highest from unnest(v) e;
    if v = array_fill(v[1], array[cardinality(v)]) then
        one := v[1];
    elsif highest::numeric - lowest <= 65535 then
        base := lowest + 32768;
        i2 := array(select e - base from unnest(v) e);
    elsif highest::numeric - lowest <= 4294967295 then
        base := lowest + 2147483648;
        i4 := array(select e - base from unnest(v) e);
    else
        "all" := v;
    end if;
exception when numeric_value_out_of_range then
    base := null;
    "all" := v;
end
$$;

comment on function pgpulse.pack_integers is 'Integers as one, as small ones above a base, or as they are.';

create or replace function pgpulse.pack_any(v anyarray, out one anyelement, out "all" anyarray)
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    -- First and last tell most that are not all the same.
    if v[1]::text is not distinct from v[cardinality(v)]::text
        and v::text = array_fill(v[1], array[cardinality(v)])::text then
        one := v[1];
    else
        "all" := v;
    end if;
end
$$;

comment on function pgpulse.pack_any is 'Values of any type as one, or as they are.';

-- --- names and SQL -------------------------------------------------------------------------------

create or replace function pgpulse.stored(relation regclass, doing text) returns pgpulse.storage
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    s pgpulse.storage;
begin
    select * into s from pgpulse.storage known where relation in (known.source, known.rows);
    if s.source is null then
        raise exception 'Cannot % "%": pgpulse.add_storage has not stored it', doing, relation
            using hint = 'select source from pgpulse.storage lists what is stored';
    end if;
    return s;
end
$$;

-- It had two parameters.
drop function if exists pgpulse.lock_storage(regclass, boolean);

-- Held by whoever packs, unpacks or turns over the table; shared by those whom only packing disturbs.
create or replace function pgpulse.lock_storage(rows regclass, wait boolean, shared boolean default false)
returns boolean
language sql
set search_path = pg_catalog, pg_temp
as $$
    select pgpulse.lock('storage ' || rows::oid, wait, shared)
$$;

-- The hypertable that takes over, while pgpulse.move_to_timescale is under way.
create or replace function pgpulse.twin_of(s pgpulse.storage) returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select format('packed.%I', left(relname, 50) || '_hypertable') from pg_class where oid = s.source
$$;

-- Time that one row of arrays covers. Fixed, so that the view can compute with it.
create or replace function pgpulse.chunk(s pgpulse.storage) returns interval
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select case s.period when interval '1 day' then interval '1 day' else interval '32 days' end
$$;

create or replace function pgpulse.chunk_of(s pgpulse.storage, at timestamptz) returns timestamptz
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select date_bin(pgpulse.chunk(s), at, '1970-01-01 00:00:00+00')
$$;

create or replace function pgpulse.chunk_sql(s pgpulse.storage) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select format('date_bin(%L, %I, ''1970-01-01 00:00:00+00'')', pgpulse.chunk(s)::text, s.time_column)
$$;

-- One number for each series, to split work by.
create or replace function pgpulse.series_sql(s pgpulse.storage) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when s.keys = '{}' then '0::bigint'
        else format('hash_record_extended(row(%s), 0)', substr(pgpulse.each(pgpulse.quoted(s.keys), ', {}'), 3))
    end
$$;

-- Condition on rows that every rollup has in it: the others must not go yet. And where they are packed,
-- which makes their tx 0, or dropped, those that every sink has.
create or replace function pgpulse.settled(s pgpulse.storage, packing boolean default false) returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    upto bigint := (select min(rolled_tx) from pgpulse.rollups where source = s.source);
begin
    if packing and to_regprocedure('pgpulse.sink_position(regclass)') is not null then
        upto := least(upto, pgpulse.sink_position(s.source));
    end if;
    return coalesce('(tx is null or tx < ' || upto || ')', 'true');
end
$$;

-- How each column is packed: as a key, as the time, as tx (0 for all that is packed), or by values.
create or replace function pgpulse.packed_columns(s pgpulse.storage)
returns table (
    name text,
    type text,
    family text,
    -- whether an INSERT may name it
    writable boolean,
    -- columns of the packed table, and their definitions
    parts text[],
    definitions text[],
    -- the array of its values, and the function that makes the parts of that
    gathered text,
    packs text
)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        quote_ident(c.attname),
        c.type || c.collation,
        c.family,
        c.writable,
        p.names,
        p.definitions,
        replace(templates.gathered, '{}', quote_ident(c.attname)),
        templates.packs
    from (
        select
            a.attnum,
            a.attname,
            format_type(a.atttypid, a.atttypmod) as type,
            case
                when a.attcollation <> t.typcollation
                    then format(' collate %s.%I', l.collnamespace::regnamespace, l.collname)
                else ''
            end as collation,
            a.attgenerated = '' and a.attidentity <> 'a' as writable,
            case
                when a.attname = s.time_column then 'time'
                when a.attname = any (s.keys) then 'key'
                when a.attname = 'tx' and pg_get_expr(d.adbin, d.adrelid) = 'txid_current()' then 'tx'
                when a.atttypid = 'float8'::regtype then 'float'
                when a.atttypid in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) then 'integer'
                when t.typarray <> 0 and t.typcategory <> 'A' then 'any'
                -- Arrays would be flattened by array_agg and unnest.
                else 'text'
            end as family
        from pg_attribute a
        join pg_type t on t.oid = a.atttypid
        left join pg_collation l on l.oid = a.attcollation
        left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where a.attrelid = s.rows and a.attnum > 0 and not a.attisdropped
    ) c
    join (
        values
            ('key', null, null, '{""}'::text[], '{<type>}'::text[]),
            ('tx', null, null, '{}', '{}'),
            (
                'time', 'array_agg({})', 'pgpulse.pack_times',
                '{from,to,step,base,gap,unit,i2,i4,all}',
                '{timestamptz,timestamptz,interval,bigint,bigint,float8,int2[],int4[],timestamptz[]}'
            ),
            (
                'float', 'array_agg({})', 'pgpulse.pack_floats',
                '{"",base,unit,i2,i4,all}', '{float8,float8,float8,int2[],int4[],float8[]}'
            ),
            (
                'integer', 'array_agg({}::bigint)', 'pgpulse.pack_integers',
                '{"",base,i2,i4,all}', '{bigint,bigint,int2[],int4[],bigint[]}'
            ),
            ('any', 'array_agg({})', 'pgpulse.pack_any', '{"",all}', '{<type>,<type>[]}'),
            ('text', 'array_agg({}::text)', 'pgpulse.pack_any', '{"",all}', '{text,text[]}')
    ) as templates (family, gathered, packs, suffixes, types) on templates.family = c.family
    cross join lateral (
        select
            coalesce(array_agg(part.name order by i), '{}') as names,
            coalesce(array_agg(
                part.name || ' ' || replace(u.type, '<type>', c.type)
                    || case when u.type like '<type>%' then c.collation else '' end
                order by i
            ), '{}') as definitions
        from unnest(templates.suffixes, templates.types) with ordinality u (suffix, type, i)
        cross join lateral (
            select quote_ident(c.attname || case when u.suffix <> '' then '$' || u.suffix else '' end)
        ) as part (name)
    ) as p
    order by c.attnum
$$;

-- The view <name>_rows: arrays to rows, each value as it was. It reads only those parts that some
-- chunk has, as each further unnest() costs every row.
create or replace function pgpulse.make_rows_view(s pgpulse.storage) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    base text := (select relname from pg_class where oid = s.packed);
    c record;
    part text;
    forms text[];
    unnested text[] := '{chunk$at}';
    "values" text[] := '{chunk$at}';
    steady text;
    uneven text;
begin
    for c in select * from pgpulse.packed_columns(s) loop
        forms := '{}';
        if c.family = 'time' then
            if c.parts[3] = any (s.parts) or not s.parts && c.parts[7:9] then
                steady := format('generate_series(%s, %s, %s) as %s', c.parts[1], c.parts[2], c.parts[3], c.name);
            end if;
            if s.parts && c.parts[7:9] then
                uneven := format(
                    'unnest(coalesce(%s, packed.times(%s, %s, %s, coalesce(%s::int4[], %s)))) as %s',
                    c.parts[9], c.parts[4], c.parts[5], c.parts[6], c.parts[7], c.parts[8], c.name
                );
            end if;
            -- Kept apart, as a condition on time would compute what joins them for each of its terms.
            if steady is not null and uneven is not null then
                steady := format('%s from %s where %s is not null', steady, s.packed, c.parts[3]);
                uneven := format('%s from %s where %s is null', uneven, s.packed, c.parts[3]);
            else
                steady := format('%s from %s', coalesce(steady, uneven), s.packed);
                uneven := null;
            end if;
            forms := array[c.name];
        elsif c.family = 'key' then
            unnested := unnested || c.name;
            forms := array[c.name];
        elsif c.family = 'tx' then
            forms := '{0::bigint}';
        else
            foreach part in array c.parts loop
                continue when part <> all (s.parts);
                if part like '%$i_"' or part like '%$all"' then
                    unnested := unnested || format('unnest(%1$s) as %1$s', part);
                else
                    unnested := unnested || part;
                end if;
                forms := forms || case
                    when part like '%$i_"' then format(
                        case c.family when 'float' then '(%s + %s) / %s' else '%s + %s' end,
                        c.parts[2], part, c.parts[3]
                    )
                    when part like '%$all"' or part = c.name then part
                end;
            end loop;
            -- An array first: the constant is where there is none, or a null in one.
            select array_agg(form order by form = c.name) into forms from unnest(forms) form where form is not null;
        end if;
        "values" := "values" || format(
            case when cardinality(forms) > 1 then 'coalesce(%s)::%s as %s' else '(%s)::%s as %s' end,
            coalesce(array_to_string(forms, ', '), 'null'), c.type, c.name
        );
    end loop;
    unnested := unnested || format('packed.%I(null) as guess', base || '_guess');
    execute format(
        'create or replace view packed.%I as select %s from (select %s, %s) as q%s',
        base || '_rows',
        array_to_string("values", ', '),
        array_to_string(unnested, ', '),
        steady,
        case when uneven is not null then format(
            ' union all select %s from (select %s, %s) as q',
            array_to_string("values", ', '),
            array_to_string(unnested, ', '),
            uneven
        ) end
    );
end
$$;

-- The empty arm of a union. From two values, as one is seen to be empty only after it was planned.
create or replace function pgpulse.nothing(s pgpulse.storage) returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select string_agg('null::' || type, ', ') || ' from (values (0), (0)) as nothing where false'
    from pgpulse.packed_columns(s)
$$;

-- A gate: rows of inner between two times. What looks idle in it steers the planner:
-- the unused CTE keeps inner from being pulled up; the empty arm beside it makes it a member of a
-- union, as only there contradictions are looked for by default; the empty arm in it keeps columns
-- that a query does not want, which costs less than to leave them out again at each level.
create or replace function pgpulse.gate(
    s pgpulse.storage,
    "inner" text,
    "from" text,
    "to" text,
    also text default ''
) returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select format(
        $q$select %1$s
from (
    select %1$s from (
        with barrier as (select 1)
        select %1$s from %2$s
        union all
        select %3$s
    ) as s
    union all
    select %3$s
) as x
where %4$I >= %5$s and %4$I < %6$s%7$s$q$,
        string_agg(c.name, ', '),
        "inner",
        pgpulse.nothing(s),
        s.time_column,
        "from",
        "to",
        also
    )
    from pgpulse.packed_columns(s) c
$$;

-- How many rows a chunk has is hidden from the planner: it takes unnest() for 10 rows, or 1000, and of
-- those one in 200 to meet a condition on time. So among what is unnested stands a function that is
-- never called, and said to give more: then grouping is done by hashing, and in parallel. As much as
-- would be true is too much again: 200 times the costs, and hashing said not to fit into memory.
create or replace function pgpulse.make_guess(s pgpulse.storage) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    expected float8;
begin
    execute format(
        'select avg(chunk$rows) * 20 from (select chunk$rows from %s order by chunk$at desc limit 1000) as newest',
        s.packed
    ) into expected;
    execute format(
        $q$create or replace function packed.%I(int) returns setof int
language plpgsql
immutable
strict
parallel safe
rows %s
as 'begin end'$q$,
        (select relname || '_guess' from pg_class where oid = s.packed),
        least(greatest(round(expected), 1000), 20000)
    );
end
$$;

-- Each level of the tree has eight of the one below.
create or replace function pgpulse.make_tree(s pgpulse.storage) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set client_min_messages = warning
as $$
declare
    base text := (select relname from pg_class where oid = s.packed);
    seconds int := extract(epoch from pgpulse.chunk(s));
    columns text;
    body text;
begin
    select string_agg(format('%s %s', name, regexp_replace(type, ' collate .*', '')), ', ')
    into columns
    from pgpulse.packed_columns(s);
    for level in 1..5 loop
        execute format('drop function if exists packed.%I', base || '_' || 8 ^ level);
        select string_agg(
            pgpulse.gate(
                s,
                case level
                    when 1 then format('packed.%I where chunk$at = to_timestamp($1 + %s)', base || '_rows', i * seconds)
                    else format('packed.%I($1 + %s)', base || '_' || 8 ^ (level - 1), i * seconds * 8 ^ (level - 1))
                end,
                format('to_timestamp($1 + %s)', i * seconds * 8 ^ (level - 1)),
                format('to_timestamp($1 + %s)', (i + 1) * seconds * 8 ^ (level - 1))
            ),
            E'\nunion all\n' order by i
        )
        into body
        from generate_series(0, 7) i;
        execute format(
            $q$create function packed.%I("from" float8) returns table (%s)
language sql
stable
parallel safe
rows 100000
as %L$q$,
            base || '_' || 8 ^ level, columns, body
        );
    end loop;
end
$$;

-- The stretches where anything is packed, those of a level put together where some lie in one of the
-- next level, until they are few: each gate costs each query, and each empty period those of all time.
create or replace function pgpulse.branches(s pgpulse.storage)
returns table (level int, starts timestamptz, "from" timestamptz)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    found timestamptz[] := s.stretches;
    levels int[] := array_fill(2, array[cardinality(found)]);
    wider interval;
begin
    for next_level in 3..5 loop
        exit when cardinality(found) <= 8;
        wider := pgpulse.chunk(s) * 8 ^ next_level;
        select array_agg(p.at order by p.at), array_agg(p.level order by p.at)
        into found, levels
        from (
            select distinct
                case when b.n > 1 then b.parent else b.at end as at,
                case when b.n > 1 then next_level else b.level end as level
            from (
                select
                    u.*,
                    date_bin(wider, u.at, '1970-01-01 00:00:00+00') as parent,
                    count(*) over (partition by date_bin(wider, u.at, '1970-01-01 00:00:00+00')) as n
                from unnest(found, levels) as u (at, level)
            ) as b
        ) as p;
    end loop;
    return query
    select u.level, u.at, (select min(known) from unnest(s.stretches) known where known >= u.at)
    from unnest(levels, found) as u (level, at);
end
$$;

-- The public name, as far as it changes when more is packed.
create or replace function pgpulse.make_view(s pgpulse.storage) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
declare
    base text := (select relname from pg_class where oid = s.packed);
    arms text[] := array[format(
        'select %s from %s', (select string_agg(name, ', ') from pgpulse.packed_columns(s)), s.rows
    )];
begin
    if to_regclass(pgpulse.twin_of(s)) is not null then
        arms := arms || format(
            'select %s from %s',
            (
                select string_agg(case family when 'tx' then '0::bigint as ' else '' end || name, ', ')
                from pgpulse.packed_columns(s)
            ),
            pgpulse.twin_of(s)
        );
    end if;
    if s.stretches <> '{}' then
        arms := arms || format(
            E'select %s from (\nwith barrier as (select 1)\n%s\nunion all\nselect %s\n) as s',
            -- Functions lose what is in brackets: numeric(10, 2).
            (select string_agg(format('%s::%s', name, type), ', ') from pgpulse.packed_columns(s)),
            (
                select string_agg(
                    pgpulse.gate(
                        s,
                        format('packed.%I(%s)', base || '_' || 8 ^ b.level, date_part('epoch', b.starts)),
                        format('timestamptz %L', b."from"),
                        format(
                            'timestamptz %L', least(b.starts + pgpulse.chunk(s) * 8 ^ b.level, s.packed_to)
                        ),
                        -- Rollups ask for rows of late transactions: there are none.
                        (select ' and tx = 0' from pgpulse.packed_columns(s) where family = 'tx')
                    ),
                    E'\nunion all\n' order by b.starts
                )
                from pgpulse.branches(s) b
            ),
            pgpulse.nothing(s)
        );
    end if;
    execute format(
        'create or replace view %s as %s', s.source, array_to_string(arms, E'\nunion all\n')
    );
end
$$;

-- Makes the view find what is packed between these times. Its end moves rarely: to three quarters of
-- pack_after from now, so that it holds for a while, and queries of recent times find the gate shut.
create or replace function pgpulse.reach(s pgpulse.storage, "from" timestamptz, "to" timestamptz)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
declare
    stretch interval := pgpulse.chunk(s) * 64;
    wanted timestamptz[];
begin
    execute format(
        'select array_agg(distinct at) from (
            select date_bin($1, chunk$at, ''1970-01-01 00:00:00+00'') as at
            from %s
            where chunk$at >= $2 and chunk$at < $3
            union all
            select date_bin($1, $2, ''1970-01-01 00:00:00+00'')
        ) as stretches',
        s.packed
    ) into wanted using stretch, "from", "to";
    if wanted <@ s.stretches and "to" <= s.packed_to then
        return false;
    end if;
    -- Without those that retention has emptied.
    execute format(
        'select array_agg(distinct at order by at) from unnest($1 || $2) at
        where at = any ($2) or exists (select from %s where chunk$at >= at and chunk$at < at + $3)',
        s.packed
    ) into s.stretches using s.stretches, wanted, stretch;
    s.packed_to := greatest(
        s.packed_to,
        "to",
        pgpulse.chunk_of(s, now() - coalesce(s.pack_after, '7 days') * 0.75)
    );
    update pgpulse.storage t
    set stretches = s.stretches, packed_to = s.packed_to
    where t.source = s.source;
    perform pgpulse.make_guess(s);
    perform pgpulse.make_view(s);
    return true;
end
$$;

-- Packs the rows of a relation (SQL), together with what is packed of the same series and periods.
create or replace function pgpulse.put_packed(s pgpulse.storage, relation text, verify boolean)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set extra_float_digits = 1
-- One sort by time, and hashing: rows of a table mostly come in that order anyway.
set enable_sort = off
set work_mem = '256MB'
set jit = off
as $$
declare
    view text := format('packed.%I', (select relname from pg_class where oid = s.packed) || '_rows');
    period text := pgpulse.chunk_sql(s);
    series text := pgpulse.series_sql(s);
    keys text := pgpulse.each(pgpulse.quoted(s.keys), ', {}');
    -- A chunk is known by the hash of its keys and period: equality fails where keys are null.
    chunk_hash text := 'hash_record_extended(row(' || substr(keys || ', chunk$at', 3) || '), 0)';
    fresh_hash text := 'hash_record_extended(row(' || substr(keys || ', ' || period, 3) || '), 0)';
    columns text;
    row_sum text;
    parts text[];
    gathered text;
    packs text;
    made text;
    fresh bigint;
    first timestamptz;
    last timestamptz;
    touched bigint[] := '{}';
    old bigint := 0;
    put bigint := 0;
    slices int;
    now_put bigint;
    now_used text;
    used text[] := s.parts;
    before numeric;
    after numeric;
begin
    execute format('select count(*), min(%1$I), max(%1$I) from %2$s as fresh', s.time_column, relation)
    into fresh, first, last;
    if fresh = 0 then
        return 0;
    end if;
    first := pgpulse.chunk_of(s, first);
    last := pgpulse.chunk_of(s, last);
    execute format('select $3 or exists (select from %s where chunk$at between $1 and $2)', s.packed)
    into verify using first, last, verify;
    if verify then
        execute format('select array_agg(distinct %s) from %s as fresh', fresh_hash, relation)
        into touched;
        execute format(
            'select coalesce(sum(chunk$rows), 0) from %s where chunk$at between $1 and $2 and %s = any ($3)',
            s.packed, chunk_hash
        ) into old using first, last, touched;
    end if;

    select
        string_agg(c.name, ', ' order by i),
        string_agg(', ' || c.gathered || ' as a' || i, '' order by i),
        string_agg(format(E'\n    cross join lateral %1$s(g.a%2$s) as e%2$s', c.packs, i), '' order by i)
            filter (where c.packs is not null),
        string_agg(format(', e%s.*', i), '' order by i) filter (where c.packs is not null)
    into columns, gathered, packs, made
    from pgpulse.packed_columns(s) with ordinality
        c (name, type, family, writable, parts, definitions, gathered, packs, i)
    where c.family <> 'tx';
    parts := array(
        select part
        from pgpulse.packed_columns(s) with ordinality
            c (name, type, family, writable, parts, definitions, gathered, packs, i),
            unnest(c.parts) with ordinality as p (part, j)
        where c.family not in ('key', 'tx')
        order by i, j
    );
    -- Sum of hashes of rows as text, which every type has, and which tells 0 from -0.
    row_sum := format('select coalesce(sum(hashtextextended(row(%s)::text, 0)), 0) from', columns);
    if verify then
        execute format(
            'select (%1$s %2$s as fresh) + (%1$s %3$s where chunk$at between $1 and $2 and %4$s = any ($3))',
            row_sum, relation, view, chunk_hash
        ) into before using first, last, touched;
    end if;

    -- What does not fit into memory at once is done by series.
    slices := case when s.keys = '{}' then 1 else 1 + (fresh + old) / 2000000 end;
    for piece in 0..slices - 1 loop
        execute format(
            $q$with packing as (
    insert into %1$s as t (chunk$at, chunk$rows%2$s, %3$s)
    select g.chunk$at, g.chunk$rows%4$s%5$s
    from (
        select %6$s as chunk$at%2$s, count(*) as chunk$rows%7$s
        from (
            select %8$s
            from (
                select %8$s from %9$s as fresh
                union all
                select %8$s from %10$s where chunk$at between $1 and $2 and %11$s = any ($3)
            ) as fresh
            %12$s
            order by %13$I
            offset 0
        ) as sorted
        group by 1%2$s
    ) as g%14$s
    on conflict (chunk$at%2$s) do update set chunk$rows = excluded.chunk$rows%15$s
    returning chunk$rows, concat_ws(',', %16$s) as used
)
select sum(chunk$rows), string_agg(distinct used, ',')
from packing$q$,
            s.packed,
            keys,
            array_to_string(parts, ', '),
            pgpulse.each(pgpulse.quoted(s.keys), ', g.{}'),
            made,
            period,
            gathered,
            columns,
            relation,
            view,
            chunk_hash,
            case when slices > 1 then format('where abs(%s %% %s) = %s', series, slices, piece) end,
            s.time_column,
            packs,
            pgpulse.each(parts, ', {} = excluded.{}'),
            (
                select string_agg(format('case when t.%s is not null then %s end', part, j), ', ')
                from unnest(parts) with ordinality p (part, j)
            )
        ) into now_put, now_used using first, last, touched;
        put := put + coalesce(now_put, 0);
        used := used || array(select parts[j::int] from unnest(string_to_array(now_used, ',')) j);
    end loop;
    if put <> fresh + old then
        raise exception 'Cannot pack %: of % rows it packed %', s.source, fresh + old, put
            using hint = 'Nothing was changed; this is a fault of pgpulse';
    end if;

    used := array(select distinct part from unnest(used) part order by 1);
    if used <> s.parts then
        s.parts := used;
        update pgpulse.storage t set parts = used where t.source = s.source;
        begin
            perform pgpulse.make_rows_view(s);
        exception when lock_not_available then
            -- upkeep_storage tells the view of these columns before the next try.
            raise exception 'Cannot pack "%" now: readers hold the view packed.%', s.source,
                (select relname from pg_class where oid = s.packed) || '_rows'
                using errcode = 'lock_not_available', detail = used::text, hint = 'Nothing was changed; try again';
        end;
    end if;
    if verify then
        execute format('%s %s where chunk$at between $1 and $2 and %s = any ($3)', row_sum, view, chunk_hash)
        into after using first, last, touched;
        if after <> before then
            raise exception 'Cannot pack %: what would be read again is not the same', s.source
                using hint = 'Nothing was changed; keys whose different values are equal (citext, numeric, '
                    'float8) cannot tell series apart';
        end if;
    end if;
    perform pgpulse.reach(s, first, last + pgpulse.chunk(s));
    return fresh;
end
$$;

-- --- partitions ----------------------------------------------------------------------------------

create or replace function pgpulse.bounds(parent regclass)
returns table (part regclass, "from" timestamptz, "to" timestamptz)
language sql
stable
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
    select
        c.oid::regclass,
        replace(bound[1], 'MINVALUE', '-infinity')::timestamptz,
        replace(bound[2], 'MAXVALUE', 'infinity')::timestamptz
    from pg_inherits i
    join pg_class c on c.oid = i.inhrelid
    cross join lateral regexp_match(
        pg_get_expr(c.relpartbound, c.oid), 'FROM \(''?([^'')]*)''?\) TO \(''?([^'')]*)''?\)'
    ) as m (bound)
    where i.inhparent = parent and bound is not null
$$;

-- Rows that only move, or go for good, change nothing that was rolled up of them. No attribute of the
-- functions that do so: only superusers may write such a one for a setting of ours.
create or replace function pgpulse.silence_rollups(silent boolean) returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    select set_config('pgpulse.keep_rollups', case when silent then 'on' else 'off' end, true)
$$;

-- Makes the partition for a time, if there is none. Rows of it that the default partition took in are
-- moved there, before writers are held off for the last of them.
create or replace function pgpulse.make_partition(s pgpulse.storage, at timestamptz) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set lock_timeout = '100ms'
as $$
declare
    base text := (select relname from pg_class where oid = s.rows);
    starts timestamptz := date_trunc(case s.period when interval '1 day' then 'day' else 'month' end, at);
    ends timestamptz := starts + s.period;
    rest regclass := (select partdefid::regclass from pg_partitioned_table where partrelid = s.rows);
    name text;
    columns text;
    moving text;
    moved bigint;
begin
    perform pgpulse.silence_rollups(true);
    if at is null or exists (select from pgpulse.bounds(s.rows) b where b."from" <= at and b."to" > at) then
        return null;
    end if;
    -- Others may have partitions of another length here.
    select greatest(starts, max(b."to")) into starts from pgpulse.bounds(s.rows) b where b."to" <= at;
    select least(ends, min(b."from")) into ends from pgpulse.bounds(s.rows) b where b."from" > at;
    name := format(
        'rows.%I', left(base, 50) || to_char(starts, case s.period when interval '1 day' then '_YYYY_MM_DD' else '_YYYY_MM' end)
    );
    if to_regclass(name) is not null then
        name := format('rows.%I', left(base, 42) || to_char(starts, '_YYYYMMDD_HH24MISS'));
    end if;
    execute format(
        'create table %s (
            like %s including comments including compression including constraints including defaults
                including generated including storage
        )%s',
        name,
        s.rows,
        (select ' with (' || array_to_string(reloptions, ', ') || ')' from pg_class where oid = rest)
    );
    execute format(
        'alter table %1$s add constraint pgpulse_range check (%2$I is not null and %2$I >= %3$L and %2$I < %4$L)',
        name, s.time_column, starts, ends
    );
    if (select relowner from pg_class where oid = s.rows) <> (select relowner from pg_class where oid = name::regclass) then
        execute format('alter table %s owner to %s', name,
            (select relowner::regrole from pg_class where oid = s.rows));
    end if;
    select string_agg(c.name, ', ') into columns
    from pgpulse.packed_columns(s) c
    join pg_attribute a on a.attrelid = s.rows and quote_ident(a.attname) = c.name and a.attgenerated = '';
    moving := format(
        $q$with moved as (
    delete from %1$s where %2$I >= %3$L and %2$I < %4$L returning %5$s
)
insert into %6$s (%5$s) select %5$s from moved$q$,
        rest, s.time_column, starts, ends, columns, name
    );
    execute moving;
    get diagnostics moved = row_count;
    if moved > 0 then
        execute format('lock table %s in access exclusive mode', rest);
        execute moving;
    end if;
    execute format(
        'alter table %s attach partition %s for values from (%L) to (%L)', s.rows, name, starts, ends
    );
    execute format('alter table %s drop constraint pgpulse_range', name);
    perform pgpulse.capture_changes(r, r.rolled_tx) from pgpulse.rollups r where r.source = s.source;
    return name || case when moved > 0 then format(', %s rows from %s', moved, rest) else '' end;
end
$$;

-- --- turning a table over, and back --------------------------------------------------------------

-- What a table has besides columns and rows, as SQL that gives it to another one.
create or replace function pgpulse.furniture(relation regclass, target text) returns setof text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select statement
    from (
        select
            case k.contype when 'f' then 3 else 1 end as turn,
            k.conname::text as name,
            format('alter table %s add constraint %I %s', target, k.conname, pg_get_constraintdef(k.oid)) as statement
        from pg_constraint k
        where k.conrelid = relation and k.contype in ('p', 'u', 'x', 'f') and k.conparentid = 0
        union all
        select
            case when i.indisunique then 1 else 2 end,
            c.relname,
            format(
                'create %sindex %I on %s%s',
                case when i.indisunique then 'unique ' end,
                c.relname,
                target,
                substr(d.definition, position(' USING ' in d.definition))
            )
        from pg_index i
        join pg_class c on c.oid = i.indexrelid
        cross join pg_get_indexdef(i.indexrelid) as d (definition)
        where i.indrelid = relation
            and not exists (select from pg_constraint k where k.conrelid = relation and k.conindid = i.indexrelid)
        union all
        select
            4,
            t.tgname,
            replace(
                pg_get_triggerdef(t.oid),
                format(' ON %I.%I ', n.nspname, c.relname),
                format(' ON %s ', target)
            ) || case
                when t.tgenabled <> 'O' then format(
                    '; alter table %s %s trigger %I',
                    target,
                    case t.tgenabled when 'D' then 'disable' when 'A' then 'enable always' else 'enable replica' end,
                    t.tgname
                )
                else ''
            end
        from pg_trigger t
        join pg_class c on c.oid = t.tgrelid
        join pg_namespace n on n.oid = c.relnamespace
        where t.tgrelid = relation
            and not t.tgisinternal
            and t.tgparentid = 0
            and t.tgfoid <> 'pgpulse.rollup_changed'::regproc
        union all
        select
            5,
            '',
            format(
                'grant %s%s on %s to %s%s',
                a.privilege_type,
                acl.columns,
                target,
                case a.grantee when 0 then 'public' else a.grantee::regrole::text end,
                case when a.is_grantable then ' with grant option' end
            )
        from pg_class c
        cross join lateral (
            select '', c.relacl
            union all
            select format(' (%I)', attname), attacl from pg_attribute where attrelid = c.oid and not attisdropped
        ) as acl (columns, items)
        cross join aclexplode(acl.items) a
        where c.oid = relation and a.grantee <> c.relowner
    ) as furniture
    order by turn, name
$$;

-- Views over a relation, as SQL that makes them anew over what then has its name.
create or replace function pgpulse.views_over(relation regclass) returns setof text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select format(
        'create or replace view %s%s as %s',
        c.oid::regclass,
        ' with (' || array_to_string(c.reloptions, ', ') || ')',
        pg_get_viewdef(c.oid)
    )
    from pg_class c
    where c.relkind = 'v'
        and c.oid in (
            select r.ev_class
            from pg_depend d
            join pg_rewrite r on r.oid = d.objid
            where d.classid = 'pg_rewrite'::regclass
                and d.refclassid = 'pg_class'::regclass
                and d.refobjid = relation
                and r.ev_class <> relation
        )
    order by c.oid
$$;

-- Takes the locks of all views over a relation, outermost first, as their readers do: the other way
-- round, a reader and a turn-over that wait for each other would end in a deadlock.
create or replace function pgpulse.hold_views(relation regclass) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    v record;
begin
    for v in
        with recursive over (id, depth) as (
            select relation::oid, 0
            union
            select r.ev_class, o.depth + 1
            from over o
            join pg_depend d
                on d.classid = 'pg_rewrite'::regclass and d.refclassid = 'pg_class'::regclass and d.refobjid = o.id
            join pg_rewrite r on r.oid = d.objid
            where r.ev_class <> o.id
        )
        select c.oid::regclass as name, c.relowner::regrole as owner
        from over o
        join pg_class c on c.oid = o.id and c.relkind = 'v'
        where o.depth > 0
        group by c.oid, c.relowner
        order by max(o.depth) desc, c.oid
    loop
        -- LOCK TABLE would go on to what is behind it.
        execute format('alter view %s owner to %s', v.name, v.owner);
    end loop;
end
$$;

create or replace function pgpulse.compress(relation regclass, part text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    execute format('alter table %s alter column %s set compression lz4', relation, part);
exception when feature_not_supported then
    -- A server built without lz4: pglz it is.
    null;
end
$$;

-- Sequences of columns go on where they were.
create or replace function pgpulse.take_sequences("from" regclass, "to" regclass) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    c record;
begin
    for c in
        select attname, attidentity, pg_get_serial_sequence("from"::text, attname) as sequence
        from pg_attribute
        where attrelid = "from" and attnum > 0 and not attisdropped
    loop
        if c.attidentity <> '' then
            execute format(
                'select setval(%L, last_value, is_called) from %s',
                pg_get_serial_sequence("to"::text, c.attname), c.sequence
            );
        elsif c.sequence is not null then
            execute format('alter sequence %s owned by %s.%I', c.sequence, "to", c.attname);
        end if;
    end loop;
end
$$;

-- Rights on the public name hold for what is behind it: inlined functions read as their caller. So do
-- those on streams and rollups of it.
create or replace function pgpulse.share_rights(s pgpulse.storage) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    view regclass := format('packed.%I', (select relname from pg_class where oid = s.packed) || '_rows')::regclass;
    shown oid[];
    grantee text;
begin
    with recursive over (id) as (
        select s.source::oid
        union
        select r.ev_class
        from over o
        join pg_depend d
            on d.classid = 'pg_rewrite'::regclass and d.refclassid = 'pg_class'::regclass and d.refobjid = o.id
        join pg_rewrite r on r.oid = d.objid
    )
    select array_agg(o.id) into shown
    from over o
    join pg_class c on c.oid = o.id
    where c.oid = s.source or c.relnamespace::regnamespace::text in ('live', 'rollup');
    for grantee in
        select distinct case a.grantee when 0 then 'public' else a.grantee::regrole::text end
        from pg_class c, aclexplode(c.relacl) a
        where c.oid = any (shown)
            and a.grantee <> c.relowner
            and a.privilege_type = 'SELECT'
            and not exists (
                select
                from pg_class v, aclexplode(v.relacl) b
                where v.oid = view and b.grantee = a.grantee and b.privilege_type = 'SELECT'
            )
    loop
        execute format('grant select on %s, %s to %s', view, s.packed, grantee);
    end loop;
    for grantee in
        select distinct case a.grantee when 0 then 'public' else a.grantee::regrole::text end
        from pg_class v, aclexplode(v.relacl) a
        where v.oid = view
            and a.grantee <> v.relowner
            and a.privilege_type = 'SELECT'
            and not exists (
                select
                from pg_class c, aclexplode(c.relacl) b
                where c.oid = any (shown || s.rows::oid) and b.grantee = a.grantee and b.privilege_type = 'SELECT'
            )
    loop
        execute format('revoke select on %s, %s from %s', view, s.packed, grantee);
    end loop;
    -- Sequences are behind the defaults, and the view's defaults are its reader's.
    for grantee in
        select distinct format(
            '%s to %s', d.objid::regclass, case a.grantee when 0 then 'public' else a.grantee::regrole::text end
        )
        from (
            select d.objid
            from pg_depend d
            where d.classid = 'pg_class'::regclass
                and d.refclassid = 'pg_class'::regclass
                and d.refobjid = s.rows
                and d.deptype in ('a', 'i')
            union
            select d.refobjid
            from pg_attrdef f
            join pg_depend d on d.classid = 'pg_attrdef'::regclass and d.objid = f.oid
            where f.adrelid = s.rows and d.refclassid = 'pg_class'::regclass
        ) as d
        join pg_class q on q.oid = d.objid and q.relkind = 'S'
        join pg_class c on c.oid in (s.source, s.rows)
        cross join lateral (
            select c.relacl union all select attacl from pg_attribute where attrelid = c.oid
        ) as acl (items)
        cross join aclexplode(acl.items) a
        where a.privilege_type = 'INSERT'
            and not exists (
                select
                from aclexplode(coalesce(q.relacl, acldefault('s', q.relowner))) b
                where b.grantee = a.grantee and b.privilege_type = 'USAGE'
            )
    loop
        execute 'grant usage on sequence ' || grantee;
    end loop;
end
$$;

create or replace function pgpulse.remake_storage(source regclass) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    s pgpulse.storage := pgpulse.stored(source, 'remake storage of');
    bare pgpulse.storage := s;
    base text := (select relname from pg_class where oid = s.packed);
    writer text := format('rows.%I', left(base, 56) || '_write');
    c record;
    columns text;
    written text;
    "values" text;
    same text;
begin
    for c in
        select u.definition, u.part
        from pgpulse.packed_columns(s) packed,
            unnest(packed.definitions, packed.parts) as u (definition, part)
        where not exists (
            select from pg_attribute a where a.attrelid = s.packed and quote_ident(a.attname) = u.part
        )
    loop
        execute format('alter table %s add column %s', s.packed, c.definition);
        if c.part like '%$i_"' or c.part like '%$all"' then
            perform pgpulse.compress(s.packed, c.part);
        end if;
    end loop;

    bare.stretches := '{}';
    perform pgpulse.make_view(bare);
    perform pgpulse.make_guess(s);
    perform pgpulse.make_rows_view(s);
    perform pgpulse.make_tree(s);
    perform pgpulse.make_view(s);

    -- Defaults of the table hold for who writes through the view.
    for c in
        select
            a.attname,
            case a.attidentity
                when 'd' then format('nextval(%L::regclass)', pg_get_serial_sequence(s.rows::text, a.attname))
                else pg_get_expr(d.adbin, d.adrelid)
            end as "default"
        from pg_attribute a
        left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where a.attrelid = s.rows and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
    loop
        execute format(
            'alter view %s alter column %I %s',
            s.source, c.attname, coalesce('set default ' || c."default", 'drop default')
        );
    end loop;
    select
        string_agg(name, ', '),
        string_agg(name, ', ') filter (where writable and family <> 'tx'),
        string_agg('new.' || name, ', ') filter (where writable and family <> 'tx'),
        format(
            'row(%s)::text = row(%s)::text',
            string_agg('r.' || name, ', ') filter (where family <> 'tx'),
            string_agg('old.' || name, ', ') filter (where family <> 'tx')
        )
    into columns, written, "values", same
    from pgpulse.packed_columns(s);
    -- A rule for INSERT, as it takes all rows at once; triggers for COPY, and for what must find rows.
    execute format(
        'create or replace rule pgpulse_insert as on insert to %s
        do instead insert into %s (%s) values (%s) returning %s',
        s.source, s.rows, written, "values", columns
    );
    execute format(
        $q$create or replace function %1$s() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $f$
declare
    part oid;
    place tid;
begin
    if tg_op = 'INSERT' then
        insert into %2$s (%3$s) values (%4$s);
        return new;
    end if;
    -- Locked, as others may be about to change it: what new holds was made of what they replace.
    select r.tableoid, r.ctid into part, place
    from %2$s r
    where r.%5$I = old.%5$I and %6$s
    limit 1
    for update;
    if part is null then
%8$s        if not exists (
            select from packed.%9$I r
            where r.chunk$at = date_bin(%10$L, old.%5$I, '1970-01-01 00:00:00+00') and r.%5$I = old.%5$I and %6$s
        ) and old.%5$I is not null then
            raise exception 'Cannot %% a row of "%7$s": somebody has changed it meanwhile', lower(tg_op)
                using errcode = 'serialization_failure', hint = 'Run the statement again';
        end if;
        raise exception 'Cannot %% a packed row of "%7$s"', lower(tg_op)
            using detail = format('Its time is %%s', old.%5$I),
                hint = format('First bring that time back as rows: select pgpulse.unpack(%%L, %%L, %%L)',
                    %7$L, old.%5$I, old.%5$I + interval '1 second');
    elsif tg_op = 'DELETE' then
        delete from %2$s r where r.%5$I = old.%5$I and r.tableoid = part and r.ctid = place;
    else
        update %2$s r set (%3$s) = row(%4$s)
        where r.%5$I = old.%5$I and r.tableoid = part and r.ctid = place;
    end if;
    if not found then
        -- A trigger of the table has declined it.
        return null;
    elsif tg_op = 'DELETE' then
        return old;
    end if;
    return new;
end
$f$
$q$,
        writer, s.rows, written, "values", s.time_column, same, s.source,
        case when to_regclass(pgpulse.twin_of(s)) is not null then format(
            $q$        if exists (select from %1$s r where r.%2$I = old.%2$I and %3$s) then
            raise exception 'Cannot %% a row of "%4$s" that has gone over to TimescaleDB', lower(tg_op)
                using hint = 'It can be done when pgpulse.move_to_timescale has come to its end';
        end if;
$q$,
            pgpulse.twin_of(s), s.time_column, same, s.source
        ) end,
        base || '_rows',
        pgpulse.chunk(s)::text
    );
    execute format('revoke execute on function %s from public', writer);
    execute format(
        'create or replace trigger pgpulse_write instead of insert or update or delete on %s
        for each row execute function %s()',
        s.source, writer
    );
    perform pgpulse.share_rights(s);
end
$$;

comment on function pgpulse.remake_storage is
    'Brings the view and the packed table up to date, after a column was added to the table in schema rows.';

-- A plain table becomes the first partition of one that gets its name and all it has, and it holds
-- what there is up to the end of the present period. One scan, while others wait, proves it.
create or replace function pgpulse.enclose(
    source regclass,
    name text,
    time_column text,
    period interval,
    pieces text[]
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
declare
    upto timestamptz := date_trunc(case period when interval '1 day' then 'day' else 'month' end, now()) + period;
    c record;
    piece text;
begin
    perform pgpulse.silence_rollups(true);
    for c in
        select i.relname, i.oid
        from pg_index x
        join pg_class i on i.oid = x.indexrelid
        where x.indrelid = source
    loop
        execute format('alter index rows.%I rename to %I', c.relname, left(c.relname, 50) || '_' || c.oid);
    end loop;
    execute format('alter table %s rename to %I', source, name || '_before');
    execute format(
        'create table rows.%1$I (
            like %2$s including comments including compression including constraints including defaults
                including generated including identity including statistics including storage
        ) partition by range (%3$I)',
        name, source, time_column
    );
    perform pgpulse.take_sequences(source, format('rows.%I', name)::regclass);
    foreach piece in array pieces loop
        continue when piece ~ '^CREATE (CONSTRAINT )?TRIGGER ';
        execute piece;
    end loop;
    execute format('create table rows.%I partition of rows.%I default%s', name || '_rest', name,
        (select ' with (' || array_to_string(reloptions, ', ') || ')' from pg_class where oid = source));
    -- The whole hands its triggers down, and gives out the numbers.
    for c in
        select tgname
        from pg_trigger
        where tgrelid = source and not tgisinternal and tgfoid <> 'pgpulse.rollup_changed'::regproc
    loop
        execute format('drop trigger %I on %s', c.tgname, source);
    end loop;
    for c in select attname from pg_attribute where attrelid = source and attidentity <> '' loop
        execute format('alter table %s alter column %I drop identity', source, c.attname);
        -- A view cannot refuse a number that is given: it is taken.
        execute format('alter table rows.%I alter column %I set generated by default', name, c.attname);
    end loop;
    execute format(
        $q$create temp table pgpulse_else (like %1$s) on commit drop;
        with elsewhere as (
            delete from %1$s
            where %2$I is null or %2$I < '1970-01-01 00:00:00+00' or %2$I >= %3$L
            returning *
        )
        insert into pg_temp.pgpulse_else select * from elsewhere;
        alter table %1$s add constraint pgpulse_range
            check (%2$I is not null and %2$I >= '1970-01-01 00:00:00+00' and %2$I < %3$L);
        alter table rows.%4$I attach partition %1$s for values from ('1970-01-01 00:00:00+00') to (%3$L);
        alter table %1$s drop constraint pgpulse_range$q$,
        source, time_column, upto, name
    );
    execute format(
        'insert into rows.%1$I (%2$s) overriding system value select %2$s from pg_temp.pgpulse_else',
        name,
        (
            select string_agg(quote_ident(attname), ', ')
            from pg_attribute
            where attrelid = source and attnum > 0 and not attisdropped and attgenerated = ''
        )
    );
    drop table pg_temp.pgpulse_else;
    -- Last, as nothing new has come.
    foreach piece in array pieces loop
        continue when piece !~ '^CREATE (CONSTRAINT )?TRIGGER ';
        execute piece;
    end loop;
end
$$;

create or replace function pgpulse.add_storage(
    source regclass,
    time_column text,
    keys text[] default '{}',
    period interval default '1 day',
    pack_after interval default '7 days',
    keep interval default null,
    ahead interval default '3 days'
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
#variable_conflict use_column
declare
    s pgpulse.storage;
    table_name text;
    public_name text;
    schema_name text;
    kind text;
    owner text;
    said text;
    found text;
    views text[];
    pieces text[];
    piece text;
    c record;
    is_empty boolean;
begin
    if pgpulse.is_hypertable(source) then
        perform pgpulse.add_hypertable(source, time_column, keys, period, pack_after, keep);
        return;
    end if;
    if period not in (interval '1 day', interval '1 month') then
        raise exception 'Cannot store "%" in periods of %', source, period
            using hint = 'A period is ''1 day'' or ''1 month''';
    end if;
    select * into s from pgpulse.storage k where add_storage.source in (k.source, k.rows);
    if s.source is not null then
        if (s.time_column, s.keys, s.period)
            is distinct from (add_storage.time_column, add_storage.keys, add_storage.period) then
            raise exception 'Cannot change how "%" is stored', s.source
                using hint = format('Its time column, keys and period stay; select pgpulse.drop_storage(%L) '
                    'makes a plain table of it, to be added again', s.source::text);
        end if;
        update pgpulse.storage k
        set pack_after = add_storage.pack_after, keep = add_storage.keep, ahead = add_storage.ahead
        where k.source = s.source;
        perform pgpulse.remake_storage(s.source);
        return;
    end if;

    select r.relname, n.nspname, r.relkind, r.relowner::regrole::text, obj_description(r.oid, 'pg_class')
    into table_name, schema_name, kind, owner, said
    from pg_class r
    join pg_namespace n on n.oid = r.relnamespace
    where r.oid = source;
    public_name := format('%I.%I', schema_name, table_name);
    if kind not in ('r', 'p')
        or schema_name in ('rows', 'packed')
        or (select relpersistence <> 'p' or relispartition or reloftype <> 0 from pg_class where oid = source)
        or exists (select from pg_inherits where inhrelid = source)
        or kind = 'r' and exists (select from pg_inherits where inhparent = source) then
        raise exception 'Cannot store "%": it is no table of its own', public_name
            using hint = 'It may be a table or a partitioned one, neither temporary nor unlogged';
    end if;
    if length(table_name) > 45 then
        raise exception 'Cannot store "%": its name is longer than 45 characters', public_name
            using hint = 'alter table ... rename to ...';
    end if;
    if not exists (
        select
        from pg_attribute
        where attrelid = source and attname = time_column and atttypid = 'timestamptz'::regtype
    ) then
        raise exception 'Cannot store "%": it has no timestamptz column "%"', public_name, time_column
            using hint = 'alter table ... alter column ... type timestamptz makes it one';
    end if;
    select string_agg(format('"%s"', key), ', ') into found
    from unnest(keys) key
    where key = time_column
        or not exists (
            select from pg_attribute where attrelid = source and attname = key and attnum > 0 and not attisdropped
        );
    if found is not null then
        raise exception 'Cannot store "%": % cannot be a key', public_name, found
            using hint = 'Keys are columns that tell series apart, such as an id and a kind';
    end if;
    select string_agg(format('"%s"', attname), ', ') into found
    from pg_attribute
    where attrelid = source and attnum > 0 and not attisdropped
        and (length(attname) > 57 or attname in ('chunk$at', 'chunk$rows'));
    if found is not null then
        raise exception 'Cannot store "%": it cannot pack the column %', public_name, found
            using hint = 'alter table ... rename column ... to ...; 57 characters at most';
    end if;
    select format('"%s" (%s)', u.relname, a.columns) into found
    from pg_index i
    join pg_class u on u.oid = i.indexrelid
    cross join lateral (
        select string_agg(attname, ', ') as columns, bool_or(attname = time_column) as has_time
        from pg_attribute
        where attrelid = source and attnum = any (i.indkey)
    ) a
    where i.indrelid = source
        and (i.indisexclusion or i.indisunique and not coalesce(a.has_time, false))
    limit 1;
    if found is not null then
        raise exception 'Cannot store "%": its unique key % lacks "%"', public_name, found, time_column
            using detail = 'A partition cannot see what others hold, nor what is packed',
                hint = format(
                    'Drop it or widen it: alter table %s drop constraint ..., add primary key (..., %I)',
                    public_name, time_column
                );
    end if;
    select string_agg(k.conrelid::regclass::text, ', ') into found
    from pg_constraint k
    where k.confrelid = source and k.conrelid <> source and k.conparentid = 0;
    if found is not null then
        raise exception 'Cannot store "%": foreign keys of % point to it', public_name, found
            using hint = 'Packed rows cannot be pointed to: drop these foreign keys';
    end if;
    -- set pgpulse.backend = plain leaves TimescaleDB aside.
    if pgpulse.timescale() is not null and current_setting('pgpulse.backend', true) is distinct from 'plain' then
        perform pgpulse.add_hypertable(source, time_column, keys, period, pack_after, keep);
        return;
    end if;
    if (select relrowsecurity from pg_class where oid = source) then
        raise exception 'Cannot store "%": it has row-level security', public_name
            using hint = 'Packed rows would show to everybody who may read it';
    end if;
    select string_agg(format('%I', attname), ', ') into found
    from pg_attribute c
    where attrelid = source
        and not attisdropped
        and exists (select from aclexplode(c.attacl) where privilege_type = 'SELECT');
    if found is not null then
        raise exception 'Cannot store "%": somebody may read of it the column % only', public_name, found
            using hint = 'Packed rows can be read as a whole only: make a view for who may see less, '
                'and revoke the rights on columns';
    end if;
    if kind = 'p' and not exists (
        select
        from pg_partitioned_table p
        join pg_attribute a on a.attrelid = source and a.attname = time_column
        where p.partrelid = source and p.partstrat = 'r' and p.partattrs::text = a.attnum::text
    ) then
        raise exception 'Cannot store "%": it is not partitioned by ranges of "%"', public_name, time_column
            using hint = 'Copy its rows into a table that is, or into a plain one';
    end if;
    select string_agg(distinct what, ', ') into found
    from (
        select format('%s %s', case r.relkind when 'm' then 'materialized view' else 'a rule on' end, r.oid::regclass)
        from pg_depend d
        join pg_rewrite w on d.classid = 'pg_rewrite'::regclass and w.oid = d.objid
        join pg_class r on r.oid = w.ev_class and r.relkind <> 'v'
        where d.refclassid = 'pg_class'::regclass and d.refobjid = source
        union all
        select format('function %s', d.objid::regprocedure)
        from pg_depend d
        join pg_class r on r.oid = source
        join pg_type t on t.oid = r.reltype
        where d.classid = 'pg_proc'::regclass
            and (
                d.refclassid = 'pg_class'::regclass and d.refobjid = source
                or d.refclassid = 'pg_type'::regclass and d.refobjid in (t.oid, t.typarray)
            )
        union all
        select format('column %s of %s', a.attname, a.attrelid::regclass)
        from pg_class r
        join pg_attribute a on a.atttypid = r.reltype and not a.attisdropped
        join pg_class u on u.oid = a.attrelid and u.relkind <> 'v'
        where r.oid = source
    ) as u (what);
    if found is not null then
        raise exception 'Cannot store "%": % stands on it', public_name, found
            using hint = format('Drop it, and make it again when "%s" is a view', public_name);
    end if;
    if to_regclass(format('rows.%I', table_name)) is not null
        or to_regclass(format('packed.%I', table_name)) is not null then
        raise exception 'Cannot store "%": the schemas rows and packed have a table of that name', public_name
            using hint = 'It belongs to a table in another schema: rename one of the two';
    end if;

    begin
        perform pgpulse.lock_rollup(r.rollup, true) from pgpulse.rollups r where r.source = add_storage.source;
        perform pgpulse.hold_views(source);
        execute format('lock table %s in access exclusive mode', source);
    exception when lock_not_available then
        raise exception 'Cannot store "%" now: long transactions hold it', public_name
            using hint = 'Nothing was changed; try again when they have ended';
    end;
    if exists (select from pg_index where indrelid = source and indisunique) then
        raise notice 'Unique keys of "%" do not see packed rows: what repeats one of these is taken', public_name;
    end if;
    views := array(select pgpulse.views_over(source));
    pieces := array(select pgpulse.furniture(source, format('rows.%I', table_name)));
    s.time_column := time_column;
    s.keys := keys;
    s.period := period;
    s.pack_after := pack_after;
    s.keep := keep;
    s.ahead := ahead;
    s.parts := '{}';
    s.stretches := '{}';
    -- What belongs to a table goes along with it: people's nextval('...') shall find it where it was.
    for c in
        select d.objid::regclass as name
        from pg_depend d
        join pg_class q on q.oid = d.objid and q.relkind = 'S'
        where d.classid = 'pg_class'::regclass
            and d.refclassid = 'pg_class'::regclass
            and d.refobjid = source
            and d.deptype = 'a'
    loop
        execute format('alter sequence %s owned by none', c.name);
    end loop;
    execute format('alter table %s set schema rows', source);
    if kind = 'r' then
        perform pgpulse.enclose(source, table_name, time_column, period, pieces);
    end if;
    s.rows := format('rows.%I', table_name)::regclass;
    if (select partdefid from pg_partitioned_table where partrelid = s.rows) = 0 then
        execute format('create table rows.%I partition of %s default', table_name || '_rest', s.rows);
    end if;
    -- Workers take a period each; several at one would each need to be gathered.
    execute format(
        'create table packed.%I (chunk$at timestamptz not null, chunk$rows int not null) with (parallel_workers = 0)',
        table_name
    );
    s.packed := format('packed.%I', table_name)::regclass;
    execute format(
        'create view %s as select %s from %s',
        public_name,
        (select string_agg(name, ', ') from pgpulse.packed_columns(s)),
        s.rows
    );
    s.source := public_name::regclass;
    insert into pgpulse.storage select s.*;
    perform pgpulse.remake_storage(s.source);
    execute format(
        'create unique index on %s (chunk$at%s) nulls not distinct',
        s.packed, pgpulse.each(pgpulse.quoted(keys), ', {}')
    );

    execute format('comment on view %s is %L', s.source, said);
    execute format('comment on table %s is %L', s.rows, format('Rows of %s that are not packed', s.source));
    execute format('comment on table %s is %L', s.packed,
        format('Packed rows of %s', s.source));
    for c in
        select attname, col_description(attrelid, attnum) as said
        from pg_attribute
        -- That of tx says that it may be dropped, which is not so for a view.
        where attrelid = s.rows and attnum > 0 and not attisdropped and attname <> 'tx'
    loop
        execute format('comment on column %s.%I is %L', s.source, c.attname, c.said);
    end loop;
    foreach piece in array pieces loop
        if piece ~ '^grant (SELECT|INSERT|UPDATE|DELETE) ' then
            execute replace(piece, format(' on rows.%I to ', table_name), format(' on %s to ', s.source));
        end if;
    end loop;
    if owner <> quote_ident(current_user) then
        execute format(
            'alter table %1$s owner to %4$s; alter table %2$s owner to %4$s; alter view %3$s owner to %4$s',
            s.rows, s.packed, s.source, owner
        );
    end if;
    update pgpulse.rollups r set source = s.source where r.source in (add_storage.source, s.rows);
    update pgpulse.sinks k set source = s.source where k.source in (add_storage.source, s.rows);
    foreach piece in array views loop
        begin
            execute piece;
        exception when others then
            raise exception 'Cannot store "%": a view over it cannot follow: %', public_name, sqlerrm
                using detail = piece,
                    hint = 'Drop that view, and make it again afterwards';
        end;
    end loop;
    perform pgpulse.remake_rollup(r.rollup) from pgpulse.rollups r where r.source = s.source;
    perform pgpulse.share_rights(s);
    if kind = 'r' then
        execute format('select not exists (select from %s)', add_storage.source) into is_empty;
        if is_empty then
            execute format('drop table %s', add_storage.source);
        end if;
    end if;
    perform pgpulse.make_partition(s, at)
    from generate_series(now(), now() + ahead, period) at;
    perform pgpulse.make_partition(s, now() + ahead);
    perform pgpulse.silence_rollups(false);
end
$$;

comment on function pgpulse.add_storage is
    'Turns a table over to partitions made ahead, and to history packed into arrays, both under its name. '
    'time_column: a timestamptz. keys: columns that tell series apart. period: of a partition, ''1 day'' '
    'or ''1 month''. pack_after, keep: age at which rows are packed, and dropped (null: never). ahead: how '
    'far partitions are made ahead. Rows that are there stay readable, and pgpulse.upkeep_storage moves them '
    'in steps. Unique keys do not see packed rows: who writes again into a packed period doubles its rows. '
    'Identity columns take the numbers that are given. Nothing is dropped before rollups and sinks have it. The same call again changes pack_after, keep and ahead.';

revoke execute on function pgpulse.add_storage from public;

-- The relations and functions of a stored table, which has nothing in them any more.
create or replace function pgpulse.drop_parts(s pgpulse.storage) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    base text := (select relname from pg_class where oid = s.packed);
begin
    execute format('drop view %s', s.source);
    execute format('drop function rows.%I()', left(base, 56) || '_write');
    for level in 1..5 loop
        execute format('drop function packed.%I(float8)', base || '_' || 8 ^ level);
    end loop;
    execute format('drop view packed.%I', base || '_rows');
    execute format('drop function packed.%I(int)', base || '_guess');
    execute format('drop table %s, %s', s.rows, s.packed);
end
$$;

create or replace function pgpulse.drop_storage(source regclass) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
#variable_conflict use_column
declare
    s pgpulse.storage := case
        when not pgpulse.is_hypertable(source) then pgpulse.stored(source, 'drop storage of')
    end;
    base text := (select relname from pg_class where oid = s.packed);
    schema_name text := (select relnamespace::regnamespace::text from pg_class where oid = s.source);
    table_name text := (select relname from pg_class where oid = s.source);
    said text := obj_description(s.source, 'pg_class');
    views text[];
    pieces text[];
    piece text;
    columns text;
    -- Packed rows that are still to be copied, as they may repeat unique keys.
    waiting bigint;
    n bigint;
begin
    if pgpulse.is_hypertable(source) then
        perform pgpulse.drop_hypertable(source);
        return;
    end if;
    perform pgpulse.lock_storage(s.rows, true);
    raise notice 'Copies all rows of "%" into a plain table, in one transaction: writers wait until it ends', s.source;
    perform pgpulse.lock_rollup(r.rollup, true) from pgpulse.rollups r where r.source = s.source;
    perform pgpulse.hold_views(s.source);
    execute format('lock table %s in access exclusive mode', s.source);
    execute format('lock table %s in access exclusive mode', s.rows);
    views := array(select pgpulse.views_over(s.source));
    pieces := array(select pgpulse.furniture(s.rows, format('%I.%I', schema_name, table_name)));
    execute format(
        'create table rows.%I (
            like %s including comments including compression including constraints including defaults
                including generated including identity including statistics including storage
        )',
        base || '_plain', s.rows
    );
    select string_agg(quote_ident(attname), ', ') into columns
    from pg_attribute
    where attrelid = s.rows and attnum > 0 and not attisdropped and attgenerated = '';
    if exists (select from pg_index where indrelid = s.rows and indisunique) then
        execute format('select sum(chunk$rows) from %s', s.packed) into waiting;
    end if;
    execute format(
        'insert into rows.%1$I (%2$s) overriding system value select %2$s from %3$s',
        base || '_plain', columns, case when waiting > 0 then s.rows else s.source end
    );
    perform pgpulse.take_sequences(s.rows, format('rows.%I', base || '_plain')::regclass);
    execute format('alter view %s rename to %I', s.source, base || '_was_stored');
    execute format('alter table rows.%I rename to %I', base, base || '_was_stored');
    execute format('alter table rows.%I rename to %I', base || '_plain', table_name);
    execute format('alter table rows.%I set schema %s', table_name, schema_name);
    source := format('%s.%I', schema_name, table_name)::regclass;
    for piece in
        select format('alter sequence %s owned by %s.%I', q.oid::regclass, source, a.attname)
        from pg_attribute a
        join pg_attrdef f on f.adrelid = a.attrelid and f.adnum = a.attnum
        join pg_depend d
            on d.classid = 'pg_attrdef'::regclass and d.objid = f.oid and d.refclassid = 'pg_class'::regclass
        join pg_class q on q.oid = d.refobjid and q.relkind = 'S'
        where a.attrelid = source
            and q.relname = table_name || '_' || a.attname || '_seq'
            and q.relnamespace::regnamespace::text = schema_name
    loop
        execute piece;
    end loop;
    execute format('comment on table %s is %L', source, said);
    if (select relowner from pg_class where oid = s.rows) <> current_user::regrole then
        execute format('alter table %s owner to %s', source,
            (select relowner::regrole from pg_class where oid = s.rows));
    end if;
    foreach piece in array views loop
        execute piece;
    end loop;
    update pgpulse.rollups r set source = drop_storage.source where r.source = s.source;
    update pgpulse.sinks k set source = drop_storage.source where k.source = s.source;
    delete from pgpulse.storage d where d.source = s.source;
    -- The unique keys come first, then what is packed, then triggers.
    foreach piece in array pieces || ''::text loop
        if waiting > 0 and piece !~ '^(alter table .* (PRIMARY KEY|UNIQUE) |create unique )' then
            execute format(
                'insert into %1$s (%2$s) overriding system value select %2$s from packed.%3$I on conflict do nothing',
                source, columns, base || '_rows'
            );
            get diagnostics n = row_count;
            if n < waiting then
                raise notice 'Left out % packed rows of "%": their unique keys repeat others', waiting - n, source;
            end if;
            waiting := 0;
        end if;
        execute piece;
    end loop;
    perform pgpulse.drop_parts(s);
    perform pgpulse.remake_rollup(r.rollup) from pgpulse.rollups r where r.source = drop_storage.source;
end
$$;

comment on function pgpulse.drop_storage is
    'Makes one plain table of all rows again, packed ones too; in one go: for large tables, at a quiet time. '
    'Where packed rows repeat a unique key, one of them stays: that which is not packed.';

revoke execute on function pgpulse.drop_storage from public;

-- --- packing -------------------------------------------------------------------------------------

create or replace function pgpulse.pack_from(name regclass, from_table regclass) returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
declare
    s pgpulse.storage := case
        when not pgpulse.is_hypertable(name) then pgpulse.stored(name, 'pack rows into')
    end;
    r pgpulse.rollups;
    missing text;
    history text;
    written text;
begin
    -- Nobody puts something else under that name meanwhile.
    execute format('lock table %s in access share mode', from_table);
    -- It works with its owner's rights, so whoever calls it needs own ones, and what it reads is a
    -- plain table: a view, a policy or a foreign type would bring the caller's code along.
    if not has_table_privilege(session_user, from_table, 'select')
        or not has_table_privilege(session_user, pgpulse.rows_of(name), 'insert') then
        raise exception 'Cannot pack "%" into "%": role "%" may not read the one and write the other',
            from_table, name, session_user
            using errcode = 'insufficient_privilege', hint = 'As the owner: grant select on the one, insert on the other';
    end if;
    if not exists (
        select from pg_class
        where oid = from_table and relkind = 'r' and not relrowsecurity and not relhassubclass
    ) then
        raise exception 'Cannot pack "%" into "%": it is no plain table', from_table, name
            using hint = 'create temp table t as select ... makes one of it';
    end if;
    if s.source is null then
        return pgpulse.fill_hypertable(name, from_table);
    end if;
    select string_agg(c.name || ' ' || c.type, ', ') into missing
    from pgpulse.packed_columns(s) c
    where c.family <> 'tx'
        and not exists (
            select
            from pg_attribute a
            where a.attrelid = from_table
                and quote_ident(a.attname) = c.name
                and regexp_replace(c.type, ' collate .*', '') = format_type(a.atttypid, a.atttypmod)
        );
    if missing is not null then
        raise exception 'Cannot pack "%" into "%": it lacks %', from_table, s.source, missing
            using hint = format('create temp table t (like %s)', s.source);
    end if;
    perform pgpulse.lock_storage(s.rows, true);
    s := pgpulse.stored(name, 'pack rows into');
    -- What is young or has no believable time becomes rows, as if inserted; where there is a sink, all
    -- does, as it finds by transaction what it has not sent. That is packed when it has.
    history := case
        when exists (select from pgpulse.sinks k where k.source = s.source) then 'false'
        else format(
            '%1$I >= ''1970-01-01 00:00:00+00'' and %1$I < %2$L',
            s.time_column, pgpulse.chunk_of(s, now() - coalesce(s.pack_after, '7 days'))
        )
    end;
    select string_agg(c.name, ', ') into written
    from pgpulse.packed_columns(s) c
    where c.writable and c.family <> 'tx';
    execute format(
        'insert into %1$s (%2$s) select %2$s from %3$s where (%4$s) is not true',
        s.rows, written, from_table, history
    );
    history := format('(select * from %s where %s)', from_table, history);
    for r in select * from pgpulse.rollups known where known.source = s.source order by known.rollup loop
        perform pgpulse.lock_rollup(r.rollup, true);
        select * into r from pgpulse.rollups known where known.rollup = r.rollup;
        perform pgpulse.add_rows(r, pgpulse.rows_query(r, history || ' as fresh', '0::bigint'));
    end loop;
    return pgpulse.put_packed(s, history, false);
end
$$;

comment on function pgpulse.pack_from is
    'Packs the rows of another table, of the same columns, straight into a stored one: history comes in '
    'at full speed, and into its rollups. Give it some days at a time, at most a few million rows. The number '
    'of rows packed: none where the table has a sink, which has to send them first.';

revoke execute on function pgpulse.pack_from from public;

create or replace function pgpulse.unpack(
    name regclass,
    "from" timestamptz,
    "to" timestamptz,
    hold interval default '1 day'
) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
declare
    s pgpulse.storage := case when not pgpulse.is_hypertable(name) then pgpulse.stored(name, 'unpack') end;
    view text := (select format('packed.%I', relname || '_rows') from pg_class where oid = s.packed);
    written text;
    "values" text;
    at timestamptz;
    unpacked bigint := 0;
    repeated bigint := 0;
    n bigint;
begin
    perform pgpulse.silence_rollups(true);
    if pgpulse.is_hypertable(name) then
        return pgpulse.unpack_hypertable(name, "from", "to", hold);
    end if;
    perform pgpulse.lock_storage(s.rows, true);
    select
        string_agg(c.name, ', '),
        string_agg(case when c.family = 'tx' then '0' else c.name end, ', ')
    into written, "values"
    from pgpulse.packed_columns(s) c
    join pg_attribute a on a.attrelid = s.rows and quote_ident(a.attname) = c.name and a.attgenerated = '';
    for at in execute format(
        'select distinct chunk$at from %s where chunk$at > $1 and chunk$at < $2 order by 1', s.packed
    ) using "from" - pgpulse.chunk(s), greatest("to", "from" + interval '1 microsecond')
    loop
        perform pgpulse.make_partition(s, day)
        from generate_series(at, at + pgpulse.chunk(s) - interval '1 microsecond', '1 day') day;
        -- Unique keys do not see packed rows, so these may repeat them.
        execute format(
            'insert into %s (%s) overriding system value select %s from %s where chunk$at = $1 on conflict do nothing',
            s.rows, written, "values", view
        ) using at;
        get diagnostics n = row_count;
        unpacked := unpacked + n;
        execute format(
            'with gone as (delete from %s where chunk$at = $1 returning chunk$rows)
            select sum(chunk$rows) - $2 from gone',
            s.packed
        ) into n using at, n;
        repeated := repeated + n;
    end loop;
    if repeated > 0 then
        raise notice 'Left out % packed rows of "%": their unique keys repeat others', repeated, s.source;
    end if;
    update pgpulse.storage t set hold_until = greatest(hold_until, now() + hold) where t.source = s.source;
    perform pgpulse.silence_rollups(false);
    return unpacked;
end
$$;

comment on function pgpulse.unpack is
    'Brings packed history back as rows, to be corrected; whole periods, and for so long as hold says '
    'nothing of the table is packed. Rollups follow what is changed then.';

revoke execute on function pgpulse.unpack from public;

create or replace function pgpulse.recent_from(ago interval) returns timestamptz
language sql
immutable
parallel safe
set search_path = pg_catalog, pg_temp
as $$
    select now() - ago
$$;

comment on function pgpulse.recent_from is
    'A lie to the planner: now() as it is when a query is planned. Of use in pgpulse.recent only.';

create or replace function pgpulse.recent(at timestamptz, ago interval) returns boolean
language sql
stable
parallel safe
as $$
    select at > now() - ago and at > pgpulse.recent_from(ago)
$$;

comment on function pgpulse.recent is
    'at > now() - ago, said so that the planner leaves packed history out: where pgpulse.recent("timestamp", '
    '''1 hour''). now() alone is no constant, and has all of history unpacked.';

-- --- upkeep --------------------------------------------------------------------------------------

-- Moves one piece of old rows into the packed table. null: there is nothing to pack now.
create or replace function pgpulse.pack_step(s pgpulse.storage) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set lock_timeout = '100ms'
as $$
declare
    base text := (select relname from pg_class where oid = s.packed);
    closed timestamptz := pgpulse.chunk_of(s, now() - s.pack_after);
    settled text := pgpulse.settled(s, packing => true);
    series text := pgpulse.series_sql(s);
    oldest timestamptz;
    upto timestamptz;
    period text;
    rows bigint;
    slices bigint;
    which bigint;
begin
    perform pgpulse.silence_rollups(true);
    if s.pack_after is null or s.hold_until > now() then
        return null;
    end if;
    execute format(
        'select min(%1$I) from %2$s where %1$I >= ''1970-01-01 00:00:00+00'' and %1$I < %3$L and %4$s',
        s.time_column, s.rows, closed, settled
    ) into oldest;
    if oldest is null then
        return null;
    end if;
    oldest := pgpulse.chunk_of(s, oldest);
    -- In a step of its own, so that what reads the view waits for no more than that.
    if pgpulse.reach(s, oldest, oldest + pgpulse.chunk(s)) then
        return format('the view reaches from %s on', oldest::date);
    end if;
    -- All there is up to where the view reaches, if that is not much; or a piece of one period.
    upto := least(
        closed,
        s.packed_to,
        date_bin(pgpulse.chunk(s) * 64, oldest, '1970-01-01 00:00:00+00') + pgpulse.chunk(s) * 64
    );
    loop
        period := format('%1$I >= %2$L and %1$I < %3$L and %4$s', s.time_column, oldest, upto, settled);
        execute format('select count(*) from (select from %s where %s limit 300001) as rows', s.rows, period) into rows;
        exit when rows <= 300000 or upto = oldest + pgpulse.chunk(s);
        upto := oldest + pgpulse.chunk(s);
    end loop;
    slices := 1;
    if rows > 300000 and s.keys <> '{}' then
        execute format('select count(*), min(%s) from %s where %s', series, s.rows, period) into rows, which;
        slices := 1 + rows / 300000;
        which := abs(which % slices);
    end if;
    execute format('create temp table pgpulse_moved (like %s) on commit drop', s.rows);
    execute format(
        $q$with moved as (delete from %1$s where %2$s%3$s returning *)
insert into pg_temp.pgpulse_moved (%4$s) select %4$s from moved$q$,
        s.rows,
        period,
        case when slices > 1 then format(' and abs(%s %% %s) = %s', series, slices, which) end,
        (select string_agg(c.name, ', ') from pgpulse.packed_columns(s) c)
    );
    rows := pgpulse.put_packed(s, 'pg_temp.pgpulse_moved', true);
    drop table pg_temp.pgpulse_moved;
    return format('%s rows from %s on', rows, oldest::date);
end
$$;

-- Makes the partition for rows that the default one took in. null: there is nothing to do.
create or replace function pgpulse.default_step(s pgpulse.storage) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
declare
    first timestamptz;
begin
    -- What is old is packed from there; what is absurd stays.
    execute format(
        'select min(%1$I) from %2$s where %1$I >= %3$L and %1$I < %4$L',
        s.time_column,
        (select partdefid::regclass from pg_partitioned_table where partrelid = s.rows),
        coalesce(pgpulse.chunk_of(s, now() - s.pack_after), '1970-01-01 00:00:00+00'),
        now() + interval '1 year'
    ) into first;
    return pgpulse.make_partition(s, first);
end
$$;

-- Drops what packing has emptied, when every transaction has ended that began before and could want
-- to read it: those are told by the locks that all hold on themselves.
create or replace function pgpulse.drain_step(s pgpulse.storage) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set lock_timeout = '100ms'
as $$
declare
    closed timestamptz := pgpulse.chunk_of(s, now() - s.pack_after);
    part regclass;
    empty boolean;
    emptied regclass[] := '{}';
    dropped text[] := '{}';
begin
    if s.draining is null then
        for part in
            select b.part from pgpulse.bounds(s.rows) b
            where b."to" <= closed and (s.hold_until > now()) is not true
        loop
            execute format('select not exists (select from %s)', part) into empty;
            if empty then
                emptied := emptied || part;
            end if;
        end loop;
        if emptied <> '{}' then
            update pgpulse.storage t
            set draining = emptied,
                draining_for = array(
                    select l.virtualxid
                    from pg_locks l
                    join pg_stat_activity a on a.pid = l.pid
                    where l.locktype = 'virtualxid'
                        and l.pid <> pg_backend_pid()
                        and a.datname = current_database()
                )
            where t.source = s.source;
        end if;
        return null;
    end if;
    if exists (select from pg_locks where locktype = 'virtualxid' and virtualxid = any (s.draining_for)) then
        return null;
    end if;
    update pgpulse.storage t set draining = null, draining_for = null where t.source = s.source;
    foreach part in array s.draining loop
        continue when not exists (select from pg_class where oid = part);
        execute format('lock table %s in access exclusive mode', part);
        execute format('select not exists (select from %s)', part) into empty;
        continue when not empty;
        dropped := dropped || part::text;
        execute format('drop table %s', part);
    end loop;
    return nullif(array_to_string(dropped, ', '), '');
end
$$;

-- Retention. null: nothing is too old, or not rolled up or sent yet.
create or replace function pgpulse.keep_step(s pgpulse.storage) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set lock_timeout = '100ms'
as $$
declare
    -- Whole days, as rollups know of days that they are kept without rows. Rows that were there before a
    -- sink are sent in order of time.
    upto timestamptz := date_bin(
        '1 day',
        least(now() - s.keep, (
            select min(k.sent_time)
            from pgpulse.sinks k
            where k.source = s.source and k.after_tx is null and k.upto_tx is not null
        )),
        '2000-01-01 00:00:00+00'
    );
    settled text := pgpulse.settled(s, packing => true);
    part regclass;
    waits boolean;
    dropped bigint;
begin
    if exists (select from pgpulse.rollups r where r.source = s.source and r.since_rows < upto) then
        perform pgpulse.rows_retired(s.source, upto);
    end if;
    perform pgpulse.silence_rollups(true);
    for part in select b.part from pgpulse.bounds(s.rows) b where b."to" <= upto order by b."to" loop
        execute format('select exists (select from %s where not %s)', part, settled) into waits;
        continue when waits;
        -- Something may have come meanwhile.
        execute format('lock table %s in access exclusive mode', part);
        execute format('select exists (select from %s where not %s)', part, settled) into waits;
        continue when waits;
        execute format('drop table %s', part);
        return part::text;
    end loop;
    execute format(
        'with old as (
            select ctid from %1$s where chunk$at <= %2$L order by chunk$at limit 2000
        )
        delete from %1$s where ctid = any (array(select ctid from old))',
        s.packed, upto - pgpulse.chunk(s)
    );
    get diagnostics dropped = row_count;
    if dropped > 0 then
        return format('%s packed series and periods', dropped);
    end if;
    -- What lies in the default partition, and in one that reaches far back.
    for part in
        select partdefid from pg_partitioned_table where partrelid = s.rows
        union all
        select b.part from pgpulse.bounds(s.rows) b where b."from" < upto - s.period
    loop
        execute format(
            'delete from %1$s where ctid = any (array(
                select ctid from %1$s where %2$I < %3$L and %4$s limit 100000
            ))',
            part, s.time_column, upto, settled
        );
        get diagnostics dropped = row_count;
        if dropped > 0 then
            return format('%s rows of %s', dropped, part);
        end if;
    end loop;
    return null;
end
$$;

-- Has the view read more columns of the packed table, where readers kept pack_step from doing so. With
-- nothing else to do, it may wait longer for them; not until a deadlock would be looked for.
create or replace function pgpulse.widen_view(s pgpulse.storage, used text[]) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '900ms'
as $$
begin
    s.parts := used;
    perform pgpulse.make_rows_view(s);
    update pgpulse.storage t set parts = used where t.source = s.source;
    return 'the view reads more columns';
exception when lock_not_available then
    return null;
end
$$;

create or replace function pgpulse.upkeep_storage()
returns table ("table" regclass, action text, detail text, more boolean, fault text)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
declare
    s pgpulse.storage;
    known regclass;
    step text;
    at timestamptz;
    wanted text;
begin
    -- Whatever was done took locks that others wait for, or time, so it is the last thing done in this
    -- transaction; and by chance each table has its turn.
    for known in select k.source from pgpulse.storage k order by random() loop
        -- Somebody else is at work on it; held to the end of the transaction, as poolers need it.
        continue when not pgpulse.lock_storage(
            (select k.rows from pgpulse.storage k where k.source = known), false
        );
        select * into s from pgpulse.storage k where k.source = known;
        continue when s.source is null;
        "table" := s.source;
        more := false;
        fault := null;
        foreach step in array array['make', 'rights', 'drop old', 'drop empty', 'pack', 'default'] loop
            action := step;
            begin
                case step
                    when 'make' then
                        detail := null;
                        for at in select * from generate_series(now(), now() + s.ahead + s.period, s.period) loop
                            detail := concat_ws('; ', detail, pgpulse.make_partition(s, least(at, now() + s.ahead)));
                        end loop;
                        detail := nullif(detail, '');
                    when 'rights' then
                        perform pgpulse.share_rights(s);
                        detail := null;
                    when 'drop old' then detail := case when s.keep is not null then pgpulse.keep_step(s) end;
                    when 'drop empty' then detail := pgpulse.drain_step(s);
                    when 'pack' then detail := pgpulse.pack_step(s);
                    when 'default' then detail := pgpulse.default_step(s);
                end case;
            exception
                -- Who must wait for others waits until the next call.
                when lock_not_available then
                    get stacked diagnostics wanted = pg_exception_detail;
                    detail := case when step = 'pack' and wanted <> '' then pgpulse.widen_view(s, wanted::text[]) end;
                when others then
                    fault := format('Cannot %s for "%s": %s', step, s.source, sqlerrm);
                    detail := null;
            end;
            perform pgpulse.silence_rollups(false);
            exit when fault is not null;
            exit when detail is not null;
        end loop;
        if fault is not null then
            detail := null;
            return next;
        end if;
        update pgpulse.storage k
        set fault = upkeep_storage.fault
        where k.source = s.source and k.fault is distinct from upkeep_storage.fault;
        if detail is not null then
            more := true;
            return next;
            return;
        end if;
    end loop;
end
$$;

comment on function pgpulse.upkeep_storage is
    'One bounded step of what stored tables need: partitions ahead, retention, or a piece of packing or '
    'moving. Call it each minute, and again at once while more is true; safe to run twice at once. It '
    'waits for nobody longer than a tenth of a second; for readers that never pause, a second.';

revoke execute on function pgpulse.upkeep_storage from public;

-- Views and functions of each follow a new version of this file. uninstall.sql leaves tables stored as
-- they are, with their settings in a comment: found here, they are kept up again.
do $do$
declare
    s record;
begin
    insert into pgpulse.storage
    select r.*
    from pg_class c, jsonb_populate_record(null::pgpulse.storage, obj_description(c.oid, 'pg_class')::jsonb) r
    where c.relnamespace = 'packed'::regnamespace
        and c.relkind = 'r'
        and obj_description(c.oid, 'pg_class') like '{%'
        and to_regclass(obj_description(c.oid, 'pg_class')::jsonb ->> 'rows') is not null;
    for s in select k.* from pgpulse.storage k where to_regclass(k.source::text) is not null loop
        execute format('comment on table %s is %L', s.packed, format('Packed rows of %s', s.source));
        perform pgpulse.remake_storage(s.source);
    end loop;
end
$do$;
