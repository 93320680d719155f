-- Artifacts that are asked for after a job has succeeded, and models that are not wanted any more.

create table export (
    id text not null primary key,                    -- artifact-…: the id that the artifact has once it is made
    job_id text not null references job (id),        -- the job whose adapter it is made from
    type text not null,                              -- as in artifact
    quantization text,                               -- as in artifact
    status text not null,                            -- queued, running, failed; once it is made, a row of artifact takes its place
    attempt_id text references attempt (id),         -- the attempt that makes it, or tried last
    crashes integer not null default 0,              -- attempts that crashed
    error_code text,                                 -- a word that tells failures apart; null unless failed
    error_message text,                              -- a sentence; null unless failed
    created_at_ms integer not null                   -- when it was asked for
) strict;

create unique index export_once on export (job_id, type, coalesce(quantization, ''));
create index export_by_status on export (status, id);
create index export_by_attempt on export (attempt_id);

alter table job add column model_deleted_at_ms integer; -- when the model and all artifacts were deleted; null: they are there
