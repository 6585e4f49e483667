-- All rights, role by role; run at every migrate, so that a role made later gets its own too.

-- Runs as its owner: whoever may call it could keep the relays from their work.
revoke execute on function pgpulse.hold_lease from public;

do $$
declare
    sequence regclass;
begin
    if to_regrole('server') is not null then
        grant usage on schema public, live, pgpulse to server;
        grant select, insert on public.metrics, public.live_metrics to server;
        for sequence in
            select s::regclass
            from unnest(array['metrics', 'live_metrics']) t, pg_get_serial_sequence('public.' || t, 'id') s
            where s is not null
        loop
            execute format('grant usage on sequence %s to server', sequence);
        end loop;
        grant select on all tables in schema live to server;
        grant select on pgpulse.streams, pgpulse.channels to server;
        grant execute on function pgpulse.hold_lease to server;
        alter default privileges in schema live grant select on tables to server;
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
        grant usage on schema public, live, pgpulse to grafana_readonly;
        for part in
            select c.oid::regclass as name, case c.relkind when 'S' then 'sequence' else 'table' end as kind
            from pg_class c
            where c.relnamespace in ('public'::regnamespace, 'live'::regnamespace, 'pgpulse'::regnamespace)
                and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
                and pg_has_role(c.relowner, 'usage')
        loop
            execute format('grant select on %s %s to grafana_readonly', part.kind, part.name);
        end loop;
        alter default privileges in schema public, live, pgpulse
            grant select on tables to grafana_readonly;
        alter default privileges in schema public, live, pgpulse
            grant select on sequences to grafana_readonly;
    end if;
end
$$;
