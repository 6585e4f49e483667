-- The step suits the range, and only the tables of that step are planned.
begin;

create table samples (machine text not null, value float8, at timestamptz not null);
select pgpulse.add_rollup('samples', 'at', measures => array['value'], keys => array['machine']);

create function pg_temp.plan(query text) returns text
language plpgsql
as $$
declare
    line text;
    lines text := '';
begin
    for line in execute 'explain (costs off) ' || query loop
        lines := lines || line || E'\n';
    end loop;
    return lines;
end
$$;

do $$
declare
    plan text;
begin
    assert pgpulse.step('2026-01-01 00:00Z', '2026-01-01 00:05Z') = '0';
    assert pgpulse.step('2026-01-01 00:00Z', '2026-01-02 00:00Z') = '1 minute';
    assert pgpulse.step('2026-01-01 00:00Z', '2026-01-08 00:00Z') = '1 hour';
    assert pgpulse.step('2026-01-01 00:00Z', '2026-02-01 00:00Z') = '1 hour';
    assert pgpulse.step('2026-01-01 00:00Z', '2026-02-01 00:00Z', 500) = '1 day';
    assert pgpulse.step('2016-01-01 00:00Z', '2026-02-01 00:00Z') = '1 day';

    set local enable_seqscan = off;
    plan := pg_temp.plan($q$select time, value_avg from rollup.samples
        where step = pgpulse.step('2026-01-01T00:00:00Z', '2026-01-08T00:00:00Z')
            and time between '2026-01-01T00:00:00Z' and '2026-01-08T00:00:00Z'
            and machine in ('a', 'b')$q$);
    assert plan like '%samples_1h%', plan;
    assert plan !~ 'on samples_1m|on samples_1d', plan;
    -- PostgreSQL 15 to 17 leave the empty shell of one branch
    assert plan !~ 'on samples ' or plan like '%One-Time Filter: false%', plan;
    assert plan ~ 'Index Cond: .*machine.*bucket <', plan;
end
$$;

rollback;
