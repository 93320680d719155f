//! `lorad openapi`: prints what `openapi.yaml` holds.

use std::io::Write;

use anyhow::anyhow;

use crate::http::openapi::specification_yaml;

/// Prints the specification.
///
/// # Errors
/// Standard output cannot be written to.
pub fn run() -> anyhow::Result<()> {
    let yaml = specification_yaml().map_err(|error| anyhow!(error))?;
    std::io::stdout().write_all(yaml.as_bytes())?;
    Ok(())
}
