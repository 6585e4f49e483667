-- time_bucket with TimescaleDB's meaning, where that extension is not installed.

do $migrate$
begin
    -- The extension brings its own; where it came later, ours yields at the end of every migrate.
    if exists (select from pg_extension where extname = 'timescaledb') then
        return;
    end if;

    create schema if not exists compat;
    comment on schema compat is
        'time_bucket for servers without TimescaleDB; last in the search_path, so that the real one wins.';

    -- Not strict, although a null gives null: only so the planner puts what they do in their place,
    -- which is a date_bin mostly, and twelve times as fast.
    -- Steps of months count from 2000-01-01, all others from Monday 2000-01-03. Months and days do
    -- not mix, as their lengths do not divide each other.
    create or replace function compat.time_bucket(
        bucket_width interval,
        ts timestamp,
        origin timestamp
    ) returns timestamp
    language sql
    immutable
    parallel safe
    as $$
        select case
            when extract(year from bucket_width) * 12 + extract(month from bucket_width) = 0
                then date_bin(bucket_width, ts, origin)
            when bucket_width <> make_interval(months => (
                extract(year from bucket_width) * 12 + extract(month from bucket_width)
            )::int)
                then date_bin(bucket_width, ts, origin)
            -- infinity has no month
            when not isfinite(ts) then ts
            else date_trunc('month', origin) + make_interval(months => (floor(
                (
                    (extract(year from ts) - extract(year from origin)) * 12
                    + extract(month from ts) - extract(month from origin)
                ) / (extract(year from bucket_width) * 12 + extract(month from bucket_width))
            ) * (extract(year from bucket_width) * 12 + extract(month from bucket_width)))::int)
        end
    $$;

    create or replace function compat.time_bucket(bucket_width interval, ts timestamp)
    returns timestamp
    language sql
    immutable
    parallel safe
    as $$
        select case
            when extract(year from bucket_width) * 12 + extract(month from bucket_width) = 0
                then date_bin(bucket_width, ts, timestamp '2000-01-03')
            else compat.time_bucket(bucket_width, ts, timestamp '2000-01-01')
        end
    $$;

    create or replace function compat.time_bucket(bucket_width interval, ts timestamptz)
    returns timestamptz
    language sql
    immutable
    parallel safe
    as $$
        select case
            when extract(year from bucket_width) * 12 + extract(month from bucket_width) = 0
                then date_bin(bucket_width, ts, timestamptz '2000-01-03 00:00:00+00')
            else compat.time_bucket(bucket_width, ts at time zone 'UTC', timestamp '2000-01-01')
                at time zone 'UTC'
        end
    $$;

    create or replace function compat.time_bucket(
        bucket_width interval,
        ts timestamptz,
        origin timestamptz
    ) returns timestamptz
    language sql
    immutable
    parallel safe
    as $$
        select compat.time_bucket(bucket_width, ts at time zone 'UTC', origin at time zone 'UTC')
            at time zone 'UTC'
    $$;

    -- Buckets of local time: a day of daylight-saving change has 23 or 25 hours.
    create or replace function compat.time_bucket(
        bucket_width interval,
        ts timestamptz,
        timezone text,
        origin timestamptz default null,
        "offset" interval default null
    ) returns timestamptz
    language sql
    immutable
    parallel safe
    as $$
        select (case
            when origin is not null then compat.time_bucket(
                bucket_width,
                (ts at time zone timezone) - coalesce("offset", '0'),
                origin at time zone timezone
            )
            else compat.time_bucket(bucket_width, (ts at time zone timezone) - coalesce("offset", '0'))
        end + coalesce("offset", '0')) at time zone timezone
    $$;

    create or replace function compat.time_bucket(
        bucket_width interval,
        ts timestamptz,
        "offset" interval
    ) returns timestamptz
    language sql
    immutable
    parallel safe
    as $$
        select compat.time_bucket(bucket_width, ts - "offset") + "offset"
    $$;

    create or replace function compat.time_bucket(
        bucket_width interval,
        ts timestamp,
        "offset" interval
    ) returns timestamp
    language sql
    immutable
    parallel safe
    as $$
        select compat.time_bucket(bucket_width, ts - "offset") + "offset"
    $$;

    create or replace function compat.time_bucket(bucket_width interval, ts date) returns date
    language sql
    immutable
    parallel safe
    as $$
        select compat.time_bucket(bucket_width, ts::timestamp)::date
    $$;

    create or replace function compat.time_bucket(bucket_width interval, ts date, origin date)
    returns date
    language sql
    immutable
    parallel safe
    as $$
        select compat.time_bucket(bucket_width, ts::timestamp, origin::timestamp)::date
    $$;

    create or replace function compat.time_bucket(
        bucket_width interval,
        ts date,
        "offset" interval
    ) returns date
    language sql
    immutable
    parallel safe
    as $$
        select (compat.time_bucket(bucket_width, ts - "offset") + "offset")::date
    $$;

    create or replace function compat.time_bucket(
        bucket_width bigint,
        ts bigint,
        "offset" bigint default 0
    ) returns bigint
    language sql
    immutable
    parallel safe
    as $$
        select ts - (((ts - "offset") % bucket_width) + bucket_width) % bucket_width
    $$;

    create or replace function compat.time_bucket(
        bucket_width int,
        ts int,
        "offset" int default 0
    ) returns int
    language sql
    immutable
    parallel safe
    as $$
        select ts - (((ts - "offset") % bucket_width) + bucket_width) % bucket_width
    $$;
end
$migrate$;
