//! A stranger's adapter: `adapter_config.json` and the weights, and checkpoints, which are safetensors files too.
//!
//! An input is the config's text, a zero byte, and the bytes of the safetensors file.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lorad_engine::adapter::{LoraLayout, LoraParams, peft_spec};
use lorad_engine::ops::rope::RopeLayout;
use lorad_engine::spec::{LoraSpec, TrainSpec};
use lorad_engine::train::Checkpoint;
use lorad_fuzz::{file, folder, seeds};

fuzz_target!(init: lorad_fuzz::begin(seeds::safetensors), |data: &[u8]| {
    let end = data.iter().position(|&byte| byte == 0);
    let (config, weights) = end.map_or((data, &[][..]), |end| (&data[..end], &data[end + 1..]));
    file("adapter_config.json", config);
    let weights = file("adapter_model.safetensors", weights);
    // Weights are read also where the config is refused: its LoRA is then one that the seeds have.
    let spec = peft_spec(folder()).unwrap_or_else(|error| {
        assert!(!error.to_string().is_empty());
        LoraSpec { r: 1, ..TrainSpec::default().lora }
    });
    for rope_layout in [RopeLayout::Interleaved, RopeLayout::HalfSplit] {
        let lora = LoraParams::zeros(LoraLayout::new(&spec, &seeds::shape(rope_layout))).expect("zeros");
        if lora.load_peft(folder()).is_ok() {
            lora.save_peft(&folder().join("again"), "base").expect("what was read can be written");
            assert_eq!(peft_spec(&folder().join("again")).expect("our own config"), spec);
        }
    }
    if let Ok(checkpoint) = Checkpoint::load(&weights) {
        checkpoint.save(&folder().join("checkpoint")).expect("what was read can be written");
        Checkpoint::load(&folder().join("checkpoint")).expect("our own checkpoint");
    }
});
