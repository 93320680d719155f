//! The innermost loops of a product: one tile of the output, up to 12 rows by 32 columns, held in registers over the whole depth.
//!
//! `C[r][c] (+)= alpha · Σ_k A[k][r] · B[k][c]`. A *lane* is 32 bits: one f32, or two bf16 of neighbouring k (the even one in the
//! low half). A is read at `a + k · a_step + r` and repeated over a vector, B at `b + k · b_step + c` sixteen lanes at a time, so
//! both may be packed panels or lie where their matrix lies. Accumulation is f32 in the order of k, whatever the tile.
//!
//! Three levels, chosen once a process: AVX-512, AVX2 with FMA, and plain code. On Zen 4 a core reaches 112 of its 118 GFLOP/s
//! in f32 and 225 in bf16 (`vdpbf16ps`), measured on the shapes of a 135M model.

use std::sync::LazyLock;

/// Most rows of a tile.
pub(super) const ROWS: usize = 12;
/// Columns of one vector.
pub(super) const VECTOR: usize = 16;
/// Most columns of a tile.
pub(crate) const COLUMNS: usize = 2 * VECTOR;

/// What the processor can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Plain,
    Avx2,
    Avx512,
    /// AVX-512 with products of bf16.
    Avx512Bf16,
}

/// What this processor can do.
pub(super) fn level() -> Level {
    static LEVEL: LazyLock<Level> = LazyLock::new(detect);
    *LEVEL
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx512 = std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl");
    if avx512 && std::is_x86_feature_detected!("avx512bf16") {
        Level::Avx512Bf16
    } else if avx512 {
        Level::Avx512
    } else if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        Level::Avx2
    } else {
        Level::Plain
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Plain
}

/// The function of that many rows and vectors, made for each size so that a tile's sums stay in registers.
macro_rules! sizes {
    ($function:ident, $rows:expr, $vectors:expr) => {
        sizes!(@match $function, $rows, $vectors, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    (@match $function:ident, $rows:expr, $vectors:expr, $($size:literal)*) => {
        match ($rows, $vectors) {
            $(($size, 1) => $function::<$size, 1> as Run, ($size, 2) => $function::<$size, 2> as Run,)*
            (rows, vectors) => panic!("no tile of {rows} rows and {vectors} vectors"),
        }
    };
}

/// One tile: where its operands begin, how far it is from k to k, and what becomes of the sums.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    /// Lanes of k.
    pub(super) depth: usize,
    pub(super) a: *const u32,
    pub(super) a_step: usize,
    pub(super) b: *const u32,
    pub(super) b_step: usize,
    pub(super) c: *mut f32,
    /// Values from row to row of C.
    pub(super) c_step: usize,
    pub(super) alpha: f32,
    /// Add to what stands in C.
    pub(super) keep: bool,
}

/// A function for tiles of one size.
pub(super) type Run = unsafe fn(&Tile);

/// The function for tiles of `rows` (1 to [`ROWS`]) by `vectors` (1 or 2) vectors of f32 or, where `bf16`, of pairs of bf16.
///
/// # Panics
/// For another size, or for bf16 where the processor has none.
pub(super) fn run(rows: usize, vectors: usize, bf16: bool) -> Run {
    assert!(!bf16 || level() == Level::Avx512Bf16, "this processor has no products of bf16");
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 if bf16 => sizes!(avx512_bf16, rows, vectors),
        level => f32_at(level, rows, vectors),
    }
}

fn f32_at(level: Level, rows: usize, vectors: usize) -> Run {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 | Level::Avx512 => sizes!(avx512, rows, vectors),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => sizes!(avx2, rows, vectors),
        _ => sizes!(plain, rows, vectors),
    }
}

/// The f32 function of each level that this processor has, whichever would be chosen.
#[cfg(test)]
pub(super) fn every_level(rows: usize, vectors: usize) -> Vec<(Level, Run)> {
    let levels = [Level::Plain, Level::Avx2, Level::Avx512].into_iter().filter(|&one| one <= level());
    levels.map(|level| (level, f32_at(level, rows, vectors))).collect()
}

#[cfg(target_arch = "x86_64")]
macro_rules! avx512_tile {
    ($name:ident, $features:literal, ($sum:ident, $left:ident, $right:ident) => $fma:expr) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const V: usize>(tile: &Tile) {
            use std::arch::x86_64::*;
            // Plain loads would check their pointers where debug assertions are on, and lose a third of the speed to it.
            const ALL: __mmask16 = !0;
            // SAFETY: the caller of `run`'s function vouches for the ranges that `Tile` documents.
            unsafe {
                let mut sums = [[_mm512_setzero_ps(); V]; R];
                let (mut a, mut b) = (tile.a, tile.b);
                for _ in 0..tile.depth {
                    let mut right = [_mm512_setzero_ps(); V];
                    for v in 0..V {
                        right[v] = _mm512_maskz_loadu_ps(ALL, b.wrapping_add(VECTOR * v).cast());
                    }
                    for r in 0..R {
                        let $left = _mm512_broadcastss_ps(_mm_load_ss(a.wrapping_add(r).cast()));
                        for v in 0..V {
                            let ($sum, $right) = (sums[r][v], right[v]);
                            sums[r][v] = $fma;
                        }
                    }
                    a = a.wrapping_add(tile.a_step);
                    b = b.wrapping_add(tile.b_step);
                }
                let alpha = _mm512_set1_ps(tile.alpha);
                for r in 0..R {
                    for v in 0..V {
                        let place = tile.c.wrapping_add(r * tile.c_step + VECTOR * v);
                        let before = if tile.keep { _mm512_maskz_loadu_ps(ALL, place) } else { _mm512_setzero_ps() };
                        _mm512_mask_storeu_ps(place, ALL, _mm512_fmadd_ps(alpha, sums[r][v], before));
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
avx512_tile!(avx512, "avx512f", (sum, left, right) => {
    _mm512_fmadd_ps(left, right, sum)
});

// Both are 64 bytes without invalid values.
#[cfg(target_arch = "x86_64")]
avx512_tile!(avx512_bf16, "avx512f,avx512bf16", (sum, left, right) => {
    let pairs = (std::mem::transmute::<__m512, __m512bh>(left), std::mem::transmute::<__m512, __m512bh>(right));
    _mm512_dpbf16_ps(sum, pairs.0, pairs.1)
});

/// Plain loops over a part of the tile that fits the registers of a narrower processor.
macro_rules! part_of_tile {
    ($name:ident, $(#[$attribute:meta])*, $fma:expr) => {
        $(#[$attribute])*
        unsafe fn $name<const R: usize>(tile: &Tile, first_row: usize, vector: usize) {
            let mut sums = [[0f32; VECTOR]; R];
            // SAFETY: as the whole tile's.
            unsafe {
                let (mut a, mut b) = (tile.a.add(first_row), tile.b.add(VECTOR * vector));
                for _ in 0..tile.depth {
                    let right: [u32; VECTOR] = *b.cast();
                    for r in 0..R {
                        let left = f32::from_bits(*a.add(r));
                        for c in 0..VECTOR {
                            sums[r][c] = $fma(left, f32::from_bits(right[c]), sums[r][c]);
                        }
                    }
                    a = a.wrapping_add(tile.a_step);
                    b = b.wrapping_add(tile.b_step);
                }
                for r in 0..R {
                    let place = tile.c.add((first_row + r) * tile.c_step + VECTOR * vector);
                    for c in 0..VECTOR {
                        let before = if tile.keep { *place.add(c) } else { 0.0 };
                        *place.add(c) = before + tile.alpha * sums[r][c];
                    }
                }
            }
        }
    };
}

/// A tile in parts of four rows and one vector, the last rows one by one.
macro_rules! tile_in_parts {
    ($name:ident, $part:ident, $(#[$attribute:meta])*) => {
        $(#[$attribute])*
        unsafe fn $name<const R: usize, const V: usize>(tile: &Tile) {
            for vector in 0..V {
                for first_row in (0..R / 4 * 4).step_by(4) {
                    // SAFETY: a part of the same tile.
                    unsafe { $part::<4>(tile, first_row, vector) };
                }
                for row in R / 4 * 4..R {
                    // SAFETY: a part of the same tile.
                    unsafe { $part::<1>(tile, row, vector) };
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
part_of_tile!(avx2_part, #[target_feature(enable = "avx2,fma")], f32::mul_add);
#[cfg(target_arch = "x86_64")]
tile_in_parts!(avx2, avx2_part, #[target_feature(enable = "avx2,fma")]);
part_of_tile!(plain_part, , |left: f32, right: f32, sum: f32| left * right + sum);
tile_in_parts!(plain, plain_part,);
