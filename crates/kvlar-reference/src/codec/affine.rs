//! Scale and zero of a group of values.

use half::f16;

/// A group's scale and zero, as f16 holds them; both NaN if the group cannot be stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Affine {
    scale: f32,
    zero: f32,
}

/// The largest code of `bits` bits.
fn levels(bits: usize) -> f32 {
    ((1u32 << bits) - 1) as f32
}

impl Affine {
    /// Of a group. It is rounded before any code is computed, so that decoding is no further from a value than encoding
    /// thought.
    pub fn of(values: impl Iterator<Item = f32> + Clone, bits: usize) -> Self {
        let unstorable = Self { scale: f32::NAN, zero: f32::NAN };
        if values.clone().any(|x| !x.is_finite()) {
            return unstorable;
        }
        let low = values.clone().fold(f32::INFINITY, f32::min);
        let high = values.fold(f32::NEG_INFINITY, f32::max);
        let a = Self { scale: f16::from_f32((high - low) / levels(bits)).to_f32(), zero: f16::from_f32(low).to_f32() };
        if a.scale.is_finite() && a.zero.is_finite() { a } else { unstorable }
    }

    /// The code of a value of the group.
    pub fn code(self, x: f32, bits: usize) -> u8 {
        if self.scale > 0.0 { ((x - self.zero) / self.scale).round_ties_even().clamp(0.0, levels(bits)) as u8 } else { 0 }
    }

    /// What a code stands for.
    pub fn value(self, code: u8) -> f32 {
        f32::from(code).mul_add(self.scale, self.zero)
    }

    /// f16 scale, f16 zero.
    pub fn to_bytes(self) -> [u8; 4] {
        let (scale, zero) = (f16::from_f32(self.scale).to_le_bytes(), f16::from_f32(self.zero).to_le_bytes());
        [scale[0], scale[1], zero[0], zero[1]]
    }

    /// Reads what [`Affine::to_bytes`] wrote.
    pub fn from_bytes(b: [u8; 4]) -> Self {
        Self { scale: f16::from_le_bytes([b[0], b[1]]).to_f32(), zero: f16::from_le_bytes([b[2], b[3]]).to_f32() }
    }

    /// All of `params`, one after the other; a rest of fewer than four bytes is none.
    pub fn all(params: &[u8]) -> impl Iterator<Item = Self> + '_ {
        params.chunks_exact(4).map(|b| Self::from_bytes([b[0], b[1], b[2], b[3]]))
    }
}
