-- The coarse part of a window holds, at each step, the newest value of that moment for each label.
begin;

create table samples (at timestamptz, host text, value float8);
create index on samples (at);
insert into samples
select t, h, extract(epoch from t) + case h when 'b' then 0.5 else 0 end
from generate_series(now() - interval '2 hours', now(), '10 seconds') t, unnest(array['a', 'b']) h;
insert into samples values (now() + interval '1 hour', 'a', -1);

create view live.graded as select at, host, value from samples;
select pgpulse.add_stream('graded', history => '1 hour', step => '1 minute', rows => 100);

create function pg_temp.window(asked int)
returns table (ms float8, host text, value float8, fine boolean)
language plpgsql
as $$
begin
    return query execute (
        select replace(read_all, '$1', asked::text) from pgpulse.stream_plans() where stream = 'graded'
    );
end
$$;

do $$
begin
    assert (select coarse_rows = 60 and rows = 100 from pgpulse.stream_plans() where stream = 'graded');
    -- 60 grid points for two hosts, and the 80 newest rows
    assert (select count(*) = 120 from pg_temp.window(80) where not fine);
    assert (select count(*) = 80 from pg_temp.window(80) where fine);
    -- rows ahead of their time wait
    assert (select max(ms) <= extract(epoch from now()) * 1000 from pg_temp.window(80));
    assert (
        select bool_and(w.value = (
            select s.value
            from samples s
            where s.host = w.host and s.at <= to_timestamp(w.ms / 1000)
            order by s.at desc
            limit 1
        ))
        from pg_temp.window(80) w
        where not w.fine
    );
    assert (select count(*) = 60 from (select distinct ms from pg_temp.window(80) where not fine) d);
end
$$;

rollback;
