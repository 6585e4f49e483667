-- A factory: machines, what they measure, do, use and make. Tables of these names that are there
-- already are used as they are, if they fit; a table machines becomes machine_states, behind the
-- view machines (functions/200-factory.sql), and gets its name back by --uninstall.

do $$
declare
    wanted record;
    kind text;
    note text;
    lacks text;
begin
    if to_regclass('public.machine_states') is null
        and (select relkind from pg_class where oid = to_regclass('public.machines')) in ('r', 'p') then
        alter table public.machines rename to machine_states;
    end if;
    for wanted in
        select *
        from (values
            (
                'machine_states',
                'id text, name text, area text, status text, oee number, availability number, '
                    'performance number, quality number, last_updated timestamptz',
                $ddl$(
    id text primary key,
    name text,
    area text,
    status text
        constraint "status is running, idle, error or maintenance"
        check (status in ('running', 'idle', 'error', 'maintenance')),
    -- in percent
    oee double precision,
    availability double precision,
    performance double precision,
    quality double precision,
    last_updated timestamptz default now(),
    plant text not null default 'main',
    target_oee double precision default 60
)$ddl$,
                'The present state of each machine, behind the view machines'
            ),
            (
                'machine_history',
                'machine_id text, timestamp timestamptz, name text, area text, status text, oee number, '
                    'availability number, performance number, quality number',
                $ddl$(
    machine_id text not null,
    "timestamp" timestamptz not null,
    name text,
    area text,
    status text,
    oee double precision,
    availability double precision,
    performance double precision,
    quality double precision
)$ddl$,
                'Each change of a machine''s state and OEE, from its time on; written by a trigger'
            ),
            (
                'machine_metrics',
                'machine_id text, metric_type text, value number, timestamp timestamptz, '
                    'zone_number number, target_value number',
                $ddl$(
    machine_id text not null,
    metric_type text not null,
    value double precision,
    "timestamp" timestamptz not null default now(),
    zone_number int,
    target_value double precision
)$ddl$,
                'Samples of machines; rollup.machine_metrics has them by minute, hour and day'
            ),
            (
                'energy_consumption',
                'machine_id text, hour timestamptz, energy_kwh number',
                $ddl$(
    machine_id text not null,
    -- its begin
    hour timestamptz not null,
    energy_kwh double precision,
    primary key (machine_id, hour)
)$ddl$,
                'Energy of each machine, hour by hour'
            ),
            (
                'production',
                'machine_id text, hour timestamptz, planned_seconds number, run_seconds number, '
                    'ideal_cycle_seconds number, total_count number, good_count number',
                $ddl$(
    machine_id text not null,
    -- its begin
    hour timestamptz not null,
    planned_seconds double precision not null,
    run_seconds double precision not null,
    ideal_cycle_seconds double precision not null,
    total_count int not null,
    good_count int not null,
    primary key (machine_id, hour)
)$ddl$,
                'What OEE is made of, hour by hour: view machine_oee_hourly'
            ),
            (
                'alarms',
                'machine_id text, severity text, code text, message text, raised_at timestamptz, '
                    'cleared_at timestamptz',
                $ddl$(
    id bigserial primary key,
    machine_id text not null,
    severity text not null
        constraint "severity is info, warning or critical"
        check (severity in ('info', 'warning', 'critical')),
    code text not null,
    message text,
    raised_at timestamptz not null default now(),
    -- null: still there
    cleared_at timestamptz,
    unique (machine_id, code, raised_at)
)$ddl$,
                'Alarms of machines, raised and cleared'
            ),
            (
                'maintenance',
                'machine_id text, kind text, note text, started_at timestamptz, ended_at timestamptz',
                $ddl$(
    id bigserial primary key,
    machine_id text not null,
    kind text not null,
    note text,
    started_at timestamptz not null default now(),
    -- null: still under way
    ended_at timestamptz,
    unique (machine_id, started_at)
)$ddl$,
                'Maintenance of machines'
            ),
            (
                'downtime',
                'machine_id text, reason text, started_at timestamptz, ended_at timestamptz',
                $ddl$(
    id bigserial primary key,
    machine_id text not null,
    reason text not null,
    started_at timestamptz not null default now(),
    -- null: still under way
    ended_at timestamptz,
    unique (machine_id, started_at)
)$ddl$,
                'Stops that were not planned, with their reasons'
            )
        ) as tables (name, columns, ddl, note)
    loop
        select relkind, obj_description(oid, 'pg_class') into kind, note
        from pg_class
        where oid = to_regclass('public.' || wanted.name);
        if kind is null then
            execute format('create table public.%I %s', wanted.name, wanted.ddl);
            execute format('comment on table public.%I is %L', wanted.name, 'pgpulse: ' || wanted.note);
            continue;
        end if;
        select string_agg(format('"%s" %s', c.name, c.type), ', ' order by i)
        into lacks
        from string_to_table(wanted.columns, ', ') with ordinality as list (item, i),
            lateral (select split_part(item, ' ', 1) as name, split_part(item, ' ', 2) as type) as c
        where not exists (
            select
            from pg_attribute a
            join pg_type t on t.oid = a.atttypid
            where a.attrelid = to_regclass('public.' || wanted.name)
                and a.attname = c.name
                and not a.attisdropped
                and case c.type
                    when 'text' then t.typcategory = 'S'
                    when 'number' then t.typcategory = 'N'
                    else t.oid = 'timestamptz'::regtype
                end
        );
        if kind not in ('r', 'p') and coalesce(note, '') not like 'pgpulse:%' then
            lacks := 'a table, not a view';
        end if;
        if lacks is not null then
            raise exception 'Cannot use public.% that is there: it has another shape',
                case wanted.name when 'machine_states' then 'machines' else wanted.name end
                using hint = format('It lacks %s; rename it, or use another database', lacks);
        end if;
    end loop;
end
$$;

-- Where machines was made by others.
alter table public.machine_states
    add column if not exists plant text not null default 'main',
    add column if not exists target_oee double precision default 60;
do $$
begin
    if not exists (
        select
        from pg_index i
        join pg_attribute a on a.attrelid = i.indrelid and a.attname = 'id'
        where i.indrelid = 'public.machine_states'::regclass
            and i.indisunique
            and i.indpred is null
            and i.indkey::text = a.attnum::text
    ) then
        create unique index machine_states_id on public.machine_states (id);
    end if;
end
$$;
create index if not exists machine_states_area on public.machine_states (area);

-- Last known state of a machine at a time; one state at any moment.
create unique index if not exists machine_history_machine
    on public.machine_history (machine_id, "timestamp" desc) include (status);
create index if not exists machine_history_timestamp on public.machine_history ("timestamp");

create index if not exists energy_consumption_hour on public.energy_consumption (hour);
create index if not exists production_hour on public.production (hour);
create index if not exists alarms_raised_at on public.alarms (raised_at);
create index if not exists alarms_open on public.alarms (machine_id) where cleared_at is null;
create index if not exists maintenance_started_at on public.maintenance (started_at);
create index if not exists downtime_started_at on public.downtime (started_at);

-- Stored (pgpulse.add_storage) it is a view, and its partitions have these.
do $$
begin
    if (select relkind from pg_class where oid = 'public.machine_metrics'::regclass) in ('r', 'p') then
        create index if not exists idx_machine_metrics_timestamp
            on public.machine_metrics ("timestamp");
        create index if not exists idx_machine_metrics_composite
            on public.machine_metrics (machine_id, metric_type, "timestamp" desc);
        -- Brin: btrees of so few different values would slow writers by 40 % and find nothing that the
        -- two above do not.
        create index if not exists idx_machine_metrics_machine_id
            on public.machine_metrics using brin (machine_id);
        create index if not exists idx_machine_metrics_type
            on public.machine_metrics using brin (metric_type);
    end if;
end
$$;

comment on column public.machine_states.oee is 'In percent, as availability, performance and quality.';
comment on column public.machine_states.plant is
    'Where it stands; an id belongs to one plant.';
comment on column public.machine_metrics.metric_type is
    'temperature, multi_zone_temp, pressure, vibration, speed, power or the like.';
comment on column public.machine_metrics.zone_number is 'Zone of a multi_zone_temp; else null.';
comment on column public.machine_metrics.target_value is 'What the value should be, where that is known.';
comment on column public.production.planned_seconds is
    'Time of the hour in which the machine was to produce: in shift, not in planned maintenance.';
comment on column public.production.ideal_cycle_seconds is 'Shortest time for one piece.';
