-- Queries as people's factory dashboards send them, macros expanded: each finds what is true.
begin;

set local search_path = public, compat;
set local timezone = 'UTC';

insert into machines (id, name, area, status, oee, availability, performance, quality) values
    ('M01', 'Press 1', 'Molding', 'running', 72, 90, 82, 97.5),
    ('M02', 'O''Neill''s "press" 2', 'Molding', 'idle', 55, 70, 80, 98),
    ('M03', 'Robot 1', 'Assembly', 'error', 20, 30, 70, 95);

-- Three hours every 30 s: M01 at 60, M02 at 90, zones 1 to 4 at 50 + zone; and three bad readings.
insert into machine_metrics (machine_id, metric_type, value, "timestamp", zone_number, target_value)
select m.id, s.metric_type, s.value, t, s.zone_number, s.target_value
from (values ('M01', 60.0), ('M02', 90.0), ('M03', 30.0)) as m (id, warm),
    generate_series(date_trunc('hour', now()) - interval '2 hours', now(), '30 seconds') as t,
    lateral (
        select 'temperature', warm, null::int, 65.0
        union all
        select 'multi_zone_temp', 50 + zone, zone, 50.0 + zone
        from generate_series(1, 4) zone
        union all
        select 'vibration', 2, null, null
    ) as s (metric_type, value, zone_number, target_value);
insert into machine_metrics (machine_id, metric_type, value, "timestamp")
select 'M01', 'temperature', value, date_trunc('hour', now()) - interval '2 hours'
from unnest('{NaN,1e308,-Infinity}'::float8[]) value;

insert into energy_consumption (machine_id, hour, energy_kwh)
select id, date_trunc('hour', now()) - h * interval '1 hour', 10 + h
from machines, generate_series(0, 2) h;
insert into production (
    machine_id, hour, planned_seconds, run_seconds, ideal_cycle_seconds, total_count, good_count
)
select id, date_trunc('hour', now()) - h * interval '1 hour', 3600, 2700, 10, 243, 240
from machines, generate_series(0, 2) h;
insert into alarms (machine_id, severity, code, message, raised_at) values
    ('M02', 'critical', 'TEMPERATURE_HIGH', 'Press 2: overheating', now() - interval '10 minutes');
insert into downtime (machine_id, reason, started_at, ended_at) values
    ('M03', 'Material jam', now() - interval '50 minutes', now() - interval '40 minutes'),
    ('M03', 'Tool wear', now() - interval '30 minutes', null);

-- what the query gives, as text
create function pg_temp.rows(query text) returns jsonb
language plpgsql
as $$
declare
    result jsonb;
begin
    execute format('select coalesce(jsonb_agg(q), ''[]'') from (%s) q', query) into result;
    return result;
end
$$;

set local role grafana_readonly;

do $do$
declare
    found jsonb;
    hours int := 3;
begin
    -- variables
    assert pg_temp.rows($$select distinct area from machines order by 1$$)
        = '[{"area": "Assembly"}, {"area": "Molding"}]';
    assert pg_temp.rows($$select id as __value, name as __text from machines
        where area in ('Molding') order by 1$$)
        = '[{"__value": "M01", "__text": "Press 1"}, {"__value": "M02", "__text": "O''Neill''s \"press\" 2"}]';
    assert pg_temp.rows($$select distinct metric_type from machine_metrics order by 1$$)
        = '[{"metric_type": "multi_zone_temp"}, {"metric_type": "temperature"}, {"metric_type": "vibration"}]';

    -- temperature with its target, one machine, five minutes
    found := pg_temp.rows($$
        select time_bucket('5 minutes', "timestamp") as time, avg(value) as temperature,
            max(target_value) as target
        from machine_metrics
        where machine_id = 'M02'
            and metric_type = 'temperature'
            and "timestamp" between now() - interval '1 hour' and now()
        group by 1
        order by 1$$);
    assert jsonb_array_length(found) between 12 and 13, found;
    assert found #>> '{3,temperature}' = '90' and found #>> '{3,target}' = '65', found;

    -- many machines, many metrics
    found := pg_temp.rows($$
        select floor(extract(epoch from "timestamp") / 60) * 60 as "time", machine_id as metric, avg(value)
        from machine_metrics
        where "timestamp" between now() - interval '5 minutes' and now()
            and machine_id in ('M01','M03')
            and metric_type in ('temperature','vibration')
        group by 1, 2
        order by 1$$);
    assert jsonb_array_length(found) between 10 and 12, found;

    -- the newest 10,000 points
    found := pg_temp.rows($$
        select count(*), min(time) < max(time) as spread
        from (
            select "timestamp" as time, value
            from machine_metrics
            where machine_id = 'M01' and metric_type = 'temperature'
            order by "timestamp" desc
            limit 10000
        ) newest$$);
    assert (found #>> '{0,count}')::int between 240 and 370, found;
    assert found #>> '{0,spread}' = 'true', found;

    -- zones side by side
    found := pg_temp.rows($$
        select
            "timestamp" as time,
            max(case when zone_number = 1 then value end) as zone_1,
            max(case when zone_number = 2 then value end) as zone_2,
            max(case when zone_number = 3 then value end) as zone_3,
            max(case when zone_number = 4 then value end) as zone_4
        from machine_metrics
        where machine_id = 'M01'
            and metric_type = 'multi_zone_temp'
            and "timestamp" between now() - interval '5 minutes' and now()
        group by "timestamp"
        order by "timestamp"$$);
    assert jsonb_array_length(found) between 9 and 11, found;
    assert found #> '{0}' @> '{"zone_1": 51, "zone_2": 52, "zone_3": 53, "zone_4": 54}', found;

    -- machines by status: the present state is in any range that ends now
    found := pg_temp.rows($$
        select
            count(*) filter (where status = 'running') as running,
            count(*) filter (where status = 'idle') as idle,
            count(*) filter (where status = 'error') as error
        from machines
        where "timestamp" between now() - interval '5 minutes' and now()$$);
    assert found = '[{"running": 1, "idle": 1, "error": 1}]', found;
    -- by last_updated as well
    found := pg_temp.rows($$
        select status, count(*) from machines where last_updated >= now() - interval '1 hour'
        group by status order by status$$);
    assert jsonb_array_length(found) = 3, found;

    -- OEE from machines, in a range, and its trend from history and by the hour
    found := pg_temp.rows($$
        select "timestamp" as time, oee, availability, performance, quality
        from machines
        where id = 'M01' and "timestamp" between now() - interval '1 hour' and now()$$);
    assert jsonb_array_length(found) = 1 and found #>> '{0,oee}' = '72', found;
    found := pg_temp.rows($$
        select time_bucket('1 hour', "timestamp") as time, avg(oee) as oee
        from machine_history
        where machine_id in ('M01','M02') and "timestamp" between now() - interval '1 day' and now()
        group by 1$$);
    assert found #>> '{0,oee}' = '63.5', found;
    found := pg_temp.rows($$
        select hour as time, round(oee) as oee, availability, performance, round(quality) as quality
        from machine_oee_hourly
        where area = 'Molding' and hour between now() - interval '1 day' and now()
        order by 1$$);
    assert jsonb_array_length(found) = 6, found;
    assert found #> '{0}' @> '{"oee": 67, "availability": 75, "performance": 90, "quality": 99}', found;

    -- energy an hour
    found := pg_temp.rows($$
        select date_trunc('hour', hour) as time, sum(energy_kwh) as kwh
        from energy_consumption
        where machine_id in ('M01','M02','M03') and hour between now() - interval '6 hours' and now()
        group by 1
        order by 1$$);
    assert found #>> '{0,kwh}' = '36' and found #>> '{2,kwh}' = '30', found;

    -- by hour: bad readings spoil nothing, zones are together, the present hour is there
    found := pg_temp.rows($$
        select hour, avg_value, min_value, max_value, point_count
        from machine_metrics_hourly
        where machine_id = 'M01' and metric_type = 'temperature'
            and hour between now() - interval '1 day' and now()
        order by hour$$);
    assert jsonb_array_length(found) = hours, found;
    assert found #> '{0}' @> '{"avg_value": 60, "min_value": 60, "max_value": 60, "point_count": 120}', found;
    assert found #>> '{2,max_value}' = '60', found;
    found := pg_temp.rows($$
        select date_trunc('day', hour) as day, metric_type, sum(avg_value * point_count) / sum(point_count) as avg
        from machine_metrics_hourly
        where machine_id in ('M01') and metric_type in ('multi_zone_temp') and hour > now() - interval '1 year'
        group by 1, 2$$);
    assert found #>> '{0,avg}' = '52.5', found;

    -- the alert: mean over five minutes of each machine
    found := pg_temp.rows($$
        select m.name, avg(t.value) as mean
        from machine_metrics t
        join machines m on m.id = t.machine_id
        where t.metric_type = 'temperature' and t."timestamp" > now() - interval '5 minutes'
            and t.value < 'Infinity' and t.value < 1e300
        group by 1
        having avg(t.value) > 85$$);
    assert found = '[{"name": "O''Neill''s \"press\" 2", "mean": 90}]', found;

    -- annotations, and where the time went
    found := pg_temp.rows($$
        select raised_at as time, cleared_at as "timeEnd", message as text, severity as tags
        from alarms
        where machine_id in ('M02') and raised_at between now() - interval '1 hour' and now()$$);
    assert found #>> '{0,text}' = 'Press 2: overheating', found;
    found := pg_temp.rows($$
        select reason, sum(extract(epoch from coalesce(ended_at, now()) - started_at) / 60)::int as minutes
        from downtime
        where started_at between now() - interval '1 day' and now()
        group by 1
        order by 2 desc$$);
    assert found = '[{"reason": "Tool wear", "minutes": 30}, {"reason": "Material jam", "minutes": 10}]', found;

    -- rollups of energy and production
    assert pg_temp.rows($$
        select sum(energy_kwh_sum) as kwh from rollup.energy_consumption
        where step = '1 day' and time > now() - interval '1 year'$$) = '[{"kwh": 99}]';
    found := pg_temp.rows($$
        select round(100 * sum(good_seconds_sum) / sum(planned_seconds_sum)) as oee from rollup.production
        where step = pgpulse.step(now() - interval '1 year', now()) and time > now() - interval '1 year'
            and machine_id = 'M03'$$);
    assert found = '[{"oee": 67}]', found;
end
$do$;

rollback;
