-- Two tables that applications insert into: one polled by people's own queries, one pushed.

create table if not exists public.metrics (
    id bigserial primary key,
    "timestamp" timestamptz not null default now(),
    value double precision
);

create index if not exists metrics_timestamp on public.metrics ("timestamp");

comment on table public.metrics is 'Samples of one value over time.';
comment on column public.metrics."timestamp" is 'When the sample was taken.';
comment on column public.metrics.value is 'The sample; null and NaN draw a gap.';

create table if not exists public.live_metrics (
    id bigserial primary key,
    "timestamp" timestamptz not null default now(),
    value double precision
);

create index if not exists live_metrics_timestamp on public.live_metrics ("timestamp");

comment on table public.live_metrics is
    'Samples of one value over time, each announced as JSON on the channel influx_feed.';
comment on column public.live_metrics."timestamp" is 'When the sample was taken.';
comment on column public.live_metrics.value is 'The sample; null and NaN draw a gap.';
