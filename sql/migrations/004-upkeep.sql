-- Rollups: how long each step is kept, and from when on there is something.

alter table pgpulse.rollups
    -- null: for ever
    add column keep_1m interval check (keep_1m > interval '0'),
    add column keep_1h interval check (keep_1h > interval '0'),
    add column keep_1d interval check (keep_1d > interval '0'),
    -- begin of a UTC day; what is older is gone, or on its way out: rows of the source, and each step
    add column since_rows timestamptz not null default '-infinity',
    add column since_1m timestamptz not null default '-infinity',
    add column since_1h timestamptz not null default '-infinity',
    add column since_1d timestamptz not null default '-infinity',
    -- some of it is still there
    add column retiring boolean not null default false,
    -- no minute rolled up is later
    add column newest timestamptz not null default '-infinity';

do $$
declare
    r pgpulse.rollups;
begin
    for r in select * from pgpulse.rollups loop
        execute format(
            'update pgpulse.rollups
            set newest = coalesce((select max(bucket) + interval ''1 day'' from rollup.%I), ''-infinity'')
            where rollup = $1',
            r.rollup || '_1d'
        ) using r.rollup;
    end loop;
end
$$;

-- They give and take something else from now on.
drop function if exists pgpulse.refresh_rollups(text);
drop function if exists pgpulse.refresh_rollup(pgpulse.rollups, bigint);
drop function if exists pgpulse.capture_changes(pgpulse.rollups, boolean);
drop function if exists pgpulse.put_partials(pgpulse.rollups, text, text, text);
drop function if exists pgpulse.rows_with_pairs(pgpulse.rollups, text);
