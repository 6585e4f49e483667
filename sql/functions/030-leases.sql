-- Leases: one holder at a time, through any pooler, by the database's clock.

create or replace function pgpulse.hold_lease(lease text, holder text, seconds float8) returns boolean
language sql
security definer
set search_path = pgpulse, pg_temp
as $$
    insert into pgpulse.leases as l (lease, holder, until)
    values (lease, holder, clock_timestamp() + make_interval(secs => seconds))
    on conflict on constraint leases_pkey do update
    set holder = excluded.holder,
        until = excluded.until
    where l.holder = excluded.holder
        -- far ahead: the clock was put back
        or l.until not between clock_timestamp() and excluded.until + interval '1 minute'
    returning true
$$;

comment on function pgpulse.hold_lease is
    'Takes or renews a lease; null when somebody else holds it. seconds <= 0 gives it back.';

-- Held to the end of the transaction, as poolers need it; false where somebody else has it.
create or replace function pgpulse.lock(what text, wait boolean, shared boolean default false)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    key bigint := hashtextextended('pgpulse ' || what, 0);
begin
    if not wait then
        return case when shared then pg_try_advisory_xact_lock_shared(key) else pg_try_advisory_xact_lock(key) end;
    elsif shared then
        perform pg_advisory_xact_lock_shared(key);
    else
        perform pg_advisory_xact_lock(key);
    end if;
    return true;
end
$$;
