-- Each id is one row, whatever comes in which order; what cannot be taken leaves the others alone.
begin;

create function pg_temp.take(ids text, payloads text[], keep boolean default false, source text default 'test')
returns text
language sql
as $$
    select format(
        '%s taken, %s replaced, %s same, %s failed',
        said ->> 'taken', said ->> 'replaced', said ->> 'same',
        coalesce((select string_agg(f ->> 'id', ',') from jsonb_array_elements(said -> 'failed') as f), 'none')
    )
    from pgpulse.take_readings(source, ids::text[], array_to_string(payloads, E'\n'), '2026-01-01', keep) as said
$$;

create function pg_temp.rows() returns text
language sql
as $$
    select string_agg(concat_ws(' ', source, source_id, "time"::date, value), ', ' order by source, source_id, "time")
    from public.reading_analytics
$$;

create function pg_temp.agree() returns boolean
language sql
as $$
    select not exists (
        (select source, source_id, "time" from public.reading_keys
        except all select source, source_id, "time" from public.reading_analytics)
        union all
        (select source, source_id, "time" from public.reading_analytics
        except all select source, source_id, "time" from public.reading_keys)
    )
$$;

do $$
declare
    day text := '{"time": "2026-01-0%s", "value": %s}';
    said text;
begin
    said := pg_temp.take('{a,b}', array[format(day, 1, 1), format(day, 1, 2)]);
    assert said = '2 taken, 0 replaced, 0 same, none failed', said;
    -- sent again; another content; another day, and back
    said := pg_temp.take('{a,b}', array[format(day, 1, 1), format(day, 1, 2)]);
    assert said = '0 taken, 0 replaced, 2 same, none failed', said;
    said := pg_temp.take('{c,a}', array[format(day, 1, 1), format(day, 1, 3)]);
    assert said = '1 taken, 1 replaced, 0 same, none failed', said;
    said := pg_temp.take('{b,a}', array[format(day, 2, 2), format(day, 1, 3)]);
    assert said = '0 taken, 1 replaced, 1 same, none failed', said;
    assert pg_temp.rows() = 'test a 2026-01-01 3, test b 2026-01-02 2, test c 2026-01-01 1', pg_temp.rows();
    said := pg_temp.take('{b}', array[format(day, 1, 2)]);
    assert said = '0 taken, 1 replaced, 0 same, none failed', said;
    -- JSON that is equal but not the same
    said := pg_temp.take('{b}', array[format(day, 1, '2.0')]);
    assert said = '0 taken, 1 replaced, 0 same, none failed', said;
    -- of a repeated id the last counts
    said := pg_temp.take('{d,d,d}', array[format(day, 1, 1), format(day, 2, 2), format(day, 3, 3)]);
    assert said = '1 taken, 2 replaced, 0 same, none failed', said;
    -- an id is one source's own
    said := pg_temp.take('{a}', array[format(day, 5, 7)], source => 'other');
    assert said = '1 taken, 0 replaced, 0 same, none failed', said;
    assert pg_temp.rows() = 'other a 2026-01-05 7, test a 2026-01-01 3, test b 2026-01-01 2, '
        'test c 2026-01-01 1, test d 2026-01-03 3', pg_temp.rows();
    -- without a time it stays where it is
    said := pg_temp.take('{e}', array['{}']);
    said := pg_temp.take('{e}', array['{"value": 5}']);
    assert said = '0 taken, 1 replaced, 0 same, none failed', said;
    assert pg_temp.agree();
    assert pg_temp.take('{}', '{}') = '0 taken, 0 replaced, 0 same, none failed';
    assert pg_temp.refusal($q$select pgpulse.take_readings('test', '{a,b}', '{}')$q$)
        = 'Cannot take readings: 2 ids and 1 lines of payload';
    assert pg_temp.refusal($q$select pgpulse.take_readings('test', '{""}', '{}')$q$) like 'Cannot take readings%';
end
$$;

-- Bad ones among good ones.
do $$
declare
    said text;
    before text := pg_temp.rows();
begin
    select pg_temp.take(
        array_agg('n' || i)::text,
        array_agg(case
            when i = 7 then '{"value": "hot"}'
            when i = 20 then '{"value": '
            when i = 21 then '{"time": "9999-01-01"}'
            when i = 50 then '{"text": "\u0000"}'
            else '{"value": 1}'
        end),
        keep => true
    ) into said
    from generate_series(1, 50) as i;
    assert said = '46 taken, 0 replaced, 0 same, n20,n21,n50,n7 failed', said;
    select string_agg(concat_ws('|', source_id, tries, field, document, left(reason, 30)), ' ' order by source_id) into said
    from public.reading_failures;
    assert said = 'n20|1|invalid input syntax for type  n21|1|time|{"time": "9999-01-01"}|time is more than a day ahead '
        'n50|1|unsupported Unicode escape seq n7|1|value|{"value": "hot"}|value is no number', said;
    -- A failure leaves the row of before; a success ends the failure.
    assert pg_temp.take('{n7}', array['{"value": "cold"}'], true) = '0 taken, 0 replaced, 0 same, n7 failed';
    assert pg_temp.take('{a}', array['{"value": "cold"}'], true) = '0 taken, 0 replaced, 0 same, a failed';
    assert pg_temp.take('{n50}', array['{"value": "cold"}']) = '0 taken, 0 replaced, 0 same, n50 failed';
    assert pg_temp.take('{n7,n20}', array['{"value": 1}', '{"value": 1}']) = '2 taken, 0 replaced, 0 same, none failed';
    select string_agg(concat_ws('|', source_id, tries), ' ' order by source_id) into said from public.reading_failures;
    assert said = 'a|1 n21|1 n50|1', said;
    assert pg_temp.rows() like '%, test a 2026-01-01 3,%';
    perform pgpulse.keep_failures('test', '[{"id": "z", "reason": "broken", "bson": "AAE="}, {"id": "a", "reason": "b"}]');
    select string_agg(concat_ws('|', source_id, tries, reason, encode(bson, 'hex')), ' ' order by source_id) into said
    from public.reading_failures where source_id in ('a', 'z');
    assert said = 'a|2|b z|1|broken|0001', said;
    assert pg_temp.agree();
    -- Keys of rollups have bounds.
    assert pgpulse.take_readings('long', '{a,b,c,d}', format(
        E'{"sensor": "%1$s"}\n{"metric": "%1$s"}\n{"unit": "%1$s"}\n{"note": "%1$s", "device": "%2$s"}',
        repeat('x', 256), repeat('x', 255)
    ))
        @> '{"taken": 1, "failed": [{"id": "a", "field": "sensor", "reason": "sensor is longer than 255 characters"},
            {"id": "b", "field": "metric"}, {"id": "c", "field": "unit"}]}';
end
$$;

-- People's own transform_reading, and what it raises.
create or replace function public.transform_reading(source text, source_id text, payload jsonb)
returns table ("time" timestamptz, device text, metric text, value float8, unit text)
language plpgsql
stable
as $$
begin
    if payload ? 'stop' then
        raise exception 'It says stop';
    end if;
    return query select (payload ->> 'at')::timestamptz, coalesce(payload ->> 'who', 'mine'), source, (payload ->> 'n')::int::float8, null::text;
end
$$;

do $$
declare
    said jsonb;
begin
    said := pgpulse.take_readings('own', '{a,b,c}', E'{"n": "1"}\n{"n": "many"}\n{"stop": 1}', '2026-01-01');
    assert said = jsonb_build_object('taken', 1, 'replaced', 0, 'same', 0, 'failed', jsonb_build_array(
        jsonb_build_object('id', 'b', 'field', 'n', 'reason', 'invalid input syntax for type integer: "many"'),
        jsonb_build_object('id', 'c', 'field', null, 'reason', 'It says stop')
    )), said;
    assert (
        select concat_ws('|', "time"::date, device, metric, value) from public.reading_analytics where source = 'own'
    ) = '2026-01-01|mine|own|1';
    said := pgpulse.take_readings('own', '{d,e,f}', E'{"at": "infinity"}\n{}\n{"at": "1969-01-01"}', '2026-01-01');
    assert said ->> 'taken' = '1' and said #>> '{failed,1,id}' = 'f'
        and said #>> '{failed,0,reason}' like 'time of transform_reading is before 1970%', said;
    said := pgpulse.take_readings('own', '{g}', format('{"who": "%s"}', repeat('x', 6000)), '2026-01-01');
    assert said #>> '{failed,0,field}' = 'device', said;
    -- What it makes of the same document is something else now.
    said := pgpulse.take_readings('other', '{a}', '{"time": "2026-01-05", "value": 7}', '2026-01-01');
    assert said ->> 'replaced' = '1', said;
end
$$;

create or replace function public.transform_reading(source text, source_id text, payload jsonb)
returns table ("time" timestamptz, device text, metric text, value float8, unit text)
language plpgsql
stable
as $$
begin
    return query select no_such_column;
end
$$;

do $$
begin
    -- No document is to blame for that.
    assert pg_temp.refusal($q$select pgpulse.take_readings('own', '{d}', '{}')$q$) like 'column "no_such_column" does not%';
end
$$;

rollback;
