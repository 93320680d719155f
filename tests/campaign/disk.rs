//! A small disk of its own for a data folder, which can really be full: a tmpfs in a mount namespace, where this machine lets
//! the user of the tests make one. Root is not needed; where namespaces are forbidden (some containers), there is none.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Its size.
const MEGABYTES: u32 = 64;
/// The file that fills it.
const FILLER: &str = "filler";

/// The disk, there until it is dropped.
pub(crate) struct Disk {
    /// A process that keeps the namespace; it ends when its stdin does.
    keeper: Child,
    folder: PathBuf,
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.keeper.kill().expect("a process of ours");
        self.keeper.wait().expect("its end");
    }
}

impl Disk {
    /// Mounts it at `folder`; `None`: this machine does not allow it.
    pub(crate) fn mount(folder: &Path) -> Option<Self> {
        let script = "mount -t tmpfs -o size=\"$1\",mode=700 lorad \"$2\" && echo mounted && exec cat";
        let size = format!("{MEGABYTES}m");
        let mut keeper = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", &size])
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut said = String::new();
        let told = BufReader::new(keeper.stdout.take()?).read_line(&mut said);
        let disk = Self { keeper, folder: folder.to_owned() };
        (told.is_ok() && said == "mounted\n").then_some(disk)
    }

    /// The folder as it is seen from outside.
    pub(crate) fn seen(&self) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.keeper.id()));
        root.join(self.folder.strip_prefix("/").expect("an absolute path"))
    }

    /// A command that runs `program` where the disk is.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args([
            "--user",
            "--mount",
            "--preserve-credentials",
            "--target",
            &self.keeper.id().to_string(),
            program,
        ]);
        command
    }

    /// Leaves no free byte.
    pub(crate) fn fill(&self) {
        let mut filler = File::create(self.seen().join(FILLER)).expect("a file");
        for size in [1 << 20, 1 << 16, 1 << 12] {
            while filler.write_all(&vec![0; size]).is_ok() {}
        }
    }

    /// Gives back what [`Disk::fill`] took.
    pub(crate) fn empty(&self) {
        // It may not be filled.
        let _ = fs::remove_file(self.seen().join(FILLER));
    }
}
