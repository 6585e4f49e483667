-- Hosts: what scripts/collect.ts sends, taken exactly once, and read as columns.

-- Records as samples, each with what is wrong with it; fails with a data_exception where a value has
-- the wrong type. From json, and metrics by way of text: jsonb of a whole batch takes longer.
create or replace function pgpulse.samples(batch json) returns table (sample pgpulse.sample, fault text)
language sql
stable
as $$
    select
        row(
            r.at,
            r.host,
            r.instance,
            coalesce(r.tags, '{}'),
            r.measured,
            r.about ->> 'os',
            r.about ->> 'version',
            (r.about ->> 'interval')::float8,
            (r.about ->> 'now')::timestamptz,
            (r.measured #>> '{collector,lost}')::bigint,
            r.cpu,
            r.iowait,
            r.steal,
            r.load1,
            r.memory_used,
            r.swap_used,
            r.filesystem_used,
            r.inodes_used,
            r.disk_busy,
            r.disk_bytes,
            r.received_bytes,
            r.sent_bytes
        )::pgpulse.sample,
        case
            when (r."time" like any ('{____-__-__T__:__%Z,____-__-__T__:__%+__:__,____-__-__T__:__%-__:__}'))
                is not true
                then 'it has no time like "2026-11-22T12:00:05Z"'
            when r.at > now() + interval '1 day'
                then 'its time is more than a day ahead; is the clock of the host right?'
            when r.at < '1970-01-01 00:00:00+00' then 'its time is before 1970; is the clock of the host right?'
            when (length(r.host) between 1 and 255) is not true then 'it has no host'
            when length(r.instance) not between 1 and 255 then 'its instance has no name'
            when jsonb_typeof(r.measured) is distinct from 'object' then 'its metrics are no object'
            when jsonb_typeof(r.tags) <> 'object' then 'its tags are no object'
            -- which no view could read
            when jsonb_typeof(r.measured -> 'filesystems') <> 'object'
                or jsonb_typeof(r.measured -> 'disks') <> 'object'
                or jsonb_typeof(r.measured -> 'network') <> 'object'
                or jsonb_typeof(r.measured -> 'temperatures') <> 'object'
                or jsonb_typeof(r.measured -> 'scrape') <> 'object'
                then 'its filesystems, disks, network, temperatures or scrape are no object'
            when (r.about ->> 'interval')::float8 not between 0.1 and 86400
                then 'its interval is no number of seconds'
            -- Infinity is the largest but for NaN
            when greatest(
                    r.cpu, r.iowait, r.steal, r.load1, r.memory_used, r.swap_used, r.filesystem_used,
                    r.inodes_used, r.disk_busy, r.disk_bytes, r.received_bytes, r.sent_bytes
                ) >= 'Infinity'
                or least(
                    r.cpu, r.iowait, r.steal, r.load1, r.memory_used, r.swap_used, r.filesystem_used,
                    r.inodes_used, r.disk_busy, r.disk_bytes, r.received_bytes, r.sent_bytes
                ) = '-Infinity'
                then 'a number of it is NaN or infinite'
        end
    from (
        select *, said."time"::timestamptz as at, said.metrics::jsonb as measured
        from json_to_recordset(batch) as said (
            "time" text,
            host text,
            instance text,
            tags jsonb,
            about jsonb,
            metrics text,
            cpu float8,
            iowait float8,
            steal float8,
            load1 float8,
            memory_used float8,
            swap_used float8,
            filesystem_used float8,
            inodes_used float8,
            disk_busy float8,
            disk_bytes float8,
            received_bytes float8,
            sent_bytes float8
        )
        offset 0
    ) as r
$$;

-- Says which record of a batch cannot be taken, and why.
create or replace function pgpulse.refuse_batch(batch json) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    one json;
    i bigint;
    answer record;
    reason text := 'it is no array of records';
    which text := 'the batch';
begin
    for one, i in
        select *
        from json_array_elements(case when json_typeof(batch) = 'array' then batch end) with ordinality
    loop
        which := format('record %s of %s', i, json_array_length(batch));
        begin
            -- the sample too, as casts may fail that only it needs
            select * into answer from pgpulse.samples(json_build_array(one));
            reason := answer.fault;
        exception when data_exception then
            reason := sqlerrm;
        end;
        exit when reason is not null;
    end loop;
    raise exception 'Cannot take samples: % is bad: %', which, reason
        using errcode = 'invalid_parameter_value', detail = coalesce(left(coalesce(one, batch)::text, 1000), 'null');
end
$$;

-- Those that are not in the table yet, where they are so old that they may lie in packed history, which
-- has no unique key. Packing waits meanwhile: what it holds is in neither place for us.
create or replace function pgpulse.not_packed(samples pgpulse.sample[], source regclass, key text)
returns pgpulse.sample[]
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    rows oid;
    first timestamptz;
    last timestamptz;
begin
    select min(k.rows::oid), min(s."time"), max(s."time") into rows, first, last
    from pgpulse.storage k, unnest(samples) as s
    where k.source = not_packed.source and s."time" < greatest(now() - k.pack_after, k.packed_to);
    if rows is null then
        return samples;
    end if;
    perform pgpulse.lock_storage(rows, true, shared => true);
    -- With the range as constants, so that other periods are not read.
    execute format(
        'select array_agg(s)
        from unnest($1) as s
        where not exists (
            select
            from (
                select "time", %1$I
                from %2$s
                where "time" between $2 and $3 and %1$I = any (array(select distinct %1$I from unnest($1)))
            ) as known
            where known."time" = s."time" and known.%1$I = s.%1$I
        )',
        key, source
    ) into samples using samples, first, last;
    return samples;
end
$$;

create or replace function pgpulse.collect(batch json) returns jsonb
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
-- To plan for the number of samples costs more than it could save.
set plan_cache_mode = force_generic_plan
as $$
declare
    of_hosts pgpulse.sample[];
    of_instances pgpulse.sample[];
    fresh pgpulse.sample[];
    total bigint;
    oldest timestamptz;
    bad boolean;
    barred boolean;
    barred_host text;
    barred_instance text;
    bound name;
    stored boolean;
    upto timestamptz;
    taken bigint := 0;
    n bigint;
    stamp timestamptz := clock_timestamp();
begin
    begin
        select
            array_agg(sample) filter (where (sample).instance is null),
            array_agg(sample) filter (where (sample).instance is not null),
            count(*),
            min((sample)."time"),
            bool_or(s.fault is not null),
            bool_or(coalesce(
                h.role <> session_user, exists (select from public.hosts where role = session_user)
            )),
            (
                select k.rows = to_regclass('rows.system_metrics')
                from pgpulse.storage k
                where k.source = 'public.system_metrics'::regclass
            ),
            (
                select greatest(now() - k.pack_after, k.packed_to)
                from pgpulse.storage k
                where k.source = 'public.system_metrics'::regclass
            )
        into of_hosts, of_instances, total, oldest, bad, barred, stored, upto
        from pgpulse.samples(batch) as s
        -- offset 0: looked up, where the planner expects a hundred samples and would read the table
        left join lateral (
            select role from public.hosts known where known.host = (sample).host offset 0
        ) as h on true;
    exception when data_exception then
        bad := true;
    end;
    if bad or batch is null then
        perform pgpulse.refuse_batch(batch);
    end if;
    if barred or of_instances is not null then
        select sender.host, sender.instance, h.role into barred_host, barred_instance, bound
        from (
            select s.host, null as instance from unnest(of_hosts || of_instances) as s
            union all
            -- A database goes with the host that has sent its newest sample.
            select i.host, i.instance
            from public.postgresql_instances i
            where i.instance = any (array(select s.instance from unnest(of_instances) as s))
        ) as sender
        left join public.hosts h on h.host = sender.host
        where coalesce(
            h.role <> session_user, exists (select from public.hosts where role = session_user)
        )
        order by h.role
        limit 1;
        if found then
            raise exception 'Cannot take samples of %host "%": %',
                coalesce('"' || barred_instance || '", which are from ', ''),
                barred_host,
                case
                    when bound is not null then format('it is bound to role "%s"', bound)
                    else format('role "%s" is bound to other hosts', session_user)
                end
                using errcode = 'insufficient_privilege',
                    hint = 'The owner of the database binds them: select pgpulse.bind_host(host, role)';
        end if;
    end if;

    if of_hosts is not null then
        fresh := case
            when oldest < upto then pgpulse.not_packed(of_hosts, 'public.system_metrics', 'host')
            else of_hosts
        end;
        -- Twice the same: names that are known beforehand save planning it for each sample.
        if stored then
            insert into rows.system_metrics (
                "time", host, tags, metrics, cpu, iowait, steal, load1, memory_used, swap_used,
                filesystem_used, inodes_used, disk_busy, disk_bytes, received_bytes, sent_bytes
            )
            select
                "time", host, tags, metrics, cpu, iowait, steal, load1, memory_used, swap_used,
                filesystem_used, inodes_used, disk_busy, disk_bytes, received_bytes, sent_bytes
            from unnest(fresh)
            on conflict do nothing;
        else
            insert into public.system_metrics (
                "time", host, tags, metrics, cpu, iowait, steal, load1, memory_used, swap_used,
                filesystem_used, inodes_used, disk_busy, disk_bytes, received_bytes, sent_bytes
            )
            select
                "time", host, tags, metrics, cpu, iowait, steal, load1, memory_used, swap_used,
                filesystem_used, inodes_used, disk_busy, disk_bytes, received_bytes, sent_bytes
            from unnest(fresh)
            on conflict do nothing;
        end if;
        get diagnostics taken = row_count;

        -- Last, as it makes other batches of the same host wait until this one is committed.
        insert into public.hosts as h
            (host, first_seen, last_seen, last_time, os, version, "interval", tags, clock_offset, lost)
        select distinct on (s.host)
            s.host,
            stamp,
            stamp,
            s."time",
            s.os,
            s.version,
            make_interval(secs => s."interval"),
            s.tags,
            -- only those that are fresh say what the clock is
            extract(epoch from s.clock - stamp),
            coalesce(s.lost, 0)
        from unnest(of_hosts) as s
        order by s.host, s."time" desc
        on conflict (host) do update set
            first_seen = coalesce(h.first_seen, excluded.first_seen),
            last_seen = excluded.last_seen,
            last_time = excluded.last_time,
            os = coalesce(excluded.os, h.os),
            version = coalesce(excluded.version, h.version),
            "interval" = coalesce(excluded."interval", h."interval"),
            tags = excluded.tags,
            clock_offset = coalesce(excluded.clock_offset, h.clock_offset),
            lost = excluded.lost
        -- what is older says nothing of the present, unless the clock was put back
        where excluded.clock_offset is not null
            or (h.last_time between excluded.last_time and stamp + interval '1 minute') is not true;
        get diagnostics n = row_count;
        if n < total then
            update public.hosts h
            set last_seen = stamp
            where h.host = any (array(select s.host from unnest(of_hosts) as s)) and h.last_seen < stamp;
        end if;
    end if;

    if of_instances is not null then
        fresh := pgpulse.not_packed(of_instances, 'public.postgresql_metrics', 'instance');
        execute format(
            'insert into %s ("time", instance, host, metrics)
            select "time", instance, host, metrics from unnest($1)
            on conflict do nothing',
            pgpulse.rows_of('public.postgresql_metrics')
        ) using fresh;
        get diagnostics n = row_count;
        taken := taken + n;

        insert into public.postgresql_instances as i (instance, host, last_seen, last_time)
        select distinct on (s.instance)
            s.instance,
            s.host,
            -- of one that is not fresh only its host's clock tells
            least(s."time" + coalesce(stamp - s.clock, '0'), stamp),
            s."time"
        from unnest(of_instances) as s
        order by s.instance, s."time" desc
        on conflict (instance) do update set
            host = excluded.host,
            last_seen = excluded.last_seen,
            last_time = excluded.last_time
        where i.last_seen < excluded.last_seen;
    end if;
    return jsonb_build_object('taken', taken, 'known', total - taken);
end
$$;

comment on function pgpulse.collect is
    'Takes samples of scripts/collect.ts, an array of records (columns of system_metrics by their names, '
    'and about), each once however often it is sent: {"taken": new ones, "known": those that were there}. '
    'Keeps hosts and postgresql_instances up to date. A bad record refuses the whole batch (22023), a host '
    'that is bound to another role too, and a database that such a host has sent (42501).';

revoke execute on function
    pgpulse.samples, pgpulse.refuse_batch, pgpulse.not_packed, pgpulse.collect
    from public;

create or replace function pgpulse.bind_host(host text, role name default null) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if role is not null and not exists (select from pg_roles where rolname = role) then
        raise exception 'Cannot bind host "%" to role "%": there is no such role', host, role
            using hint = format('create role %I login password ''...'' in role collector', role);
    end if;
    insert into public.hosts as h (host, role) values (host, role)
    on conflict on constraint hosts_pkey do update set role = excluded.role;
end
$$;

comment on function pgpulse.bind_host is
    'From now on that login role alone may send samples of the host, and those of hosts bound to it only; '
    'null: any collector may. Needs to be said before the first sample to hold from then on. A database goes '
    'with the host that has sent its newest sample: postgresql_instances.';

revoke execute on function pgpulse.bind_host from public;

create or replace function pgpulse.number(value jsonb) returns float8
language sql
immutable
parallel safe
as $$
    select case jsonb_typeof(value) when 'number' then
        case when value::numeric between -1e300 and 1e300 then value::float8 end
    end
$$;

comment on function pgpulse.number is 'A JSON number; null of anything else, so that no sample hinders a query.';

-- --- views ---------------------------------------------------------------------------------------

create or replace view public.host_cpu as
select
    "time",
    host,
    cpu,
    pgpulse.number(metrics #> '{cpu,user}') as "user",
    pgpulse.number(metrics #> '{cpu,system}') as system,
    iowait,
    steal,
    pgpulse.number(metrics #> '{cpu,cores}') as cores
from public.system_metrics;

create or replace view public.host_load as
select
    "time",
    host,
    load1,
    pgpulse.number(metrics #> '{load,1}') as load5,
    pgpulse.number(metrics #> '{load,2}') as load15
from public.system_metrics;

create or replace view public.host_memory as
select
    "time",
    host,
    pgpulse.number(metrics #> '{memory,total}') as total,
    pgpulse.number(metrics #> '{memory,available}') as available,
    pgpulse.number(metrics #> '{memory,total}') - pgpulse.number(metrics #> '{memory,available}') as used,
    memory_used as used_ratio,
    pgpulse.number(metrics #> '{swap,total}') as swap_total,
    pgpulse.number(metrics #> '{swap,used}') as swap_used
from public.system_metrics;

create or replace view public.host_filesystems as
select
    s."time",
    s.host,
    f.key as mount,
    f.value ->> 'device' as device,
    f.value ->> 'type' as type,
    pgpulse.number(f.value -> 'size') as size,
    pgpulse.number(f.value -> 'used') as used,
    pgpulse.number(f.value -> 'available') as available,
    pgpulse.number(f.value -> 'used')
        / nullif(pgpulse.number(f.value -> 'used') + pgpulse.number(f.value -> 'available'), 0) as used_ratio,
    pgpulse.number(f.value -> 'inodes') as inodes,
    pgpulse.number(f.value -> 'inodes_used') as inodes_used,
    -- always full
    coalesce(f.value ->> 'type' in ('squashfs', 'iso9660', 'udf', 'erofs', 'cramfs'), false) as image
from public.system_metrics s, jsonb_each(s.metrics -> 'filesystems') as f;

create or replace view public.host_disks as
select
    s."time",
    s.host,
    d.key as disk,
    pgpulse.number(d.value -> 'read_bytes') as read_bytes,
    pgpulse.number(d.value -> 'written_bytes') as written_bytes,
    pgpulse.number(d.value -> 'reads') as reads,
    pgpulse.number(d.value -> 'writes') as writes,
    pgpulse.number(d.value -> 'busy') as busy
from public.system_metrics s, jsonb_each(s.metrics -> 'disks') as d;

create or replace view public.host_network as
select
    s."time",
    s.host,
    n.key as interface,
    pgpulse.number(n.value -> 'received_bytes') as received_bytes,
    pgpulse.number(n.value -> 'sent_bytes') as sent_bytes,
    pgpulse.number(n.value -> 'received_packets') as received_packets,
    pgpulse.number(n.value -> 'sent_packets') as sent_packets,
    pgpulse.number(n.value -> 'received_errors') as received_errors,
    pgpulse.number(n.value -> 'sent_errors') as sent_errors,
    pgpulse.number(n.value -> 'received_drops') as received_drops,
    pgpulse.number(n.value -> 'sent_drops') as sent_drops
from public.system_metrics s, jsonb_each(s.metrics -> 'network') as n;

create or replace view public.host_temperatures as
select s."time", s.host, each.key as sensor, pgpulse.number(each.value) as celsius
from public.system_metrics s,
    jsonb_each(s.metrics -> 'temperatures') as each;

create or replace view public.host_scrapes as
select s."time", s.host, each.key as name, pgpulse.number(each.value) as value
from public.system_metrics s,
    jsonb_each(s.metrics -> 'scrape') as each;

create or replace view public.host_containers as
select
    "time",
    host,
    pgpulse.number(metrics #> '{container,cpu_limit}') as cpu_limit,
    pgpulse.number(metrics #> '{container,cpu_used}') as cpu_used,
    pgpulse.number(metrics #> '{container,memory_limit}') as memory_limit,
    pgpulse.number(metrics #> '{container,memory_used}') as memory_used
from public.system_metrics
where metrics ? 'container';

create or replace view public.host_system as
select
    s."time",
    s.host,
    pgpulse.number(s.metrics -> 'uptime') as uptime,
    pgpulse.number(s.metrics #> '{processes,total}') as processes,
    pgpulse.number(s.metrics #> '{processes,running}') as running,
    pgpulse.number(s.metrics #> '{processes,blocked}') as blocked,
    pgpulse.number(s.metrics #> '{sockets,tcp}') as tcp_sockets,
    pgpulse.number(s.metrics #> '{sockets,udp}') as udp_sockets
from public.system_metrics s;

create or replace view public.hosts_now as
select
    h.host,
    h.last_seen < now() - greatest(3 * coalesce(h."interval", '5 seconds'), '15 seconds') as silent,
    h.first_seen,
    h.last_seen,
    h.last_time,
    h.os,
    h.version,
    h."interval",
    h.tags,
    h.clock_offset,
    h.lost,
    s.cpu,
    s.iowait,
    s.steal,
    s.load1,
    s.memory_used,
    s.swap_used,
    s.filesystem_used,
    s.inodes_used,
    s.disk_busy,
    s.disk_bytes,
    s.received_bytes,
    s.sent_bytes,
    s.cores,
    s.uptime
from public.hosts h
left join lateral (
    select
        m.*,
        pgpulse.number(m.metrics #> '{cpu,cores}') as cores,
        pgpulse.number(m.metrics -> 'uptime') as uptime
    from public.system_metrics m
    where m.host = h.host
        and m."time" = h.last_time
        -- not in packed history, which would be unpacked for it
        and pgpulse.recent(m."time", '1 day')
    limit 1
) as s on true
where h.last_seen is not null;

comment on view public.host_cpu is 'pgpulse: CPU of hosts, in parts of 1; cpu: all that is in use.';
comment on view public.host_load is 'pgpulse: load averages of hosts.';
comment on view public.host_memory is 'pgpulse: memory and swap of hosts, in bytes.';
comment on view public.host_filesystems is
    'pgpulse: file systems of hosts, in bytes and inodes; image: one that is made full, as those of snaps.';
comment on view public.host_disks is 'pgpulse: disks of hosts, a second; busy: part of the time.';
comment on view public.host_network is 'pgpulse: network interfaces of hosts, a second.';
comment on view public.host_temperatures is 'pgpulse: temperatures of hosts.';
comment on view public.host_scrapes is 'pgpulse: what collect.ts --scrape has read; counters are rates.';
comment on view public.host_containers is 'pgpulse: limits and use of the container a collector runs in.';
comment on view public.host_system is 'pgpulse: uptime in seconds, processes and sockets of hosts.';
comment on view public.hosts_now is
    'pgpulse: every host with its newest values (of the last day); silent: nothing came for three of its '
    'intervals, or for 15 s.';

-- --- rollups, storage, streams --------------------------------------------------------------------

create or replace function pgpulse.add_hosts(theirs boolean default true) returns void
language plpgsql
as $$
declare
    wanted record;
begin
    for wanted in
        select *
        from (values
            ('system_metrics', 'hosts', 'host', array[
                'cpu', 'iowait', 'steal', 'load1', 'memory_used', 'swap_used', 'filesystem_used',
                'inodes_used', 'disk_busy', 'disk_bytes', 'received_bytes', 'sent_bytes'
            ]),
            ('postgresql_metrics', 'postgresql', 'instance', array(
                select format('pgpulse.number(metrics -> %L) as %s', name, name)
                from unnest(array[
                    'connections', 'connections_used', 'commits', 'rollbacks', 'cache_hit', 'wal_bytes',
                    'blocked', 'oldest_transaction_seconds', 'replication_lag_seconds',
                    'database_bytes', 'wraparound', 'active', 'tuples_written', 'checkpoints'
                ]) as name
            ))
        ) as tables (name, rollup, key, measures)
    loop
        if not theirs
            and coalesce(obj_description(to_regclass('public.' || wanted.name), 'pg_class'), '')
            not like 'pgpulse:%' then
            raise warning 'Leaves public.% as it is: migrate did not make it', wanted.name
                using detail = 'select pgpulse.add_hosts() rolls it up, and stores it in partitions.';
            continue;
        end if;
        if not exists (select from pgpulse.rollups where rollup = wanted.rollup) then
            perform pgpulse.add_rollup(
                to_regclass('public.' || wanted.name), 'time', measures => wanted.measures,
                keys => array[wanted.key], name => wanted.rollup
            );
            perform pgpulse.keep_rollup(wanted.rollup, '1m', '90 days');
            perform pgpulse.keep_rollup(wanted.rollup, '1h', '2 years');
        end if;
        if (select relkind from pg_class where oid = to_regclass('public.' || wanted.name)) = 'r'
            and not pgpulse.is_hypertable(to_regclass('public.' || wanted.name)) then
            perform pgpulse.add_storage(
                to_regclass('public.' || wanted.name), 'time', keys => array[wanted.key],
                pack_after => '3 days', keep => '14 days'
            );
        end if;
    end loop;
end
$$;

comment on function pgpulse.add_hosts is
    'Rolls up system_metrics and postgresql_metrics and stores them in partitions: what migrate does with '
    'tables that it made.';

select pgpulse.add_hosts(theirs => false);

-- As much of every host as the dashboard of a fleet can show. No search_path is pinned, so that it becomes
-- part of the query that calls it.
do $do$
begin
    if to_regclass('rollup.hosts') is null then
        return;
    end if;
    create or replace function pgpulse.fleet("from" timestamptz, "to" timestamptz)
    returns table (
        "time" timestamptz,
        host text,
        cpu float8,
        memory_used float8,
        filesystem_used float8,
        traffic float8
    )
    language sql
    stable
    parallel safe
    as $$
        with moments as (
            select
                generate_series(
                    date_bin(m.stride, m.since, 'epoch') + m.stride,
                    -- by then those of one moment have come
                    least(fleet."to", now() - interval '10 seconds'),
                    m.stride
                ) as at
            from (
                select
                    r.since,
                    greatest(
                        case
                            when fleet."to" - r.since <= interval '7 minutes' then interval '10 seconds'
                            when fleet."to" - r.since <= interval '20 minutes' then interval '30 seconds'
                            when fleet."to" - r.since <= interval '75 minutes' then interval '2 minutes'
                            else interval '10 minutes'
                        end,
                        -- what most have no sample for would be read again and again
                        (
                            select least(mode() within group (order by h."interval"), '10 minutes')
                            from public.hosts h
                        )
                    ) as stride
                from (
                    -- a fleet younger than the range has as many
                    select greatest(fleet."from", (
                        select min(f."time")
                        from public.system_metrics f
                        where f."time" > fleet."from" and pgpulse.recent(f."time", interval '3 days')
                    )) as since
                    offset 0
                ) as r
            ) as m
            where fleet."to" - fleet."from" <= interval '375 minutes'
                and fleet."from" > now() - interval '3 days'
        )
        -- Up to six hours: the samples of some 40 moments, which the index on time finds at once.
        select
            s."time", s.host, s.cpu, s.memory_used, s.filesystem_used, s.received_bytes + s.sent_bytes
        from public.system_metrics s
        where s."time" = any (array(select at from moments))
            -- none that are packed
            and pgpulse.recent(s."time", interval '3 days')
        union all
        -- Where an interval does not fit into the stride, the newest before each moment.
        select
            m.at, s.host, s.cpu, s.memory_used, s.filesystem_used, s.received_bytes + s.sent_bytes
        from (select distinct "interval" from public.hosts) as i
        join moments m on date_bin(i."interval", m.at, 'epoch') < m.at
        join public.system_metrics s
            on s."time" = date_bin(i."interval", m.at, 'epoch')
            and pgpulse.recent(s."time", interval '3 days')
        join public.hosts h on h.host = s.host and h."interval" = i."interval"
        union all
        -- The newest of those that report, so that what is new is there at once.
        select
            fleet."to", n.host, n.cpu, n.memory_used, n.filesystem_used, n.received_bytes + n.sent_bytes
        from public.hosts_now n
        where fleet."to" > now() - interval '10 seconds'
            and fleet."to" - fleet."from" <= interval '375 minutes'
            and not n.silent
        union all
        select
            r."time", r.host, r.cpu_avg, r.memory_used_avg, r.filesystem_used_avg,
            r.received_bytes_avg + r.sent_bytes_avg
        from rollup.hosts r
        where (
                fleet."to" - fleet."from" > interval '375 minutes'
                or fleet."from" <= now() - interval '3 days'
            )
            and r.step = pgpulse.step(fleet."from", fleet."to", 'hosts', 200, interval '0')
            and r."time" between fleet."from" and fleet."to"
    $$;
    comment on function pgpulse.fleet is
        'Every host in a range: up to six hours its samples of some 40 moments and its newest, beyond that the '
        'mean of each hour or day; traffic is what it received and sent.';
end
$do$;

-- Streams of these names that are somebody's own stay as they are.
do $$
declare
    wanted record;
begin
    for wanted in
        select *
        from (values
            (
                'cpu',
                $q$cpu as used, pgpulse.number(metrics #> '{cpu,user}') as "user",
                pgpulse.number(metrics #> '{cpu,system}') as system, iowait, steal$q$
            ),
            ('memory', 'memory_used as used, swap_used as swap'),
            ('network', 'received_bytes as received, sent_bytes as sent')
        ) as streams (name, fields)
    loop
        if coalesce(obj_description(to_regclass('live.' || wanted.name), 'pg_class') like 'pgpulse:%',
            to_regclass('live.' || wanted.name) is null) then
            execute format(
                'create or replace view live.%I as
                select "time", host, %s
                from public.system_metrics
                -- not the packed history, which would be unpacked for it
                where pgpulse.recent("time", ''1 day'')',
                wanted.name, wanted.fields
            );
            execute format('comment on view live.%I is %L', wanted.name, 'pgpulse: a channel for each host');
            perform pgpulse.add_stream(
                wanted.name, split => 'host', beat => '1 second', slow => '5 minutes'
            );
        else
            raise warning 'Leaves live.% as it is: migrate did not make it', wanted.name;
        end if;
    end loop;
end
$$;
