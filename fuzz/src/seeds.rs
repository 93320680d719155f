//! The inputs that a corpus begins with, made from the tiny model of the tests and hand-made rows.

use std::path::Path;

use lorad_engine::adapter::{LoraLayout, LoraParams};
use lorad_engine::gguf::{Array, TensorSpec, Value, Writer};
use lorad_engine::model::Shape;
use lorad_engine::ops::rope::RopeLayout;
use lorad_engine::quant::{BlockType, quantize};
use lorad_engine::spec::{LoraSpec, Target, TrainSpec};
use lorad_engine::testing::TinyModel;

use crate::folder;

/// The model that adapters are read for.
pub fn shape(rope_layout: RopeLayout) -> Shape {
    Shape { layers: 1, hidden: 8, heads: 2, kv_heads: 1, head_dim: 8, intermediate: 8, vocabulary: 16, rope_layout }
}

/// Whole models of both tokenizers, a file with every type of value and tensor, and bytes of made-up vocabularies.
pub fn gguf(to: &Path) {
    let model = TinyModel { layers: 1, hidden: 32, heads: 2, kv_heads: 1, intermediate: 32, ..TinyModel::default() };
    let models = [
        ("byte-level", model.clone()),
        ("sentence-piece", TinyModel { sentence_piece: true, tied: false, ..model.clone() }),
        ("rope-factors", TinyModel { rope_freqs: true, dtypes: vec![BlockType::Q4_0, BlockType::F16], ..model }),
    ];
    for (name, model) in models {
        model.write(&to.join(name)).expect("a seed");
    }
    every_type(&to.join("every-type"));
    for (number, byte) in (0u8..).zip([0u8, 1, 2, 97, 255]) {
        let bytes: Vec<u8> = (0..400u16).map(|at| byte.wrapping_add(at as u8).wrapping_mul(number + 1)).collect();
        std::fs::write(to.join(format!("vocabulary-{number}")), bytes).expect("a seed");
    }
}

fn every_type(path: &Path) {
    let texts =
        |texts: &[&str]| Value::Array(Array::String(texts.iter().map(|text| text.as_bytes().to_vec()).collect()));
    let metadata = [
        ("general.architecture", Value::from("llama")),
        ("general.alignment", Value::U32(32)),
        ("a.u8", Value::U8(1)),
        ("a.i8", Value::I8(-1)),
        ("a.u16", Value::U16(1)),
        ("a.i16", Value::I16(-1)),
        ("a.i32", Value::I32(-1)),
        ("a.f32", Value::F32(0.5)),
        ("a.bool", Value::Bool(true)),
        ("a.u64", Value::U64(1)),
        ("a.i64", Value::I64(-1)),
        ("a.f64", Value::F64(0.5)),
        ("b.u8", Value::Array(Array::U8(vec![1, 2]))),
        ("b.i16", Value::Array(Array::I16(vec![1, 2]))),
        ("b.bool", Value::Array(Array::Bool(vec![true, false]))),
        ("b.u64", Value::Array(Array::U64(vec![1]))),
        ("b.f64", Value::Array(Array::F64(vec![0.5]))),
        ("b.array", Value::Array(Array::Array(vec![Array::U32(vec![1]), Array::I64(vec![-1])]))),
        ("tokenizer.ggml.model", Value::from("llama")),
        ("tokenizer.ggml.tokens", texts(&["<unk>", "<s>", "</s>", "a", "\u{2581}a"])),
        ("tokenizer.ggml.scores", Value::Array(Array::F32(vec![0.0, 0.0, 0.0, -1.0, -0.5]))),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![2, 3, 3, 1, 1]))),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.unknown_token_id", Value::U32(0)),
        (
            "tokenizer.chat_template",
            Value::from("{% for m in messages %}{{ m.content | trim ~ eos_token }}{% endfor %}"),
        ),
    ];
    let metadata: Vec<(String, Value)> = metadata.map(|(key, value)| (key.to_owned(), value)).into();
    let dtypes = [
        BlockType::F32,
        BlockType::F16,
        BlockType::BF16,
        BlockType::Q4_0,
        BlockType::Q4_1,
        BlockType::Q5_0,
        BlockType::Q5_1,
        BlockType::Q8_0,
        BlockType::Q2K,
        BlockType::Q3K,
        BlockType::Q4K,
        BlockType::Q5K,
        BlockType::Q6K,
    ];
    let spec = |dtype: BlockType| TensorSpec { name: format!("blk.0.{}", dtype.name()), shape: vec![1, 256], dtype };
    let mut specs: Vec<TensorSpec> = dtypes.map(spec).into();
    specs.push(TensorSpec { name: "token_embd.weight".into(), shape: vec![5, 8], dtype: BlockType::F32 });
    let mut writer = Writer::create(path, &metadata, &specs).expect("a seed");
    for TensorSpec { name, shape, dtype } in &specs {
        let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|value| value as f32 / 100.0).collect();
        writer.write(name, &quantize(*dtype, shape[1], &values).expect("quantizes")).expect("a seed");
    }
    writer.finish().expect("a seed");
}

/// PEFT folders of several LoRAs in the one text that the target takes apart.
pub fn safetensors(to: &Path) {
    let default = TrainSpec::default().lora;
    let two = vec![Target::QProj, Target::DownProj];
    let loras = [
        ("rank-1", LoraSpec { r: 1, ..default.clone() }),
        ("rank-2", LoraSpec { r: 2, use_rslora: true, target_modules: two, ..default }),
    ];
    for (name, spec) in loras {
        let lora = LoraParams::zeros(LoraLayout::new(&spec, &shape(RopeLayout::Interleaved))).expect("zeros");
        lora.initialise(1).expect("values");
        let peft = folder().join("peft");
        lora.save_peft(&peft, "base").expect("a PEFT folder");
        let part = |file: &str| std::fs::read(peft.join(file)).expect("a part of the folder");
        let whole = [part("adapter_config.json"), vec![0], part("adapter_model.safetensors")].concat();
        std::fs::write(to.join(name), whole).expect("a seed");
    }
    let checkpoint = "{\"__metadata__\":{\"lorad\":\"{\\\"format\\\":3,\\\"step\\\":1,\\\"trained_tokens\\\":2,\\\"run\\\":\\\"r\\\",\
        \\\"kept_layers\\\":0,\\\"optimizer\\\":\\\"adamw\\\",\\\"compute\\\":\\\"f32\\\",\\\"best\\\":null}\"},\
        \"parameters\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}";
    let length = (checkpoint.len() as u64).to_le_bytes();
    let config = "{\"peft_type\":\"LORA\",\"r\":1,\"lora_alpha\":1,\"target_modules\":[\"q_proj\"]}\0";
    std::fs::write(to.join("checkpoint"), [config.as_bytes(), &length, checkpoint.as_bytes(), &[0; 4]].concat())
        .expect("a seed");
}

/// Rows of every format, each with the bytes that say how it is read.
pub fn dataset(to: &Path) {
    let chat = r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q é"},{"role":"assistant","content":"a"}]}"#;
    let tools = r#"{"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}],"messages":[{"role":"user","content":[{"type":"text","text":"q"}]},{"role":"assistant","content":null,"weight":1,"tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{\"x\":1}"}}]},{"role":"tool","tool_call_id":"1","content":"1"},{"role":"assistant","content":"One.","weight":0}]}"#;
    let sharegpt = r#"{"system":"s","conversations":[{"from":"human","value":"q"},{"from":"function_call","value":"{\"name\":\"f\",\"arguments\":{}}"},{"from":"observation","value":"1"},{"from":"gpt","value":"a"}]}"#;
    let rows = [
        ("chat", 0u8, chat),
        ("tools", 3, tools),
        ("sharegpt", 2, sharegpt),
        ("alpaca", 1, r#"{"instruction":"i","input":"x 1","output":"o","system":"s","id":7}"#),
        ("completion", 4, r#"{"prompt":"1+0=","completion":"1"}"#),
        ("text", 5, r#"{"text":"One and\u0000 nothing \ud83d\ude00 are one."}"#),
    ];
    let template = "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ eos_token }}{% endfor %}\
                    {% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";
    let macros = "{% macro f(x) %}{{ x | tojson(indent=2) }}{% endmacro %}{% set ns = namespace(i=0) %}{% for m in messages %}\
                  {% set ns.i = ns.i + 1 %}{{ f(m) }}{{ m.content.split(' ')[-1].strip() | upper | join(',') }}{{ eos_token }}{% endfor %}\
                  {% if ns.i > 9 %}{{ raise_exception('long') }}{% endif %}{{ strftime_now('%d %B %Y') }}";
    for (name, format, row) in rows {
        let write = |kind: &str, options: [u8; 2], text: String| {
            let bytes = [&options[..], text.as_bytes()].concat();
            std::fs::write(to.join(format!("{name}-{kind}")), bytes).expect("a seed");
        };
        write("lines", [0, 0], format!("{row}\n").repeat(11));
        write("array", [1, 0], format!("[{}]", [row; 10].join(",\n")));
        write("named", [2 | (format + 1) << 4, 1], format!("{row}\n\n{row}\n"));
        write("template", [4, 0], format!("{template}\0{row}\n"));
        write("macros", [4, 2], format!("{macros}\0{row}\n"));
    }
}
