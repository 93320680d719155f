//! LoRA's own products on a GPU: tall matrices with narrow ones, each read once.
//!
//! What kernels/lora.cu, lora_output.cu and lora_gradient.cu say of shapes holds here; all sums of a launch are added in a fixed order.

use super::flat::{GROUP, assert_type, of_type};
use super::launch::Argument;
use super::sizes::{Group, Sizes};
use super::{Dtype, Gpu, Launch, Mat};
use crate::Result;

const MAX_PROJECTIONS: usize = 3;
/// Blocks that share a tile of a result, rows (or columns) of a tile, depth of a step; kernels/lora.cuh names them too.
const SPLIT: usize = 4;
const TILE: usize = 128;
const STEP: usize = 64;
/// Columns of a narrow matrix in a pass, and tiles of a launch, at most; kernels/lora.cuh names them too.
const MAX_WIDTH: usize = 96;
const MAX_TILES: usize = 1 << 15;
/// Columns of a strip of dy, blocks that share its tokens, and steps on their way; kernels/lora_output.cu names them too.
const STRIP: usize = 256;
const SHARES: usize = 8;
const OUTPUT_STAGES: usize = 3;
/// The largest rank for which du and dB come from one pass over dy.
const MAX_RANK_OF_ONE_PASS: usize = 32;
/// Threads of a block: a warp has 16 rows of a tile.
const THREADS: u32 = (TILE / 16 * 32) as u32;
const FLAT_THREADS: usize = 256;

/// A projection's LoRA among the parameters: addresses of A and B, 0 where it has none, and its outputs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pair {
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) rows: usize,
}

/// kernels/lora.cu holds the same struct.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Parameters {
    lora_a: [u64; MAX_PROJECTIONS],
    lora_b: [u64; MAX_PROJECTIONS],
    rank: [i32; MAX_PROJECTIONS],
    outputs: [i32; MAX_PROJECTIONS],
    scale: [f32; MAX_PROJECTIONS],
    count: i32,
}

// SAFETY: `repr(C)`, as the kernels have it.
unsafe impl Argument for Parameters {}

/// kernels/lora.cuh holds the same struct.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct GradientGroup {
    gradient: [u64; MAX_PROJECTIONS],
    rank: [i32; MAX_PROJECTIONS],
    outputs: [i32; MAX_PROJECTIONS],
    scale: [f32; MAX_PROJECTIONS],
    count: i32,
}

// SAFETY: `repr(C)`, as the kernels have it.
unsafe impl Argument for GradientGroup {}

/// How the kernels cover a narrow matrix: passes over the tall one, and groups of 8 columns that each is compiled for.
#[derive(Debug, Clone, Copy)]
struct Passes {
    count: usize,
    groups: usize,
}

impl Passes {
    fn of(width: usize) -> Self {
        let count = width.div_ceil(MAX_WIDTH);
        let groups = (width / GROUP).div_ceil(count.max(1));
        let groups =
            [2, 4, 6, 8, 12].into_iter().find(|&compiled| compiled >= groups).expect("a pass has 12 groups at most");
        Self { count, groups }
    }

    /// f32 values that the parts of so many tiles take.
    fn partial_values(self, tiles: usize) -> usize {
        tiles * self.count * SPLIT * TILE * GROUP * self.groups
    }
}

/// Steps that are on their way at a time; kernels/lora.cuh names them too.
fn stages(gpu: &Gpu) -> usize {
    if (9..12).contains(&gpu.capability.0) { 4 } else { 3 }
}

/// 16-byte units of a row in shared memory.
fn row_units(values: usize) -> usize {
    (values / GROUP) | 1
}

/// f32 values that the parts of sums of any of a model's groups take at once.
pub(crate) fn partial_values(sizes: &Sizes, tokens: usize) -> usize {
    let rank = Passes::of(sizes.padded_rank);
    let of_group = |group: Group| {
        let (of, projections) = (sizes.group(group), group.targets().len());
        if of.extension == 0 {
            return 0;
        }
        let all = Passes::of(of.extension);
        let u = all.partial_values(tokens.div_ceil(TILE).max(of.inputs.div_ceil(TILE)));
        // One tile more a projection, which may begin within one.
        let tiles = |width: usize| (of.outputs + projections * GROUP).div_ceil(width) + projections;
        let apart = rank.partial_values((projections * tokens.div_ceil(TILE)).max(tiles(TILE)));
        let together = if sizes.padded_rank > MAX_RANK_OF_ONE_PASS {
            0
        } else {
            tiles(STRIP) * width_of_one_pass(sizes.padded_rank) * (tokens + SHARES * STRIP)
        };
        u.max(apart).max(together)
    };
    Group::ALL.into_iter().map(of_group).max().unwrap_or(0)
}

/// Most tokens of a micro-batch: the kernels' tiles are counted.
pub(crate) fn most_tokens(sizes: &Sizes) -> usize {
    let launches = |group: Group| {
        let extension = sizes.group(group).extension;
        let apart = group.targets().len() * Passes::of(sizes.padded_rank).count;
        if extension == 0 { 1 } else { Passes::of(extension).count.max(apart) }
    };
    MAX_TILES / Group::ALL.into_iter().map(launches).max().unwrap_or(1) * TILE
}

/// Writes A's rows and s·B's columns into W'.
pub(crate) fn fill(
    gpu: &Gpu,
    out: Mat<'_>,
    pairs: &[Pair],
    inputs: usize,
    (rank, padded_rank): (usize, usize),
    scale: f32,
) -> Result<()> {
    let mut group = Parameters { count: pairs.len() as i32, ..Parameters::default() };
    for (place, pair) in pairs.iter().enumerate() {
        group.lora_a[place] = pair.a;
        group.lora_b[place] = pair.b;
        group.rank[place] = rank as i32;
        group.outputs[place] = pair.rows as i32;
        group.scale[place] = scale;
    }
    let outputs: usize = pairs.iter().map(|pair| pair.rows).sum();
    let width = pairs.len() * padded_rank;
    assert!(out.rows == outputs + width && out.columns >= inputs + width, "lora: {out:?}");
    let groups = width * inputs.div_ceil(8) + outputs * width / 8;
    let name = of_type(out.dtype, "lora_fill_bf16", "lora_fill_f32");
    let launch = gpu.launch(name)?.grid(groups.div_ceil(256) as u32, 256).mat(out).arg(&group);
    // SAFETY: the shape was checked.
    unsafe { launch.int(inputs).int(padded_rank).run() }
}

/// u = x Aᵀ, into x's extension and into `kept`.
pub(crate) fn u(
    gpu: &Gpu,
    partials: Mat<'_>,
    x: Mat<'_>,
    a: Mat<'_>,
    extension: Mat<'_>,
    kept: Option<Mat<'_>>,
) -> Result<()> {
    let (tokens, width) = extension.shape();
    assert!(x.rows == tokens && a.shape() == (width, x.columns), "lora u: {x:?} {a:?}");
    assert!(kept.is_none_or(|kept| kept.shape() == extension.shape()), "lora u: {kept:?}");
    assert_type("lora u", x.dtype, &[a, extension, kept.unwrap_or(extension)]);
    let name = of_type(x.dtype, "lora_u_bf16", "lora_u_f32");
    let launch = optional(gpu.launch(name)?.mat(extension), kept).mat(x).mat(a);
    if x.dtype == Dtype::F32 {
        // SAFETY: shapes were checked.
        return unsafe { launch.int(tokens).int(x.columns).int(width).grid(tokens as u32, FLAT_THREADS as u32).run() };
    }
    let passes = Passes::of(width);
    let launch = tiled(launch, partials, passes, tokens.div_ceil(TILE));
    let shared = stages(gpu) * 16 * row_units(STEP) * (TILE + GROUP * passes.groups);
    // SAFETY: shapes, the room for parts and the number of tiles were checked.
    unsafe { launch.int(tokens).int(x.columns).int(width).shared(shared as u32).run() }
}

/// What the gradients of a group's outputs give to its LoRAs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outputs<'a> {
    /// (T, N).
    pub(crate) dy: Mat<'a>,
    /// Columns of dy that each projection has.
    pub(crate) columns: &'a [usize],
    /// What forward kept, (T, P·R).
    pub(crate) u: Mat<'a>,
    /// s·B in its blocks, (N, P·R).
    pub(crate) scaled_b: Mat<'a>,
    pub(crate) scale: f32,
}

impl Outputs<'_> {
    fn padded_rank(&self) -> usize {
        self.u.columns / self.columns.len()
    }

    /// Where the gradients of each projection's B stand.
    fn gradients(&self, gradients: &[Option<Mat<'_>>]) -> GradientGroup {
        assert!(gradients.len() == self.columns.len(), "lora: a gradient or none for each projection");
        let (mut group, padded_rank) = (gradient_group(gradients, self.scale), self.padded_rank());
        for ((place, &columns), gradient) in group.outputs.iter_mut().zip(self.columns).zip(gradients) {
            let fits =
                gradient.is_none_or(|it| it.rows == columns && it.columns <= padded_rank && it.columns == it.stride);
            assert!(fits, "lora db: {gradient:?} of {columns} outputs");
            *place = columns as i32;
        }
        group
    }

    /// Tiles of that width, each within a projection, from multiples of 8 on.
    fn tiles(&self, width: usize) -> usize {
        let (mut first, mut tiles) = (0, 0);
        for columns in self.columns {
            tiles += (first % GROUP + columns).div_ceil(width);
            first += columns;
        }
        tiles
    }
}

/// du = dy (s·B), into dy's extension, and dB += s · dyᵀ u of each projection that has one.
pub(crate) fn backward_outputs(
    gpu: &Gpu,
    partials: Mat<'_>,
    du: Mat<'_>,
    gradients: &[Option<Mat<'_>>],
    outputs: &Outputs<'_>,
) -> Result<()> {
    let Outputs { dy, columns, u, scaled_b, .. } = *outputs;
    let padded_rank = outputs.padded_rank();
    let all: usize = columns.iter().sum();
    assert!(dy.columns == all && u.shape() == (dy.rows, columns.len() * padded_rank), "lora: {outputs:?}");
    assert!(du.shape() == u.shape() && scaled_b.shape() == (all, u.columns), "lora: {du:?} of {outputs:?}");
    assert_type("lora", dy.dtype, &[u, scaled_b, du]);
    let group = outputs.gradients(gradients);
    let width = width_of_one_pass(padded_rank);
    let shared = shared_of_one_pass(width);
    if dy.dtype == Dtype::F32 || padded_rank > MAX_RANK_OF_ONE_PASS || shared > gpu.shared_bytes {
        return backward_apart(gpu, partials, du, &group, outputs);
    }
    let strips = outputs.tiles(STRIP);
    let sums = strips * dy.rows * width;
    let needed = sums + strips * SHARES * STRIP * width;
    assert_type("lora: partials", Dtype::F32, &[partials]);
    assert!(strips <= MAX_TILES && partials.rows * partials.columns >= needed, "lora: {needed} in {partials:?}");
    let (of_du, of_db) = (partials.pointer, partials.pointer + 4 * sums as u64);
    let launch = gpu.launch("lora_du_db_bf16")?.grid_3d((SHARES as u32, strips as u32, 1), 256).shared(shared as u32);
    let launch = launch.arg(&group).mat(dy).mat(u).mat(scaled_b).long(of_du).long(of_db);
    // SAFETY: shapes, the room for parts and the number of strips were checked.
    unsafe { launch.int(dy.rows).int(padded_rank).run() }?;
    let blocks = (dy.rows * columns.len() * width / 4).div_ceil(128);
    let launch = gpu.launch("lora_du_sum_bf16")?.grid(blocks as u32, 128).mat(du).long(of_du).arg(&group);
    // SAFETY: as above.
    unsafe { launch.int(dy.rows).int(padded_rank).run() }
}

/// The two in a kernel each: for f32, large ranks, and cards whose blocks have too little shared memory for both.
fn backward_apart(
    gpu: &Gpu,
    partials: Mat<'_>,
    du: Mat<'_>,
    group: &GradientGroup,
    outputs: &Outputs<'_>,
) -> Result<()> {
    du_of(gpu, partials, du, outputs)?;
    db_of(gpu, partials, group, outputs)
}

/// Bytes of shared memory of the kernel that does both.
fn shared_of_one_pass(width: usize) -> usize {
    let units = row_units(width);
    16 * (OUTPUT_STAGES * STEP * (row_units(STRIP) + units) + STRIP * units + 32 * width)
}

/// Columns that a projection has in the sums of one pass.
fn width_of_one_pass(padded_rank: usize) -> usize {
    if padded_rank <= 16 { 16 } else { 32 }
}

fn du_of(gpu: &Gpu, partials: Mat<'_>, du: Mat<'_>, outputs: &Outputs<'_>) -> Result<()> {
    let (dy, padded_rank) = (outputs.dy, outputs.padded_rank());
    let mut group = Parameters { count: outputs.columns.len() as i32, ..Parameters::default() };
    group.outputs.iter_mut().zip(outputs.columns).for_each(|(place, &columns)| *place = columns as i32);
    let name = of_type(dy.dtype, "lora_du_bf16", "lora_du_f32");
    let launch = optional(gpu.launch(name)?.mat(du), None).mat(dy).mat(outputs.scaled_b);
    if dy.dtype == Dtype::F32 {
        let launch = launch.arg(&group).int(dy.rows).int(padded_rank);
        // SAFETY: the caller checked shapes.
        return unsafe { launch.grid(dy.rows as u32, FLAT_THREADS as u32).run() };
    }
    let passes = Passes::of(padded_rank);
    let launch = tiled(launch, partials, passes, outputs.columns.len() * dy.rows.div_ceil(TILE));
    let shared = stages(gpu) * 16 * (TILE * row_units(STEP) + STEP * row_units(GROUP * passes.groups));
    // SAFETY: the caller checked shapes; the room for parts and the number of tiles were checked.
    unsafe { launch.arg(&group).int(dy.rows).int(padded_rank).shared(shared as u32).run() }
}

fn db_of(gpu: &Gpu, partials: Mat<'_>, group: &GradientGroup, outputs: &Outputs<'_>) -> Result<()> {
    let (dy, padded_rank) = (outputs.dy, outputs.padded_rank());
    let name = of_type(dy.dtype, "lora_db_bf16", "lora_db_f32");
    let launch = gpu.launch(name)?.arg(group).mat(dy).mat(outputs.u);
    if dy.dtype == Dtype::F32 {
        let blocks = (dy.columns * padded_rank).div_ceil(FLAT_THREADS);
        let launch = launch.int(dy.rows).int(padded_rank).grid(blocks as u32, FLAT_THREADS as u32);
        // SAFETY: the caller checked shapes.
        return unsafe { launch.run() };
    }
    let passes = Passes::of(padded_rank);
    let launch = tiled(launch, partials, passes, outputs.tiles(TILE)).int(dy.rows).int(padded_rank);
    // SAFETY: the caller checked shapes; the room for parts and the number of tiles were checked.
    unsafe { launch.shared(shared_of_sums(gpu, passes)).run() }
}

/// dA += duᵀ x of each projection that has one; du has `padded_rank` columns for each.
pub(crate) fn da(
    gpu: &Gpu,
    partials: Mat<'_>,
    gradients: &[Option<Mat<'_>>],
    (du, x): (Mat<'_>, Mat<'_>),
) -> Result<()> {
    assert!(du.rows == x.rows, "lora da: {du:?} {x:?}");
    assert_type("lora da", x.dtype, &[du]);
    let padded_rank = du.columns / gradients.len();
    for it in gradients.iter().flatten() {
        assert!(it.columns == x.columns && it.rows <= padded_rank && it.columns == it.stride, "lora da: {it:?}");
    }
    let mut group = gradient_group(gradients, 1.0);
    for (rank, gradient) in group.rank.iter_mut().zip(gradients) {
        *rank = gradient.map_or(0, |gradient| gradient.rows as i32);
    }
    if x.dtype == Dtype::F32 {
        let launch = gpu.launch("lora_da_f32")?.arg(&group).mat(x).mat(du);
        let blocks = (x.columns * du.columns).div_ceil(FLAT_THREADS);
        let launch = launch.int(x.rows).int(x.columns).int(padded_rank);
        // SAFETY: shapes were checked.
        return unsafe { launch.grid(blocks as u32, FLAT_THREADS as u32).run() };
    }
    let passes = Passes::of(du.columns);
    let launch = gpu.launch("lora_da_bf16")?.arg(&group).mat(x).mat(du);
    let launch = tiled(launch, partials, passes, x.columns.div_ceil(TILE)).int(x.rows).int(x.columns).int(padded_rank);
    // SAFETY: shapes, the room for parts and the number of tiles were checked.
    unsafe { launch.shared(shared_of_sums(gpu, passes)).run() }
}

/// Addresses and ranks (columns) of gradients.
fn gradient_group(gradients: &[Option<Mat<'_>>], scale: f32) -> GradientGroup {
    let mut group =
        GradientGroup { count: gradients.len() as i32, scale: [scale; MAX_PROJECTIONS], ..Default::default() };
    for (place, gradient) in gradients.iter().enumerate() {
        if let Some(gradient) = gradient {
            assert!(gradient.dtype == Dtype::F32, "a gradient is f32");
            (group.gradient[place], group.rank[place]) = (gradient.pointer, gradient.columns as i32);
        }
    }
    group
}

/// A second place for a result, or none.
fn optional<'a>(launch: Launch<'a>, place: Option<Mat<'_>>) -> Launch<'a> {
    match place {
        Some(place) => launch.mat(place),
        None => launch.long(0).long(0),
    }
}

/// The grid of a kernel with so many tiles a pass, and room for their parts.
fn tiled<'a>(launch: Launch<'a>, partials: Mat<'_>, passes: Passes, tiles: usize) -> Launch<'a> {
    let (blocks, needed) = (tiles * passes.count, passes.partial_values(tiles));
    assert!(blocks <= MAX_TILES, "lora: {blocks} tiles");
    assert!(
        partials.rows * partials.columns >= needed && partials.dtype == Dtype::F32,
        "lora: {needed} in {partials:?}"
    );
    launch.grid_3d((SPLIT as u32, blocks as u32, 1), THREADS).pointer(partials)
}

/// Shared memory of the kernels that sum over tokens.
fn shared_of_sums(gpu: &Gpu, passes: Passes) -> u32 {
    (stages(gpu) * 16 * STEP * (row_units(TILE) + row_units(GROUP * passes.groups))) as u32
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::super::Buffer;
    use super::super::testing::{Held, assert_near, gpu, random, rounded, tolerance};
    use super::*;

    /// A group: inputs, outputs of each projection, rank.
    struct Case {
        inputs: usize,
        outputs: &'static [usize],
        rank: usize,
    }

    /// Odd widths, projections that begin between multiples of 8, several tiles and passes.
    const CASES: [Case; 6] = [
        Case { inputs: 64, outputs: &[64, 32, 32], rank: 16 },
        Case { inputs: 172, outputs: &[64], rank: 4 },
        Case { inputs: 72, outputs: &[172, 172], rank: 8 },
        Case { inputs: 328, outputs: &[200, 64, 33], rank: 50 },
        Case { inputs: 1096, outputs: &[100, 37], rank: 3 },
        Case { inputs: 576, outputs: &[136], rank: 130 },
    ];

    impl Case {
        fn padded_rank(&self) -> usize {
            self.rank.next_multiple_of(GROUP)
        }

        fn width(&self) -> usize {
            self.outputs.len() * self.padded_rank()
        }

        fn columns(&self) -> usize {
            self.outputs.iter().sum()
        }

        /// Where a projection's outputs begin.
        fn first(&self, projection: usize) -> usize {
            self.outputs[..projection].iter().sum()
        }
    }

    fn partials(gpu: &Rc<Gpu>) -> Buffer {
        Buffer::of(gpu, &vec![f32::NAN; 1 << 22]).unwrap()
    }

    /// left (rows, depth) · rightᵀ (columns, depth).
    fn product(left: &[f32], right: &[f32], depth: usize) -> Vec<f32> {
        let rows = left.chunks(depth);
        rows.flat_map(|left| right.chunks(depth).map(|right| left.iter().zip(right).map(|(a, b)| a * b).sum()))
            .collect()
    }

    fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
        (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
    }

    fn mats(held: &[Option<Held>]) -> Vec<Option<Mat<'_>>> {
        held.iter().map(|held| held.as_ref().map(Held::mat)).collect()
    }

    /// Columns of a matrix of that width.
    fn columns_of(values: &[f32], width: usize, first: usize, count: usize) -> Vec<f32> {
        values.chunks(width).flat_map(|row| &row[first..first + count]).copied().collect()
    }

    #[test]
    fn products_are_those_of_the_cpu() {
        let Some(gpu) = gpu() else { return };
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for case in &CASES {
                for tokens in [1, 7, 300] {
                    check_forward(&gpu, case, tokens, dtype);
                    check_outputs(&gpu, case, tokens, dtype);
                    check_da(&gpu, case, tokens, dtype);
                }
            }
        }
    }

    fn check_forward(gpu: &Rc<Gpu>, case: &Case, tokens: usize, dtype: Dtype) {
        let (inputs, width) = (case.inputs, case.width());
        let name = format!("u of {tokens} × {inputs}, {width} wide, {dtype:?}");
        let (x, a) = (rounded(&random(1, tokens * inputs), dtype), rounded(&random(2, width * inputs), dtype));
        let stride = (inputs + width).next_multiple_of(GROUP);
        let (x_held, a_held) =
            (Held::of(gpu, &x, (tokens, inputs), stride, dtype), Held::of(gpu, &a, (width, inputs), stride, dtype));
        let out = Held::poisoned(gpu, (tokens, width), width + 8, dtype);
        let kept = Held::poisoned(gpu, (tokens, width), width, dtype);
        let partials = partials(gpu);
        u(gpu, partials.row(Dtype::F32), x_held.mat(), a_held.mat(), out.mat(), Some(kept.mat())).unwrap();
        assert_near(&name, &out.values(), &product(&x, &a, inputs), tolerance(dtype));
        assert_eq!(out.values(), kept.values(), "{name}");
        let again = Held::poisoned(gpu, (tokens, width), width + 8, dtype);
        u(gpu, partials.row(Dtype::F32), x_held.mat(), a_held.mat(), again.mat(), None).unwrap();
        assert_eq!(out.values(), again.values(), "{name}: another time");
    }

    /// Gradients that begin with 2, since they are added to; the last projection has no LoRA where there are several.
    fn begun(gpu: &Rc<Gpu>, case: &Case, shape: impl Fn(usize) -> (usize, usize)) -> Vec<Option<Held>> {
        let has_lora = |projection: usize| projection == 0 || projection + 1 < case.outputs.len();
        let held = |(rows, columns)| Held::of(gpu, &vec![2.0; rows * columns], (rows, columns), columns, Dtype::F32);
        (0..case.outputs.len()).map(|projection| has_lora(projection).then(|| held(shape(projection)))).collect()
    }

    fn add(sums: Vec<f32>, scale: f32) -> Vec<f32> {
        sums.into_iter().map(|sum| 2.0 + scale * sum).collect()
    }

    /// s·B in its blocks: zero where a row is no output of the column's projection.
    fn block_diagonal(case: &Case, mut values: Vec<f32>) -> Vec<f32> {
        let (width, padded_rank) = (case.width(), case.padded_rank());
        for (index, value) in values.iter_mut().enumerate() {
            let (row, projection) = (index / width, index % width / padded_rank);
            let first = case.first(projection);
            if !(first..first + case.outputs[projection]).contains(&row) {
                *value = 0.0;
            }
        }
        values
    }

    /// du and dB, in the way that the card and the rank choose, and in a kernel each.
    fn check_outputs(gpu: &Rc<Gpu>, case: &Case, tokens: usize, dtype: Dtype) {
        let (columns, width, padded_rank) = (case.columns(), case.width(), case.padded_rank());
        let values = |seed, count| rounded(&random(seed, count), dtype);
        let (dy, u) = (values(3, tokens * columns), values(5, tokens * width));
        let scaled_b = block_diagonal(case, values(6, columns * width));
        let held = |values: &[f32], rows, columns: usize, stride| Held::of(gpu, values, (rows, columns), stride, dtype);
        let aligned = |columns: usize| columns.next_multiple_of(GROUP) + 8;
        let (dy_held, u_held) = (held(&dy, tokens, columns, aligned(columns)), held(&u, tokens, width, width));
        let b_held = held(&scaled_b, columns, width, aligned(case.inputs + width));
        let outputs =
            Outputs { dy: dy_held.mat(), columns: case.outputs, u: u_held.mat(), scaled_b: b_held.mat(), scale: 0.5 };
        let partials = partials(gpu);
        for way in ["chosen", "apart"] {
            let name = |what: &str| format!("{what} of {tokens} × {columns}, {width} wide, {dtype:?}, {way}");
            let out = Held::poisoned(gpu, (tokens, width), aligned(width), dtype);
            let dbs = begun(gpu, case, |projection| (case.outputs[projection], case.rank));
            let room = partials.row(Dtype::F32);
            match way {
                "chosen" => backward_outputs(gpu, room, out.mat(), &mats(&dbs), &outputs).unwrap(),
                _ => backward_apart(gpu, room, out.mat(), &outputs.gradients(&mats(&dbs)), &outputs).unwrap(),
            }
            let expected = product(&dy, &transposed(&scaled_b, width), columns);
            assert_near(&name("du"), &out.values(), &expected, tolerance(dtype));
            for (projection, db) in dbs.iter().enumerate() {
                let Some(db) = db else { continue };
                let u_of = transposed(&columns_of(&u, width, projection * padded_rank, case.rank), case.rank);
                let dy_of = columns_of(&dy, columns, case.first(projection), case.outputs[projection]);
                let sums = product(&transposed(&dy_of, case.outputs[projection]), &u_of, tokens);
                assert_near(&name("dB"), &db.values(), &add(sums, 0.5), 1e-5);
            }
        }
    }

    fn check_da(gpu: &Rc<Gpu>, case: &Case, tokens: usize, dtype: Dtype) {
        let (inputs, width, padded_rank) = (case.inputs, case.width(), case.padded_rank());
        let values = |seed, count| rounded(&random(seed, count), dtype);
        let (x, du) = (values(4, tokens * inputs), values(5, tokens * width));
        let x_held = Held::of(gpu, &x, (tokens, inputs), inputs.next_multiple_of(GROUP) + 8, dtype);
        let du_held = Held::of(gpu, &du, (tokens, width), width, dtype);
        let das = begun(gpu, case, |_| (case.rank, inputs));
        da(gpu, partials(gpu).row(Dtype::F32), &mats(&das), (du_held.mat(), x_held.mat())).unwrap();
        for (projection, da) in das.iter().enumerate() {
            let Some(da) = da else { continue };
            let du_of = transposed(&columns_of(&du, width, projection * padded_rank, case.rank), case.rank);
            let sums = product(&du_of, &transposed(&x, inputs), tokens);
            let name = format!("dA of {tokens} × {inputs}, {width} wide, {dtype:?}");
            assert_near(&name, &da.values(), &add(sums, 1.0), 1e-5);
        }
    }
}
