//! Memory of a GPU: buffers, and matrices that lie in them.

use std::marker::PhantomData;
use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::{Gpu, failed};
use crate::{Error, Result};

/// Every buffer of a slab begins at a multiple of so many bytes.
const ALIGNMENT: usize = 256;

/// Type of a matrix's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    /// Bytes of a value.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Memory of a GPU, given back when the last buffer in it is dropped.
#[derive(Debug)]
struct Memory {
    gpu: Rc<Gpu>,
    pointer: sys::CUdeviceptr,
    bytes: usize,
}

/// Bytes on a GPU.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Rc<Memory>,
    pointer: sys::CUdeviceptr,
    bytes: usize,
}

/// Hands out buffers of one piece of memory: the driver rounds each piece up to 2 MiB.
#[derive(Debug)]
pub(crate) struct Slab {
    memory: Rc<Memory>,
    taken: usize,
}

impl Slab {
    /// Memory for buffers of those sizes.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub(crate) fn new(gpu: &Rc<Gpu>, sizes: impl IntoIterator<Item = usize>) -> Result<Self> {
        let bytes = sizes.into_iter().map(Self::rounded).sum();
        Ok(Self { memory: Rc::new(Memory::new(gpu, bytes)?), taken: 0 })
    }

    /// Bytes that a buffer of that size takes of a slab.
    pub(crate) fn rounded(bytes: usize) -> usize {
        bytes.max(1).next_multiple_of(ALIGNMENT)
    }

    /// The next buffer.
    ///
    /// # Panics
    /// Where the slab was made for fewer or smaller ones.
    pub(crate) fn take(&mut self, bytes: usize) -> Buffer {
        let pointer = self.memory.pointer + self.taken as u64;
        self.taken += Self::rounded(bytes);
        assert!(self.taken <= self.memory.bytes, "a slab of {} bytes is used up", self.memory.bytes);
        Buffer { memory: Rc::clone(&self.memory), pointer, bytes: bytes.max(1) }
    }

    /// The next buffer, with those values.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn of<T: bytemuck::NoUninit>(&mut self, values: &[T]) -> Result<Buffer> {
        let buffer = self.take(size_of_val(values));
        buffer.write(0, values)?;
        Ok(buffer)
    }
}

impl Memory {
    fn new(gpu: &Rc<Gpu>, bytes: usize) -> Result<Self> {
        let size = bytes.max(1);
        gpu.context.bind_to_thread().map_err(failed("taking the GPU"))?;
        // SAFETY: the context is the thread's current one; the memory is owned by this object alone.
        let pointer = match unsafe { result::malloc_sync(size) } {
            Ok(pointer) => pointer,
            Err(error) if error.0 == sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = gpu.memory().map_or(0, |(free, _)| free);
                return Err(Error::DeviceMemory { needed_bytes: bytes as u64, free_bytes: free as u64 });
            }
            Err(error) => return Err(failed("allocating memory")(error)),
        };
        gpu.allocated_bytes.set(gpu.allocated_bytes.get() + size);
        Ok(Self { gpu: Rc::clone(gpu), pointer, bytes: size })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.gpu.allocated_bytes.set(self.gpu.allocated_bytes.get() - self.bytes);
        // What is queued may still use it.
        let _ = self.gpu.stream.synchronize();
        // SAFETY: the memory is this object's, and nothing queued uses it any more.
        let _ = unsafe { result::free_sync(self.pointer) };
    }
}

impl Buffer {
    /// So many bytes, with anything in them.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] where they are not free.
    pub(crate) fn new(gpu: &Rc<Gpu>, bytes: usize) -> Result<Self> {
        let memory = Rc::new(Memory::new(gpu, bytes)?);
        let (pointer, bytes) = (memory.pointer, memory.bytes);
        Ok(Self { memory, pointer, bytes })
    }

    /// So many zero bytes.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub(crate) fn zeros(gpu: &Rc<Gpu>, bytes: usize) -> Result<Self> {
        let buffer = Self::new(gpu, bytes)?;
        buffer.fill_zero()?;
        Ok(buffer)
    }

    /// Those values.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub(crate) fn of<T: bytemuck::NoUninit>(gpu: &Rc<Gpu>, values: &[T]) -> Result<Self> {
        let buffer = Self::new(gpu, size_of_val(values))?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// The GPU that it is on.
    pub(crate) fn gpu(&self) -> &Rc<Gpu> {
        &self.memory.gpu
    }

    fn stream(&self) -> sys::CUstream {
        self.memory.gpu.stream.cu_stream()
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of that byte.
    pub(crate) fn at(&self, offset: usize) -> u64 {
        assert!(offset <= self.bytes, "byte {offset} of a buffer of {}", self.bytes);
        self.pointer + offset as u64
    }

    /// Sets every byte to 0, in the stream's order.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn fill_zero(&self) -> Result<()> {
        let stream = self.stream();
        // SAFETY: the range is the whole buffer.
        unsafe { result::memset_d8_async(self.pointer, 0, self.bytes, stream) }.map_err(failed("clearing memory"))
    }

    /// Copies values to that byte, in the stream's order; they may change when it returns.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn write<T: bytemuck::NoUninit>(&self, offset: usize, values: &[T]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        assert!(offset + size_of_val(values) <= self.bytes, "a write beyond the buffer's end");
        let stream = self.stream();
        // SAFETY: the range was checked. Pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(self.pointer + offset as u64, values, stream) }
            .map_err(failed("copying to the GPU"))
    }

    /// Fills the buffer with copies of its first bytes, in the stream's order.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn repeat(&self, bytes: usize) -> Result<()> {
        let mut filled = bytes.min(self.bytes);
        assert!(filled > 0, "nothing to repeat");
        while filled < self.bytes {
            let count = filled.min(self.bytes - filled);
            // SAFETY: both ranges lie in the buffer and do not overlap.
            unsafe { result::memcpy_dtod_async(self.pointer + filled as u64, self.pointer, count, self.stream()) }
                .map_err(failed("copying on the GPU"))?;
            filled += count;
        }
        Ok(())
    }

    /// Copies another buffer of the same size, in the stream's order.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn copy_from(&self, other: &Self) -> Result<()> {
        assert_eq!(self.bytes, other.bytes, "buffers of different sizes");
        assert_ne!(self.pointer, other.pointer, "a buffer copied to itself");
        // SAFETY: both are as large as that, and are not the same.
        unsafe { result::memcpy_dtod_async(self.pointer, other.pointer, self.bytes, self.stream()) }
            .map_err(failed("copying on the GPU"))
    }

    /// Copies values from that byte on, after all that was queued.
    ///
    /// # Errors
    /// [`Error::Device`] where something queued before has failed.
    pub(crate) fn read<T: bytemuck::Pod>(&self, offset: usize, values: &mut [T]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        assert!(offset + size_of_val(values) <= self.bytes, "a read beyond the buffer's end");
        let stream = self.stream();
        // SAFETY: the range was checked, and the copy has ended before `values` is given back.
        unsafe { result::memcpy_dtoh_async(values, self.pointer + offset as u64, stream) }
            .map_err(failed("copying from the GPU"))?;
        self.memory.gpu.synchronize()
    }

    /// A matrix at that byte.
    ///
    /// # Panics
    /// Where it would reach beyond the buffer, or its rows overlap.
    pub(crate) fn mat(&self, offset: usize, (rows, columns): (usize, usize), stride: usize, dtype: Dtype) -> Mat<'_> {
        assert!(columns <= stride || rows <= 1, "rows of {columns} values every {stride}");
        let span = if rows == 0 || columns == 0 { 0 } else { (rows - 1) * stride + columns };
        assert!(
            offset + span * dtype.bytes() <= self.bytes,
            "a matrix of {rows} × {columns} beyond a buffer of {}",
            self.bytes
        );
        Mat { pointer: self.pointer + offset as u64, rows, columns, stride, dtype, buffer: PhantomData }
    }

    /// All of it as one row of values.
    pub(crate) fn row(&self, dtype: Dtype) -> Mat<'_> {
        let count = self.bytes / dtype.bytes();
        self.mat(0, (1, count), count, dtype)
    }
}

/// A row-major matrix in a buffer: `stride` values from row to row.
///
/// Kernels write through it though it is shared: all that is queued runs in order, on one stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mat<'a> {
    pub(crate) pointer: u64,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) stride: usize,
    pub(crate) dtype: Dtype,
    buffer: PhantomData<&'a Buffer>,
}

impl<'a> Mat<'a> {
    /// `count` rows from `first` on.
    pub(crate) fn rows(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows, "rows {first} and {count} more of {}", self.rows);
        Self { pointer: self.pointer + (first * self.stride * self.dtype.bytes()) as u64, rows: count, ..self }
    }

    /// `count` columns from `first` on.
    pub(crate) fn columns(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.columns, "columns {first} and {count} more of {}", self.columns);
        Self { pointer: self.pointer + (first * self.dtype.bytes()) as u64, columns: count, ..self }
    }

    /// (rows, columns).
    pub(crate) fn shape(self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Whether there is no value.
    pub(crate) fn is_empty(self) -> bool {
        self.rows == 0 || self.columns == 0
    }
}

impl Mat<'_> {
    /// Sets every value to 0, in the stream's order.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn fill_zero(self, gpu: &Gpu) -> Result<()> {
        let (size, stream) = (self.dtype.bytes(), gpu.stream.cu_stream());
        if self.is_empty() {
            return Ok(());
        }
        // SAFETY: the matrix lies in a buffer, and `mat` checked its rows.
        let result = unsafe {
            sys::cuMemsetD2D8Async(
                self.pointer,
                self.stride.max(self.columns) * size,
                0,
                self.columns * size,
                self.rows,
                stream,
            )
        };
        result.result().map_err(failed("clearing a matrix"))
    }
}
