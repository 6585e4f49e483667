-- Removes what migrate made. Tables with people's data stay unless the setting pgpulse.data is on:
--     psql -1 -c 'set pgpulse.data = on' -f sql/uninstall.sql
-- (deno task migrate --uninstall [--data] does the same, lists it first, and asks.)

-- Rollups leave their sources as they were, without the column tx.
do $$
begin
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
        'live_metrics'
    ] loop
        if to_regclass('public.' || name) is null then
            continue;
        elsif coalesce(obj_description(to_regclass('public.' || name), 'pg_class'), '')
            not like 'pgpulse:%' then
            raise notice 'keeps table public.%: migrate did not make it', name;
        elsif coalesce(current_setting('pgpulse.data', true), '') = 'on' then
            raise notice 'drops table public.% with its data', name;
            execute format('drop table public.%I cascade', name);
        else
            raise notice 'keeps table public.% with its data', name;
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
        where rolname in ('server', 'grafana_readonly')
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
