//! Faults of storage and clock for real processes: a library of C, preloaded, that fails and delays their calls to the operating
//! system and moves their wall clock. It needs a C compiler and no privileges; `faults.c` says how it works.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Among the targets: the scratch folders of workers.
pub(crate) const SCRATCH: i32 = 4;

/// What goes wrong from now on; the default is nothing.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Control {
    /// The number of the error that calls fail with; 0: none. A full disk fails only what writes.
    pub(crate) error: i32,
    /// Every how many-th call fails.
    pub(crate) one_in: i32,
    /// How long a call that writes waits first.
    pub(crate) delay_ms: i32,
    /// Whose files are meant, as bits that `faults.c` names.
    pub(crate) targets: i32,
    /// Added to the wall clock.
    pub(crate) clock_offset_ms: i64,
}

/// The library, what it is told, and a program for workers that has it too.
pub(crate) struct Shim {
    library: PathBuf,
    path: PathBuf,
    control: File,
    data: PathBuf,
}

impl Shim {
    /// Builds the library in `folder`, for processes whose data folder is `data`.
    pub(crate) fn build(folder: &Path, data: &Path) -> Self {
        let (library, path) = (folder.join("faults.so"), folder.join("faults.control"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/shim/faults.c");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).arg("-ldl");
        let built = cc.status().expect("a C compiler");
        assert!(built.success(), "the C compiler fails: {built}");
        let control = File::create(&path).expect("a file");
        let shim = Self { library, path, control, data: data.to_owned() };
        shim.set(Control::default());
        shim
    }

    /// From now on that goes wrong, and nothing else.
    pub(crate) fn set(&self, control: Control) {
        let Control { error, one_in, delay_ms, targets, clock_offset_ms } = control;
        let mut bytes = Vec::new();
        for number in [error, one_in, delay_ms, targets] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend(clock_offset_ms.to_ne_bytes());
        self.control.write_all_at(&bytes, 0).expect("a file");
    }

    /// The variables that preload it.
    pub(crate) fn environment(&self) -> [(&'static str, &Path); 3] {
        [("LD_PRELOAD", &self.library), ("FAULTS_CONTROL", &self.path), ("FAULTS_FOLDER", &self.data)]
    }

    /// Writes a program that becomes `lorad`, preloaded: for `workers.executable`, as a worker sees none of the server's variables.
    pub(crate) fn write_worker(&self, program: &Path) {
        let variables = self.environment().map(|(name, value)| format!("export {name}='{}'\n", value.display()));
        let script = format!("#!/bin/sh\n{}exec '{}' \"$@\"\n", variables.concat(), env!("CARGO_BIN_EXE_lorad"));
        fs::write(program, script).expect("a file");
        fs::set_permissions(program, fs::Permissions::from_mode(0o700)).expect("a file of ours");
    }
}
