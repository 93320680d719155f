//! A job is run again: a new one that is to do the same.

use serde_json::json;

use super::create::create;
use super::{Jobs, Result, find_job};
use crate::hub::Hub;
use crate::store::job::Request;
use crate::types::ids::JobId;
use crate::types::job::Job;
use crate::types::rerun_request::RerunRequest;

/// Creates a job from the specification of this owner's job `id`. That was resolved when `id` was made, so that other
/// defaults of a later version change nothing; seed included, it trains the same again.
///
/// # Errors
/// No such job, a file, an adapter or a base model of it that is gone, an `Idempotency-Key` of another request.
pub async fn rerun(
    jobs: &Jobs,
    hub: &Hub,
    owner: &str,
    id: JobId,
    changes: RerunRequest,
    (idempotency_key, is_retry): (Option<&str>, bool),
) -> Result<Job> {
    let old = find_job(&mut *jobs.store.read().await?, owner, id).await?;
    // Unlike the body of any request to create a job: the key of one is not also that of the other.
    let body = json!({"rerun_of": id, "changes": changes}).to_string();
    let request = Request { body: &body, idempotency_key, is_retry };
    create(jobs, hub, owner, changes.apply(old.spec), request).await
}
