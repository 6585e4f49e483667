-- Storage: one row a stored table; its rows stand in schema rows, its packed history in schema packed.

create schema if not exists rows;
create schema if not exists packed;

comment on schema rows is
    'The partitioned table behind each stored table: COPY, indexes and triggers belong here.';
comment on schema packed is
    'History of stored tables as arrays; <name>_rows is a view of the rows in them.';

create table pgpulse.storage (
    -- the public name: a view of everything
    source regclass primary key,
    -- the partitioned table that takes new rows
    rows regclass not null unique,
    -- one row for each series and period: arrays
    packed regclass not null unique,
    time_column text not null,
    -- columns that tell series apart
    keys text[] not null,
    -- length of a partition
    period interval not null check (period in (interval '1 day', interval '1 month')),
    -- age at which a period is packed; null: never
    pack_after interval check (pack_after >= interval '0'),
    -- age at which rows are dropped; null: never
    keep interval check (keep > interval '0'),
    -- how far ahead partitions are made
    ahead interval not null check (ahead >= interval '0'),
    -- columns of the packed table that are in use
    parts text[] not null default '{}',
    -- the view looks for packed rows in these stretches of 64 periods only, and up to this time
    stretches timestamptz[] not null default '{}',
    packed_to timestamptz,
    -- nothing is packed until then
    hold_until timestamptz,
    -- emptied partitions, and the transactions that may still want to read them
    draining regclass[],
    draining_for text[],
    -- why the last upkeep failed
    fault text
);

comment on table pgpulse.storage is 'Registry of stored tables; written by pgpulse.add_storage.';
