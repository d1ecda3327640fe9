//! A codec with its settings, and the names of both.

use super::{Codec, channels, dense_row_bytes, hadamard, row};
use crate::Dtype;
use crate::error::{ReferenceError, value};
use std::fmt;
use std::str::FromStr;

/// Rows that share a scale, channel-wise, if nothing else is said (KIVI's).
const CHANNEL_GROUP: usize = 32;
const HADAMARD: &str = "+hadamard";

/// How rows are stored. Written as in `OPS.md`: `int4-channel+hadamard`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// What the bytes mean.
    pub codec: Codec,
    /// Values of a row that share a scale; rows, channel-wise. Default all of a row, 32 rows. The text of a format does not
    /// say it.
    pub group: Option<usize>,
    /// Whether rows are turned by [`super::hadamard`] before they are encoded, and back after.
    pub hadamard: bool,
}

impl From<Codec> for Format {
    fn from(codec: Codec) -> Self {
        Self { codec, group: None, hadamard: false }
    }
}

impl Format {
    /// Values that share a scale in rows of `dim` values, or rows that do.
    pub fn group_of(&self, dim: usize) -> usize {
        self.group.unwrap_or(if self.codec.is_channel_wise() { CHANNEL_GROUP } else { dim })
    }

    /// Checks it against rows of `dim` values.
    ///
    /// # Errors
    /// A group that does not divide the row (of no rows, channel-wise); +hadamard of other than a power of two.
    pub fn check(&self, dim: usize) -> Result<(), ReferenceError> {
        if self.hadamard {
            hadamard::check(dim)?;
        }
        match self.group_of(dim) {
            0 if self.codec.is_channel_wise() => value("group", "0 rows are no group"),
            _ if self.codec.is_channel_wise() => Ok(()),
            group => row::check_group(dim, group),
        }
    }

    /// Bytes of `rows` rows of `dim` values, with scales, zeros and padding; `dtype` is the type of an unfinished group's
    /// rows, `subvectors` (m) is for pq. Without what all rows share: codebooks, the scale of fp8.
    pub fn stored_bytes(&self, rows: usize, dim: usize, dtype: Dtype, subvectors: usize) -> usize {
        match self.codec {
            Codec::Pq => rows * Codec::Pq.row_bytes(subvectors),
            c if c.is_channel_wise() => channels::stored_bytes(c, rows, dim, self.group_of(dim), dtype.bytes()),
            c => c.stored_bytes(rows, dim, self.group_of(dim)),
        }
    }

    /// Bytes of `rows` rows that are kept as they are.
    pub(crate) fn exact_bytes(rows: usize, dim: usize, dtype: Dtype) -> usize {
        rows * dense_row_bytes(dim, dtype.bytes())
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.codec, if self.hadamard { HADAMARD } else { "" })
    }
}

impl FromStr for Format {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let base = s.strip_suffix(HADAMARD);
        let known = || Codec::ALL.map(|c| c.to_string()).join(", ");
        match base.unwrap_or(s).parse() {
            Ok(codec) => Ok(Self { codec, group: None, hadamard: base.is_some() }),
            Err(_) => Err(format!("{s:?} is not a codec ({}; each may end in {HADAMARD})", known())),
        }
    }
}
