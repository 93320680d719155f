//! Rows packed into micro-batches, and the order in which they come.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::Row;
use crate::spec::TrainSpec;

/// The label of a token that predicts nothing.
pub const NO_LABEL: i32 = -100;

/// What a padded row is filled up with: any token that the model has.
const PADDING: u32 = 0;

/// Rows laid end to end: attention within a row only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// The tokens of all rows, (T).
    pub tokens: Vec<u32>,
    /// Position of each token in its row, (T).
    pub positions: Vec<u32>,
    /// The token to be predicted at each position (already shifted by one), or −100, (T).
    pub labels: Vec<i32>,
    /// Where each row begins, and at the end T: (rows + 1).
    pub cu_seqlens: Vec<usize>,
}

impl MicroBatch {
    /// Lays the rows end to end. The last token of a row predicts nothing: the next one is another row's.
    pub fn pack<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Self {
        let mut batch = Self { cu_seqlens: vec![0], ..Self::default() };
        for row in rows {
            let length = row.tokens.len();
            batch.tokens.extend_from_slice(&row.tokens);
            batch.positions.extend(0..length as u32);
            let next = row.tokens.iter().zip(&row.trained).skip(1);
            batch.labels.extend(next.map(|(&token, &trained)| if trained { token as i32 } else { NO_LABEL }));
            batch.labels.extend((length > 0).then_some(NO_LABEL));
            batch.cu_seqlens.push(batch.tokens.len());
        }
        batch
    }

    /// Lays the rows end to end, each filled up to the length of the longest with tokens that predict nothing. They come after
    /// the row's own, which therefore do not see them.
    pub fn pad<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Self {
        let rows: Vec<&Row> = rows.into_iter().collect();
        let longest = rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
        let padded = rows.into_iter().map(|row| {
            let mut row = row.clone();
            row.tokens.resize(longest, PADDING);
            row.trained.resize(longest, false);
            row
        });
        Self::pack(&padded.collect::<Vec<_>>())
    }

    /// Tokens with a label.
    pub fn trained_tokens(&self) -> usize {
        self.labels.iter().filter(|&&label| label != NO_LABEL).count()
    }
}

/// Says which rows each step takes; knows nothing but their number, so that a run is resumed by its step alone.
#[derive(Debug, Clone)]
pub struct Loader {
    rows: usize,
    seed: u64,
    shuffle: bool,
    batch_size: usize,
    micro_batch_size: usize,
    total_steps: u32,
    /// The order of the epoch that was asked for last.
    order: Option<(u64, Vec<usize>)>,
}

impl Loader {
    /// A loader over that many rows.
    pub fn new(rows: usize, spec: &TrainSpec) -> Self {
        let training = &spec.training;
        let mut loader = Self {
            rows,
            seed: spec.seed,
            shuffle: training.shuffle,
            batch_size: training.batch_size.max(1) as usize,
            micro_batch_size: training.micro_batch_size.max(1) as usize,
            total_steps: 0,
            order: None,
        };
        let all = u64::from(spec.n_epochs) * u64::from(loader.steps_per_epoch());
        loader.total_steps = training.max_steps.unwrap_or(u32::try_from(all).unwrap_or(u32::MAX));
        if rows == 0 {
            loader.total_steps = 0;
        }
        loader
    }

    /// Steps in which every row is taken once; the last of them may be short of rows.
    pub fn steps_per_epoch(&self) -> u32 {
        u32::try_from(self.rows.div_ceil(self.batch_size)).unwrap_or(u32::MAX)
    }

    /// Steps of the whole run: `max_steps`, or the epochs' steps.
    pub fn total_steps(&self) -> u32 {
        self.total_steps
    }

    /// The rows of a step, micro-batch by micro-batch. Steps count from 0: pass the number of steps already done. Depends on
    /// the seed, the number of rows and the step only.
    ///
    /// # Panics
    /// For a loader over no rows, which has no steps.
    pub fn step(&mut self, steps_done: u32) -> Vec<Vec<usize>> {
        assert!(self.rows > 0, "a loader over no rows has no step {steps_done}");
        let epoch = u64::from(steps_done / self.steps_per_epoch());
        let first = (steps_done % self.steps_per_epoch()) as usize * self.batch_size;
        let end = (first + self.batch_size).min(self.rows);
        let micro_batch_size = self.micro_batch_size;
        self.order_of(epoch)[first..end].chunks(micro_batch_size).map(<[usize]>::to_vec).collect()
    }

    fn order_of(&mut self, epoch: u64) -> &[usize] {
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let mut order: Vec<usize> = (0..self.rows).collect();
            if self.shuffle {
                shuffle(&mut order, self.seed, epoch);
            }
            self.order = Some((epoch, order));
        }
        self.order.as_ref().map_or(&[], |(_, order)| order)
    }
}

/// Fisher and Yates' shuffle, written out so that no new version of a crate changes the order of a run that is resumed.
fn shuffle(order: &mut [usize], seed: u64, epoch: u64) {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    key[16..].copy_from_slice(b"lorad row order\0");
    let mut random = ChaCha8Rng::from_seed(key);
    for last in (1..order.len()).rev() {
        // Lemire's reduction to 0..=last; its bias is below rows / 2^64.
        let pick = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64;
        order.swap(last, pick as usize);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn rows() -> impl Strategy<Value = Vec<Row>> {
        let row = prop::collection::vec((0u32..50_000, any::<bool>()), 2..20).prop_map(|tokens| {
            let (tokens, mut trained): (Vec<u32>, Vec<bool>) = tokens.into_iter().unzip();
            trained[0] = false;
            Row { tokens, trained }
        });
        prop::collection::vec(row, 0..8)
    }

    fn spec(seed: u64, batch_size: u32, micro_batch_size: u32, shuffle: bool) -> TrainSpec {
        let mut spec = TrainSpec { seed, ..TrainSpec::default() };
        spec.training.batch_size = batch_size;
        spec.training.micro_batch_size = micro_batch_size;
        spec.training.shuffle = shuffle;
        spec
    }

    proptest! {
        #[test]
        fn packing_keeps_every_token_and_shifts_every_label(rows in rows()) {
            let batch = MicroBatch::pack(&rows);
            let tokens: Vec<u32> = rows.iter().flat_map(|row| row.tokens.clone()).collect();
            prop_assert_eq!(&batch.tokens, &tokens);
            prop_assert_eq!((batch.positions.len(), batch.labels.len()), (tokens.len(), tokens.len()));
            prop_assert_eq!(batch.cu_seqlens.len(), rows.len() + 1);
            prop_assert_eq!(batch.trained_tokens(), rows.iter().map(Row::trained_tokens).sum::<usize>());
            for (row, span) in rows.iter().zip(batch.cu_seqlens.windows(2)) {
                prop_assert_eq!(&batch.tokens[span[0]..span[1]], &row.tokens[..]);
                prop_assert!(batch.positions[span[0]..span[1]].iter().copied().eq(0..row.tokens.len() as u32));
                for t in 0..row.tokens.len() {
                    let next = row.trained.get(t + 1).is_some_and(|&trained| trained);
                    let label = if next { row.tokens[t + 1] as i32 } else { NO_LABEL };
                    prop_assert_eq!(batch.labels[span[0] + t], label);
                }
            }
        }

        #[test]
        fn padding_adds_tokens_that_predict_nothing(rows in rows()) {
            let (packed, padded) = (MicroBatch::pack(&rows), MicroBatch::pad(&rows));
            let longest = rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
            prop_assert_eq!(padded.tokens.len(), longest * rows.len());
            prop_assert_eq!(padded.trained_tokens(), packed.trained_tokens());
            for (index, row) in rows.iter().enumerate() {
                let (at, from, length) = (index * longest, packed.cu_seqlens[index], row.tokens.len());
                prop_assert_eq!(padded.cu_seqlens[index], at);
                prop_assert_eq!(&padded.tokens[at..at + length], &row.tokens[..]);
                prop_assert_eq!(&padded.labels[at..at + length], &packed.labels[from..from + length]);
                prop_assert!(padded.labels[at + length..at + longest].iter().all(|&label| label == NO_LABEL));
            }
        }

        #[test]
        fn an_epoch_takes_every_row_once_and_any_step_can_be_asked_for_first(
            (rows, batch, micro) in (1usize..60, 1u32..10).prop_flat_map(|(n, b)| (Just(n), Just(b), 1..=b)),
            seed: u64,
            shuffle: bool,
        ) {
            let spec = spec(seed, batch, micro, shuffle);
            let mut loader = Loader::new(rows, &spec);
            prop_assert_eq!(loader.total_steps(), 3 * loader.steps_per_epoch());
            let steps: Vec<Vec<Vec<usize>>> = (0..loader.total_steps()).map(|step| loader.step(step)).collect();
            for epoch in steps.chunks(loader.steps_per_epoch() as usize) {
                let taken: Vec<usize> = epoch.iter().flatten().flatten().copied().collect();
                prop_assert_eq!(taken.len(), rows);
                prop_assert_eq!(taken.iter().collect::<HashSet<_>>().len(), rows);
                prop_assert!(shuffle || taken.is_sorted());
            }
            for (step, micro_batches) in steps.iter().enumerate().rev() {
                prop_assert_eq!(&Loader::new(rows, &spec).step(step as u32), micro_batches);
                prop_assert!(micro_batches.iter().all(|rows| (1..=micro as usize).contains(&rows.len())));
                let of_step: usize = micro_batches.iter().map(Vec::len).sum();
                prop_assert_eq!(micro_batches.len(), of_step.div_ceil(micro as usize));
            }
        }
    }

    #[test]
    fn orders_differ_by_seed_and_epoch_and_never_change() {
        let order = |seed, step| Loader::new(8, &spec(seed, 8, 8, true)).step(step).concat();
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        // Fixed for good: a run may be resumed by a later build.
        assert_eq!(order(3407, 0), [3, 2, 6, 5, 1, 4, 7, 0]);
    }

    #[test]
    fn max_steps_is_the_number_of_steps() {
        let mut spec = spec(1, 4, 2, true);
        spec.training.max_steps = Some(7);
        assert_eq!(Loader::new(100, &spec).total_steps(), 7);
        assert_eq!(Loader::new(0, &spec).total_steps(), 0);
    }
}
