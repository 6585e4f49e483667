-- time_bucket counts as TimescaleDB does; the expected values follow its documentation.
begin;

set local search_path = public, compat;
set local timezone = 'America/New_York';

do $$
begin
    -- days and weeks from Monday 2000-01-03, in UTC whatever the session's zone
    assert time_bucket('5 minutes', timestamptz '2026-03-01 10:13:59Z') = timestamptz '2026-03-01 10:10Z';
    assert time_bucket('1 day', timestamptz '2026-03-01 23:59Z') = timestamptz '2026-03-01Z';
    assert time_bucket('1 week', timestamptz '2026-11-22 12:00Z') = timestamptz '2026-11-16Z';
    assert time_bucket('1 week', timestamptz '1999-12-31Z') = timestamptz '1999-12-27Z';
    assert time_bucket('10 days', timestamp '2000-01-12 23:00') = timestamp '2000-01-03';
    assert time_bucket('1 week', date '2026-11-22') = date '2026-11-16';
    -- months and years from 2000-01-01
    assert time_bucket('1 month', timestamptz '2026-02-28 23:59Z') = timestamptz '2026-02-01Z';
    assert time_bucket('3 months', timestamptz '2026-06-30Z') = timestamptz '2026-04-01Z';
    assert time_bucket('5 months', timestamptz '1999-12-31Z') = timestamptz '1999-08-01Z';
    assert time_bucket('1 year', timestamp '1999-12-31') = timestamp '1999-01-01';
    assert time_bucket('2 years', date '2027-05-05') = date '2026-01-01';
    -- origin and offset
    assert time_bucket('1 week', timestamptz '2026-11-22 12:00Z', timestamptz '2000-01-02Z')
        = timestamptz '2026-11-22Z';
    assert time_bucket('5 minutes', timestamptz '2026-03-01 10:13Z', interval '2 minutes')
        = timestamptz '2026-03-01 10:12Z';
    assert time_bucket('1 month', timestamptz '2026-03-15Z', origin => timestamptz '2026-02-01Z')
        = timestamptz '2026-03-01Z';
    -- zones: Berlin's days begin at its own midnight, on both days of change too
    assert time_bucket('1 day', timestamptz '2026-03-29 12:00Z', 'Europe/Berlin')
        = timestamptz '2026-03-28 23:00Z';
    assert time_bucket('1 day', timestamptz '2026-03-30 12:00Z', 'Europe/Berlin')
        = timestamptz '2026-03-29 22:00Z';
    assert time_bucket('1 day', timestamptz '2026-10-25 23:30Z', 'Europe/Berlin')
        = timestamptz '2026-10-25 23:00Z';
    assert time_bucket('1 month', timestamptz '2026-03-31 22:30Z', timezone => 'Europe/Berlin')
        = timestamptz '2026-03-31 22:00Z';
    assert time_bucket('1 day', timestamptz '2026-07-01 05:00Z', 'Europe/Berlin', null, '6 hours')
        = timestamptz '2026-07-01 04:00Z';
    -- numbers
    assert time_bucket(10, 27) = 20 and time_bucket(10, -1) = -10 and time_bucket(10, 27, 5) = 25;
    assert time_bucket(10::bigint, -10::bigint) = -10;
    assert time_bucket('1 hour', null::timestamptz) is null;
    assert time_bucket('1 hour', timestamptz 'infinity') = timestamptz 'infinity';
    begin
        perform time_bucket('1 month 1 day', timestamptz '2026-03-31Z');
        assert false, 'months and days were mixed';
    exception when feature_not_supported then
        null;
    end;
    -- What has no end stays so, whatever the step.
    assert time_bucket('1 month', timestamptz 'infinity') = 'infinity';
    assert time_bucket('3 months', timestamp '-infinity') = '-infinity';
    assert time_bucket('1 month', date 'infinity') = 'infinity';
    assert time_bucket('1 day', timestamptz 'infinity') = 'infinity';
    assert time_bucket('1 month', null::timestamp) is null;
    assert time_bucket('1 week', date '2026-03-04', interval '2 days') = date '2026-03-04';
    assert pg_typeof(time_bucket('1 week', date '2026-03-04', interval '2 days')) = 'date'::regtype;
end
$$;

-- A TimescaleDB in public would win: ours is looked for last.
do $$
declare
    setting text;
begin
    for setting in
        select option
        from pg_db_role_setting s, unnest(s.setconfig) as option
        where s.setrole in ('server'::regrole, 'grafana_readonly'::regrole) and option like 'search_path=%'
    loop
        assert setting like '%, compat', setting;
    end loop;
    assert setting is not null;
end
$$;

rollback;
