//! What a killed server leaves half-written in the folder of the `file:` backend.

use std::io::ErrorKind;
use std::path::Path;

use super::keys::is_key;
use crate::types::ids::{JobId, UploadId};

/// Removes it, and counts it. The backend writes an object as `KEY#NUMBER` beside its later place, and hides such names when it
/// lists.
pub(super) fn remove(folder: &Path) -> std::io::Result<usize> {
    let mut folders = vec!["files".to_owned()];
    for job in names(&folder.join("jobs"))?.iter().filter(|name| name.parse::<JobId>().is_ok()) {
        folders.extend([format!("jobs/{job}/checkpoints"), format!("jobs/{job}/artifacts")]);
    }
    for upload in names(&folder.join("uploads"))?.iter().filter(|name| name.parse::<UploadId>().is_ok()) {
        folders.push(format!("uploads/{upload}/parts"));
    }
    let mut count = 0;
    for parent in folders {
        for name in names(&folder.join(&parent))? {
            let Some((object, number)) = name.split_once('#') else { continue };
            let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            if is_number && is_key(&format!("{parent}/{object}")) {
                std::fs::remove_file(folder.join(&parent).join(&name))?;
                count += 1;
            }
        }
    }
    Ok(count)
}

/// The names in a folder; one that is not there has none, and names that are not UTF-8 are not ours.
fn names(folder: &Path) -> std::io::Result<Vec<String>> {
    match std::fs::read_dir(folder) {
        Ok(items) => {
            items.filter_map(|item| item.map(|item| item.file_name().into_string().ok()).transpose()).collect()
        }
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
