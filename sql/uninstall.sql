-- Removes what migrate made. Tables with people's data stay unless the setting pgpulse.data is on:
--     psql -1 -c 'set pgpulse.data = on' -f sql/uninstall.sql
-- (deno task migrate --uninstall [--data] does the same, lists it first, and asks.)

-- The factory's views go, and what stands behind machines becomes a table of that name again.
do $$
declare
    name text;
begin
    foreach name in array array['machine_metrics_hourly', 'machine_oee_hourly', 'unknown_machines', 'machines'] loop
        if obj_description(to_regclass('public.' || name), 'pg_class') like 'pgpulse:%'
            and (select relkind from pg_class where oid = to_regclass('public.' || name)) = 'v' then
            raise notice 'drops view public.%', name;
            execute format('drop view public.%I cascade', name);
        end if;
    end loop;
    if to_regclass('public.machine_states') is not null and to_regclass('public.machines') is null then
        alter table public.machine_states rename to machines;
    end if;
end
$$;

-- So do the views of hosts.
do $$
declare
    name regclass;
begin
    for name in
        select c.oid::regclass
        from pg_class c
        where c.relnamespace = 'public'::regnamespace
            and c.relkind = 'v'
            and c.relname ~ '^(hosts?|postgresql)_'
            and c.relname <> 'postgresql_metrics'
            and obj_description(c.oid, 'pg_class') like 'pgpulse:%'
    loop
        raise notice 'drops view %', name;
        execute format('drop view %s cascade', name);
    end loop;
end
$$;

-- Sinks and rollups leave their sources as they were, without the column tx.
do $$
begin
    if to_regclass('pgpulse.sinks') is not null then
        perform pgpulse.drop_sink(sink) from pgpulse.sinks;
    end if;
    if to_regclass('pgpulse.rollups') is not null then
        perform pgpulse.drop_rollup(rollup) from pgpulse.rollups;
    end if;
    if to_regnamespace('rollup') is not null then
        raise notice 'drops schema rollup with what was rolled up';
        drop schema rollup cascade;
    end if;
    if to_regnamespace('compat') is not null then
        raise notice 'drops schema compat with time_bucket';
        drop schema compat cascade;
    end if;
    if exists (
        select
        from pg_db_role_setting s, unnest(s.setconfig) as option
        where s.setrole = 0
            and s.setdatabase = (select oid from pg_database where datname = current_database())
            and option = 'search_path="$user", public, compat'
    ) then
        execute format('alter database %I reset search_path', current_database());
    end if;
end
$$;

-- Stored tables stay stored, readable and writable under their names: their views need nothing of
-- schema pgpulse. But nobody makes partitions and packs any more; pgpulse.drop_storage, before this,
-- makes a plain table. A comment keeps the settings for the next migrate.
do $$
declare
    s record;
begin
    if to_regclass('pgpulse.storage') is not null then
        for s in
            select k.packed, k.source, jsonb_strip_nulls(to_jsonb(k) - '{draining,draining_for,fault}'::text[]) as settings
            from pgpulse.storage k
        loop
            raise notice 'keeps % as it is stored: a view over schemas rows and packed', s.source;
            execute format('comment on table %s is %L', s.packed, s.settings);
        end loop;
    end if;
end
$$;

-- Stays where somebody has replaced it.
do $$
begin
    if to_regprocedure('public.transform_reading(text,text,jsonb)') is null then
        return;
    elsif (
        select btrim(prosrc, E' \n') from pg_proc where oid = 'public.transform_reading(text,text,jsonb)'::regprocedure
    ) = 'select * from pgpulse.reading_columns(source, source_id, payload)' then
        raise notice 'drops function public.transform_reading';
        drop function public.transform_reading(text, text, jsonb);
    else
        raise notice 'keeps function public.transform_reading: it was changed';
    end if;
end
$$;

-- Cascades reach what stands on these: triggers on watched tables, and views that people added.
do $$
begin
    if to_regnamespace('live') is not null then
        raise notice 'drops schema live with every stream';
        drop schema live cascade;
    end if;
    if to_regnamespace('pgpulse') is not null then
        raise notice 'drops schema pgpulse';
        drop schema pgpulse cascade;
    end if;
    if to_regprocedure('public.notify_new_record()') is not null then
        raise notice 'drops function public.notify_new_record()';
        drop function public.notify_new_record() cascade;
    end if;
end
$$;

-- Every table with data that a migration makes in public stands in this list.
do $$
declare
    name text;
begin
    foreach name in array array[
        'metrics',
        'live_metrics',
        'machines',
        'machine_history',
        'machine_metrics',
        'energy_consumption',
        'production',
        'alarms',
        'maintenance',
        'downtime',
        'hosts',
        'system_metrics',
        'postgresql_metrics',
        'postgresql_instances',
        'reading_analytics',
        'reading_keys',
        'reading_failures',
        'reading_sources',
        'reading_flow',
        'sync_runs'
    ] loop
        if to_regclass('public.' || name) is null then
            continue;
        elsif coalesce(obj_description(to_regclass('public.' || name), 'pg_class'), '')
            not like 'pgpulse:%' then
            raise notice 'keeps table public.%: migrate did not make it', name;
        elsif coalesce(current_setting('pgpulse.data', true), '') = 'on' then
            raise notice 'drops table public.% with its data', name;
            if (select relkind from pg_class where oid = to_regclass('public.' || name)) = 'v' then
                execute format('drop view public.%I cascade', name);
                execute format('drop table rows.%1$I, packed.%1$I cascade', name);
                execute format('drop function rows.%I()', name || '_write');
                execute format('drop function packed.%I(int)', name || '_guess');
                for level in 1..5 loop
                    execute format('drop function packed.%I(float8)', name || '_' || 8 ^ level);
                end loop;
            else
                execute format('drop table public.%I cascade', name);
            end if;
        else
            raise notice 'keeps table public.% with its data', name;
        end if;
    end loop;
end
$$;

-- Behind stored tables that stay, these stay too.
do $$
declare
    name text;
begin
    foreach name in array array['rows', 'packed'] loop
        if to_regnamespace(name) is not null and not exists (
            select
            from pg_class
            where relnamespace in (to_regnamespace('rows'), to_regnamespace('packed')) and relkind in ('r', 'p', 'v')
        ) then
            raise notice 'drops schema %', name;
            execute format('drop schema %I cascade', name);
        end if;
    end loop;
end
$$;

-- The roles that roles.sql made, with all their rights, unless something else needs them.
do $$
declare
    role record;
    reason text;
    more text;
begin
    for role in
        select
            oid,
            rolname as name,
            coalesce(shobj_description(oid, 'pg_authid') like 'pgpulse:%', false) as ours
        from pg_roles
        where rolname in ('server', 'grafana_readonly', 'collector')
        order by 2
    loop
        begin
            execute format(
                'alter default privileges in schema public revoke all on tables from %1$I;
                 alter default privileges in schema public revoke all on sequences from %1$I',
                role.name
            );
            if not role.ours then
                raise notice 'keeps role % and its rights on what stays: migrate did not make it',
                    role.name;
                continue;
            -- DROP OWNED would take these too.
            elsif exists (
                select
                from pg_shdepend
                where refclassid = 'pg_authid'::regclass and refobjid = role.oid and deptype = 'o'
            ) then
                raise notice 'keeps role %: it owns objects (reassign owned by % to another role)',
                    role.name, role.name;
                continue;
            end if;
            if not pg_has_role(role.oid, 'usage') then
                execute format('grant %I to current_user', role.name);
            end if;
            execute format('drop owned by %I', role.name);
            execute format('drop role %I', role.name);
            raise notice 'drops role %', role.name;
        exception when insufficient_privilege or dependent_objects_still_exist then
            get stacked diagnostics reason = message_text, more = pg_exception_detail;
            raise notice 'keeps role %: %', role.name, reason
                using detail = more;
        end;
    end loop;
end
$$;
