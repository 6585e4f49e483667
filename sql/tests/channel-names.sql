-- No two values share a channel, and Grafana allows every name.
begin;

do $$
declare
    many text[] := array[
        'web-1', 'a.b', '.x', '..', '', ' ', 'a b', 'a,b', 'a=20b', 'a/b', 'ü', 'Ü', 'x' || repeat('é', 99),
        'x' || repeat('é', 98), repeat('a', 80), repeat('a', 81), repeat('a', 82), E'a\nb', '=', '=3D'
    ];
begin
    assert pgpulse.channel('cpu') = 'cpu';
    assert pgpulse.channel('cpu', 'web-1.example.com') = 'cpu/web-1.example.com';
    assert pgpulse.channel('cpu', 'a b') = 'cpu/a=20b';
    assert (select count(distinct pgpulse.channel('cpu', v)) from unnest(many) v) = cardinality(many);
    assert (
        select bool_and(pgpulse.channel('cpu', v) ~ '^cpu/[A-Za-z0-9_=-][A-Za-z0-9_.=-]*$')
        from unnest(many) v
    );
    assert (select max(length(pgpulse.channel('cpu', v))) from unnest(many) v) <= 84;
end
$$;

rollback;
