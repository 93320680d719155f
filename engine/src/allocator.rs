//! The C library's allocator, told what a training does: the same large buffers again in every step.
//!
//! By default glibc gives memory back to the kernel as soon as much of it is free, and each step pays for hundreds of megabytes of
//! fresh pages: clearing them and the faults were 6% of its samples (docs/LOG.md).
#![cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "mallopt is a C function"))]

/// Keeps freed memory for later in this process, which must be one that trains and then ends: it will not shrink.
///
/// Does nothing where the C library is another one.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        /// The largest that glibc takes: blocks above it come from the kernel each time.
        const LARGEST_MMAP_THRESHOLD: libc::c_int = 32 << 20;
        // SAFETY: mallopt takes two numbers and changes settings of the allocator, under its own lock.
        let kept = unsafe {
            // One arena: threads take turns at the same work, and each would keep a heap as large as all of it.
            libc::mallopt(libc::M_ARENA_MAX, 1) == 1
                && libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) == 1
                && libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX) == 1
        };
        if !kept {
            tracing::debug!("the allocator keeps its defaults");
        }
    }
}
