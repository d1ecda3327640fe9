//! Types of activations and formats of rows that kernels know.

use crate::abi;
use std::fmt;

/// Element type of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary32: outputs, and inputs of encode.
    F32,
}

impl Dtype {
    /// Bytes an element.
    pub const fn bytes(self) -> usize {
        if matches!(self, Self::F32) { 4 } else { 2 }
    }

    pub(crate) const fn abi(self) -> u32 {
        match self {
            Self::Bf16 => abi::KVLAR_DTYPE_BF16,
            Self::F16 => abi::KVLAR_DTYPE_F16,
            Self::F32 => abi::KVLAR_DTYPE_F32,
        }
    }

    pub(crate) fn from_abi(dtype: u32) -> Option<Self> {
        [Self::Bf16, Self::F16, Self::F32].into_iter().find(|d| d.abi() == dtype)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        })
    }
}

/// What the bytes of stored rows mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// e4m3, times one given scale a head.
    Fp8,
    /// 8-bit codes with one (f16 scale, f16 zero) a row and group.
    Int8,
    /// 4-bit codes, likewise.
    Int4,
    /// 2-bit codes, likewise.
    Int2,
    /// 4-bit codes with one (f16 scale, f16 zero) a channel and group of rows: rows are encoded a group at a time.
    Int4Channel,
    /// 2-bit codes, likewise.
    Int2Channel,
    /// A byte a sub-vector of [`Format::group`] values: the number of the nearest of [`Format::centroids`] given centroids.
    Pq,
}

impl Codec {
    /// All of them.
    pub const ALL: [Self; 9] =
        [Self::Bf16, Self::F16, Self::Fp8, Self::Int8, Self::Int4, Self::Int2, Self::Int4Channel, Self::Int2Channel, Self::Pq];

    pub(crate) const fn abi(self) -> u32 {
        match self {
            Self::Bf16 => abi::KVLAR_CODEC_BF16,
            Self::F16 => abi::KVLAR_CODEC_F16,
            Self::Fp8 => abi::KVLAR_CODEC_FP8,
            Self::Int8 => abi::KVLAR_CODEC_INT8,
            Self::Int4 => abi::KVLAR_CODEC_INT4,
            Self::Int2 => abi::KVLAR_CODEC_INT2,
            Self::Int4Channel => abi::KVLAR_CODEC_INT4_CHANNEL,
            Self::Int2Channel => abi::KVLAR_CODEC_INT2_CHANNEL,
            Self::Pq => abi::KVLAR_CODEC_PQ,
        }
    }

    pub(crate) fn from_abi(codec: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.abi() == codec)
    }

    /// The reference's name for it.
    pub const fn reference(self) -> kvlar_reference::Codec {
        match self {
            Self::Bf16 => kvlar_reference::Codec::Bf16,
            Self::F16 => kvlar_reference::Codec::F16,
            Self::Fp8 => kvlar_reference::Codec::Fp8,
            Self::Int8 => kvlar_reference::Codec::Int8,
            Self::Int4 => kvlar_reference::Codec::Int4,
            Self::Int2 => kvlar_reference::Codec::Int2,
            Self::Int4Channel => kvlar_reference::Codec::Int4Channel,
            Self::Int2Channel => kvlar_reference::Codec::Int2Channel,
            Self::Pq => kvlar_reference::Codec::Pq,
        }
    }

    /// The type of rows that are stored as they are.
    pub const fn dense(self) -> Option<Dtype> {
        match self {
            Self::Bf16 => Some(Dtype::Bf16),
            Self::F16 => Some(Dtype::F16),
            _ => None,
        }
    }

    /// Refuses a format of latents that a device has no kernels for.
    pub(crate) fn check_latent(self, op: &'static str, device: &crate::Device) -> crate::Result<()> {
        let known = matches!(self, Self::Bf16 | Self::F16 | Self::Int8);
        if !known && (self != Self::Int4 || device.backend() != crate::Backend::Reference) {
            return crate::error::unsupported(op, format!("{self:?} latents on {:?}", device.backend()));
        }
        Ok(())
    }

    /// Bytes of a row's codes, padded to 16; `codes` is d, or the number of sub-vectors of [`Codec::Pq`].
    pub fn row_bytes(self, codes: usize) -> usize {
        self.reference().row_bytes(codes)
    }

    /// Bytes of a row's own scales and zeros; 0 where they belong to a group of rows.
    pub fn params_bytes(self, dim: usize, group: usize) -> usize {
        self.reference().params_bytes(dim, group)
    }

    /// Whether scales and zeros belong to channels of a group of rows.
    pub const fn is_channel_wise(self) -> bool {
        matches!(self, Self::Int4Channel | Self::Int2Channel)
    }
}

/// Bytes of stored rows: of a row's codes, and of the scales and zeros of some rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Of a row's codes.
    pub row: usize,
    /// Of scales and zeros of `params_rows` rows.
    pub params: usize,
    /// Rows that share them.
    pub params_rows: usize,
}

impl Stored {
    /// Scales and zeros belong to rows.
    pub const fn row_wise(row: usize, params: usize) -> Self {
        Self { row, params, params_rows: 1 }
    }

    /// Of so many rows from a multiple of `params_rows` on.
    pub const fn bytes(&self, rows: usize) -> usize {
        rows * self.row + rows.div_ceil(self.params_rows) * self.params
    }
}

/// How rows are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// What their bytes mean.
    pub codec: Codec,
    /// Values that share a scale and zero, or ([`Codec::Pq`]) a code; `None`: all of a row. Channel-wise: rows that do;
    /// `None`: 32.
    pub group: Option<usize>,
    /// Rows are rotated by the normalized Walsh-Hadamard matrix before they are encoded (a power of two of values), and so
    /// are queries of such keys; decoding rotates them back.
    pub hadamard: bool,
    /// Centroids of each sub-vector, 1 to 256; of [`Codec::Pq`] alone.
    pub centroids: usize,
}

/// Centroids that a byte can number.
const MAX_CENTROIDS: usize = 256;

impl From<Codec> for Format {
    fn from(codec: Codec) -> Self {
        Self { codec, group: None, hadamard: false, centroids: MAX_CENTROIDS }
    }
}

impl Format {
    /// Product quantization: sub-vectors of `width` values with `centroids` centroids each (HCAttention, arXiv 2507.19823 §3).
    pub const fn pq(width: usize, centroids: usize) -> Self {
        Self { codec: Codec::Pq, group: Some(width), hadamard: false, centroids }
    }

    /// Values that share a scale and zero (or a code) in rows of `dim` values, or rows that do.
    pub fn group_of(&self, dim: usize) -> usize {
        self.reference().group_of(dim)
    }

    /// Bytes of stored rows of `dim` values.
    pub fn stored(&self, dim: usize) -> Stored {
        let row = self.row_bytes(dim);
        match self.codec.is_channel_wise() {
            true => Stored { row, params: 4 * dim, params_rows: self.group_of(dim).max(1) },
            false => Stored::row_wise(row, self.params_bytes(dim)),
        }
    }

    /// Bytes of a row's codes, padded to 16.
    pub fn row_bytes(&self, dim: usize) -> usize {
        self.codec.row_bytes(if self.codec == Codec::Pq { dim / self.group_of(dim).max(1) } else { dim })
    }

    /// Bytes of the codebooks of `heads` heads; 0 of formats without.
    pub fn codebook_bytes(&self, heads: usize, dim: usize) -> usize {
        if self.codec == Codec::Pq { heads.saturating_mul(self.centroids).saturating_mul(4 * dim) } else { 0 }
    }

    /// Bytes of a row's own scales and zeros; 0 where they belong to a group of rows ([`Format::stored`]).
    pub fn params_bytes(&self, dim: usize) -> usize {
        self.codec.params_bytes(dim, self.group_of(dim).max(1))
    }

    /// The reference's name for it.
    pub const fn reference(&self) -> kvlar_reference::Format {
        kvlar_reference::Format { codec: self.codec.reference(), group: self.group, hadamard: self.hadamard }
    }

    pub(crate) fn check(&self, arg: &'static str, dim: usize) -> crate::Result<()> {
        let group = self.group_of(dim);
        if self.codec.is_channel_wise() {
            if group == 0 || group > 1 << 20 {
                return crate::error::invalid(arg, format!("groups of {group} rows; they hold 1 to 2^20"));
            }
        } else if group == 0 || !dim.is_multiple_of(group) {
            return crate::error::invalid(arg, format!("a group of {group} does not divide {dim} values"));
        }
        if self.codec == Codec::Pq && !(1..=MAX_CENTROIDS).contains(&self.centroids) {
            return crate::error::invalid(
                arg,
                format!("{} centroids a sub-vector; 1 to {MAX_CENTROIDS} are possible", self.centroids),
            );
        }
        if self.hadamard && !dim.is_power_of_two() {
            return crate::error::invalid(arg, format!("{dim} values are no power of two, as a Hadamard rotation needs"));
        }
        Ok(())
    }

    /// `tables` is 0 or the address of what [`Tables`] says.
    pub(crate) fn abi(&self, dim: usize, tables: u64) -> abi::KvlarFormat {
        abi::KvlarFormat {
            tables,
            codec: self.codec.abi(),
            group: self.group_of(dim) as u32,
            hadamard: self.hadamard.into(),
            centroids: if self.codec == Codec::Pq { self.centroids as u32 } else { 0 },
        }
    }
}

/// What all rows of a head share. [`Codec::Fp8`]: what its rows are multiplied by, f32 `[heads]`; `None` = 1. [`Codec::Pq`]:
/// its codebooks, f32 `[heads][d / group][centroids][group]`, at a multiple of 16 bytes; they must be there. Other formats have
/// none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tables<'a> {
    /// Of keys.
    pub keys: Option<crate::View<'a>>,
    /// Of values.
    pub values: Option<crate::View<'a>>,
}

impl Tables<'_> {
    /// The addresses of both, checked against the formats of rows and the values a row.
    pub(crate) fn addresses(&self, heads: usize, formats: [(Format, usize); 2]) -> crate::Result<[u64; 2]> {
        type Names = [&'static str; 2];
        let side = |[scales, codebooks]: Names, table: Option<crate::View<'_>>, (format, dim): (Format, usize)| {
            let (arg, need, align) = match (format.codec, table) {
                (Codec::Fp8, _) => (scales, 4 * heads, 4),
                (Codec::Pq, None) => return crate::error::invalid(codebooks, "pq rows need them: f32 [heads][m][c][d/m]"),
                (Codec::Pq, Some(_)) => (codebooks, format.codebook_bytes(heads, dim), 16),
                (_, None) => return Ok(0),
                (codec, Some(_)) => return crate::error::invalid(scales, format!("{codec:?} rows have scales of their own")),
            };
            let Some(x) = table else { return Ok(0) };
            crate::paged::within(arg, &x, need, align).map(|()| crate::Memory::address(&x))
        };
        Ok([
            side(["key scales", "key codebooks"], self.keys, formats[0])?,
            side(["value scales", "value codebooks"], self.values, formats[1])?,
        ])
    }
}

impl From<Dtype> for Option<Codec> {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bf16 => Some(Codec::Bf16),
            Dtype::F16 => Some(Codec::F16),
            Dtype::F32 => None,
        }
    }
}
