//! Storage formats of rows.
//!
//! Defined in f32 with a fixed order of operations and one rounding each, so that a device that does the same gets the same
//! bits. Integer codes (b bits), a (scale, zero) for each group of values: scale = f16((max − min) / (2^b − 1)),
//! zero = f16(min), code = clamp(rint((x − zero) / scale), 0, 2^b − 1), x̂ = fma(code, scale, zero). A constant group has
//! scale 0 and decodes to f16(value). A non-finite value, scale or zero makes the whole group decode to NaN, and nothing
//! beside it.
//!
//! Token-wise, a group is [`Format::group`] neighbours of a row ([`encode_row`]); channel-wise, one channel of as many rows
//! (KIVI, arXiv 2402.02750 §3.1; [`encode_channels`]). fp8 has one given scale ([`encode_fp8`]), product quantization given
//! codebooks ([`encode_pq`]). [`hadamard`] turns rows before any of them.

mod affine;
mod channels;
mod format;
mod fp8;
mod hadamard;
mod pack;
mod pq;
mod row;

pub use channels::{EncodedChannels, decode_channels, encode_channels};
pub use format::Format;
pub use fp8::{decode_fp8, encode_fp8};
pub use hadamard::hadamard;
pub use pack::{pack_codes, unpack_codes};
pub use pq::{Codebooks, decode_pq, decode_pq16, encode_pq, encode_pq16};
pub use row::{EncodedRow, decode_row, encode_row};

use crate::Dtype;
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
    /// e4m3 bytes of x / scale, one given scale for all rows of a head.
    Fp8,
    /// 8-bit codes, token-wise: one scale and zero a row and group.
    Int8,
    /// 4-bit codes, likewise; the lower of a byte's two comes first.
    Int4,
    /// 2-bit codes, likewise; the lowest of a byte's four comes first.
    Int2,
    /// 4-bit codes packed as [`Codec::Int4`]; one scale and zero a channel and group of rows.
    Int4Channel,
    /// 2-bit codes packed as [`Codec::Int2`], likewise.
    Int2Channel,
    /// A byte a sub-vector: the nearest of up to 256 centroids (Jégou et al. 2011; HCAttention, arXiv 2507.19823 §3).
    Pq,
}

impl Codec {
    /// All codecs.
    pub const ALL: [Self; 9] =
        [Self::Bf16, Self::F16, Self::Fp8, Self::Int8, Self::Int4, Self::Int2, Self::Int4Channel, Self::Int2Channel, Self::Pq];

    /// Bits of a code: of a value, or of a sub-vector of [`Codec::Pq`]; without its share of scales.
    pub fn bits(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 16,
            Self::Fp8 | Self::Int8 | Self::Pq => 8,
            Self::Int4 | Self::Int4Channel => 4,
            Self::Int2 | Self::Int2Channel => 2,
        }
    }

    /// Whether values are integer codes with scales and zeros.
    pub fn is_integer(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4 | Self::Int2) || self.is_channel_wise()
    }

    /// Whether scales and zeros belong to channels, so that rows are encoded a group at a time.
    pub fn is_channel_wise(self) -> bool {
        matches!(self, Self::Int4Channel | Self::Int2Channel)
    }

    /// Bytes of a row's codes, padded to 16; `codes` is d, or the number of sub-vectors of [`Codec::Pq`].
    pub fn row_bytes(self, codes: usize) -> usize {
        (codes * self.bits()).div_ceil(8).next_multiple_of(16)
    }

    /// Bytes of a row's own scales and zeros: none for channel-wise codecs, whose scales belong to groups of rows.
    pub fn params_bytes(self, dim: usize, group: usize) -> usize {
        if self.is_integer() && !self.is_channel_wise() { 4 * (dim / group) } else { 0 }
    }

    /// Bytes of `rows` stored rows, with scales, zeros and padding. Channel-wise, `group` counts rows, and those of an
    /// unfinished group are 16-bit. [`Format::stored_bytes`] knows other types.
    pub fn stored_bytes(self, rows: usize, dim: usize, group: usize) -> usize {
        if self.is_channel_wise() {
            return channels::stored_bytes(self, rows, dim, group, 2);
        }
        rows * (self.row_bytes(dim) + self.params_bytes(dim, group))
    }

    /// The 16-bit type of rows that are stored as they are.
    pub fn dense(self) -> Option<Dtype> {
        match self {
            Self::Bf16 => Some(Dtype::Bf16),
            Self::F16 => Some(Dtype::F16),
            _ => None,
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int2 => "int2",
            Self::Int4Channel => "int4-channel",
            Self::Int2Channel => "int2-channel",
            Self::Pq => "pq",
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

/// Bytes of a row that is kept as `bytes` each value, padded to 16.
pub(crate) fn dense_row_bytes(dim: usize, bytes: usize) -> usize {
    (dim * bytes).next_multiple_of(16)
}
