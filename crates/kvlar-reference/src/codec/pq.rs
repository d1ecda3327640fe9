//! Product quantization: a row in sub-vectors, each stored as the number of its nearest centroid (Jégou et al. 2011;
//! HCAttention, arXiv 2507.19823 §3).

use crate::error::{ReferenceError, shape, value};

/// Centroids of one head `[m, c, d/m]`, or of several heads one after the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Codebooks<'a> {
    /// m: sub-vectors of a row.
    pub subvectors: usize,
    /// c: centroids of each, up to 256.
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
        self.check_shape(dim)?;
        shape("codebooks", self.values.len(), &[heads, self.subvectors, self.centroids, dim / self.subvectors])?;
        match self.values.iter().find(|x| !x.is_finite()) {
            Some(bad) => value("codebooks", format!("a centroid holds {bad}; all must be finite")),
            None => Ok(()),
        }
    }

    fn check_shape(&self, dim: usize) -> Result<(), ReferenceError> {
        if self.subvectors == 0 || dim == 0 || !dim.is_multiple_of(self.subvectors) {
            return value("codebooks", format!("{} sub-vectors do not divide {dim} dimensions", self.subvectors));
        }
        if !(1..=256).contains(&self.centroids) {
            return value("codebooks", format!("{} centroids a sub-vector; 1 to 256 are possible", self.centroids));
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
/// Codebooks of another size.
pub fn encode_pq(x: &[f32], codebooks: &Codebooks<'_>) -> Result<Vec<u8>, ReferenceError> {
    codebooks.check_shape(x.len())?;
    let width = x.len() / codebooks.subvectors;
    shape("codebooks", codebooks.values.len(), &[codebooks.subvectors, codebooks.centroids, width])?;
    let nearest = |(i, x): (usize, &[f32])| {
        let (mut code, mut least) = (0, f32::INFINITY);
        for (c, centroid) in codebooks.of(i, width).chunks_exact(width).enumerate() {
            let distance = squared_distance(x, centroid);
            if distance < least {
                (code, least) = (c as u8, distance);
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
    codebooks.check_shape(dim)?;
    let width = dim / codebooks.subvectors;
    shape("codebooks", codebooks.values.len(), &[codebooks.subvectors, codebooks.centroids, width])?;
    let Some(codes) = codes.get(..codebooks.subvectors) else {
        return value("codes", format!("{} are too few for {} sub-vectors", codes.len(), codebooks.subvectors));
    };
    if let Some(bad) = codes.iter().find(|&&c| usize::from(c) >= codebooks.centroids) {
        return value("codes", format!("{bad} is not one of {} centroids", codebooks.centroids));
    }
    Ok(codes.iter().enumerate().flat_map(|(i, &c)| &codebooks.of(i, width)[usize::from(c) * width..][..width]).copied().collect())
}
