//! The hand-written backward of the whole model against candle's autograd of the naive formula in f64, and ways of computing
//! the same batch that must agree.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use candle_core::{D, DType, Device, Tensor, Var};
use lorad_engine::adapter::{LoraLayout, LoraParams};
use lorad_engine::data::{MicroBatch, Row};
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::weights::{Weight, vector};
use lorad_engine::model::{Llama, MicroStep};
use lorad_engine::ops::dropout::Dropout;
use lorad_engine::ops::matmul::Compute;
use lorad_engine::spec::{LoraSpec, Target};
use lorad_engine::testing::TinyModel;
use support::{lora_spec, random_lora, rows, tiny};

/// The model's formula on candle tensors in f64: no packing, no chunks, no saved activations.
struct Naive {
    file: GgufFile,
    model: Llama,
    spec: LoraSpec,
    /// A and B of every pair, in the order of the flat buffer.
    vars: Vec<Var>,
}

impl Naive {
    fn new(model: &TinyModel, lora: &LoraParams) -> Self {
        let (file, model) = tiny(model);
        let double = |x: &Tensor| Var::from_tensor(&x.to_dtype(DType::F64).unwrap()).unwrap();
        let pairs = lora.projections().map(|(layer, target)| lora.pair(layer, target).unwrap());
        let vars = pairs.flat_map(|pair| [double(&pair.lora_a), double(&pair.lora_b)]).collect();
        Self { file, model, spec: lora.layout().spec().clone(), vars }
    }

    fn matrix(&self, name: &str) -> Tensor {
        let info = self.file.tensor(name).unwrap();
        let (rows, columns) = (info.shape[0], info.shape[1]);
        let mut values = vec![0f32; rows * columns];
        Weight::from_gguf(&self.file, name, (rows, columns)).unwrap().dequantize_rows(0..rows, &mut values).unwrap();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
    }

    fn norm(&self, x: &Tensor, name: &str) -> Tensor {
        let values = vector(&self.file, name, x.dim(1).unwrap()).unwrap();
        let weight = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        let mean = x.sqr().unwrap().mean_keepdim(1).unwrap();
        let rms = (mean + f64::from(self.model.config().rms_norm_eps)).unwrap().sqrt().unwrap();
        x.broadcast_div(&rms).unwrap().broadcast_mul(&weight).unwrap()
    }

    fn project(&self, x: &Tensor, layer: usize, target: Target, name: &str) -> Tensor {
        let weight = self.matrix(&format!("blk.{layer}.{name}.weight"));
        let y = x.matmul(&weight.t().unwrap()).unwrap();
        let Some(place) = self.spec.target_modules.iter().position(|&t| t == target) else { return y };
        let first = 2 * (layer * self.spec.target_modules.len() + place);
        let (a, b) = (self.vars[first].t().unwrap(), self.vars[first + 1].t().unwrap());
        (y + (x.matmul(&a).unwrap().matmul(&b).unwrap() * self.spec.scale()).unwrap()).unwrap()
    }

    /// Pairs of neighbours turned by position · frequency.
    fn rope(&self, x: &Tensor) -> Tensor {
        let (tokens, width) = x.dims2().unwrap();
        let frequencies = &self.model.config().rope_frequencies;
        let heads = width / (2 * frequencies.len());
        let angles: Vec<f64> = (0..tokens)
            .flat_map(|t| (0..heads).flat_map(move |_| frequencies.iter().map(move |f| t as f64 * f)))
            .collect();
        let angles = Tensor::from_vec(angles, (tokens, width / 2, 1), &Device::Cpu).unwrap();
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let pairs = x.reshape((tokens, width / 2, 2)).unwrap();
        let (a, b) = (pairs.narrow(2, 0, 1).unwrap(), pairs.narrow(2, 1, 1).unwrap());
        let first = ((&a * &cos).unwrap() - (&b * &sin).unwrap()).unwrap();
        let second = ((&a * &sin).unwrap() + (&b * &cos).unwrap()).unwrap();
        Tensor::cat(&[first, second], 2).unwrap().reshape((tokens, width)).unwrap()
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let shape = &self.model.config().shape;
        let (tokens, head_dim) = (q.dim(0).unwrap(), shape.head_dim);
        let mask: Vec<f64> =
            (0..tokens * tokens).map(|at| if at % tokens <= at / tokens { 0.0 } else { f64::NEG_INFINITY }).collect();
        let mask = Tensor::from_vec(mask, (tokens, tokens), &Device::Cpu).unwrap();
        let heads: Vec<Tensor> = (0..shape.heads)
            .map(|head| {
                let kv_head = head / (shape.heads / shape.kv_heads);
                let pick = |x: &Tensor, head| x.narrow(1, head * head_dim, head_dim).unwrap().contiguous().unwrap();
                let (q, k, v) = (pick(q, head), pick(k, kv_head), pick(v, kv_head));
                let scores = (q.matmul(&k.t().unwrap()).unwrap() / (head_dim as f64).sqrt()).unwrap();
                softmax(&(scores + &mask).unwrap()).matmul(&v).unwrap()
            })
            .collect();
        Tensor::cat(&heads, 1).unwrap()
    }

    fn logits(&self, tokens: &[u32]) -> Tensor {
        let ids = Tensor::new(tokens, &Device::Cpu).unwrap();
        let mut x = self.matrix("token_embd.weight").index_select(&ids, 0).unwrap();
        for layer in 0..self.model.config().shape.layers {
            let n = self.norm(&x, &format!("blk.{layer}.attn_norm.weight"));
            let q = self.rope(&self.project(&n, layer, Target::QProj, "attn_q"));
            let k = self.rope(&self.project(&n, layer, Target::KProj, "attn_k"));
            let v = self.project(&n, layer, Target::VProj, "attn_v");
            let o = self.attention(&q, &k, &v);
            x = (x + self.project(&o, layer, Target::OProj, "attn_output")).unwrap();
            let n = self.norm(&x, &format!("blk.{layer}.ffn_norm.weight"));
            let gate = self.project(&n, layer, Target::GateProj, "ffn_gate");
            let up = self.project(&n, layer, Target::UpProj, "ffn_up");
            let sigmoid = (gate.neg().unwrap().exp().unwrap() + 1.0).unwrap().recip().unwrap();
            let h = ((gate * sigmoid).unwrap() * up).unwrap();
            x = (x + self.project(&h, layer, Target::DownProj, "ffn_down")).unwrap();
        }
        let n = self.norm(&x, "output_norm.weight");
        let output = if self.file.tensor("output.weight").is_some() { "output.weight" } else { "token_embd.weight" };
        n.matmul(&self.matrix(output).t().unwrap()).unwrap()
    }

    /// Σ of the losses of a row's trained tokens.
    fn loss(&self, row: &Row) -> Tensor {
        let logits = self.logits(&row.tokens);
        let max = logits.max_keepdim(D::Minus1).unwrap().detach();
        let sum = logits.broadcast_sub(&max).unwrap().exp().unwrap().sum_keepdim(D::Minus1).unwrap();
        let log_sum = (sum.log().unwrap() + max).unwrap();
        let places: Vec<usize> = (1..row.tokens.len()).filter(|&t| row.trained[t]).collect();
        let losses: Vec<Tensor> = places
            .iter()
            .map(|&t| {
                let target = logits.get(t - 1).unwrap().get(row.tokens[t] as usize).unwrap();
                (log_sum.get(t - 1).unwrap().get(0).unwrap() - target).unwrap()
            })
            .collect();
        Tensor::stack(&losses, 0).unwrap().sum_all().unwrap()
    }
}

/// Checks the autograd gradient of a formula against finite differences along a direction that moves every parameter.
fn check_formula(base: &TinyModel, lora: &LoraParams, rows: &[Row], gradient: &[f32]) {
    let values: Vec<f32> = lora.flat().to_vec1().unwrap();
    let direction: Vec<f64> = (0..values.len()).map(|place| ((place * 7919 + 13) % 101) as f64 / 50.0 - 1.0).collect();
    let step = 1e-5;
    let at = |sign: f64| {
        let naive = Naive::new(base, lora);
        let mut place = 0;
        for var in &naive.vars {
            let moved = &direction[place..place + var.elem_count()];
            place += var.elem_count();
            let moved = Tensor::new(moved, &Device::Cpu).unwrap().reshape(var.shape()).unwrap();
            var.set(&(var.as_tensor() + (moved * (sign * step)).unwrap()).unwrap()).unwrap();
        }
        rows.iter().map(|row| naive.loss(row).to_scalar::<f64>().unwrap()).sum::<f64>() * 0.125
    };
    let numeric = (at(1.0) - at(-1.0)) / (2.0 * step);
    let exact: f64 = gradient.iter().zip(&direction).map(|(&g, d)| f64::from(g) * d).sum();
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let scale = norm(&mut gradient.iter().map(|&g| f64::from(g))) * norm(&mut direction.iter().copied());
    assert!((numeric - exact).abs() <= 1e-6 * scale, "{numeric} against {exact}, of {scale}");
}

fn softmax(scores: &Tensor) -> Tensor {
    let max = scores.max_keepdim(D::Minus1).unwrap().detach();
    let e = scores.broadcast_sub(&max).unwrap().exp().unwrap();
    e.broadcast_div(&e.sum_keepdim(D::Minus1).unwrap()).unwrap()
}

/// Every block keeps its activations, nothing is dropped.
const PLAIN: MicroStep = MicroStep { scale: 0.125, kept_layers: usize::MAX, dropout: None, compute: Compute::F32 };

/// Loss and flat gradient of one packed batch.
fn ours(model: &Llama, lora: &LoraParams, rows: &[Row], step: MicroStep) -> (f64, Vec<f32>) {
    of_batch(model, lora, &MicroBatch::pack(rows), step)
}

fn of_batch(model: &Llama, lora: &LoraParams, batch: &MicroBatch, step: MicroStep) -> (f64, Vec<f32>) {
    let gradient = LoraParams::zeros(lora.layout().clone()).unwrap();
    let loss = model.forward_backward(batch, lora, &gradient, step).unwrap();
    assert_eq!(loss.tokens, batch.trained_tokens());
    if step.dropout.is_none() {
        assert_eq!(model.evaluate(batch, lora, step.compute).unwrap(), loss);
    }
    (loss.sum, gradient.flat().to_vec1().unwrap())
}

fn difference(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b)))
}

#[test]
fn backward_of_the_whole_model_is_the_gradient_of_its_formula() {
    let tied = TinyModel::default();
    let untied = TinyModel { tied: false, rope_freqs: true, layers: 3, ..TinyModel::default() };
    let some = [Target::OProj, Target::GateProj];
    for (base, targets) in
        [(&tied, &Target::ALL[..]), (&untied, &Target::ALL[..]), (&tied, &some), (&tied, &Target::ALL[6..])]
    {
        let lora = random_lora(&lora_spec(4, targets), base);
        let naive = Naive::new(base, &lora);
        let rows = rows(3);
        let losses: Vec<Tensor> = rows.iter().map(|row| naive.loss(row)).collect();
        let total = Tensor::stack(&losses, 0).unwrap().sum_all().unwrap();
        let store = (&total * 0.125).unwrap().backward().unwrap();
        let expected: Vec<f32> = naive
            .vars
            .iter()
            .flat_map(|var| {
                store.get(var).unwrap().flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
            })
            .collect();
        check_formula(base, &lora, &rows, &expected);
        let (loss, gradient) = ours(&naive.model, &lora, &rows, PLAIN);
        let total = total.to_scalar::<f64>().unwrap();
        assert!((loss - total).abs() < 1e-5 * total, "{loss} not {total}");
        assert!(difference(&gradient, &expected) < 1e-4, "{targets:?}: {:e}", difference(&gradient, &expected));
    }
}

#[test]
fn gradient_in_bf16_is_close_to_that_in_f32() {
    let Some(compute) = Compute::bf16() else {
        eprintln!("SKIPPED: this processor has no products of bf16");
        return;
    };
    let base = TinyModel::default();
    let (lora, (_, model)) = (random_lora(&lora_spec(4, &Target::ALL), &base), tiny(&base));
    let (loss, gradient) = ours(&model, &lora, &rows(3), PLAIN);
    let (loss_bf16, gradient_bf16) = ours(&model, &lora, &rows(3), MicroStep { compute, ..PLAIN });
    assert!((loss_bf16 - loss).abs() < 2e-3 * loss, "{loss_bf16} not {loss}");
    let off = difference(&gradient_bf16, &gradient);
    // Every operand is rounded by up to 2⁻⁹ on its way through two blocks and back; 2.25e-2 measured.
    assert!(off < 3e-2 && off > 0.0, "{off:e}");
}

#[test]
fn recomputed_activations_give_the_same_bits() {
    let base = TinyModel::default();
    let (lora, (_, model)) = (random_lora(&lora_spec(4, &Target::ALL), &base), tiny(&base));
    for dropout in [None, Dropout::new(0.3, &[7])] {
        let with = |kept_layers| ours(&model, &lora, &rows(5), MicroStep { kept_layers, dropout, ..PLAIN });
        let all = with(2);
        for kept_layers in [0, 1, usize::MAX] {
            assert_eq!(with(kept_layers), all, "{kept_layers} layers");
        }
    }
}

#[test]
fn packed_rows_and_rows_alone_give_the_same_loss_and_gradient() {
    let base = TinyModel::default();
    let (lora, (_, model)) = (random_lora(&lora_spec(4, &Target::ALL), &base), tiny(&base));
    let rows = rows(6);
    let (packed_loss, packed) = ours(&model, &lora, &rows, PLAIN);
    let mut alone = vec![0f32; packed.len()];
    let mut alone_loss = 0.0;
    for row in &rows {
        let (loss, gradient) = ours(&model, &lora, std::slice::from_ref(row), PLAIN);
        alone_loss += loss;
        alone.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
    }
    assert!((packed_loss - alone_loss).abs() < 1e-5 * packed_loss);
    assert!(difference(&packed, &alone) < 1e-5);
}

#[test]
fn padded_rows_give_the_loss_and_gradient_of_packed_ones() {
    let base = TinyModel::default();
    let (lora, (_, model)) = (random_lora(&lora_spec(4, &Target::ALL), &base), tiny(&base));
    let (packed_loss, packed) = ours(&model, &lora, &rows(6), PLAIN);
    let (padded_loss, padded) = of_batch(&model, &lora, &MicroBatch::pad(&rows(6)), PLAIN);
    assert!((packed_loss - padded_loss).abs() < 1e-6 * packed_loss, "{packed_loss} and {padded_loss}");
    assert!(difference(&padded, &packed) < 1e-6, "{:e}", difference(&padded, &packed));
}

#[test]
fn under_a_fixed_mask_the_gradient_is_that_of_the_dropped_model() {
    let base = TinyModel::default();
    let (lora, (_, model)) = (random_lora(&lora_spec(4, &Target::ALL), &base), tiny(&base));
    let masked = MicroStep { dropout: Dropout::new(0.3, &[3407, 1, 0]), ..PLAIN };
    let (loss, gradient) = ours(&model, &lora, &rows(4), masked);
    let (whole_loss, whole_gradient) = ours(&model, &lora, &rows(4), PLAIN);
    assert!(loss != whole_loss && difference(&gradient, &whole_gradient) > 1e-2, "something is dropped");
    let begun: Vec<f32> = lora.flat().to_vec1().unwrap();
    let norm = gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
    let at = |step: f64| {
        let moved = begun.iter().zip(&gradient).map(|(&p, &g)| (f64::from(p) + step * f64::from(g) / norm) as f32);
        let moved = Tensor::from_vec(moved.collect::<Vec<f32>>(), begun.len(), &Device::Cpu).unwrap();
        ours(&model, &LoraParams::new(lora.layout().clone(), moved).unwrap(), &rows(4), masked).0 * 0.125
    };
    let numeric = (at(5e-3) - at(-5e-3)) / 1e-2;
    assert!((numeric - norm).abs() < 2e-3 * norm, "{numeric} against {norm}");
}

#[test]
fn a_batch_without_a_trained_token_has_no_gradient() {
    let base = TinyModel::default();
    let (lora, (_, model)) = (random_lora(&lora_spec(4, &Target::ALL), &base), tiny(&base));
    let row = Row { tokens: vec![5, 6, 7], trained: vec![false; 3] };
    let (loss, gradient) = ours(&model, &lora, &[row], PLAIN);
    assert_eq!(loss, 0.0);
    assert!(gradient.iter().all(|&g| g == 0.0));
}

#[test]
fn tokens_decoded_one_by_one_have_the_logits_of_one_pass() {
    let base = TinyModel::default();
    let (lora, (_, model)) = (random_lora(&lora_spec(4, &Target::ALL), &base), tiny(&base));
    let tokens = &rows(1)[0].tokens;
    let whole: Vec<Vec<f32>> = model.logits(tokens, Some(&lora)).unwrap().to_vec2().unwrap();
    let mut cache = model.cache(tokens.len()).unwrap();
    let first = model.decode(&tokens[..3], &mut cache, Some(&lora)).unwrap().to_vec1::<f32>().unwrap();
    assert!(difference(&first, &whole[2]) < 1e-5);
    for (place, &token) in tokens.iter().enumerate().skip(3) {
        let next = model.decode(&[token], &mut cache, Some(&lora)).unwrap().to_vec1::<f32>().unwrap();
        assert!(difference(&next, &whole[place]) < 1e-5, "token {place}");
    }
    assert!(model.decode(&[1], &mut cache, Some(&lora)).is_err(), "the cache is full");
    assert!(model.cache(base.context_length + 1).is_err());
    assert!(model.logits(&[u32::MAX], None).is_err());
    let layout = LoraLayout::new(&lora_spec(4, &Target::ALL), &model.config().shape);
    assert_eq!(layout.len(), lora.layout().len());
}
