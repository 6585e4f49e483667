-- A rollup follows its table when that becomes a view over rows and packed rows.
begin;

create table samples (machine text not null, value float8, at timestamptz not null);
select pgpulse.add_rollup('samples', 'at', measures => '{value}', keys => '{machine}');
insert into samples values ('a', 1, '2026-01-05Z'), ('a', 2, '2026-01-05Z'), ('a', 4, '2026-01-06Z');
-- As a refresh does once the transaction has ended.
do $$
declare
    r pgpulse.rollups;
begin
    select * into r from pgpulse.rollups where rollup = 'samples';
    perform pgpulse.refresh_rollup(r, txid_current() + 1);
end
$$;

alter table samples rename to sample_rows;
create table sample_packed (chunk$at timestamptz, machine text, value float8[], at timestamptz[]);
create view samples as
select machine, value, at, tx from sample_rows
union all
select machine, v, t, 0::bigint from sample_packed, unnest(value, at) as u (v, t);
insert into pgpulse.storage (source, rows, packed, time_column, keys, period, ahead)
values ('samples', 'sample_rows', 'sample_packed', 'at', '{machine}', '1 day', '1 day');
update pgpulse.rollups set source = 'samples'::regclass where rollup = 'samples';
select pgpulse.remake_rollup('samples');

create function pg_temp.days(later int, name text default 'samples') returns text
language plpgsql
as $$
declare
    r pgpulse.rollups;
    found text;
begin
    select * into r from pgpulse.rollups where rollup = name;
    perform pgpulse.refresh_rollup(r, txid_current() + 1 + later);
    execute format(
        'select string_agg(value_sum::text, '' '' order by time) from rollup.%I where step = ''1 day''', name
    ) into found;
    return found;
end
$$;

do $$
begin
    -- Packing is not deleting.
    set local pgpulse.keep_rollups = on;
    insert into sample_packed
    select '2026-01-05Z', machine, array_agg(value), array_agg(at)
    from sample_rows where at < '2026-01-06Z' group by machine;
    delete from sample_rows where at < '2026-01-06Z';
    set local pgpulse.keep_rollups = off;
    assert pg_temp.days(0) = '3 4';

    -- Late rows, updates and deletes of rows are seen, and a recount reads packed ones too.
    insert into sample_rows values
        ('a', 8, '2026-01-05Z', txid_current() + 1),
        ('a', 16, '2026-01-06Z', txid_current() + 1);
    assert pg_temp.days(1) = '11 20', pg_temp.days(1);
    update sample_rows set value = 32 where value = 8;
    delete from sample_rows where value = 4;
    assert pg_temp.days(1) = '35 16', pg_temp.days(1);

    -- The name of the rows leads to the same.
    assert pgpulse.name_of('sample_rows') = 'samples'::regclass;
    perform pgpulse.add_rollup('sample_rows', 'at', array['value'], array['machine'], name => 'samples');
    assert (select source = 'samples'::regclass from pgpulse.rollups where rollup = 'samples');
    perform pgpulse.add_rollup('samples', 'at', array['value'], name => 'whole');
    assert (select count(*) = 2 from pg_trigger where tgrelid = 'sample_rows'::regclass and tgname like '%\_u');

    -- What was packed before it came is in it too.
    assert pg_temp.days(1, 'whole') = '35 16', pg_temp.days(1, 'whole');

    perform pgpulse.drop_rollup('whole');
    perform pgpulse.drop_rollup('samples');
    assert not exists (select from pg_trigger where tgrelid = 'sample_rows'::regclass);
end
$$;

rollback;
