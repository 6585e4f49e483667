-- Sinks: every row of a table, at least once, as InfluxDB line protocol.
--
-- What is new is found by transaction, as rollups find it: the last column tx holds the one that
-- inserted the row. A sink goes in rounds, from one snapshot to the next: rows of transactions that
-- had ended by this one and not by the last, however long they were open. A round of many rows goes
-- in pieces of time, and so do the rows that were there before the sink; these are read by time
-- alone, as packed rows have lost their transaction. A piece that was not acknowledged is read
-- again: measurement, tags and time make a point, so that repeats overwrite themselves.

-- The column tx, for all who need to know what is new.
create or replace function pgpulse.add_tx(source regclass) returns void
language plpgsql
as $$
declare
    rows regclass := pgpulse.rows_of(source);
begin
    if exists (
        select
        from pg_attribute a
        left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where a.attrelid = rows
            and a.attname = 'tx'
            and not a.attisdropped
            and pg_get_expr(d.adbin, d.adrelid) is distinct from 'txid_current()'
    ) then
        raise exception 'Cannot add a column tx to %: it has one that means something else', source
            using hint = 'alter table ... rename column tx to ...';
    end if;
    -- txid_current() is stable: no row is rewritten. BRIN: next to nothing for each insert.
    if not exists (
        select from pg_attribute where attrelid = rows and attname = 'tx' and not attisdropped
    ) then
        if rows <> source then
            raise exception 'Cannot add a column tx to %', source
                using hint = 'Add rollup and sink before the storage';
        end if;
        -- A hypertable takes no such default at once; rows that are there have none then.
        execute format(
            case
                when pgpulse.is_hypertable(rows) then 'alter table %1$s add column tx bigint;
                    alter table %1$s alter column tx set default txid_current()'
                else 'alter table %1$s add column tx bigint default txid_current()'
            end,
            rows
        );
        execute format('comment on column %s.tx is %L', rows,
            'Transaction that inserted the row: how rollups and sinks find what is new. Never write it.');
    end if;
    if not exists (
        select
        from pg_index i
        join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
        where i.indrelid = rows and a.attname = 'tx'
    ) then
        execute format('create index on %s using brin (tx) with (pages_per_range = 32)', rows);
    end if;
end
$$;

create or replace function pgpulse.drop_tx(source regclass) returns void
language plpgsql
as $$
begin
    -- Storage keeps it with the rows that it has packed.
    if pgpulse.rows_of(source) = source
        and not exists (select from pgpulse.rollups r where r.source = drop_tx.source)
        and not exists (select from pgpulse.sinks s where s.source = drop_tx.source)
        and col_description(source, (
            select attnum from pg_attribute where attrelid = source and attname = 'tx'
        )) like 'Transaction that inserted the row: how rollups%' then
        execute format('alter table %s drop column tx', source);
    end if;
end
$$;

comment on function pgpulse.drop_tx is 'Drops the column tx once no rollup and no sink needs it.';

-- A query for time, transaction and line of each row of a view; a null for those without a line. The
-- view itself is not in it, only what it stands for.
create or replace function pgpulse.lines_of(view regclass, measurement text, tags text[]) returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with columns as (
        select
            attname = any (tags) as is_tag,
            attname as name,
            format('%I', attname) as value,
            -- keys and tags alike: what a backslash would do before , = or a space has no escape
            regexp_replace(attname, '([,= ])', '\\\1', 'g') as key,
            coalesce(nullif(t.typbasetype, 0), t.oid)::regtype::text as type
        from pg_attribute a
        join pg_type t on t.oid = atttypid
        where attrelid = view
            and attname not in ('time', 'tx')
            and attnum > 0
    ), parts as (
        select
            is_tag,
            name,
            format(
                E' ||\n    coalesce(%L || %s, '''')',
                ',' || key || '=',
                case
                    when is_tag then format(
                        $q$nullif(replace(replace(replace(translate(%s::text, E'\\\n\r', '/  '),
        ',', '\,'), ' ', '\ '), '=', '\='), '')$q$, value)
                    when type = 'boolean' then value || '::text'
                    when type in ('smallint', 'integer', 'bigint') then value || $q$ || 'i'$q$
                    -- not NaN nor infinite, which line protocol does not know
                    when type in ('real', 'double precision', 'numeric') then format(
                        'case when abs(%1$s) <= 1.7976931348623157e308 then %1$s end', value)
                    else format(
                        $q$'"' || replace(replace(replace(replace(%s::text,
        '\', '\\'), '"', '\"'), E'\n', '\n'), E'\r', '\r') || '"'$q$, value)
                end
            ) as part
        from columns
    )
    select format(
        $q$select "time", tx, %L%s || ' ' || substr(nullif(''%s, ''), 2) || ' ' ||
    case when "time" >= '1678-01-01Z' and "time" < '2262-01-01Z'
        then (date_part('epoch', "time") * 1e6)::bigint end || '000' as line
from (%s) as source$q$,
        measurement,
        -- servers like tags in order
        coalesce(string_agg(part, '' order by name collate "C") filter (where is_tag), ''),
        string_agg(part, '' order by name collate "C") filter (where not is_tag),
        rtrim(pg_get_viewdef(view), ';')
    )
    from parts
$$;

create or replace function pgpulse.add_sink(
    source regclass,
    time_column text,
    tags text[],
    fields text[],
    name text default null,
    since timestamptz default '-infinity'
) returns void
language plpgsql
as $$
#variable_conflict use_column
declare
    s pgpulse.sinks;
    old pgpulse.sinks;
    item record;
    names text[] := '{time,tx}';
    tag_names text[] := '{}';
    columns text := '';
begin
    s.source := pgpulse.name_of(add_sink.source);
    s.sink := coalesce(add_sink.name, (select relname from pg_class where oid = s.source));
    if s.sink !~ '^[A-Za-z][A-Za-z0-9_.-]{0,62}$' then
        raise exception 'Cannot add sink "%": a name has A-Z a-z 0-9 _ . -, 63 at most', s.sink
            using hint = 'Give one, which is the measurement too: name => ''a_name''';
    end if;
    if exists (
        select
        from pg_class
        where oid = pgpulse.rows_of(s.source) and (relkind not in ('r', 'p') or relispartition)
    ) then
        raise exception 'Cannot add sink "%": % is no table of its own', s.sink, s.source
            using hint = 'A sink stands on a table, or on the whole of a partitioned one';
    end if;
    if not exists (
        select
        from pg_attribute
        where attrelid = s.source and attname = time_column and atttypid = 'timestamptz'::regtype
    ) then
        raise exception 'Cannot add sink "%": % has no timestamptz column "%"', s.sink, s.source, time_column
            using hint = 'alter table ... alter column ... type timestamptz makes it one';
    end if;
    for item in
        select
            coalesce(m[2], i) as name,
            coalesce(m[1], quote_ident(i)) as expression,
            n <= cardinality(tags) as is_tag
        from unnest(tags || fields) with ordinality as items (i, n),
            regexp_match(i, '^\s*(.+?)\s+as\s+"?(\w+)"?\s*$', 'i') as m
        order by n
    loop
        if item.name !~ '^[[:alnum:]][^\\[:cntrl:]]*$' or item.name = any (names) then
            raise exception 'Cannot add sink "%": it cannot call a % "%"', s.sink,
                case when item.is_tag then 'tag' else 'field' end, item.name
                using hint = format('Give it another name: array[%L]', item.expression || ' as a_name');
        end if;
        names := names || item.name;
        if item.is_tag then
            tag_names := tag_names || item.name;
        end if;
        columns := columns || format(', %s as %I', item.expression, item.name);
    end loop;
    if cardinality(fields) = 0 then
        raise exception 'Cannot add sink "%": it needs fields', s.sink
            using hint = 'fields => array[''value'']';
    end if;
    select * into old from pgpulse.sinks k where k.sink = s.sink;
    if old.source <> s.source then
        raise exception 'Cannot add sink "%": there is one of %', s.sink, old.source
            using hint = 'Give it another name: name => ''a_name''';
    end if;

    perform pgpulse.add_tx(s.source);
    -- A view tells the types, and what the names mean here and now.
    execute format(
        'create temp view pgpulse_sink as select %I as "time", tx%s from %s',
        time_column, columns, s.source
    );
    s.query := pgpulse.lines_of('pg_temp.pgpulse_sink', s.sink, tag_names);
    drop view pg_temp.pgpulse_sink;
    insert into pgpulse.sinks
        (sink, source, time_column, tags, fields, query, since, sent_time, cluster, updated_at)
    values (s.sink, s.source, time_column, tags, fields, s.query, since, since, pgpulse.cluster(), now())
    on conflict (sink) do update set
        time_column = excluded.time_column,
        tags = excluded.tags,
        fields = excluded.fields,
        query = excluded.query;
end
$$;

comment on function pgpulse.add_sink is
    'Has the relay send every row of a table to INFLUX_URL, or changes how; position and since stay '
    'then. tags, fields: columns or ''expression as name''. Rows equal in tags and time are one point '
    'there, the last one sent: choose tags that tell them apart. since: how far back of the rows that '
    'are there now, and of those that are there when the database was restored into another cluster, as all '
    'of them begin anew then. To send all again: pgpulse.drop_sink, then add it anew.';

create or replace function pgpulse.drop_sink(name text) returns void
language plpgsql
as $$
declare
    source regclass;
begin
    delete from pgpulse.sinks s where s.sink = drop_sink.name returning s.source into source;
    if source is null then
        raise exception 'Cannot drop sink "%": there is none of that name', name
            using hint = 'select sink from pgpulse.sinks lists them';
    end if;
    perform pgpulse.drop_tx(source);
end
$$;

comment on function pgpulse.drop_sink is
    'Ends a sink; what was sent stays where it is. The column tx goes with the last that needs it.';

-- What the piece, or with another end what the rest of the round, consists of.
create or replace function pgpulse.sink_rows(s pgpulse.sinks, columns text, upto_time timestamptz)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select format('select %s from (%s) as rows where true', columns, s.query)
        || case when s.sent_time > '-infinity' then format(' and "time" >= %L', s.sent_time) else '' end
        || case when sink_rows.upto_time < 'infinity' then format(' and "time" < %L', sink_rows.upto_time) else '' end
        || case when s.after_tx is not null then format(
            $q$ and tx >= %s and tx < %s
    and txid_visible_in_snapshot(tx, %L) and not txid_visible_in_snapshot(tx, %L)$q$,
            txid_snapshot_xmin(s.after_tx), txid_snapshot_xmax(s.upto_tx), s.upto_tx, s.after_tx
        ) else '' end
$$;

create or replace function pgpulse.plan_sink(name text, most bigint default 100000)
returns table (piece bigint, waiting bigint, restarted boolean)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set jit = off
set max_parallel_workers_per_gather = 0
as $$
#variable_conflict use_column
declare
    s pgpulse.sinks;
    snapshot txid_snapshot := txid_current_snapshot();
    count text := 'select count(*) from (%s limit %s) as rows';
    counted bigint;
begin
    select * into s from pgpulse.sinks k where k.sink = plan_sink.name;
    if s.sink is null then
        return;
    end if;
    if not exists (select from pg_class where oid = s.source) then
        raise exception 'its table is gone'
            using hint = format('select pgpulse.drop_sink(%L)', s.sink);
    end if;
    restarted := s.cluster <> pgpulse.cluster()
        or txid_snapshot_xmax(coalesce(s.after_tx, s.upto_tx, snapshot)) > txid_snapshot_xmax(snapshot);
    if restarted then
        s.after_tx := null;
        s.upto_tx := null;
        s.sent_time := s.since;
        s.upto_time := null;
        s.slice := null;
        s.cluster := pgpulse.cluster();
    end if;
    s.upto_tx := coalesce(s.upto_tx, snapshot);
    if s.slice is null then
        execute format(count, pgpulse.sink_rows(s, '', 'infinity'), most + 1) into waiting;
        if waiting = 0 and s.after_tx is not null and s.upto_time is null then
            -- Once all have ended that were open then, or storage would wait for a quiet table.
            update pgpulse.sinks k
            set after_tx = snapshot
            where k.sink = s.sink
                and k.piece = s.piece
                and k.upto_time is null
                and txid_snapshot_xmin(k.after_tx) < txid_snapshot_xmax(k.after_tx)
                and txid_snapshot_xmin(snapshot) >= txid_snapshot_xmax(k.after_tx);
            return;
        end if;
    else
        waiting := most + 1;
    end if;
    if s.upto_time is null then
        if waiting <= most then
            s.upto_time := 'infinity';
        else
            s.slice := least(coalesce(s.slice * 2, '1 hour'), '100 years');
            loop
                s.upto_time := greatest(s.sent_time, '1970-01-01Z') + s.slice;
                -- Counted between two times, as else a whole table might be read for it.
                execute format(count, pgpulse.sink_rows(s, '', s.upto_time), most + 1) into counted;
                exit when counted <= most or s.slice < '1 second';
                s.slice := s.slice / 4;
            end loop;
            if s.upto_time > now() then
                execute format(count, pgpulse.sink_rows(s, '', 'infinity'), most + 1) into counted;
                if counted <= most then
                    waiting := counted;
                    s.upto_time := 'infinity';
                end if;
            end if;
        end if;
        update pgpulse.sinks k
        set piece = s.piece + 1,
            after_tx = s.after_tx,
            upto_tx = s.upto_tx,
            sent_time = s.sent_time,
            upto_time = s.upto_time,
            slice = s.slice,
            cluster = s.cluster
        where k.sink = s.sink and k.piece = s.piece;
        if not found then
            return;
        end if;
        s.piece := s.piece + 1;
    end if;
    piece := s.piece;
    return next;
end
$$;

comment on function pgpulse.plan_sink is
    'Lays down what is to be sent next, about so many rows; no row where nothing waits. waiting: rows, '
    'counted up to one more than that. restarted: the database was restored into another cluster, where '
    'positions are void, so it begins anew with since.';

create or replace function pgpulse.read_sink(name text, piece bigint) returns refcursor
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set jit = off
set cursor_tuple_fraction = 1
as $$
#variable_conflict use_column
declare
    s pgpulse.sinks;
    lines refcursor := 'pgpulse_sink';
begin
    select * into s
    from pgpulse.sinks k
    where k.sink = read_sink.name and k.piece = read_sink.piece and k.upto_time is not null;
    if s.sink is null then
        return null;
    end if;
    open lines no scroll for execute pgpulse.sink_rows(s, 'line', s.upto_time);
    return lines;
end
$$;

comment on function pgpulse.read_sink is
    'Opens a cursor over the lines of a planned piece; null for a row that has none: no field, or a '
    'time out of reach. A cursor, as it streams and needs no right to read the table.';

create or replace function pgpulse.ack_sink(
    name text,
    piece bigint,
    sent bigint default 0,
    skipped bigint default 0,
    refused bigint default 0,
    refusal text default null
) returns boolean
language sql
security definer
set search_path = pgpulse, pg_temp
as $$
    update pgpulse.sinks s
    set after_tx = case when upto_time = 'infinity' then upto_tx else after_tx end,
        upto_tx = case when upto_time = 'infinity' then null else upto_tx end,
        sent_time = case when upto_time = 'infinity' then '-infinity' else upto_time end,
        slice = case when upto_time = 'infinity' then null else slice end,
        upto_time = null,
        rows_sent = rows_sent + sent,
        rows_skipped = rows_skipped + skipped,
        rows_refused = rows_refused + refused,
        refusal = coalesce(ack_sink.refusal, s.refusal),
        updated_at = clock_timestamp()
    where sink = ack_sink.name and s.piece = ack_sink.piece and upto_time is not null
    returning true
$$;

comment on function pgpulse.ack_sink is
    'The piece has arrived: it is not sent again. Null where it is not the one on its way any more.';

create or replace function pgpulse.first_sink() returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    -- A table of others gets no column and no index unless somebody asks for it.
    if exists (select from pgpulse.sinks)
        or coalesce(obj_description(to_regclass('public.machine_metrics'), 'pg_class'), '')
            not like 'pgpulse:%' then
        return null;
    end if;
    perform pgpulse.add_sink('public.machine_metrics', 'timestamp',
        tags => '{machine_id,metric_type,zone_number}', fields => '{value,target_value}');
    return 'machine_metrics';
end
$$;

comment on function pgpulse.first_sink is
    'Where there is no sink at all, adds that of machine_metrics, if migrate made that table: a relay with '
    'INFLUX_URL calls it.';

create or replace function pgpulse.sink_position(source regclass) returns bigint
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select min(txid_snapshot_xmin(coalesce(s.after_tx, s.upto_tx)))
    from pgpulse.sinks s
    where s.source = pgpulse.name_of(sink_position.source)
$$;

comment on function pgpulse.sink_position is
    'Rows of this transaction and later ones must keep their tx, as a sink has not sent them yet: do '
    'not pack them. Null where no sink is at work.';

revoke execute on function
    pgpulse.first_sink, pgpulse.plan_sink, pgpulse.read_sink, pgpulse.ack_sink from public;
