-- The coarse part of a window comes from a rollup where the view is a choice of its table's columns.
begin;

create table samples (at timestamptz not null, host text, zone int, value float8, count int);
create index on samples (host, at);
insert into samples
select t, h, 1, extract(epoch from t) + case h when 'b' then 0.5 else 0 end, 7
from generate_series(now() - interval '2 hours', now(), '9.7 seconds') t, unnest(array['a', 'b']) h;

create view live.plain as select at as "Time", host as "Host", value, count from samples;
select pgpulse.add_stream('plain', history => '1 hour', step => '2 minutes', rows => 100);
create view live.shifted as select at, host, value + 1 as value from samples;
select pgpulse.add_stream('shifted', history => '1 hour', step => '2 minutes', rows => 100);
create view live.some as select at, host, value from samples where zone = 1;
select pgpulse.add_stream('some', history => '1 hour', step => '2 minutes', rows => 100);
create view live.mixed as select at, value from samples;
select pgpulse.add_stream('mixed', history => '1 hour', step => '2 minutes', rows => 100);
create view live.odd as select at, host, value from samples;
select pgpulse.add_stream('odd', history => '1 hour', step => '90 seconds', rows => 100);
create view live.split as select at, host, value from samples;
select pgpulse.add_stream('split', history => '1 hour', step => '2 minutes', rows => 100, split => 'host');

create function pg_temp.coarse(asked text)
returns table (ms float8, host text, field float8)
language plpgsql
as $$
begin
    return query execute (
        select format(
            'select ms, "Host", value from (%s) as rows (ms, "Host", count, value, fine) where not fine',
            replace(read_all, '$1', '40')
        )
        from pgpulse.stream_plans() p
        where p.stream = asked
    );
end
$$;

create temp table before as select * from pg_temp.coarse('plain');
select pgpulse.add_rollup('samples', 'at', '{value,count}', '{host}', name => 'of_hosts');

do $$
begin
    assert (
        select array_agg(stream order by stream) = '{plain,split}'
        from pgpulse.stream_plans()
        where read_all like '%rollup.of_hosts%'
    );
    -- The same window as without it, rolled up or not.
    for i in 1..2 loop
        assert (select count(*) = 60 from before);
        assert not exists (select * from pg_temp.coarse('plain') except table before);
        assert not exists (table before except select * from pg_temp.coarse('plain'));
        perform pgpulse.refresh_rollup(r, txid_current() + 1) from pgpulse.rollups r where rollup = 'of_hosts';
    end loop;
    -- A day is too short for minutes that are kept for a day.
    perform pgpulse.keep_rollup('of_hosts', '1m', '1 day');
    perform pgpulse.add_stream('plain', history => '2 days', step => '30 minutes', rows => 100);
    assert not exists (
        select from pgpulse.stream_plans() where stream = 'plain' and read_all like '%rollup.of_hosts%'
    );
    perform pgpulse.add_stream('plain', history => '2 days', step => '1 hour', rows => 100);
    assert (
        select read_all like '%step = interval ''01:00:00''%' from pgpulse.stream_plans() where stream = 'plain'
    );
    perform pgpulse.drop_rollup('of_hosts');
    assert not exists (select from pgpulse.stream_plans() where read_all like '%rollup.of_hosts%');
end
$$;

rollback;
