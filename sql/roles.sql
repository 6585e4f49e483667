-- The login roles, where they are missing and the user may create roles; run first at every
-- migrate, which then sets their passwords. The comment marks what uninstall.sql may drop.
do $$
declare
    wanted record;
begin
    for wanted in
        select *
        from (values
            ('server', 'pgpulse: scripts log in as this role'),
            ('grafana_readonly', 'pgpulse: Grafana logs in as this role and only reads'),
            ('collector', 'pgpulse: scripts/collect.ts logs in as this role and only sends samples')
        ) as roles (name, purpose)
        where to_regrole(name) is null
    loop
        begin
            execute format('create role %I login', wanted.name);
            execute format('comment on role %I is %L', wanted.name, wanted.purpose);
        exception
            when insufficient_privilege then
                raise notice 'Role % is missing and % may not create it', wanted.name, current_user
                    using hint = format('As an administrator: create role %I login', wanted.name);
            -- Roles belong to the whole server: a migrate of another database may be quicker.
            when duplicate_object or unique_violation then
                null;
        end;
    end loop;
end
$$;
