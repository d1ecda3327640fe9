//! The int8 form of a key basis.

use crate::error::{ReferenceError, shape};

/// Which dimensions rotate together, and where the pairs that do not come in the order of a rebuild: rotary pairs first,
/// then neighbours of the dimensions that are left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RotaryPairs {
    /// Dimensions that are rotated.
    pub rotary_dim: usize,
    /// i and i + rotary_dim / 2; else 2i and 2i + 1.
    pub half: bool,
}

impl RotaryPairs {
    /// The pair that a dimension belongs to.
    pub fn pair_of(&self, dim: usize) -> usize {
        if dim < self.rotary_dim && self.half { dim % (self.rotary_dim / 2) } else { dim / 2 }
    }
}

/// A key basis in 8 bits, symmetric, with one f32 scale a kv head and rotary pair: a pair's scale passes through its
/// rotation, so that products of int8 latents and int8 basis stay exact integers up to the score.
#[derive(Clone, Debug, PartialEq)]
pub struct Int8Basis {
    /// `[heads, d, rank]`.
    pub codes: Vec<i8>,
    /// `[heads, padded d / 2]`, d padded to a multiple of 32; 1 where nothing is scaled.
    pub scales: Vec<f32>,
}

impl Int8Basis {
    /// scale = largest |basis| of the pair / 127, but at least its largest |mean| / 2^21 (`mean [heads, d]`; fewer heads' is
    /// repeated for those that follow): kernels hold keys divided by 128 times the scale in f16. Codes round to nearest even.
    ///
    /// # Errors
    /// A basis or mean of another size.
    pub fn quantize(
        basis: &[f32],
        mean: Option<&[f32]>,
        heads: usize,
        head_dim: usize,
        rank: usize,
        pairs: RotaryPairs,
    ) -> Result<Self, ReferenceError> {
        shape("basis", basis.len(), &[heads, head_dim, rank])?;
        let half = head_dim.next_multiple_of(32) / 2;
        let (mut scales, mut codes) = (vec![0f32; heads * half], vec![0i8; basis.len()]);
        for (i, &x) in basis.iter().enumerate() {
            let scale = &mut scales[i / rank / head_dim * half + pairs.pair_of(i / rank % head_dim)];
            *scale = scale.max(x.abs() / 127.0);
        }
        if let Some(mean) = mean {
            let copies = (heads * head_dim).checked_div(mean.len()).unwrap_or(0);
            shape("mean", mean.len() * copies, &[heads, head_dim])?;
            for (i, &x) in mean.iter().cycle().take(heads * head_dim).enumerate() {
                let scale = &mut scales[i / head_dim * half + pairs.pair_of(i % head_dim)];
                *scale = scale.max(x.abs() * 2f32.powi(-21));
            }
        }
        for scale in scales.iter_mut().filter(|s| **s == 0.0) {
            *scale = 1.0;
        }
        for (i, (code, &x)) in codes.iter_mut().zip(basis).enumerate() {
            let scale = scales[i / rank / head_dim * half + pairs.pair_of(i / rank % head_dim)];
            *code = (x / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
        }
        Ok(Self { codes, scales })
    }

    /// code · scale, `[heads, head_dim, rank]`.
    pub fn dequantize(&self, head_dim: usize, rank: usize, pairs: RotaryPairs) -> Vec<f32> {
        let half = head_dim.next_multiple_of(32) / 2;
        let scale = |i: usize| self.scales[i / rank / head_dim * half + pairs.pair_of(i / rank % head_dim)];
        self.codes.iter().enumerate().map(|(i, &c)| f32::from(c) * scale(i)).collect()
    }
}
