-- Hints: "something changed in this table", at most four times a second for each session.

-- date_part, as extract() would make a numeric: this runs for every statement of every writer.
create or replace function pgpulse.hint_slot() returns text
language sql
volatile
as $$
    select floor(date_part('epoch', clock_timestamp()) * 4)::int8::text
$$;

comment on function pgpulse.hint_slot() is 'The present quarter of a second.';

create or replace function pgpulse.hint() returns trigger
language plpgsql
as $$
begin
    -- The trigger's WHEN compares this setting with the present quarter of a second.
    perform set_config(tg_argv[0], pgpulse.hint_slot(), false);
    perform pg_notify('pgpulse', tg_relid::regclass::text);
    return null;
end
$$;

comment on function pgpulse.hint() is
    'Trigger function: notifies channel pgpulse with the name of the table, and nothing else.';

create or replace function pgpulse.watch(watched regclass) returns void
language plpgsql
as $$
declare
    setting text := 'pgpulse.hinted_' || watched::oid;
begin
    execute format(
        'create or replace trigger pgpulse_hint
         after insert or update or delete on %s
         for each statement
         when (current_setting(%L, true) is distinct from pgpulse.hint_slot())
         execute function pgpulse.hint(%L)',
        watched, setting, setting
    );
end
$$;

comment on function pgpulse.watch(regclass) is
    'Makes every statement that writes to the table send a hint, throttled for each session. '
    'Costs a writer about 1 %; PREPARE TRANSACTION fails on a watched table, as with any NOTIFY.';
