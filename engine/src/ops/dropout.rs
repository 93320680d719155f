//! Dropout by a counter: whether an element is dropped depends on its place and a key alone, so backward computes the mask again.
//!
//! Forward: y = mask · x / (1 − p). Backward: dx = mask · dy / (1 − p), the same function. mask(row, column) is 0 with probability p.
//! Bits: h = mix(mix(key + (row + 1) γ) + (⌊column / 2⌋ + 1) γ), of which an even column takes the low 32 bits and an odd one the
//! high; the element is dropped where they are below p · 2³². γ and mix are SplitMix64's increment and finalizer.
//! Shapes: x, y (rows, columns), any number of them at a time. Storage f32.
//! Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014.

use rayon::prelude::*;

use crate::ops::ROWS_PER_TASK;

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Which elements are dropped, and what the others are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Elements whose 32 bits are below this are dropped.
    pub(super) threshold: u32,
    /// 1 / (1 − p).
    pub(super) scale: f32,
    pub(super) key: u64,
}

impl Dropout {
    /// Drops a share `p` in [0, 1) of the elements; `None` for 0. Different `places` (seed, step …) give unrelated masks.
    pub fn new(p: f64, places: &[u64]) -> Option<Self> {
        debug_assert!((0.0..1.0).contains(&p), "p must be in [0, 1), got `{p}`");
        let all = Self { threshold: (p * 4_294_967_296.0) as u32, scale: (1.0 / (1.0 - p)) as f32, key: 0 };
        (p > 0.0).then(|| places.iter().fold(all, |dropout, &place| dropout.at(place)))
    }

    /// The dropout of one place (a layer, a projection) among those that share this one.
    #[must_use]
    pub fn at(self, place: u64) -> Self {
        Self { key: mix(self.key ^ mix(place.wrapping_add(GAMMA))), ..self }
    }

    fn mask_row(&self, row: usize, values: &mut [f32]) {
        let row_key = mix(self.key.wrapping_add((row as u64 + 1).wrapping_mul(GAMMA)));
        let mut counter = row_key;
        let factor = |bits: u32| if bits < self.threshold { 0.0 } else { self.scale };
        for pair in values.chunks_mut(2) {
            counter = counter.wrapping_add(GAMMA);
            let bits = mix(counter);
            pair[0] *= factor(bits as u32);
            if let Some(odd) = pair.get_mut(1) {
                *odd *= factor((bits >> 32) as u32);
            }
        }
    }
}

/// Sets `out` to mask · x / (1 − p). The values are whole rows of `columns`, the first of them row `first_row` of its tensor.
pub fn apply(x: &[f32], out: &mut [f32], first_row: usize, columns: usize, dropout: &Dropout) {
    assert_eq!(x.len(), out.len(), "dropout: sizes differ");
    out.copy_from_slice(x);
    apply_in_place(out, first_row, columns, dropout);
}

/// Sets `x` to mask · x / (1 − p); rows as in [`apply`].
pub fn apply_in_place(x: &mut [f32], first_row: usize, columns: usize, dropout: &Dropout) {
    assert!(columns > 0 && x.len().is_multiple_of(columns), "dropout: {} values in rows of {columns}", x.len());
    x.par_chunks_mut(columns * ROWS_PER_TASK).enumerate().for_each(|(task, rows)| {
        for (row, values) in rows.chunks_exact_mut(columns).enumerate() {
            dropout.mask_row(first_row + task * ROWS_PER_TASK + row, values);
        }
    });
}

fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(dropout: &Dropout, rows: usize, columns: usize) -> Vec<f32> {
        let mut out = vec![0f32; rows * columns];
        apply(&vec![1.0; rows * columns], &mut out, 0, columns, dropout);
        out
    }

    #[test]
    fn a_share_p_is_dropped_and_the_mean_stays() {
        for p in [0.05, 0.1, 0.5, 0.9] {
            let (rows, columns) = (300, 577);
            let values = mask(&Dropout::new(p, &[3407, 1]).unwrap(), rows, columns);
            let count = values.len() as f64;
            let dropped = values.iter().filter(|&&value| value == 0.0).count() as f64 / count;
            // Five standard deviations.
            assert!((dropped - p).abs() < 5.0 * (p * (1.0 - p) / count).sqrt(), "{p}: {dropped}");
            let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
            assert!((mean - 1.0).abs() < 5.0 * (p / (1.0 - p) / count).sqrt(), "{p}: {mean}");
            let scale = (1.0 / (1.0 - p)) as f32;
            assert!(values.iter().all(|&value| value == 0.0 || value == scale));
            // No row and no column is out of line.
            let all = |index: usize, stride: usize, of: usize| {
                (0..of).filter(|at| values[index + at * stride] == 0.0).count() as f64 / of as f64
            };
            assert!((0..columns).all(|column| (all(column, columns, rows) - p).abs() < 0.2));
            assert!((0..rows).all(|row| (all(row * columns, 1, columns) - p).abs() < 0.15));
        }
        assert_eq!(Dropout::new(0.0, &[1]), None);
    }

    #[test]
    fn an_element_depends_on_its_place_and_key_alone() {
        let dropout = Dropout::new(0.3, &[3407, 5, 0]).unwrap();
        let (rows, columns) = (40, 33);
        let whole = mask(&dropout, rows, columns);
        assert_eq!(whole, mask(&dropout, rows, columns));
        for first in [1, 17, 39] {
            let mut part = vec![1f32; (rows - first) * columns];
            apply_in_place(&mut part, first, columns, &dropout);
            assert_eq!(part, whole[first * columns..]);
        }
        // Fixed for good: a run may be resumed by a later build.
        let kept: Vec<usize> = (0..16).filter(|&column| whole[column] != 0.0).collect();
        assert_eq!(kept, [1, 5, 6, 9, 10, 12, 13, 14, 15]);
    }

    #[test]
    fn other_places_have_unrelated_masks() {
        let one = mask(&Dropout::new(0.5, &[3407, 5]).unwrap(), 50, 64);
        for places in [&[3407, 6][..], &[5, 3407], &[3407, 5, 0], &[3408, 5], &[3407]] {
            let other = mask(&Dropout::new(0.5, places).unwrap(), 50, 64);
            let same = one.iter().zip(&other).filter(|(a, b)| a == b).count() as f64 / 3200.0;
            assert!((same - 0.5).abs() < 0.05, "{places:?}: {same}");
        }
    }
}
