-- Sinks: what cannot be one is refused with the reason; pieces are planned, read and acknowledged
-- once; the column tx goes with the last that needs it.
begin;

create table samples (id int, host text, value float8, at timestamptz, "local" timestamp);
create table parts (at timestamptz, value float8) partition by range (at);
create table part_1 partition of parts default;
insert into samples values (1, 'a b', 1.5, '2026-01-01Z'), (2, null, null, '2026-01-01Z');

do $$
begin
    assert pg_temp.refusal($q$select pgpulse.add_sink('samples', 'local', '{}', '{value}')$q$)
        like '%has no timestamptz column "local"';
    assert pg_temp.refusal($q$select pgpulse.add_sink('live.metrics', 'time', '{}', '{value}')$q$)
        like '%is no table of its own';
    assert pg_temp.refusal($q$select pgpulse.add_sink('part_1', 'at', '{}', '{value}')$q$)
        like '%is no table of its own';
    assert pg_temp.refusal($q$select pgpulse.add_sink('samples', 'at', '{}', '{value}', name => 'a b')$q$)
        like '%a name has A-Z%';
    assert pg_temp.refusal($q$select pgpulse.add_sink('samples', 'at', '{host}', '{}')$q$)
        like '%it needs fields';
    assert pg_temp.refusal($q$select pgpulse.add_sink('samples', 'at', '{host}', '{host}')$q$)
        like '%cannot call a field "host"';
    assert pg_temp.refusal($q$select pgpulse.add_sink('samples', 'at', '{}', array['value as time'])$q$)
        like '%cannot call a field "time"';
    assert pg_temp.refusal($q$select pgpulse.add_sink('samples', 'at', '{}', '{absent}')$q$)
        like '%"absent" does not exist';
    assert pg_temp.refusal($q$select pgpulse.drop_sink('samples')$q$) like '%none of that name';
    assert not exists (select from pgpulse.sinks);
    assert not exists (select from pg_attribute where attrelid = 'samples'::regclass and attname = 'tx');
end
$$;

-- The same call again changes nothing.
select pgpulse.add_sink('samples', 'at', '{host}', array['value', 'id + 1 as next']);
select pgpulse.add_sink('samples', 'at', '{host}', array['value', 'id + 1 as next']);

do $$
declare
    p record;
    lines text[];
begin
    assert pgpulse.sink_position('samples') is null, 'nobody has begun yet';
    select * into p from pgpulse.plan_sink('samples');
    assert (p.waiting, p.restarted) = (2, false);
    assert (select piece from pgpulse.plan_sink('samples')) = p.piece, 'it is not acknowledged yet';
    assert pgpulse.read_sink('samples', p.piece + 1) is null, 'another piece';
    execute 'create temp table taken (line text)';
    execute (select 'insert into taken select line from (' || query || ') as q' from pgpulse.sinks);
    select array_agg(line order by line) into lines from taken;
    assert lines = array[
        'samples next=3i 1767225600000000000',
        'samples,host=a\ b next=2i,value=1.5 1767225600000000000'
    ], lines::text;
    assert pgpulse.ack_sink('samples', p.piece, 2);
    assert pgpulse.ack_sink('samples', p.piece, 2) is null, 'only once';
    assert (select rows_sent from pgpulse.sinks) = 2;
    assert pgpulse.sink_position('samples') is not null;
    assert not exists (select from pgpulse.plan_sink('absent'));
end
$$;

-- A rollup of the same table needs the column tx as well.
select pgpulse.add_rollup('samples', 'at', '{value}');
select pgpulse.drop_sink('samples');

do $$
begin
    assert exists (select from pg_attribute where attrelid = 'samples'::regclass and attname = 'tx');
end
$$;

-- The first one comes by itself, unless the table is somebody's own.
do $$
declare
    said text := obj_description('machine_metrics'::regclass, 'pg_class');
begin
    comment on view machine_metrics is 'Ours';
    assert pgpulse.first_sink() is null and not exists (select from pgpulse.sinks);
    execute format('comment on view machine_metrics is %L', said);
    assert pgpulse.first_sink() = 'machine_metrics';
    assert (select sink from pgpulse.sinks) = 'machine_metrics';
end
$$;

-- One that nobody serves holds rows back, and upkeep says so.
do $$
begin
    insert into machine_metrics (machine_id, metric_type, value) values ('M1', 'speed', 1);
    assert not exists (select from pgpulse.upkeep() where what = 'sink');
    update pgpulse.sinks set updated_at = now() - interval '2 hours';
    assert (select fault like '%drop_sink(''machine_metrics'')' from pgpulse.upkeep() where what = 'sink');
    perform pgpulse.drop_sink('machine_metrics');
    assert not exists (select from pgpulse.upkeep() where what = 'sink');
end
$$;

rollback;
