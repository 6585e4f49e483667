-- Two tables that applications insert into: one polled by people's own queries, one pushed.
-- Tables of these names that are there already are used as they are, if they fit; the comment tells
-- ours from theirs, so that --uninstall --data never drops what it did not make.

do $$
declare
    name text;
begin
    foreach name in array array['metrics', 'live_metrics'] loop
        if to_regclass('public.' || name) is null then
            execute format(
                'create table public.%I (
                    id bigserial primary key,
                    "timestamp" timestamptz not null default now(),
                    value double precision
                )',
                name
            );
            execute format('comment on table public.%I is ''pgpulse: samples of one value over time''', name);
        elsif 2 <> (
            select count(*)
            from pg_attribute
            where attrelid = to_regclass('public.' || name)
                and not attisdropped
                and (attname, atttypid) in (
                    ('timestamp', 'timestamptz'::regtype),
                    ('value', 'double precision'::regtype)
                )
        ) then
            raise exception 'Cannot use the table public.% that is there: it has another shape', name
                using hint = 'It needs "timestamp" timestamptz and value double precision; rename it, or '
                    'use another database';
        end if;
    end loop;
end
$$;

create index if not exists metrics_timestamp on public.metrics ("timestamp");
create index if not exists live_metrics_timestamp on public.live_metrics ("timestamp");

comment on column public.metrics."timestamp" is 'When the sample was taken.';
comment on column public.metrics.value is 'The sample; null and NaN draw a gap.';
comment on column public.live_metrics."timestamp" is 'When the sample was taken.';
comment on column public.live_metrics.value is 'The sample; null and NaN draw a gap.';
