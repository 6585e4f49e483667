-- Each role may do its work and nothing else.
begin;

create function pg_temp.may(who text, statement text) returns boolean
language plpgsql
as $$
begin
    execute format('set local role %I', who);
    execute statement;
    reset role;
    return true;
exception when insufficient_privilege or read_only_sql_transaction then
    reset role;
    return false;
end
$$;

create table public.made_later (value int);
create view live.made_later as select now() as time, 1 as value;

do $$
begin
    assert pg_temp.may('server', 'insert into metrics (value) values (1)');
    assert pg_temp.may('server', 'insert into live_metrics (value) values (1)');
    assert pg_temp.may('server', 'select * from live.made_later');
    assert pg_temp.may('server', 'select * from pgpulse.stream_plans()');
    assert pg_temp.may('server', $q$select pgpulse.hold_lease('test', 'a', 1)$q$);
    assert not pg_temp.may('server', 'delete from metrics');
    assert not pg_temp.may('server', 'insert into pgpulse.leases values (''a'', ''b'', now())');
    assert not pg_temp.may('server', $q$select pgpulse.drop_stream('metrics')$q$);

    assert pg_temp.may('grafana_readonly', 'select * from metrics, live_metrics, pgpulse.channels');
    assert pg_temp.may('grafana_readonly', 'select * from made_later, live.made_later');
    assert not pg_temp.may('grafana_readonly', 'insert into metrics (value) values (1)');
    assert not pg_temp.may('grafana_readonly', $q$select pgpulse.hold_lease('test', 'a', 1)$q$);
    assert not pg_temp.may('grafana_readonly', 'create table public.mine (value int)');
    assert not pg_temp.may('grafana_readonly', 'truncate metrics');
end
$$;

rollback;
