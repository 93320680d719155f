//! Every type stays within the error that its levels allow, gives the same bytes on every machine, and refuses what it cannot
//! hold.

use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use super::lanes::with_widest;
use super::*;
use crate::model::weights::Weight;
use crate::testing::normal;

/// Close to normal weights, with an outlier now and then, from a formula that any language can repeat.
fn values(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0
    };
    let mut next = || {
        let sum: f32 = (0..4).map(|_| uniform()).sum();
        let outlier = if uniform() < 0.01 { 8.0 } else { 1.0 };
        (sum - 2.0) * 0.05 * outlier
    };
    (0..count).map(|_| next()).collect()
}

fn there_and_back(dtype: BlockType, columns: usize, values: &[f32]) -> Vec<f32> {
    let stored = quantize(dtype, columns, values).expect("quantized");
    let rows = values.len() / columns;
    let weight = Weight::from_bytes(&stored, dtype, (rows, columns)).expect("the right size");
    let mut out = vec![f32::NAN; values.len()];
    weight.dequantize_rows(0..rows, &mut out).expect("all rows");
    out
}

/// The largest error of a value, in parts of the largest magnitude of its block.
pub(crate) fn tolerance(dtype: BlockType) -> f32 {
    let f16 = 1.0 / 2048.0;
    match dtype {
        BlockType::F32 => 0.0,
        BlockType::F16 => f16,
        BlockType::BF16 => 1.0 / 256.0,
        BlockType::Q8_0 => 0.5 / 127.0 + f16,
        // The level farthest from the extreme is only 7 of 8 steps away.
        BlockType::Q4_0 => 1.0 / 8.0 + f16,
        BlockType::Q5_0 => 1.0 / 16.0 + f16,
        BlockType::Q4_1 => 1.0 / 15.0 + 2.0 * f16,
        BlockType::Q5_1 => 1.0 / 31.0 + 2.0 * f16,
        // Half the widest gap, 24 of 113, and some for the search, which minds the sum of squares alone.
        BlockType::IQ4NL => 0.2,
        BlockType::Q6K => 0.06,
        BlockType::Q5K => 0.12,
        BlockType::Q4K => 0.2,
        BlockType::Q3K => 0.4,
        BlockType::Q2K => 0.9,
    }
}

#[track_caller]
fn assert_close(dtype: BlockType, columns: usize, values: &[f32]) {
    let found = there_and_back(dtype, columns, values);
    let block = dtype.block_values();
    for (index, (values, found)) in values.chunks(block).zip(found.chunks(block)).enumerate() {
        let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let worst = values.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        // 2⁻²³: scales below f16's normal range are stored in steps of 2⁻²⁴, times up to 127.
        let allowed = tolerance(dtype) * largest + if dtype == BlockType::F32 { 0.0 } else { 127.0 / 16_777_216.0 };
        assert!(worst <= allowed, "{dtype:?}, block {index}: {worst} > {allowed}, largest {largest}");
    }
}

#[test]
fn every_type_is_as_close_as_its_levels_allow() {
    let values = values(64 * 512);
    for dtype in BlockType::ALL {
        assert_close(dtype, 512, &values);
        assert_close(dtype, 256, &values[..256]);
    }
}

#[test]
fn special_rows_are_stored_well() {
    for dtype in BlockType::ALL {
        assert_eq!(there_and_back(dtype, 256, &[0.0; 512]), [0.0; 512], "{dtype:?}");
        for value in [1.0f32, -0.375, 2e-3] {
            assert_close(dtype, 256, &[value; 512]);
        }
        let mut single = [0.0; 256];
        single[77] = -1.5;
        assert_close(dtype, 256, &single);
        let mut mostly_zero = values(512);
        mostly_zero[..400].fill(0.0);
        assert_close(dtype, 512, &mostly_zero);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_the_values_they_come_back(seed in any::<u32>(), scale in -1i32..4, blocks in 1usize..5) {
        let mut state = seed;
        let random = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / 8_388_608.0 - 1.0) * 10f32.powi(scale)
        };
        let values: Vec<f32> = (0..256 * blocks).map(random).collect();
        for dtype in BlockType::ALL {
            let found = there_and_back(dtype, 256, &values);
            let largest = 10f32.powi(scale);
            for (value, found) in values.iter().zip(found) {
                let allowed = tolerance(dtype) * largest + 127.0 / 16_777_216.0;
                prop_assert!((value - found).abs() <= allowed, "{dtype:?}: {value} became {found}");
            }
        }
    }
}

#[test]
fn a_block_does_not_depend_on_its_neighbours() {
    let values = values(21 * 256);
    for dtype in BlockType::ALL {
        let together = quantize(dtype, 256, &values).expect("quantized");
        let alone = values.chunks(256).flat_map(|row| quantize(dtype, 256, row).expect("quantized"));
        assert_eq!(together, alone.collect::<Vec<u8>>(), "{dtype:?}");
    }
}

/// The beginning of the SHA-256 of two rows of [`values`] by type, in full agreement with `llama-quantize` (tests/llama_quantize.rs).
const DIGESTS: [(BlockType, &str); 14] = [
    (BlockType::F32, "94dacbe08f582364"),
    (BlockType::F16, "8c56866ad3b9d319"),
    (BlockType::BF16, "5165a6223b4dfae3"),
    (BlockType::Q4_0, "54593fe62f7c4c6e"),
    (BlockType::Q4_1, "f60dcf2e7d24c006"),
    (BlockType::Q5_0, "797ad97e53088fb0"),
    (BlockType::Q5_1, "cbdd206674ec8f48"),
    (BlockType::Q8_0, "a73b7972933c4303"),
    (BlockType::Q2K, "d8967ab6eeda2416"),
    (BlockType::Q3K, "ebb0a7236a00c5de"),
    (BlockType::Q4K, "74e93bbf47fac43c"),
    (BlockType::Q5K, "38681b3dd629e61d"),
    (BlockType::Q6K, "0a8a40ad24e9d2b9"),
    (BlockType::IQ4NL, "a64a0b4c38d3df38"),
];

#[test]
fn bytes_are_the_same_on_every_machine() {
    let values = values(2 * 1024);
    let digest = |dtype| {
        let stored = quantize(dtype, 1024, &values).expect("quantized");
        Sha256::digest(&stored)[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let found = DIGESTS.map(|(dtype, _)| (dtype, digest(dtype)));
    assert_eq!(found, DIGESTS.map(|(dtype, digest)| (dtype, digest.to_owned())));
}

#[test]
fn threads_do_not_change_a_bit() {
    let values = values(40 * 1024 * 4);
    let on = |threads: usize, dtype| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| quantize(dtype, 1024, &values).expect("quantized"))
    };
    for dtype in BlockType::ALL {
        assert_eq!(on(1, dtype), on(3, dtype), "{dtype:?}");
    }
}

fn blocks<'a, R>(dtype: BlockType, values: &'a [f32], out: &'a mut [u8], rounding: R) -> Blocks<'a, R> {
    Blocks { dtype, values, out, limit: f32::MAX, rounding }
}

#[test]
fn the_width_of_registers_does_not_change_a_bit() {
    let values = values(24 * 256);
    for dtype in BlockType::ALL {
        let mut narrow = vec![0; values.len() / dtype.block_values() * dtype.block_bytes()];
        let mut wide = narrow.clone();
        Simd::vectorize(pulp::Scalar::new(), blocks(dtype, &values, &mut narrow, Nearest)).expect("quantized");
        with_widest(blocks(dtype, &values, &mut wide, Nearest)).expect("quantized");
        assert_eq!(narrow, wide, "{dtype:?}");
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            Simd::vectorize(simd, blocks(dtype, &values, &mut narrow, Nearest)).expect("quantized");
            assert_eq!(narrow, wide, "{dtype:?}");
        }
    }
}

/// A (rank, columns) and B A (rows, columns), whose values have that deviation.
fn lora(rank: usize, (rows, columns): (usize, usize), deviation: f32) -> (Vec<f32>, Vec<f32>) {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut some = |count: usize| -> Vec<f32> { (0..count).map(|_| normal(&mut random)).collect() };
    let (a, mut b) = (some(rank * columns), some(rows * rank));
    b.iter_mut().for_each(|b| *b *= deviation / (rank as f32).sqrt());
    let delta = |row: usize, column: usize| -> f32 {
        (0..rank).map(|k| b[row * rank + k] * a[k * columns + column]).sum::<f32>()
    };
    let delta = (0..rows * columns).map(|at| delta(at / columns, at % columns)).collect();
    (a, delta)
}

fn merged(dtype: BlockType, columns: usize, values: &[f32], a: &[f32]) -> Vec<f32> {
    let mut stored = vec![0; values.len() / dtype.block_values() * dtype.block_bytes()];
    quantize_merged(dtype, values, &mut stored, &Directions::new(a, columns)).expect("quantized");
    let (rows, mut out) = (values.len() / columns, vec![f32::NAN; values.len()]);
    let weight = Weight::from_bytes(&stored, dtype, (rows, columns)).expect("the right size");
    weight.dequantize_rows(0..rows, &mut out).expect("all rows");
    out
}

fn norm(values: impl IntoIterator<Item = f32>) -> f32 {
    values.into_iter().map(|value| value * value).sum::<f32>().sqrt()
}

fn minus(x: &[f32], y: &[f32]) -> Vec<f32> {
    x.iter().zip(y).map(|(x, y)| x - y).collect()
}

/// The norm of A e of all rows.
fn seen(a: &[f32], columns: usize, errors: &[f32]) -> f32 {
    let dot = |a: &[f32], e: &[f32]| a.iter().zip(e).map(|(a, e)| a * e).sum::<f32>();
    norm(errors.chunks(columns).flat_map(|e| a.chunks(columns).map(move |a| dot(a, e))))
}

#[test]
fn what_a_lora_changes_survives_in_levels_that_the_weights_had_before() {
    const COLUMNS: usize = 2048;
    let original = values(16 * COLUMNS);
    for dtype in BlockType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
        let base = there_and_back(dtype, COLUMNS, &original);
        let usual = norm(minus(&base, &original));
        // About a seventh of the distance of two levels.
        let deviation = usual / (original.len() as f32).sqrt() / 2.0;
        for rank in [1, 5, 16] {
            let (a, delta) = lora(rank, (16, COLUMNS), deviation);
            let target: Vec<f32> = base.iter().zip(&delta).map(|(base, delta)| base + delta).collect();
            let of = |found: &[f32]| {
                let errors = minus(found, &target);
                (seen(&a, COLUMNS, &errors) / seen(&a, COLUMNS, &delta), norm(errors) / usual)
            };
            let (nearest, _) = of(&there_and_back(dtype, COLUMNS, &target));
            let (seen, own) = of(&merged(dtype, COLUMNS, &target, &a));
            assert!(
                seen < 0.1 && seen < nearest / 5.0,
                "{dtype:?}, rank {rank}: {seen} of it is lost, {nearest} by rounding"
            );
            assert!(own < 1.0, "{dtype:?}, rank {rank}: errors {own} times those of a base");
        }
    }
}

#[test]
fn without_a_direction_levels_are_the_nearest() {
    let mut values = values(6 * 512);
    values[512..1024].fill(0.0);
    for dtype in BlockType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
        let found = merged(dtype, 512, &values, &[0.0; 3 * 512]);
        assert_eq!(found, there_and_back(dtype, 512, &values), "{dtype:?}");
    }
}

#[test]
fn the_width_of_registers_does_not_change_a_merged_bit() {
    let values = values(24 * 512);
    let (a, _) = lora(9, (24, 512), 0.01);
    let directions = Directions::new(&a, 512);
    for dtype in BlockType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
        let mut narrow = vec![0; values.len() / dtype.block_values() * dtype.block_bytes()];
        let mut wide = narrow.clone();
        let mut measuring = Measuring::new(&directions);
        let scalar = pulp::Scalar::new();
        Simd::vectorize(scalar, blocks(dtype, &values, &mut narrow, &mut measuring)).expect("quantized");
        Simd::vectorize(scalar, blocks(dtype, &values, &mut narrow, measuring.compensating())).expect("quantized");
        quantize_merged(dtype, &values, &mut wide, &directions).expect("quantized");
        assert_eq!(narrow, wide, "{dtype:?}");
    }
}

#[test]
fn what_cannot_be_stored_is_named() {
    let mut values = values(4 * 256);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        values[700] = bad;
        for dtype in BlockType::ALL {
            let error = quantize(dtype, 256, &values).expect_err("not finite").to_string();
            let name = dtype.name();
            assert_eq!(error, format!("invalid model: the value {bad} in row 2 cannot be stored as {name}"));
        }
    }
    values[700] = 65_520.0;
    assert!(quantize(BlockType::F16, 256, &values).is_err(), "rounds to infinity");
    values[700] = 65_519.0;
    assert_eq!(there_and_back(BlockType::F16, 256, &values)[700], 65_504.0);
    // The scale of Q4_0 is an eighth of the extreme and must fit an f16.
    values[700] = 6e5;
    let error = quantize(BlockType::Q4_0, 256, &values).expect_err("too large").to_string();
    assert!(error.contains("the value 600000 in row 2"), "{error}");
    assert!(quantize(BlockType::Q8_0, 256, &values).is_ok());
    for (dtype, columns, count) in [(BlockType::Q8_0, 33, 33), (BlockType::Q4K, 32, 32), (BlockType::F32, 2, 3)] {
        assert!(quantize(dtype, columns, &vec![0.0; count]).is_err());
    }
}
