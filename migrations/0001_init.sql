-- Everything that the server knows. Ids are TEXT (a prefix and a UUIDv7, so that later rows sort after earlier ones),
-- times are INTEGER milliseconds since 1970, hashes are lower-case hexadecimal digits, JSON is TEXT.

create table file (
    id text not null primary key,                    -- file-…
    owner text not null,                             -- whose it is
    filename text not null,                          -- the name it was uploaded under
    purpose text not null,                           -- OpenAI's word, fine-tune for one
    size_bytes integer not null,                     -- number of bytes
    sha256 text not null,                            -- hash of the bytes
    object_key text not null,                        -- where storage has the bytes
    status text not null,                            -- OpenAI's word: processed
    created_at_ms integer not null,                  -- when it was made
    expires_at_ms integer                            -- when it may be removed; null: never
) strict;

create index file_by_owner on file (owner, id);

create table job (
    id text not null primary key,                    -- ftjob-…
    owner text not null,                             -- whose it is
    status text not null,                            -- OpenAI's state, types/job.rs says which may follow which
    base_model text not null,                        -- as the request named it
    request text not null,                           -- JSON: the request as it came
    spec text not null,                              -- JSON: the request resolved, types/job_spec.rs
    training_file_id text not null,                  -- the data set; the file may be deleted once the job is done
    idempotency_key text,                            -- the caller's Idempotency-Key, so that a repeated request makes no second job
    model_name text not null unique,                 -- ft:…, shown once the job has succeeded
    trained_tokens integer,                          -- tokens that had a loss; null until the job has succeeded
    total_steps integer,                             -- steps of the whole run; null until the first is done
    result_file_id text,                             -- metrics of every step; null until the job has succeeded
    error_code text,                                 -- a word that tells failures apart; null unless failed
    error_message text,                              -- a sentence; null unless failed
    error_param text,                                -- the request's field that is to blame
    attempts_without_progress integer not null default 0, -- attempts in a row that ended badly and left no new checkpoint
    created_at_ms integer not null,                  -- when it was made
    validated_at_ms integer,                         -- when the data set was found good
    started_at_ms integer,                           -- when it was first claimed for training
    finished_at_ms integer                           -- when it came to its end
) strict;

create index job_by_owner on job (owner, id);
create unique index job_by_idempotency_key on job (owner, idempotency_key);
create index job_by_status on job (status, id);
create index job_by_training_file on job (training_file_id);

create table attempt (
    id text not null primary key,                    -- attempt-…
    job_id text not null references job (id),        -- the job it works for
    task text not null,                              -- validate or train
    number integer not null,                         -- counts the attempts of the job, from 1
    state text not null,                             -- starting, running, stopping, ended
    device text not null,                            -- the device it holds, cpu for one
    token_sha256 text not null unique,               -- hash of the token that its worker shows
    pid integer,                                     -- process id and process group of the worker; null until it is started
    process_start_time integer,                      -- start time of that process as the kernel tells it
    lease_expires_at_ms integer not null,            -- until when silence is no death
    progress integer not null default 0,             -- the worker's own count of what it got done
    progress_at_ms integer not null,                 -- when that count last grew
    outcome text,                                    -- succeeded, failed, stopped, crashed, not_started, server_ended; null until ended
    created_at_ms integer not null,                  -- when it was made
    ended_at_ms integer                              -- when it ended
) strict;

create index attempt_by_job on attempt (job_id, number);
-- At most one attempt of a job at a time: two schedulers cannot both start one.
create unique index attempt_live on attempt (job_id) where state <> 'ended';

create table job_event (
    job_id text not null references job (id),        -- whose story it belongs to
    seq integer not null,                            -- its place in the story, from 1, without gaps
    id text not null unique,                         -- ftevent-…
    level text not null,                             -- info, warn, error
    type text not null,                              -- message or metrics
    message text not null,                           -- the sentence
    data text,                                       -- JSON: the figures
    attempt_id text references attempt (id),         -- the worker that told it; null where the server did
    worker_seq integer,                              -- counts that worker's events, so that a repeated one is known
    created_at_ms integer not null,                  -- when it was written
    primary key (job_id, seq),
    unique (attempt_id, worker_seq)
) strict;

create table job_metric (
    job_id text not null references job (id),        -- the job that trained the step
    step integer not null,                           -- the step, from 1
    total_steps integer not null,                    -- steps of the whole run
    epoch real not null,                             -- passes over the data set so far
    train_loss real not null,                        -- mean loss of the trained tokens
    train_mean_token_accuracy real not null,         -- share of trained tokens predicted right
    learning_rate real not null,                     -- learning rate of the step
    grad_norm real not null,                         -- norm of the gradient before clipping
    trained_tokens integer not null,                 -- trained tokens since the first step
    step_ms integer not null,                        -- time that the step took
    created_at_ms integer not null,                  -- when it was written
    primary key (job_id, step)
) strict;

create table checkpoint (
    id text not null primary key,                    -- ftckpt_…
    job_id text not null references job (id),        -- the job that it can resume
    attempt_id text not null references attempt (id), -- the attempt that made it
    step integer not null,                           -- the step after which it was taken
    listed integer not null,                         -- 1: the API shows it; 0: it serves resuming only
    model_name text not null,                        -- ft:…:ckpt-step-N
    object_key text not null,                        -- where storage has the bytes
    size_bytes integer not null,                     -- number of bytes
    sha256 text not null,                            -- hash of the bytes
    metrics text not null,                           -- JSON: the step's figures
    created_at_ms integer not null,                  -- when it was made
    unique (job_id, step)
) strict;

create table artifact (
    id text not null primary key,                    -- artifact-…
    job_id text not null references job (id),        -- the job that made it
    attempt_id text not null references attempt (id), -- the attempt that made it
    type text not null,                              -- adapter or gguf
    quantization text,                               -- how a GGUF file stores its matrices; null for the other types
    filename text not null,                          -- the name to save it under
    object_key text not null,                        -- where storage has the bytes
    size_bytes integer not null,                     -- number of bytes
    sha256 text not null,                            -- hash of the bytes
    created_at_ms integer not null                   -- when it was made
) strict;

create unique index artifact_once on artifact (job_id, type, coalesce(quantization, ''));
