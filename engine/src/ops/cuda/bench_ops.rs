//! `lorad bench ops`: each kernel alone at the sizes of Llama-3-8B and 2 × 2048 tokens, against what its bytes or operations take at least
//! at the rates of a large copy and a large product, measured in the same run.

use std::cell::Cell;
use std::rc::Rc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::attention::{self, Attention, Gradients, Heads, Inputs};
use super::bench::{Rates, median_ms, take};
use super::buffers::Head;
use super::cross_entropy::{Labels, Losses};
use super::gemm::Product;
use super::sizes::{Group, Sizes, aligned};
use super::weights::{DeviceWeight, fill_lora};
use super::{Buffer, Dtype, Gpu, Mat, adamw, dequantize, dropout, lora, random, rms_norm, rope, swiglu};
use crate::Result;
use crate::adapter::LoraLayout;
use crate::bench::{BenchQuantization, BenchShape};
use crate::device::Device;
use crate::ops::adamw::Update;
use crate::ops::dropout::Dropout;
use crate::spec::{Target, TrainSpec};
use crate::testing::normal;

/// Tokens of the micro-batch, in rows of so many.
const TOKENS: usize = 4096;
const ROW: usize = 2048;
const RUNS: usize = 20;
const DTYPE: Dtype = Dtype::Bf16;

/// What a run must do at least.
enum Work {
    /// Bytes that it reads and writes.
    Bytes(usize),
    /// Operations on the tensor cores.
    Operations(f64),
}

struct Bench {
    gpu: Rc<Gpu>,
    rates: Rates,
    /// Random bf16 values, cut into the operands of one op after the other.
    room: Buffer,
    taken: Cell<usize>,
    lines: Vec<Value>,
}

/// Times each kernel; one JSON object a kernel and size.
pub(crate) fn bench_ops(device: Device) -> Result<Vec<Value>> {
    let mut bench = Bench::new(take(device)?)?;
    elementwise(&mut bench)?;
    weights(&mut bench)?;
    lora_products(&mut bench)?;
    attentions(&mut bench)?;
    loss_and_optimizer(&mut bench)?;
    large_products(&mut bench)?;
    Ok(bench.lines)
}

impl Bench {
    fn new(gpu: Rc<Gpu>) -> Result<Self> {
        let rates = Rates::measure(&gpu)?;
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let unit: Vec<u16> = (0..1 << 20).map(|_| half::bf16::from_f32(normal(&mut random)).to_bits()).collect();
        let room = Buffer::new(&gpu, 6 << 30)?;
        room.write(0, &unit)?;
        room.repeat(size_of_val(&unit[..]))?;
        Ok(Self { gpu, rates, room, taken: Cell::new(0), lines: Vec::new() })
    }

    /// The next matrix.
    fn mat(&self, rows: usize, columns: usize, dtype: Dtype) -> Mat<'_> {
        let (offset, stride) = (self.taken.get(), aligned(columns));
        self.taken.set(offset + (rows * stride * dtype.bytes()).next_multiple_of(256));
        self.room.mat(offset, (rows, columns), stride, dtype)
    }

    /// Times an op, and starts anew with the room.
    fn line(&self, op: &str, size: &str, work: &Work, run: &dyn Fn() -> Result<()>) -> Result<Value> {
        let ms = median_ms(&self.gpu, RUNS, run)?;
        self.taken.set(0);
        let rounded = |value: f64| (value * 1000.0).round() / 1000.0;
        let (floor_ms, rate) = match *work {
            Work::Bytes(bytes) => {
                let bytes = bytes as f64;
                (bytes / self.rates.copy * 1e3, json!({ "gb_per_second": rounded(bytes / ms / 1e6) }))
            }
            Work::Operations(count) => {
                (count / self.rates.matrix * 1e3, json!({ "tflops": rounded(count / ms / 1e9) }))
            }
        };
        let mut line = json!({
            "op": op, "size": size, "microseconds": rounded(ms * 1e3), "floor_microseconds": rounded(floor_ms * 1e3),
            "share_of_floor": rounded(floor_ms / ms),
        });
        if let (Some(line), Value::Object(rate)) = (line.as_object_mut(), rate) {
            line.extend(rate);
        }
        Ok(line)
    }
}

/// Bytes of matrices, each read or written once.
fn bytes(mats: &[Mat<'_>]) -> Work {
    Work::Bytes(mats.iter().map(|mat| mat.rows * mat.columns * mat.dtype.bytes()).sum())
}

fn sizes() -> (Sizes, std::sync::Arc<LoraLayout>) {
    let shape = BenchShape::Llama3_8B.shape();
    let layout = LoraLayout::new(&TrainSpec::default().lora, &shape);
    (Sizes::new(&shape, &layout), layout)
}

fn elementwise(bench: &mut Bench) -> Result<()> {
    let (sizes, _) = sizes();
    let (gpu, shape) = (&bench.gpu, &sizes.shape);
    let (width, inner) = (shape.hidden, shape.intermediate);
    let mut lines = Vec::new();
    let named = format!("{TOKENS}x{width}");

    let (x, y, dy, dresidual) = (
        bench.mat(TOKENS, width, DTYPE),
        bench.mat(TOKENS, width, DTYPE),
        bench.mat(TOKENS, width, DTYPE),
        bench.mat(TOKENS, width, DTYPE),
    );
    let (weight, rstd) = (bench.mat(1, width, Dtype::F32), bench.mat(1, TOKENS, Dtype::F32));
    let work = bytes(&[x, y]);
    lines.push(bench.line("rms_norm_forward", &named, &work, &|| rms_norm::forward(gpu, y, rstd, x, weight, 1e-5))?);
    let from = rms_norm::Backward { dy, x, weight, rstd };
    let work = bytes(&[x, dy, dresidual, dresidual, y]);
    let run = || rms_norm::backward_add(gpu, dresidual, Some(y), from);
    lines.push(bench.line("rms_norm_backward", &named, &work, &run)?);

    let (gate_up, h) = (bench.mat(TOKENS, 2 * inner, DTYPE), bench.mat(TOKENS, inner, DTYPE));
    let named = format!("{TOKENS}x{inner}");
    let work = bytes(&[gate_up, h]);
    lines.push(bench.line("swiglu_forward", &named, &work, &|| swiglu::forward(gpu, h, gate_up))?);
    let (gate_up, h) = (bench.mat(TOKENS, 2 * inner, DTYPE), bench.mat(TOKENS, inner, DTYPE));
    let work = bytes(&[gate_up, gate_up, h, h]);
    let run = || swiglu::backward(gpu, gate_up, Some(h), h, gate_up);
    lines.push(bench.line("swiglu_backward", &named, &work, &run)?);

    let qk = bench.mat(TOKENS, sizes.queries() + sizes.keys(), DTYPE);
    let table = bench.mat(TOKENS, shape.head_dim, Dtype::F32);
    let work = bytes(&[qk, qk, table]);
    let run = || rope::forward(gpu, qk, table, shape.head_dim, shape.rope_layout);
    lines.push(bench.line("rope", &format!("{TOKENS}x{}", qk.columns), &work, &run)?);

    let (x, y) = (bench.mat(TOKENS, width, DTYPE), bench.mat(TOKENS, width, DTYPE));
    if let Some(mask) = Dropout::new(0.1, &[1]) {
        let work = bytes(&[x, y]);
        lines.push(bench.line("dropout", &format!("{TOKENS}x{width}"), &work, &|| dropout::apply(gpu, y, x, &mask))?);
    }
    bench.lines.extend(lines);
    Ok(())
}

/// Dequantization of gate_proj from every stored type, and the LoRA's part of W'.
fn weights(bench: &mut Bench) -> Result<()> {
    let (sizes, layout) = sizes();
    let (rows, columns) = sizes.shape.projection(Target::GateProj);
    let mut lines = Vec::new();
    for quantization in BenchQuantization::all() {
        let weight: DeviceWeight = random::matrix(&bench.gpu, (rows, columns), quantization)?;
        let out = bench.mat(rows, columns, DTYPE);
        let stored = random::stored_bytes((rows, columns), quantization);
        let work = Work::Bytes(stored + rows * columns * DTYPE.bytes());
        let named = format!("{rows}x{columns}");
        let run = || dequantize::dequantize(&bench.gpu, &weight, out);
        lines.push(bench.line(&format!("dequantize_{}", quantization.name()), &named, &work, &run)?);
    }
    let parameters = Buffer::zeros(&bench.gpu, 4 * layout.len())?;
    for group in Group::ALL {
        let of = sizes.group(group);
        let out = bench.mat(of.rows(), of.stride, DTYPE);
        let work = Work::Bytes(6 * of.extension * (of.inputs + of.outputs));
        let run = || fill_lora(&bench.gpu, (0, group), &sizes, (&layout, &parameters), out);
        lines.push(bench.line("lora_fill", &format!("{group:?}"), &work, &run)?);
    }
    bench.lines.extend(lines);
    Ok(())
}

fn lora_products(bench: &mut Bench) -> Result<()> {
    let (sizes, _) = sizes();
    let gpu = &bench.gpu;
    let mut lines = Vec::new();
    for group in Group::ALL {
        let of = sizes.group(group);
        let named = format!("{group:?}");
        let partials = lora::partial_values(&sizes, TOKENS);
        let (x, dy) =
            (bench.mat(TOKENS, of.inputs + of.extension, DTYPE), bench.mat(TOKENS, of.outputs + of.extension, DTYPE));
        let (weight, kept) = (bench.mat(of.rows(), of.stride, DTYPE), bench.mat(TOKENS, of.extension, DTYPE));
        let partials = bench.mat(1, partials, Dtype::F32);
        let rank = sizes.padded_rank;
        let targets = group.targets();
        let db: Vec<Option<Mat<'_>>> =
            targets.iter().map(|&target| Some(bench.mat(sizes.shape.projection(target).0, rank, Dtype::F32))).collect();
        let da: Vec<Option<Mat<'_>>> = targets.iter().map(|_| Some(bench.mat(rank, of.inputs, Dtype::F32))).collect();
        let columns: Vec<usize> = targets.iter().map(|&target| sizes.shape.projection(target).0).collect();
        let (inputs, extension) = (x.columns(0, of.inputs), x.columns(of.inputs, of.extension));
        let a = weight.rows(of.outputs, of.extension).columns(0, of.inputs);
        let work = bytes(&[inputs, a, extension, kept]);
        let run = || lora::u(gpu, partials, inputs, a, extension, Some(kept));
        lines.push(bench.line("lora_u", &named, &work, &run)?);

        let (outputs, du) = (dy.columns(0, of.outputs), dy.columns(of.outputs, of.extension));
        let scaled_b = weight.rows(0, of.outputs).columns(of.inputs, of.extension);
        let of_outputs = lora::Outputs { dy: outputs, columns: &columns, u: kept, scaled_b, scale: 1e-3 };
        let gradients: usize = columns.iter().map(|rows| 8 * rows * rank).sum();
        let work = Work::Bytes(2 * TOKENS * (of.outputs + 2 * of.extension) + gradients);
        let run = || lora::backward_outputs(gpu, partials, du, &db, &of_outputs);
        lines.push(bench.line("lora_du_db", &named, &work, &run)?);

        let work = Work::Bytes(2 * TOKENS * (of.inputs + of.extension) + 8 * of.extension * of.inputs);
        lines.push(bench.line("lora_da", &named, &work, &|| lora::da(gpu, partials, &da, (du, inputs)))?);
    }
    bench.lines.extend(lines);
    Ok(())
}

fn attentions(bench: &mut Bench) -> Result<()> {
    let (sizes, _) = sizes();
    let shape = &sizes.shape;
    let (queries, keys) = (sizes.queries(), sizes.keys());
    let mut lines = Vec::new();
    for row in [ROW, 2 * ROW, 4 * ROW] {
        let tokens = TOKENS.max(row);
        let heads = Heads { heads: shape.heads, kv_heads: shape.kv_heads, head_dim: shape.head_dim, dtype: DTYPE };
        let mut attention = Attention::new(&bench.gpu, heads, tokens)?;
        let starts: Vec<usize> = (0..=tokens / row).map(|number| number * row).collect();
        attention.set_sequences(&starts)?;
        let (qkv, dqkv) = (bench.mat(tokens, queries + 2 * keys, DTYPE), bench.mat(tokens, queries + 2 * keys, DTYPE));
        let (o, dout) = (bench.mat(tokens, queries, DTYPE), bench.mat(tokens, queries, DTYPE));
        let [lse, delta] = [0, 1].map(|_| {
            let offset = bench.taken.get();
            bench.taken.set(offset + (4 * shape.heads * tokens).next_multiple_of(256));
            bench.room.mat(offset, (shape.heads, tokens), tokens, Dtype::F32)
        });
        let inputs =
            Inputs { q: qkv.columns(0, queries), k: qkv.columns(queries, keys), v: qkv.columns(queries + keys, keys) };
        let out = Gradients {
            dq: dqkv.columns(0, queries),
            dk: dqkv.columns(queries, keys),
            dv: dqkv.columns(queries + keys, keys),
        };
        // The half of the scores that is not masked, two products forward and five backward.
        let forward = 2.0 * (tokens / row) as f64 * (row * row) as f64 * queries as f64;
        let named = format!("{}x{row}", tokens / row);
        let work = Work::Operations(forward);
        lines.push(bench.line("attention_forward", &named, &work, &|| attention.forward(inputs, o, lse))?);
        let saved = attention::Saved { inputs, o, lse };
        let work = Work::Operations(2.5 * forward);
        let run = || attention.backward(dout, saved, delta, out);
        lines.push(bench.line("attention_backward", &named, &work, &run)?);
    }
    bench.lines.extend(lines);
    Ok(())
}

fn loss_and_optimizer(bench: &mut Bench) -> Result<()> {
    let (sizes, layout) = sizes();
    let (gpu, vocabulary) = (&bench.gpu, sizes.shape.vocabulary);
    let mut lines = Vec::new();
    let rows = Head::rows_at_once(vocabulary);
    let losses = Losses::new(gpu, rows)?;
    let numbers: Vec<i32> = (0..rows as i32).map(|row| row * 97 % vocabulary as i32).collect();
    let labels = Buffer::of(gpu, &numbers)?;
    let labels = Labels { buffer: &labels, first: 0 };
    let (logits, dlogits) = (bench.mat(rows, vocabulary, Dtype::F32), bench.mat(rows, vocabulary, DTYPE));
    let work = bytes(&[logits, dlogits]);
    let run = || losses.forward_backward(gpu, dlogits, logits, labels, 1e-3);
    lines.push(bench.line("cross_entropy", &format!("{rows}x{vocabulary}"), &work, &run)?);

    let count = layout.len();
    let (p, g) = (Buffer::zeros(gpu, 4 * count)?, Buffer::zeros(gpu, 4 * count)?);
    let moments = Buffer::zeros(gpu, 8 * count)?;
    let (p, g) = (p.row(Dtype::F32), g.row(Dtype::F32));
    let moments = moments.mat(0, (2, count), count, Dtype::F32);
    let update = Update { step: 1, learning_rate: 1e-5, weight_decay: 0.01, clip_factor: 1.0 };
    let named = format!("{count}");
    let work = Work::Bytes(28 * count);
    lines.push(bench.line("adamw_step", &named, &work, &|| adamw::step(gpu, p, moments, g, update))?);
    bench.lines.extend(lines);
    Ok(())
}

fn large_products(bench: &mut Bench) -> Result<()> {
    let (sizes, _) = sizes();
    let gpu = &bench.gpu;
    let mut lines = Vec::new();
    for group in Group::ALL {
        let of = sizes.group(group);
        let weight = bench.mat(of.rows(), of.stride, DTYPE);
        let (x, dy) = (bench.mat(TOKENS, of.stride, DTYPE), bench.mat(TOKENS, of.rows(), DTYPE));
        let (y, depth) = (dy.columns(0, of.outputs), of.inputs + of.extension);
        let named = format!("{group:?} {TOKENS}x{}x{}", of.outputs, of.inputs);
        // What the LoRA adds to the depth is no part of the floor.
        let work = Work::Operations(2.0 * TOKENS as f64 * (of.outputs * of.inputs) as f64);
        let forward = Product::nt(x.columns(0, depth), weight.rows(0, of.outputs).columns(0, depth));
        lines.push(bench.line("product_forward", &named, &work, &|| gpu.gemm("gemm", y, forward))?);
        let backward = Product::nn(dy, weight.columns(0, of.inputs));
        let dx = x.columns(0, of.inputs);
        lines.push(bench.line("product_backward", &named, &work, &|| gpu.gemm("gemm", dx, backward))?);
    }
    bench.lines.extend(lines);
    Ok(())
}
