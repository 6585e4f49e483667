-- A query opens what it needs: recent times leave all that is packed out of the plan.
begin;

create table samples (machine text, value float8, at timestamptz not null, tx bigint default txid_current());
create temp table history as
select 'm' || m as machine, m::float8 as value, at
from generate_series(now() - interval '700 days', now(), '1 day') at, generate_series(1, 3) m;
insert into samples select * from history where at > now() - interval '20 days';
delete from history where at > now() - interval '20 days';
select pgpulse.add_storage('samples', 'at', '{machine}');
select pgpulse.pack_from('samples', 'history');

-- How many chunks' days and partitions a plan reads, planned with these literals.
create function pg_temp.reads(condition text, out packed_days int, out partitions int)
language plpgsql
as $$
declare
    plan jsonb;
begin
    execute 'explain (format json) select * from samples where ' || condition into plan;
    select
        count(*) filter (where node ->> 'Relation Name' = 'samples'),
        count(*) filter (where node ->> 'Relation Name' like 'samples\_%')
    into packed_days, partitions
    from jsonb_path_query(plan, 'strict $.**') node
    where jsonb_typeof(node) = 'object' and node ? 'Relation Name';
end
$$;

do $$
declare
    day timestamptz := date_bin('1 day', now(), '1970-01-01Z');
    found record;
    moves int := 0;
begin
    while (select bool_or(more) from pgpulse.upkeep_storage()) loop
        moves := moves + 1;
    end loop;
    assert moves > 0;
    assert (select count(*) from packed.samples) between 2000 and 2100;

    found := pg_temp.reads(format('at > %L', now() - interval '1 hour'));
    assert found.packed_days = 0 and found.partitions > 0, found;
    found := pg_temp.reads(format('at > %L', day - interval '4 days'));
    assert found.packed_days = 0, found;
    -- One day, out of almost two years.
    found := pg_temp.reads(format('at >= %L and at < %L', day - interval '400 days', day - interval '399 days'));
    assert found.packed_days = 1, found;
    found := pg_temp.reads(format('at between %L and %L', day - interval '100 days', day - interval '91 days'));
    assert found.packed_days = 10, found;
    found := pg_temp.reads(format('at < %L', day - interval '690 days'));
    assert found.packed_days between 10 and 90, found;
    found := pg_temp.reads('true');
    assert found.packed_days >= 693, found;
    -- Before and after all, by transaction, and by a time that is no constant.
    found := pg_temp.reads('at < ''1999-01-01Z''');
    assert found.packed_days = 0, found;
    found := pg_temp.reads('tx >= 5');
    assert found.packed_days = 0 and found.partitions > 0, found;
    found := pg_temp.reads('pgpulse.recent(at, ''2 days'')');
    assert found.packed_days = 0 and found.partitions > 0, found;
    found := pg_temp.reads('at > now() - interval ''2 days''');
    assert found.packed_days > 0, 'now() prunes: pgpulse.recent is not needed any more';
    assert (select count(*) from samples where pgpulse.recent(at, '2 days'))
        = (select count(*) from samples where at > now() - interval '2 days');
    assert (select count(*) = 2103 and sum(value) = 2 * 2103 from samples);

    -- An index on the keys and the day, and no rows of other machines.
    declare
        plan jsonb;
    begin
        execute format(
            'explain (analyze, format json) select * from samples where machine = %L and at >= %L and at < %L',
            'm2', day - interval '400 days', day - interval '399 days'
        ) into plan;
        assert (
            select (node ->> 'Actual Rows')::float8 = 1
            from jsonb_path_query(plan, 'strict $.**') node
            where jsonb_typeof(node) = 'object' and node ->> 'Relation Name' = 'samples'
        ), plan;
    end;
end
$$;

rollback;
