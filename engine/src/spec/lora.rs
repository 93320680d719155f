//! The LoRA's hyperparameters.

use serde::{Deserialize, Serialize};

use super::{SpecError, check, out_of_range};

/// The seven projections of a Llama block that can carry a LoRA, in the order in which the block uses them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Query projection of the attention.
    QProj,
    /// Key projection of the attention.
    KProj,
    /// Value projection of the attention.
    VProj,
    /// Output projection of the attention.
    OProj,
    /// Gate projection of the MLP.
    GateProj,
    /// Up projection of the MLP.
    UpProj,
    /// Down projection of the MLP.
    DownProj,
}

impl Target {
    /// All seven, in the block's order.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// The Hugging Face name, `q_proj` for one.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// The target of that Hugging Face name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|target| target.name() == name)
    }

    /// Position in [`Target::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }
}

/// What a caller said about the LoRA.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoraOptions {
    /// Rank.
    pub r: Option<u32>,
    /// Numerator of the scale.
    pub alpha: Option<f64>,
    /// Share of the LoRA's input that is dropped.
    pub dropout: Option<f64>,
    /// Whether the scale is alpha/√r instead of alpha/r.
    pub use_rslora: Option<bool>,
    /// Projections that get a LoRA.
    pub target_modules: Option<Vec<String>>,
}

impl LoraOptions {
    /// Takes what was not said from the LoRA that the run starts with (dropout excepted, which is no part of it).
    ///
    /// # Errors
    /// A value that was said and is another.
    pub fn inherit(&mut self, from: &LoraSpec) -> Result<(), SpecError> {
        fn take<T: PartialEq + Clone>(
            field: &'static str,
            said: &mut Option<T>,
            right: T,
            show: impl Fn(&T) -> String,
        ) -> Result<(), SpecError> {
            let said = said.get_or_insert_with(|| right.clone());
            let expected = format!("{}, as the adapter that lora.init_from names has it, or absent", show(&right));
            check(*said == right, field, show(said), &expected)
        }
        let mut names: Vec<String> = from.target_modules.iter().map(|target| target.name().to_owned()).collect();
        names.sort_unstable();
        if let Some(said) = &mut self.target_modules {
            said.sort_unstable();
        }
        take("lora.r", &mut self.r, from.r, u32::to_string)?;
        take("lora.alpha", &mut self.alpha, from.alpha, f64::to_string)?;
        take("lora.use_rslora", &mut self.use_rslora, from.use_rslora, bool::to_string)?;
        take("lora.target_modules", &mut self.target_modules, names, |names| names.join(", "))
    }
}

/// LoRA: y = W x + scale · B (A x).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraSpec {
    /// Rank R, 1 to 1024. Default 16.
    pub r: u32,
    /// Numerator of the scale, 0.001 to 100000. Default 16.
    pub alpha: f64,
    /// Share of the LoRA's input (never the frozen weight's) that is dropped in training, in [0, 1). Default 0.
    #[serde(default)]
    pub dropout: f64,
    /// Scale alpha/√r instead of alpha/r. Default false.
    pub use_rslora: bool,
    /// Projections with a LoRA, in the block's order. Default all seven.
    pub target_modules: Vec<Target>,
}

impl LoraSpec {
    /// alpha / r, or alpha / √r with rsLoRA.
    pub fn scale(&self) -> f64 {
        let rank = f64::from(self.r);
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

pub(super) fn resolve(options: &LoraOptions) -> Result<LoraSpec, SpecError> {
    let r = options.r.unwrap_or(16);
    check((1..=1024).contains(&r), "lora.r", r, "from 1 to 1024")?;
    let alpha = options.alpha.unwrap_or(16.0);
    check((1e-3..=1e5).contains(&alpha), "lora.alpha", alpha, "from 0.001 to 100000")?;
    let dropout = options.dropout.unwrap_or(0.0);
    check((0.0..1.0).contains(&dropout), "lora.dropout", dropout, "in [0, 1)")?;
    let target_modules = match &options.target_modules {
        None => Target::ALL.to_vec(),
        Some(names) => resolve_targets(names)?,
    };
    Ok(LoraSpec { r, alpha, dropout, use_rslora: options.use_rslora.unwrap_or(false), target_modules })
}

fn resolve_targets(names: &[String]) -> Result<Vec<Target>, SpecError> {
    const FIELD: &str = "lora.target_modules";
    let right = format!("some of {}", Target::ALL.map(Target::name).join(", "));
    check(!names.is_empty(), FIELD, "[]", &right)?;
    let mut targets = Vec::with_capacity(names.len());
    for name in names {
        let Some(target) = Target::from_name(name) else {
            return Err(out_of_range(FIELD, name, &right));
        };
        check(!targets.contains(&target), FIELD, name, "named once")?;
        targets.push(target);
    }
    targets.sort_unstable();
    Ok(targets)
}
