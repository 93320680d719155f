//! The task of an export: an artifact of a job that has succeeded, made of its adapter.

use lorad_engine::adapter::{LoraLayout, LoraParams, peft_spec};
use tokio::sync::mpsc;

use super::artifacts::{self, Made, Trained};
use super::client::{Client, Error};
use super::failure::{self, Fault};
use super::report::{self, Report};
use super::task::{Inputs, fetch, on_engine_thread, send};
use super::{Pause, Progress};
use crate::types::worker_protocol::{Finish, INIT_FROM_PATH};

/// Makes the artifacts of the task and sends them.
pub(super) async fn export(client: &Client, mut inputs: Inputs, progress: Progress) -> Result<Finish, Error> {
    let adapter = inputs.task.init_from.as_ref().map(|adapter| adapter.sha256.as_str());
    inputs.init_from = fetch(client, INIT_FROM_PATH, &inputs.scratch, adapter).await?;
    let ours = inputs.ours();
    let (outbox, inbox) = mpsc::channel(report::CAPACITY);
    let engine = async { Ok(on_engine_thread(move || make(&inputs, &outbox, &progress)).await?) };
    let (made, ()) = tokio::try_join!(engine, report::forward(client.clone(), inbox, Pause::default()))?;
    Ok(match made {
        Ok(()) => Finish::Succeeded { trained_tokens: None, events: Vec::new() },
        Err(fault) => failure::of_engine(fault, &ours)?,
    })
}

fn make(inputs: &Inputs, outbox: &mpsc::Sender<Report>, progress: &Progress) -> Result<(), Fault> {
    let (base, model, tokenizer) = inputs.load_model(progress)?;
    let archive = inputs.init_from.as_deref();
    let archive = archive.ok_or_else(|| lorad_engine::Error::Adapter("the task has no adapter".to_owned()))?;
    let folder = artifacts::unpack_adapter(archive, &inputs.scratch)?;
    let lora = LoraParams::zeros(LoraLayout::new(&peft_spec(&folder)?, &model.config().shape))?;
    lora.load_peft(&folder)?;
    progress.made();
    let trained = Trained { base: &base, model: &model, tokenizer: &tokenizer, lora: &lora, facts: None };
    for Made { request, path, parity } in trained.make_artifacts(&inputs.task, &inputs.scratch, progress)? {
        let filename = artifacts::filename(&inputs.task.model_name, &request);
        if send(outbox, Report::Artifact { path, request, filename, parity }).is_break() {
            break;
        }
    }
    Ok(())
}
