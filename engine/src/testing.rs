//! What tests of every package need: a tiny `llama` model written from a seed, and the folder of shared test data.

use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Result;
use crate::adapter::{LoraLayout, LoraParams};
use crate::gguf::{Array, TensorSpec, Value, Writer};
use crate::model::Shape;
use crate::quant::{BlockType, quantize};
use crate::spec::{LoraSpec, TrainSpec};

/// A random `llama` model, small enough that a test trains it in moments.
///
/// Its tokenizer is byte-level BPE with a few merges; its ids 0, 1 and 2 are `<|endoftext|>`, `<|im_start|>` (BOS, not added)
/// and `<|im_end|>` (EOS), as SmolLM2 has them, and it has a ChatML template. With `sentence_piece` they are `<unk>`, `<s>` (BOS,
/// added) and `</s>` (EOS), as Llama 2 has them, and the template is in Llama 2's style. The same fields give the same bytes
/// everywhere.
#[derive(Debug, Clone)]
pub struct TinyModel {
    /// Blocks.
    pub layers: usize,
    /// Values of the residual stream, a multiple of `heads` × 8.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Values between the MLP's projections.
    pub intermediate: usize,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// Whether the file has `rope_freqs.weight`.
    pub rope_freqs: bool,
    /// The longest row it takes.
    pub context_length: usize,
    /// Seed of every weight.
    pub seed: u64,
    /// Whether the tokenizer is SentencePiece's.
    pub sentence_piece: bool,
    /// Stored types that the matrices take in turn; F16 where a row is no multiple of the type's block.
    pub dtypes: Vec<BlockType>,
}

impl Default for TinyModel {
    fn default() -> Self {
        Self {
            layers: 2,
            hidden: 64,
            heads: 4,
            kv_heads: 2,
            intermediate: 128,
            tied: true,
            rope_freqs: false,
            context_length: 512,
            seed: 1,
            sentence_piece: false,
            dtypes: vec![BlockType::Q8_0],
        }
    }
}

impl TinyModel {
    /// Writes the model as a GGUF file.
    ///
    /// # Errors
    /// [`crate::Error::Io`] where it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let specs = self.tensors();
        let mut writer = Writer::create(path, &self.metadata(), &specs)?;
        for (index, spec) in specs.iter().enumerate() {
            let mut random = ChaCha8Rng::seed_from_u64(self.seed);
            random.set_stream(index as u64);
            let is_vector = spec.shape.len() == 1;
            let values: Vec<f32> = (0..spec.shape.iter().product())
                .map(|_| if is_vector { 1.0 + 0.1 * normal(&mut random) } else { 0.05 * normal(&mut random) })
                .collect();
            let columns = spec.shape.last().copied().unwrap_or(1);
            writer.write(&spec.name, &quantize(spec.dtype, columns, &values)?)?;
        }
        writer.finish()
    }

    /// Tokens in its vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary().len()
    }

    fn vocabulary(&self) -> Vec<Token> {
        if self.sentence_piece { sentence_piece() } else { byte_level() }
    }

    fn tensors(&self) -> Vec<TensorSpec> {
        let Self { hidden, intermediate, .. } = *self;
        let kv = hidden / self.heads * self.kv_heads;
        let mut tensors = Vec::new();
        let mut turn = self.dtypes.iter().cycle();
        let mut put = |name: String, shape: &[usize]| {
            let matrix = (shape.len() > 1).then(|| *turn.next().unwrap_or(&BlockType::F32));
            let dtype = match matrix {
                None => BlockType::F32,
                Some(dtype) if shape[1].is_multiple_of(dtype.block_values()) => dtype,
                Some(_) => BlockType::F16,
            };
            tensors.push(TensorSpec { name, shape: shape.to_vec(), dtype });
        };
        put("token_embd.weight".to_owned(), &[self.vocab_size(), hidden]);
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            put(name("attn_norm"), &[hidden]);
            put(name("attn_q"), &[hidden, hidden]);
            put(name("attn_k"), &[kv, hidden]);
            put(name("attn_v"), &[kv, hidden]);
            put(name("attn_output"), &[hidden, hidden]);
            put(name("ffn_norm"), &[hidden]);
            put(name("ffn_gate"), &[intermediate, hidden]);
            put(name("ffn_up"), &[intermediate, hidden]);
            put(name("ffn_down"), &[hidden, intermediate]);
        }
        put("output_norm.weight".to_owned(), &[hidden]);
        if !self.tied {
            put("output.weight".to_owned(), &[self.vocab_size(), hidden]);
        }
        if self.rope_freqs {
            put("rope_freqs.weight".to_owned(), &[hidden / self.heads / 2]);
        }
        tensors
    }

    fn metadata(&self) -> Vec<(String, Value)> {
        let vocabulary = self.vocabulary();
        let number = |value: usize| Value::U32(value as u32);
        let pairs = [
            ("general.architecture", Value::from("llama")),
            ("general.name", Value::from("tiny")),
            ("llama.block_count", number(self.layers)),
            ("llama.context_length", number(self.context_length)),
            ("llama.embedding_length", number(self.hidden)),
            ("llama.feed_forward_length", number(self.intermediate)),
            ("llama.attention.head_count", number(self.heads)),
            ("llama.attention.head_count_kv", number(self.kv_heads)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.rope.dimension_count", number(self.hidden / self.heads)),
            ("llama.rope.freq_base", Value::F32(10_000.0)),
            ("llama.vocab_size", number(vocabulary.len())),
            ("tokenizer.ggml.tokens", strings(vocabulary.iter().map(|token| token.text.as_str()))),
            (
                "tokenizer.ggml.token_type",
                Value::Array(Array::I32(vocabulary.iter().map(|token| token.kind).collect())),
            ),
            ("tokenizer.ggml.bos_token_id", Value::U32(1)),
            ("tokenizer.ggml.eos_token_id", Value::U32(2)),
            ("tokenizer.ggml.unknown_token_id", Value::U32(0)),
            ("tokenizer.ggml.padding_token_id", Value::U32(2)),
            ("tokenizer.ggml.add_space_prefix", Value::Bool(self.sentence_piece)),
            ("tokenizer.ggml.add_bos_token", Value::Bool(self.sentence_piece)),
        ];
        let scores = vocabulary.iter().map(|token| token.score).collect();
        let of_algorithm = if self.sentence_piece {
            vec![
                ("tokenizer.ggml.model", Value::from("llama")),
                ("tokenizer.ggml.scores", Value::Array(Array::F32(scores))),
                ("tokenizer.chat_template", Value::from(LLAMA_2_TEMPLATE)),
            ]
        } else {
            vec![
                ("tokenizer.ggml.model", Value::from("gpt2")),
                ("tokenizer.ggml.pre", Value::from("smollm")),
                ("tokenizer.ggml.merges", strings(MERGES.into_iter())),
                ("tokenizer.chat_template", Value::from(CHAT_TEMPLATE)),
            ]
        };
        pairs.into_iter().chain(of_algorithm).map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

/// A LoRA on all seven projections whose values are random, seen as such in what a model computes.
///
/// # Errors
/// Only a fault in the tensors' library.
pub fn random_lora(shape: &Shape, rank: u32) -> Result<LoraParams> {
    let spec = LoraSpec { r: rank, alpha: f64::from(rank), ..TrainSpec::default().lora };
    let lora = LoraParams::zeros(LoraLayout::new(&spec, shape))?;
    let mut random = ChaCha8Rng::seed_from_u64(2);
    crate::ops::host_mut(lora.flat(), |values| {
        values.fill_with(|| 0.1 * normal(&mut random));
        Ok(())
    })?;
    Ok(lora)
}

/// The folder of real files that some tests read: `LORAD_SHARED_DATA`, or `shared/data` beside the repository. Where it is
/// absent, says so and gives `None`: the test has nothing to do.
pub fn shared_data() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let folder = std::env::var_os("LORAD_SHARED_DATA").map_or_else(beside, PathBuf::from);
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("SKIPPED: no shared test data in {} (LORAD_SHARED_DATA names another folder)", folder.display());
    None
}

const CHAT_TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                             {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

const MERGES: [&str; 16] = [
    "Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "n d", "o u", "Ġ w", "l l", "Ġa nd", "in g",
];

const LLAMA_2_TEMPLATE: &str = "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}</s>\
                                {% else %}<s>[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}";

/// Texts that SentencePiece's vocabulary has beside the characters, the likeliest first.
const PIECES: [&str; 24] = [
    "▁t",
    "he",
    "▁a",
    "in",
    "▁the",
    "er",
    "re",
    "on",
    "at",
    "en",
    "▁▁",
    "▁s",
    "nd",
    "▁and",
    "ing",
    "▁▁▁▁",
    "ou",
    "ll",
    "▁he",
    "llo",
    "</",
    "s>",
    "ab",
    "aba",
];

/// Token types of GGUF.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// A token of a vocabulary.
struct Token {
    text: String,
    kind: i32,
    score: f32,
}

impl Token {
    fn new(text: impl Into<String>, kind: i32, score: f32) -> Self {
        Self { text: text.into(), kind, score }
    }
}

fn byte_level() -> Vec<Token> {
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(|text| Token::new(text, CONTROL, 0.0));
    let bytes = (0..=u8::MAX).map(|byte| Token::new(byte_character(byte), NORMAL, 0.0));
    let merges = MERGES.map(|pair| Token::new(pair.replace(' ', ""), NORMAL, 0.0));
    special.into_iter().chain(bytes).chain(merges).collect()
}

fn sentence_piece() -> Vec<Token> {
    let special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)];
    let special = special.map(|(text, kind)| Token::new(text, kind, 0.0));
    let bytes = (0..=u8::MAX).map(|byte| Token::new(format!("<0x{byte:02X}>"), BYTE, 0.0));
    let pieces = PIECES.iter().zip(0u8..).map(|(&text, rank)| Token::new(text, NORMAL, -f32::from(rank)));
    let characters = "▁etaoinshrdlucmfwygpbvkxqjzETAOINSHRDLU0123456789.,!?'-</>é你";
    let characters = characters.chars().zip(0u8..).map(|(c, rank)| Token::new(c, NORMAL, -100.0 - f32::from(rank)));
    let user_defined = [Token::new("<note>", USER_DEFINED, 0.0)];
    special.into_iter().chain(bytes).chain(pieces).chain(characters).chain(user_defined).collect()
}

fn strings<'a>(texts: impl Iterator<Item = &'a str>) -> Value {
    Value::Array(Array::String(texts.map(|text| text.as_bytes().to_vec()).collect()))
}

/// The character that stands for a byte in a byte-level vocabulary: itself where it is visible in Latin-1, else one from
/// U+0100 on, in the order of the bytes.
fn byte_character(byte: u8) -> char {
    let is_visible = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if is_visible(byte) {
        return char::from(byte);
    }
    let invisible_before = (0..byte).filter(|&byte| !is_visible(byte)).count() as u32;
    char::from_u32(0x100 + invisible_before).expect("below the surrogates")
}

/// Close to a normal deviate: the sum of twelve uniform ones, whose bits no mathematics library can change.
pub(crate) fn normal(random: &mut ChaCha8Rng) -> f32 {
    (0..12).map(|_| random.random::<f32>()).sum::<f32>() - 6.0
}
