//! Rotary position embedding (Su et al. 2021) and the ways to stretch it.

use crate::error::{ReferenceError, value};
use std::f64::consts::PI;
use std::str::FromStr;

/// Which dimensions are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// i and i + rotary_dim / 2 (GPT-NeoX, Llama in Hugging Face layout).
    Half,
    /// 2i and 2i + 1 (GPT-J).
    Interleaved,
}

impl FromStr for RopeLayout {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "half" => Ok(Self::Half),
            "interleaved" => Ok(Self::Interleaved),
            _ => Err(format!("{s:?} is not a RoPE layout (half, interleaved)")),
        }
    }
}

/// A rotation: pair i turns by position · inv_freq\[i\]; cos and sin are multiplied by the attention factor.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `[rotary_dim / 2]`; empty = no rotation. Dimensions beyond rotary_dim are left as they are.
    pub inv_freq: Vec<f32>,
    /// 1 but for YaRN.
    pub attention_factor: f32,
    /// Which dimensions make a pair.
    pub layout: RopeLayout,
}

/// How frequencies are changed for contexts longer than those of training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by a factor (position interpolation, Chen et al. 2023).
    Linear(f64),
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a blend between.
    Llama3 {
        /// Divides low frequencies.
        factor: f64,
        /// Wavelengths above original_max / low_freq_factor are scaled in full.
        low_freq_factor: f64,
        /// Wavelengths below original_max / high_freq_factor are kept.
        high_freq_factor: f64,
        /// Context of training.
        original_max: f64,
    },
    /// YaRN.
    Yarn(Yarn),
}

/// YaRN (Peng et al. 2023, §3): interpolation by parts and an attention factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// Context is stretched by this.
    pub factor: f64,
    /// Context of training.
    pub original_max: f64,
    /// Rotations over the context above which a frequency is kept (32).
    pub beta_fast: f64,
    /// Rotations below which it is divided by `factor` (1).
    pub beta_slow: f64,
    /// Given outright; default 0.1 ln(factor) + 1, or the quotient of the two below.
    pub attention_factor: Option<f64>,
    /// Multiplies the logarithm above (DeepSeek).
    pub mscale: Option<f64>,
    /// Divides by the same with this multiplier.
    pub mscale_all_dim: Option<f64>,
    /// Whether the bounds of the blend are rounded to whole dimensions (true in most checkpoints).
    pub truncate: bool,
}

impl Yarn {
    /// With the paper's constants.
    pub fn new(factor: f64, original_max: f64) -> Self {
        Self {
            factor,
            original_max,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        }
    }
}

impl Rope {
    /// No rotation.
    pub fn none() -> Self {
        Self { inv_freq: Vec::new(), attention_factor: 1.0, layout: RopeLayout::Half }
    }

    /// Frequencies theta^(−2i / rotary_dim), stretched.
    pub fn new(theta: f64, rotary_dim: usize, layout: RopeLayout, scaling: RopeScaling) -> Self {
        let base = |i: usize| theta.powf(-2.0 * i as f64 / rotary_dim as f64);
        let plain = (0..rotary_dim / 2).map(base);
        let (inv_freq, attention_factor): (Vec<f64>, f64) = match scaling {
            RopeScaling::None => (plain.collect(), 1.0),
            RopeScaling::Linear(factor) => (plain.map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max } => {
                let stretch = |f: f64| {
                    let turns = original_max * f / (2.0 * PI); // context / wavelength
                    if turns < low_freq_factor {
                        f / factor
                    } else if turns > high_freq_factor {
                        f
                    } else {
                        let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - kept) * f / factor + kept * f
                    }
                };
                (plain.map(stretch).collect(), 1.0)
            }
            RopeScaling::Yarn(y) => {
                // The (fractional) pair index that turns `turns` times over the context of training.
                let pair = |turns: f64| rotary_dim as f64 * (y.original_max / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
                let (mut low, mut high) = (pair(y.beta_fast), pair(y.beta_slow));
                if y.truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(rotary_dim as f64 - 1.0));
                let width = if high == low { 0.001 } else { high - low };
                let stretch = |(i, f): (usize, f64)| {
                    let scaled = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    f / y.factor * scaled + f * (1.0 - scaled)
                };
                (plain.enumerate().map(stretch).collect(), y.attention_factor())
            }
        };
        Self { inv_freq: inv_freq.into_iter().map(|f| f as f32).collect(), attention_factor: attention_factor as f32, layout }
    }

    /// Dimensions that are rotated.
    pub fn rotary_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }

    pub(crate) fn check(&self, head_dim: usize) -> Result<(), ReferenceError> {
        if self.rotary_dim() > head_dim {
            return value("inv_freq", format!("{} frequencies rotate more than {head_dim} dimensions", self.inv_freq.len()));
        }
        Ok(())
    }

    /// `x [d]` rotated to `position`; angles, sines and products in f64.
    pub fn rotate(&self, x: &[f32], position: i64) -> Vec<f32> {
        let half = self.inv_freq.len();
        let mut y = x.to_vec();
        for (i, &f) in self.inv_freq.iter().enumerate() {
            let (a, b) = match self.layout {
                RopeLayout::Half => (i, i + half),
                RopeLayout::Interleaved => (2 * i, 2 * i + 1),
            };
            let (sin, cos) = (position as f64 * f64::from(f)).sin_cos();
            let factor = f64::from(self.attention_factor);
            let (u, v) = (f64::from(x[a]), f64::from(x[b]));
            y[a] = (factor * (u * cos - v * sin)) as f32;
            y[b] = (factor * (v * cos + u * sin)) as f32;
        }
        y
    }
}

impl Yarn {
    fn attention_factor(&self) -> f64 {
        let scale = |m: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * m * self.factor.ln() + 1.0 };
        match (self.attention_factor, self.mscale, self.mscale_all_dim) {
            (Some(f), _, _) => f,
            (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
            _ => scale(1.0),
        }
    }
}
