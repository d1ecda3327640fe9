//! Channel-wise codes: a scale and zero for each channel of a group of rows (KIVI, arXiv 2402.02750 §3.1).

use super::affine::Affine;
use super::{Codec, dense_row_bytes, pack_codes, unpack_codes};
use crate::error::{ReferenceError, value};

/// A group of rows as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedChannels {
    /// Row after row, each packed as a token-wise row of as many bits and zero-padded to 16 bytes.
    pub codes: Vec<u8>,
    /// (f16 scale, f16 zero) a channel.
    pub params: Vec<u8>,
}

fn row_bytes(dim: usize, bits: usize) -> usize {
    (dim * bits).div_ceil(8).next_multiple_of(16)
}

fn check_dim(values: usize, dim: usize) -> Result<(), ReferenceError> {
    if dim == 0 || values == 0 || !values.is_multiple_of(dim) {
        return value("rows", format!("{values} values are no rows of {dim}"));
    }
    Ok(())
}

/// Encodes a group of rows `[group, dim]` in codes of `bits` bits (2, 4 or 8).
///
/// A channel whose values are not all finite decodes to NaN in this group; other channels and groups are unaffected.
///
/// # Errors
/// No rows or a part of one, another width.
pub fn encode_channels(rows: &[f32], dim: usize, bits: usize) -> Result<EncodedChannels, ReferenceError> {
    check_dim(rows.len(), dim)?;
    // The width is checked before it is used.
    pack_codes(&[], bits)?;
    let channel = |c: usize| rows[c..].iter().step_by(dim).copied();
    let affine: Vec<Affine> = (0..dim).map(|c| Affine::of(channel(c), bits)).collect();
    let mut codes = Vec::with_capacity(rows.len() / dim * row_bytes(dim, bits));
    for row in rows.chunks_exact(dim) {
        let row: Vec<u8> = row.iter().zip(&affine).map(|(&x, a)| a.code(x, bits)).collect();
        codes.extend(pack_codes(&row, bits)?);
        codes.resize(codes.len().next_multiple_of(row_bytes(dim, bits)), 0);
    }
    Ok(EncodedChannels { codes, params: affine.into_iter().flat_map(Affine::to_bytes).collect() })
}

/// Decodes a group of rows of `dim` values: `[group, dim]`, as many rows as there are codes of.
///
/// # Errors
/// A part of a row, too few scales, another width than 2, 4 and 8.
pub fn decode_channels(codes: &[u8], params: &[u8], dim: usize, bits: usize) -> Result<Vec<f32>, ReferenceError> {
    pack_codes(&[], bits)?;
    check_dim(codes.len(), row_bytes(dim, bits))?;
    if params.len() < 4 * dim {
        return value("params", format!("{} bytes are too few for the scales of {dim} channels", params.len()));
    }
    let mut rows = Vec::with_capacity(codes.len() / row_bytes(dim, bits) * dim);
    for row in codes.chunks_exact(row_bytes(dim, bits)) {
        rows.extend(unpack_codes(row, dim, bits)?.iter().zip(Affine::all(params)).map(|(&c, a)| a.value(c)));
    }
    Ok(rows)
}

/// Bytes of `rows` rows: whole groups as codes with a scale and zero a channel, the rest as `dense` bytes a value.
pub(super) fn stored_bytes(codec: Codec, rows: usize, dim: usize, group: usize, dense: usize) -> usize {
    let groups = rows.checked_div(group).unwrap_or(0);
    groups * (group * codec.row_bytes(dim) + 4 * dim) + (rows - groups * group) * dense_row_bytes(dim, dense)
}
