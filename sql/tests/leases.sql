-- One holder at a time; giving back lets the next one in at once.
begin;

do $$
begin
    assert pgpulse.hold_lease('x', 'a', 60);
    assert pgpulse.hold_lease('x', 'b', 60) is null;
    assert pgpulse.hold_lease('x', 'a', 60);
    assert pgpulse.hold_lease('y', 'b', 60);
    assert pgpulse.hold_lease('x', 'a', 0);
    assert pgpulse.hold_lease('x', 'b', 60);
    assert pgpulse.hold_lease('x', 'a', 60) is null;
    -- The holder has gone, and the clock was put back by an hour.
    update pgpulse.leases set until = until + interval '1 hour' where lease = 'x';
    assert pgpulse.hold_lease('x', 'a', 60);
end
$$;

rollback;
