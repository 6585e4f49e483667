-- What is shown live: one row a stream; everything else about it is derived from its view.

create schema if not exists live;

comment on schema live is
    'One view a stream: a timestamptz column, text columns as labels, numeric columns as fields.';

create table pgpulse.streams (
    -- name of the view in schema live, and of the channel
    stream text primary key check (stream ~ '^[A-Za-z0-9_-]{1,60}$'),
    -- second part of the address stream/<stream_id>/<channel>
    stream_id text not null check (stream_id ~ '^[A-Za-z0-9_-]{1,60}$'),
    -- size of the window, in distinct milliseconds; a panel sets maxDataPoints to half of it
    rows int not null check (rows between 2 and 5000 and rows % 2 = 0),
    -- how far back the coarse part of the window reaches, and the spacing of its rows
    history interval check (history > interval '0'),
    step interval check (step > interval '0'),
    -- shortest time between two pushes
    beat interval not null check (beat >= interval '20 milliseconds'),
    -- column with a channel for each of its values
    split text,
    -- the view's columns when the stream was added: a channel's fields never change
    columns text not null,
    check ((history is null) = (step is null)),
    check (history / extract(epoch from step) <= interval '1 second' * (rows - 1))
);

comment on table pgpulse.streams is 'Registry of live streams; written by pgpulse.add_stream.';

-- Who leads among several relays. Unlogged: after a crash of the server nobody leads anyway.
create unlogged table pgpulse.leases (
    lease text primary key,
    holder text not null,
    until timestamptz not null
);

comment on table pgpulse.leases is 'Roles that one process at a time may hold, and until when.';
