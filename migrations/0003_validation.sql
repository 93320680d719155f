-- A data set whose loss is watched: the job that has one, and what it came to after a step.

alter table job add column validation_file_id text;  -- null: none; the file may be deleted once the job is done
create index job_by_validation_file on job (validation_file_id);

alter table job_metric add column valid_loss real;   -- mean loss of the whole validation file; null where it was not evaluated
alter table job_metric add column valid_mean_token_accuracy real; -- share of its trained tokens predicted right
