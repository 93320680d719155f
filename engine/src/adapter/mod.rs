//! LoRA parameters (also the type of their gradients), and their PEFT folder: `adapter_config.json` and
//! `adapter_model.safetensors`.
//!
//! All matrices lie in one flat f32 tensor, so that the norm, the optimizer and a checkpoint see a single buffer; a pair's
//! `lora_a` (R, in) and `lora_b` (out, R) are views of it.
//!
//! Row order: in memory, rows of q_proj's and k_proj's `lora_b` stand in the model's own order. PEFT wants Hugging Face's, so
//! for a model whose heads are interleaved (`llama` in GGUF) they are permuted on the way out and back on the way in.

mod peft_config;

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::files::{shorten, write_atomically};
use crate::model::Shape;
use crate::ops::rope::RopeLayout;
use crate::ops::{host, host_mut};
use crate::spec::{LoraSpec, Target};
use crate::{Error, Result};
use peft_config::{CONFIG_FILE, PeftConfig};

pub use peft_config::peft_spec;

/// Where each pair lies in the flat buffer.
#[derive(Debug, PartialEq)]
pub struct LoraLayout {
    spec: LoraSpec,
    shape: Shape,
    /// Per layer and target: offsets of `lora_a` and `lora_b`.
    offsets: Vec<[Option<(usize, usize)>; 7]>,
    len: usize,
}

impl LoraLayout {
    /// The layout of that LoRA on a model of that shape: layer by layer, target by target, A before B.
    pub fn new(spec: &LoraSpec, shape: &Shape) -> Arc<Self> {
        let rank = spec.r as usize;
        let (mut offsets, mut len) = (Vec::with_capacity(shape.layers), 0);
        for _ in 0..shape.layers {
            let mut layer = [None; 7];
            for &target in &spec.target_modules {
                let (rows, columns) = shape.projection(target);
                layer[target.index()] = Some((len, len + rank * columns));
                len += rank * (rows + columns);
            }
            offsets.push(layer);
        }
        Arc::new(Self { spec: spec.clone(), shape: shape.clone(), offsets, len })
    }

    /// Values in all pairs together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no pair.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The LoRA that it lays out.
    pub fn spec(&self) -> &LoraSpec {
        &self.spec
    }

    /// Where `lora_a` and `lora_b` of a projection begin, where it has them.
    pub fn offsets(&self, layer: usize, target: Target) -> Option<(usize, usize)> {
        self.offsets.get(layer)?[target.index()]
    }

    /// Where each matrix lies, in the order of the buffer, which they fill.
    pub fn tensors(&self) -> Vec<Range<usize>> {
        let rank = self.spec.r as usize;
        let pair = |(_, target, offset_a, offset_b)| {
            let (rows, _) = self.shape.projection(target);
            [offset_a..offset_b, offset_b..offset_b + rows * rank]
        };
        self.pairs().flat_map(pair).collect()
    }

    /// Layer, target and offsets of every pair, in the order of the buffer.
    fn pairs(&self) -> impl Iterator<Item = (usize, Target, usize, usize)> + '_ {
        self.offsets.iter().enumerate().flat_map(|(layer, targets)| {
            Target::ALL.into_iter().filter_map(move |target| {
                targets[target.index()].map(|(offset_a, offset_b)| (layer, target, offset_a, offset_b))
            })
        })
    }
}

/// The two matrices of one projection.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// (R, in).
    pub lora_a: Tensor,
    /// (out, R).
    pub lora_b: Tensor,
}

/// Every LoRA matrix of a model, or a gradient of the same shape.
#[derive(Debug, Clone)]
pub struct LoraParams {
    layout: Arc<LoraLayout>,
    flat: Tensor,
    pairs: Vec<[Option<LoraPair>; 7]>,
}

impl LoraParams {
    /// Views over `flat`, which must hold the layout's number of values.
    pub fn new(layout: Arc<LoraLayout>, flat: Tensor) -> Result<Self> {
        let rank = layout.spec.r as usize;
        let mut pairs = vec![[const { None }; 7]; layout.shape.layers];
        for (layer, target, offset_a, offset_b) in layout.pairs() {
            let (rows, columns) = layout.shape.projection(target);
            pairs[layer][target.index()] = Some(LoraPair {
                lora_a: flat.narrow(0, offset_a, rank * columns)?.reshape((rank, columns))?,
                lora_b: flat.narrow(0, offset_b, rows * rank)?.reshape((rows, rank))?,
            });
        }
        Ok(Self { layout, flat, pairs })
    }

    /// All zeros.
    pub fn zeros(layout: Arc<LoraLayout>) -> Result<Self> {
        let flat = Tensor::zeros(layout.len, DType::F32, &Device::Cpu)?;
        Self::new(layout, flat)
    }

    /// The pair of a projection, if it has one.
    pub fn pair(&self, layer: usize, target: Target) -> Option<&LoraPair> {
        self.pairs.get(layer)?[target.index()].as_ref()
    }

    /// Layer and projection of every pair.
    pub fn projections(&self) -> impl Iterator<Item = (usize, Target)> + '_ {
        self.layout.pairs().map(|(layer, target, ..)| (layer, target))
    }

    /// The one buffer behind all pairs.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Where the pairs lie in it.
    pub fn layout(&self) -> &Arc<LoraLayout> {
        &self.layout
    }

    /// alpha / r, or alpha / √r.
    pub fn scale(&self) -> f32 {
        self.layout.spec.scale() as f32
    }

    /// Sets every value to 0.
    pub fn clear(&self) -> Result<()> {
        host_mut(&self.flat, |values| {
            values.fill(0.0);
            Ok(())
        })
    }

    /// PEFT's start: A uniform in ±1/√in (Kaiming with a = √5), B zero. Each matrix has its own stream of random numbers.
    pub fn initialise(&self, seed: u64) -> Result<()> {
        let layout = &self.layout;
        host_mut(&self.flat, |values| {
            values.fill(0.0);
            for (layer, target, offset_a, offset_b) in layout.pairs() {
                let (_, columns) = layout.shape.projection(target);
                let bound = 1.0 / (columns as f32).sqrt();
                let mut random = ChaCha12Rng::seed_from_u64(seed);
                random.set_stream((layer * Target::ALL.len() + target.index()) as u64);
                values[offset_a..offset_b].fill_with(|| random.random_range(-bound..bound));
            }
            Ok(())
        })
    }

    /// Writes the PEFT folder; `base_model` is what its config names as base.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn save_peft(&self, folder: &Path, base_model: &str) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let config = PeftConfig::new(self.layout.spec(), base_model);
        let json = serde_json::to_string_pretty(&config).map_err(|error| Error::Adapter(error.to_string()))?;
        // The config last: a folder that has one has whole weights beside it.
        write_atomically(&folder.join(WEIGHTS_FILE), &self.peft_tensors()?)?;
        write_atomically(&folder.join(CONFIG_FILE), (json + "\n").as_bytes())
    }

    /// The bytes of `adapter_model.safetensors`, the same for the same values.
    fn peft_tensors(&self) -> Result<Vec<u8>> {
        let mut tensors = Vec::new();
        for (layer, target, ..) in self.layout.pairs() {
            let pair = self.pair(layer, target).expect("the layout lists this pair");
            let lora_a = bytes_of(&host(&pair.lora_a)?);
            let lora_b = self.permuted(target, &host(&pair.lora_b)?, Direction::ToHuggingFace);
            let (a_shape, b_shape) = (pair.lora_a.dims().to_vec(), pair.lora_b.dims().to_vec());
            tensors.push((peft_name(layer, target, "A"), a_shape, lora_a));
            tensors.push((peft_name(layer, target, "B"), b_shape, bytes_of(&lora_b)));
        }
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            view.map(|view| (name, view)).map_err(|error| Error::Adapter(error.to_string()))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        // One metadata key at most: safetensors writes them in the order of a hash map.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize(views, Some(metadata)).map_err(|error| Error::Adapter(error.to_string()))
    }

    /// Reads a PEFT folder into these parameters: same projections, same rank; alpha and rsLoRA are the run's own.
    ///
    /// # Errors
    /// A folder that is not a LoRA of this shape; the message names the tensor or field.
    pub fn load_peft(&self, folder: &Path) -> Result<()> {
        let path = folder.join(WEIGHTS_FILE);
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| damaged(&path, &error))?;
        let mut unread: BTreeSet<&str> = tensors.names().into_iter().collect();
        for (layer, target, ..) in self.layout.pairs() {
            let pair = self.pair(layer, target).expect("the layout lists this pair");
            for (letter, view) in [("A", &pair.lora_a), ("B", &pair.lora_b)] {
                let name = peft_name(layer, target, letter);
                // Named adapters keep their name in files that were not written by PEFT's own `save_pretrained`.
                let named = name.replace(".weight", ".default.weight");
                let name = if unread.contains(&*named) { named } else { name };
                let found = tensors.tensor(&name).map_err(|_| Error::Adapter(format!("it has no tensor `{name}`")))?;
                unread.remove(&*name);
                let mut values = values_of(&name, &found, view.dims())?;
                if letter == "B" {
                    values = self.permuted(target, &values, Direction::ToModel);
                }
                host_mut(view, |place| {
                    place.copy_from_slice(&values);
                    Ok(())
                })?;
            }
        }
        match unread.first() {
            None => Ok(()),
            Some(name) => {
                let (name, more) = (shorten(name), unread.len() - 1);
                Err(Error::Adapter(format!(
                    "its tensor `{name}` (and {more} more) has no place in the LoRA of its config"
                )))
            }
        }
    }

    /// Rows of `lora_b` in the other order, where the model's differs from Hugging Face's.
    fn permuted(&self, target: Target, values: &[f32], direction: Direction) -> Vec<f32> {
        let shape = &self.layout.shape;
        let heads = match target {
            Target::QProj => shape.heads,
            Target::KProj => shape.kv_heads,
            _ => return values.to_vec(),
        };
        if shape.rope_layout == RopeLayout::HalfSplit {
            return values.to_vec();
        }
        let (rank, pairs) = (self.layout.spec.r as usize, shape.head_dim / 2);
        let mut out = vec![0f32; values.len()];
        for head in 0..heads {
            for element in 0..shape.head_dim {
                // Element i of the first half is the first of pair i, element i of the second half the second.
                let interleaved = head * shape.head_dim + 2 * (element % pairs) + element / pairs;
                let half_split = head * shape.head_dim + element;
                let (from, to) = match direction {
                    Direction::ToHuggingFace => (interleaved, half_split),
                    Direction::ToModel => (half_split, interleaved),
                };
                out[to * rank..(to + 1) * rank].copy_from_slice(&values[from * rank..(from + 1) * rank]);
            }
        }
        out
    }
}

const WEIGHTS_FILE: &str = "adapter_model.safetensors";

#[derive(Clone, Copy)]
enum Direction {
    ToHuggingFace,
    ToModel,
}

fn peft_name(layer: usize, target: Target, letter: &str) -> String {
    let part = match target {
        Target::QProj | Target::KProj | Target::VProj | Target::OProj => "self_attn",
        Target::GateProj | Target::UpProj | Target::DownProj => "mlp",
    };
    format!("base_model.model.model.layers.{layer}.{part}.{}.lora_{letter}.weight", target.name())
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A tensor's values as f32, from the three types that adapters come in.
fn values_of(name: &str, tensor: &TensorView<'_>, shape: &[usize]) -> Result<Vec<f32>> {
    if tensor.shape() != shape {
        let found = tensor.shape();
        return Err(Error::Adapter(format!("`{name}` has shape {found:?}, the run's LoRA needs {shape:?}")));
    }
    let data = tensor.data();
    let values: Vec<f32> = match tensor.dtype() {
        Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::BF16 => data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        other => return Err(Error::Adapter(format!("`{name}` is of type {other:?}, expected F32, F16 or BF16"))),
    };
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(values),
        false => Err(Error::Adapter(format!("`{name}` holds a value that is not finite"))),
    }
}

fn damaged(path: &Path, error: &dyn std::fmt::Display) -> Error {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Error::Adapter(format!("{name} cannot be read: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(rope_layout: RopeLayout, seed: u64) -> LoraParams {
        let shape = Shape { rope_layout, ..Shape::tiny() };
        let spec = crate::spec::TrainSpec::default().lora;
        let params = LoraParams::zeros(LoraLayout::new(&spec, &shape)).unwrap();
        params.initialise(seed).unwrap();
        params
    }

    #[test]
    fn peft_folder_gives_the_same_values_back_in_both_row_orders() {
        for rope_layout in [RopeLayout::Interleaved, RopeLayout::HalfSplit] {
            let params = params(rope_layout, 7);
            let b = params.pair(1, Target::QProj).unwrap().lora_b.clone();
            host_mut(&b, |values| {
                values.iter_mut().enumerate().for_each(|(i, value)| *value = i as f32);
                Ok(())
            })
            .unwrap();
            let folder = tempfile::tempdir().unwrap();
            params.save_peft(folder.path(), "base").unwrap();
            let spec = peft_spec(folder.path()).unwrap();
            assert_eq!(&spec, params.layout().spec());
            let read = LoraParams::zeros(params.layout().clone()).unwrap();
            read.load_peft(folder.path()).unwrap();
            assert_eq!(*host(params.flat()).unwrap(), *host(read.flat()).unwrap());
            let again = tempfile::tempdir().unwrap();
            read.save_peft(again.path(), "base").unwrap();
            let bytes = |folder: &Path| std::fs::read(folder.join(WEIGHTS_FILE)).unwrap();
            assert_eq!(bytes(folder.path()), bytes(again.path()));
        }
    }

    #[test]
    fn interleaved_rows_are_written_in_hugging_face_order() {
        let params = params(RopeLayout::Interleaved, 7);
        let rank = 16;
        let head_dim = Shape::tiny().head_dim;
        let rows: Vec<f32> =
            (0..params.pair(0, Target::QProj).unwrap().lora_b.dims()[0]).map(|row| row as f32).collect();
        let values: Vec<f32> = rows.iter().flat_map(|&row| vec![row; rank]).collect();
        let out = params.permuted(Target::QProj, &values, Direction::ToHuggingFace);
        let order: Vec<usize> = out.chunks(rank).map(|row| row[0] as usize).collect();
        let expected: Vec<usize> =
            (0..head_dim / 2).map(|i| 2 * i).chain((0..head_dim / 2).map(|i| 2 * i + 1)).collect();
        assert_eq!(order[..head_dim], expected);
        assert_eq!(order[head_dim], head_dim);
    }

    #[test]
    fn start_is_bounded_and_the_same_for_the_same_seed() {
        let (one, same, other) = (
            params(RopeLayout::Interleaved, 1),
            params(RopeLayout::Interleaved, 1),
            params(RopeLayout::Interleaved, 2),
        );
        let values = |p: &LoraParams| host(p.flat()).unwrap().to_vec();
        assert_eq!(values(&one), values(&same));
        assert_ne!(values(&one), values(&other));
        let pair = one.pair(0, Target::DownProj).unwrap();
        let bound = 1.0 / (Shape::tiny().intermediate as f32).sqrt();
        assert!(host(&pair.lora_a).unwrap().iter().all(|value| value.abs() <= bound));
        assert!(host(&pair.lora_b).unwrap().iter().all(|&value| value == 0.0));
    }

    #[test]
    fn an_adapter_of_another_shape_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        params(RopeLayout::Interleaved, 7).save_peft(folder.path(), "base").unwrap();
        let mut spec = crate::spec::TrainSpec::default().lora;
        spec.r = 8;
        let other = LoraParams::zeros(LoraLayout::new(&spec, &Shape::tiny())).unwrap();
        let error = other.load_peft(folder.path()).unwrap_err().to_string();
        assert!(error.contains("layers.0.self_attn.q_proj.lora_A.weight` has shape [16, "), "{error}");
        assert!(other.load_peft(Path::new("/nowhere")).is_err());
    }

    #[test]
    fn adapters_that_others_trained_are_read_or_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let written = params(RopeLayout::Interleaved, 7);
        written.save_peft(folder.path(), "base").unwrap();
        let (config_path, weights_path) = (folder.path().join(CONFIG_FILE), folder.path().join(WEIGHTS_FILE));
        let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&config_path).unwrap()).unwrap();
        let read = |field: &str, value: serde_json::Value| {
            let mut config = config.clone();
            config[field] = value;
            std::fs::write(&config_path, config.to_string()).unwrap();
            peft_spec(folder.path()).map_err(|error| error.to_string())
        };
        for (field, value) in [
            ("target_modules", serde_json::json!(["self_attn.q_proj", "mlp.up_proj"])),
            ("layers_to_transform", serde_json::Value::Null),
            ("init_lora_weights", "gaussian".into()),
            ("loftq_config", serde_json::json!({})),
        ] {
            assert!(read(field, value).is_ok(), "{field}");
        }
        for (field, value) in [
            ("bias", serde_json::json!("all")),
            ("use_dora", true.into()),
            ("modules_to_save", serde_json::json!(["lm_head"])),
            ("rank_pattern", serde_json::json!({"q_proj": 4})),
            ("alpha_pattern", serde_json::json!({"q_proj": 4})),
            ("layers_to_transform", serde_json::json!([0])),
            ("lora_bias", true.into()),
            ("init_lora_weights", "pissa_niter_4".into()),
            ("target_modules", serde_json::json!(["embed_tokens"])),
            ("target_modules", "q_proj|k_proj".into()),
            ("peft_type", "IA3".into()),
        ] {
            let error = read(field, value).unwrap_err();
            assert!(error.contains(field), "{field}: {error}");
        }
        for (field, value, says) in [
            ("r", serde_json::json!("eight"), "r: invalid type: string \"eight\", expected u32"),
            ("target_modules", serde_json::json!(["q_proj", 7]), "target_modules[1]: invalid type: integer `7`"),
            ("use_dora", 1.into(), "use_dora: invalid type: integer `1`, expected a boolean"),
            ("modules_to_save", "lm_head".into(), "modules_to_save: invalid type: string \"lm_head\""),
        ] {
            let error = read(field, value).unwrap_err();
            assert!(error.contains(says), "{field}: {error}");
        }

        // The same values in 16 bits, under the names that PEFT's own state dict has.
        let bytes = std::fs::read(&weights_path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let halves: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                let half = values.flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect();
                (name.replace(".weight", ".default.weight"), view.shape().to_vec(), half)
            })
            .collect();
        let save = |extra: bool| {
            let views = halves
                .iter()
                .map(|(name, shape, half)| (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), half).unwrap()));
            let more = extra.then(|| {
                ("base_model.model.lm_head.weight".to_owned(), TensorView::new(Dtype::U8, vec![1], &[1]).unwrap())
            });
            std::fs::write(&weights_path, safetensors::serialize(views.chain(more), None).unwrap()).unwrap();
        };
        save(false);
        let read = LoraParams::zeros(written.layout().clone()).unwrap();
        read.load_peft(folder.path()).unwrap();
        let (a, b) = (host(written.flat()).unwrap().to_vec(), host(read.flat()).unwrap().to_vec());
        assert!(a.iter().zip(&b).all(|(a, b)| half::bf16::from_f32(*a).to_f32() == *b));
        save(true);
        let error = read.load_peft(folder.path()).unwrap_err().to_string();
        assert!(error.contains("`base_model.model.lm_head.weight`"), "{error}");
    }
}
