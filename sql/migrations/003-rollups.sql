-- Rollups: one row a rollup; its tables and views stand in schema rollup.

create schema if not exists rollup;

comment on schema rollup is
    'One view a rollup, to read from; behind it the tables <name>_1m, _1h, _1d and <name>_changed.';

create table pgpulse.rollups (
    -- name of the view in schema rollup
    rollup text primary key check (rollup ~ '^[a-z_][a-z0-9_]{0,50}$'),
    source regclass not null,
    time_column text not null,
    -- columns that tell series apart, and the expression over the source's columns behind each
    keys text[] not null,
    key_expressions text[] not null,
    -- what is rolled up, likewise
    measures text[] not null check (cardinality(measures) > 0),
    measure_expressions text[] not null,
    -- rows of earlier transactions are rolled up, those of later ones are not
    rolled_tx bigint not null default 0,
    -- transaction numbers mean nothing in another cluster: system identifier of this one
    cluster bigint,
    refreshed_at timestamptz,
    -- why the last refresh failed
    fault text
);

comment on table pgpulse.rollups is 'Registry of rollups; written by pgpulse.add_rollup.';
