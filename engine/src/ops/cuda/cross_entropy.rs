//! Cross-entropy over a chunk's logits on a GPU; the maths stand in `ops/cross_entropy.rs`.

use std::rc::Rc;

use super::flat::{launch, of_type};
use super::{Buffer, Dtype, Gpu, Launch, Mat};
use crate::Result;
use crate::ops::cross_entropy::Loss;

/// Threads of a block, which has one row; kernels/cross_entropy.cu names it too.
const THREADS: u32 = 1024;
/// Shared memory that is left to a block's sums.
const OTHER_BYTES: usize = 1024;

/// What the losses of many chunks come to, added up on the GPU.
#[derive(Debug)]
pub(crate) struct Losses {
    /// The loss (f32) of each row of a chunk, then whether its largest logit is its label's (i32).
    per_row: Buffer,
    rows: usize,
    /// Sum of all losses (f64), rows that were right (i64).
    totals: Buffer,
    shared_bytes: u32,
}

impl Losses {
    /// None yet; of chunks of at most so many rows.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub(crate) fn new(gpu: &Rc<Gpu>, rows: usize) -> Result<Self> {
        let shared_bytes = gpu.shared_bytes.saturating_sub(OTHER_BYTES) as u32;
        let (per_row, totals) = (Buffer::new(gpu, 8 * rows)?, Buffer::zeros(gpu, 16)?);
        Ok(Self { per_row, rows, totals, shared_bytes })
    }

    /// Begins anew.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the driver refuses.
    pub(crate) fn clear(&self) -> Result<()> {
        self.totals.fill_zero()
    }

    /// What so many tokens' losses came to, once the GPU has come so far.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where something queued before has failed.
    pub(crate) fn read(&self, tokens: usize) -> Result<Loss> {
        let mut bits = [0u64; 2];
        self.totals.read(0, &mut bits)?;
        Ok(Loss { sum: f64::from_bits(bits[0]), tokens, correct: bits[1] as usize })
    }

    /// The losses of logits (n, V) in f32, and their gradient in either type, scale · (softmax − onehot).
    pub(crate) fn forward_backward(
        &self,
        gpu: &Gpu,
        dlogits: Mat<'_>,
        logits: Mat<'_>,
        labels: Labels<'_>,
        scale: f32,
    ) -> Result<()> {
        assert!(
            dlogits.shape() == logits.shape() && logits.dtype == Dtype::F32,
            "cross_entropy: {dlogits:?} of {logits:?}"
        );
        let name = of_type(dlogits.dtype, "cross_entropy_forward_backward_bf16", "cross_entropy_forward_backward_f32");
        let launch = self.launch(gpu, name, logits)?.shared(self.shared_bytes).mat(dlogits).mat(logits);
        self.run(gpu, launch, logits, labels, Some(scale))
    }

    /// The losses of logits (n, V) alone.
    pub(crate) fn forward(&self, gpu: &Gpu, logits: Mat<'_>, labels: Labels<'_>) -> Result<()> {
        let name = of_type(logits.dtype, "cross_entropy_forward_bf16", "cross_entropy_forward_f32");
        let launch = self.launch(gpu, name, logits)?.mat(logits);
        self.run(gpu, launch, logits, labels, None)
    }

    fn launch<'a>(&self, gpu: &'a Gpu, name: &'static str, logits: Mat<'_>) -> Result<Launch<'a>> {
        assert!(logits.rows <= self.rows, "cross_entropy: {} rows of at most {}", logits.rows, self.rows);
        Ok(gpu.launch(name)?.grid(logits.rows as u32, THREADS))
    }

    /// Runs a launch, and adds its rows to the totals.
    fn run(
        &self,
        gpu: &Gpu,
        launch: Launch<'_>,
        logits: Mat<'_>,
        labels: Labels<'_>,
        scale: Option<f32>,
    ) -> Result<()> {
        let (rows, vocabulary) = logits.shape();
        if rows == 0 {
            return Ok(());
        }
        let (loss, correct) = (self.per_row.at(0), self.per_row.at(4 * self.rows));
        let launch = launch.long(labels.address(rows));
        let launch = scale.into_iter().fold(launch, Launch::float).long(loss).long(correct).int(rows).int(vocabulary);
        // SAFETY: the shapes were checked, and there is room for so many rows.
        unsafe { launch.run() }?;
        let launch = gpu.launch("loss_sum")?.grid(1, THREADS).long(self.totals.at(0)).long(self.totals.at(8));
        // SAFETY: as above.
        unsafe { launch.long(loss).long(correct).int(rows).run() }
    }
}

/// Numbers of tokens (i32) on a GPU, from the one of that place on: labels, or which rows a chunk takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Labels<'a> {
    pub(crate) buffer: &'a Buffer,
    pub(crate) first: usize,
}

impl Labels<'_> {
    fn address(&self, count: usize) -> u64 {
        assert!(
            4 * (self.first + count) <= self.buffer.bytes(),
            "{count} numbers from {} on in {:?}",
            self.first,
            self.buffer
        );
        self.buffer.at(4 * self.first)
    }
}

/// `y[i] = x[index[i]]`, for every row of y. Every number must be a row of x.
pub(crate) fn gather_rows(gpu: &Gpu, y: Mat<'_>, x: Mat<'_>, index: Labels<'_>) -> Result<()> {
    copy_rows(gpu, of_type(y.dtype, "gather_rows_bf16", "gather_rows_f32"), (y, x), index, y)
}

/// `y[index[i]] = x[i]`, for every row of x. Every number must be a row of y, and none come twice.
pub(crate) fn scatter_rows(gpu: &Gpu, y: Mat<'_>, x: Mat<'_>, index: Labels<'_>) -> Result<()> {
    copy_rows(gpu, of_type(y.dtype, "scatter_rows_bf16", "scatter_rows_f32"), (y, x), index, x)
}

fn copy_rows(gpu: &Gpu, name: &'static str, (y, x): (Mat<'_>, Mat<'_>), index: Labels<'_>, of: Mat<'_>) -> Result<()> {
    assert!(y.columns == x.columns && y.dtype == x.dtype, "{name}: {y:?} and {x:?}");
    let launch = launch(gpu, name, of.shape())?.mat(y).mat(x).long(index.address(of.rows));
    // SAFETY: the shapes were checked; the numbers are the caller's, who knows them on the host.
    unsafe { launch.int(of.rows).int(of.columns).run() }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Held, assert_near, gpu, random, rounded, tolerance};
    use super::*;
    use crate::ops::cross_entropy::{self, IGNORE};

    #[test]
    fn losses_and_gradients_are_those_of_the_cpu() {
        let Some(gpu) = gpu() else { return };
        for (rows, vocabulary, stride) in
            [(0, 8, 8), (1, 1, 1), (4, 7, 7), (5, 1001, 1004), (3, 49_152, 49_160), (2, 128_256, 128_256)]
        {
            let labels: Vec<i32> =
                (0..rows as i32).map(|row| if row == 1 { IGNORE } else { row * 97_003 % vocabulary as i32 }).collect();
            let on_gpu = Buffer::of(&gpu, &[&[IGNORE][..], &labels].concat()).unwrap();
            let on_gpu = Labels { buffer: &on_gpu, first: 1 };
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let logits: Vec<f32> = random(1, rows * vocabulary).iter().map(|x| 3.0 * x).collect();
                let logits = rounded(&logits, dtype);
                let (mut expected, mut total) = (logits.clone(), Loss::default());
                for (row, &label) in expected.chunks_mut(vocabulary).zip(&labels) {
                    if label == IGNORE {
                        row.fill(0.0);
                    } else {
                        total += cross_entropy::token_loss(row, label, 0.25);
                    }
                }
                let losses = Losses::new(&gpu, rows.max(1)).unwrap();
                let check = |what: &str, gradient: Option<&Held>| {
                    let loss = losses.read(total.tokens).unwrap();
                    losses.clear().unwrap();
                    assert_eq!((loss.tokens, loss.correct), (total.tokens, total.correct), "{what}");
                    assert!(
                        (loss.sum - total.sum).abs() <= 1e-5 * total.sum.abs().max(1e-1),
                        "{what}: {loss:?} not {total:?}"
                    );
                    if let Some(gradient) = gradient {
                        assert_near(what, &gradient.values(), &expected, tolerance(gradient.mat().dtype));
                    }
                };
                let shape = (rows, vocabulary);
                let held = Held::of(&gpu, &logits, shape, stride, dtype);
                losses.forward(&gpu, held.mat(), on_gpu).unwrap();
                check("loss alone", None);
                for out in [Dtype::F32, Dtype::Bf16] {
                    if dtype == Dtype::F32 {
                        let gradient = Held::poisoned(&gpu, shape, stride, out);
                        losses.forward_backward(&gpu, gradient.mat(), held.mat(), on_gpu, 0.25).unwrap();
                        check("loss and gradient", Some(&gradient));
                    }
                }
            }
        }
    }

    #[test]
    fn rows_are_gathered_and_put_back() {
        let Some(gpu) = gpu() else { return };
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for width in [1, 33, 576] {
                let index = [4u32, 0, 3];
                let values = rounded(&random(1, 5 * width), dtype);
                let picked: Vec<f32> =
                    index.iter().flat_map(|&row| &values[row as usize * width..][..width]).copied().collect();
                let x = Held::of(&gpu, &values, (5, width), width + 8, dtype);
                let y = Held::poisoned(&gpu, (3, width), width + 5, dtype);
                let buffer = Buffer::of(&gpu, &index).unwrap();
                let index = Labels { buffer: &buffer, first: 0 };
                gather_rows(&gpu, y.mat(), x.mat(), index).unwrap();
                assert_eq!(y.values(), picked);
                let back = Held::of(&gpu, &vec![0.0; 5 * width], (5, width), width, dtype);
                scatter_rows(&gpu, back.mat(), y.mat(), index).unwrap();
                let mut expected = values.clone();
                expected[width..3 * width].fill(0.0);
                assert_eq!(back.values(), expected);
            }
        }
    }
}
