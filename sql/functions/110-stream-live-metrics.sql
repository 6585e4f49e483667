create or replace function public.notify_new_record() returns trigger
language plpgsql
as $$
declare
    payload text := row_to_json(new);
begin
    -- A payload of 8,000 bytes or more would fail the INSERT.
    if octet_length(payload) >= 8000 then
        payload := json_build_object('id', new.id, 'timestamp', new."timestamp", 'value', new.value);
    end if;
    perform pg_notify('influx_feed', payload);
    return null;
end
$$;

comment on function public.notify_new_record() is
    'Trigger function: announces the new row as JSON on channel influx_feed, with timestamp and value.';

create or replace trigger notify_new_record
after insert on public.live_metrics
for each row
execute function public.notify_new_record();

create or replace view live.live_metrics as
select "timestamp" as time, value
from public.live_metrics;

comment on view live.live_metrics is 'The newest 300 rows of public.live_metrics.';

select pgpulse.add_stream('live_metrics', stream_id => 'my_stream_id');
