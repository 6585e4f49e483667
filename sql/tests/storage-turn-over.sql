-- A table that is turned over keeps its name, rows, indexes, rights, defaults, triggers and views.
begin;

create table orders (
    id serial,
    country text not null default 'nowhere',
    amount numeric(10, 2) check (amount >= 0),
    doubled numeric generated always as (amount * 2) stored,
    tags text[],
    doc jsonb,
    "When" timestamptz not null default now(),
    n int generated always as identity,
    primary key (id, "When")
);
create index idx_orders_country on orders (country, "When" desc) where amount > 1;
create index idx_orders_when on orders using brin ("When");
comment on table orders is 'All orders';
comment on column orders.country is 'Where to';
create table audit (what text);
grant insert on audit to public;
create function pg_temp.note() returns trigger language plpgsql as $$
begin
    insert into audit values (tg_op);
    return new;
end
$$;
create trigger note before insert on orders for each row execute function pg_temp.note();
create trigger "Not now" before insert on orders for each row execute function pg_temp.note();
create trigger always before insert on orders for each row when (new.amount = 99) execute function pg_temp.note();
alter table orders disable trigger "Not now", enable always trigger always;
create view by_country with (security_invoker = true) as select country, sum(amount) as amount from orders group by 1;
create view over_it as select * from by_country where amount > 10;
create role orders_clerk;
create role orders_reader;
create role orders_partial;
grant insert (amount, "When") on orders to orders_partial;
grant usage on sequence orders_id_seq to orders_partial;
grant select, insert on orders to orders_clerk;
grant select on orders to orders_reader;
insert into orders (country, amount, tags, "When")
select 'c' || i % 3, i, array['a', null, 'it''s'], now() - i * interval '1 day' from generate_series(0, 40) i;
insert into orders (amount, "When") values (1, 'infinity'), (2, '1910-01-01Z'), (3, now() + interval '5 years');
create temp table plain as select * from orders;
truncate audit;

select pgpulse.add_storage('orders', 'When', '{country}', '1 month');

create function pg_temp.differences() returns bigint language sql as $$
    select count(*)
    from (
        (select id, country, amount, doubled, tags, doc, "When", n from plain except all select * from orders)
        union all
        (select * from orders except all select id, country, amount, doubled, tags, doc, "When", n from plain)
    ) as d
$$;

do $$
declare
    made orders;
begin
    assert pg_temp.differences() = 0;
    assert not exists (select from audit), 'the move set off a trigger';
    assert to_regclass('rows.idx_orders_country') is not null;
    assert (select indexdef like '%WHERE (amount > (1)::numeric)' from pg_indexes where indexname = 'idx_orders_country');
    assert (select count(*) from pg_constraint where conrelid = 'rows.orders'::regclass and contype in ('p', 'c')) = 2;
    assert obj_description('orders'::regclass) = 'All orders';
    assert col_description('orders'::regclass, 2) = 'Where to';
    assert (select sum(amount) from by_country) = (select sum(amount) from plain);
    assert (select reloptions = '{security_invoker=true}' from pg_class where oid = 'by_country'::regclass);
    assert (
        select string_agg(concat(tgname, tgenabled), ' ' order by tgname)
        from pg_trigger
        where tgrelid = 'rows.orders'::regclass and not tgisinternal
    ) = 'Not nowD alwaysA noteO';

    -- Defaults, generated columns, identity and triggers, through INSERT.
    insert into orders (amount) values (7) returning * into made;
    assert made.country = 'nowhere' and made.doubled = 14 and made."When" = now(), made;
    assert made.id = (select max(id) + 1 from plain) and made.n = (select max(n) + 1 from plain), made;
    assert (select count(*) from audit) = 1;
    insert into plain select made.*;
    begin
        insert into orders (amount) values (-1);
        assert false, 'a check was lost';
    exception when check_violation then
        null;
    end;
    assert pg_temp.differences() = 0;

    while (select bool_or(more) from pgpulse.upkeep_storage()) loop
        null;
    end loop;
    assert (select sum(chunk$rows) from packed.orders) >= 2,
        (select string_agg(u::text, ' ') from pgpulse.upkeep_storage() u);
    assert pg_temp.differences() = 0;
    assert (select count(*) from audit) = 1;
    update orders set amount = 70 where id = made.id;
    update plain set amount = 70, doubled = 140 where id = made.id;
    delete from orders where "When" = now() and country = 'c0';
    delete from plain where "When" = now() and country = 'c0';
    assert pg_temp.differences() = 0;
    begin
        update orders set amount = 3 where "When" < now() - interval '35 days' and "When" > '2000-01-01';
        assert false, 'a packed row was updated';
    exception when raise_exception then
        assert sqlerrm = 'Cannot update a packed row of "public.orders"', sqlerrm;
    end;
end
$$;

-- Rights: as before, packed rows among them; what is granted or revoked later follows.
create function pg_temp.may(who text, statement text) returns boolean
language plpgsql
as $$
begin
    execute format('set local role %I', who);
    execute statement;
    reset role;
    return true;
exception when insufficient_privilege then
    reset role;
    return false;
end
$$;

do $$
begin
    assert pg_temp.may('orders_reader', 'select * from orders');
    assert pg_temp.may('orders_clerk', 'insert into orders (amount) values (1)');
    assert pg_temp.may('orders_clerk', 'insert into rows.orders (amount) values (1)');
    assert pg_temp.may('orders_clerk', 'delete from orders') is false;
    assert pg_temp.may('orders_reader', 'insert into orders (amount) values (1)') is false;
    assert pg_temp.may('grafana_readonly', 'select * from orders');
    assert pg_temp.may('grafana_readonly', 'select * from rows.orders, packed.orders_rows');
    assert pg_temp.may('grafana_readonly', 'insert into rows.orders (amount) values (1)') is false;
    assert pg_temp.may('orders_partial', 'insert into orders (amount) values (1)');
    assert pg_temp.may('orders_partial', $q$insert into orders (amount, country) values (1, 'x')$q$) is false;
    -- Behind a name that gives it nothing, the server has nothing.
    assert pg_temp.may('server', 'select * from orders') is false;
    assert pg_temp.may('server', 'insert into rows.orders (amount) values (1)') is false;
    assert pg_temp.may('server', 'select * from rows.orders') is false;
    assert pg_temp.may('server', 'select * from packed.orders') is false;
    assert pg_temp.may('server', 'select * from packed.orders_rows') is false;
    assert pg_temp.may('server', 'select * from rows.machine_metrics, packed.machine_metrics_rows');
    assert pg_temp.may('server', $q$insert into rows.machine_metrics (machine_id, metric_type) values ('a', 'b')$q$);
    -- What it may read is made of the table: it reads that to the end.
    create view live.orders as select "When" as time, amount from orders;
    grant select on live.orders to server;
    perform pgpulse.share_rights(s) from pgpulse.storage s where source = 'orders'::regclass;
    assert pg_temp.may('server', 'select * from live.orders');
    drop view live.orders;
    perform pgpulse.share_rights(s) from pgpulse.storage s where source = 'orders'::regclass;
    assert pg_temp.may('server', 'select * from packed.orders_rows') is false;
    assert pg_temp.may('server', 'select * from pgpulse.upkeep_storage()');
    assert pg_temp.may('grafana_readonly', 'select * from pgpulse.upkeep_storage()') is false;
    assert pg_temp.may('server', $q$select pgpulse.drop_storage('orders')$q$) is false;
    -- It may pack what it may read into what it may write, from a plain table; others may not at all.
    create temp table mine as select * from orders limit 0;
    grant select on mine to server;
    assert pg_temp.may('grafana_readonly', $q$select pgpulse.pack_from('orders', 'mine')$q$) is false;
    create role orders_later;
    grant select on orders to orders_later;
    revoke select on orders, rows.orders from orders_reader;
    perform * from pgpulse.upkeep_storage();
    assert pg_temp.may('orders_later', 'select * from orders');
    assert pg_temp.may('orders_later', 'select * from packed.orders_rows');
    assert pg_temp.may('orders_reader', 'select * from packed.orders_rows') is false;

    delete from orders where amount = 1 and "When" = now();
    perform pgpulse.drop_storage('orders');
    assert (select relkind = 'r' from pg_class where oid = 'orders'::regclass);
    assert pg_temp.differences() = 0;
    assert to_regclass('idx_orders_country') is not null and to_regclass('rows.orders') is null;
    assert (
        select string_agg(concat(tgname, tgenabled), ' ' order by tgname)
        from pg_trigger
        where tgrelid = 'orders'::regclass and not tgisinternal
    ) = 'Not nowD alwaysA noteO';
    assert pg_temp.may('orders_partial', 'insert into orders (amount) values (1)');
    delete from orders where amount = 1 and "When" = now();
    assert pg_temp.may('orders_clerk', 'insert into orders (amount) values (1)');
    assert (select count(*) from audit) = 6, (select count(*) from audit);
    assert (select sum(amount) from by_country) = (select sum(amount) from orders);
    assert not exists (select from pgpulse.storage where source = to_regclass('orders'));
end
$$;

do $$
declare
    made int;
begin
    create table numbered (id int generated always as identity, at timestamptz not null);
    perform pgpulse.add_storage('numbered', 'at');
    insert into numbered (id, at) values (5000, now()) returning id into made;
    assert made = 5000, 'a number that was given was lost';
    insert into numbered (at) values (now()) returning id into made;
    assert made = 1, made;
end
$$;

rollback;
