//! Tokens that a base model never learnt: their embedding is near zero, and what comes of them is noise. A chat template full of
//! them makes a base model (Llama 3 without "Instruct", for one) answer with garbage.

use super::weights::Weight;
use crate::Result;
use crate::gguf::GgufFile;

/// Rows of the embedding table that say what a usual norm is.
const SAMPLED_ROWS: usize = 256;
/// Below this part of the usual norm, a token counts as never learnt.
const NEAR_ZERO: f64 = 0.05;

/// Those of the tokens whose embedding has a norm near zero.
///
/// # Errors
/// [`crate::Error::Model`] where the file has no embedding table that can be read.
pub fn untrained_tokens(file: &GgufFile, tokens: &[u32]) -> Result<Vec<u32>> {
    let table = Weight::from_tensor(file, file.require_tensor("token_embd.weight")?)?;
    let mut row = vec![0.0; table.columns()];
    let mut norm = |index: usize| -> Result<f64> {
        table.dequantize_rows(index..index + 1, &mut row)?;
        Ok(row.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt())
    };
    let step = table.rows().div_ceil(SAMPLED_ROWS).max(1);
    let mut norms = (0..table.rows()).step_by(step).map(&mut norm).collect::<Result<Vec<f64>>>()?;
    norms.sort_unstable_by(f64::total_cmp);
    let usual = norms.get(norms.len() / 2).copied().unwrap_or(0.0);
    let mut untrained = Vec::new();
    for &token in tokens.iter().filter(|&&token| (token as usize) < table.rows()) {
        if norm(token as usize)? < NEAR_ZERO * usual {
            untrained.push(token);
        }
    }
    Ok(untrained)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{TensorSpec, Writer};
    use crate::quant::{BlockType, quantize};

    #[test]
    fn only_rows_near_zero_are_untrained() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("model.gguf");
        let shape = vec![40, 32];
        let dtype = BlockType::Q8_0;
        let spec = TensorSpec { name: "token_embd.weight".into(), shape, dtype };
        let size = |row: usize| match row {
            3 => 0.0,
            7 => 1e-4,
            9 => 0.2,
            _ => 1.0,
        };
        let values: Vec<f32> = (0..40 * 32).map(|i| size(i / 32) * if i % 2 == 0 { 0.5 } else { -0.4 }).collect();
        let mut writer = Writer::create(&path, &[], &[spec]).expect("a file");
        writer.write("token_embd.weight", &quantize(dtype, 32, &values).expect("quantizes")).expect("written");
        writer.finish().expect("finished");
        let file = GgufFile::open(&path).expect("opens");
        assert_eq!(untrained_tokens(&file, &[0, 3, 7, 9, 39, 1000]).expect("reads"), [3, 7]);
    }
}
