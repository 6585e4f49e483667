-- What is packed is the same when it is read again, bit by bit, and as small as it can be.
begin;

create function pg_temp.floats(v float8[]) returns text
language plpgsql
as $$
declare
    p record;
    read float8[];
begin
    select * into p from pgpulse.pack_floats(v);
    read := array(
        select coalesce((p.base + two) / p.unit, (p.base + four) / p.unit, eight, p.one)
        from unnest(
            p.i2, p.i4, p."all", array_fill(null::float8, array[cardinality(v)])
        ) as u (two, four, eight, always)
    );
    assert array_send(read) = array_send(v), format('%s became %s', v, read);
    return case
        when p.i2 is not null then 'i2 ' || p.unit
        when p.i4 is not null then 'i4 ' || p.unit
        when p."all" is not null then 'all'
        else 'one'
    end;
end
$$;

create function pg_temp.times(t timestamptz[]) returns text
language plpgsql
as $$
declare
    p record;
    read timestamptz[];
begin
    select * into p from pgpulse.pack_times(t);
    read := coalesce(
        p."all",
        packed.times(p.base, p.gap, p.unit, coalesce(p.i2::int[], p.i4)),
        array(select generate_series(p."from", p."to", p.step))
    );
    assert read = t, format('%s became %s', t, read);
    return case
        when p.step is not null then 'step'
        when p.i2 is not null then 'i2 ' || p.unit
        when p.i4 is not null then 'i4 ' || p.unit
        else 'all'
    end;
end
$$;

do $$
begin
    assert pg_temp.floats('{20.5,20.25,19.75}') = 'i2 100';
    assert pg_temp.floats('{1,2,3,-32768}') = 'i2 1';
    assert pg_temp.floats('{700.12,null,1.01}') = 'i4 100';
    assert pg_temp.floats('{700.12,null,100.01}') = 'i2 100';
    assert pg_temp.floats('{0.1,0.2,1e8}') = 'i4 10';
    assert pg_temp.floats('{0.000001,0.1}') = 'i4 1000000';
    assert pg_temp.floats('{0.0000001,0.1}') = 'all';
    assert pg_temp.floats('{1,2e15,3}') = 'all';
    assert pg_temp.floats('{NaN,1}') = 'all';
    assert pg_temp.floats('{-0,1}') = 'all';
    assert pg_temp.floats('{0,-0,0}') = 'all';
    assert pg_temp.floats('{1,Infinity,-Infinity}') = 'all';
    assert pg_temp.floats('{1e300,-1e300,4.9e-324}') = 'all';
    assert pg_temp.floats('{1.7e308,-1.7e308,1,null}') = 'all';
    assert pg_temp.floats('{7.125,7.125,7.125}') = 'one';
    assert pg_temp.floats('{NaN,NaN}') = 'one';
    assert pg_temp.floats('{-0}') = 'one';
    assert pg_temp.floats('{null,null}') = 'one';
    assert pg_temp.floats('{null,1,null}') = 'i2 1';
    -- Every number of two decimals is what it was.
    for i in 0..9 loop
        assert pg_temp.floats(array(
            select (random() * 600)::numeric(5, 2)::float8 from generate_series(1, 500)
        )) = 'i2 100';
        perform pg_temp.floats(array(select random() * 10 ^ i from generate_series(1, 200)));
    end loop;

    assert pg_temp.times('{2026-01-01Z}') = 'step';
    assert pg_temp.times('{2026-01-01Z,2026-01-01Z}') = 'i2 1000';
    assert pg_temp.times(array(select generate_series('2026-03-29Z', '2026-03-30Z', interval '10 s'))) = 'step';
    assert pg_temp.times(array(
        select t + (10 * random())::int * interval '1 ms'
        from generate_series(timestamptz '2026-03-29Z', '2026-03-30Z', interval '10 s') t
    )) = 'i2 1000';
    assert pg_temp.times(array(
        select t + (1e5 * random())::int * interval '1 us'
        from generate_series(timestamptz '2026-03-29Z', '2026-03-30Z', interval '10 s') t
    )) = 'i4 1000000';
    assert pg_temp.times('{2026-01-01Z,2026-01-01 00:00:00.000001Z,2026-01-31Z}') = 'all';
    assert pg_temp.times('{2199-12-31 23:59:59.999999Z,1970-01-01Z,1970-01-01 00:00:00.000001Z}') = 'all';

    assert (select one = 5 and i2 is null from pgpulse.pack_integers('{5,5}'));
    assert (select array(select base + e from unnest(i2) e) = '{7,70000,null}' from pgpulse.pack_integers('{7,70000,null}'))
        is not true;
    assert (select array(select base + e from unnest(i4) e) = '{7,70000,null}' from pgpulse.pack_integers('{7,70000,null}'));
    assert (select array(select base + e from unnest(i2) e) = '{-7,65528,null}' from pgpulse.pack_integers('{-7,65528,null}'));
    assert (select "all" = '{-9223372036854775808,9223372036854775807}'
        from pgpulse.pack_integers('{-9223372036854775808,9223372036854775807}'));
    assert (select "all" is not null from pgpulse.pack_integers('{9223372036854775807,9223372036854775806}'));
    assert (select one = 'a' and "all" is null from pgpulse.pack_any('{a,a}'::text[]));
    assert (select "all" = '{a,null}' from pgpulse.pack_any('{a,null}'::text[]));
    assert (select "all"::text = '{1.0,1.00}' from pgpulse.pack_any('{1.0,1.00}'::numeric[]));
end
$$;

rollback;
