-- What cannot be shown is refused with the reason, and nothing is registered.
begin;

create view live.no_time as select 1 as value;
create view live.no_field as select now() as time, 'a' as label;
create view live.odd as select now() as time, 1 as value, '{}'::jsonb as doc;
create view live.priced as select now() as time, 1::money as value;
create view live.fine as select now() as time, 1 as value, 'a'::text as host;

do $$
begin
    assert pg_temp.refusal($q$select pgpulse.add_stream('absent')$q$) like '%there is no view live.absent';
    assert pg_temp.refusal($q$select pgpulse.add_stream('no_time')$q$) like '%needs a timestamptz%';
    assert pg_temp.refusal($q$select pgpulse.add_stream('no_field')$q$) like '%needs a timestamptz%';
    assert pg_temp.refusal($q$select pgpulse.add_stream('odd')$q$) like '%cannot show the column doc (jsonb)';
    assert pg_temp.refusal($q$select pgpulse.add_stream('fine', split => 'value')$q$)
        like '%has no text column "value"';
    assert pg_temp.refusal(format(
        $q$select pgpulse.add_stream('fine', split => 'host', stream_id => %L)$q$, repeat('x', 68)
    )) like '%are too long together';
    assert pg_temp.refusal($q$select pgpulse.add_stream('fine', rows => 301)$q$) like '%with 301 rows%';
    assert pg_temp.refusal(
        $q$select pgpulse.add_stream('fine', history => '1 day', step => '1 minute')$q$
    ) like '%1 day in steps of 00:01:00 does not fit into a window of 300 rows';
    assert pg_temp.refusal($q$select pgpulse.add_stream('priced')$q$) like '%needs a timestamptz%';
    assert pg_temp.refusal($q$select pgpulse.add_stream('fine', step => '1 minute')$q$) like '%no history';
    assert pg_temp.refusal($q$select pgpulse.add_stream('fine', history => '1 year', step => '1 month')$q$)
        like '%in steps of 1 mon';
    assert pg_temp.refusal($q$select pgpulse.add_stream('fine', history => '1 hour', step => '0')$q$)
        like '%in steps of 00:00:00';
    assert pg_temp.refusal($q$select pgpulse.add_stream('fine', beat => '10 ms')$q$) like '%a beat of%';
    assert pg_temp.refusal($q$select pgpulse.add_stream('fine', stream_id => 'a b')$q$) like '%"a b"%';
    assert pg_temp.refusal($q$select pgpulse.drop_stream('fine')$q$) like '%there is none of that name';
    assert pg_temp.refusal($q$select pgpulse.add_stream('fine', slow => '1 minute')$q$) like '%a slow beat of%';
    assert pg_temp.refusal(
        $q$select pgpulse.add_stream('fine', split => 'host', beat => '2 s', slow => '1 s')$q$
    ) like '%a slow beat of 00:00:01';
    assert not exists (
        select from pgpulse.streams where stream in ('absent', 'no_time', 'no_field', 'odd', 'fine', 'priced')
    );

    perform pgpulse.add_stream('fine', split => 'host');
    create or replace view live.fine as select now() as time, 1 as value, 'a'::text as host, 2 as more;
    assert pg_temp.refusal($q$select pgpulse.add_stream('fine')$q$) like 'Cannot change the columns%';
    assert (select fault like 'its columns changed%' from pgpulse.stream_plans() where stream = 'fine');
    drop view live.fine;
    -- one stream without its view leaves the channels of the others alone
    assert (select count(*) = 2 from pgpulse.channels);
    assert (select fault = 'its view is gone' from pgpulse.stream_plans() where stream = 'fine');
end
$$;

rollback;
