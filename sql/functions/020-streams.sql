-- Live streams: a view in schema live, and one call.

create or replace function pgpulse.tables_behind(relation regclass) returns setof regclass
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with recursive behind (id) as (
        select relation::oid
        union
        select d.refobjid
        from behind b
        join pg_rewrite r on r.ev_class = b.id
        join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = r.oid
        where d.refclassid = 'pg_class'::regclass
            and d.refobjid <> b.id
    )
    select c.oid::regclass
    from behind b
    join pg_class c on c.oid = b.id
    where c.relkind in ('r', 'p', 'f')
    order by c.oid
$$;

comment on function pgpulse.tables_behind(regclass) is
    'The tables that a view reads, through other views too; a table gives itself.';

create or replace function pgpulse.view_columns(relation regclass)
returns table (name text, part text, type text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        a.attname::text,
        case
            when a.atttypid = 'timestamptz'::regtype
                and a.attnum = min(a.attnum) filter (where a.atttypid = 'timestamptz'::regtype) over ()
                then 'time'
            when t.typcategory in ('S', 'E') or a.atttypid = 'uuid'::regtype then 'label'
            when a.atttypid in (
                'float8'::regtype, 'float4'::regtype, 'numeric'::regtype, 'int8'::regtype,
                'int4'::regtype, 'int2'::regtype, 'bool'::regtype
            ) then 'field'
        end,
        format_type(a.atttypid, null)
    from pg_attribute a
    join pg_type t on t.oid = a.atttypid
    where a.attrelid = relation
        and a.attnum > 0
        and not a.attisdropped
    order by a.attnum
$$;

comment on function pgpulse.view_columns(regclass) is
    'Columns of a stream''s view and their part: time, label, field, or null where it has none.';

create or replace function pgpulse.column_list(relation regclass) returns text
language sql
stable
as $$
    select string_agg(format('%s %s', name, type), ', ' order by name)
    from pgpulse.view_columns(relation)
$$;

create or replace function pgpulse.add_stream(
    stream text,
    history interval default null,
    step interval default null,
    rows int default 300,
    beat interval default '200 milliseconds',
    split text default null,
    stream_id text default 'pgpulse',
    slow interval default null
) returns void
language plpgsql
as $$
declare
    view regclass := to_regclass(format('live.%I', stream));
    now_columns text;
    old_columns text;
    odd text;
    watched regclass;
begin
    if view is null then
        raise exception 'Cannot add stream "%": there is no view live.%', stream, quote_ident(stream)
            using hint = 'Create the view first, then call pgpulse.add_stream again';
    end if;
    if not exists (select from pgpulse.view_columns(view) where part = 'time')
        or not exists (select from pgpulse.view_columns(view) where part = 'field') then
        raise exception
            'Cannot add stream "%": its view needs a timestamptz column and a numeric column', stream
            using hint = 'It has ' || coalesce(pgpulse.column_list(view), 'no columns')
                || '; cast them in the view';
    end if;
    select string_agg(format('%s (%s)', name, type), ', ') into odd
    from pgpulse.view_columns(view)
    where part is null;
    if odd is not null then
        raise exception 'Cannot add stream "%": it cannot show the column %', stream, odd
            using hint = 'Cast it to text for a label or to a number for a field, or leave it out';
    end if;
    if split is not null and not exists (
        select from pgpulse.view_columns(view) where name = split and part = 'label'
    ) then
        raise exception 'Cannot split stream "%": its view has no text column "%"', stream, split
            using hint = 'It has ' || pgpulse.column_list(view);
    end if;
    -- Grafana allows 160 characters: stream/<stream_id>/<stream>/<up to 80 for the value>.
    if split is not null and length(stream) + length(stream_id) > 71 then
        raise exception 'Cannot split stream "%": its name and "%" are too long together', stream, stream_id
            using hint = 'Both may have 71 characters, so that the channels of all values have at most 160';
    end if;
    if stream !~ '^[A-Za-z0-9_-]{1,60}$' or stream_id !~ '^[A-Za-z0-9_-]{1,60}$' then
        raise exception 'Cannot add stream "%" with stream_id "%": Grafana does not allow such names',
            stream, stream_id
            using hint = 'Use A-Z a-z 0-9 _ -, at most 60 of them';
    end if;
    if beat < interval '20 milliseconds' then
        raise exception 'Cannot add stream "%" with a beat of %: nobody sees that', stream, beat
            using hint = 'Give 20 milliseconds or more';
    end if;
    if slow is not null and (split is null or slow < beat) then
        raise exception 'Cannot add stream "%" with a slow beat of %', stream, slow
            using hint = 'It is for channels of a split stream that nobody watches, and no shorter than '
                'their beat';
    end if;
    if step is not null and history is null then
        raise exception 'Cannot add stream "%" with a step but no history', stream
            using hint = 'history says how far back the rows at every step reach';
    end if;
    step := case when history is not null then coalesce(step, history * 5 / (rows * 3)) end;
    if step <= interval '0' or history <= interval '0' or extract(year from step) <> 0
        or extract(month from step) <> 0 then
        raise exception 'Cannot add stream "%" with a history of % in steps of %', stream, history, step
            using hint = 'Both are longer than nothing, and a step has no months: write 30 days';
    end if;
    if rows not between 2 and 5000 or rows % 2 <> 0 then
        raise exception 'Cannot add stream "%" with % rows: give an even number from 2 to 5000', stream, rows
            using hint = 'Panels set maxDataPoints to half of it';
    end if;
    if history / extract(epoch from step) > interval '1 second' * (rows - 1) then
        raise exception 'Cannot add stream "%": % in steps of % does not fit into a window of % rows',
            stream, history, step, rows
            using hint = 'Give a longer step or more rows; what is left over holds the newest rows';
    end if;
    now_columns := pgpulse.column_list(view);
    select s.columns into old_columns from pgpulse.streams s where s.stream = add_stream.stream;
    if old_columns <> now_columns then
        raise exception 'Cannot change the columns of stream "%" from (%) to (%)',
            stream, old_columns, now_columns
            using hint = 'Open panels break when a channel''s fields change: give the new view another '
                || 'name, or pgpulse.drop_stream it first and reload the panels';
    end if;
    -- One at a time: each looks which tables the streams of the others need watched.
    lock table pgpulse.streams in share row exclusive mode;
    insert into pgpulse.streams as s
        (stream, stream_id, rows, history, step, beat, split, slow, columns)
    values (
        stream,
        stream_id,
        rows,
        history,
        step,
        beat,
        split,
        slow,
        now_columns
    )
    on conflict on constraint streams_pkey do update
    set stream_id = excluded.stream_id,
        rows = excluded.rows,
        history = excluded.history,
        step = excluded.step,
        beat = excluded.beat,
        split = excluded.split,
        slow = excluded.slow;
    perform pgpulse.unwatch();
    -- Others are read on their beat: their writers need not say anything.
    for watched in select pgpulse.tables_behind(view) where beat < interval '1 second' loop
        begin
            perform pgpulse.watch(watched);
        exception when insufficient_privilege or wrong_object_type then
            raise notice 'Table % cannot be watched (%): stream "%" is read on its beat instead',
                watched, sqlerrm, stream;
        end;
    end loop;
    perform pg_notify('pgpulse', 'pgpulse.streams');
end
$$;

comment on function pgpulse.add_stream is
    'Makes the view live.<stream> a live stream, or changes one; a running relay picks it up. '
    'history and step add a coarse part before the newest rows: one row every step, back to history. '
    'rows: size of the window in distinct milliseconds, the coarse part included; panels set '
    'maxDataPoints to half of it. beat: shortest time between two pushes; from a second on writers send no '
    'hints. split: a text column with a channel for each of its values. slow: beat of those channels that '
    'nobody watches (pgpulse.watch_stream), where there are more than 50. stream_id: second part of the '
    'address.';

-- Takes the triggers off tables that no quick stream reads.
create or replace function pgpulse.unwatch() returns void
language plpgsql
as $$
declare
    watched regclass;
begin
    for watched in
        select t.tgrelid::regclass
        from pg_trigger t
        where t.tgname = 'pgpulse_hint'
            and t.tgparentid = 0
            and not exists (
                select
                from pgpulse.streams s,
                    pgpulse.tables_behind(to_regclass(format('live.%I', s.stream))) b
                where s.beat < interval '1 second' and b = t.tgrelid
            )
    loop
        begin
            execute format('drop trigger pgpulse_hint on %s', watched);
        exception when insufficient_privilege then
            raise notice 'The trigger pgpulse_hint on table % is left there: %', watched, sqlerrm;
        end;
    end loop;
end
$$;

create or replace function pgpulse.drop_stream(stream text) returns void
language plpgsql
as $$
begin
    -- One at a time: each looks which tables the streams of the others need watched.
    lock table pgpulse.streams in share row exclusive mode;
    delete from pgpulse.streams s where s.stream = drop_stream.stream;
    if not found then
        raise exception 'Cannot drop stream "%": there is none of that name', stream
            using hint = 'select stream from pgpulse.streams lists them';
    end if;
    perform pg_notify('pgpulse', 'pgpulse.streams');
    perform pgpulse.unwatch();
end
$$;

comment on function pgpulse.drop_stream is
    'Ends a stream; its view stays. Grafana keeps the channel''s last frame until it restarts.';

create or replace function pgpulse.channel(stream text, value text default null) returns text
language sql
immutable
parallel safe
set search_path = pg_catalog, pg_temp
as $$
    select case
        when value is null then stream
        when value ~ '^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,79}$' then stream || '/' || value
        else stream || '/' || case
            when length(encoded) <= 80 then encoded
            else left(encoded, 47) || '=' || md5(value)
        end
    end
    from (
        select coalesce(string_agg(
            case
                when c ~ '[A-Za-z0-9_-]' or (c = '.' and i > 1) then c
                else regexp_replace(upper(encode(convert_to(c, 'UTF8'), 'hex')), '(..)', '=\1', 'g')
            end,
            '' order by i
        ), '=') as encoded
        from regexp_split_to_table(nullif(value, ''), '') with ordinality as chars (c, i)
    ) as encoding
$$;

comment on function pgpulse.channel is
    'Name of the channel of one value of a split stream. Grafana allows A-Z a-z 0-9 _ - . / = only: '
    'every other byte is written =XX, long names end in an MD5, so no two values share a channel.';

-- What a query costs by the planner's estimate; EXPLAIN is why the callers are volatile.
create or replace function pgpulse.estimate(query text) returns float8
language plpgsql
as $$
declare
    plan json;
begin
    execute 'explain (format json) ' || query into plan;
    return plan -> 0 -> 'Plan' ->> 'Total Cost';
end
$$;

comment on function pgpulse.estimate(text) is 'Total cost of a query as EXPLAIN estimates it.';

create or replace function pgpulse.split_query(stream text) returns text
language plpgsql
as $$
declare
    s pgpulse.streams;
    t text;
    first text;
begin
    select * into s from pgpulse.streams known where known.stream = split_query.stream;
    select name into t
    from pgpulse.view_columns(to_regclass(format('live.%I', stream)))
    where part = 'time';
    first := format(
        'select v.%1$I as value from live.%2$I v where v.%1$I is not null order by v.%1$I limit 1',
        s.split, stream
    );
    -- With an index on (split, time): from each value to the next one, whatever the number of rows.
    if pgpulse.estimate(first) < 100 then
        return format(
            $q$with recursive found (value) as (
    (%4$s)
    union all
    select (
        select v.%1$I
        from live.%2$I v
        where v.%1$I > found.value
        order by v.%1$I
        limit 1
    )
    from found
    where found.value is not null
)
select value
from found
where exists (
    select
    from live.%2$I v
    where v.%1$I = found.value
        and v.%3$I > now() - %5$L::interval
    -- looked up for each value: as a join it would read all those rows
    offset 0
)
order by value$q$,
            s.split, stream, t, first, coalesce(s.history, interval '1 day')
        );
    end if;
    return format(
        $q$select distinct v.%1$I as value
from live.%2$I v
where v.%3$I > now() - %4$L::interval
    and v.%1$I is not null
order by value$q$,
        s.split, stream, t, coalesce(s.history, interval '1 day')
    );
end
$$;

comment on function pgpulse.split_query(text) is
    'Query for the values that split a stream: those with a row within its history, or a day. An index '
    'on the split column and the time makes it quick.';

create or replace function pgpulse.coarse_rows(s pgpulse.streams) returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    view regclass := to_regclass(format('live.%I', s.stream));
    parts text[] := regexp_match(pg_get_viewdef(view), '^ SELECT (.*)\n   FROM ([^\s,()]+)(?: \w+)?;$');
    columns jsonb;
begin
    -- {"shown": "stored"}, where all columns of the view are columns of one table, and it leaves
    -- out no row of it.
    select case when bool_and(pair is not null) then
        jsonb_object_agg(coalesce(pair[2], pair[1], ''), pair[1]) end
    into columns
    from unnest(string_to_array(parts[1], E',\n    ')) as item,
        regexp_match(item, '^(?:(?:"[^"]+"|\w+)\.)?("[^"]+"|\w+)(?: AS ("[^"]+"|\w+))?$') as pair;
    return (
        select format(
            E'select "time" as "$time", %s\nfrom rollup.%I\nwhere step = interval %L', list, r.rollup, steps.step
        )
        from pgpulse.rollups r
        cross join lateral (values
            (interval '1 minute', r.keep_1m), ('1 hour', r.keep_1h), ('1 day', r.keep_1d)
        ) as steps (step, keep)
        cross join lateral (
            select string_agg(format('%I as %I', coalesce(k.key, m.measure || '_last'), c.name), ', ') as list
            from pgpulse.view_columns(view) c
            left join unnest(r.keys, r.key_expressions) as k (key, stored)
                on c.part = 'label' and k.stored = columns ->> quote_ident(c.name)
            left join unnest(r.measures, r.measure_expressions) as m (measure, stored)
                on c.part = 'field' and m.stored = columns ->> quote_ident(c.name)
            where c.part <> 'time'
            -- with a key that is no label, series would be mixed up
            having bool_and(coalesce(k.key, m.measure) is not null) and count(k.key) = cardinality(r.keys)
        ) as mapped
        where r.source = to_regclass(parts[2])
            and columns ->> (
                select quote_ident(c.name) from pgpulse.view_columns(view) c where c.part = 'time'
            ) = quote_ident(r.time_column)
            and extract(epoch from s.step) % extract(epoch from steps.step) = 0
            and (steps.keep is null or steps.keep > s.history)
        order by steps.step desc, r.rollup
        limit 1
    );
end
$$;

comment on function pgpulse.coarse_rows is
    'Query for the columns of a stream''s view as a rollup has them, by minute, hour or day; null where '
    'the view is more than a choice of columns of a table with a rollup by its labels.';

create or replace function pgpulse.stream_plans()
returns table (
    stream text,
    stream_id text,
    rows int,
    coarse_rows int,
    beat_ms float8,
    slow_ms float8,
    split text,
    labels text[],
    fields text[],
    tables text[],
    read_all text,
    read_tail text,
    read_values text,
    fault text
)
language plpgsql
as $$
#variable_conflict use_column
declare
    s pgpulse.streams;
    view regclass;
    t text;
    label_list text;
    output text;
    per_label text;
    own_part text;
    rolled_up text;
begin
    for s in select * from pgpulse.streams order by 1 loop
        view := to_regclass(format('live.%I', s.stream));
        stream := s.stream;
        stream_id := s.stream_id;
        rows := s.rows;
        coarse_rows := coalesce(ceil(extract(epoch from s.history) / extract(epoch from s.step)), 0);
        beat_ms := extract(epoch from s.beat) * 1000;
        slow_ms := extract(epoch from s.slow) * 1000;
        split := s.split;
        fault := case
            when view is null then 'its view is gone'
            when pgpulse.column_list(view) <> s.columns then format(
                'its columns changed from (%s) to (%s); give the changed view another name and add '
                    'that, or drop_stream and add_stream this one and reload the panels',
                s.columns, pgpulse.column_list(view)
            )
        end;
        if fault is null then
            select
                min(format('%I', name)) filter (where part = 'time'),
                coalesce(array_agg(name) filter (where part = 'label'), '{}'),
                array_agg(name) filter (where part = 'field'),
                string_agg(format('v.%I', name), ', ') filter (where part = 'label'),
                string_agg(format(
                    case
                        when type = 'boolean' then 'v.%I::int::float8'
                        when part = 'field' then 'v.%I::float8'
                        else 'v.%I::text'
                    end,
                    name
                ), ', ' order by part desc, name) filter (where part <> 'time')
            into t, labels, fields, label_list, output
            from pgpulse.view_columns(view);
            -- output lists labels before fields, each by name: the arrays follow the same order
            select array_agg(l order by l) into labels from unnest(labels) l;
            select array_agg(f order by f) into fields from unnest(fields) f;
            labels := coalesce(labels, '{}');
            tables := array(
                select n.nspname || '.' || c.relname
                from pgpulse.tables_behind(view) b
                join pg_class c on c.oid = b
                join pg_namespace n on n.oid = c.relnamespace
                where s.beat < interval '1 second'
            );
            own_part := case when s.split is null then '' else format('v.%I = part.value and', s.split) end;

            read_tail := format(
                $q$select (extract(epoch from v.%1$s) * 1000)::float8 as ms, %2$s
from live.%3$I v
where v.%1$s >= least(to_timestamp($2::float8 / 1000), now() - interval '2 seconds')
    and v.%1$s <= now() + interval '1 minute'%4$s
order by v.%1$s desc
limit $1$q$,
                t, output, s.stream,
                case when s.slow is not null then format(E'\n    and v.%I::text = any ($3::text[])', s.split) end
            );

            -- The newest rows, $1 of them for each channel.
            read_all := format(
                $q$select (extract(epoch from v.%1$s) * 1000)::float8 as ms, %2$s, true as fine
from (
    select v.*
    from live.%3$I v
    where %4$s v.%1$s <= now() + interval '1 minute'
    order by v.%1$s desc
    limit $1
) v$q$,
                t, output, s.stream, own_part
            );
            if s.history is not null then
                -- At each grid point the value that was the newest then: its row is no older than a step.
                -- A rollup has what was the newest just before. Where there is but one series, looking
                -- up each grid point in the index is as quick.
                per_label := case when label_list is null then '' else
                    format('distinct on (%s)', label_list) end;
                rolled_up := case when label_list is not null then pgpulse.coarse_rows(s) end;
                read_all := read_all || case when rolled_up is not null then format(
                    $q$
union all
select (extract(epoch from v."$at") * 1000)::float8, %2$s, false
from (
    select distinct on (%8$s "$at") date_bin(%5$L, v."$time", 'epoch') + %5$L::interval as "$at", v.*
    from (%1$s) v
    where %4$s v."$time" >= date_bin(%5$L, now(), 'epoch') - %6$L::interval
        and v."$time" < date_bin(%5$L, now(), 'epoch')
    order by %8$s "$at", v."$time" desc
) v$q$,
                    rolled_up, output, s.stream, own_part, s.step, s.history, null, label_list || ','
                ) else format(
                    $q$
union all
select (extract(epoch from grid.at) * 1000)::float8, %2$s, false
from generate_series(
    date_bin(%5$L, now(), 'epoch') - %6$L::interval + %5$L::interval,
    date_bin(%5$L, now(), 'epoch'),
    %5$L
) as grid (at)
cross join lateral (
    select %7$s v.*
    from live.%3$I v
    where %4$s v.%1$s > grid.at - %5$L::interval
        and v.%1$s <= grid.at
    order by %8$s v.%1$s desc
    %9$s
) v$q$,
                    t, output, s.stream, own_part, s.step, s.history,
                    per_label, label_list || ',', case when label_list is null then 'limit 1' end
                ) end;
            end if;
            read_values := case when s.split is not null then pgpulse.split_query(s.stream) end;
            if s.split is not null then
                read_all := format(
                    $q$select rows_of_part.*
from (
%1$s
) as part
cross join lateral (
%2$s
) as rows_of_part$q$,
                    case
                        when s.slow is null then read_values
                        else (
                            select format('select unnest($2::text[]::%s[]) as value', type)
                            from pgpulse.view_columns(view)
                            where name = s.split
                        )
                    end,
                    read_all
                );
            end if;
        else
            labels := '{}';
            fields := '{}';
            tables := '{}';
            read_all := null;
            read_tail := null;
            read_values := null;
        end if;
        return next;
    end loop;
end
$$;

comment on function pgpulse.stream_plans() is
    'How to read each stream. read_all ($1: rows) gives the whole window, read_tail ($1: rows, $2: '
    'milliseconds since 1970) what came since; columns: ms, labels and fields by name, and for '
    'read_all whether the row is one of the newest (fine) or of the coarse part. Where there is a slow '
    'beat both read only certain values of the split column (the last parameter, text[]), of which '
    'read_values gives all. Rows more than a minute in the future wait until their time has come.';

create or replace function pgpulse.split_values(stream text) returns setof text
language plpgsql
as $$
declare
    split boolean;
begin
    select s.split is not null into split from pgpulse.streams s where s.stream = split_values.stream;
    if split then
        return query execute format('select value::text from (%s) as found', pgpulse.split_query(stream));
    else
        return next null;
    end if;
exception when others then
    -- A view that is gone or fails has no channels; the relay says why.
    return;
end
$$;

comment on function pgpulse.split_values(text) is
    'Values of the column that splits the stream, one row each; one null for a stream that is whole.';

create or replace view pgpulse.channels as
select
    s.stream,
    value,
    pgpulse.channel(s.stream, value) as channel,
    'stream/' || s.stream_id || '/' || pgpulse.channel(s.stream, value) as address,
    concat_ws(' ', s.stream, value) as label,
    s.rows
from pgpulse.streams s
cross join lateral pgpulse.split_values(s.stream) as value;

comment on view pgpulse.channels is
    'Channels of every stream, for dashboard variables; address is what a panel subscribes to.';

create or replace function pgpulse.watch_stream(streams text[], value text) returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if value is null or length(value) > 255 or current_setting('transaction_read_only')::boolean then
        return false;
    end if;
    delete from pgpulse.watches where until < clock_timestamp() - interval '1 minute';
    insert into pgpulse.watches as w (stream, value, until)
    select s.stream, watch_stream.value, clock_timestamp() + interval '2 minutes'
    from pgpulse.streams s
    where s.stream = any (streams)
        and s.split is not null
        -- whoever reads may call this: where it is much, only values that are there
        and (
            (select count(*) from pgpulse.watches known where known.stream = s.stream) < 1000
            or watch_stream.value in (select pgpulse.split_values(s.stream))
        )
    order by s.stream
    on conflict on constraint watches_pkey do update set until = excluded.until
    where w.until < clock_timestamp() + interval '1 minute';
    return true;
end
$$;

comment on function pgpulse.watch_stream is
    'Says that somebody looks at the channels of a value of split streams: for two minutes they run at full '
    'beat. For a panel''s own query: select pgpulse.watch_stream(''{cpu,memory}'', ''$host'').';

revoke execute on function pgpulse.watch_stream from public;
