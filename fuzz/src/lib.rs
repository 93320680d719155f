//! What the fuzz targets have in common: one thread, a folder in memory, and the seeds that a corpus begins with.

pub mod seeds;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use lorad_engine::gguf::GgufFile;
use lorad_engine::testing::TinyModel;
use lorad_engine::tokenizer::Tokenizer;

/// Names a folder that the target's seeds are written to instead of fuzzing.
const SEEDS: &str = "LORAD_FUZZ_SEEDS";

/// A folder of this process in memory, for what the engine reads from files.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = Path::new("/dev/shm").join(format!("lorad-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&path).expect("a folder in /dev/shm");
    path
});

/// Sets a target up. All rows are judged on the thread that asks: what an input covers must not depend on other threads.
pub fn begin(seeds: fn(&Path)) {
    if let Some(folder) = std::env::var_os(SEEDS) {
        seeds(Path::new(&folder));
        std::process::exit(0);
    }
    rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global().expect("the first pool");
}

/// The folder in memory.
pub fn folder() -> &'static Path {
    &FOLDER
}

/// A file of that name in the folder in memory, with those bytes.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, bytes).expect("written to memory");
    path
}

/// The tokenizer of a tiny model, of either algorithm.
pub fn tokenizer(sentence_piece: bool) -> Tokenizer {
    let path = folder().join("tiny.gguf");
    TinyModel { sentence_piece, ..TinyModel::default() }.write(&path).expect("written");
    Tokenizer::from_gguf(&GgufFile::open(&path).expect("our own file")).expect("our own tokenizer")
}
