//! AdamW with moments in 8 bits on a GPU; the maths, the tables and what is kept stand in `ops/adamw_8bit.rs`.

use std::ops::Range;
use std::rc::Rc;

use super::adamw::{step_values, with_rule};
use super::flat::assert_vector;
use super::{Buffer, Dtype, Gpu, Mat};
use crate::Result;
use crate::ops::adamw::{Rule, Update};
use crate::ops::adamw_8bit::{BLOCK, Moments, SIGNED, UNSIGNED, is_large};

const THREADS: usize = 256;
/// A warp takes a block.
const BLOCKS_OF_VALUES: usize = THREADS / 32;
/// Thread blocks of a multiprocessor.
const RESIDENT: u32 = 4;
/// Bytes of a table: 256 values and 255 middles.
const TABLE_BYTES: usize = 4 * 512;

/// Bytes of where a block begins: two numbers.
const PLACE_BYTES: usize = 2 * size_of::<u64>();

/// Both moments of every parameter.
#[derive(Debug)]
pub(crate) struct DeviceMoments {
    /// As in [`Moments`].
    codes: Buffer,
    factors: Buffer,
    small: Buffer,
    /// Where each block of a large tensor begins, among the parameters and among the codes, and the end.
    places: Buffer,
    /// The table of m, then of v.
    tables: Buffer,
    /// Codes of m.
    large_values: usize,
    blocks: usize,
    /// Where each small tensor lies among the parameters.
    small_tensors: Vec<Range<usize>>,
    /// Values of m of the small tensors.
    small_values: usize,
    parameters: usize,
}

impl DeviceMoments {
    /// Bytes that all of it takes, the tables and places too.
    pub(crate) fn bytes(tensors: &[Range<usize>]) -> usize {
        let blocks: usize = tensors.iter().filter(|tensor| is_large(tensor)).map(|it| it.len().div_ceil(BLOCK)).sum();
        Moments::size_bytes(tensors) + PLACE_BYTES * (blocks + 1) + 2 * TABLE_BYTES
    }

    /// Copies moments to a GPU. `tensors` says where each tensor lies among the parameters: one after the other.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub(crate) fn new(gpu: &Rc<Gpu>, moments: &Moments, tensors: &[Range<usize>]) -> Result<Self> {
        assert!(moments.fit(tensors), "adamw_8bit: moments of other tensors");
        let (mut places, mut large_values) = (Vec::new(), 0u64);
        for tensor in tensors.iter().filter(|tensor| is_large(tensor)) {
            let starts = (0..tensor.len()).step_by(BLOCK);
            places.extend(starts.map(|start| [(tensor.start + start) as u64, large_values + start as u64]));
            large_values += tensor.len() as u64;
        }
        let blocks = places.len();
        places.push([0, large_values]);
        let table = [&SIGNED.values[..], &SIGNED.middles, &[0.0], &UNSIGNED.values, &UNSIGNED.middles, &[0.0]].concat();
        debug_assert_eq!(size_of_val(&table[..]), 2 * TABLE_BYTES);
        let small_tensors: Vec<Range<usize>> = tensors.iter().filter(|tensor| !is_large(tensor)).cloned().collect();
        Ok(Self {
            codes: Buffer::of(gpu, &moments.codes)?,
            factors: Buffer::of(gpu, &moments.factors)?,
            small: Buffer::of(gpu, &moments.small)?,
            places: Buffer::of(gpu, places.as_flattened())?,
            tables: Buffer::of(gpu, &table)?,
            large_values: large_values as usize,
            blocks,
            small_values: small_tensors.iter().map(Range::len).sum(),
            small_tensors,
            parameters: tensors.last().map_or(0, |last| last.end),
        })
    }

    /// Copies moments of the same tensors to the GPU.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the driver refuses.
    pub(crate) fn write(&self, moments: &Moments, tensors: &[Range<usize>]) -> Result<()> {
        assert!(moments.fit(tensors), "adamw_8bit: moments of other tensors");
        self.codes.write(0, &moments.codes)?;
        self.factors.write(0, &moments.factors)?;
        self.small.write(0, &moments.small)
    }

    /// Copies them back, once the GPU has come so far.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where something queued before has failed.
    pub(crate) fn read(&self) -> Result<Moments> {
        let mut moments = Moments {
            codes: vec![0; 2 * self.large_values],
            factors: vec![0.0; 2 * self.blocks],
            small: vec![0.0; 2 * self.small_values],
        };
        self.codes.read(0, &mut moments.codes)?;
        self.factors.read(0, &mut moments.factors)?;
        self.small.read(0, &mut moments.small)?;
        Ok(moments)
    }

    /// Moves parameters (N) and moments by one step.
    pub(crate) fn step(&mut self, gpu: &Gpu, parameters: Mat<'_>, gradient: Mat<'_>, update: Update) -> Result<()> {
        assert_vector("adamw_8bit: parameters", parameters, self.parameters);
        assert_vector("adamw_8bit: gradient", gradient, self.parameters);
        let rule = Rule::new(update);
        self.step_blocks(gpu, parameters, gradient, &rule)?;
        let small = self.small.mat(0, (2, self.small_values), self.small_values, Dtype::F32);
        let mut first = 0;
        for tensor in &self.small_tensors {
            let (m, v) = (small.rows(0, 1).columns(first, tensor.len()), small.rows(1, 1).columns(first, tensor.len()));
            let (p, g) = (parameters.columns(tensor.start, tensor.len()), gradient.columns(tensor.start, tensor.len()));
            step_values(gpu, p, m, v, g, &rule)?;
            first += tensor.len();
        }
        Ok(())
    }

    fn step_blocks(&self, gpu: &Gpu, parameters: Mat<'_>, gradient: Mat<'_>, rule: &Rule) -> Result<()> {
        let grid = (self.blocks.div_ceil(BLOCKS_OF_VALUES) as u32).min(RESIDENT * gpu.multiprocessors);
        let launch = gpu.launch("adamw_8bit_step")?.grid(grid, THREADS as u32).pointer(parameters).pointer(gradient);
        let launch = launch.long(self.codes.at(0)).long(self.codes.at(self.large_values));
        let launch = launch.long(self.factors.at(0)).long(self.factors.at(4 * self.blocks));
        let launch = launch.long(self.places.at(0)).int(self.blocks);
        let launch = [0, 4 * 256, TABLE_BYTES, TABLE_BYTES + 4 * 256]
            .into_iter()
            .fold(launch, |launch, offset| launch.long(self.tables.at(offset)));
        // SAFETY: `new` made the places out of the tensors that parameters, codes and factors were checked against.
        unsafe { with_rule(launch, rule).run() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Held, gpu, random};
    use super::*;
    use crate::ops::{adamw_8bit, host, tensor};

    #[test]
    fn steps_are_those_of_the_cpu_to_the_bit() {
        let Some(gpu) = gpu() else { return };
        for sizes in [&[4096, 100, 65_536, 4095][..], &[7, 4097, 5000, 1], &[12], &[300_000]] {
            let mut end = 0;
            let spans = sizes.iter().map(|size| {
                end += size;
                end - size..end
            });
            let spans: Vec<Range<usize>> = spans.collect();
            let parameters = random(1, end);
            let held = |values: &[f32]| Held::of(&gpu, values, (1, end), end, Dtype::F32);
            let (cpu, on_gpu) = (tensor(parameters.clone(), end).unwrap(), held(&parameters));
            let mut moments = Moments::zeros(&spans);
            let mut gpu_moments = DeviceMoments::new(&gpu, &moments, &spans).unwrap();
            for step in 1..5 {
                let gradient: Vec<f32> = random(u64::from(step) + 1, end).iter().map(|g| g * g * g).collect();
                let update = Update { step, learning_rate: 1e-2, weight_decay: 0.1, clip_factor: 0.5 };
                let cpu_gradient = tensor(gradient.clone(), end).unwrap();
                adamw_8bit::step(&cpu, &spans, &mut moments, &cpu_gradient, update).unwrap();
                gpu_moments.step(&gpu, on_gpu.mat(), held(&gradient).mat(), update).unwrap();
            }
            assert_eq!(gpu_moments.read().unwrap(), moments);
            assert_eq!(on_gpu.values(), &*host(&cpu).unwrap());
        }
    }
}
