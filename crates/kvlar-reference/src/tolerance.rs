//! The one table of tolerances, derived from storage type, format and reduction length.

use crate::{Codec, Dtype};

/// Bounds of [`crate::compare::compare`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// An element may be off by this,
    pub absolute: f64,
    /// or by this times its value.
    pub relative: f64,
    /// Bound of the cosine distance.
    pub cosine: f64,
}

impl Tolerance {
    /// Equal but for the sign of zero.
    pub const EXACT: Self = Self { absolute: 0.0, relative: 0.0, cosine: 1e-12 };

    /// Attention output. Weights are rounded to the 16-bit type of the value product (f16 for integer rows), each by at
    /// most its unit roundoff u: the output is off by at most u · Σ weight · |v|, below u · `magnitude` for |v| up to it.
    /// Accumulation in fp32 adds 2⁻²⁴ √n, and the approximate exponential 2⁻²² · |logit| (below 64). `codec` is the values'.
    pub fn attend(dtype: Dtype, codec: Codec, rows: usize, magnitude: f64) -> Self {
        let weight = if codec.dense().is_none() { Dtype::F16 } else { dtype };
        let u = weight.unit_roundoff();
        let accumulate = 2f64.powi(-24) * (rows.max(1) as f64).sqrt() + 2f64.powi(-16);
        // Integers sum (1024 + code) · weight and take 1024 · weight away: fp32 rounds that where a value needs half its codes.
        let half = (1u32 << codec.bits().min(16)) as f64 / 2.0;
        let cancel = if codec.is_integer() { 2f64.powi(-24) * 1280.0 * (128.0 / half) } else { 0.0 };
        let absolute = magnitude * (u + accumulate + cancel);
        Self { absolute, relative: u, cosine: 4.0 * u * u + 1e-9 }
    }

    /// Attention output over rebuilt keys: as [`Tolerance::attend`], and logits are off because rebuilt keys and turned
    /// queries are each rounded to `dtype`, by u/√3 of every product's factors: a standard deviation of
    /// √(2/3) u · `logit` where a logit's own is `logit`. Five of them move a weight by at most a quarter of that (two equal
    /// rows), the output by that times their distance.
    pub fn attend_lowrank(dtype: Dtype, rows: usize, magnitude: f64, logit: f64) -> Self {
        let u = dtype.unit_roundoff();
        let plain = Self::attend(dtype, Codec::Bf16, rows, magnitude);
        let moved = 2.0 * u * logit;
        Self { absolute: plain.absolute + magnitude * moved, relative: u + moved, cosine: 4.0 * (u + moved).powi(2) + 1e-9 }
    }

    /// Attention output over channel-wise keys and values in groups: weights and decoded values are each rounded to f16, so
    /// are queries times scales. Codes times scale count from the zero of a group of 32 rows or more, about two standard
    /// deviations below the mean: a logit is off by u/√3 · 2.2 `logit` where a logit's own standard deviation is `logit`.
    /// Five of those move the output as in [`Tolerance::attend_lowrank`].
    pub fn attend_channels(rows: usize, magnitude: f64, logit: f64) -> Self {
        let u = Dtype::F16.unit_roundoff();
        let plain = Self::attend(Dtype::F16, Codec::F16, rows, magnitude);
        let moved = 3.2 * u * logit;
        let absolute = plain.absolute + magnitude * (u + moved);
        Self { absolute, relative: 2.0 * u + moved, cosine: 4.0 * (2.0 * u + moved).powi(2) + 1e-9 }
    }

    /// lse over channel-wise keys: five standard deviations of a logit's error, see [`Tolerance::attend_channels`].
    pub fn lse_channels(logit: f64) -> Self {
        let u = Dtype::F16.unit_roundoff();
        Self { absolute: 1e-3 + 6.4 * u * logit, relative: 1e-5 + 0.1 * u, cosine: 1e-6 + u * u }
    }

    /// lse over rebuilt keys: five standard deviations of a logit's error, see [`Tolerance::attend_lowrank`].
    pub fn lse_lowrank(dtype: Dtype, logit: f64) -> Self {
        let u = dtype.unit_roundoff();
        Self { absolute: 1e-3 + 5.0 * 0.82 * u * logit, relative: 1e-5 + 0.1 * u, cosine: 1e-6 + u * u }
    }

    /// lse: the products are exact, fp32 sums over d and n are not; queries of integer rows are exact in f16 but for
    /// underflow.
    pub fn lse(codec: Codec) -> Self {
        // Fewer codes are larger steps of the fp32 sums of 1024 + code.
        let absolute = match codec.bits() {
            16 => 1e-3,
            2 => 5e-3,
            _ => 2e-3,
        };
        Self { absolute, relative: 1e-5, cosine: 1e-6 }
    }

    /// Logits (and so scores and lse) of a scan, whose own standard deviation is `logit`. Rows that are stored as they are and
    /// queries of integer rows are exact; fp32 sums are not ([`Tolerance::lse`] for those of codes). Centroids are rounded to
    /// f16, and so are rotated queries: by 2⁻¹¹/√3 of every product, five standard deviations.
    pub fn scan(codec: Codec, logit: f64) -> Self {
        let absolute = match codec {
            Codec::Bf16 | Codec::F16 => 1e-4,
            c => Self::lse(c).absolute,
        };
        Self { absolute: absolute * logit.max(1.0), relative: 1e-5, cosine: 1e-6 }
    }

    /// Scores by attention, sums and means of exp(logit − lse) where logits' own standard deviation is `logit`: a logit is off by
    /// 2⁻²⁰ of that in fp32 sums (on tensor cores: truncated ones), and so is a weight by that part of itself, five deviations.
    /// The approximate exponential adds 2⁻²².
    pub fn score(logit: f64) -> Self {
        Self { absolute: 1e-6, relative: 2e-5 * logit.max(1.0), cosine: 1e-9 }
    }

    /// A merged output or lse: fp32 arithmetic only.
    pub fn merge() -> Self {
        Self { absolute: 1e-5, relative: 1e-5, cosine: 1e-9 }
    }

    /// A decoded row after rotation: the rotation is fp32 (2⁻²² relative to the pair's norm), which may move a value
    /// across a rounding boundary: one ulp of a 16-bit format or of fp8, one code of an integer
    /// format (and one ulp of its scale and zero).
    pub fn append(codec: Codec, magnitude: f64) -> Self {
        let step = match codec {
            Codec::Bf16 => 2f64.powi(-7),
            Codec::F16 => 2f64.powi(-10),
            Codec::Int8 => 2.0 / 255.0 * 1.01 + 2f64.powi(-10),
            Codec::Int4 | Codec::Int4Channel => 2.0 / 15.0 * 1.01 + 2f64.powi(-10),
            Codec::Int2 | Codec::Int2Channel => 2.0 / 3.0 * 1.01 + 2f64.powi(-10),
            Codec::Fp8 => 2f64.powi(-3),
            // Another centroid may be anywhere.
            Codec::Pq => 2.0,
        };
        Self { absolute: magnitude * step, relative: step, cosine: step * step }
    }

    /// A latent: products of 16-bit values are exact in fp32; a sum of `width` of them, none of whose partial sums is above
    /// `magnitude`, rounds (on tensor cores: truncates) 2⁻²³ of that each time, mostly in random directions. `out` is what
    /// it is stored as.
    pub fn project(out: Dtype, width: usize, magnitude: f64) -> Self {
        let u = if out == Dtype::F32 { 0.0 } else { out.unit_roundoff() };
        let absolute = magnitude * 2f64.powi(-21) * (width.max(1) as f64).sqrt();
        Self { absolute: absolute + u * absolute, relative: 2.0 * u + 2f64.powi(-20), cosine: 4.0 * u * u + 1e-9 }
    }
}
