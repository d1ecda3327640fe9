//! What a fit achieved.

use crate::plan::PlanSize;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Keys or values of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SideReport {
    /// Rank of a group; `None` where rows stay dense.
    pub rank: Option<usize>,
    /// Kv heads of each group.
    pub groups: Vec<Vec<usize>>,
    /// Energy of the calibration rows that the latents do not hold, relative to all (Σ ‖y − ŷ‖² / Σ ‖y‖²), not weighted,
    /// before latents are rounded.
    pub discarded: f64,
    /// The same under the weighting the basis was fitted with.
    pub discarded_weighted: f64,
    /// The same for groups of heads in order at this rank and the same fit: what grouping gained.
    pub discarded_natural: f64,
    /// CKA of pairs of heads (least, mean, greatest); `None` with one head.
    pub similarity: Option<[f64; 3]>,
    /// Stored bytes of one token.
    pub bytes: usize,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Which.
    pub layer: usize,
    /// Keys.
    pub keys: SideReport,
    /// Values.
    pub values: SideReport,
}

/// All layers, and what the plan costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Layer by layer.
    pub layers: Vec<LayerReport>,
    /// Calibration tokens.
    pub rows: u64,
    /// What the plan's rows take.
    #[serde(flatten)]
    pub size: PlanSize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rank = |s: &SideReport| s.rank.map_or("dense".into(), |r| format!("{} x {r}", s.groups.len()));
        let mean = |s: &SideReport| s.similarity.map_or("-".into(), |s| format!("{:.3}", s[1]));
        let groups = |s: &SideReport| {
            let words = s.groups.iter().map(|g| g.iter().map(usize::to_string).collect::<Vec<_>>().join(","));
            if s.rank.is_none() { "-".into() } else { words.collect::<Vec<_>>().join(" ") }
        };
        writeln!(
            f,
            "{:>5} {:>9} {:>9} {:>6} {:>9} {:>9} {:>6} {:>8}  key groups",
            "layer", "keys", "lost", "CKA", "values", "lost", "CKA", "bytes"
        )?;
        for l in &self.layers {
            let (k, v) = (&l.keys, &l.values);
            writeln!(
                f,
                "{:>5} {:>9} {:>8.3}% {:>6} {:>9} {:>8.3}% {:>6} {:>8}  {}",
                l.layer,
                rank(k),
                100.0 * k.discarded,
                mean(k),
                rank(v),
                100.0 * v.discarded,
                mean(v),
                k.bytes + v.bytes,
                groups(k)
            )?;
        }
        write!(
            f,
            "{} calibration tokens; {} of {} bytes a token ({:.2} %), bases {:.2} MB",
            self.rows,
            self.size.bytes_per_token,
            self.size.dense_bytes_per_token,
            100.0 * self.size.kept,
            self.size.fixed_bytes as f64 / 1e6
        )
    }
}
