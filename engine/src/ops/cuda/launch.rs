//! A kernel's launch: grid, block, shared memory, arguments.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::{Gpu, Kernel, Mat, failed};
use crate::{Error, Result};

/// Most arguments of a kernel.
const ARGUMENTS: usize = 32;
/// Dynamic shared memory that a kernel has without asking for more.
const SHARED_BYTES: u32 = 48 << 10;

/// What may be passed to a kernel by value.
///
/// # Safety
/// The type must have the layout of the kernel's parameter.
pub(crate) unsafe trait Argument {}
// SAFETY: a number has one layout.
unsafe impl Argument for u32 {}
// SAFETY: the driver's own type.
unsafe impl Argument for sys::CUtensorMap {}

/// A launch under construction. Arguments are borrowed until [`Launch::run`].
#[must_use]
pub(crate) struct Launch<'a> {
    gpu: &'a Gpu,
    name: &'static str,
    kernel: Rc<Kernel>,
    grid: (u32, u32, u32),
    block: (u32, u32, u32),
    shared_bytes: u32,
    arguments: [Value; ARGUMENTS],
    count: usize,
    values: PhantomData<&'a ()>,
}

/// An argument: a number's bits, or where a larger one lies; and its bytes.
#[derive(Clone, Copy)]
enum Value {
    Bits(u64, usize),
    At(*mut c_void, usize),
}

impl<'a> Launch<'a> {
    pub(super) fn new(gpu: &'a Gpu, name: &'static str, kernel: Rc<Kernel>) -> Self {
        Self {
            gpu,
            name,
            kernel,
            grid: (1, 1, 1),
            block: (1, 1, 1),
            shared_bytes: 0,
            arguments: [Value::Bits(0, 0); ARGUMENTS],
            count: 0,
            values: PhantomData,
        }
    }

    /// Blocks, and threads of a block.
    pub(crate) fn grid(mut self, blocks: u32, threads: u32) -> Self {
        (self.grid, self.block) = ((blocks, 1, 1), (threads, 1, 1));
        self
    }

    /// Blocks in three dimensions, and threads of a block.
    pub(crate) fn grid_3d(mut self, blocks: (u32, u32, u32), threads: u32) -> Self {
        (self.grid, self.block) = (blocks, (threads, 1, 1));
        self
    }

    /// Dynamic shared memory of a block.
    pub(crate) fn shared(mut self, bytes: u32) -> Self {
        self.shared_bytes = bytes;
        self
    }

    /// The next argument.
    pub(crate) fn arg<T: Argument>(mut self, value: &'a T) -> Self {
        self.push(Value::At(std::ptr::from_ref(value).cast_mut().cast(), size_of::<T>()));
        self
    }

    /// The next argument: a number of the kernel's type `int`.
    pub(crate) fn int(self, value: usize) -> Self {
        let value = i32::try_from(value).expect("a count that a kernel takes fits 31 bits");
        self.number(u64::from(value as u32), 4)
    }

    /// The next argument: a number of the kernel's type `float`.
    pub(crate) fn float(self, value: f32) -> Self {
        self.number(u64::from(value.to_bits()), 4)
    }

    /// The next argument: 64 bits, an address (0 for none), a `size_t` or a `long long`.
    pub(crate) fn long(self, value: u64) -> Self {
        self.number(value, 8)
    }

    /// The next argument: where a matrix begins.
    pub(crate) fn pointer(self, mat: Mat<'_>) -> Self {
        self.number(mat.pointer, 8)
    }

    /// The next two arguments: where a matrix begins, and its stride in values.
    pub(crate) fn mat(self, mat: Mat<'_>) -> Self {
        self.number(mat.pointer, 8).number(mat.stride as u64, 8)
    }

    fn number(mut self, bits: u64, size: usize) -> Self {
        self.push(Value::Bits(bits, size));
        self
    }

    fn push(&mut self, argument: Value) {
        assert!(self.count < ARGUMENTS, "{}: more than {ARGUMENTS} arguments", self.name);
        self.arguments[self.count] = argument;
        self.count += 1;
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses, or something queued before has failed.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, in its order, and matrices as large as it takes them for.
    pub(crate) unsafe fn run(mut self) -> Result<()> {
        if self.grid.0 == 0 || self.grid.1 == 0 || self.grid.2 == 0 {
            return Ok(());
        }
        self.allow_shared()?;
        if cfg!(test) {
            self.compare_arguments();
        }
        let (gpu, name) = (self.gpu, self.name);
        gpu.timed(name, || {
            let stream = gpu.stream.cu_stream();
            let mut pointers = [std::ptr::null_mut(); ARGUMENTS];
            for (pointer, argument) in pointers.iter_mut().zip(&mut self.arguments[..self.count]) {
                *pointer = match argument {
                    // Little-endian: a shorter number is the first of its bytes.
                    Value::Bits(bits, _) => std::ptr::from_mut(bits).cast(),
                    Value::At(place, _) => *place,
                };
            }
            let arguments = &mut pointers[..self.count];
            // SAFETY: the function belongs to a loaded module; each argument points to a live value; the rest is the caller's.
            let launched = unsafe {
                result::launch_kernel(self.kernel.function, self.grid, self.block, self.shared_bytes, stream, arguments)
            };
            launched.map_err(|error| Error::Device(format!("launching `{name}`: {error}")))
        })
    }

    /// Compares how many arguments there are, and the bytes of each, with the compiled kernel's: nothing else notices one too many.
    ///
    /// # Panics
    /// Where they differ.
    fn compare_arguments(&self) {
        let taken: Vec<usize> = (0..)
            .map_while(|index| {
                let (mut offset, mut size) = (0, 0);
                // SAFETY: the function belongs to a loaded module; the driver writes two numbers, or refuses an index beyond the last.
                let found = unsafe {
                    sys::cuFuncGetParamInfo(self.kernel.function, index, &raw mut offset, &raw mut size).result()
                };
                found.ok().map(|()| size)
            })
            .collect();
        let size = |value: &Value| match value {
            Value::Bits(_, size) | Value::At(_, size) => *size,
        };
        let given: Vec<usize> = self.arguments[..self.count].iter().map(size).collect();
        assert_eq!(given, taken, "{}: bytes of the arguments given, and of those that the kernel takes", self.name);
    }

    fn allow_shared(&self) -> Result<()> {
        if self.shared_bytes > SHARED_BYTES && self.kernel.shared_bytes.get() < self.shared_bytes {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to a loaded module.
            unsafe {
                result::function::set_function_attribute(self.kernel.function, attribute, self.shared_bytes as i32)
            }
            .map_err(failed("giving a kernel shared memory"))?;
            self.kernel.shared_bytes.set(self.shared_bytes);
        }
        Ok(())
    }
}
