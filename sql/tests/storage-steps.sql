-- A call does one thing for one table and says so: its locks are not held while more is done.
begin;

create table first (at timestamptz not null, value float8) partition by range (at);
create table second (at timestamptz not null, value float8) partition by range (at);
do $$
declare
    day timestamptz := date_trunc('day', now(), 'UTC');
    name text;
begin
    foreach name in array '{first,second}'::text[] loop
        for ago in 8..10 loop
            execute format(
                'create table %I partition of %I for values from (%L) to (%L)',
                name || ago, name, day - ago * interval '1 day', day - (ago - 1) * interval '1 day'
            );
        end loop;
        perform pgpulse.add_storage(name::regclass, 'at', pack_after => '2 days', keep => '9 days');
        execute format(
            'insert into rows.%I select %L::timestamptz + i * interval ''1 min'', i
            from generate_series(1, 99) i',
            name, day - interval '8 days'
        );
    end loop;
    update pgpulse.storage set ahead = '6 days' where source in ('first'::regclass, 'second'::regclass);
end
$$;

do $$
declare
    call record;
    done text[];
    calls int := 0;
begin
    loop
        select
            array_agg(format('%s %s', u."table", u.action)) as actions,
            count(*) as n,
            bool_or(u.more) as more,
            string_agg(u.fault, ', ') as fault
        into call
        from pgpulse.upkeep_storage() u
        where u."table" in ('first'::regclass, 'second'::regclass);
        assert call.fault is null, call.fault;
        assert call.n <= 1, call.actions;
        done := done || call.actions;
        calls := calls + 1;
        exit when calls > 100 or call.n = 0 and not exists (select from pgpulse.upkeep_storage() u where u.more);
    end loop;
    assert done @> array[
        'first make', 'second make', 'first drop old', 'second drop old', 'first pack', 'second pack'
    ], done::text;
    assert (select sum(chunk$rows) from packed.first) = 99 and (select sum(chunk$rows) from packed.second) = 99;
end
$$;

rollback;
