-- What cannot be stored is refused with the reason, and nothing is left behind.
begin;

create table events (id bigint primary key, machine text, at timestamptz, "local" timestamp, period int, unique (machine, at));
create table children (at timestamptz, event bigint references events (id));
create table "Guarded" (at timestamptz not null);
alter table "Guarded" enable row level security;
create table shown (at timestamptz, value float8);
create materialized view shown_by_day as select date_trunc('day', at, 'UTC') as day, count(*) from shown group by 1;
create table secrets (at timestamptz, value float8, secret text);
grant select (at, value) on secrets to grafana_readonly;
create table parted (at timestamptz, kind text) partition by list (kind);
create table parted_a partition of parted for values in ('a');
create temp table passing (at timestamptz);
create function typed() returns setof children language sql as 'select * from children';

do $$
declare
    call text := 'select pgpulse.add_storage(%L, %L, %L)';
begin
    assert pg_temp.refusal(format(call, 'events', 'at', '{}')) like '%its unique key "events_pkey" (id) lacks "at"';
    alter table events drop constraint events_pkey cascade;
    assert pg_temp.refusal(format(call, 'events', 'local', '{}')) like '%no timestamptz column "local"';
    assert pg_temp.refusal(format(call, 'events', 'at', '{machine,nothing,at}')) like '%"nothing", "at" cannot be a key';
    assert pg_temp.refusal(format(call, 'children', 'at', '{}')) like '%function public.typed() stands on it';
    assert pg_temp.refusal(format(call, 'shown', 'at', '{}')) like '%materialized view public.shown_by_day stands on it';
    assert pg_temp.refusal(format(call, '"Guarded"', 'at', '{}')) like '%has row-level security';
    assert pg_temp.refusal(format(call, 'secrets', 'at', '{}')) like '%may read of it the column at, value only';
    assert pg_temp.refusal(format(call, 'parted', 'at', '{}')) like '%is not partitioned by ranges of "at"';
    assert pg_temp.refusal(format(call, 'parted_a', 'at', '{}')) like '%is no table of its own';
    assert pg_temp.refusal(format(call, 'passing', 'at', '{}')) like '%is no table of its own';
    assert pg_temp.refusal(format(call, 'live.metrics', 'time', '{}')) like '%is no table of its own';
    assert pg_temp.refusal($q$select pgpulse.add_storage('events', 'at', period => '1 hour')$q$) like '%in periods of 01:00:00';
    assert pg_temp.refusal($q$select pgpulse.unpack('events', '2026-01-01', '2026-01-02')$q$) like '%has not stored it';
    assert pg_temp.refusal($q$select pgpulse.drop_storage('events')$q$) like '%has not stored it';
    assert pg_temp.refusal($q$select pgpulse.pack_from('events', 'children')$q$) like '%has not stored it';
    assert not exists (select from pgpulse.storage where source in ('events', 'children', 'shown', '"Guarded"'));
    assert to_regclass('rows.events') is null and to_regclass('packed.events') is null;

    -- A column of any name, an index of any kind; the same call twice changes what may change.
    perform pgpulse.add_storage('events', 'at', '{machine}');
    perform pgpulse.add_storage('events', 'at', '{machine}', pack_after => '1 hour', keep => '1 year');
    assert (select pack_after = '1 hour' and keep = '1 year' from pgpulse.storage where source = 'events'::regclass);
    assert pg_temp.refusal(format(call, 'events', 'at', '{id}')) like 'Cannot change how "public.events" is stored';
    assert pg_temp.refusal(format(call, 'rows.events', 'at', '{id}')) like 'Cannot change how "public.events" is stored';
    assert pg_temp.refusal($q$select pgpulse.pack_from('events', 'children')$q$)
        = 'Cannot pack "public.children" into "public.events": it lacks id bigint, machine text, '
            'local timestamp without time zone, period integer';
    assert pg_temp.refusal($q$select pgpulse.pack_from('events', 'events')$q$)
        = 'Cannot pack "public.events" into "public.events": it is no plain table';
    -- A view that cannot follow stops it all.
    drop materialized view shown_by_day;
    create view whole as select shown from shown;
    assert pg_temp.refusal(format(call, 'shown', 'at', '{}')) like 'Cannot store "public.shown": a view over it cannot follow%';
    assert to_regclass('rows.shown') is null and (select relkind = 'r' from pg_class where oid = 'shown'::regclass);
end
$$;

rollback;
