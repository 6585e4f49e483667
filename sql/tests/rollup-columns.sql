-- The column tx: whose it is, and until when it stays; names in expressions mean what they meant when
-- the rollup was added.
begin;

create function pg_temp.days(name text) returns text
language plpgsql
as $$
declare
    r pgpulse.rollups;
    found text;
begin
    -- As refreshes do once the transaction has ended; one by one, as a later one may add what one recounts.
    select * into r from pgpulse.rollups where rollup = name;
    perform pgpulse.refresh_rollup(r, txid_current() + 1);
    execute format(
        'select string_agg(points::text, '' '' order by time) from rollup.%I where step = ''1 day''', name
    ) into found;
    return found;
end
$$;

-- A sink needs it too.
create table shared (machine text, value float8, at timestamptz);
select pgpulse.add_sink('shared', 'at', tags => '{machine}', fields => '{value}');
select pgpulse.add_rollup('shared', 'at', measures => '{value}', keys => '{machine}');
select pgpulse.drop_rollup('shared');
do $$
begin
    assert (select waiting = 0 or waiting is null from pgpulse.plan_sink('shared') limit 1) is not false;
    assert exists (select from pg_attribute where attrelid = 'shared'::regclass and attname = 'tx');
end
$$;
select pgpulse.add_rollup('shared', 'at', measures => '{value}', keys => '{machine}');
select pgpulse.drop_sink('shared');
select pgpulse.drop_rollup('shared');

-- Somebody's own column of that name tells nothing of transactions.
create table payments (at timestamptz, value float8, tx bigint);
do $$
begin
    assert not exists (select from pg_attribute where attrelid = 'shared'::regclass and attname = 'tx');
    assert pg_temp.refusal($q$select pgpulse.add_rollup('payments', 'at', '{value}')$q$)
        like 'Cannot add a column tx to payments: it has one that means something else';
    assert pg_temp.refusal($q$select pgpulse.add_sink('payments', 'at', '{}', '{value}')$q$)
        like '%means something else';
    assert not exists (select from pgpulse.rollups where rollup = 'payments');
end
$$;

-- Rows without a transaction, which an attached partition brought before the rollup was added.
create table parts (value float8, at timestamptz) partition by range (at);
create table part_1 partition of parts default;
select pgpulse.add_rollup('parts', 'at', '{value}', name => 'first');
insert into parts (value, at, tx) values (1, '2026-01-05Z', null), (2, '2026-01-06Z', default);
select pgpulse.add_rollup('parts', 'at', '{value}', name => 'second');
do $$
begin
    assert pg_temp.days('second') = '1 1', pg_temp.days('second');
end
$$;

-- Names as long as they may be; the triggers of one more would have the same.
do $$
begin
    perform pgpulse.add_rollup('parts', 'at', '{value}', name => repeat('a', 46));
    assert (select count(*) = 3 from pg_trigger where tgrelid = 'parts'::regclass and tgname ~ 'aaa_[udt]$');
    perform pgpulse.drop_rollup(repeat('a', 46));
    assert pg_temp.refusal(format($q$select pgpulse.add_rollup('parts', 'at', '{value}', name => %L)$q$, repeat('a', 47)))
        like '%46 at most';
end
$$;

-- A function that only the search path finds.
create schema own;
create function own.upper_case(text) returns text language sql immutable as 'select upper($1)';
set local search_path = public, own, compat;
create table named (machine text, value int, "local" int, at timestamptz);
do $$
begin
    for i in 1..2 loop
        perform pgpulse.add_rollup('named', 'at', array['value * 2 as twice', 'local', '"local" as here'],
            array['upper_case(machine) as m', 'machine as k']);
    end loop;
    assert (
        select (key_expressions, measure_expressions)
            = (array['own.upper_case(machine)', 'machine'], array['(value * 2)', 'local', 'local'])
        from pgpulse.rollups
        where rollup = 'named'
    ), (select (key_expressions, measure_expressions)::text from pgpulse.rollups where rollup = 'named');
    set local search_path = public, compat;
    insert into named values ('a', 1, 1, '2026-01-05Z'), ('a', 1, 1, '2026-01-06Z');
    assert pg_temp.days('named') = '1 1';
    update named set machine = 'b';
    delete from named where at < '2026-01-06Z';
    assert pg_temp.days('named') = '1';
    assert (select m = 'B' and twice_sum = 2 from rollup.named where step = '1 day');
    perform pgpulse.remake_rollup('named');
end
$$;

rollback;
