//! The HTTP API, one module a resource, over real sockets.

#[path = "../support/mod.rs"]
mod support;

mod access;
mod artifacts;
mod events;
mod files;
mod fine_tuning_jobs;
mod inspections;
mod job_deletion;
mod job_logs;
mod job_metrics;
mod job_rerun;
mod models;
mod openapi;
mod owners;
mod queue;
mod server_metrics;
mod strangers;
mod uploads;
mod worker_protocol;
