//! Groups of values side by side in vector registers: lane `g` of the i-th register holds the i-th value of group `g`.
//!
//! Every group is worked on in the order of its own values, so that its result depends neither on its neighbours nor on how
//! many lanes the processor has. Products and sums are rounded one by one, never fused.
//!
//! Everything that touches a register is `inline(always)` and no closure does: a function that is called instead of inlined is
//! compiled without the processor's wide instructions, and the whole was some twenty times slower (docs/LOG.md).

use std::ops::{Add, Div, Mul, Sub};

use pulp::{Simd, WithSimd};

/// The most lanes of any processor.
pub(super) const MAX_LANES: usize = 16;

/// Added to and taken from a value below 2²² in magnitude, it leaves the nearest integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;

/// One value of every group.
#[derive(Clone, Copy)]
pub(super) struct Lanes<S: Simd> {
    simd: S,
    values: S::f32s,
}

/// Which lanes a comparison holds for.
#[derive(Clone, Copy)]
pub(super) struct Mask<S: Simd> {
    simd: S,
    lanes: S::m32s,
}

macro_rules! operator {
    ($($operator:ident $method:ident $call:ident)*) => {$(
        impl<S: Simd> $operator for Lanes<S> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Self { simd: self.simd, values: self.simd.$call(self.values, other.values) }
            }
        }
    )*};
}

operator! { Add add add_f32s  Sub sub sub_f32s  Mul mul mul_f32s  Div div div_f32s }

impl<S: Simd> Lanes<S> {
    /// The same value in every lane.
    #[inline(always)]
    pub(super) fn splat(simd: S, value: f32) -> Self {
        Self { simd, values: simd.splat_f32s(value) }
    }

    /// The same value in every lane, for the processor of `self`.
    #[inline(always)]
    pub(super) fn constant(self, value: f32) -> Self {
        Self::splat(self.simd, value)
    }

    /// At most as many groups of `N` values as there are lanes; a lane without a group holds zeros.
    #[inline(always)]
    pub(super) fn gather<const N: usize>(simd: S, values: &[f32]) -> [Self; N] {
        let mut by_lane = [[0f32; MAX_LANES]; N];
        for (lane, group) in values.chunks_exact(N).take(S::F32_LANES).enumerate() {
            for (row, &value) in by_lane.iter_mut().zip(group) {
                row[lane] = value;
            }
        }
        let mut gathered = [Self::splat(simd, 0.0); N];
        for (lanes, row) in gathered.iter_mut().zip(&by_lane) {
            lanes.values = S::as_simd_f32s(&row[..S::F32_LANES]).0[0];
        }
        gathered
    }

    /// The value of each lane.
    #[inline(always)]
    pub(super) fn to_array(self) -> [f32; MAX_LANES] {
        let mut values = [0f32; MAX_LANES];
        S::as_mut_simd_f32s(&mut values[..S::F32_LANES]).0[0] = self.values;
        values
    }

    #[inline(always)]
    pub(super) fn abs(self) -> Self {
        Self { values: self.simd.abs_f32s(self.values), ..self }
    }

    #[inline(always)]
    pub(super) fn sqrt(self) -> Self {
        Self { values: self.simd.sqrt_f32s(self.values), ..self }
    }

    #[inline(always)]
    pub(super) fn min(self, other: Self) -> Self {
        Self { values: self.simd.min_f32s(self.values, other.values), ..self }
    }

    #[inline(always)]
    pub(super) fn max(self, other: Self) -> Self {
        Self { values: self.simd.max_f32s(self.values, other.values), ..self }
    }

    /// The nearest integer, ties to even, kept within two bounds.
    #[inline(always)]
    pub(super) fn nearest(self, low: f32, high: f32) -> Self {
        let rounder = self.constant(ROUNDER);
        (self + rounder - rounder).max(self.constant(low)).min(self.constant(high))
    }

    #[inline(always)]
    pub(super) fn less(self, other: Self) -> Mask<S> {
        Mask { simd: self.simd, lanes: self.simd.less_than_f32s(self.values, other.values) }
    }

    #[inline(always)]
    pub(super) fn equal(self, other: Self) -> Mask<S> {
        Mask { simd: self.simd, lanes: self.simd.equal_f32s(self.values, other.values) }
    }

    /// Whether each lane is above zero.
    #[inline(always)]
    pub(super) fn positive(self) -> Mask<S> {
        self.constant(0.0).less(self)
    }
}

impl<S: Simd> Mask<S> {
    #[inline(always)]
    pub(super) fn and(self, other: Self) -> Self {
        Self { lanes: self.simd.and_m32s(self.lanes, other.lanes), ..self }
    }

    #[inline(always)]
    pub(super) fn not(self) -> Self {
        Self { lanes: self.simd.not_m32s(self.lanes), ..self }
    }

    /// Whether it holds for any lane.
    #[inline(always)]
    pub(super) fn any(self) -> bool {
        self.simd.first_true_m32s(self.lanes) < S::F32_LANES
    }

    /// `holds` in the lanes that it holds for, `otherwise` in the others.
    #[inline(always)]
    pub(super) fn select(self, holds: Lanes<S>, otherwise: Lanes<S>) -> Lanes<S> {
        let values = self.simd.select_f32s(self.lanes, holds.values, otherwise.values);
        Lanes { simd: self.simd, values }
    }
}

/// The nearest integer, ties to even, kept within two bounds.
#[inline(always)]
pub(super) fn nearest(value: f32, low: i32, high: i32) -> i32 {
    let mantissa = (value + ROUNDER).to_bits() & 0x7f_ffff;
    (mantissa as i32 - 0x40_0000).clamp(low, high)
}

/// Runs it with the widest registers that this processor has.
pub(super) fn with_widest<Op: WithSimd>(operation: Op) -> Op::Output {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V4::try_new() {
        return Simd::vectorize(simd, operation);
    } else if let Some(simd) = pulp::x86::V3::try_new() {
        return Simd::vectorize(simd, operation);
    }
    pulp::Arch::new().dispatch(operation)
}
