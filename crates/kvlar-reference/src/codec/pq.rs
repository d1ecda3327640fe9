//! Product quantization: a row in sub-vectors, each stored as the number of its nearest centroid (Jégou et al. 2011;
//! HCAttention, arXiv 2507.19823 §3).

use crate::error::{ReferenceError, shape, value};

/// Centroids of one head `[m, c, d/m]`, or of several heads one after the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Codebooks<'a> {
    /// m: sub-vectors of a row.
    pub subvectors: usize,
    /// c: centroids of each, up to 256; up to 65536 where codes take two bytes ([`encode_pq16`]), which no cache stores.
    pub centroids: usize,
    /// `[m, c, d/m]` or `[Hk, m, c, d/m]`.
    pub values: &'a [f32],
}

impl<'a> Codebooks<'a> {
    /// Checks them against `heads` heads of `dim` dimensions.
    ///
    /// # Errors
    /// Sub-vectors that do not divide a row, other than 1 to 256 centroids, another size, a number that is not finite.
    pub fn check(&self, heads: usize, dim: usize) -> Result<(), ReferenceError> {
        self.check_shape(dim, BYTE)?;
        shape("codebooks", self.values.len(), &[heads, self.subvectors, self.centroids, dim / self.subvectors])?;
        match self.values.iter().find(|x| !x.is_finite()) {
            Some(bad) => value("codebooks", format!("a centroid holds {bad}; all must be finite")),
            None => Ok(()),
        }
    }

    fn check_shape(&self, dim: usize, most: usize) -> Result<(), ReferenceError> {
        if self.subvectors == 0 || dim == 0 || !dim.is_multiple_of(self.subvectors) {
            return value("codebooks", format!("{} sub-vectors do not divide {dim} dimensions", self.subvectors));
        }
        if !(1..=most).contains(&self.centroids) {
            return value("codebooks", format!("{} centroids a sub-vector; 1 to {most} are possible", self.centroids));
        }
        Ok(())
    }

    /// Those of one head.
    ///
    /// # Errors
    /// There are none of that head.
    pub fn head(&self, head: usize, dim: usize) -> Result<Self, ReferenceError> {
        let size = self.centroids * dim;
        match self.values.get(head * size..(head + 1) * size) {
            Some(values) => Ok(Self { values, ..*self }),
            None => value("codebooks", format!("there are none of head {head}")),
        }
    }

    /// Centroids `[c, d/m]` of one sub-vector.
    fn of(&self, subvector: usize, width: usize) -> &'a [f32] {
        &self.values[subvector * self.centroids * width..][..self.centroids * width]
    }
}

/// Centroids that a code of one byte, or of two, can name.
const BYTE: usize = 1 << 8;
const TWO_BYTES: usize = 1 << 16;

/// Squared distance in f32: differences, squares and sum in the order of dimensions, each rounded, none fused. A device does
/// the same, bit for bit.
fn squared_distance(x: &[f32], centroid: &[f32]) -> f32 {
    let mut sum = 0f32;
    for (a, b) in x.iter().zip(centroid) {
        let difference = a - b;
        sum += difference * difference;
    }
    sum
}

/// Codes `[m]` of a row: the nearest centroid of each sub-vector, of equally near ones the first.
///
/// A sub-vector none of whose distances is finite (it holds NaN, an infinity, or numbers whose squares overflow) gets code 0:
/// there is no code for NaN, so it does not show in what is decoded. Other sub-vectors are unaffected.
///
/// # Errors
/// Codebooks of another size, more than 256 centroids.
pub fn encode_pq(x: &[f32], codebooks: &Codebooks<'_>) -> Result<Vec<u8>, ReferenceError> {
    Ok(nearest(x, codebooks, BYTE)?.into_iter().map(|code| code as u8).collect())
}

/// Likewise in two bytes a code. HCAttention's own setting, 2048 centroids (arXiv 2507.19823 §4), needs them; to compare what
/// either loses.
///
/// # Errors
/// Codebooks of another size, more than 65536 centroids.
pub fn encode_pq16(x: &[f32], codebooks: &Codebooks<'_>) -> Result<Vec<u16>, ReferenceError> {
    Ok(nearest(x, codebooks, TWO_BYTES)?.into_iter().map(|code| code as u16).collect())
}

fn nearest(x: &[f32], codebooks: &Codebooks<'_>, most: usize) -> Result<Vec<usize>, ReferenceError> {
    codebooks.check_shape(x.len(), most)?;
    let width = x.len() / codebooks.subvectors;
    shape("codebooks", codebooks.values.len(), &[codebooks.subvectors, codebooks.centroids, width])?;
    let nearest = |(i, x): (usize, &[f32])| {
        let (mut code, mut least) = (0, f32::INFINITY);
        for (c, centroid) in codebooks.of(i, width).chunks_exact(width).enumerate() {
            let distance = squared_distance(x, centroid);
            if distance < least {
                (code, least) = (c, distance);
            }
        }
        code
    };
    Ok(x.chunks_exact(width).enumerate().map(nearest).collect())
}

/// The row of `dim` values that codes `[m]` stand for.
///
/// # Errors
/// Codebooks of another size, too few codes, a code without a centroid.
pub fn decode_pq(codes: &[u8], dim: usize, codebooks: &Codebooks<'_>) -> Result<Vec<f32>, ReferenceError> {
    row_of(codes.iter().map(|&code| code.into()), dim, codebooks, BYTE)
}

/// Likewise of codes of two bytes.
///
/// # Errors
/// As for [`decode_pq`].
pub fn decode_pq16(codes: &[u16], dim: usize, codebooks: &Codebooks<'_>) -> Result<Vec<f32>, ReferenceError> {
    row_of(codes.iter().map(|&code| code.into()), dim, codebooks, TWO_BYTES)
}

fn row_of(
    codes: impl ExactSizeIterator<Item = usize>,
    dim: usize,
    codebooks: &Codebooks<'_>,
    most: usize,
) -> Result<Vec<f32>, ReferenceError> {
    codebooks.check_shape(dim, most)?;
    let width = dim / codebooks.subvectors;
    shape("codebooks", codebooks.values.len(), &[codebooks.subvectors, codebooks.centroids, width])?;
    if codes.len() < codebooks.subvectors {
        return value("codes", format!("{} are too few for {} sub-vectors", codes.len(), codebooks.subvectors));
    }
    let mut row = Vec::with_capacity(dim);
    for (i, code) in codes.take(codebooks.subvectors).enumerate() {
        if code >= codebooks.centroids {
            return value("codes", format!("{code} is not one of {} centroids", codebooks.centroids));
        }
        row.extend_from_slice(&codebooks.of(i, width)[code * width..][..width]);
    }
    Ok(row)
}
