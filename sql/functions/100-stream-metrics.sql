-- Shipped streams. Change a view, run deno task migrate, and the relay shows the change.

create or replace view live.metrics as
select "timestamp" as time, value
from public.metrics;

comment on view live.metrics is 'Six hours of public.metrics: the newest 120 rows, before them one every 2 min.';

select pgpulse.add_stream('metrics', history => '6 hours', step => '2 minutes');
