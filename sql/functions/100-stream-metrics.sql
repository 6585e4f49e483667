-- A shipped stream. Change what the view reads, run deno task migrate, and the relay shows it; other
-- columns need another name, as a channel's fields never change.

create or replace view live.metrics as
select "timestamp" as time, value
from public.metrics;

comment on view live.metrics is 'Six hours of public.metrics: the newest 120 rows, before them one every 2 min.';

select pgpulse.add_stream('metrics', history => '6 hours', step => '2 minutes');
