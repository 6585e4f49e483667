-- What the default makes of a document: time, device, metric, value, unit; and what it refuses.
begin;

create function pg_temp.made(payload jsonb, column_name text) returns text
language sql
as $$
    select to_jsonb(t) ->> column_name from public.transform_reading('test', 'id', payload) as t
$$;

do $$
declare
    one record;
    asked text;
begin
    set local timezone = 'America/New_York';
    for one in
        select *
        from (values
            ('{"timestamp": "2026-01-02T03:04:05.678Z"}'::jsonb, '2026-01-02 03:04:05.678+00'::timestamptz),
            ('{"time": {"$date": "2026-01-02T03:04:05Z"}}', '2026-01-02 03:04:05+00'),
            ('{"time": {"$date": {"$numberLong": "1767323045000"}}}', '2026-01-02 03:04:05+00'),
            ('{"ts": 1767323045}', '2026-01-02 03:04:05+00'),
            ('{"ts": 1767323045.5}', '2026-01-02 03:04:05.5+00'),
            ('{"ts": 1767323045000}', '2026-01-02 03:04:05+00'),
            ('{"ts": 0}', '1970-01-01 00:00:00+00'),
            ('{"date": "2026-01-02"}', '2026-01-02 00:00:00+00'),
            ('{"date": "2026-01-02 03:04"}', '2026-01-02 03:04:00+00'),
            ('{"created_at": "2026-01-02T03:04:05+02:00"}', '2026-01-02 01:04:05+00'),
            ('{"createdAt": "2026-01-02T03:04:05-0230"}', '2026-01-02 05:34:05+00'),
            -- the first that is there
            ('{"timestamp": null, "time": "2026-01-02T00:00:00Z", "ts": 5}', '2026-01-02 00:00:00+00'),
            -- when the id was made, but not when that is a field's
            ('{"_id": {"$oid": "69572d25aaaaaaaaaaaaaaaa"}}', '2026-01-02 02:27:49+00'),
            ('{"_id": {"$oid": "ffffffffaaaaaaaaaaaaaaaa"}}', null),
            ('{"_id": "69572d25aaaaaaaaaaaaaaaa"}', null),
            ('{}', null)
        ) as cases (payload, wanted)
    loop
        asked := pg_temp.made(one.payload, 'time');
        assert asked::timestamptz is not distinct from one.wanted, format('%s gives %s', one.payload, asked);
    end loop;
    for one in
        select *
        from (values
            ('{"value": 1.5}'::jsonb, 'value', '1.5'),
            ('{"reading": "-1e3"}', 'value', '-1000'),
            ('{"value": null, "reading": 2}', 'value', '2'),
            ('{"value": {"$numberDecimal": "12.5"}}', 'value', '12.5'),
            ('{"value": {"$numberDouble": "NaN"}}', 'value', null),
            ('{"value": {"$numberDecimal": "-Infinity"}}', 'value', null),
            ('{"value": 9223372036854775808}', 'value', '9223372036854776000'),
            ('{"device": "a", "sensor": "b"}', 'device', 'a'),
            ('{"sensorId": 17}', 'device', '17'),
            ('{"device_id": {"$oid": "69572d25aaaaaaaaaaaaaaaa"}}', 'device', '69572d25aaaaaaaaaaaaaaaa'),
            ('{"type": "temperature", "name": "x"}', 'metric', 'temperature'),
            ('{"type": {"a": 1}}', 'metric', null),
            ('{"unit": "°C"}', 'unit', '°C')
        ) as cases (payload, field, wanted)
    loop
        asked := pg_temp.made(one.payload, one.field);
        assert asked is not distinct from one.wanted, format('%s gives %s', one.payload, asked);
    end loop;
    for one in
        select *
        from (values
            ('{"time": "1969-12-31T23:59:59Z"}'::jsonb, 'time is before 1970'),
            ('{"date": {"$date": {"$numberLong": "-62167219200000"}}}', 'date is before 1970'),
            ('{"ts": "9999-12-31T23:59:59Z"}', 'ts is more than a day ahead'),
            ('{"ts": "now"}', 'ts is no time like %'),
            ('{"ts": "infinity"}', 'ts is no time like %'),
            ('{"time": "01/02/2026"}', 'time is no time like %'),
            ('{"time": true}', 'time is no time like %'),
            ('{"time": [1]}', 'time is no time like %'),
            ('{"time": 1e300}', 'time is no time like %'),
            ('{"time": "2026-02-31T00:00:00Z"}', 'date/time field value out of range: "2026-02-31T00:00:00Z"'),
            ('{"value": "hot"}', 'value is no number'),
            ('{"value": true}', 'value is no number'),
            ('{"reading": {"a": 1}}', 'reading is no number'),
            ('{"value": 1e400}', '% is out of range for type double precision'),
            ('[]', 'payload is no JSON object')
        ) as cases (payload, wanted)
    loop
        asked := pg_temp.refusal(format('select * from transform_reading(%L, %L, %L)', 'test', 'id', one.payload));
        assert asked like one.wanted, format('%s: %s', one.payload, asked);
    end loop;
end
$$;

rollback;
