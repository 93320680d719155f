//! Sizes of a model's parts on a GPU: widths of rows, what LoRA adds to them, and the groups of projections that share an input.
//!
//! A group's weights lie below each other in one matrix W (N, K). With LoRA its rows and columns are extended by E values, R a projection,
//! rounded up: W' = [W, s·B; A, ·] (N + E, K + E), where B is block-diagonal. Then forward is [x | u] · W'[..N]ᵀ with u = A x, and
//! backward [dy | du] · W'[.., ..K] with du = s·Bᵀ dy: the LoRA's second factor costs nothing but a little depth.

use crate::adapter::LoraLayout;
use crate::model::Shape;
use crate::spec::Target;

/// Rows of 16-bit values must begin at multiples of 16 bytes.
pub(crate) const ALIGNED_VALUES: usize = 8;

/// The projections of one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Group {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Group {
    pub(crate) const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// Its projections, in the order of their rows.
    pub(crate) fn targets(self) -> &'static [Target] {
        match self {
            Self::Qkv => &[Target::QProj, Target::KProj, Target::VProj],
            Self::O => &[Target::OProj],
            Self::GateUp => &[Target::GateProj, Target::UpProj],
            Self::Down => &[Target::DownProj],
        }
    }
}

/// A group's sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GroupSizes {
    /// N: rows of all its weights.
    pub(crate) outputs: usize,
    /// K: columns.
    pub(crate) inputs: usize,
    /// E: columns that its LoRAs add to x and to y, 0 where it has none.
    pub(crate) extension: usize,
    /// Values from row to row of W'.
    pub(crate) stride: usize,
}

impl GroupSizes {
    /// Rows of W'.
    pub(crate) fn rows(&self) -> usize {
        self.outputs + self.extension
    }

    /// Values that W' takes.
    pub(crate) fn values(&self) -> usize {
        self.rows() * self.stride
    }
}

/// All widths of a model with a LoRA.
#[derive(Debug, Clone)]
pub(crate) struct Sizes {
    pub(crate) shape: Shape,
    /// R, rounded up.
    pub(crate) padded_rank: usize,
    groups: [GroupSizes; 4],
}

impl Sizes {
    pub(crate) fn new(shape: &Shape, lora: &LoraLayout) -> Self {
        let spec = lora.spec();
        let padded_rank = (spec.r as usize).next_multiple_of(ALIGNED_VALUES);
        let groups = Group::ALL.map(|group| {
            let targets = group.targets();
            let has_lora = targets.iter().any(|target| spec.target_modules.contains(target));
            let extension = if has_lora { padded_rank * targets.len() } else { 0 };
            let inputs = shape.projection(targets[0]).1;
            let outputs = targets.iter().map(|&target| shape.projection(target).0).sum();
            GroupSizes { outputs, inputs, extension, stride: aligned(inputs + extension) }
        });
        Self { shape: shape.clone(), padded_rank, groups }
    }

    pub(crate) fn group(&self, group: Group) -> GroupSizes {
        self.groups[group as usize]
    }

    /// Width of the queries of a token.
    pub(crate) fn queries(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    /// Width of the keys of a token, and of its values.
    pub(crate) fn keys(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    /// Columns of the residual stream's gradient: it is the output of two groups.
    pub(crate) fn residual_stride(&self) -> usize {
        aligned(self.shape.hidden + self.group(Group::O).extension.max(self.group(Group::Down).extension))
    }

    /// Columns of a norm's output: it is the input of two groups.
    pub(crate) fn norm_stride(&self) -> usize {
        aligned(self.shape.hidden + self.group(Group::Qkv).extension.max(self.group(Group::GateUp).extension))
    }
}

/// The next stride at which rows are aligned.
pub(crate) fn aligned(values: usize) -> usize {
    values.next_multiple_of(ALIGNED_VALUES)
}
