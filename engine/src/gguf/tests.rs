//! Writer and reader agree; a header that lies is an error, never a panic.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::{Array, GgufFile, StoredType, TensorSpec, Value, Writer};
use crate::model::weights::MappedFile;
use crate::quant::BlockType;

fn read(bytes: &[u8]) -> Result<GgufFile, String> {
    let file = MappedFile::from_bytes(bytes).expect("a small copy");
    GgufFile::from_mapped(Arc::new(file)).map_err(|error| error.to_string())
}

fn refused(bytes: &[u8], says: &str) {
    let error = read(bytes).expect_err(says);
    assert!(error.contains(says), "`{error}` should say `{says}`");
}

/// A header by hand, to say what the writer would not.
struct Raw(Vec<u8>);

impl Raw {
    fn new(version: u32, tensors: u64, metadata: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(version).u64(tensors).u64(metadata)
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn string(self, text: &str) -> Self {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }

    fn tensor(self, name: &str, shape: &[u64], stored: u32, offset: u64) -> Self {
        let raw = self.string(name).u32(shape.len() as u32);
        shape.iter().rev().fold(raw, |raw, &dimension| raw.u64(dimension)).u32(stored).u64(offset)
    }

    fn data(mut self, count: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + count, 0);
        self
    }
}

fn small_file(folder: &Path) -> Vec<u8> {
    let metadata = [
        ("general.architecture".to_owned(), Value::from("llama")),
        ("llama.block_count".to_owned(), Value::U32(2)),
        ("scores".to_owned(), Value::Array(Array::F32(vec![0.5, -1.0]))),
        ("tokens".to_owned(), Value::Array(Array::String(vec![b"a".to_vec(), b"\xff".to_vec()]))),
        ("flag".to_owned(), Value::Bool(true)),
    ];
    let spec = |name: &str, shape: &[usize], dtype| TensorSpec { name: name.to_owned(), shape: shape.to_vec(), dtype };
    let tensors = [spec("norm", &[3], BlockType::F32), spec("matrix", &[2, 32], BlockType::Q8_0)];
    let target = folder.join("small.gguf");
    let mut writer = Writer::create(&target, &metadata, &tensors).expect("a good header");
    writer.write("norm", &[1; 12]).expect("the whole norm");
    writer.write("matrix", &[2; 34]).expect("the first row");
    writer.write("matrix", &[3; 34]).expect("the second row");
    writer.finish().expect("complete");
    std::fs::read(target).expect("written")
}

#[test]
fn every_prefix_of_a_file_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = small_file(folder.path());
    for length in 0..bytes.len() {
        if let Ok(file) = read(&bytes[..length]) {
            let last = &file.tensors()[1];
            let missing = format!("{length} of {} bytes lack more than the padding at the end", bytes.len());
            assert!(length >= last.offset + last.size_bytes, "{missing}");
        }
    }
    assert!(read(&bytes).is_ok());
}

#[test]
fn one_changed_byte_never_panics() {
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = small_file(folder.path());
    for position in 0..bytes.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[position] = value;
            if let Ok(file) = read(&changed) {
                for tensor in file.tensors() {
                    let _ = file.data(tensor);
                }
            }
        }
    }
}

#[test]
fn typed_getters_name_the_key_and_what_is_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = read(&small_file(folder.path())).expect("a good file");
    assert_eq!(file.require_string("general.architecture").expect("text"), "llama");
    assert_eq!(file.u32("llama.block_count").expect("integer"), Some(2));
    assert_eq!(file.u64("llama.block_count").expect("of any width"), Some(2));
    assert_eq!(file.f32s("scores").expect("floats"), Some(vec![0.5, -1.0]));
    assert_eq!(file.bool("flag").expect("bool"), Some(true));
    assert_eq!(file.u32("absent").expect("absent is no error"), None);
    let keys: Vec<&str> = file.metadata().iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["general.architecture", "llama.block_count", "scores", "tokens", "flag"]);
    let errors = [
        (
            file.u32("general.architecture").map(|_| ()),
            "metadata `general.architecture` is a string, must be an integer",
        ),
        (file.bool("llama.block_count").map(|_| ()), "metadata `llama.block_count` is the u32 2, must be a bool"),
        (file.strings("tokens").map(|_| ()), "metadata `tokens` is an array whose element 1 is not UTF-8"),
        (file.strings("scores").map(|_| ()), "metadata `scores` is an array of 2 f32, must be one of strings"),
        (file.require_u32("absent").map(|_| ()), "metadata `absent` is missing"),
        (file.require_tensor("absent").map(|_| ()), "tensor `absent` is missing"),
    ];
    for (result, message) in errors {
        assert_eq!(result.expect_err(message).to_string(), format!("invalid model: {message}"));
    }
}

#[test]
fn foreign_files_are_refused_by_name() {
    refused(b"", "is no GGUF file");
    refused(b"GGML\x03\0\0\0", "is no GGUF file");
    refused(b"GGUF\x03", "the header is cut off");
    refused(&Raw::new(1, 0, 0).0, "version 1");
    refused(&Raw::new(4, 0, 0).0, "version 4");
    refused(&Raw::new(3u32.swap_bytes(), 0, 0).0, "big-endian");
    let split = Raw::new(3, 0, 1).string("split.count").u32(2).bytes(&3u16.to_le_bytes());
    refused(&split.0, "is one of 3 parts");
    assert!(read(&Raw::new(2, 0, 0).0).is_ok());
}

#[test]
fn counts_and_lengths_beyond_the_file_are_refused() {
    refused(&Raw::new(3, u64::MAX, 0).0, "the tensor count is 18446744073709551615");
    refused(&Raw::new(3, 0, 1 << 60).0, "the metadata count is 1152921504606846976");
    refused(&Raw::new(3, 0, 1).u64(u64::MAX).u64(0).0, "a string's length is 18446744073709551615");
    let key = || Raw::new(3, 0, 1).string("key");
    refused(&key().u32(8).u64(100).bytes(b"short").0, "a string's length is 100");
    refused(&key().u32(9).u32(4).u64(1 << 62).u32(0).0, "an array's length is 4611686018427387904");
    refused(&key().u32(9).u32(8).u64(2).u64(0).0, "an array's length is 2");
    refused(&key().u32(13).u64(0).0, "its type 13");
    refused(&key().u32(9).u32(13).u64(0).0, "its element type 13");
    refused(&key().u32(7).bytes(&[2]).0, "a bool is the byte 2");
    let nested = (0..5).fold(key().u32(9), |raw, _| raw.u32(9).u64(1));
    refused(&nested.u32(0).u64(0).0, "nested deeper than 4");
    let twice = Raw::new(3, 0, 2).string("key").u32(7).bytes(&[1]).string("key").u32(7).bytes(&[0]);
    refused(&twice.0, "metadata `key` stands there twice");
}

#[test]
fn alignment_must_be_a_power_of_two() {
    for alignment in [0, 1, 24, 33] {
        let raw = Raw::new(3, 0, 1).string("general.alignment").u32(4).u32(alignment);
        refused(&raw.0, &format!("must be a power of two from 8 on, got `{alignment}`"));
    }
    let raw = Raw::new(3, 0, 1).string("general.alignment").u32(8).string("32");
    refused(&raw.0, "metadata `general.alignment` is a string");
}

#[test]
fn tensors_that_lie_are_refused() {
    let one = |shape: &[u64], stored, offset| Raw::new(3, 1, 0).tensor("t", shape, stored, offset).data(64).0;
    assert!(read(&one(&[16], 0, 0)).is_ok());
    refused(&one(&[17], 0, 0), "tensor `t` lies outside of the file");
    refused(&one(&[16], 0, 32), "tensor `t` lies outside of the file");
    refused(&one(&[1], 0, 16), "not a multiple of the alignment 32");
    refused(&one(&[1], 0, u64::MAX - 31), "tensor `t` lies outside of the file");
    refused(&one(&[1 << 33, 1 << 33], 0, 0), "more values than can be addressed");
    refused(&one(&[u64::MAX], 0, 0), "more values than can be addressed");
    refused(&one(&[0], 0, 0), "a dimension of 0");
    refused(&one(&[1, 33], 8, 0), "not a multiple of the 32 values in a block of Q8_0");
    refused(&one(&[1; 5], 0, 0), "has 5 dimensions");
    refused(&one(&[], 0, 0), "has 0 dimensions");
    let two = |offset| Raw::new(3, 2, 0).tensor("a", &[9], 0, 0).tensor("b", &[8], 0, offset).data(64).0;
    assert!(read(&Raw::new(3, 2, 0).tensor("a", &[8], 0, 0).tensor("b", &[8], 0, 32).data(64).0).is_ok());
    refused(&two(32), "tensors `a` and `b` overlap");
    refused(&two(0), "overlap");
    let twice = Raw::new(3, 2, 0).tensor("a", &[8], 0, 0).tensor("a", &[8], 0, 32).data(64);
    refused(&twice.0, "tensor `a` stands there twice");
}

#[test]
fn a_type_that_cannot_be_dequantized_is_an_error_only_when_it_is_needed() {
    let raw = Raw::new(3, 2, 0).tensor("new", &[32], 39, 0).tensor("newer", &[32], 999, 32).data(64);
    let file = read(&raw.0).expect("the header is fine");
    for (name, stored) in [("new", "MXFP4"), ("newer", "type 999")] {
        let tensor = file.require_tensor(name).expect("listed");
        let message = format!("invalid model: tensor `{name}` is stored as {stored}, which is not supported");
        assert_eq!(file.data(tensor).expect_err("not supported").to_string(), message);
    }
    assert_eq!(file.tensors()[1].stored, StoredType::from_id(999));
}

#[test]
fn the_writer_takes_exactly_the_bytes_it_was_told_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("a.gguf");
    let spec = |name: &str| TensorSpec { name: name.to_owned(), shape: vec![2], dtype: BlockType::F32 };
    let create = |specs: &[TensorSpec]| Writer::create(&target, &[], specs);
    assert!(create(&[spec("a"), spec("a")]).expect_err("twice").to_string().contains("tensor `a` stands there twice"));
    let mut writer = create(&[spec("a"), spec("b")]).expect("a good header");
    for (name, bytes, says) in [("b", 8, "needs 8 of `a`"), ("a", 9, "got 9 bytes of tensor `a`, needs 8")] {
        let error = writer.write(name, &vec![0; bytes]).expect_err(says).to_string();
        assert!(error.contains(says), "{error}");
    }
    writer.write("a", &[0; 8]).expect("all of it");
    writer.write("b", &[0; 4]).expect("half of it");
    assert!(writer.finish().expect_err("not complete").to_string().contains("tensor `b` got 4 of its 8 bytes"));
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0, "nothing is left behind");
}

#[test]
fn the_files_of_other_programs_are_read() {
    let Some(folder) = crate::testing::shared_data() else { return };
    let file = GgufFile::open(&folder.join("stories260K.gguf")).expect("a good file");
    assert_eq!((file.tensors().len(), file.u32("llama.vocab_size").expect("absent")), (48, None));
    assert_eq!(file.u32("tokenizer.ggml.padding_token_id").expect("an id"), Some(u32::MAX));
    assert_eq!(file.require_tensor("blk.0.ffn_down.weight").expect("listed").shape, [64, 172]);
    let quantized = GgufFile::open(&folder.join("stories260K-Q4_0.gguf")).expect("a good file");
    let count = |dtype| quantized.tensors().iter().filter(|tensor| tensor.dtype().expect("known") == dtype).count();
    assert_eq!([BlockType::Q4_0, BlockType::Q8_0, BlockType::F16, BlockType::F32].map(count), [31, 1, 5, 11]);
}

fn any_array() -> impl Strategy<Value = Array> {
    let strings = prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..5);
    let leaf = prop_oneof![
        any::<Vec<u8>>().prop_map(Array::U8),
        any::<Vec<i8>>().prop_map(Array::I8),
        any::<Vec<u16>>().prop_map(Array::U16),
        any::<Vec<i16>>().prop_map(Array::I16),
        any::<Vec<u32>>().prop_map(Array::U32),
        any::<Vec<i32>>().prop_map(Array::I32),
        any::<Vec<f32>>().prop_map(Array::F32),
        any::<Vec<bool>>().prop_map(Array::Bool),
        any::<Vec<u64>>().prop_map(Array::U64),
        any::<Vec<i64>>().prop_map(Array::I64),
        any::<Vec<f64>>().prop_map(Array::F64),
        strings.prop_map(Array::String),
    ];
    leaf.prop_recursive(3, 16, 3, |inner| prop::collection::vec(inner, 0..3).prop_map(Array::Array))
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<f32>().prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f64>().prop_map(Value::F64),
        prop::collection::vec(any::<u8>(), 0..20).prop_map(Value::String),
        any_array().prop_map(Value::Array),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read(
        values in prop::collection::vec(any_value(), 0..8),
        shapes in prop::collection::vec(prop::collection::vec(1usize..5, 1..=4), 0..5),
    ) {
        let folder = tempfile::tempdir().expect("a folder");
        let target = folder.path().join("any.gguf");
        let metadata: Vec<_> = values.into_iter().enumerate().map(|(i, value)| (format!("key.{i}"), value)).collect();
        let name = |index: usize| format!("tensor.{index}");
        let specs: Vec<_> = shapes.iter().enumerate().map(|(index, shape)| {
            TensorSpec { name: name(index), shape: shape.clone(), dtype: BlockType::F32 }
        }).collect();
        let bytes_of = |index: usize| vec![index as u8 + 1; shapes[index].iter().product::<usize>() * 4];
        let mut writer = Writer::create(&target, &metadata, &specs).expect("a good header");
        for index in 0..shapes.len() {
            writer.write(&name(index), &bytes_of(index)).expect("the right bytes");
        }
        writer.finish().expect("complete");

        let file = GgufFile::open(&target).expect("our own file");
        prop_assert_eq!(file.metadata(), &metadata[..]);
        prop_assert_eq!(file.tensors().len(), shapes.len());
        for (index, shape) in shapes.iter().enumerate() {
            let tensor = file.require_tensor(&name(index)).expect("listed");
            prop_assert_eq!(&tensor.shape, shape);
            prop_assert_eq!(file.data(tensor).expect("f32"), &bytes_of(index)[..]);
        }
    }
}
