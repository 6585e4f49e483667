-- A stream watches the tables behind its view, through other views, for as long as it needs them.
begin;

create table a (time timestamptz, value int);
create table b (time timestamptz, value int);
create view middle as select * from a union all select * from b;
create view live.both as select time, value from middle;
create view live.only_a as select time, value from a;

create function pg_temp.watched() returns text
language sql
as $$
    select string_agg(tgrelid::regclass::text, ' ' order by tgrelid::regclass::text)
    from pg_trigger
    where tgname = 'pgpulse_hint' and tgrelid::regclass::text in ('a', 'b')
$$;

do $$
begin
    assert array(select pgpulse.tables_behind('live.both')::text) = array['a', 'b'];
    assert pg_temp.watched() is null;
    perform pgpulse.add_stream('both');
    perform pgpulse.add_stream('only_a');
    assert pg_temp.watched() = 'a b';
    perform pgpulse.drop_stream('both');
    assert pg_temp.watched() = 'a';
    perform pgpulse.drop_stream('only_a');
    assert pg_temp.watched() is null;
end
$$;

rollback;
