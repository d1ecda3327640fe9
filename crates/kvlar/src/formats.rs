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

/// Format of stored rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// 8-bit codes with one (f16 scale, f16 zero) a row and group.
    Int8,
    /// 4-bit codes, likewise. The reference backend alone has it so far: kernels refuse it as unsupported.
    Int4,
}

impl Codec {
    pub(crate) const fn abi(self) -> u32 {
        match self {
            Self::Bf16 => abi::KVLAR_CODEC_BF16,
            Self::F16 => abi::KVLAR_CODEC_F16,
            Self::Int8 => abi::KVLAR_CODEC_INT8,
            Self::Int4 => abi::KVLAR_CODEC_INT4,
        }
    }

    pub(crate) fn from_abi(codec: u32) -> Option<Self> {
        [Self::Bf16, Self::F16, Self::Int8, Self::Int4].into_iter().find(|c| c.abi() == codec)
    }

    /// The reference's name for it.
    pub const fn reference(self) -> kvlar_reference::Codec {
        match self {
            Self::Bf16 => kvlar_reference::Codec::Bf16,
            Self::F16 => kvlar_reference::Codec::F16,
            Self::Int8 => kvlar_reference::Codec::Int8,
            Self::Int4 => kvlar_reference::Codec::Int4,
        }
    }

    /// Refuses a format that a device has no kernels for.
    pub(crate) fn check(self, op: &'static str, device: &crate::Device) -> crate::Result<()> {
        if self == Self::Int4 && device.backend() != crate::Backend::Reference {
            return crate::error::unsupported(op, "int4 rows: the reference backend alone has them");
        }
        Ok(())
    }

    /// Bytes of a row's codes, padded to 16.
    pub fn row_bytes(self, dim: usize) -> usize {
        self.reference().row_bytes(dim)
    }

    /// Bytes of a row's scales and zeros.
    pub fn params_bytes(self, dim: usize, group: usize) -> usize {
        self.reference().params_bytes(dim, group)
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
