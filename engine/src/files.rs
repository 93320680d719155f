//! Small things about files: writes that are whole or absent, and texts from files that are fit for a message.

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::{Error, Result};

/// Writes a file under a new name, syncs it, and renames it: it is whole or absent, and what was there before stays until then.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically_with(path, |file| file.write_all(bytes))
}

/// The same for a file that is too large to be in memory as a whole: `write` writes it.
pub(crate) fn write_atomically_with(path: &Path, write: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let permissions = Permissions::from_mode(0o666); // less what the user's umask takes away
    let file = tempfile::Builder::new().permissions(permissions).tempfile_in(folder);
    let mut file = file.map_err(Error::io(folder))?;
    write(file.as_file_mut()).and_then(|()| file.as_file().sync_all()).map_err(Error::io(path))?;
    file.persist(path).map_err(|error| Error::io(path)(error.error))?;
    let folder_file = File::open(folder).map_err(Error::io(folder))?;
    folder_file.sync_all().map_err(Error::io(folder))
}

/// At most 60 characters of a text: names from a file go into messages and reports.
pub(crate) fn shorten(text: &str) -> String {
    match text.char_indices().nth(60) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
