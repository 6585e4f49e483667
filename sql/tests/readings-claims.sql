-- A document is in one worker's hand; what a dead one had comes back, and is refused to it from then on.
begin;

do $$
declare
    mine record;
    theirs record;
begin
    assert pgpulse.hold_lease('etl/a', 'a1', 60);
    assert pgpulse.hold_lease('etl/b', 'b1', 60);
    select * into mine from pgpulse.claim_readings('test', 'a', '{3,1,2}');
    assert mine.ids = '{3,1,2}';
    select * into theirs from pgpulse.claim_readings('test', 'b', '{2,4}');
    assert theirs.ids = '{4}';
    assert (select c.claim is null and c.ids is null from pgpulse.claim_readings('test', 'a', '{1,4}') as c);
    assert (select c.ids = '{1}' from pgpulse.claim_readings('other', 'b', '{1}') as c);
    assert pgpulse.claimed_readings('test') @> '{1,2,3,4}' and cardinality(pgpulse.claimed_readings('test')) = 4;
    assert pgpulse.claimed_readings('none') = '{}';
    assert not exists (select from pgpulse.recover_readings('b'));
    assert pgpulse.take_readings('test', '{1}', '{}', claim => mine.claim, worker => 'a') ->> 'taken' = '1';
    assert pg_temp.refusal(format(
        $q$select pgpulse.take_readings('test', '{1}', '{}', claim => %s, worker => 'b')$q$, mine.claim
    )) like 'Cannot take readings: claim % is no more that of worker "b"';

    -- a dies
    assert pgpulse.hold_lease('etl/a', 'a1', 0);
    assert (
        select array_agg(row(r.claim, r.source, r.ids)::text) = array[row(mine.claim, 'test'::text, '{3,1,2}'::text[])::text]
        from pgpulse.recover_readings('b') as r
    );
    assert not exists (select from pgpulse.recover_readings('b'));
    assert pg_temp.refusal(format(
        $q$select pgpulse.take_readings('test', '{1}', '{}', claim => %s, worker => 'a')$q$, mine.claim
    )) like 'Cannot take readings: claim % is no more that of worker "a"';
    assert pg_temp.refusal(format('select pgpulse.hold_claim(%s, %L)', mine.claim, 'a'))
        like 'Cannot take readings: claim % is no more that of worker "a"';
    perform pgpulse.hold_claim(mine.claim, 'b');
    assert pgpulse.release_readings(mine.claim, 'a') is null;
    assert pgpulse.release_readings(mine.claim, 'b');
    assert (select c.ids = '{1,2}' from pgpulse.claim_readings('test', 'a', '{1,2,4}') as c);

    -- b starts anew under its name
    assert (select count(*) = 2 from pgpulse.recover_readings('b', own => true) as r where r.ids in ('{4}', '{1}'));
end
$$;

-- A letter is taken unless it is another one by now.
do $$
declare
    failed timestamptz;
begin
    perform pgpulse.keep_failures('test', '[{"id": "x", "reason": "bad"}]');
    select f.failed into failed from public.reading_failures f where f.source_id = 'x';
    assert pgpulse.take_letter('test', 'x', failed - interval '1 second', '{"value": 1}') is null;
    assert pgpulse.take_letter('test', 'x', failed, '{"value": 1}') ->> 'taken' = '1';
    assert pgpulse.take_letter('test', 'x', failed, '{"value": 2}') is null;
end
$$;

rollback;
