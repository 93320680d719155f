-- A job's place in the queue; attempts can have the state pausing: told to end their step, hand in a checkpoint, and stop.

alter table job add column priority integer not null default 0; -- higher first, then age
drop index job_by_status;
create index job_by_status on job (status, priority desc, id);
-- A request that a client repeats because it got no answer is known by its body.
create index job_by_age on job (owner, created_at_ms);
