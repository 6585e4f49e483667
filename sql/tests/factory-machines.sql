-- machines is the present, machine_history keeps what was; what cannot be is refused.
begin;

set local timezone = 'UTC';

create function pg_temp.fault(command text) returns text
language plpgsql
as $$
begin
    execute command;
    return null;
exception when others then
    return sqlerrm;
end
$$;

insert into machines (id, name, area, status, oee, last_updated) values
    ('M01', 'Press 1', 'Molding', 'idle', 50, '2026-03-01 00:00Z'),
    ('M02', 'It''s 2', 'Molding', 'running', null, '2026-03-01 00:00Z');

do $do$
declare
    told int;
begin
    -- signs of life leave no trace, a change does; upserts are as good
    insert into machines (id, name, area, status, oee, last_updated)
    values ('M01', 'Press 1', 'Molding', 'idle', 50, '2026-03-01 00:10Z')
    on conflict (id) do update set status = excluded.status, last_updated = excluded.last_updated;
    update machines set status = 'running', last_updated = '2026-03-01 01:00Z' where id = 'M01';
    update machines set oee = 60, last_updated = '2026-03-01 02:00Z' where id = 'M01';
    update machines set status = 'error', last_updated = '2026-03-01 03:00Z' where id = 'M01';
    select count(*) into told from machine_history where machine_id = 'M01';
    assert told = 4, told;
    assert (select "timestamp" = now() - interval '30 seconds' from machines where id = 'M01');
    assert (select last_updated = '2026-03-01 03:00Z' from machines where id = 'M01');

    -- states are cut to the range, OEE does not part them, the one before the range counts
    assert (
        select array_agg(concat_ws(' ', status, to_char(started_at, 'HH24:MI'), to_char(ended_at, 'HH24:MI')))
        from pgpulse.machine_state_at('2026-03-01 00:30Z', '2026-03-01 04:00Z', '{M01}')
    ) = '{idle 00:30 01:00,running 01:00 03:00,error 03:00 04:00}';
    assert (
        select array_agg(concat_ws(' ', machine_id, status, seconds))
        from pgpulse.machine_time_in_state('2026-03-01 00:30Z', '2026-03-01 04:00Z')
    ) = '{M01 error 3600,M01 idle 1800,M01 running 7200,M02 running 12600}';
    assert (
        select array_agg(concat_ws(' ', running, idle, error, maintenance) order by time)
        from pgpulse.machine_counts('2026-03-01 00:00Z', '2026-03-01 04:00Z', points => 4)
    ) = '{2 0 0 0,2 0 0 0,1 0 1 0,1 0 1 0}';
    -- nothing before the first, nothing after now, nothing in a range that is none
    assert not exists (select from pgpulse.machine_state_at('2026-02-01Z', '2026-02-28Z'));
    assert not exists (select from pgpulse.machine_state_at('2100-01-01Z', '2100-02-01Z'));
    assert not exists (select from pgpulse.machine_state_at('2026-03-02Z', '2026-03-01Z'));
    assert not exists (select from pgpulse.machine_state_at('2026-03-01Z', '2026-03-02Z', '{nix}'));
    assert not exists (select from pgpulse.machine_counts('2026-03-02Z', '2026-03-01Z'));
    assert not exists (select from pgpulse.machine_time_in_state('2026-02-01Z', '2026-02-28Z'));

    -- without last_updated: now
    update machines set status = 'maintenance' where id = 'M01';
    assert (select now() - last_updated < interval '1 minute' from machines where id = 'M01');
    assert (select max("timestamp") > now() - interval '1 minute' from machine_history where machine_id = 'M01');

    -- what comes late is history, and leaves the present as it is; but a clock that went ahead does not stop it
    update machines set status = 'idle', oee = 10, last_updated = '2026-03-01 02:30Z' where id = 'M01';
    assert (
        select status = 'maintenance' and now() - last_updated < interval '1 minute' from machines where id = 'M01'
    );
    insert into machines (id, status, last_updated) values ('M01', 'idle', '2026-03-01 02:40Z')
    on conflict (id) do update set status = excluded.status, last_updated = excluded.last_updated;
    assert (select status = 'maintenance' from machines where id = 'M01');
    assert (
        select array_agg(concat_ws(' ', status, to_char(started_at, 'HH24:MI'), to_char(ended_at, 'HH24:MI')))
        from pgpulse.machine_state_at('2026-03-01 01:00Z', '2026-03-01 04:00Z', '{M01}')
    ) = '{running 01:00 02:30,idle 02:30 03:00,error 03:00 04:00}';
    insert into machines (id, status, last_updated) values ('M04', 'idle', '2199-01-01Z');
    update machines set status = 'error', last_updated = now() where id = 'M04';
    assert (select status = 'error' from machines where id = 'M04');
    delete from machines where id = 'M04';

    -- with another id it is another machine, and the one of before is gone
    insert into machines (id, status, last_updated) values ('M05', 'running', '2026-03-01Z');
    update machines set id = 'M06', last_updated = '2026-03-02Z' where id = 'M05';
    assert (
        select array_agg(
            concat_ws(' ', machine_id, coalesce(status, 'gone'), to_char("timestamp", 'DD'))
            order by machine_id, "timestamp"
        )
        from machine_history
        where machine_id in ('M05', 'M06')
    ) = '{M05 running 01,M05 gone 02,M06 running 02}';

    -- a machine that goes leaves its history, and no state from then on
    delete from machines where id = 'M02';
    assert (
        select array_agg(coalesce(status, 'gone') order by "timestamp")
        from machine_history where machine_id = 'M02'
    ) = '{running,gone}';
    assert (
        select array_agg(name || ' ' || status)
        from pgpulse.machine_state_at('2026-03-01Z', 'infinity', '{M02}')
    ) = '{It''s 2 running}';

    assert pg_temp.fault($$update machines set status = 'Running'$$)
        like '%violates check constraint "status is running, idle, error or maintenance"';
    assert pg_temp.fault($$insert into machines (id, plant) values ('M01', 'north')
        on conflict (id) do update set plant = excluded.plant$$)
        = 'Cannot give machine "M01" to plant "north": it is one of plant "main"';
    assert pg_temp.fault($$insert into machines (id) values (null)$$) like '%null value in column "id"%';
    assert pg_temp.fault($$insert into alarms (machine_id, severity, code) values ('M01', 'bad', 'X')$$)
        like '%violates check constraint "severity is info, warning or critical"';

    -- measurements of machines that nobody knows are kept, and told
    insert into machine_metrics (machine_id, metric_type, value) values ('X9', 'temperature', 1);
    assert (select array_agg(machine_id || ' ' || points) from unknown_machines) = '{X9 1}';
    insert into machines (id) values ('X9');
    assert not exists (select from unknown_machines);
end
$do$;

-- More changes than points: states at regular moments, no more rows than that.
insert into machine_history (machine_id, "timestamp", status)
select 'M03', '2026-01-01Z'::timestamptz + i * interval '10 minutes', (array['running', 'error'])[1 + i % 2]
from generate_series(0, 9999) i;

do $do$
declare
    told record;
begin
    select count(*), min(started_at) as begins, max(ended_at) as ends,
        bool_and(started_at < ended_at) as forward
    into told
    from pgpulse.machine_state_at('2026-01-02Z', '2026-03-01Z', '{M03}', 100);
    assert told.count between 2 and 100 and told.forward, told;
    assert told.begins = '2026-01-02Z' and told.ends = '2026-03-01Z', told;
    select count(*) into told from pgpulse.machine_state_at('2026-01-02Z', '2026-01-02 12:00Z', '{M03}', 100);
    assert told.count = 72, told;
    select sum(seconds) as sum into told from pgpulse.machine_time_in_state('2026-01-02Z', '2026-03-01Z', '{M03}');
    assert told.sum = 58 * 86400, told;
end
$do$;

-- OEE is no integer where the columns that others made are.
do $do$
declare
    query text := rtrim(pg_get_viewdef('machine_oee_hourly'), ';');
    told text;
begin
    create temp table production (
        machine_id text, hour timestamptz, planned_seconds int, run_seconds int, ideal_cycle_seconds int,
        total_count int, good_count int
    );
    insert into production values ('M01', '2026-03-01Z', 3600, 2400, 3, 700, 699);
    execute format(
        $q$select concat_ws(' ', round(availability::numeric, 2), round(performance::numeric, 2),
            round(quality::numeric, 2), round(oee::numeric, 2)) from (%s) as oee$q$, query
    ) into told;
    assert told = '66.67 87.50 99.86 58.25', told;
end
$do$;

-- All at once are gone as well.
truncate machine_states;
do $do$
begin
    assert exists (select from machine_history where machine_id = 'M01');
    assert not exists (
        select from pgpulse.machine_state_at(clock_timestamp(), clock_timestamp() + interval '1 hour', '{M01,M06}')
    );
    assert (
        select bool_and(status is null)
        from (select distinct on (machine_id) * from machine_history where machine_id in ('M01', 'M06')
            order by machine_id, "timestamp" desc) as last
    );
end
$do$;

rollback;
