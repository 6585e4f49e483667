-- A table's public name and the table that holds its rows, which pgpulse.add_storage parts.

create or replace function pgpulse.rows_of(source regclass) returns regclass
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    stored regclass;
begin
    if to_regclass('pgpulse.storage') is not null then
        select s.rows into stored from pgpulse.storage s where s.source = rows_of.source;
    end if;
    return coalesce(stored, source);
end
$$;

comment on function pgpulse.rows_of is
    'The table to COPY into and to put triggers on; the relation itself where nothing is packed.';

create or replace function pgpulse.name_of(relation regclass) returns regclass
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    public_name regclass;
begin
    if to_regclass('pgpulse.storage') is not null then
        select s.source into public_name from pgpulse.storage s where s.rows = relation;
    end if;
    return coalesce(public_name, relation);
end
$$;

comment on function pgpulse.name_of is
    'The other way round: what to read rows from, the packed ones among them.';

create or replace function pgpulse.parts_of(source regclass) returns setof regclass
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select relid from pg_partition_tree(pgpulse.rows_of(source))
    union
    select pgpulse.rows_of(source)
$$;

comment on function pgpulse.parts_of is
    'The table that holds the rows of a source, and its partitions.';

-- What the extension has is named in text only: where it is missing nothing of it is parsed.
create or replace function pgpulse.timescale() returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select quote_ident(extnamespace::regnamespace::text)
    from pg_extension
    where extname = 'timescaledb'
        -- The Apache edition has neither continuous aggregates nor compression.
        and coalesce(current_setting('timescaledb.license', true), '') <> 'apache'
$$;

comment on function pgpulse.timescale() is
    'Schema of TimescaleDB''s functions; null where it is not installed.';

create or replace function pgpulse.is_hypertable(relation regclass) returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    is boolean := false;
begin
    if exists (select from pg_extension where extname = 'timescaledb') then
        execute 'select exists (
            select
            from timescaledb_information.hypertables
            where to_regclass(format(''%I.%I'', hypertable_schema, hypertable_name)) = $1
        )' into is using relation;
    end if;
    return is;
end
$$;

comment on function pgpulse.is_hypertable is
    'Whether TimescaleDB keeps the rows: then its continuous aggregates are the rollups.';
