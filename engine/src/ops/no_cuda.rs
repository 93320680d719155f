//! What stands in the place of `cuda` in a build without the feature: no GPU is there.

/// A GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct CudaDevice {
    /// Its number, as in `cuda:0`.
    pub ordinal: usize,
    /// The maker's name.
    pub name: String,
    /// Bytes of its memory.
    pub total_bytes: u64,
    /// Compute capability, 9.0 for one as (9, 0).
    pub compute_capability: (i32, i32),
}

/// Every GPU that this build can use, or why there is none.
pub fn devices() -> Result<Vec<CudaDevice>, String> {
    Err("this build is without the feature `cuda`".to_owned())
}
