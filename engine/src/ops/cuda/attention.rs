//! Attention on a GPU: the work lists of a micro-batch, and which kernels serve its sizes. CPU twin: `ops/attention.rs`.
//!
//! bf16 heads of 64 and 128 run on tensor cores: through wgmma on Hopper (kernels/attention_hopper_forward.cu and
//! attention_hopper_dq.cu, attention_hopper_dkdv.cu), through mma elsewhere (attention_mma.cu). All other sizes, and f32, run on attention.cu.
//! All of them take the same work lists: tiles of (start, end, start of the sequence, end of the sequence), longest work first.

use std::cmp::Reverse;
use std::mem::MaybeUninit;
use std::rc::Rc;

use cudarc::driver::sys;

use super::{Buffer, Dtype, Gpu, Launch, Mat, failed};
use crate::Result;
use crate::ops::attention::check_sequences;

/// Largest head that attention.cu takes.
pub(crate) const MAX_HEAD_DIM: usize = 256;
/// Rows of keys and values that the Hopper forward brings to shared memory at once.
const HOPPER_FORWARD_KEYS: usize = 128;
/// Rows that the Hopper backward brings to shared memory at once.
const HOPPER_BACKWARD_ROWS: usize = 64;
/// Columns that the tensor copy engine brings at once: rows of 128 bytes are exchanged as wgmma reads them.
const BOX_COLUMNS: u32 = 64;

/// Heads and their type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heads {
    /// H, of q, o.
    pub(crate) heads: usize,
    /// KV, of k, v; divides H.
    pub(crate) kv_heads: usize,
    /// D.
    pub(crate) head_dim: usize,
    pub(crate) dtype: Dtype,
}

impl Heads {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// What forward reads: q (T, H · D), k and v (T, KV · D), after RoPE.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) q: Mat<'a>,
    pub(crate) k: Mat<'a>,
    pub(crate) v: Mat<'a>,
}

/// What forward was given and gave, as backward needs it: o (T, H · D), lse (H, T) in f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Saved<'a> {
    pub(crate) inputs: Inputs<'a>,
    pub(crate) o: Mat<'a>,
    pub(crate) lse: Mat<'a>,
}

/// What backward writes, shaped as q, k and v.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gradients<'a> {
    pub(crate) dq: Mat<'a>,
    pub(crate) dk: Mat<'a>,
    pub(crate) dv: Mat<'a>,
}

/// A family of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    /// attention_hopper_forward.cu, attention_hopper_dq.cu, attention_hopper_dkdv.cu.
    Hopper,
    /// attention_mma.cu.
    Mma,
    /// attention.cu.
    Any,
}

impl Path {
    fn serves(self, gpu: &Gpu, heads: &Heads) -> bool {
        let tensor_cores = heads.dtype == Dtype::Bf16 && matches!(heads.head_dim, 64 | 128);
        match self {
            Self::Hopper => tensor_cores && gpu.is_hopper(),
            Self::Mma => tensor_cores,
            Self::Any => true,
        }
    }

    /// The fastest one.
    fn of(gpu: &Gpu, heads: &Heads) -> Self {
        let all = [Self::Hopper, Self::Mma];
        all.into_iter().find(|path| path.serves(gpu, heads)).unwrap_or(Self::Any)
    }

    /// Launch rules of [`FORWARD`], [`DKDV`] and [`DQ`], as the kernels' files give them.
    fn rules(self, heads: &Heads) -> [Rule; 3] {
        let rule = |kernel, tile_rows, threads, shared_bytes| Rule { kernel, tile_rows, threads, shared_bytes };
        // A block of Hopper's dq has the same rows of two heads of a group, or else twice as many rows of one.
        let dq_rows = if heads.group().is_multiple_of(2) { 64 } else { 128 };
        match (self, heads.head_dim, heads.dtype) {
            (Self::Hopper, 64, _) => [
                rule("attention_hopper_forward_d64", 192, 512, 140_544),
                rule("attention_hopper_backward_dkdv_d64", 128, 384, 101_456),
                rule("attention_hopper_backward_dq_d64", dq_rows, 384, 115_792),
            ],
            (Self::Hopper, ..) => [
                rule("attention_hopper_forward_d128", 128, 384, 230_656),
                rule("attention_hopper_backward_dkdv_d128", 128, 384, 199_760),
                rule("attention_hopper_backward_dq_d128", dq_rows, 384, 230_480),
            ],
            (Self::Mma, 64, _) => [
                rule("attention_mma_forward_d64", 128, 128, 32 << 10),
                rule("attention_mma_backward_dkdv_d64", 128, 256, 66 << 10),
                rule("attention_mma_backward_dq_d64", 128, 256, 32 << 10),
            ],
            (Self::Mma, ..) => [
                rule("attention_mma_forward_d128", 128, 128, 64 << 10),
                rule("attention_mma_backward_dkdv_d128", 128, 256, 98 << 10),
                rule("attention_mma_backward_dq_d128", 128, 256, 64 << 10),
            ],
            (Self::Any, _, Dtype::Bf16) => [
                rule("attention_forward_bf16", 64, 256, 0),
                rule("attention_backward_dkdv_bf16", 64, 256, 0),
                rule("attention_backward_dq_bf16", 64, 256, 0),
            ],
            (Self::Any, _, Dtype::F32) => [
                rule("attention_forward_f32", 64, 256, 0),
                rule("attention_backward_dkdv_f32", 64, 256, 0),
                rule("attention_backward_dq_f32", 64, 256, 0),
            ],
        }
    }
}

/// Places of the three kernels in a family.
const FORWARD: usize = 0;
const DKDV: usize = 1;
const DQ: usize = 2;

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
struct Rule {
    kernel: &'static str,
    /// Most rows of a tile.
    tile_rows: usize,
    threads: u32,
    shared_bytes: u32,
}

/// A kernel's tiles in the buffer.
#[derive(Debug, Clone, Copy, Default)]
struct List {
    address: u64,
    count: usize,
}

/// Start and end of a tile's rows, start and end of its sequence: CUDA's `int4`.
type Tile = [i32; 4];

/// Attention over one micro-batch after the other.
#[derive(Debug)]
pub(crate) struct Attention {
    heads: Heads,
    path: Path,
    rules: [Rule; 3],
    lists: [List; 3],
    tiles: Buffer,
    tokens: usize,
    max_tokens: usize,
}

impl Attention {
    /// Bytes that work lists of so many tokens take: at worst each token is a tile.
    pub(crate) fn bytes(max_tokens: usize) -> usize {
        3 * max_tokens * size_of::<Tile>()
    }

    /// Makes room for micro-batches of at most that many tokens.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`](crate::Error::DeviceMemory) where there is none.
    ///
    /// # Panics
    /// Where heads are no multiple of 8, larger than 256, or do not fit each other.
    pub(crate) fn new(gpu: &Rc<Gpu>, heads: Heads, max_tokens: usize) -> Result<Self> {
        Self::on(gpu, heads, max_tokens, Path::of(gpu, &heads))
    }

    fn on(gpu: &Rc<Gpu>, heads: Heads, max_tokens: usize, path: Path) -> Result<Self> {
        let head_dim = heads.head_dim;
        assert!(head_dim > 0 && head_dim.is_multiple_of(8) && head_dim <= MAX_HEAD_DIM, "heads of {head_dim}");
        assert!(heads.kv_heads > 0 && heads.heads.is_multiple_of(heads.kv_heads), "{heads:?}");
        assert!(i32::try_from(max_tokens).is_ok(), "{max_tokens} tokens");
        assert!(path.serves(gpu, &heads), "{path:?} for {heads:?}");
        let tiles = Buffer::new(gpu, Self::bytes(max_tokens))?;
        let rules = path.rules(&heads);
        Ok(Self { heads, path, rules, lists: Default::default(), tiles, tokens: 0, max_tokens })
    }

    /// Takes the sequences of the next micro-batch: their starts, and the end of the last.
    ///
    /// # Errors
    /// Sequences that do not cover the tokens, or what the driver says.
    ///
    /// # Panics
    /// Where there are more tokens than there is room for.
    pub(crate) fn set_sequences(&mut self, cu_seqlens: &[usize]) -> Result<()> {
        let tokens = cu_seqlens.last().copied().unwrap_or(0);
        check_sequences(cu_seqlens, tokens)?;
        assert!(tokens <= self.max_tokens, "{tokens} tokens where at most {} were announced", self.max_tokens);
        let works: [fn(&Tile) -> i32; 3] =
            [|tile| tile[1] - tile[2], |tile| tile[3] - tile[0], |tile| tile[1] - tile[2]];
        for (place, (rule, work)) in self.rules.iter().zip(works).enumerate() {
            let tiles = tiles(cu_seqlens, rule.tile_rows, work);
            let offset = place * self.max_tokens * size_of::<Tile>();
            self.tiles.write(offset, &tiles)?;
            self.lists[place] = List { address: self.tiles.at(offset), count: tiles.len() };
        }
        self.tokens = tokens;
        Ok(())
    }

    /// o (T, H · D) and lse (H, T) in f32, the natural logarithm of each row's sum of exponentials.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) fn forward(&self, inputs: Inputs<'_>, o: Mat<'_>, lse: Mat<'_>) -> Result<()> {
        self.check_inputs(inputs);
        self.check(o, self.heads.heads);
        self.check_statistics(lse);
        if self.tokens == 0 {
            return Ok(());
        }
        let Inputs { q, k, v } = inputs;
        let launch = self.launch(FORWARD)?;
        if self.path == Path::Hopper {
            let q = tensor_map(q, self.rules[FORWARD].tile_rows)?;
            let (k, v) = (tensor_map(k, HOPPER_FORWARD_KEYS)?, tensor_map(v, HOPPER_FORWARD_KEYS)?);
            let launch = launch.arg(&q).arg(&k).arg(&v).mat(o).pointer(lse);
            // SAFETY: the matrices' types and shapes were checked, the tiles cover their rows once.
            unsafe { self.work(launch, FORWARD).run() }
        } else {
            let launch = launch.mat(o).pointer(lse).mat(q).mat(k).mat(v);
            // SAFETY: as above.
            unsafe { self.work(launch, FORWARD).run() }
        }
    }

    /// dq, dk and dv from do; `delta` (H, T) in f32 is scratch.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) fn backward(&self, dout: Mat<'_>, saved: Saved<'_>, delta: Mat<'_>, out: Gradients<'_>) -> Result<()> {
        self.check_inputs(saved.inputs);
        self.check_inputs(Inputs { q: out.dq, k: out.dk, v: out.dv });
        self.check(dout, self.heads.heads);
        self.check(saved.o, self.heads.heads);
        self.check_statistics(saved.lse);
        self.check_statistics(delta);
        if self.tokens == 0 {
            return Ok(());
        }
        if self.path == Path::Hopper {
            return self.backward_hopper(dout, saved, delta, out);
        }
        self.delta(dout, saved.o, delta)?;
        let Inputs { q, k, v } = saved.inputs;
        let launch = self.launch(DKDV)?.mat(out.dk).mat(out.dv);
        let launch = launch.mat(q).mat(k).mat(v).mat(dout).pointer(saved.lse).pointer(delta);
        // SAFETY: the matrices' types and shapes were checked, the tiles cover their rows once.
        unsafe { self.work(launch, DKDV).run()? };
        let launch = self.launch(DQ)?.mat(out.dq);
        let launch = launch.mat(q).mat(k).mat(v).mat(dout).pointer(saved.lse).pointer(delta);
        // SAFETY: as above.
        unsafe { self.work(launch, DQ).run() }
    }

    /// The same; here dq makes delta too, so that it comes before dkdv.
    fn backward_hopper(&self, dout: Mat<'_>, saved: Saved<'_>, delta: Mat<'_>, out: Gradients<'_>) -> Result<()> {
        let map = |mat| tensor_map(mat, HOPPER_BACKWARD_ROWS);
        let Inputs { q, k, v } = saved.inputs;
        let (q, k, v, o, dout) = (map(q)?, map(k)?, map(v)?, map(saved.o)?, map(dout)?);
        let launch = self.launch(DQ)?.arg(&q).arg(&k).arg(&v).arg(&o).arg(&dout);
        let launch = launch.mat(out.dq).pointer(saved.lse).pointer(delta);
        // SAFETY: the matrices' types and shapes were checked, the tiles cover their rows once.
        unsafe { self.work(launch, DQ).run()? };
        let launch = self.launch(DKDV)?.arg(&q).arg(&k).arg(&v).arg(&dout);
        let launch = launch.mat(out.dk).mat(out.dv).pointer(saved.lse).pointer(delta);
        // SAFETY: as above.
        unsafe { self.work(launch, DKDV).run() }
    }

    fn delta(&self, dout: Mat<'_>, o: Mat<'_>, delta: Mat<'_>) -> Result<()> {
        let Heads { heads, head_dim, dtype, .. } = self.heads;
        let name = if dtype == Dtype::Bf16 { "attention_delta_bf16" } else { "attention_delta_f32" };
        let threads = self.tokens * heads * (head_dim / 8).next_power_of_two();
        let launch = self.gpu().launch(name)?.grid(blocks(threads.div_ceil(256)), 256);
        let launch = launch.pointer(delta).mat(dout).mat(o).int(self.tokens).int(heads).int(head_dim);
        // SAFETY: `backward` has checked types and shapes; each thread looks whether its row is there.
        unsafe { launch.run() }
    }

    fn gpu(&self) -> &Gpu {
        self.tiles.gpu()
    }

    /// A launch of forward, dkdv or dq without its arguments.
    fn launch(&self, kernel: usize) -> Result<Launch<'_>> {
        let (rule, heads) = (self.rules[kernel], self.heads);
        let items = self.lists[kernel].count * if kernel == DKDV { heads.kv_heads } else { heads.heads };
        // A block of Hopper's dq has two heads of an even group.
        let is_paired = kernel == DQ && self.path == Path::Hopper && heads.group().is_multiple_of(2);
        let items = if is_paired { items / 2 } else { items };
        let grid = match self.path {
            Path::Hopper if kernel != DKDV => blocks(items).min(self.gpu().multiprocessors),
            Path::Hopper | Path::Mma | Path::Any => blocks(items),
        };
        Ok(self.gpu().launch(rule.kernel)?.grid(grid, rule.threads).shared(rule.shared_bytes))
    }

    /// The arguments that all kernels end with.
    fn work<'a>(&self, launch: Launch<'a>, kernel: usize) -> Launch<'a> {
        let (list, heads) = (self.lists[kernel], self.heads);
        let launch = launch.long(list.address);
        // Hopper's dkdv has a block for each item: the grid says how many there are.
        let is_counted = self.path != Path::Hopper || kernel != DKDV;
        let launch = if is_counted { launch.int(list.count) } else { launch };
        let launch = launch.int(self.tokens).int(heads.heads).int(heads.group());
        let launch = if self.path == Path::Any { launch.int(heads.head_dim) } else { launch };
        launch.float(1.0 / (heads.head_dim as f32).sqrt())
    }

    fn check_inputs(&self, inputs: Inputs<'_>) {
        self.check(inputs.q, self.heads.heads);
        self.check(inputs.k, self.heads.kv_heads);
        self.check(inputs.v, self.heads.kv_heads);
    }

    /// A matrix of so many heads a token, aligned as the kernels want it.
    fn check(&self, mat: Mat<'_>, heads: usize) {
        assert_eq!(mat.shape(), (self.tokens, heads * self.heads.head_dim), "attention: tokens and heads");
        assert_eq!(mat.dtype, self.heads.dtype, "attention: type");
        assert!(
            mat.pointer.is_multiple_of(16) && mat.stride.is_multiple_of(8),
            "attention: {} values at {:#x}",
            mat.stride,
            mat.pointer
        );
    }

    /// A dense (H, T) matrix of f32.
    fn check_statistics(&self, mat: Mat<'_>) {
        assert_eq!(mat.shape(), (self.heads.heads, self.tokens), "attention: lse and delta are (H, T)");
        assert!(mat.dtype == Dtype::F32 && mat.stride == self.tokens, "attention: lse and delta are dense f32");
    }
}

fn blocks(count: usize) -> u32 {
    u32::try_from(count).expect("blocks fit 32 bits: tokens do")
}

/// Tiles of at most that many rows that cover all sequences, those with the longest work first.
fn tiles(cu_seqlens: &[usize], rows: usize, work: fn(&Tile) -> i32) -> Vec<Tile> {
    let number = |value| i32::try_from(value).expect("tokens fit 31 bits: checked when the room for them was made");
    let mut tiles = Vec::new();
    for ends in cu_seqlens.windows(2) {
        for start in (ends[0]..ends[1]).step_by(rows) {
            tiles.push([start, ends[1].min(start + rows), ends[0], ends[1]].map(number));
        }
    }
    tiles.sort_by_key(|tile| Reverse(work(tile)));
    tiles
}

/// A bf16 matrix for the tensor copy engine, in boxes of so many rows, with zeros beyond its edges.
fn tensor_map(mat: Mat<'_>, box_rows: usize) -> Result<sys::CUtensorMap> {
    let mut map = MaybeUninit::<sys::CUtensorMap>::uninit();
    let (sizes, strides) = ([mat.columns as u64, mat.rows as u64], [(mat.stride * mat.dtype.bytes()) as u64]);
    let (box_sizes, steps) = ([BOX_COLUMNS, box_rows as u32], [1, 1]);
    // SAFETY: all arrays have as many members as two dimensions need; the matrix lies within its buffer.
    let encoded = unsafe {
        sys::cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            mat.pointer as *mut std::ffi::c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            box_sizes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    encoded.result().map_err(failed("describing a matrix to the tensor copy engine"))?;
    // SAFETY: the driver has filled it.
    Ok(unsafe { map.assume_init() })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Held, assert_near, gpu, random, rounded, tolerance};
    use super::*;
    use crate::ops::{attention as twin, host, tensor};

    #[test]
    fn tiles_cover_each_row_once_longest_work_first() {
        let forward = tiles(&[0, 0, 130, 131, 400], 64, |tile| tile[1] - tile[2]);
        let mut rows = vec![0; 400];
        for tile in &forward {
            assert!(tile[1] - tile[0] <= 64 && tile[2] <= tile[0] && tile[1] <= tile[3]);
            (tile[0]..tile[1]).for_each(|row| rows[row as usize] += 1);
        }
        assert!(rows.iter().all(|&count| count == 1));
        assert_eq!(forward[0], [387, 400, 131, 400]);
        assert!(forward.is_sorted_by_key(|tile| Reverse(tile[1] - tile[2])));
        assert_eq!(tiles(&[0, 130], 64, |tile| tile[3] - tile[0])[0], [0, 64, 0, 130]);
        assert!(tiles(&[0], 64, |tile| tile[0]).is_empty());
    }

    /// Columns of one wide matrix, as a projection of q, k and v gives them.
    struct Qkv(Held);

    impl Qkv {
        fn inputs(&self, heads: &Heads) -> Inputs<'_> {
            let (queries, keys) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
            let all = self.0.mat();
            let [q, k, v] =
                [(0, queries), (queries, keys), (queries + keys, keys)].map(|(at, count)| all.columns(at, count));
            Inputs { q, k, v }
        }

        /// Values as q, k and v, each dense.
        fn parts(heads: &Heads, values: &[f32]) -> [Vec<f32>; 3] {
            let (queries, keys) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
            let part = |at: usize, count| {
                values.chunks(queries + 2 * keys).flat_map(|row| row[at..at + count].to_vec()).collect()
            };
            [part(0, queries), part(queries, keys), part(queries + keys, keys)]
        }
    }

    fn compare(gpu: &Rc<Gpu>, path: Path, heads: Heads, cu_seqlens: &[usize]) {
        let Heads { heads: count, kv_heads, head_dim, dtype } = heads;
        let (tokens, width) = (cu_seqlens[cu_seqlens.len() - 1], (count + 2 * kv_heads) * head_dim);
        let values = rounded(&random(1, tokens * width), dtype);
        let dout = rounded(&random(2, tokens * count * head_dim), dtype);
        let shape = (tokens, count * head_dim);

        let mut attention = Attention::on(gpu, heads, tokens, path).unwrap();
        attention.set_sequences(cu_seqlens).unwrap();
        let qkv = Qkv(Held::of(gpu, &values, (tokens, width), width + 8, dtype));
        let dqkv = Qkv(Held::poisoned(gpu, (tokens, width), width + 24, dtype));
        let device_dout = Held::of(gpu, &dout, shape, shape.1 + 16, dtype);
        let o = Held::poisoned(gpu, shape, shape.1 + 40, dtype);
        let [lse, delta] = [0, 1].map(|_| Held::poisoned(gpu, (count, tokens), tokens, Dtype::F32));
        attention.forward(qkv.inputs(&heads), o.mat(), lse.mat()).unwrap();
        let saved = Saved { inputs: qkv.inputs(&heads), o: o.mat(), lse: lse.mat() };
        let Inputs { q: dq, k: dk, v: dv } = dqkv.inputs(&heads);
        attention.backward(device_dout.mat(), saved, delta.mat(), Gradients { dq, dk, dv }).unwrap();

        let [q, k, v] = Qkv::parts(&heads, &values);
        let q = tensor(q, (tokens, count, head_dim)).unwrap();
        let [k, v] = [k, v].map(|values| tensor(values, (tokens, kv_heads, head_dim)).unwrap());
        let dout = tensor(dout, (tokens, count, head_dim)).unwrap();
        let (host_o, host_lse) = twin::forward(&q, &k, &v, cu_seqlens).unwrap();
        let saved = twin::Saved { q: &q, k: &k, v: &v, o: &host_o, lse: &host_lse };
        let (dq, dk, dv) = twin::backward(&dout, saved, cu_seqlens).unwrap();
        let name = |part| format!("{part} of {path:?} {heads:?} {cu_seqlens:?}");
        let near = |part, ours: &[f32], reference| {
            assert_near(&name(part), ours, &host(reference).unwrap(), tolerance(dtype));
        };
        near("o", &o.values(), &host_o);
        let host_lse = host_lse.t().unwrap().contiguous().unwrap();
        assert_near(&name("lse"), &lse.values(), &host(&host_lse).unwrap(), 1e-5);
        let [our_dq, our_dk, our_dv] = Qkv::parts(&heads, &dqkv.0.values());
        near("dv", &our_dv, &dv);
        // A lone token's p is 1 whatever q and k are: its dq and dk are rounding errors.
        if tokens > cu_seqlens.len() {
            near("dq", &our_dq, &dq);
            near("dk", &our_dk, &dk);
        }
    }

    const SHORT_ROWS: [&[usize]; 4] = [&[0, 1], &[0, 5, 12], &[0, 0, 3, 3, 7, 150], &[0, 64, 192, 193]];
    const LONG_ROWS: [&[usize]; 1] = [&[0, 300, 301, 400, 777]];

    fn compare_all(path: Path, dtype: Dtype, sequences: &[&[usize]]) {
        let Some(gpu) = gpu() else { return };
        for (heads, kv_heads, head_dim) in [(1, 1, 8), (4, 4, 40), (6, 2, 64), (8, 2, 128), (3, 1, 72), (4, 1, 256)] {
            let heads = Heads { heads, kv_heads, head_dim, dtype };
            if path.serves(&gpu, &heads) {
                sequences.iter().for_each(|cu_seqlens| compare(&gpu, path, heads, cu_seqlens));
            }
        }
    }

    #[test]
    fn hopper_computes_what_the_cpu_computes() {
        compare_all(Path::Hopper, Dtype::Bf16, &SHORT_ROWS);
        compare_all(Path::Hopper, Dtype::Bf16, &LONG_ROWS);
    }

    #[test]
    fn mma_computes_what_the_cpu_computes() {
        compare_all(Path::Mma, Dtype::Bf16, &SHORT_ROWS);
        compare_all(Path::Mma, Dtype::Bf16, &LONG_ROWS);
    }

    // Apart, because under racecheck each takes minutes.
    #[test]
    fn any_head_size_computes_in_bf16_what_the_cpu_computes() {
        compare_all(Path::Any, Dtype::Bf16, &SHORT_ROWS);
    }

    #[test]
    fn any_head_size_computes_in_f32_what_the_cpu_computes() {
        compare_all(Path::Any, Dtype::F32, &SHORT_ROWS);
    }

    #[test]
    fn any_head_size_computes_long_rows_in_bf16_as_the_cpu() {
        compare_all(Path::Any, Dtype::Bf16, &LONG_ROWS);
    }

    #[test]
    fn any_head_size_computes_long_rows_in_f32_as_the_cpu() {
        compare_all(Path::Any, Dtype::F32, &LONG_ROWS);
    }

    #[test]
    fn no_token_is_no_work() {
        let Some(gpu) = gpu() else { return };
        let heads = Heads { heads: 2, kv_heads: 1, head_dim: 64, dtype: Dtype::Bf16 };
        let mut attention = Attention::new(&gpu, heads, 0).unwrap();
        attention.set_sequences(&[0]).unwrap();
        let qkv = Qkv(Held::poisoned(&gpu, (0, 256), 256, Dtype::Bf16));
        let (o, lse) = (Held::poisoned(&gpu, (0, 128), 128, Dtype::Bf16), Held::poisoned(&gpu, (2, 0), 0, Dtype::F32));
        attention.forward(qkv.inputs(&heads), o.mat(), lse.mat()).unwrap();
        gpu.synchronize().unwrap();
    }
}
