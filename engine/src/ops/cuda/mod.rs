//! The one user of the CUDA driver: a GPU's context, its stream, the kernels of `kernels/`, and what launches them.
//!
//! Kernels and products are queued on one stream, in order; the host waits only where it reads a result. A launcher checks types, sizes
//! and bounds of the matrices that it is given ([`Mat`] cannot reach beyond its buffer), then launches. CUDA's libraries are opened at
//! run time: where there is none, [`devices`] is empty and [`Gpu::new`] says why.
#![expect(unsafe_code, reason = "the driver's interface is C: each call's pointers and sizes are checked before it")]

mod adamw;
mod adamw_8bit;
mod attention;
mod backward;
mod bench;
mod bench_ops;
mod buffers;
mod cross_entropy;
mod dequantize;
mod dropout;
mod flat;
mod gemm;
mod launch;
mod lora;
mod memory;
mod random;
mod rms_norm;
mod rope;
mod sizes;
mod step;
mod swiglu;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod trainer;
mod weights;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::CStr;
use std::rc::Rc;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

pub(crate) use bench::bench_train;
pub(crate) use bench_ops::bench_ops;
pub(crate) use gemm::Gemm;
pub(crate) use launch::Launch;
pub(crate) use memory::{Buffer, Dtype, Mat, Slab};
pub(crate) use trainer::{
    HostMoments, Setup, Trainer, check, free_bytes, kept_layers_within, peak_bytes, resident_bytes_within,
};

use crate::device::{CudaDevice, cuda_device};
use crate::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Every GPU that this build can use, or why there is none.
pub fn devices() -> Result<Vec<CudaDevice>, String> {
    if FATBINS.is_empty() {
        return Err("this build has no kernels (LORAD_SKIP_KERNELS was set)".to_owned());
    }
    // SAFETY: looks for the library alone.
    if !unsafe { sys::is_culib_present() } {
        return Err("the NVIDIA driver's library libcuda.so.1 is not there".to_owned());
    }
    let list = || -> Result<Vec<CudaDevice>, DriverError> {
        result::init()?;
        (0..result::device::get_count()?).map(describe).collect()
    };
    let found = list().map_err(|error| format!("the NVIDIA driver refuses: {error}"))?;
    // Numbers are the driver's: a card that is left out leaves a gap.
    let (usable, others): (Vec<_>, Vec<_>) = found.into_iter().partition(|gpu| has_kernels_for(gpu.compute_capability));
    match others.first() {
        Some(CudaDevice { name, compute_capability: (major, minor), .. }) if usable.is_empty() => {
            Err(format!("{name} has compute capability {major}.{minor}, this build has kernels for {ARCHITECTURES}"))
        }
        _ => Ok(usable),
    }
}

/// Whether a kernel of this build runs on that compute capability: machine code runs on its own generation's later cards, and what has an
/// `a` on no other card.
fn has_kernels_for((major, minor): (i32, i32)) -> bool {
    ARCHITECTURES.split(',').any(|name| {
        let (digits, is_specific) = name.strip_suffix('a').map_or((name, false), |digits| (digits, true));
        let number: i32 = digits.parse().unwrap_or(0);
        number / 10 == major && if is_specific { number % 10 == minor } else { number % 10 <= minor }
    })
}

fn describe(ordinal: i32) -> Result<CudaDevice, DriverError> {
    use sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let device = result::device::get(ordinal)?;
    // SAFETY: `device` is what the driver just gave.
    let (total, major, minor) = unsafe {
        (
            result::device::total_mem(device)?,
            result::device::get_attribute(device, MAJOR)?,
            result::device::get_attribute(device, MINOR)?,
        )
    };
    Ok(CudaDevice {
        ordinal: ordinal as usize,
        name: result::device::get_name(device)?,
        total_bytes: total as u64,
        compute_capability: (major, minor),
    })
}

/// A kernel, and the dynamic shared memory that it was told it may have.
#[derive(Debug)]
pub(crate) struct Kernel {
    function: sys::CUfunction,
    shared_bytes: Cell<u32>,
}

/// What ran on the stream, between events.
#[derive(Debug, Default)]
struct Profile {
    spans: Vec<(&'static str, cudarc::driver::CudaEvent, cudarc::driver::CudaEvent)>,
}

/// A GPU in use by one thread.
#[derive(Debug)]
pub(crate) struct Gpu {
    // Fields are dropped in this order: modules are unloaded while there is a context.
    _modules: Vec<Module>,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernels: HashMap<String, Rc<Kernel>>,
    gemm: RefCell<Option<Gemm>>,
    profile: RefCell<Option<Profile>>,
    allocated_bytes: Cell<usize>,
    /// Compute capability.
    pub(crate) capability: (i32, i32),
    /// Streaming multiprocessors.
    pub(crate) multiprocessors: u32,
    /// Bytes of shared memory that a block may ask for.
    pub(crate) shared_bytes: usize,
}

impl Gpu {
    /// Takes the GPU of that number.
    ///
    /// # Errors
    /// [`Error::Device`] where there is none, or the driver refuses.
    pub(crate) fn new(ordinal: usize) -> Result<Rc<Self>> {
        let device = cuda_device(ordinal).map_err(Error::Device)?;
        let context = CudaContext::new(ordinal).map_err(failed("opening the GPU"))?;
        // One stream, in order: no buffer needs an event.
        // SAFETY: nothing was allocated before, and this context's memory is used on one stream alone.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(failed("making a stream"))?;
        let modules = FATBINS.iter().map(|fatbin| Module::load(fatbin)).collect::<Result<Vec<_>>>()?;
        let mut kernels = HashMap::new();
        for module in &modules {
            kernels.extend(module.functions().map_err(failed("listing the kernels"))?);
        }
        use sys::CUdevice_attribute_enum::{
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED_BYTES,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        let attribute = |which| context.attribute(which).map_err(failed("asking the GPU"));
        let (multiprocessors, shared_bytes) = (attribute(MULTIPROCESSORS)? as u32, attribute(SHARED_BYTES)? as usize);
        let gpu = Self {
            _modules: modules,
            context,
            stream,
            kernels,
            gemm: RefCell::new(None),
            profile: RefCell::new(None),
            allocated_bytes: Cell::new(0),
            capability: device.compute_capability,
            multiprocessors,
            shared_bytes,
        };
        let gpu = Rc::new(gpu);
        *gpu.gemm.borrow_mut() = Some(Gemm::new(&gpu)?);
        Ok(gpu)
    }

    /// Whether it has Hopper's own instructions (`wgmma`, the tensor copy engine).
    pub(crate) fn is_hopper(&self) -> bool {
        self.capability.0 == 9
    }

    /// Begins a launch of the kernel of that name.
    ///
    /// # Errors
    /// [`Error::Device`] where no file of `kernels/` has it.
    pub(crate) fn launch(&self, name: &'static str) -> Result<Launch<'_>> {
        Ok(Launch::new(self, name, self.kernel(name)?))
    }

    fn kernel(&self, name: &'static str) -> Result<Rc<Kernel>> {
        let missing =
            || Error::Device(format!("this build has no kernel `{name}` for compute capability {:?}", self.capability));
        self.kernels.get(name).cloned().ok_or_else(missing)
    }

    /// Waits until all that was queued is done.
    ///
    /// # Errors
    /// [`Error::Device`] where something queued has failed.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(failed("waiting for the GPU"))
    }

    /// Bytes that buffers hold now.
    pub(crate) fn allocated_bytes(&self) -> usize {
        self.allocated_bytes.get()
    }

    /// Free and all bytes of the GPU's memory.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().map_err(failed("asking for free memory"))
    }

    /// Bytes of the GPU's memory that are in use, by the driver and others too.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn used_bytes(&self) -> Result<usize> {
        self.memory().map(|(free, total)| total - free)
    }

    /// Runs a matrix product: see [`Gemm::run`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn gemm(&self, label: &'static str, out: Mat<'_>, product: gemm::Product<'_>) -> Result<()> {
        self.timed(label, || {
            let mut gemm = self.gemm.borrow_mut();
            gemm.as_mut().expect("set in `new`").run(self, out, product)
        })
    }

    /// An event on the stream, for times on the device.
    pub(crate) fn event(&self) -> Result<cudarc::driver::CudaEvent> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        self.stream.record_event(flags).map_err(failed("recording an event"))
    }

    /// Milliseconds between two events that have happened.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn milliseconds(begin: &cudarc::driver::CudaEvent, end: &cudarc::driver::CudaEvent) -> Result<f64> {
        begin.elapsed_ms(end).map(f64::from).map_err(failed("reading an event"))
    }

    /// Begins to take the time of everything that is queued.
    pub(crate) fn start_profile(&self) {
        *self.profile.borrow_mut() = Some(Profile::default());
    }

    /// Milliseconds and launches of each kernel and kind of product since [`Gpu::start_profile`].
    ///
    /// # Errors
    /// [`Error::Device`] where something queued has failed.
    pub(crate) fn take_profile(&self) -> Result<Vec<(&'static str, f64, usize)>> {
        self.synchronize()?;
        let Some(profile) = self.profile.borrow_mut().take() else { return Ok(Vec::new()) };
        let mut totals: HashMap<&'static str, (f64, usize)> = HashMap::new();
        for (label, begin, end) in &profile.spans {
            let total = totals.entry(label).or_default();
            total.0 += Self::milliseconds(begin, end)?;
            total.1 += 1;
        }
        let mut list: Vec<_> = totals.into_iter().map(|(label, (ms, count))| (label, ms, count)).collect();
        list.sort_by(|a, b| b.1.total_cmp(&a.1));
        Ok(list)
    }

    fn timed(&self, label: &'static str, run: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.profile.borrow().is_none() {
            return run();
        }
        let begin = self.event()?;
        run()?;
        let end = self.event()?;
        if let Some(profile) = self.profile.borrow_mut().as_mut() {
            profile.spans.push((label, begin, end));
        }
        Ok(())
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Buffers and the context outlive nothing that is still queued.
        let _ = self.stream.synchronize();
        self.gemm.borrow_mut().take();
    }
}

/// The compiled kernels of a file.
#[derive(Debug)]
struct Module(sys::CUmodule);

impl Module {
    fn load(fatbin: &'static [u8]) -> Result<Self> {
        // SAFETY: the bytes are a whole fatbin of nvcc's, which carries its own length.
        unsafe { result::module::load_data(fatbin.as_ptr().cast()) }.map(Self).map_err(failed("loading the kernels"))
    }

    /// Every kernel, by its name.
    fn functions(&self) -> Result<Vec<(String, Rc<Kernel>)>, DriverError> {
        functions_of(self.0)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: no kernel of it runs any more, and `self` is the only one that has it.
        let _ = unsafe { result::module::unload(self.0) };
    }
}

fn functions_of(module: sys::CUmodule) -> Result<Vec<(String, Rc<Kernel>)>, DriverError> {
    let mut count = 0;
    // SAFETY: the module is loaded; the driver writes one number, then so many functions.
    let functions = unsafe {
        sys::cuModuleGetFunctionCount(&raw mut count, module).result()?;
        let mut functions = vec![std::ptr::null_mut(); count as usize];
        sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module).result()?;
        functions
    };
    let named = |function: sys::CUfunction| {
        let mut name = std::ptr::null();
        // SAFETY: the function is the module's; the driver's name of it lives as long as the module.
        let name = unsafe {
            sys::cuFuncGetName(&raw mut name, function).result()?;
            CStr::from_ptr(name)
        };
        Ok((name.to_string_lossy().into_owned(), Rc::new(Kernel { function, shared_bytes: Cell::new(0) })))
    };
    functions.into_iter().map(named).collect()
}

/// What the driver said about that.
fn failed(what: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| match error.0 {
        sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => out_of_memory(),
        _ => Error::Device(format!("{what}: {error}")),
    }
}

/// An error of memory of which nobody says how much was needed.
fn out_of_memory() -> Error {
    let free_bytes = result::mem_get_info().map_or(0, |(free, _)| free as u64);
    Error::DeviceMemory { needed_bytes: 0, free_bytes }
}
