//! What a head's rows are after they were stored: the part that all quantized ops share.

use crate::codec::{
    Codebooks, Codec, Format, decode_channels, decode_fp8, decode_pq, decode_row, encode_channels, encode_fp8, encode_pq,
    encode_row, hadamard,
};
use crate::error::{ReferenceError, shape, value};
use crate::{Dtype, attend};
use std::borrow::Cow;

/// How the keys or the values of all kv heads are stored.
#[derive(Clone, Copy, Debug)]
pub struct Storage<'a> {
    /// Codec and settings.
    pub format: Format,
    /// fp8: one scale a head `[Hk]`, finite and above 0; default 1.
    pub scales: Option<&'a [f32]>,
    /// pq: `[Hk, m, c, d/m]`.
    pub codebooks: Option<Codebooks<'a>>,
}

impl<F: Into<Format>> From<F> for Storage<'_> {
    fn from(format: F) -> Self {
        Self { format: format.into(), scales: None, codebooks: None }
    }
}

impl<'a> Storage<'a> {
    /// One for each of `heads` heads, for rows of `dim` values.
    ///
    /// # Errors
    /// A format that such rows cannot have ([`Format::check`]), scales or codebooks of another size, a scale that is not
    /// finite and above 0, pq without codebooks.
    pub fn heads(&self, heads: usize, dim: usize) -> Result<Vec<HeadStorage<'a>>, ReferenceError> {
        if let Some(scales) = self.scales {
            shape("fp8 scales", scales.len(), &[heads])?;
        }
        if let Some(codebooks) = self.codebooks {
            codebooks.check(heads, dim)?;
        }
        let of = |h: usize| {
            let codebooks = self.codebooks.map(|c| c.head(h, dim)).transpose()?;
            let head = HeadStorage { format: self.format, scale: self.scales.map_or(1.0, |s| s[h]), codebooks };
            head.check(dim)?;
            Ok(head)
        };
        (0..heads).map(of).collect()
    }
}

/// How one head's rows are stored.
#[derive(Clone, Copy, Debug)]
pub struct HeadStorage<'a> {
    /// Codec and settings.
    pub format: Format,
    /// Scale of fp8.
    pub scale: f32,
    /// pq: `[m, c, d/m]`.
    pub codebooks: Option<Codebooks<'a>>,
}

impl<F: Into<Format>> From<F> for HeadStorage<'_> {
    fn from(format: F) -> Self {
        Self { format: format.into(), scale: 1.0, codebooks: None }
    }
}

impl HeadStorage<'_> {
    /// Checks it against rows of `dim` values.
    ///
    /// # Errors
    /// A format that such rows cannot have, a scale that is not finite and above 0, codebooks missing or of another size.
    pub fn check(&self, dim: usize) -> Result<(), ReferenceError> {
        self.format.check(dim)?;
        match (self.format.codec, self.codebooks) {
            (Codec::Fp8, _) if !(self.scale > 0.0 && self.scale.is_finite()) => {
                value("fp8 scales", format!("{} is not a finite number above 0", self.scale))
            }
            (Codec::Pq, None) => value("codebooks", "pq needs codebooks"),
            (Codec::Pq, Some(codebooks)) => codebooks.check(1, dim),
            _ => Ok(()),
        }
    }

    fn subvectors(&self) -> usize {
        self.codebooks.map_or(0, |c| c.subvectors)
    }

    /// What a row that is encoded alone decodes to; turned before and back after, where the format says so.
    ///
    /// # Errors
    /// As [`HeadStorage::check`]; a channel-wise codec.
    pub fn row(&self, x: &[f32]) -> Result<Vec<f32>, ReferenceError> {
        self.format.check(x.len())?;
        let x = self.turned(x)?;
        let decoded = match (self.format.codec, &self.codebooks) {
            (Codec::Fp8, _) => x.iter().map(|&x| decode_fp8(encode_fp8(x, self.scale), self.scale)).collect(),
            (Codec::Pq, Some(codebooks)) => decode_pq(&encode_pq(&x, codebooks)?, x.len(), codebooks)?,
            (codec, _) => {
                let group = self.format.group_of(x.len());
                let row = encode_row(&x, codec, group)?;
                decode_row(&row.codes, &row.params, x.len(), codec, group)?
            }
        };
        Ok(self.turned(&decoded)?.into_owned())
    }

    /// What whole groups of a channel-wise codec decode to.
    fn channels(&self, rows: &[f32], dim: usize) -> Result<Vec<f32>, ReferenceError> {
        let bits = self.format.codec.bits();
        let mut out = Vec::with_capacity(rows.len());
        for group in rows.chunks_exact(self.format.group_of(dim) * dim) {
            let turned = self.turned_rows(group, dim)?;
            let stored = encode_channels(&turned, dim, bits)?;
            out.extend(self.turned_rows(&decode_channels(&stored.codes, &stored.params, dim, bits)?, dim)?);
        }
        Ok(out)
    }

    fn turned<'r>(&self, row: &'r [f32]) -> Result<Cow<'r, [f32]>, ReferenceError> {
        Ok(if self.format.hadamard { Cow::Owned(hadamard(row)?) } else { Cow::Borrowed(row) })
    }

    fn turned_rows(&self, rows: &[f32], dim: usize) -> Result<Vec<f32>, ReferenceError> {
        let mut out = Vec::with_capacity(rows.len());
        for row in rows.chunks_exact(dim) {
            out.extend_from_slice(&self.turned(row)?);
        }
        Ok(out)
    }
}

/// Which rows of a head are kept as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiers {
    /// What rows are rounded to before; exact rows are stored in it.
    pub dtype: Dtype,
    /// First rows that are exact.
    pub sink_rows: usize,
    /// Last rows that are exact.
    pub recent_rows: usize,
}

impl Tiers {
    /// No rows are exact.
    pub fn none(dtype: Dtype) -> Self {
        Self { dtype, sink_rows: 0, recent_rows: 0 }
    }
}

/// A head's rows after they were stored.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedRows {
    /// `[n, d]` as a later read gives them: not turned, exact rows as they were.
    pub decoded: Vec<f32>,
    /// Bytes stored, with scales, zeros and the padding of every row to 16 bytes; without what all rows share.
    pub bytes: usize,
}

/// Stores a head's rows `[n, d]`, already rounded to `tiers.dtype`, and reads them again.
///
/// The first and last rows that `tiers` names are exact; the body between is encoded. Channel-wise, groups start where the
/// body does, and what is left of it after the whole groups is exact too (as KIVI's residual, arXiv 2402.02750 §3.2).
///
/// # Errors
/// As [`HeadStorage::check`]; a part of a row.
pub fn quantize_rows(rows: &[f32], dim: usize, storage: &HeadStorage<'_>, tiers: Tiers) -> Result<QuantizedRows, ReferenceError> {
    storage.check(dim)?;
    if dim == 0 || !rows.len().is_multiple_of(dim) {
        return value("rows", format!("{} values are no rows of {dim}", rows.len()));
    }
    let (n, format) = (rows.len() / dim, &storage.format);
    let start = tiers.sink_rows.min(n);
    let mut end = n.saturating_sub(tiers.recent_rows).max(start);
    if format.codec.is_channel_wise() {
        end -= (end - start) % format.group_of(dim);
    }
    let body = &rows[start * dim..end * dim];
    let mut decoded = rows[..start * dim].to_vec();
    if format.codec.is_channel_wise() {
        decoded.extend(storage.channels(body, dim)?);
    } else {
        for row in body.chunks_exact(dim) {
            decoded.extend(storage.row(row)?);
        }
    }
    decoded.extend_from_slice(&rows[end * dim..]);
    let stored = format.stored_bytes(end - start, dim, tiers.dtype, storage.subvectors());
    Ok(QuantizedRows { decoded, bytes: stored + Format::exact_bytes(n - (end - start), dim, tiers.dtype) })
}

/// All heads `[B, Hk, T, d]` through [`quantize_rows`], each inside its length; 0 beyond. And the bytes of all.
pub(crate) fn quantize_heads(
    x: &[f32],
    (dims, dim): ([usize; 3], usize),
    storage: &Storage<'_>,
    tiers: Tiers,
    lengths: Option<&[i32]>,
) -> Result<QuantizedRows, ReferenceError> {
    let [seqs, kv_heads, rows] = dims;
    let heads = storage.heads(kv_heads, dim)?;
    let mut all = QuantizedRows { decoded: Vec::with_capacity(x.len()), bytes: 0 };
    for (b, h) in (0..seqs).flat_map(|b| (0..kv_heads).map(move |h| (b, h))) {
        let n = attend::length_of(lengths, dims, b, h);
        let held = quantize_rows(&x[(b * kv_heads + h) * rows * dim..][..n * dim], dim, &heads[h], tiers)?;
        all.decoded.extend(held.decoded);
        all.decoded.resize(all.decoded.len() + (rows - n) * dim, 0.0);
        all.bytes += held.bytes;
    }
    Ok(all)
}
