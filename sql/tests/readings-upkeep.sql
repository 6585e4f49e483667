-- Keys go after their rows; the flow of workers adds up, and is forgotten in the end.
begin;

do $$
declare
    said record;
begin
    -- They are kept for ever, unless told.
    perform pgpulse.take_readings('test', '{ancient}', '{"time": "2000-01-01"}');
    delete from rows.reading_analytics where source_id = 'ancient';
    select * into said from pgpulse.upkeep_readings();
    assert exists (select from public.reading_keys where source_id = 'ancient');
    delete from public.reading_keys;
    update pgpulse.storage set keep = '1 year' where source = 'public.reading_analytics'::regclass;
    perform pgpulse.take_readings(
        'test', '{old,kept,new}', E'{"time": "2001-01-01"}\n{"time": "2001-06-01"}\n{"value": 1}'
    );
    select * into said from pgpulse.upkeep_readings();
    assert said.detail is null and not said.more;
    -- As retention does.
    delete from rows.reading_analytics where source_id = 'old';
    select * into said from pgpulse.upkeep_readings();
    assert said.detail like '1 keys %', said.detail;
    assert (select array_agg(source_id order by source_id) = '{kept,new}' from public.reading_keys);
    -- It comes again.
    assert pgpulse.take_readings('test', '{old}', '{"time": "2001-01-01"}') ->> 'taken' = '1';

    perform pgpulse.note_flow('test', 'a', read => 10, taken => 4, replaced => 1, backlog => 7, lag_seconds => 2);
    perform pgpulse.note_flow('test', 'b', read => 5, failed => 5);
    assert (
        select sum(read) = 15 and sum(taken) = 4 and sum(failed) = 5 from public.reading_flow where source = 'test'
    );
    assert (
        select worker = 'b' and backlog = 7 and last_taken is not null from public.reading_sources where source = 'test'
    );
    assert (select sum(taken) = 1 and sum(read) = 3 from live.readings where source = 'test');
    update public.reading_flow set "time" = "time" - interval '31 days';
    insert into public.sync_runs (worker, trigger, started) values
        ('gone', 'once', now() - interval '1 hour'), ('here', 'once', now() - interval '1 hour');
    assert pgpulse.hold_lease('etl/here', 'x', 60);
    insert into pgpulse.leases (lease, holder, until) values
        ('etl/old', 'x', now() - interval '2 days'), ('etl/late', 'x', now() - interval '2 hours');
    select * into said from pgpulse.upkeep_readings();
    assert not exists (select from public.reading_flow);
    assert (select array_agg(worker) = '{here}' from public.sync_runs where ended is null);
    assert (select error = 'Its worker has gone' from public.sync_runs where worker = 'gone');
    assert (select array_agg(lease order by lease) = '{etl/here,etl/late}' from pgpulse.leases where lease like 'etl/%');
end
$$;

rollback;
