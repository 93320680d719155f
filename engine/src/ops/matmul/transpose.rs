//! Rows into lanes: transposed, scaled and converted, or copied beside each other, with the widest registers there are.

use super::Compute;
use super::kernel::VECTOR;

/// # Panics
/// For bf16 on a processor without its instructions.
pub(super) fn check_bf16(compute: Compute) {
    assert!(compute == Compute::F32 || Compute::bf16().is_some(), "this processor has no products of bf16");
}

/// A row's values, and 0 behind them.
pub(super) fn copy_row(row: &[f32], lanes: &mut [u32]) {
    #[cfg(target_arch = "x86_64")]
    if super::kernel::level() >= super::kernel::Level::Avx512 {
        return avx512::copy_row(row, lanes);
    }
    for (lane, value) in lanes.iter_mut().zip(row) {
        *lane = value.to_bits();
    }
    lanes[row.len()..].fill(0);
}

/// `lanes[k · step + row] = scale · rows[row][k]`, 0 for rows that are not there; writes 16 lanes at each k.
pub(super) fn transpose(
    rows: &[&[f32]; VECTOR],
    k: usize,
    scale: f32,
    compute: Compute,
    lanes: &mut [u32],
    step: usize,
) {
    if k == 0 {
        return;
    }
    assert!(lanes.len() >= (compute.lanes(k) - 1) * step + VECTOR, "no room for the last vector");
    #[cfg(target_arch = "x86_64")]
    if super::kernel::level() >= super::kernel::Level::Avx512 {
        return avx512::transpose(rows, k, scale, compute, lanes, step);
    }
    debug_assert_eq!(compute, Compute::F32, "bf16 needs AVX-512");
    #[cfg(target_arch = "x86_64")]
    if super::kernel::level() >= super::kernel::Level::Avx2 {
        return avx2::transpose(rows, k, scale, lanes, step);
    }
    for (k, lanes) in lanes.chunks_mut(step).enumerate().take(k) {
        for (lane, row) in lanes.iter_mut().zip(rows) {
            *lane = row.get(k).map_or(0, |value| (scale * value).to_bits());
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{Compute, VECTOR};

    /// As `super::transpose`, which checked the room for it.
    pub(super) fn transpose(
        rows: &[&[f32]; VECTOR],
        k: usize,
        scale: f32,
        compute: Compute,
        lanes: &mut [u32],
        step: usize,
    ) {
        assert!(rows.iter().all(|row| row.is_empty() || row.len() >= k), "a row is too short");
        super::check_bf16(compute);
        // SAFETY: the processor has AVX-512 (and bf16 where `compute` asks for it: checked above); the
        // rows have k values or none, the lanes have room for the last vector.
        unsafe {
            match compute {
                Compute::F32 => f32_lanes(rows, k, scale, lanes.as_mut_ptr(), step),
                Compute::Bf16 => bf16_lanes(rows, k, scale, lanes.as_mut_ptr(), step),
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn f32_lanes(rows: &[&[f32]; VECTOR], k: usize, scale: f32, lanes: *mut u32, step: usize) {
        for first in (0..k).step_by(VECTOR) {
            let count = VECTOR.min(k - first);
            let mut block = [_mm512_setzero_si512(); VECTOR];
            for (vector, row) in block.iter_mut().zip(rows).filter(|(_, row)| !row.is_empty()) {
                // SAFETY: the row has k values.
                *vector = _mm512_castps_si512(unsafe { load(row.as_ptr().add(first), count, scale) });
            }
            // SAFETY: see `transpose`.
            unsafe { store(block, lanes.add(first * step), step, count) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn bf16_lanes(rows: &[&[f32]; VECTOR], k: usize, scale: f32, lanes: *mut u32, step: usize) {
        for first in (0..k).step_by(2 * VECTOR) {
            let count = (2 * VECTOR).min(k - first);
            let mut block = [_mm512_setzero_si512(); VECTOR];
            for (vector, row) in block.iter_mut().zip(rows).filter(|(_, row)| !row.is_empty()) {
                // SAFETY: the row has k values.
                unsafe {
                    let at = row.as_ptr().add(first);
                    let low = load(at, count.min(VECTOR), scale);
                    let high = load(at.wrapping_add(VECTOR), count.saturating_sub(VECTOR), scale);
                    *vector = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                }
            }
            // SAFETY: see `transpose`.
            unsafe { store(block, lanes.add(first / 2 * step), step, count.div_ceil(2)) };
        }
    }

    /// scale times the first `count` values, 0 behind them.
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const f32, count: usize, scale: f32) -> __m512 {
        // SAFETY: masked elements are not read; the caller has `count` values.
        _mm512_mul_ps(unsafe { _mm512_maskz_loadu_ps(mask(count), from) }, _mm512_set1_ps(scale))
    }

    /// Stores the columns of a 16 × 16 block, the first `count` of them, one vector every `step` lanes.
    #[target_feature(enable = "avx512f")]
    unsafe fn store(rows: [__m512i; VECTOR], lanes: *mut u32, step: usize, count: usize) {
        // Pairs of rows, then fours, then eights and all sixteen: after each stage a vector holds that many rows' lanes.
        let mut pairs = rows;
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        let mut fours = pairs;
        for i in 0..4 {
            for half in 0..2 {
                let (low, high) = (pairs[4 * i + half], pairs[4 * i + 2 + half]);
                fours[4 * i + 2 * half] = _mm512_unpacklo_epi64(low, high);
                fours[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(low, high);
            }
        }
        // fours[4 i + j] holds, in its four quarters q, column 4 q + j of rows 4 i to 4 i + 3.
        let mut columns = fours;
        for j in 0..4 {
            let even = |a, b| _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
            let odd = |a, b| _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
            let (a, b, c, d) = (fours[j], fours[4 + j], fours[8 + j], fours[12 + j]);
            let (ab_even, ab_odd, cd_even, cd_odd) = (even(a, b), odd(a, b), even(c, d), odd(c, d));
            columns[j] = even(ab_even, cd_even);
            columns[8 + j] = odd(ab_even, cd_even);
            columns[4 + j] = even(ab_odd, cd_odd);
            columns[12 + j] = odd(ab_odd, cd_odd);
        }
        for (k, column) in columns.iter().enumerate().take(count) {
            // SAFETY: the caller has room for a vector at each of `count` steps.
            unsafe { _mm512_storeu_si512(lanes.add(k * step).cast(), *column) };
        }
    }

    /// As `super::copy_row`.
    pub(super) fn copy_row(row: &[f32], lanes: &mut [u32]) {
        for (at, lanes) in lanes.chunks_exact_mut(VECTOR).enumerate() {
            let rest = row.get(at * VECTOR..).unwrap_or_default();
            // SAFETY: the processor has AVX-512; no more values are read than there are, sixteen lanes are written.
            unsafe { copy(rest.as_ptr(), rest.len().min(VECTOR), lanes.as_mut_ptr()) };
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn copy(from: *const f32, count: usize, to: *mut u32) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(to.cast(), _mm512_maskz_loadu_ps(mask(count), from)) };
    }

    /// The first `count` of sixteen.
    fn mask(count: usize) -> __mmask16 {
        (((1u32 << count) - 1) & 0xffff) as __mmask16
    }

    /// Pairs `(low[c], high[c])` as bf16 for each c, 0 behind the last; no `high` is zeros.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn pair_rows(low: &[f32], high: &[f32], lanes: &mut [u32]) {
        for (at, lanes) in lanes.chunks_exact_mut(VECTOR).enumerate() {
            let part = |row: &[f32]| {
                let rest = row.get(at * VECTOR..).unwrap_or_default();
                // SAFETY: no more values than there are.
                unsafe { load(rest.as_ptr(), rest.len().min(VECTOR), 1.0) }
            };
            let widen = |x: __m512| {
                // SAFETY: both are 32 bytes without invalid values.
                let narrow = unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)) };
                _mm512_cvtepu16_epi32(narrow)
            };
            let both = _mm512_or_si512(_mm512_slli_epi32::<16>(widen(part(high))), widen(part(low)));
            // SAFETY: sixteen lanes.
            unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), both) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::VECTOR;

    const SIDE: usize = 8;

    /// As `super::transpose` for f32, which checked the room for it.
    pub(super) fn transpose(rows: &[&[f32]; VECTOR], k: usize, scale: f32, lanes: &mut [u32], step: usize) {
        assert!(rows.iter().all(|row| row.is_empty() || row.len() >= k), "a row is too short");
        let (halves, _) = rows.as_chunks::<SIDE>();
        for first in (0..k).step_by(SIDE) {
            let count = SIDE.min(k - first);
            // SAFETY: the processor has AVX2.
            let (low, high) =
                unsafe { (block(&halves[0], first, count, scale), block(&halves[1], first, count, scale)) };
            // One k after the other: where `step` is less than a vector, the next one overwrites what was too much.
            for (k, (low, high)) in low.into_iter().zip(high).enumerate().take(count) {
                let lanes = &mut lanes[(first + k) * step..][..VECTOR];
                // SAFETY: sixteen lanes.
                unsafe {
                    _mm256_storeu_ps(lanes.as_mut_ptr().cast(), low);
                    _mm256_storeu_ps(lanes.as_mut_ptr().add(SIDE).cast(), high);
                }
            }
        }
    }

    /// Values `first..first + count` of eight rows, times scale: the vector at k has every row's.
    #[target_feature(enable = "avx2")]
    unsafe fn block(rows: &[&[f32]; SIDE], first: usize, count: usize, scale: f32) -> [__m256; SIDE] {
        let mut block = [_mm256_setzero_ps(); SIDE];
        for (vector, row) in block.iter_mut().zip(rows).filter(|(_, row)| !row.is_empty()) {
            let mut values = [0f32; SIDE];
            values[..count].copy_from_slice(&row[first..first + count]);
            // SAFETY: eight values.
            *vector = _mm256_mul_ps(unsafe { _mm256_loadu_ps(values.as_ptr()) }, _mm256_set1_ps(scale));
        }
        let mut pairs = block;
        for i in 0..4 {
            pairs[2 * i] = _mm256_unpacklo_ps(block[2 * i], block[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(block[2 * i], block[2 * i + 1]);
        }
        // fours[4 i + j] holds, in each half h, column 4 h + j of rows 4 i to 4 i + 3.
        let mut fours = pairs;
        for i in 0..2 {
            for j in 0..2 {
                let (low, high) = (pairs[4 * i + j], pairs[4 * i + 2 + j]);
                fours[4 * i + 2 * j] = _mm256_shuffle_ps::<0b01_00_01_00>(low, high);
                fours[4 * i + 2 * j + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(low, high);
            }
        }
        let mut columns = fours;
        for j in 0..4 {
            columns[j] = _mm256_permute2f128_ps::<0x20>(fours[j], fours[4 + j]);
            columns[4 + j] = _mm256_permute2f128_ps::<0x31>(fours[j], fours[4 + j]);
        }
        columns
    }
}

pub(super) mod bf16 {
    /// Pairs of two rows' values.
    #[cfg(target_arch = "x86_64")]
    pub(in super::super) fn pair_rows(low: &[f32], high: &[f32], lanes: &mut [u32]) {
        super::check_bf16(super::Compute::Bf16);
        // SAFETY: the processor has the instructions, as was just checked.
        unsafe { super::avx512::pair_rows(low, high, lanes) }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(in super::super) fn pair_rows(_: &[f32], _: &[f32], _: &mut [u32]) {
        super::check_bf16(super::Compute::Bf16);
    }
}
