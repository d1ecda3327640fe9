//! What a launch costs by arithmetic: bytes, floating-point operations, and which of them bounds it.

use super::plan::LowrankPlan;
use super::shape::{Latents, LowrankValues};
use std::fmt;

/// Work of one launch over `rows` rows of every sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arithmetic {
    /// Bytes of latents (and dense values) that must be read from memory once.
    pub bytes: f64,
    /// Bytes that a full 16-bit cache would read.
    pub full_bytes: f64,
    /// Operations that rebuild keys; on int8 tensor cores for an int8 basis.
    pub rebuild_flops: f64,
    /// Operations of scores and sums of values.
    pub attention_flops: f64,
    /// Whether the rebuild runs at the int8 rate: twice that of 16 bits.
    pub int8_rebuild: bool,
    /// Times that latents are read, from the L2 but for the first: query tiles of a set that each read them.
    pub reads: usize,
    /// Times that keys are rebuilt: slices of the value rank.
    pub slices: usize,
}

/// What bounds a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Reading latents: fewer bytes are less time.
    Memory,
    /// Rebuilding keys: lower ranks or smaller groups are less time; fewer bytes are only less memory.
    Tensor,
}

impl LowrankPlan {
    /// The work of a launch in which every sequence holds `rows` rows of latents.
    pub fn arithmetic(&self, rows: usize) -> Arithmetic {
        let (s, a) = (&self.shape, &self.shape.attend);
        let all_rows = (rows * a.seqs) as f64;
        let element = s.latents.codec(crate::Codec::Bf16).reference().bits() as f64 / 8.0;
        let affine = if s.latents == Latents::Dtype { 0.0 } else { 4.0 };
        let key_bytes = s.sets.key_groups as f64 * (s.key_rank as f64 * element + affine);
        let (value_bytes, value_width) = match s.values {
            LowrankValues::Dense => (2.0 * (a.kv_heads * a.value_dim) as f64, a.value_dim),
            LowrankValues::Latent { rank, codec } => {
                let each = codec.row_bytes(rank) + codec.params_bytes(rank, rank);
                ((s.sets.value_groups * each) as f64, rank)
            }
        };
        let queries = (a.q_heads * a.query_rows) as f64;
        Arithmetic {
            bytes: all_rows * (key_bytes + value_bytes),
            full_bytes: all_rows * 2.0 * (a.kv_heads * (a.head_dim + a.value_dim)) as f64,
            rebuild_flops: all_rows * 2.0 * (self.slices * s.key_rank * a.head_dim * a.kv_heads) as f64,
            attention_flops: all_rows * 2.0 * queries * (self.slices * a.head_dim + value_width) as f64,
            int8_rebuild: s.latents == Latents::Int8Basis,
            reads: self.query_tiles,
            slices: self.slices,
        }
    }
}

impl Arithmetic {
    /// Seconds that memory takes at `bandwidth` bytes a second.
    pub fn memory_seconds(&self, bandwidth: f64) -> f64 {
        self.bytes / bandwidth
    }

    /// Seconds that tensor cores take at `rate` 16-bit operations a second.
    pub fn tensor_seconds(&self, rate: f64) -> f64 {
        (self.rebuild_flops / if self.int8_rebuild { 2.0 } else { 1.0 } + self.attention_flops) / rate
    }

    /// What bounds the launch on such a device.
    pub fn bound(&self, bandwidth: f64, rate: f64) -> Bound {
        if self.memory_seconds(bandwidth) >= self.tensor_seconds(rate) { Bound::Memory } else { Bound::Tensor }
    }

    /// Times that a full 16-bit cache's floor is longer than this one's.
    pub fn speedup(&self, bandwidth: f64, rate: f64) -> f64 {
        self.full_bytes / bandwidth / self.memory_seconds(bandwidth).max(self.tensor_seconds(rate))
    }
}

impl fmt::Display for Arithmetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1} MB ({:.1} % of 16 bit), {:.2} GFLOP rebuild{}, {:.2} GFLOP attention, {} reads, {} slices",
            self.bytes / 1e6,
            100.0 * self.bytes / self.full_bytes,
            self.rebuild_flops / 1e9,
            if self.int8_rebuild { " (int8)" } else { "" },
            self.attention_flops / 1e9,
            self.reads,
            self.slices
        )
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Tensor => "tensor cores: this setting saves memory, not time",
        })
    }
}
