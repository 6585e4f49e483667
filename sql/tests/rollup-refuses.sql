-- What cannot be rolled up is refused with the reason, and nothing is left behind.
begin;

create table samples (doc jsonb, value int, at timestamptz, "local" timestamp);

do $$
begin
    assert pg_temp.refusal($q$select pgpulse.add_rollup('samples', 'local', array['value'])$q$)
        like '%has no timestamptz column "local"';
    assert pg_temp.refusal($q$select pgpulse.add_rollup('live.metrics', 'time', array['value'], name => 'x')$q$)
        like '%is no table of its own';
    assert pg_temp.refusal($q$select pgpulse.add_rollup('samples', 'at', array['value'], name => 'A b')$q$)
        like '%a name has a-z%';
    assert pg_temp.refusal($q$select pgpulse.add_rollup('samples', 'at', array[]::text[])$q$)
        like '%it needs measures%';
    assert pg_temp.refusal($q$select pgpulse.add_rollup('samples', 'at', array['doc->''a'' + 1'])$q$)
        like '%cannot call a measure%';
    assert pg_temp.refusal($q$select pgpulse.add_rollup('samples', 'at', array['absent'])$q$)
        like '%"absent" does not exist';
    assert pg_temp.refusal($q$select pgpulse.drop_rollup('samples')$q$) like '%none of that name';
    assert not exists (select from pgpulse.rollups where rollup = 'samples');
    assert not exists (select from pg_class where relnamespace = 'rollup'::regnamespace and relname like 'samples%');

    -- JSON paths as keys and measures; the same call again changes nothing, another is refused.
    for i in 1..2 loop
        perform pgpulse.add_rollup('samples', 'at', array[$q$doc->'cpu'->>'user' as cpu$q$, 'value'],
            array[$q$doc->>'host' as host$q$]);
    end loop;
    assert pg_temp.refusal($q$select pgpulse.add_rollup('samples', 'at', array['value'])$q$)
        like 'Cannot change rollup%';
    insert into samples values ('{"host": "h", "cpu": {"user": 1.5}}', 1, '2026-01-01Z'), ('{}', 2, '2026-01-01Z');
    assert (select cpu_avg from rollup.samples where step = '1 day' and host = 'h') = 1.5;
    assert (select cpu_count = 0 and points = 1 from rollup.samples where step = '1 day' and host is null);
end
$$;

rollback;
