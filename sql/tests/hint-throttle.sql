-- A session's hints for one table come at most once in a quarter of a second, tables apart.
begin;

create table a (value int);
create table b (value int);
select pgpulse.watch('a');
select pgpulse.watch('b');

do $$
declare
    slots text[] := '{}';
    setting text := 'pgpulse.hinted_' || 'a'::regclass::oid;
begin
    insert into b values (1);
    assert current_setting(setting, true) is null;
    for i in 1..3 loop
        insert into a values (i);
        slots := slots || current_setting(setting);
        perform pg_sleep(0.26);
    end loop;
    assert (select count(distinct s) from unnest(slots) s) = 3;
    assert exists (select from pg_trigger where tgname = 'pgpulse_hint' and tgrelid = 'a'::regclass and tgqual is null);
end
$$;

rollback;
