-- The factory's views and functions; its tables are in migrations/006-factory.sql.

-- Present state. "timestamp" lies shortly before now, whatever the clocks of browser and database
-- say, so that a query over a range that ends now finds every machine.
do $$
declare
    fresh boolean := to_regclass('public.machines') is null;
    piece text;
begin
    execute format(
        $q$create or replace view public.machines%s as
        select id, name, area, status, oee, availability, performance, quality, last_updated,
            now() - interval '30 seconds' as "timestamp", plant, target_oee%s
        from public.machine_states$q$,
        -- Policies of the table go on to mean who asks.
        (
            select case when relrowsecurity then ' with (security_invoker = true)' end
            from pg_class
            where oid = 'public.machine_states'::regclass
        ),
        (
            select coalesce(string_agg(format(', %I', attname), '' order by attnum), '')
            from pg_attribute
            where attrelid = 'public.machine_states'::regclass
                and attnum > 0
                and not attisdropped
                and attname not in (
                    'id', 'name', 'area', 'status', 'oee', 'availability', 'performance', 'quality',
                    'last_updated', 'timestamp', 'plant', 'target_oee'
                )
        )
    );
    -- Who might read or write a table of that name, its owner too, may do so with the view.
    for piece in
        select format('grant %s%s on public.machines to %s%s', a.privilege_type, '(' || quote_ident(a.name) || ')',
            case a.grantee when 0 then 'public' else a.grantee::regrole::text end,
            case when a.is_grantable then ' with grant option' end)
        from (
            select null as name, given.*
            from pg_class c, aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) given
            where c.oid = 'public.machine_states'::regclass
            union all
            select t.attname, given.*
            from pg_attribute t, aclexplode(t.attacl) given
            where t.attrelid = 'public.machine_states'::regclass
                and not t.attisdropped
                and t.attname <> 'timestamp'
        ) as a
        where fresh
            and a.privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
            and a.grantee not in (select oid from pg_roles where rolname = current_user)
    loop
        execute piece;
    end loop;
end
$$;

comment on view public.machines is
    'pgpulse: the present state of each machine, to read and to write; its past is machine_history.';
comment on column public.machines."timestamp" is
    'Always just now: the state that the row tells. When somebody wrote it last is last_updated.';

create or replace function pgpulse.note_machine_state(
    m public.machine_states,
    gone boolean,
    at timestamptz default clock_timestamp()
) returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    insert into public.machine_history (
        machine_id, "timestamp", name, area, status, oee, availability, performance, quality
    )
    select
        m.id,
        coalesce(at, clock_timestamp()),
        m.name,
        m.area,
        case when not gone then m.status end,
        case when not gone then m.oee end,
        case when not gone then m.availability end,
        case when not gone then m.performance end,
        case when not gone then m.quality end
    on conflict (machine_id, "timestamp") do update set
        name = excluded.name,
        area = excluded.area,
        status = excluded.status,
        oee = excluded.oee,
        availability = excluded.availability,
        performance = excluded.performance,
        quality = excluded.quality
$$;

comment on function pgpulse.note_machine_state is
    'Writes a state into machine_history; of a machine that is gone, one without status.';

revoke execute on function pgpulse.note_machine_state from public;

create or replace function pgpulse.before_machine_state() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if new.plant <> old.plant then
        raise exception 'Cannot give machine "%" to plant "%": it is one of plant "%"',
            new.id, new.plant, old.plant
            using errcode = 'unique_violation',
                hint = format('Ids are the same in all plants: call it "%s-%s"; or delete the other '
                    'first, if it has moved', new.plant, new.id);
    end if;
    if new.last_updated is not distinct from old.last_updated then
        new.last_updated := clock_timestamp();
    -- A time to come is a clock that was wrong, and must not shut out all that is right.
    elsif new.last_updated < old.last_updated and old.last_updated <= clock_timestamp() and new.id = old.id then
        perform pgpulse.note_machine_state(new, false, new.last_updated);
        return old;
    end if;
    return new;
end
$$;

comment on function pgpulse.before_machine_state() is
    'Trigger function: sets last_updated where the writer does not; keeps a machine in its plant. A report '
    'that comes late, by its last_updated, goes into the history and leaves the present as it is.';

revoke execute on function pgpulse.before_machine_state from public;

create or replace function pgpulse.after_machine_state() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if tg_op = 'TRUNCATE' then
        perform pgpulse.note_machine_state(m, true) from public.machine_states m;
        return null;
    end if;
    if tg_op = 'DELETE' then
        perform pgpulse.note_machine_state(old, true);
        return null;
    end if;
    -- Another id is another machine.
    if old.id <> new.id then
        perform pgpulse.note_machine_state(old, true, new.last_updated);
    end if;
    perform pgpulse.note_machine_state(new, false, new.last_updated);
    return null;
end
$$;

comment on function pgpulse.after_machine_state() is
    'Trigger function: writes each change into machine_history; for a machine that is deleted, or has '
    'another id from now on, one without status.';

revoke execute on function pgpulse.after_machine_state from public;

create or replace trigger pgpulse_before
before update on public.machine_states
for each row
execute function pgpulse.before_machine_state();

create or replace trigger pgpulse_after_write
after insert or delete on public.machine_states
for each row
execute function pgpulse.after_machine_state();

create or replace trigger pgpulse_after_update
after update on public.machine_states
for each row
when (
    (old.id, old.name, old.area, old.status, old.oee, old.availability, old.performance, old.quality)
    is distinct from
    (new.id, new.name, new.area, new.status, new.oee, new.availability, new.performance, new.quality)
)
execute function pgpulse.after_machine_state();

create or replace trigger pgpulse_before_truncate
before truncate on public.machine_states
for each statement
execute function pgpulse.after_machine_state();

-- Machines that were there before have a past from now on.
insert into public.machine_history (
    machine_id, "timestamp", name, area, status, oee, availability, performance, quality
)
select
    m.id, least(m.last_updated, now()), m.name, m.area, m.status, m.oee, m.availability, m.performance,
    m.quality
from public.machine_states m
where not exists (select from public.machine_history h where h.machine_id = m.id);

create or replace function pgpulse.machine_state_at(
    "from" timestamptz,
    "to" timestamptz,
    machine_ids text[] default null,
    points int default null
) returns table (
    machine_id text,
    name text,
    area text,
    status text,
    started_at timestamptz,
    ended_at timestamptz
)
language sql
stable
parallel safe
rows 1000
set search_path = pg_catalog, pg_temp
as $$
    -- each id by a jump in the index, then its rows: never the whole table
    with recursive ids as (
        (select h.machine_id from public.machine_history h order by 1 limit 1)
        union all
        select (
            select h.machine_id
            from public.machine_history h
            where h.machine_id > ids.machine_id
            order by 1
            limit 1
        )
        from ids
        where ids.machine_id is not null
    ), chosen as materialized (
        select i.machine_id from ids i where machine_ids is null and i.machine_id is not null
        union
        select unnest(machine_ids)
    ), range as materialized (
        select
            least("to", now()) as till,
            coalesce(points, greatest(10, least(500, 3000 / greatest(count(*), 1))))::int as points
        from chosen
    ), busy as materialized (
        select
            c.machine_id,
            exists (
                select
                from public.machine_history h
                where h.machine_id = c.machine_id and h."timestamp" > "from" and h."timestamp" < r.till
                offset r.points
            ) as busy
        from chosen c, range r
    ), states as (
        select s.*, greatest(s."timestamp", "from") as at
        from busy b, range r, lateral (
            (
                select *
                from public.machine_history h
                where h.machine_id = b.machine_id and h."timestamp" <= "from"
                order by h."timestamp" desc
                limit 1
            )
            union all
            select *
            from public.machine_history h
            where h.machine_id = b.machine_id and h."timestamp" > "from" and h."timestamp" < r.till
        ) as s
        where not b.busy
        union all
        select s.*, moment.begins
        from busy b, range r, lateral (
            select
                "from" + i * (r.till - "from") / r.points as begins,
                "from" + (i + 0.5) * (r.till - "from") / r.points as middle
            from generate_series(0, r.points - 1) i
        ) as moment, lateral (
            select *
            from public.machine_history h
            where h.machine_id = b.machine_id and h."timestamp" <= moment.middle
            order by h."timestamp" desc
            limit 1
        ) as s
        where b.busy
    ), changes as (
        select
            s.*,
            lag((s.name, s.area, s.status)) over (partition by s.machine_id order by s.at)
                is not distinct from (s.name, s.area, s.status) as goes_on
        from states s
    ), spans as (
        select
            c.*,
            lead(c.at, 1, (select till from range)) over (partition by c.machine_id order by c.at) as until
        from changes c
        where not coalesce(c.goes_on, false)
    )
    select s.machine_id, s.name, s.area, s.status, s.at, s.until
    from spans s
    where s.status is not null and s.until > s.at
    order by s.machine_id, s.at
$$;

comment on function pgpulse.machine_state_at is
    'The states of machines (all, or these) that a range meets, cut to it, one row from change to change. '
    'Of a machine with more changes than points: its state at so many regular moments, as more could '
    'not be told apart on a screen.';

create or replace function pgpulse.machine_time_in_state(
    "from" timestamptz,
    "to" timestamptz,
    machine_ids text[] default null
) returns table (machine_id text, area text, status text, seconds double precision)
language sql
stable
parallel safe
rows 100
set search_path = pg_catalog, pg_temp
as $$
    with chosen as (
        select m.id from public.machine_states m where machine_ids is null
        union
        select unnest(machine_ids)
    )
    select c.id, m.area, s.status, extract(epoch from sum(s.until - greatest(s."timestamp", "from")))::float8
    from chosen c
    left join public.machine_states m on m.id = c.id, lateral (
        select
            h.status,
            h."timestamp",
            lag(h."timestamp", 1, least("to", now())) over (order by h."timestamp" desc) as until
        from public.machine_history h
        where h.machine_id = c.id
            and h."timestamp" >= coalesce(
                (
                    select b."timestamp"
                    from public.machine_history b
                    where b.machine_id = c.id and b."timestamp" <= "from"
                    order by b."timestamp" desc
                    limit 1
                ),
                "from"
            )
            and h."timestamp" < least("to", now())
    ) as s
    where s.status is not null and s.until > "from"
    group by 1, 2, 3
    order by 1, 2, 3
$$;

comment on function pgpulse.machine_time_in_state is
    'Seconds that machines (all, or these) were in each state during a range; area: the present one.';

create or replace function pgpulse.machine_counts(
    "from" timestamptz,
    "to" timestamptz,
    machine_ids text[] default null,
    points int default null
) returns table ("time" timestamptz, running int, idle int, error int, maintenance int)
language sql
stable
parallel safe
rows 300
set search_path = pg_catalog, pg_temp
as $$
    with chosen as materialized (
        select m.id from public.machine_states m where machine_ids is null
        union
        select unnest(machine_ids)
    ), range as materialized (
        select
            least("to", now()) as till,
            coalesce(points, greatest(10, least(300, 3000 / greatest(count(*), 1))))::int as points
        from chosen
    )
    select
        moment.at,
        count(*) filter (where s.status = 'running')::int,
        count(*) filter (where s.status = 'idle')::int,
        count(*) filter (where s.status = 'error')::int,
        count(*) filter (where s.status = 'maintenance')::int
    from range r, lateral (
        select "from" + i * (r.till - "from") / r.points as at
        from generate_series(1, r.points) i
        where r.till > "from"
    ) as moment, chosen c, lateral (
        select h.status
        from public.machine_history h
        where h.machine_id = c.id and h."timestamp" <= moment.at
        order by h."timestamp" desc
        limit 1
    ) as s
    group by 1
    order by 1
$$;

comment on function pgpulse.machine_counts is
    'How many machines (of all, or of these) were running, idle, in error and in maintenance at so many '
    'regular moments of a range.';

create or replace function pgpulse.metric_unit(variadic metric_types text[]) returns text
language sql
immutable
parallel safe
set search_path = pg_catalog, pg_temp
as $$
    select case
        when count(distinct unit) = 1 and bool_and(unit is not null) then min(unit)
        else 'short'
    end
    from unnest(metric_types) as m (name)
    left join (values
        ('temperature', 'celsius'),
        ('multi_zone_temp', 'celsius'),
        ('pressure', 'pressurebar'),
        ('power', 'kwatt'),
        ('speed', 'suffix: /min'),
        ('vibration', 'suffix: mm/s')
    ) as known (name, unit) using (name)
$$;

comment on function pgpulse.metric_unit is
    'Grafana''s name of the unit of a metric_type, or of several if they have the same.';

create or replace view public.machine_oee_hourly as
select
    p.hour,
    p.machine_id,
    m.area,
    -- columns that others made may be integers
    100::float8 * p.run_seconds / nullif(p.planned_seconds, 0) as availability,
    100::float8 * p.ideal_cycle_seconds * p.total_count / nullif(p.run_seconds, 0) as performance,
    100::float8 * p.good_count / nullif(p.total_count, 0) as quality,
    -- the product of the three, with what cancels left out: 0 where nothing ran
    100::float8 * p.ideal_cycle_seconds * p.good_count / nullif(p.planned_seconds, 0) as oee,
    p.planned_seconds,
    p.run_seconds,
    p.ideal_cycle_seconds * p.total_count as ideal_seconds,
    p.total_count,
    p.good_count
from public.production p
left join public.machines m on m.id = p.machine_id;

comment on view public.machine_oee_hourly is
    'pgpulse: OEE of each machine and hour in percent (ISO 22400-2), null where nothing was planned. Of '
    'several hours or machines: 100.0 * sum(run_seconds) / sum(planned_seconds), 100.0 * sum(ideal_seconds) / '
    'sum(run_seconds), 100.0 * sum(good_count) / sum(total_count), and their product.';

create or replace function pgpulse.add_factory(theirs boolean default true) returns void
language plpgsql
as $$
declare
    wanted record;
    ours boolean;
    reason text;
    advice text;
begin
    for wanted in
        select *
        from (values
            ('machine_metrics', 'timestamp', '{machine_id,metric_type,zone_number}'::text[],
                '{value,target_value}'::text[]),
            ('energy_consumption', 'hour', '{machine_id}', '{energy_kwh}'),
            ('production', 'hour', '{machine_id}', array[
                'planned_seconds', 'run_seconds', 'ideal_cycle_seconds * total_count as ideal_seconds',
                'ideal_cycle_seconds * good_count as good_seconds', 'total_count', 'good_count'
            ])
        ) as tables (name, time_column, keys, measures)
    loop
        ours := coalesce(
            obj_description(to_regclass('public.' || wanted.name), 'pg_class') like 'pgpulse:%', false
        );
        if not (ours or theirs) then
            raise warning 'Leaves public.% as it is: migrate did not make it', wanted.name
                using detail = 'select pgpulse.add_factory() rolls it up, and stores machine_metrics in '
                    'partitions.';
            continue;
        end if;
        if not exists (select from pgpulse.rollups where rollup = wanted.name) then
            perform pgpulse.add_rollup(
                to_regclass('public.' || wanted.name), wanted.time_column, measures => wanted.measures,
                keys => wanted.keys, name => wanted.name
            );
        end if;
        -- Stored already it is a view, or a hypertable.
        if wanted.name = 'machine_metrics'
            and (select relkind from pg_class where oid = to_regclass('public.machine_metrics')) = 'r'
            and not pgpulse.is_hypertable(to_regclass('public.machine_metrics')) then
            begin
                perform pgpulse.add_storage(
                    'public.machine_metrics', wanted.time_column, keys => wanted.keys
                );
            exception when others then
                if ours then
                    raise;
                end if;
                -- Rolled up it is quick all the same.
                get stacked diagnostics reason = message_text, advice = pg_exception_hint;
                raise warning '%', reason using hint = advice;
            end;
        end if;
    end loop;

    if to_regclass('rollup.machine_metrics') is null then
        return;
    end if;
    create or replace view public.unknown_machines as
    select r.machine_id, max(r."time") as last_hour, sum(r.points)::bigint as points
    from rollup.machine_metrics r
    where r.step = interval '1 hour'
        and r."time" > now() - interval '1 day'
        and not exists (select from public.machine_states m where m.id = r.machine_id)
    group by 1;
    comment on view public.unknown_machines is
        'pgpulse: ids in the last day of machine_metrics that machines lacks.';
    if coalesce(
        obj_description(to_regclass('public.machine_metrics_hourly'), 'pg_class') like 'pgpulse:%',
        to_regclass('public.machine_metrics_hourly') is null
    ) then
        create or replace view public.machine_metrics_hourly as
        select
            "time" as hour,
            machine_id,
            metric_type,
            sum(value_sum) / nullif(sum(value_count), 0)::float8 as avg_value,
            min(value_min) as min_value,
            max(value_max) as max_value,
            sum(value_count)::bigint as point_count
        from rollup.machine_metrics
        where step = interval '1 hour'
        group by 1, 2, 3;
        comment on view public.machine_metrics_hourly is
            'pgpulse: machine_metrics by hour, zones together, the present hour included.';
    end if;
end
$$;

comment on function pgpulse.add_factory is
    'Rolls up machine_metrics, energy_consumption and production, stores machine_metrics in partitions, '
    'and makes machine_metrics_hourly: what migrate does with tables that it made.';

select pgpulse.add_factory(theirs => false);
