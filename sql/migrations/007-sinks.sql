-- Sinks: what is sent on to a database that speaks InfluxDB line protocol; one row a table.

create table pgpulse.sinks (
    -- also the measurement
    sink text primary key check (sink ~ '^[A-Za-z][A-Za-z0-9_.-]{0,62}$'),
    source regclass not null,
    time_column text not null,
    -- columns, or 'expression as name'
    tags text[] not null,
    fields text[] not null check (cardinality(fields) > 0),
    -- time, transaction and line of each row
    query text not null,
    -- rows that were there before the sink are sent from this time on
    since timestamptz not null,
    -- rows of transactions that it sees are sent; null: those that were there before are being sent
    after_tx txid_snapshot,
    -- a round is on: it takes what this one sees and the other does not
    upto_tx txid_snapshot,
    -- of the round, rows of earlier times are sent
    sent_time timestamptz not null,
    -- a piece of the round is on its way: its rows have earlier times
    upto_time timestamptz,
    -- length of the last piece where a round needs several
    slice interval,
    -- counts the pieces, so that nobody acknowledges another one than was read
    piece bigint not null default 0,
    -- transaction numbers mean nothing in another cluster: system identifier of this one
    cluster bigint not null,
    rows_sent bigint not null default 0,
    -- without any field, or of a time that line protocol cannot tell
    rows_skipped bigint not null default 0,
    rows_refused bigint not null default 0,
    -- the last reason
    refusal text,
    -- when a piece was acknowledged last
    updated_at timestamptz
);

comment on table pgpulse.sinks is 'Registry of sinks and their positions; written by pgpulse.add_sink.';
