//! Rows that are encoded alone: dense, fp8 and token-wise codes.

use super::affine::Affine;
use super::{Codec, decode_fp8, encode_fp8, pack_codes, unpack_codes};
use crate::error::{ReferenceError, value};
use half::{bf16, f16};

/// A row as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedRow {
    /// Codes, dimension i at bit i · [`Codec::bits`], zero-padded to 16 bytes.
    pub codes: Vec<u8>,
    /// (f16 scale, f16 zero) a group.
    pub params: Vec<u8>,
}

pub(super) fn check_group(dim: usize, group: usize) -> Result<(), ReferenceError> {
    if group == 0 || !dim.is_multiple_of(group) {
        return value("group", format!("{group} does not divide {dim} values"));
    }
    Ok(())
}

fn check_alone(codec: Codec) -> Result<(), ReferenceError> {
    match codec {
        Codec::Pq => value("codec", "pq rows need codebooks: encode_pq and decode_pq take them"),
        c if c.is_channel_wise() => {
            value("codec", format!("{c} rows are encoded a group at a time: encode_channels and decode_channels do"))
        }
        _ => Ok(()),
    }
}

/// Encodes one row `[dim]`; fp8 with scale 1.
///
/// # Errors
/// `group` does not divide the row; a codec whose rows are not encoded alone.
pub fn encode_row(x: &[f32], codec: Codec, group: usize) -> Result<EncodedRow, ReferenceError> {
    check_group(x.len(), group)?;
    check_alone(codec)?;
    let mut params = Vec::with_capacity(codec.params_bytes(x.len(), group));
    let mut codes = match codec {
        Codec::Bf16 => x.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        Codec::F16 => x.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        Codec::Fp8 => x.iter().map(|&x| encode_fp8(x, 1.0)).collect(),
        _ => {
            let mut codes = Vec::with_capacity(x.len());
            for values in x.chunks(group) {
                let affine = Affine::of(values.iter().copied(), codec.bits());
                params.extend(affine.to_bytes());
                codes.extend(values.iter().map(|&x| affine.code(x, codec.bits())));
            }
            pack_codes(&codes, codec.bits())?
        }
    };
    codes.resize(codec.row_bytes(x.len()), 0);
    Ok(EncodedRow { codes, params })
}

/// Decodes one row of `dim` values; fp8 with scale 1.
///
/// # Errors
/// `group` does not divide `dim`, there are too few bytes; a codec whose rows are not encoded alone.
pub fn decode_row(codes: &[u8], params: &[u8], dim: usize, codec: Codec, group: usize) -> Result<Vec<f32>, ReferenceError> {
    check_group(dim, group)?;
    check_alone(codec)?;
    if codes.len() < (dim * codec.bits()).div_ceil(8) || params.len() < codec.params_bytes(dim, group) {
        return value("codes", format!("{} and {} bytes are too few for {dim} values of {codec}", codes.len(), params.len()));
    }
    Ok(match codec {
        Codec::Bf16 => codes.chunks_exact(2).take(dim).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Codec::F16 => codes.chunks_exact(2).take(dim).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Codec::Fp8 => codes[..dim].iter().map(|&c| decode_fp8(c, 1.0)).collect(),
        _ => {
            let codes = unpack_codes(codes, dim, codec.bits())?;
            let groups = codes.chunks(group).zip(Affine::all(params));
            groups.flat_map(|(codes, affine)| codes.iter().map(move |&c| affine.value(c))).collect()
        }
    })
}
