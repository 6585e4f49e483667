-- Page after page, every reading that is asked for comes once, the newest first.
begin;

select pgpulse.take_readings(
    'pages.' || n % 2,
    array_agg('id' || i),
    string_agg(
        jsonb_build_object(
            -- many at the same time, and days without any
            'time', date_trunc('day', now()) - interval '1 minute' * (i / 7 * 7) - interval '30 days' * (i % 3),
            'value', i,
            'inner', jsonb_build_object('group', i % 5, 'rare', i / 100)
        )::text,
        E'\n'
    )
)
from (select i, i % 2 as n from generate_series(1, 600) as i) as made
group by n;

create function pg_temp.differs(
    source text,
    "from" timestamptz,
    "to" timestamptz,
    holds jsonb,
    rows int
) returns text
language plpgsql
as $$
declare
    wanted text[];
    found text[] := '{}';
    page text[];
    last public.reading_keys;
begin
    select array_agg(r.source_id order by r."time" desc, r.source desc, r.source_id desc) into wanted
    from public.reading_analytics r
    where r.source like coalesce(differs.source, 'pages.%')
        and (r."time" >= "from") is not false
        and (r."time" < "to") is not false
        and (r.payload @> holds) is not false;
    loop
        select array_agg(p.source_id order by n) into page
        from pgpulse.page_readings(
            differs.source, "from", "to", holds, last."time", last.source, last.source_id, differs.rows
        ) with ordinality as p ("time", source, source_id, d, m, v, u, r, q, payload, n);
        exit when page is null;
        assert cardinality(page) <= rows;
        found := found || page;
        assert cardinality(found) <= cardinality(wanted), 'more and more';
        select * into last from public.reading_keys k where k.source_id = found[cardinality(found)];
    end loop;
    return case
        when found is distinct from coalesce(wanted, '{}')
            then format('%s found, %s wanted', cardinality(found), cardinality(wanted))
    end;
end
$$;

do $$
declare
    day timestamptz := date_trunc('day', now());
    last record;
    said text;
    one record;
begin
    for one in
        select *
        from (values
            (null::text, null::timestamptz, null::timestamptz, null::jsonb, 100),
            (null, null, null, null, 7),
            ('pages.1', null, null, null, 50),
            ('none', null, null, null, 50),
            (null, day - interval '61 days', day - interval '30 days', null, 50),
            (null, day - interval '2 hours', null, null, 50),
            (null, day, day - interval '1 day', null, 50),
            (null, null, null, '{"inner": {"group": 3}}', 20),
            (null, null, null, '{"inner": {"rare": 4}}', 20),
            ('pages.0', day - interval '30 days 5 hours', day, '{"inner": {"rare": 4}}', 3),
            (null, null, null, '{"inner": 1}', 20)
        ) as cases (source, "from", "to", holds, rows)
    loop
        said := pg_temp.differs(one.source, one."from", one."to", one.holds, one.rows);
        assert said is null, format('%s: %s', one, said);
    end loop;
    assert (select array_agg(source_id) = '{id17}' from pgpulse.reading_of('id17'));
    assert (select array_agg(source) = '{pages.1}' from pgpulse.reading_of('id17', 'pages.1'));
    assert not exists (select from pgpulse.reading_of('id17', 'pages.0'));
    assert not exists (select from pgpulse.reading_of('none'));
end
$$;

rollback;
