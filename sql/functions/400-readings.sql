-- Readings: what scripts/etl.ts takes out of MongoDB, or is sent, each exactly once; who has what in
-- hand; and what the sync does, to be seen live.

-- --- from a document to columns ------------------------------------------------------------------

-- Told stable, so that a function that calls it can become part of a query.
create or replace function pgpulse.unreadable(field text, reason text) returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception '% %', field, reason
        using errcode = 'invalid_parameter_value', column = field;
end
$$;

comment on function pgpulse.unreadable is
    'Refuses a document, from within public.transform_reading: its field, and what is wrong with that.';

-- The first of these fields that is there.
create or replace function pgpulse.field_of(payload jsonb, fields text[]) returns text
language sql
immutable
parallel safe
set search_path = pg_catalog, pg_temp
as $$
    select field
    from unnest(fields) with ordinality as list (field, i)
    where payload -> field <> 'null'
    order by i
    limit 1
$$;

-- Less common forms of a time: all that is no ISO 8601 with Z.
create or replace function pgpulse.odd_time(value jsonb, payload jsonb) returns timestamptz
language plpgsql
stable
parallel safe
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
declare
    said text := case jsonb_typeof(value)
        when 'object' then coalesce(value #>> '{$date,$numberLong}', value ->> '$date')
        else value #>> '{}'
    end;
begin
    if jsonb_typeof(value) = 'string' or value ? '$date' then
        if said ~ '^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.]\d+)?)? ?(Z|[+-]\d\d(:?\d\d)?)?)?$' then
            return said::timestamptz;
        elsif said ~ '^-?\d{1,15}$' and value ? '$date' then
            return to_timestamp(said::float8 / 1000);
        end if;
    elsif jsonb_typeof(value) = 'number' and abs(value::numeric) < 1e14 then
        -- Seconds of the next 3,000 years, or milliseconds since 1973.
        return to_timestamp(case when abs(value::numeric) < 1e11 then said::float8 else said::float8 / 1000 end);
    end if;
    return pgpulse.unreadable(
        pgpulse.field_of(payload, '{timestamp,time,ts,date,created_at,createdAt}'),
        'is no time like 2026-11-22T12:00:05Z, nor seconds or milliseconds since 1970'
    );
end
$$;

-- Less common forms of a number. What is none, as NaN, stays in the payload alone: it would spoil sums.
create or replace function pgpulse.odd_number(value jsonb, payload jsonb) returns float8
language plpgsql
immutable
parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    said text := case jsonb_typeof(value)
        when 'string' then value #>> '{}'
        else coalesce(value ->> '$numberDecimal', value ->> '$numberDouble')
    end;
begin
    if said ~ '^[+-]?(\d+[.]?\d*|[.]\d+)([eE][+-]?\d+)?$' then
        return said::float8;
    elsif jsonb_typeof(value) = 'object' and said in ('NaN', 'Infinity', '-Infinity') then
        return null;
    end if;
    return pgpulse.unreadable(pgpulse.field_of(payload, '{value,reading}'), 'is no number');
end
$$;

-- Text, a number as text, or the id of another document.
create or replace function pgpulse.label_of(value jsonb) returns text
language sql
immutable
parallel safe
as $$
    select case jsonb_typeof(value)
        when 'object' then value ->> '$oid'
        when 'array' then null
        else value #>> '{}'
    end
$$;

-- No search_path is pinned, so that it becomes part of the query that calls it. offset 0: worked out once.
create or replace function pgpulse.reading_columns(source text, source_id text, payload jsonb)
returns table ("time" timestamptz, device text, metric text, value float8, unit text)
language sql
stable
parallel safe
as $$
    select
        case
            when jsonb_typeof(payload) <> 'object' then
                pgpulse.unreadable('payload', 'is no JSON object')::timestamptz
            when c.at between '1970-01-01 00:00:00+00' and now() + interval '1 day' then c.at
            when c.at is not null then pgpulse.unreadable(
                pgpulse.field_of(payload, '{timestamp,time,ts,date,created_at,createdAt}'),
                case when c.at > now() then 'is more than a day ahead' else 'is before 1970' end
            )::timestamptz
            -- When MongoDB's driver made the id.
            when c.seconds < extract(epoch from now()) + 86400 then to_timestamp(c.seconds)
        end,
        pgpulse.label_of(c.device),
        pgpulse.label_of(c.metric),
        c.value,
        pgpulse.label_of(c.unit)
    from (
        select
            case
                when f.at is null then null
                when (f.at ->> '$date') like '____-__-__T%Z' then (f.at ->> '$date')::timestamptz
                when (f.at #>> '{}') like '____-__-__T%Z' then (f.at #>> '{}')::timestamptz
                else pgpulse.odd_time(f.at, payload)
            end as at,
            case when f.at is null then
                ('x' || substr(payload #>> '{_id,$oid}', 1, 8))::bit(32)::bigint
            end as seconds,
            f.device,
            f.metric,
            case jsonb_typeof(f.value)
                when 'number' then f.value::float8
                else case when f.value is not null then pgpulse.odd_number(f.value, payload) end
            end as value,
            f.unit
        from (
            select
                coalesce(
                    nullif(payload -> 'timestamp', 'null'),
                    nullif(payload -> 'time', 'null'),
                    nullif(payload -> 'ts', 'null'),
                    nullif(payload -> 'date', 'null'),
                    nullif(payload -> 'created_at', 'null'),
                    nullif(payload -> 'createdAt', 'null')
                ) as at,
                coalesce(
                    nullif(payload -> 'device', 'null'),
                    nullif(payload -> 'device_id', 'null'),
                    nullif(payload -> 'deviceId', 'null'),
                    nullif(payload -> 'sensor', 'null'),
                    nullif(payload -> 'sensor_id', 'null'),
                    nullif(payload -> 'sensorId', 'null')
                ) as device,
                coalesce(
                    nullif(payload -> 'metric', 'null'),
                    nullif(payload -> 'type', 'null'),
                    nullif(payload -> 'name', 'null'),
                    nullif(payload -> 'kind', 'null')
                ) as metric,
                coalesce(
                    nullif(payload -> 'value', 'null'), nullif(payload -> 'reading', 'null')
                ) as value,
                payload -> 'unit' as unit
            offset 0
        ) as f
        offset 0
    ) as c
$$;

comment on function pgpulse.reading_columns is
    'What public.transform_reading gives unless somebody replaces it. time: of timestamp, time, ts, date, '
    'created_at or createdAt (ISO 8601, without zone UTC; a Date; seconds or milliseconds since 1970), else of '
    'the ObjectId, else null. device: of device, device_id, deviceId, sensor, sensor_id or sensorId. metric: of '
    'metric, type, name or kind. value: of value or reading, a number or text that is one; null of NaN and '
    'the infinities. unit. A time before 1970, more than a day ahead, or none at all, and a value that is no '
    'number, or too large for float8, refuse the document.';

-- Made once: people replace it.
do $do$
begin
    if to_regprocedure('public.transform_reading(text,text,jsonb)') is null then
        create function public.transform_reading(source text, source_id text, payload jsonb)
        returns table ("time" timestamptz, device text, metric text, value float8, unit text)
        language sql
        stable
        as $$
            select * from pgpulse.reading_columns(source, source_id, payload)
        $$;
        comment on function public.transform_reading is
            'pgpulse: What the typed columns of a reading are; replace it (create or replace function) as you '
            'like, migrate leaves it alone. Gives one row; time: 1970 to a day ahead, null: what it was, or when '
            'it was received. Whatever it raises of classes 22 and 23, or by raise exception, makes the document '
            'a dead letter with that reason: pgpulse.unreadable(field, reason) names the field too. Write names '
            'with their schema. Rows that are there stay as they are.';
    end if;
end
$do$;

-- --- taking readings -----------------------------------------------------------------------------

-- What public.transform_reading gives, whoever wrote it, within what tables and rollups can hold: device and
-- metric become keys of an index. No search_path is pinned: see above.
create or replace function pgpulse.columns_of(source text, source_id text, payload jsonb)
returns table ("time" timestamptz, device text, metric text, value float8, unit text)
language sql
stable
as $$
    select
        case
            when c."time" between '1970-01-01 00:00:00+00' and now() + interval '1 day' then c."time"
            when c."time" is not null then pgpulse.unreadable(
                'time', 'of transform_reading is before 1970, or more than a day ahead'
            )::timestamptz
        end,
        case
            when length(c.device) > 255 then pgpulse.unreadable(
                coalesce(
                    pgpulse.field_of(payload, '{device,device_id,deviceId,sensor,sensor_id,sensorId}'), 'device'
                ),
                'is longer than 255 characters'
            )
            else c.device
        end,
        case
            when length(c.metric) > 255 then pgpulse.unreadable(
                coalesce(pgpulse.field_of(payload, '{metric,type,name,kind}'), 'metric'),
                'is longer than 255 characters'
            )
            else c.metric
        end,
        c.value,
        case
            when length(c.unit) > 255 then pgpulse.unreadable('unit', 'is longer than 255 characters')
            else c.unit
        end
    from (select * from public.transform_reading(source, source_id, payload) offset 0) as c
$$;

-- All of them or an error; ids are sorted, and each is there once. Everybody locks keys in that order, and
-- them before rows, so that nobody waits for each other for ever.
create or replace function pgpulse.put_readings(
    source text,
    ids text[],
    payloads text[],
    received timestamptz,
    out fresh bigint,
    out written bigint
)
language plpgsql
set search_path = pg_catalog, pg_temp
set work_mem = '64MB'
as $$
declare
    gone text[];
    gone_at timestamptz[];
    moved bigint;
    deleted bigint;
begin
    execute format(
        $q$
        with t as materialized (
            select
                d.id,
                coalesce(
                    c."time",
                    (select k."time" from public.reading_keys k where k.source = $1 and k.source_id = d.id),
                    $4
                ) as at,
                c.device,
                c.metric,
                c.value,
                c.unit,
                d.payload
            from (
                select id, payload::jsonb as payload from unnest($2, $3) as u (id, payload) offset 0
            ) as d
            left join lateral pgpulse.columns_of($1, d.id, d.payload) as c on true
        ),
        k as (
            insert into public.reading_keys as k (source, source_id, "time")
            select $1, id, at from t
            on conflict on constraint reading_keys_pkey do update
            set previous = k."time", "time" = excluded."time"
            where k."time" <> excluded."time"
            returning source_id, previous
        ),
        r as (
            insert into %s as r
                ("time", source, source_id, device, metric, value, unit, received, processed, payload)
            select at, $1, id, device, metric, value, unit, $4, clock_timestamp(), payload
            from t
            where (select count(*) from k) >= 0
            on conflict ("time", source, source_id) do update
            set
                device = excluded.device,
                metric = excluded.metric,
                value = excluded.value,
                unit = excluded.unit,
                received = excluded.received,
                processed = excluded.processed,
                payload = excluded.payload
            -- As text: 1.0 is no 1.
            where (r.payload::text, r.device, r.metric, r.value, r.unit)
                is distinct from (
                    excluded.payload::text, excluded.device, excluded.metric, excluded.value, excluded.unit
                )
            returning 1
        )
        select
            (select count(*) from k where previous is null),
            (select array_agg(source_id) from k where previous is not null),
            (select array_agg(previous) from k where previous is not null),
            (select count(*) from r)
        $q$,
        pgpulse.rows_of('public.reading_analytics')
    ) into fresh, gone, gone_at, written using source, ids, payloads, received;
    moved := coalesce(cardinality(gone), 0);
    -- Statements of their own: they see what those have written for whom the keys had to wait. Again where
    -- rows were missing: upkeep may just have moved them to a new partition.
    for try in 1..3 loop
        exit when moved = 0;
        execute format(
            'delete from %s r
            using unnest($2, $3) as gone (id, at)
            where r.source = $1
                and r.source_id = gone.id
                and r."time" = gone.at
                and r."time" between $4 and $5',
            pgpulse.rows_of('public.reading_analytics')
        ) using
            source, gone, gone_at,
            (select min(at) from unnest(gone_at) as at), (select max(at) from unnest(gone_at) as at);
        get diagnostics deleted = row_count;
        exit when deleted >= moved;
        moved := moved - deleted;
    end loop;
end
$$;

create or replace function pgpulse.jsonb_or_null(document text) returns jsonb
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    return document::jsonb;
exception when data_exception or program_limit_exceeded then
    return null;
end
$$;

-- The field that an error quotes the value of.
create or replace function pgpulse.field_with(document jsonb, reason text) returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select f.key
    from jsonb_each(case jsonb_typeof(document) when 'object' then document end) as f
    where position(
        '"' || coalesce(f.value ->> '$date', f.value ->> '$numberDecimal', f.value #>> '{}') || '"' in reason
    ) > 0
    limit 1
$$;

create or replace function pgpulse.keep_failures(source text, failures jsonb) returns void
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
    insert into public.reading_failures as f (source, source_id, reason, field, document, bson)
    select
        keep_failures.source,
        said.id,
        said.reason,
        said.field,
        said.document,
        decode(said.bson, 'base64')
    from jsonb_to_recordset(failures) as said (id text, reason text, field text, document jsonb, bson text)
    order by said.id collate "C"
    on conflict on constraint reading_failures_pkey do update set
        failed = excluded.failed,
        tries = f.tries + 1,
        reason = excluded.reason,
        field = excluded.field,
        document = excluded.document,
        bson = coalesce(excluded.bson, f.bson)
$$;

comment on function pgpulse.keep_failures is
    'Dead letters: an array of {"id", "reason", "field", "document", "bson" (base64)}, the last three at will.';

-- What is wrong with a document; reason, field: as an exception gave them.
create or replace function pgpulse.refusal(id text, document jsonb, reason text, field text) returns jsonb
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select jsonb_build_object(
        'id', id,
        -- long numbers and texts are in the document
        'reason', regexp_replace(reason, '"([^"]{60})[^"]*"', '"\1…"'),
        'field', coalesce(nullif(field, ''), pgpulse.field_with(document, reason)),
        'document', document
    )
$$;

create or replace function pgpulse.hold_claim(claim bigint, worker text) returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform from pgpulse.reading_claims c
    where c.id = hold_claim.claim and c.worker = hold_claim.worker
    for share;
    if not found then
        raise exception 'Cannot take readings: claim % is no more that of worker "%"', claim, worker
            using errcode = 'object_not_in_prerequisite_state',
                hint = 'Its lease has lapsed, and another worker has taken over: drop the batch';
    end if;
end
$$;

comment on function pgpulse.hold_claim is
    'Makes sure that a worker still has a claim, until the transaction ends; refused (55000) otherwise.';

create or replace function pgpulse.take_readings(
    source text,
    ids text[],
    payloads text,
    received timestamptz default clock_timestamp(),
    keep boolean default false,
    claim bigint default null,
    worker text default null
) returns jsonb
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    lines text[] := string_to_array(payloads, E'\n');
    total bigint := cardinality(ids);
    -- Ranges of ids that are still to be taken, the next one last.
    todo int[];
    "from" int;
    "to" int;
    part record;
    fresh bigint := 0;
    written bigint := 0;
    repeated bigint;
    refused jsonb[] := '{}';
    screened boolean := false;
    retried int;
    one record;
    document jsonb;
    reason text;
    field text;
begin
    if total is distinct from coalesce(cardinality(lines), 0)
        or exists (select from unnest(ids) as id where (octet_length(id) between 1 and 1024) is not true)
        or (octet_length(source) between 1 and 255) is not true then
        raise exception 'Cannot take readings: % ids and % lines of payload', total, cardinality(lines)
            using errcode = 'invalid_parameter_value',
                hint = 'Each needs an id of 1 to 1024 bytes and one line of JSON; the source has 255 bytes at most';
    end if;
    if claim is not null then
        perform pgpulse.hold_claim(claim, worker);
    end if;
    -- In one order for everybody; of an id that is repeated, the last.
    select array_agg(u.id order by u.id collate "C"), array_agg(u.line order by u.id collate "C")
    into ids, lines
    from (
        select distinct on (d.id collate "C") d.id, d.line
        from unnest(ids, lines) with ordinality as d (id, line, i)
        order by d.id collate "C", i desc
    ) as u;
    repeated := total - coalesce(cardinality(ids), 0);
    todo := array[1, cardinality(ids)];
    while cardinality(todo) > 0 loop
        "from" := todo[cardinality(todo) - 1];
        "to" := todo[cardinality(todo)];
        todo := trim_array(todo, 2);
        continue when "to" is null;
        begin
            select * into part from pgpulse.put_readings(source, ids["from":"to"], lines["from":"to"], received);
            fresh := fresh + part.fresh;
            written := written + part.written;
        exception
            -- What a document can be to blame for, or whoever has replaced transform_reading.
            when data_exception or integrity_constraint_violation or program_limit_exceeded or raise_exception then
                get stacked diagnostics reason = message_text, field = column_name;
                if not screened then
                    -- Most often the columns cannot be made: each by itself tells which.
                    screened := true;
                    for one in select * from unnest(ids, lines) as u (id, line) loop
                        begin
                            document := null;
                            document := one.line::jsonb;
                            perform t from pgpulse.columns_of(source, one.id, document) as t;
                        exception
                            when data_exception or integrity_constraint_violation or program_limit_exceeded
                                or raise_exception then
                                get stacked diagnostics reason = message_text, field = column_name;
                                refused := refused || pgpulse.refusal(one.id, document, reason, field);
                        end;
                    end loop;
                    select array_agg(u.id order by u.i), array_agg(u.line order by u.i)
                    into ids, lines
                    from unnest(ids, lines) with ordinality as u (id, line, i)
                    where not exists (select from unnest(refused) as r where r ->> 'id' = u.id);
                    todo := array[1, cardinality(ids)];
                elsif "from" < "to" then
                    todo := todo || array[("from" + "to") / 2 + 1, "to", "from", ("from" + "to") / 2];
                elsif sqlstate = '23514' and retried is distinct from "to" then
                    -- Upkeep may have made a partition just now, and moved its rows there.
                    todo := todo || array["from", "to"];
                    retried := "to";
                else
                    refused := refused
                        || pgpulse.refusal(ids["from"], pgpulse.jsonb_or_null(lines["from"]), reason, field);
                end if;
        end;
    end loop;
    if keep and refused <> '{}' then
        perform pgpulse.keep_failures(source, to_jsonb(refused));
    end if;
    if exists (select from public.reading_failures f where f.source = take_readings.source) then
        delete from public.reading_failures f
        where f.source = take_readings.source
            and f.source_id = any (ids)
            and not exists (select from unnest(refused) as r where r ->> 'id' = f.source_id);
    end if;
    return jsonb_build_object(
        'taken', fresh,
        'replaced', greatest(written - fresh, 0) + repeated,
        'same', total - repeated - greatest(written, fresh) - cardinality(refused),
        'failed', (select coalesce(jsonb_agg(r - 'document'), '[]') from unnest(refused) as r)
    );
end
$$;

comment on function pgpulse.take_readings is
    'Takes readings of a source, each exactly once by its id, however often it comes and from how many at '
    'once; another document with the same id replaces it, and of an id that is repeated here the last counts. '
    'payloads: their JSON, a line each. What cannot be taken leaves the others alone: {"taken": new ones, '
    '"replaced", "same": those that were there, "failed": [{"id", "reason", "field"}]}; an earlier row of its id '
    'stays. keep: those become dead letters too. claim, worker: refused (55000) unless that worker still has it.';

create or replace function pgpulse.take_letter(
    source text,
    id text,
    failed timestamptz,
    payload text
) returns jsonb
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform from public.reading_failures f
    where f.source = take_letter.source and f.source_id = take_letter.id and f.failed = take_letter.failed
    for update;
    return case when found then
        pgpulse.take_readings(source, array[id], payload, clock_timestamp(), keep => true)
    end;
exception when deadlock_detected then
    -- By somebody who takes this id just now.
    return null;
end
$$;

comment on function pgpulse.take_letter is
    'Takes what was kept of a dead letter, as take_readings does; null where it is not as it was at failed: '
    'then somebody else has taken its document, or failed to.';

revoke execute on function
    pgpulse.put_readings, pgpulse.keep_failures, pgpulse.hold_claim, pgpulse.take_readings, pgpulse.take_letter
    from public;

-- --- reading them --------------------------------------------------------------------------------

create or replace function pgpulse.page_readings(
    source text default null,
    "from" timestamptz default null,
    "to" timestamptz default null,
    holds jsonb default null,
    after_time timestamptz default null,
    after_source text default null,
    after_id text default null,
    rows int default 100
)
returns setof pgpulse.reading
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
declare
    -- Nothing is before 1970, nor more than a day ahead of when it came.
    first timestamptz := greatest("from", '1970-01-01 00:00:00+00');
    upto timestamptz := least("to", after_time + interval '1 microsecond', now() + interval '25 hours');
    since timestamptz;
    days int := 1;
    query text;
    walked boolean := false;
    frequent boolean;
    found bigint;
    wanted bigint := rows;
begin
    -- A day, two before it, four before those, until there are enough. Its times are constants, so that a
    -- partition that is not needed is not even planned for.
    while wanted > 0 and upto > first loop
        since := greatest(date_trunc('day', upto - interval '1 microsecond') - make_interval(days => days - 1), first);
        query := concat_ws(
            ' and ',
            format(
                'select "time", source, source_id, device, metric, value, unit, received, processed, payload
                from public.reading_analytics
                where "time" >= %L and "time" < %L',
                since, upto
            ),
            case when page_readings.source is not null then 'source = $1' end,
            case
                when after_time is null or days > 1 then null
                when page_readings.source is null then '("time", source, source_id) < ($3, $4, $5)'
                else '("time", source_id) < ($3, $5)'
            end
        );
        -- What is frequent is among the next 2,000; only what is not is looked up by its content, for
        -- which all there is of it in these days must be sorted. No statistics of the planner's are that good.
        frequent := false;
        if holds is not null and not walked then
            execute format(
                'select count(*) > 0, count(*) filter (where payload @> $2) >= $6
                from (%s order by "time" desc, source desc, source_id desc limit 2000) as next',
                query
            ) into walked, frequent using page_readings.source, holds, after_time, after_source, after_id, wanted;
        end if;
        return query execute case
            when holds is null then query
            when frequent then format(
                'select * from (%s order by "time" desc, source desc, source_id desc limit 2000) as next
                where payload @> $2', query
            )
            else format('select * from (%s and payload @> $2 offset 0) as found', query)
        end || ' order by "time" desc, source desc, source_id desc limit $6'
        using page_readings.source, holds, after_time, after_source, after_id, wanted;
        get diagnostics found = row_count;
        wanted := wanted - found;
        upto := since;
        days := days * 2;
    end loop;
end
$$;

comment on function pgpulse.page_readings is
    'Readings, the newest first, after the one whose time, source and id are given (null: from the first on); '
    'from (inclusive) and to: of their time; holds: what the payload contains.';

create or replace function pgpulse.reading_of(id text, source text default null)
returns setof pgpulse.reading
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    k record;
begin
    for k in
        select keys.source, keys."time"
        from public.reading_keys keys
        where keys.source_id = id and keys.source = coalesce(reading_of.source, keys.source)
        order by keys.source
    loop
        -- As a constant: see above.
        return query execute format(
            'select "time", source, source_id, device, metric, value, unit, received, processed, payload
            from public.reading_analytics
            where "time" = %L and source = $1 and source_id = $2',
            k."time"
        ) using k.source, id;
    end loop;
end
$$;

comment on function pgpulse.reading_of is 'The reading with this id; one of each source where none is given.';

-- --- batches in hand -----------------------------------------------------------------------------

create or replace function pgpulse.claimed_readings(source text) returns text[]
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(array_agg(u.id), '{}')
    from pgpulse.reading_claims c, unnest(c.ids) as u (id)
    where c.source = claimed_readings.source
$$;

comment on function pgpulse.claimed_readings is 'What workers have in hand of a source: not to be looked for.';

create or replace function pgpulse.claim_readings(
    source text,
    worker text,
    wanted text[],
    out claim bigint,
    out ids text[]
)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pg_advisory_xact_lock(hashtextextended('pgpulse readings ' || source, 0));
    select array_agg(w.id order by w.i) into ids
    from unnest(wanted) with ordinality as w (id, i)
    where not exists (
        select
        from (select unnest(c.ids) as id from pgpulse.reading_claims c where c.source = claim_readings.source) as c
        where c.id = w.id
    );
    if ids is not null then
        insert into pgpulse.reading_claims (source, worker, ids) values (source, worker, ids)
        returning id into claim;
    end if;
end
$$;

comment on function pgpulse.claim_readings is
    'Claims for a worker those of the wanted ids that nobody has, and says which; null, null: none. It holds '
    'while the worker holds the lease "etl/<worker>".';

create or replace function pgpulse.release_readings(claim bigint, worker text) returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
    delete from pgpulse.reading_claims c
    where c.id = release_readings.claim and c.worker = release_readings.worker
    returning true
$$;

comment on function pgpulse.release_readings is
    'Ends a claim; null where another worker has taken it over meanwhile.';

create or replace function pgpulse.recover_readings(worker text, own boolean default false)
returns table (claim bigint, source text, ids text[])
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
    update pgpulse.reading_claims c
    set worker = recover_readings.worker, claimed = clock_timestamp()
    where c.id = any (array(
        select d.id
        from pgpulse.reading_claims d
        where case
            when d.worker = recover_readings.worker then own
            else not exists (
                select from pgpulse.leases l
                where l.lease = 'etl/' || d.worker and l.until > clock_timestamp()
            )
        end
        for update skip locked
        limit 10
    ))
    returning c.id, c.source, c.ids
$$;

comment on function pgpulse.recover_readings is
    'Takes over claims of dead workers, at most ten; own: and those of the same name, left by a former '
    'process. What of them is marked processed is to be put back to ingested, then release_readings.';

revoke execute on function
    pgpulse.claimed_readings, pgpulse.claim_readings, pgpulse.release_readings, pgpulse.recover_readings
    from public;

-- --- the flow ------------------------------------------------------------------------------------

create or replace function pgpulse.note_flow(
    source text,
    worker text,
    read bigint default 0,
    taken bigint default 0,
    replaced bigint default 0,
    same bigint default 0,
    failed bigint default 0,
    backlog bigint default null,
    lag_seconds float8 default null
) returns void
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
    insert into public.reading_sources as s (source, worker, last_taken, backlog, lag_seconds)
    values (source, worker, case when taken + replaced > 0 then clock_timestamp() end, backlog, lag_seconds)
    on conflict on constraint reading_sources_pkey do update set
        last_seen = excluded.last_seen,
        last_taken = coalesce(excluded.last_taken, s.last_taken),
        worker = excluded.worker,
        backlog = coalesce(excluded.backlog, s.backlog),
        lag_seconds = coalesce(excluded.lag_seconds, s.lag_seconds);
    -- Workers look at the clock, and may be somewhat before or after it.
    insert into public.reading_flow as f
        ("time", source, backlog, lag_seconds, read, taken, replaced, same, failed)
    values (
        date_bin('5 seconds', clock_timestamp() + interval '2.5 seconds', '2000-01-01 00:00:00+00'),
        source, backlog, lag_seconds, read, taken, replaced, same, failed
    )
    on conflict on constraint reading_flow_pkey do update set
        backlog = coalesce(excluded.backlog, f.backlog),
        lag_seconds = coalesce(excluded.lag_seconds, f.lag_seconds),
        read = f.read + excluded.read,
        taken = f.taken + excluded.taken,
        replaced = f.replaced + excluded.replaced,
        same = f.same + excluded.same,
        failed = f.failed + excluded.failed
$$;

comment on function pgpulse.note_flow is
    'What a worker of a continuous sync did since it last said so: to be called whenever the clock''s seconds '
    'are a multiple of five, also with nothing done.';

revoke execute on function pgpulse.note_flow from public;

-- --- upkeep --------------------------------------------------------------------------------------

create or replace function pgpulse.upkeep_readings() returns table (detail text, more boolean)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    upto timestamptz := case
        when pgpulse.is_hypertable('public.reading_analytics') then now() - interval '1 day'
        else (select now() - s.keep from pgpulse.storage s where s.source = 'public.reading_analytics'::regclass)
    end;
    keys bigint;
    others bigint;
begin
    -- Keys of rows that retention has dropped.
    execute format(
        'delete from public.reading_keys
        where ctid = any (array(
            select ctid
            from public.reading_keys
            where "time" < (select least($1, min(r."time")) from %s r) and "time" < $1
            order by "time"
            limit 20000
            for update skip locked
        ))',
        pgpulse.rows_of('public.reading_analytics')
    ) using upto;
    get diagnostics keys = row_count;
    delete from public.reading_flow
    where ctid = any (array(
        select ctid from public.reading_flow where "time" < now() - interval '30 days' order by "time" limit 20000
    ));
    get diagnostics others = row_count;
    delete from public.sync_runs where started < now() - interval '90 days' and ended is not null;
    update public.sync_runs r
    set ended = clock_timestamp(), error = 'Its worker has gone'
    where r.ended is null
        and r.started < now() - interval '2 minutes'
        and not exists (
            select from pgpulse.leases l where l.lease = 'etl/' || r.worker and l.until > clock_timestamp()
        );
    -- Workers have a name of their own at each start.
    delete from pgpulse.leases where lease like 'etl/%' and until < now() - interval '1 day';
    detail := case when keys + others > 0
        then format('%s keys of readings and %s moments of their flow deleted', keys, others) end;
    more := keys = 20000 or others = 20000;
    return next;
end
$$;

comment on function pgpulse.upkeep_readings is
    'One bounded piece of what readings need beside their partitions; pgpulse.upkeep calls it.';

revoke execute on function pgpulse.upkeep_readings from public;

-- --- rollup, storage, stream ---------------------------------------------------------------------

create or replace function pgpulse.add_readings(theirs boolean default true) returns void
language plpgsql
as $$
begin
    if not theirs
        and coalesce(obj_description('public.reading_analytics'::regclass, 'pg_class'), '') not like 'pgpulse:%' then
        raise warning 'Leaves public.reading_analytics as it is: migrate did not make it'
            using detail = 'select pgpulse.add_readings() rolls it up, and stores it in partitions.';
        return;
    end if;
    if not exists (select from pgpulse.rollups where rollup = 'readings') then
        perform pgpulse.add_rollup(
            'public.reading_analytics', 'time', measures => '{value}', keys => '{source,device,metric}',
            name => 'readings'
        );
        perform pgpulse.keep_rollup('readings', '1m', '90 days');
        perform pgpulse.keep_rollup('readings', '1h', '2 years');
    end if;
    if (select relkind from pg_class where oid = 'public.reading_analytics'::regclass) = 'r'
        and not pgpulse.is_hypertable('public.reading_analytics') then
        -- Never packed: a document that comes again replaces its row. Kept for ever: MongoDB says of them
        -- that they are processed, and a backfill brings old ones; the same call with keep drops them.
        perform pgpulse.add_storage(
            'public.reading_analytics', 'time', keys => '{source}', pack_after => null, keep => null
        );
    end if;
end
$$;

comment on function pgpulse.add_readings is
    'Rolls up reading_analytics and stores it in partitions: what migrate does with a table that it made.';

select pgpulse.add_readings(theirs => false);

-- A stream of this name that is somebody's own stays as it is.
do $$
begin
    if coalesce(obj_description(to_regclass('live.readings'), 'pg_class') not like 'pgpulse:%',
        to_regclass('live.readings') is not null) then
        raise warning 'Leaves live.readings as it is: migrate did not make it';
        return;
    end if;
    create or replace view live.readings as
    select
        "time",
        source,
        backlog,
        lag_seconds,
        read / 5.0::float8 as read,
        (taken + replaced) / 5.0::float8 as taken,
        failed / 5.0::float8 as failed
    from public.reading_flow;
    comment on view live.readings is
        'pgpulse: what the sync does, a second: a channel for each source, a row each five seconds';
    perform pgpulse.add_stream('readings', split => 'source', beat => '1 second', slow => '5 minutes');
end
$$;
