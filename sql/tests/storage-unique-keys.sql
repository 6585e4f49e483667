-- Unique keys do not see packed rows: repeats of these are taken, and left out when they come back.
begin;

create table samples (machine text, at timestamptz, value float8, primary key (machine, at));
create unique index samples_values on samples (value, at) where value < 5;
create index samples_at on samples (at);
select pgpulse.add_storage('samples', 'at', '{machine}', pack_after => '2 days');
insert into samples
select 'm' || m, date_trunc('hour', now()) - interval '9 days' + i * interval '1 hour', m + 10
from generate_series(1, 3) m, generate_series(0, 99) i;

create function pg_temp.pack() returns bigint
language plpgsql
as $$
begin
    while (select bool_or(more) from pgpulse.upkeep_storage()) loop
        null;
    end loop;
    return (select sum(chunk$rows) from packed.samples);
end
$$;

do $$
declare
    n bigint;
begin
    assert pg_temp.pack() = 300;
    -- A writer that repeats itself, before its rows are packed as well, and after.
    insert into samples select 'm1', at, 77 from samples where machine = 'm1';
    assert (select count(*) from samples) = 400;
    assert pg_temp.pack() = 400;
    insert into samples select 'm2', at, 77 from samples where machine = 'm2';
    assert pgpulse.unpack('samples', now() - interval '30 days', now() - interval '7 days', '0') between 1 and 299;
    assert pgpulse.unpack('samples', now() - interval '30 days', now() - interval '7 days', '0') = 0;
    -- What is not packed stays.
    assert (
        select count(*) filter (where value = 77) > 20
        from samples
        where machine = 'm2' and at < now() - interval '7 days'
    );
    update pgpulse.storage set hold_until = null;
    select count(*) into n from samples;
    assert n < 500;
    assert pg_temp.pack() = n;
    insert into samples select 'm3', at, 77 from samples where machine = 'm3';
    perform pgpulse.drop_storage('samples');
    assert (select count(*) from samples) = 300, (select count(*) from samples);
    assert (select bool_and(value = 77) from samples where machine = 'm3');
    assert (select count(*) from pg_index where indrelid = 'samples'::regclass) = 3;
    assert to_regclass('packed.samples') is null;
end
$$;

rollback;
