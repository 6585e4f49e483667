-- Hints: "something changed in this table", at most four times a second for each session.

create or replace function pgpulse.hint() returns trigger
language plpgsql
as $$
declare
    -- A session remembers the quarter of a second of its last hint. This runs for every statement
    -- of every writer: date_part, as extract() would make a numeric; here and not in the trigger's
    -- WHEN, which is planned anew for each statement (27 us instead of 4).
    setting text := 'pgpulse.hinted_' || tg_relid;
    slot text := floor(date_part('epoch', clock_timestamp()) * 4)::int8;
begin
    if current_setting(setting, true) is distinct from slot then
        perform set_config(setting, slot, false);
        -- Not regclass::text, which depends on the writer's search_path.
        perform pg_notify('pgpulse', tg_table_schema || '.' || tg_table_name);
    end if;
    return null;
end
$$;

comment on function pgpulse.hint() is
    'Trigger function: notifies channel pgpulse with the name of the table, and nothing else.';

create or replace function pgpulse.watch(watched regclass) returns void
language plpgsql
as $$
begin
    execute format(
        'create or replace trigger pgpulse_hint
         after insert or update or delete on %s
         for each statement
         execute function pgpulse.hint()',
        watched
    );
end
$$;

comment on function pgpulse.watch(regclass) is
    'Makes every statement that writes to the table send a hint, throttled for each session; called by '
    'pgpulse.add_stream, and pgpulse.drop_stream takes it off tables that no stream reads. '
    'Costs a statement about 4 us, a session up to four NOTIFYs a second; PREPARE TRANSACTION fails on a watched table, as with any NOTIFY.';
