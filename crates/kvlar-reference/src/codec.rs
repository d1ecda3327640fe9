//! Storage formats of rows.
//!
//! Defined in f32 with a fixed order of operations and one rounding each. int8 and int4 (b bits), a (scale, zero) for each
//! `group` of a row: scale = f16((max − min) / (2^b − 1)), zero = f16(min), code = clamp(rint((x − zero) / scale), 0, 2^b − 1),
//! x̂ = zero + scale · code. A constant group has scale 0 and decodes to f16(value). A non-finite value, scale or zero
//! makes the whole group decode to NaN.

use crate::Dtype;
use crate::error::{ReferenceError, value};
use half::{bf16, f16};
use std::fmt;
use std::str::FromStr;

/// What the bytes of a stored row mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// 8-bit codes, token-wise: one scale and zero a row and group.
    Int8,
    /// 4-bit codes, likewise; the lower of a byte's two comes first.
    Int4,
}

impl Codec {
    /// All codecs.
    pub const ALL: [Self; 4] = [Self::Bf16, Self::F16, Self::Int8, Self::Int4];

    /// Bits of a stored value, without its share of scales.
    pub fn bits(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 16,
            Self::Int8 => 8,
            Self::Int4 => 4,
        }
    }

    /// Whether values are integer codes with scales and zeros.
    pub fn is_integer(self) -> bool {
        self.bits() < 16
    }

    /// Bytes of a row's codes, padded to 16.
    pub fn row_bytes(self, dim: usize) -> usize {
        (dim * self.bits()).div_ceil(8).next_multiple_of(16)
    }

    /// Bytes of a row's scales and zeros.
    pub fn params_bytes(self, dim: usize, group: usize) -> usize {
        if self.is_integer() { 4 * (dim / group) } else { 0 }
    }

    /// Bytes of `rows` stored rows, with scales, zeros and padding.
    pub fn stored_bytes(self, rows: usize, dim: usize, group: usize) -> usize {
        rows * (self.row_bytes(dim) + self.params_bytes(dim, group))
    }

    /// The 16-bit type of rows that are stored as they are.
    pub fn dense(self) -> Option<Dtype> {
        match self {
            Self::Bf16 => Some(Dtype::Bf16),
            Self::F16 => Some(Dtype::F16),
            Self::Int8 | Self::Int4 => None,
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}

impl FromStr for Codec {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let known = Self::ALL.map(|c| c.to_string());
        Self::ALL.into_iter().find(|c| c.to_string() == s).ok_or_else(|| format!("{s:?} is not a codec ({})", known.join(", ")))
    }
}

/// A row as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedRow {
    /// Codes, dimension i at byte i (2i for 16-bit formats), zero-padded to 16 bytes.
    pub codes: Vec<u8>,
    /// (f16 scale, f16 zero) a group.
    pub params: Vec<u8>,
}

fn check_group(dim: usize, group: usize) -> Result<(), ReferenceError> {
    if group == 0 || !dim.is_multiple_of(group) {
        return value("group", format!("{group} does not divide {dim} values"));
    }
    Ok(())
}

/// Encodes one row `[dim]`.
///
/// # Errors
/// `group` does not divide the row.
pub fn encode_row(x: &[f32], codec: Codec, group: usize) -> Result<EncodedRow, ReferenceError> {
    check_group(x.len(), group)?;
    let mut row = EncodedRow { codes: Vec::with_capacity(codec.row_bytes(x.len())), params: Vec::new() };
    match codec {
        Codec::Bf16 => row.codes.extend(x.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
        Codec::F16 => row.codes.extend(x.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes())),
        Codec::Int8 | Codec::Int4 => {
            let levels = ((1u32 << codec.bits()) - 1) as f32;
            let mut codes = Vec::with_capacity(x.len());
            for values in x.chunks(group) {
                let (scale, zero) = affine(values, levels);
                row.params.extend(f16::from_f32(scale).to_le_bytes());
                row.params.extend(f16::from_f32(zero).to_le_bytes());
                codes.extend(values.iter().map(|&x| code(x, scale, zero, levels) as u8));
            }
            if codec == Codec::Int4 {
                codes = codes.chunks(2).map(|c| c[0] | c.get(1).unwrap_or(&0) << 4).collect();
            }
            row.codes = codes;
        }
    }
    row.codes.resize(codec.row_bytes(x.len()), 0);
    Ok(row)
}

/// Scale and zero of a group, as f16 holds them; (NaN, NaN) if the group cannot be stored.
fn affine(values: &[f32], levels: f32) -> (f32, f32) {
    if values.iter().any(|x| !x.is_finite()) {
        return (f32::NAN, f32::NAN);
    }
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (scale, zero) = (f16::from_f32((high - low) / levels).to_f32(), f16::from_f32(low).to_f32());
    if scale.is_finite() && zero.is_finite() { (scale, zero) } else { (f32::NAN, f32::NAN) }
}

fn code(x: f32, scale: f32, zero: f32, levels: f32) -> f32 {
    if scale > 0.0 { ((x - zero) / scale).round_ties_even().clamp(0.0, levels) } else { 0.0 }
}

/// One code a byte.
fn unpack(codes: &[u8], dim: usize, codec: Codec) -> Vec<u8> {
    match codec {
        Codec::Int4 => codes.iter().flat_map(|c| [c & 15, c >> 4]).take(dim).collect(),
        _ => codes[..dim].to_vec(),
    }
}

/// Decodes one row of `dim` values.
///
/// # Errors
/// `group` does not divide `dim`, or there are too few bytes.
pub fn decode_row(codes: &[u8], params: &[u8], dim: usize, codec: Codec, group: usize) -> Result<Vec<f32>, ReferenceError> {
    check_group(dim, group)?;
    if codes.len() < (dim * codec.bits()).div_ceil(8) || params.len() < codec.params_bytes(dim, group) {
        return value("codes", format!("{} and {} bytes are too few for {dim} values of {codec}", codes.len(), params.len()));
    }
    let half = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    Ok(match codec {
        Codec::Bf16 => codes.chunks_exact(2).take(dim).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Codec::F16 => codes.chunks_exact(2).take(dim).map(half).collect(),
        Codec::Int8 | Codec::Int4 => unpack(codes, dim, codec)
            .chunks(group)
            .zip(params.chunks_exact(4))
            .flat_map(|(codes, p)| {
                let (scale, zero) = (half(p), half(&p[2..]));
                codes.iter().map(move |&c| f32::from(c).mul_add(scale, zero)).collect::<Vec<_>>()
            })
            .collect(),
    })
}
