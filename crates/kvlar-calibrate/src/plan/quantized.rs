//! Sides whose rows are stored as codes.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Rows that share a channel's scale if nothing else is said (KIVI, arXiv 2402.02750).
const CHANNEL_GROUP: usize = 32;
/// Codes of a row take a multiple of it.
const ROW_BYTES: usize = 16;
/// Centroids that a code of one byte can name.
const MOST_CENTROIDS: usize = 256;
const HADAMARD: &str = "+hadamard";

/// What the codes of a row mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuantizedCodec {
    /// e4m3, scale 1.
    Fp8,
    /// 8 bits, a scale and a zero (f16) a row and group of values.
    Int8,
    /// 4 bits, likewise.
    Int4,
    /// 2 bits, likewise.
    Int2,
    /// 4 bits, a scale and a zero (f16) a channel and group of rows (KIVI, arXiv 2402.02750 §3.1).
    Int4Channel,
    /// 2 bits, likewise.
    Int2Channel,
    /// A byte a sub-vector: the nearest of its centroids (HCAttention, arXiv 2507.19823 §3). The side has codebooks.
    Pq {
        /// m: sub-vectors of a row; divides d.
        subvectors: usize,
        /// c: centroids of a sub-vector, 1 to 256.
        centroids: usize,
    },
}

impl QuantizedCodec {
    /// Those that are known by a name alone.
    const NAMED: [(&'static str, Self); 6] = [
        ("fp8", Self::Fp8),
        ("int8", Self::Int8),
        ("int4", Self::Int4),
        ("int2", Self::Int2),
        ("int4-channel", Self::Int4Channel),
        ("int2-channel", Self::Int2Channel),
    ];

    /// Whether scales and zeros belong to channels, so that rows are encoded a group at a time.
    pub fn is_channel_wise(self) -> bool {
        matches!(self, Self::Int4Channel | Self::Int2Channel)
    }

    /// Bits of a row's codes.
    fn bits(self, dim: usize) -> usize {
        match self {
            Self::Fp8 | Self::Int8 => 8 * dim,
            Self::Int4 | Self::Int4Channel => 4 * dim,
            Self::Int2 | Self::Int2Channel => 2 * dim,
            Self::Pq { subvectors, .. } => 8 * subvectors,
        }
    }
}

/// A codec with its settings. Its text is that of `kvlar op`, without the group: `int4+hadamard`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuantizedFormat {
    /// What the codes mean.
    pub codec: QuantizedCodec,
    /// Values of a row that share a scale (`None`: all of them); channel-wise, rows that do (`None`: 32).
    pub group: Option<usize>,
    /// Rows are rotated by the normalized Walsh-Hadamard matrix before they are encoded.
    pub hadamard: bool,
}

impl From<QuantizedCodec> for QuantizedFormat {
    fn from(codec: QuantizedCodec) -> Self {
        Self { codec, group: None, hadamard: false }
    }
}

impl QuantizedFormat {
    /// Values of a row of `dim` values that share a scale, or rows that do.
    pub fn group_of(&self, dim: usize) -> usize {
        self.group.unwrap_or(if self.codec.is_channel_wise() { CHANNEL_GROUP } else { dim })
    }

    /// Stored bytes of one head's row of `dim` values: codes padded to 16 bytes, scales and zeros. Those of a channel-wise
    /// group are shared out among its rows, rounded up.
    pub fn row_bytes(&self, dim: usize) -> usize {
        let group = self.group_of(dim).max(1);
        let scales = match self.codec {
            QuantizedCodec::Fp8 | QuantizedCodec::Pq { .. } => 0,
            QuantizedCodec::Int8 | QuantizedCodec::Int4 | QuantizedCodec::Int2 => 4 * (dim / group),
            QuantizedCodec::Int4Channel | QuantizedCodec::Int2Channel => (4 * dim).div_ceil(group),
        };
        self.codec.bits(dim).div_ceil(8).next_multiple_of(ROW_BYTES) + scales
    }

    /// Shape of the codebooks of `heads` heads, [heads, m, c, d/m]; `None` where the codec has none.
    pub(crate) fn codebooks(&self, heads: usize, dim: usize) -> Option<[usize; 4]> {
        match self.codec {
            QuantizedCodec::Pq { subvectors, centroids } => Some([heads, subvectors, centroids, dim / subvectors.max(1)]),
            _ => None,
        }
    }

    /// What rows of `dim` values cannot have of it, if anything.
    pub(crate) fn problem(&self, dim: usize) -> Option<String> {
        if self.hadamard && !dim.is_power_of_two() {
            return Some(format!("{dim} values are no power of two, as a Hadamard rotation needs"));
        }
        match self.codec {
            QuantizedCodec::Pq { subvectors, .. } if subvectors == 0 || !dim.is_multiple_of(subvectors) => {
                Some(format!("{subvectors} sub-vectors do not divide {dim} values"))
            }
            QuantizedCodec::Pq { centroids, .. } if !(1..=MOST_CENTROIDS).contains(&centroids) => {
                Some(format!("{centroids} centroids; 1 to {MOST_CENTROIDS} fit a code"))
            }
            QuantizedCodec::Pq { .. } | QuantizedCodec::Fp8 if self.group.is_some() => {
                Some(format!("{self} rows have no groups of values"))
            }
            _ if self.group == Some(0) => Some("a group of 0".into()),
            c if !c.is_channel_wise() && !dim.is_multiple_of(self.group_of(dim)) => {
                Some(format!("a group of {} does not divide {dim} values", self.group_of(dim)))
            }
            _ => None,
        }
    }
}

impl fmt::Display for QuantizedFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = QuantizedCodec::NAMED.iter().find(|(_, c)| *c == self.codec);
        write!(f, "{}{}", named.map_or("pq", |(name, _)| name), if self.hadamard { HADAMARD } else { "" })
    }
}

impl FromStr for QuantizedFormat {
    type Err = String;

    /// Any but pq, whose settings no name says.
    fn from_str(s: &str) -> Result<Self, String> {
        let base = s.strip_suffix(HADAMARD);
        match QuantizedCodec::NAMED.iter().find(|(name, _)| *name == base.unwrap_or(s)) {
            Some((_, codec)) => Ok(Self { hadamard: base.is_some(), ..(*codec).into() }),
            None => {
                let names = QuantizedCodec::NAMED.map(|(name, _)| name).join(", ");
                Err(format!("{s:?} is no format of rows ({names}; each may end in {HADAMARD})"))
            }
        }
    }
}

/// Rows stored as codes: keys after RoPE.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// How.
    pub format: QuantizedFormat,
    /// Of [`QuantizedCodec::Pq`], and of nothing else: [kv_heads, m, c, d/m].
    pub codebooks: Option<Vec<f32>>,
}

impl From<QuantizedFormat> for Quantized {
    fn from(format: QuantizedFormat) -> Self {
        Self { format, codebooks: None }
    }
}

impl Quantized {
    /// Bytes that do not grow with the context: codebooks in f32, as kernels read them.
    pub fn fixed_bytes(&self) -> usize {
        4 * self.codebooks.as_ref().map_or(0, Vec::len)
    }

    /// What is wrong with it for `heads` heads of `dim` values, if anything.
    pub(super) fn problem(&self, heads: usize, dim: usize) -> Option<String> {
        if let Some(p) = self.format.problem(dim) {
            return Some(p);
        }
        let shape = self.format.codebooks(heads, dim);
        let (Some(shape), Some(values)) = (shape, &self.codebooks) else {
            return match (shape, &self.codebooks) {
                (Some(_), _) => Some("pq without codebooks".into()),
                (_, Some(_)) => Some(format!("codebooks of {} rows, which have none", self.format)),
                _ => None,
            };
        };
        let expected = shape.iter().product::<usize>();
        if values.len() != expected {
            return Some(format!("codebooks have {} numbers instead of {expected}", values.len()));
        }
        let at = values.iter().position(|x| !x.is_finite())?;
        Some(format!("codebooks hold {} (number {at})", values[at]))
    }
}
