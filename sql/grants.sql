-- All rights, role by role; run at every migrate, so that a role made later gets its own too.

-- Runs as its owner: whoever may call it could keep the relays from their work.
revoke execute on function pgpulse.hold_lease from public;

-- Who may read or write a stored table needs to get at what is behind it; the tables have own rights.
grant usage on schema rows, packed to public;

do $$
declare
    sequence regclass;
    part regclass;
    -- Left out where its tables would be others' own.
    factory boolean := to_regprocedure('pgpulse.add_factory(boolean)') is not null;
begin
    if to_regrole('server') is not null then
        grant usage on schema public, live, rollup, pgpulse to server;
        grant select, insert on public.metrics, public.live_metrics to server;
        if factory then
            -- By its name, and where COPY goes straight to the partitions.
            execute format(
                'grant select, insert on public.machine_metrics, %s to server',
                pgpulse.rows_of('public.machine_metrics')
            );
            grant select, insert, update, delete
                on public.machines, public.machine_states, public.machine_history,
                public.energy_consumption, public.production,
                public.alarms, public.maintenance, public.downtime
                to server;
        end if;
        for sequence in
            select s::regclass
            from unnest(
                array['metrics', 'live_metrics']
                    || case when factory then array['alarms', 'maintenance', 'downtime'] end
            ) t
            join pg_attribute a on a.attrelid = ('public.' || t)::regclass and a.attname = 'id',
                pg_get_serial_sequence('public.' || t, 'id') s
            where s is not null
        loop
            execute format('grant usage on sequence %s to server', sequence);
        end loop;
        grant select on all tables in schema live to server;
        grant select on pgpulse.streams, pgpulse.channels, pgpulse.watches to server;
        grant execute on function pgpulse.watch_stream to server;
        grant select on public.hosts, public.postgresql_metrics, public.postgresql_instances to server;
        execute format(
            'grant select, insert on public.system_metrics, %s to server', pgpulse.rows_of('public.system_metrics')
        );
        grant execute on function pgpulse.collect to server;
        -- the views over them
        for part in
            select c.oid::regclass
            from pg_class c
            where c.relnamespace = 'public'::regnamespace
                and c.relkind = 'v'
                and c.relname ~ '^(hosts?|postgresql)_'
                and obj_description(c.oid, 'pg_class') like 'pgpulse:%'
        loop
            execute format('grant select on %s to server', part);
        end loop;
        execute format(
            'grant select on public.reading_analytics, %s to server', pgpulse.rows_of('public.reading_analytics')
        );
        grant select
            on public.reading_keys, public.reading_failures, public.reading_sources, public.reading_flow,
            pgpulse.reading_claims
            to server;
        grant select, insert, update on public.sync_runs to server;
        grant execute on function
            pgpulse.take_readings, pgpulse.take_letter, pgpulse.keep_failures, pgpulse.hold_claim,
            pgpulse.claimed_readings, pgpulse.claim_readings, pgpulse.release_readings,
            pgpulse.recover_readings, pgpulse.note_flow
            to server;
        grant select on pgpulse.rollups to server;
        grant select on all tables in schema rollup to server;
        grant execute on all functions in schema rollup to server;
        grant select on pgpulse.sinks to server;
        grant execute on function
            pgpulse.first_sink, pgpulse.plan_sink, pgpulse.read_sink, pgpulse.ack_sink
            to server;
        grant execute on function pgpulse.hold_lease, pgpulse.refresh_rollups, pgpulse.upkeep to server;
        grant select on pgpulse.storage to server;
        grant execute on all functions in schema packed to server;
        grant execute on function pgpulse.upkeep_storage, pgpulse.pack_from to server;
        alter default privileges in schema packed grant execute on functions to server;
        alter default privileges in schema live, rollup grant select on tables to server;
        alter default privileges in schema rollup grant execute on functions to server;
    end if;
end
$$;

-- Reads everything, now and later, and nothing else. What belongs to others is theirs to grant.
do $$
declare
    part record;
begin
    if to_regrole('grafana_readonly') is not null then
        execute format('grant connect on database %I to grafana_readonly', current_database());
        grant usage on schema public, live, rollup, pgpulse to grafana_readonly;
        for part in
            select c.oid::regclass as name, case c.relkind when 'S' then 'sequence' else 'table' end as kind
            from pg_class c
            where c.relnamespace::regnamespace::text in ('public', 'live', 'rollup', 'rows', 'packed', 'pgpulse')
                and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
                and pg_has_role(c.relowner, 'usage')
        loop
            execute format('grant select on %s %s to grafana_readonly', part.kind, part.name);
        end loop;
        grant execute on all functions in schema rollup, packed to grafana_readonly;
        grant execute on function pgpulse.watch_stream to grafana_readonly;
        alter default privileges in schema rollup, packed grant execute on functions to grafana_readonly;
        alter default privileges in schema public, live, rollup, rows, packed, pgpulse
            grant select on tables to grafana_readonly;
        alter default privileges in schema public, live, pgpulse
            grant select on sequences to grafana_readonly;
    end if;
end
$$;

-- Sends samples, by the one function that takes them, and reads nothing. Roles that are to send those of
-- certain hosts only are members of it: pgpulse.bind_host.
do $$
begin
    if to_regrole('collector') is not null then
        execute format('grant connect on database %I to collector', current_database());
        grant usage on schema pgpulse to collector;
        grant execute on function pgpulse.collect to collector;
    end if;
end
$$;

-- Who may read a stored table may read what is packed of it.
select pgpulse.share_rights(s)
from pgpulse.storage s
join pg_class c on c.oid = s.packed
where pg_has_role(c.relowner, 'usage');

-- Where time_bucket is ours, everybody finds it, last: a TimescaleDB of later wins.
do $$
declare
    who record;
begin
    perform pgpulse.yield_time_bucket();
    if to_regnamespace('compat') is null then
        return;
    end if;
    grant usage on schema compat to public;
    for who in
        select
            format('role %I in database %I', rolname, current_database()) as name,
            r.oid
        from pg_roles r
        where rolname in ('server', 'grafana_readonly')
        union all
        select format('database %I', current_database()), 0
    loop
        begin
            if not exists (
                select
                from pg_db_role_setting s, unnest(s.setconfig) as option
                where s.setrole = who.oid
                    and s.setdatabase in (
                        0, (select oid from pg_database where datname = current_database())
                    )
                    and option like 'search_path=%'
            ) then
                execute format('alter %s set search_path = "$user", public, compat', who.name);
            end if;
        exception when insufficient_privilege then
            raise notice 'Cannot set the search_path of % (%)', who.name, sqlerrm
                using hint = format('As an administrator: alter %s set search_path = "$user", public, compat', who.name);
        end;
    end loop;
end
$$;

-- To compile queries costs more than it saves where they read packed history: many small plans, whose
-- rows the planner can only guess.
do $$
declare
    role text;
begin
    for role in
        select rolname
        from pg_roles
        where rolname in ('server', 'grafana_readonly')
            and not exists (
                select
                from pg_db_role_setting s, unnest(s.setconfig) as option
                where s.setrole = pg_roles.oid and option like 'jit=%'
            )
    loop
        execute format('alter role %I in database %I set jit = off', role, current_database());
    end loop;
exception when insufficient_privilege then
    raise notice 'Cannot set jit = off for % (%)', role, sqlerrm
        using hint = format('As an administrator: alter role %I in database %I set jit = off', role, current_database());
end
$$;
