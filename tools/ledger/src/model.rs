//! What an attend kernel has to do for a tile, and what that costs beside the bytes of its rows.

use crate::path::Work;

/// Warp instructions that an H200 issues a second: 132 SMs, four schedulers each, one instruction a cycle at 1.75 GHz.
pub const ISSUE_RATE: f64 = 132.0 * 4.0 * 1.75e9;
/// Bytes a second that an H200 reads from its memory: what the kernels' floors are reckoned with.
pub const READ_RATE: f64 = 4.3e12;
/// The architecture of that GPU, the only one whose issue time is modelled.
pub const MODELLED: &str = "90a";
/// Issue time, in percent of the byte floor, beyond which a kernel can't be expected to reach the floor: instructions of
/// several warps overlap with the copies, but neither stalls nor prologues are counted.
pub const LIMIT: f64 = 55.0;

/// One instantiation of the attend kernel, as its name says: `kvlar_attend_bf16_d128_n8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attend {
    /// Head dimension of the template.
    pub dim: u32,
    /// Columns of a query tile.
    pub columns: u32,
}

impl Attend {
    /// None for entry points that are no attend kernel of rows stored as they are. Errors: one that this program can't judge.
    pub fn of(entry: &str) -> Option<Result<Attend, String>> {
        // How many instructions a tile takes with a cut depends on which rows are selected.
        let other = |n: &str| n == "schedule" || ["lowrank_", "quantized_", "cut_"].iter().any(|kind| n.starts_with(kind));
        let name = entry.strip_prefix("kvlar_attend_").filter(|n| !other(n))?;
        let parsed = || {
            let (storage, shape) = name.split_once("_d")?;
            let (dim, columns) = shape.split_once("_n")?;
            let attend = Attend { dim: dim.parse().ok()?, columns: columns.parse().ok()? };
            let known =
                matches!(storage, "bf16" | "f16") && matches!(attend.dim, 64 | 128 | 256) && matches!(attend.columns, 8 | 16);
            known.then_some(attend)
        };
        Some(parsed().ok_or_else(|| format!("{entry}: the ledger's model doesn't know this kind of attend kernel")))
    }

    /// Whether exceeding `LIMIT` is an error: in the shapes of common models, with the columns of plain decoding. The
    /// others trade issue time for something else (16 columns do twice the work on the same bytes).
    pub fn is_limited(&self) -> bool {
        self.dim <= 128 && self.columns == 8
    }

    // ---- kernels/attend/tiles.cuh; crates/kvlar/src/attend/tiling.rs mirrors it too, and a test below compares

    fn warps(&self) -> u32 {
        if self.dim == 256 { 2 } else { 4 }
    }

    /// Rows of a tile.
    pub fn rows(&self) -> u32 {
        if self.dim == 64 { 32 } else { 16 }
    }

    /// Keys or values of a tile.
    fn tile_bytes(&self) -> u32 {
        self.rows() * self.dim * 2
    }

    fn shared_bytes(&self, arch: &str) -> u32 {
        self.warps() * stages(arch) * (2 * self.tile_bytes() + 4 * self.rows())
    }

    /// CTAs that share an SM. The launcher's reckoning: CUDA keeps 1 KB of each, 512 B hold the static part.
    fn ctas_per_sm(&self, arch: &str) -> u32 {
        if 2 * (self.shared_bytes(arch) + 1024 + 512) <= shared_per_sm(arch) { 2 } else { 1 }
    }

    /// Bytes of keys and values on their way to an SM at any time: all stages but the one that is computed on.
    pub fn in_flight(&self, arch: &str) -> u32 {
        (stages(arch) - 1) * 2 * self.tile_bytes() * self.warps() * self.ctas_per_sm(arch)
    }

    // ---- work and its cost

    /// What the fast path executes for a tile: two products with each 16 x 16 block of it for every 8 columns, copies of
    /// the next tile (keys and values, 16 bytes a lane), and the page of each 16 of its rows.
    pub fn work(&self) -> Work {
        let rows = self.rows();
        Work {
            // Scores and values of every 16 dimensions.
            mma: (rows / 16) * (self.columns / 8) * 2 * (self.dim / 16),
            row_copies: 2 * rows * self.dim * 2 / 16 / 32,
            word_copies: 0,
            lookups: rows / 16,
        }
    }

    /// Time to issue `per_16_rows` instructions, in percent of the time to read 16 rows.
    pub fn issue_percent(&self, per_16_rows: f64) -> f64 {
        100.0 * (per_16_rows / ISSUE_RATE) / (f64::from(16 * 2 * self.dim * 2) / READ_RATE)
    }
}

/// The rebuilding of keys in a low-rank attention kernel: 32 rows, 16 rotary pairs of one head, at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rebuild;

impl Rebuild {
    /// None for other kernels.
    pub fn of(entry: &str) -> Option<Rebuild> {
        let name = entry.strip_prefix("kvlar_attend_lowrank_")?;
        (name != "schedule").then_some(Rebuild)
    }

    /// Of the path that holds latents in registers: 32 products for the ranks that it holds (64 in 16 bits, 128 for an int8
    /// basis), then 4 for the scores of 8 columns.
    pub fn work(&self) -> Work {
        Work { mma: 36, ..Work::default() }
    }

    /// Time to issue `instructions` a pass, over 128K rows of 8 kv heads of 128 dimensions.
    pub fn microseconds(&self, instructions: u32) -> f64 {
        let passes = f64::from(128 * 1024 / 32) * 8.0 * (128.0 / 32.0);
        1e6 * passes * f64::from(instructions) / ISSUE_RATE
    }
}

/// `90a` is 90.
pub fn arch_number(arch: &str) -> u32 {
    arch.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0)
}

/// Tiles of a warp's ring: as crates/kvlar/src/attend/tiling.rs chooses.
fn stages(arch: &str) -> u32 {
    match arch_number(arch) {
        86 | 89 => 2,
        n if n >= 120 => 2,
        _ => 3,
    }
}

/// Shared memory of an SM, from the CUDA programming guide's table of compute capabilities.
fn shared_per_sm(arch: &str) -> u32 {
    match arch_number(arch) {
        86 | 89 => 100 << 10,
        n if n < 90 => 164 << 10,
        n if n < 120 => 228 << 10,
        _ => 100 << 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attend(name: &str) -> Attend {
        Attend::of(name).unwrap().unwrap()
    }

    #[test]
    fn names_say_what_a_kernel_is() {
        assert_eq!(attend("kvlar_attend_f16_d64_n8"), Attend { dim: 64, columns: 8 });
        assert!(Attend::of("kvlar_append").is_none() && Attend::of("kvlar_attend_schedule").is_none());
        assert!(Attend::of("kvlar_attend_quantized_d128_n8").is_none());
        for name in ["kvlar_attend_bf16_int4_d128_n8", "kvlar_attend_bf16_d96_n8", "kvlar_attend_bf16"] {
            assert!(Attend::of(name).unwrap().is_err(), "{name}");
        }
    }

    #[test]
    fn a_tiles_work() {
        let work = attend("kvlar_attend_bf16_d128_n8").work();
        assert_eq!(work, Work { mma: 16, row_copies: 16, word_copies: 0, lookups: 1 });
        let wide = attend("kvlar_attend_bf16_d64_n16").work();
        assert_eq!(wide, Work { mma: 32, row_copies: 16, word_copies: 0, lookups: 2 });
    }

    #[test]
    fn costs() {
        let dense = attend("kvlar_attend_bf16_d128_n8");
        assert!((dense.issue_percent(968.0) - 55.0).abs() < 0.05);
        assert_eq!(dense.in_flight("90a"), 128 << 10);
        assert_eq!(dense.in_flight("80"), 64 << 10);
        assert_eq!(dense.in_flight("89"), 32 << 10);
        assert_eq!(attend("kvlar_attend_bf16_d256_n8").in_flight("100"), 128 << 10);
        // attend/tiling.rs asserts the same of its mirror
        assert_eq!(dense.shared_bytes("90a"), 4 * 3 * (8192 + 64));
    }

    #[test]
    fn tile_shapes_are_those_of_the_kernels() {
        let header = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../kernels/attend/tiles.cuh")).unwrap();
        for line in [
            "return dim == 256 ? 2 : 4;",
            "kRows = D == 64 ? 32 : 16;",
            "kValues = kRows * D * 2;",
            "kPositions = 2 * kValues;",
            "kStageBytes = kPositions + 4 * kRows;",
            "kLeastShared = kWarps * 2 * kStageBytes;",
        ] {
            assert!(header.contains(line), "tiles.cuh no longer says {line:?}: bring model.rs up to date");
        }
    }
}
