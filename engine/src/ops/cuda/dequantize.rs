//! Dequantization of stored blocks on a GPU, whole matrices and single rows.

use super::flat::of_type;
use super::launch::Argument;
use super::weights::{DeviceWeight, Stored, StoredAbsmax};
use super::{Buffer, Dtype, Gpu, Mat};
use crate::Result;
use crate::quant::BlockType;

/// Values that a block of threads writes, and its threads; kernels/dequantize.cuh names them too.
const CHUNK: usize = 4096;
const THREADS: u32 = 256;

/// Matrices that one launch takes at most; kernels/dequantize_nf4.cu names it too.
const MAX_MATRICES: usize = 3;

/// kernels/dequantize_nf4.cu holds the same struct.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Nf4Matrix {
    out: u64,
    out_stride: i64,
    packed: u64,
    codes: u64,
    map: u64,
    nested: u64,
    offset: f32,
    rows: i32,
    columns: i32,
    first_chunk: i32,
}

/// kernels/dequantize_nf4.cu holds the same struct.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Nf4Group {
    matrices: [Nf4Matrix; MAX_MATRICES],
    count: i32,
}

// SAFETY: `repr(C)`, as the kernels have it.
unsafe impl Argument for Nf4Group {}

/// Weights as values, each in its own place; in one launch where all are NF4 with double quantization.
pub(crate) fn dequantize_all(gpu: &Gpu, weights: &[(&DeviceWeight, Mat<'_>)]) -> Result<()> {
    let mut group = Nf4Group::default();
    let mut chunks = 0;
    for (place, (weight, out)) in weights.iter().enumerate() {
        let Stored::Nf4 { packed, absmax: StoredAbsmax::Double { codes, map, nested, offset } } = &weight.stored else {
            return weights.iter().try_for_each(|(weight, out)| dequantize(gpu, weight, *out));
        };
        let (rows, columns) = (weight.rows, weight.columns);
        assert!(out.shape() == (rows, columns) && out.dtype == weights[0].1.dtype, "dequantize: {out:?}");
        group.matrices[place] = Nf4Matrix {
            out: out.pointer,
            out_stride: out.stride as i64,
            packed: packed.at(0),
            codes: codes.at(0),
            map: map.at(0),
            nested: nested.at(0),
            offset: *offset,
            rows: rows as i32,
            columns: columns as i32,
            first_chunk: chunks as i32,
        };
        chunks += (rows * columns).div_ceil(CHUNK);
    }
    let Some((_, first)) = weights.first() else { return Ok(()) };
    group.count = weights.len() as i32;
    let name = of_type(first.dtype, "dequantize_nf4_group_bf16", "dequantize_nf4_group_f32");
    let chunks = i32::try_from(chunks).expect("a group has fewer than 2^43 values") as u32;
    // SAFETY: the shapes were checked; the buffers hold matrices of those shapes.
    unsafe { gpu.launch(name)?.grid(chunks, THREADS).arg(&group).run() }
}

/// The weight (rows, columns) as values.
pub(crate) fn dequantize(gpu: &Gpu, weight: &DeviceWeight, out: Mat<'_>) -> Result<()> {
    let (rows, columns) = (weight.rows, weight.columns);
    assert_eq!(out.shape(), (rows, columns), "dequantize: another shape");
    let blocks = u32::try_from((rows * columns).div_ceil(CHUNK)).expect("a weight has fewer than 2^44 values");
    match &weight.stored {
        Stored::Blocks { dtype, blocks: stored } => {
            let launch = gpu.launch(whole(*dtype, out.dtype))?.grid(blocks, THREADS).mat(out).long(stored.at(0));
            // SAFETY: the shape was checked; the buffer holds the blocks of that shape.
            unsafe { launch.int(rows).int(columns).run() }
        }
        Stored::Nf4 { packed, absmax: StoredAbsmax::Single(factors) } => {
            let name = of_type(out.dtype, "dequantize_nf4_bf16", "dequantize_nf4_f32");
            let launch = gpu.launch(name)?.grid(blocks, THREADS).mat(out).long(packed.at(0)).long(factors.at(0));
            // SAFETY: as above.
            unsafe { launch.int(rows).int(columns).run() }
        }
        Stored::Nf4 { packed, absmax: StoredAbsmax::Double { codes, map, nested, offset } } => {
            let name = of_type(out.dtype, "dequantize_nf4_double_bf16", "dequantize_nf4_double_f32");
            let launch = gpu.launch(name)?.grid(blocks, THREADS).mat(out).long(packed.at(0)).long(codes.at(0));
            let launch = launch.long(map.at(0)).long(nested.at(0)).float(*offset);
            // SAFETY: as above.
            unsafe { launch.int(rows).int(columns).run() }
        }
    }
}

/// Rows of an embedding table, one for every token (i32).
pub(crate) fn embed(gpu: &Gpu, table: &DeviceWeight, tokens: &Buffer, out: Mat<'_>) -> Result<()> {
    let Stored::Blocks { dtype, blocks } = &table.stored else {
        return Err(crate::Error::Device("an embedding table in NF4 is not supported".to_owned()));
    };
    assert!(out.columns == table.columns && tokens.bytes() >= 4 * out.rows, "embed: {out:?}");
    let chunks = out.columns.div_ceil(CHUNK) as u32;
    let launch = gpu.launch(single(*dtype, out.dtype))?.grid_3d((out.rows as u32, chunks, 1), THREADS);
    let launch = launch.mat(out).long(blocks.at(0)).long(tokens.at(0));
    // SAFETY: the shape was checked; the caller knows the tokens to be rows of the table.
    unsafe { launch.int(out.rows).int(out.columns).run() }
}

macro_rules! names {
    ($prefix:literal, $stored:expr, $dtype:expr, $($variant:ident $name:literal),*) => {
        match ($stored, $dtype) {
            $((BlockType::$variant, Dtype::Bf16) => concat!($prefix, $name, "_bf16"),
              (BlockType::$variant, Dtype::F32) => concat!($prefix, $name, "_f32"),)*
        }
    };
}

fn whole(stored: BlockType, dtype: Dtype) -> &'static str {
    names!("dequantize_", stored, dtype, F32 "f32", F16 "f16", BF16 "bf16", Q4_0 "q4_0", Q4_1 "q4_1", Q5_0 "q5_0", Q5_1 "q5_1",
        Q8_0 "q8_0", Q2K "q2_k", Q3K "q3_k", Q4K "q4_k", Q5K "q5_k", Q6K "q6_k", IQ4NL "iq4_nl")
}

fn single(stored: BlockType, dtype: Dtype) -> &'static str {
    names!("dequantize_rows_", stored, dtype, F32 "f32", F16 "f16", BF16 "bf16", Q4_0 "q4_0", Q4_1 "q4_1", Q5_0 "q5_0",
        Q5_1 "q5_1", Q8_0 "q8_0", Q2K "q2_k", Q3K "q3_k", Q4K "q4_k", Q5K "q5_k", Q6K "q6_k", IQ4NL "iq4_nl")
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::super::testing::{Held, gpu, random, rounded};
    use super::*;
    use crate::model::weights::Weight;
    use crate::quant::{Absmax, Nf4, quantize};

    const DTYPES: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];

    #[test]
    fn every_type_is_dequantized_as_on_the_cpu() {
        let Some(gpu) = gpu() else { return };
        for stored_type in BlockType::ALL {
            let block = stored_type.block_values();
            let widths = if block == 1 { vec![1, 173, 4104] } else { vec![block, 3 * block, 17 * 256] };
            for (rows, columns) in
                [1, 7, 33].into_iter().flat_map(|rows| widths.iter().map(move |&columns| (rows, columns)))
            {
                let bytes = quantize(stored_type, columns, &random(1, rows * columns)).unwrap();
                let weight = Weight::from_bytes(&bytes, stored_type, (rows, columns)).unwrap();
                let mut expected = vec![0f32; rows * columns];
                weight.dequantize_rows(0..rows, &mut expected).unwrap();
                let stored = Stored::Blocks { dtype: stored_type, blocks: Buffer::of(&gpu, &bytes).unwrap() };
                let on_device = DeviceWeight { stored, rows, columns };
                let tokens: Vec<i32> = (0..19).map(|token| token * 5 % rows as i32).collect();
                let looked_up: Vec<f32> = tokens
                    .iter()
                    .flat_map(|&token| &expected[token as usize * columns..][..columns])
                    .copied()
                    .collect();
                let tokens_on_device = Buffer::of(&gpu, &tokens).unwrap();
                for dtype in DTYPES {
                    let stride = columns.next_multiple_of(8) + 16;
                    let out = Held::poisoned(&gpu, (rows, columns), stride, dtype);
                    dequantize(&gpu, &on_device, out.mat()).unwrap();
                    assert_eq!(
                        out.values(),
                        rounded(&expected, dtype),
                        "{stored_type:?} {rows} × {columns} to {dtype:?}"
                    );
                    let out = Held::poisoned(&gpu, (tokens.len(), columns), stride, dtype);
                    embed(&gpu, &on_device, &tokens_on_device, out.mat()).unwrap();
                    assert_eq!(out.values(), rounded(&looked_up, dtype), "rows of {stored_type:?}, {columns} wide");
                }
            }
        }
    }

    fn on_device(gpu: &Rc<Gpu>, matrix: &Nf4) -> DeviceWeight {
        let f32s = |values: &[f32]| Buffer::of(gpu, values).unwrap();
        let bytes = |values: &[u8]| Buffer::of(gpu, values).unwrap();
        let absmax = match matrix.absmax() {
            Absmax::Single(factors) => StoredAbsmax::Single(f32s(factors)),
            Absmax::Double { codes, map, nested, offset } => {
                StoredAbsmax::Double { codes: bytes(codes), map: f32s(map), nested: f32s(nested), offset: *offset }
            }
        };
        let stored = Stored::Nf4 { packed: bytes(matrix.packed()), absmax };
        DeviceWeight { stored, rows: matrix.rows(), columns: matrix.columns() }
    }

    #[test]
    fn nf4_is_dequantized_as_on_the_cpu() {
        let Some(gpu) = gpu() else { return };
        let shapes = [(1, 1), (1, 64), (64, 172), (7, 33), (300, 1024)];
        for ((rows, columns), double) in shapes.into_iter().flat_map(|shape| [(shape, false), (shape, true)]) {
            let matrix = Nf4::quantize(&random(2, rows * columns), (rows, columns), double).unwrap();
            let mut expected = vec![0f32; rows * columns];
            matrix.dequantize_rows(0..rows, &mut expected).unwrap();
            let weight = on_device(&gpu, &matrix);
            for dtype in DTYPES {
                let name = format!("{rows} × {columns} to {dtype:?}, double: {double}");
                let out = Held::poisoned(&gpu, (rows, columns), columns.next_multiple_of(8) + 8, dtype);
                dequantize(&gpu, &weight, out.mat()).unwrap();
                assert_eq!(out.values(), rounded(&expected, dtype), "{name}");
                let out = [(); 3].map(|()| Held::poisoned(&gpu, (rows, columns), columns.next_multiple_of(8), dtype));
                dequantize_all(&gpu, &out.each_ref().map(|out| (&weight, out.mat()))).unwrap();
                for out in out {
                    assert_eq!(out.values(), rounded(&expected, dtype), "one of three, {name}");
                }
            }
        }
    }
}
