//! The innermost loops of a product: one tile of the output, up to 12 rows by 32 columns, held in registers over the whole depth.
//!
//! `C[r][c] (+)= alpha · Σ_k A[k][r] · B[k][c]`. A *lane* is 32 bits: one f32, or two bf16 of neighbouring k (the even one in the
//! low half). A is read at `a + k · a_step + r`, or `a + r · a_step + k` in a row-major matrix, and repeated over a vector, B at
//! `b + k · b_step + c` sixteen lanes at a time, so both may be packed panels or lie where their matrix lies. Accumulation is f32 in
//! the order of k, whatever the tile.
//!
//! Three levels, chosen once a process: AVX-512, AVX2 with FMA (parts of 6 rows by 16 columns), and plain code. On Zen 4 a core
//! reaches 112 of its 118 GFLOP/s in f32 and 225 in bf16 (`vdpbf16ps`), on Zen 1 33 of 38 in f32, measured on a 135M model's shapes.

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

/// Whether products of bf16 take less time than those of f32: AMD's processors begin one `vdpbf16ps` a cycle, as many as f32's; on
/// Intel's (measured on Emerald Rapids) the whole step takes a third longer in bf16.
pub(super) fn bf16_is_faster() -> bool {
    level() == Level::Avx512Bf16 && is_amd()
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
}

#[cfg(not(target_arch = "x86_64"))]
fn is_amd() -> bool {
    false
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
    /// Lanes from k to k where the rows of A lie side by side; from row to row where they do not.
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

/// How a tile's operands lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operands {
    /// f32; at each k the rows of A lie side by side.
    F32,
    /// f32; in each row of A the k lie side by side. Only where [`reads_rows`].
    F32OnRows,
    /// Pairs of bf16; at each pair of k the rows of A lie side by side.
    Bf16,
}

/// Whether this processor's kernel reads A row by row as it lies in a row-major matrix; else it must be packed.
pub(super) fn reads_rows() -> bool {
    level() >= Level::Avx2
}

/// The function for tiles of `rows` (1 to [`ROWS`]) by `vectors` (1 or 2) vectors.
///
/// # Panics
/// For another size, or for operands that this processor's kernel does not read.
pub(super) fn run(rows: usize, vectors: usize, operands: Operands) -> Run {
    match (operands, level()) {
        #[cfg(target_arch = "x86_64")]
        (Operands::Bf16, Level::Avx512Bf16) => sizes!(avx512_bf16, rows, vectors),
        #[cfg(target_arch = "x86_64")]
        (Operands::F32OnRows, Level::Avx512Bf16 | Level::Avx512) => sizes!(avx512_on_rows, rows, vectors),
        #[cfg(target_arch = "x86_64")]
        (Operands::F32OnRows, Level::Avx2) => sizes!(avx2_on_rows, rows, vectors),
        (Operands::F32, level) => f32_at(level, rows, vectors),
        (operands, level) => panic!("no kernel for {operands:?} at {level:?}"),
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
    ($name:ident, $features:literal, $side_by_side:literal, ($sum:ident, $left:ident, $right:ident) => $fma:expr) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const V: usize>(tile: &Tile) {
            use std::arch::x86_64::*;
            // Plain loads would check their pointers where debug assertions are on, and lose a third of the speed to it.
            const ALL: __mmask16 = !0;
            // SAFETY: the caller of `run`'s function vouches for the ranges that `Tile` documents.
            unsafe {
                let mut sums = [[_mm512_setzero_ps(); V]; R];
                let mut b = tile.b;
                let mut a = [tile.a; R];
                for r in 1..R {
                    a[r] = a[r - 1].wrapping_add(if $side_by_side { 1 } else { tile.a_step });
                }
                for k in 0..tile.depth {
                    let mut right = [_mm512_setzero_ps(); V];
                    for v in 0..V {
                        right[v] = _mm512_maskz_loadu_ps(ALL, b.wrapping_add(VECTOR * v).cast());
                    }
                    for r in 0..R {
                        let at = if $side_by_side { a[0].wrapping_add(r) } else { a[r].wrapping_add(k) };
                        let $left = _mm512_broadcastss_ps(_mm_load_ss(at.cast()));
                        for v in 0..V {
                            let ($sum, $right) = (sums[r][v], right[v]);
                            sums[r][v] = $fma;
                        }
                    }
                    if $side_by_side {
                        a[0] = a[0].wrapping_add(tile.a_step);
                    }
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
avx512_tile!(avx512, "avx512f", true, (sum, left, right) => {
    _mm512_fmadd_ps(left, right, sum)
});
#[cfg(target_arch = "x86_64")]
avx512_tile!(avx512_on_rows, "avx512f", false, (sum, left, right) => {
    _mm512_fmadd_ps(left, right, sum)
});

// Both are 64 bytes without invalid values.
#[cfg(target_arch = "x86_64")]
avx512_tile!(avx512_bf16, "avx512f,avx512bf16", true, (sum, left, right) => {
    let pairs = (std::mem::transmute::<__m512, __m512bh>(left), std::mem::transmute::<__m512, __m512bh>(right));
    _mm512_dpbf16_ps(sum, pairs.0, pairs.1)
});

/// A part of a tile that fits the sixteen registers of AVX2: up to six rows by one vector of two halves.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_part<const R: usize, const ON_ROWS: bool>(tile: &Tile, first_row: usize, vector: usize) {
    use std::arch::x86_64::*;
    // SAFETY: the caller of `run`'s function vouches for the ranges that `Tile` documents; the part lies inside the tile.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        let mut b = tile.b.wrapping_add(VECTOR * vector).cast::<f32>();
        let apart = if ON_ROWS { tile.a_step } else { 1 };
        let mut a = [tile.a.wrapping_add(first_row * apart).cast::<f32>(); R];
        for r in 1..R {
            a[r] = a[r - 1].wrapping_add(apart);
        }
        for k in 0..tile.depth {
            let right = load_16(b);
            for r in 0..R {
                let at = if ON_ROWS { a[r].wrapping_add(k) } else { a[0].wrapping_add(r) };
                let left = _mm256_broadcastss_ps(_mm_load_ss(at));
                for half in 0..2 {
                    sums[r][half] = _mm256_fmadd_ps(left, right[half], sums[r][half]);
                }
            }
            if !ON_ROWS {
                a[0] = a[0].wrapping_add(tile.a_step);
            }
            b = b.wrapping_add(tile.b_step);
        }
        let alpha = _mm256_set1_ps(tile.alpha);
        for (r, sums) in sums.into_iter().enumerate() {
            let place = tile.c.wrapping_add((first_row + r) * tile.c_step + VECTOR * vector);
            let before = if tile.keep { load_16(place) } else { [_mm256_setzero_ps(); 2] };
            for (half, (sum, before)) in sums.into_iter().zip(before).enumerate() {
                _mm256_storeu_ps(place.wrapping_add(8 * half), _mm256_fmadd_ps(alpha, sum, before));
            }
        }
    }
}

/// Sixteen values. Written as instructions: where debug assertions are on, the plain load checks its pointer and goes through the
/// stack, which halves the kernel's speed.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn load_16(from: *const f32) -> [std::arch::x86_64::__m256; 2] {
    let (low, high);
    // SAFETY: the caller has sixteen values there.
    unsafe {
        std::arch::asm!(
            "vmovups {low}, [{from}]",
            "vmovups {high}, [{from} + 32]",
            low = out(ymm_reg) low,
            high = out(ymm_reg) high,
            from = in(reg) from,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    [low, high]
}

/// A tile in parts of six rows and one vector, the last rows in one of what is left.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_tile<const R: usize, const V: usize, const ON_ROWS: bool>(tile: &Tile) {
    for vector in 0..V {
        // SAFETY: parts of the same tile.
        unsafe {
            if R >= 6 {
                avx2_part::<6, ON_ROWS>(tile, 0, vector);
            }
            match R {
                6 => {}
                12 => avx2_part::<6, ON_ROWS>(tile, 6, vector),
                1 | 7 => avx2_part::<1, ON_ROWS>(tile, R / 6 * 6, vector),
                2 | 8 => avx2_part::<2, ON_ROWS>(tile, R / 6 * 6, vector),
                3 | 9 => avx2_part::<3, ON_ROWS>(tile, R / 6 * 6, vector),
                4 | 10 => avx2_part::<4, ON_ROWS>(tile, R / 6 * 6, vector),
                _ => avx2_part::<5, ON_ROWS>(tile, R / 6 * 6, vector),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const R: usize, const V: usize>(tile: &Tile) {
    // SAFETY: the caller's.
    unsafe { avx2_tile::<R, V, false>(tile) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_on_rows<const R: usize, const V: usize>(tile: &Tile) {
    // SAFETY: the caller's.
    unsafe { avx2_tile::<R, V, true>(tile) }
}

/// Any processor: parts of four rows and one vector, the last rows one by one.
unsafe fn plain<const R: usize, const V: usize>(tile: &Tile) {
    for vector in 0..V {
        // SAFETY: parts of the same tile.
        unsafe {
            for first_row in (0..R / 4 * 4).step_by(4) {
                plain_part::<4>(tile, first_row, vector);
            }
            for row in R / 4 * 4..R {
                plain_part::<1>(tile, row, vector);
            }
        }
    }
}

unsafe fn plain_part<const R: usize>(tile: &Tile, first_row: usize, vector: usize) {
    let mut sums = [[0f32; VECTOR]; R];
    // SAFETY: the caller of `run`'s function vouches for the ranges that `Tile` documents; the part lies inside the tile.
    unsafe {
        let (mut a, mut b) = (tile.a.wrapping_add(first_row), tile.b.wrapping_add(VECTOR * vector));
        for _ in 0..tile.depth {
            let right = *b.cast::<[u32; VECTOR]>();
            for (r, sums) in sums.iter_mut().enumerate() {
                let left = f32::from_bits(*a.wrapping_add(r));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum += left * f32::from_bits(right);
                }
            }
            a = a.wrapping_add(tile.a_step);
            b = b.wrapping_add(tile.b_step);
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let place = tile.c.wrapping_add((first_row + r) * tile.c_step + VECTOR * vector);
            for (column, sum) in sums.into_iter().enumerate() {
                let before = if tile.keep { *place.add(column) } else { 0.0 };
                *place.add(column) = before + tile.alpha * sum;
            }
        }
    }
}
