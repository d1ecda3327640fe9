//! What attention plans are made from.

use super::MAX_SEGMENTS;
use super::plan::AttendPlan;
use super::tiling::{Rows, Tiling, ctas_per_sm};
use crate::append::check_dim;
use crate::device::Launch;
use crate::error::{invalid, unsupported};
use crate::{Backend, Codec, Device, Dtype, Format, Result};

/// How rows are shared among CTAs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Schedule {
    /// Every CTA takes the same number of tiles, whatever the lengths: the fastest.
    #[default]
    Balanced,
    /// How a sequence is cut depends on its own length alone: its result does not depend on its batch.
    Own,
}

/// Rows of one storage format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentShape {
    /// Of keys.
    pub keys: Format,
    /// Of values.
    pub values: Format,
    /// Capacity a (sequence, kv head).
    pub max_rows: usize,
}

impl SegmentShape {
    /// Keys and values of one format.
    pub fn new(format: impl Into<Format>, max_rows: usize) -> Self {
        let format = format.into();
        Self { keys: format, values: format, max_rows }
    }

    /// Whether rows are stored as they are.
    pub(crate) fn is_dense(&self) -> bool {
        self.keys.codec.dense().is_some() && self.values.codec.dense().is_some()
    }
}

/// What [`AttendPlan`] is made from. Start from [`AttendShape::new`] and change fields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttendShape {
    /// Type of q: bf16 or f16.
    pub dtype: Dtype,
    /// Type of out: f32 or that of q.
    pub out_dtype: Dtype,
    /// B.
    pub seqs: usize,
    /// Hq; query head h reads kv head h / (Hq / Hk).
    pub q_heads: usize,
    /// Hk.
    pub kv_heads: usize,
    /// S: query rows a sequence.
    pub query_rows: usize,
    /// d; a multiple of 8 up to 256.
    pub head_dim: usize,
    /// dv; likewise.
    pub value_dim: usize,
    /// The rows of a sequence are its segments' rows, one segment after the other.
    pub segments: [Option<SegmentShape>; MAX_SEGMENTS],
    /// Multiplies q·k.
    pub scale: f32,
    /// c in c·tanh(x / c), after scaling; 0 = off.
    pub softcap: f32,
    /// A row is visible if q_position − position < window; 0 = off.
    pub window: u32,
    /// How rows are shared among CTAs.
    pub schedule: Schedule,
    /// Queries of quantized keys are rounded to 8 bits first, one scale a (sequence, head): largest |q| / 127.
    pub int8_queries: bool,
}

impl AttendShape {
    /// `heads` = (Hq, Hk), one segment; value_dim = head_dim, scale 1/√d, all else off, out in f32.
    pub fn new(dtype: Dtype, seqs: usize, heads: (usize, usize), query_rows: usize, head_dim: usize, rows: SegmentShape) -> Self {
        Self {
            dtype,
            out_dtype: Dtype::F32,
            seqs,
            q_heads: heads.0,
            kv_heads: heads.1,
            query_rows,
            head_dim,
            value_dim: head_dim,
            segments: [Some(rows), None, None, None],
            scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            softcap: 0.0,
            window: 0,
            schedule: Schedule::Balanced,
            int8_queries: false,
        }
    }

    /// The segments that there are.
    pub fn segments(&self) -> impl Iterator<Item = SegmentShape> {
        self.segments.into_iter().flatten()
    }

    /// Query heads a kv head.
    pub(crate) fn group(&self) -> usize {
        self.q_heads / self.kv_heads.max(1)
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.dtype == Dtype::F32 {
            return unsupported("attend", "type f32 of q: bf16 and f16 are");
        }
        if self.out_dtype != Dtype::F32 && self.out_dtype != self.dtype {
            return unsupported("attend", format!("{} out for {} q: f32 or the same is", self.out_dtype, self.dtype));
        }
        check_dim("attend", "head_dim", self.head_dim)?;
        check_dim("attend", "value_dim", self.value_dim)?;
        if self.kv_heads == 0 || self.q_heads == 0 || !self.q_heads.is_multiple_of(self.kv_heads) {
            return invalid("q_heads", format!("{} query heads are not a multiple of {} kv heads", self.q_heads, self.kv_heads));
        }
        if self.query_rows == 0 {
            return invalid("query_rows", "no query rows");
        }
        if !(self.softcap >= 0.0 && self.softcap.is_finite()) {
            return invalid("softcap", format!("{} is not a finite number of at least 0", self.softcap));
        }
        if !self.scale.is_finite() {
            return invalid("scale", format!("{} is not finite", self.scale));
        }
        if self.window > i32::MAX as u32 {
            return invalid("window", format!("{} is above 2^31 - 1", self.window));
        }
        if self.segments[0].is_none() || self.segments.windows(2).any(|w| w[0].is_none() && w[1].is_some()) {
            return invalid("segments", "there must be one, and none may be missing before another");
        }
        for s in self.segments() {
            if s.max_rows > 1 << 30 {
                return invalid("max_rows", format!("{} rows are more than 2^30", s.max_rows));
            }
        }
        Ok(())
    }

    /// Refuses formats without a kernel (the reference needs none); gives that of the quantized rows, if there are any.
    fn check_formats(&self, device: &Device) -> Result<Option<SegmentShape>> {
        let native = Option::<Codec>::from(self.dtype);
        let mut quantized: Option<SegmentShape> = None;
        for s in self.segments() {
            for (format, dim, what) in [(s.keys, self.head_dim, "keys"), (s.values, self.value_dim, "values")] {
                format.check(what, dim)?;
                if format.codec.dense().is_some() && (Some(format.codec) != native || format.hadamard) {
                    let rotated = if format.hadamard { "rotated " } else { "" };
                    return unsupported("attend", format!("{rotated}{:?} rows for {} q", format.codec, self.dtype));
                }
                if format.codec == Codec::Pq && device.backend() != Backend::Reference {
                    return unsupported("attend", format!("{what} in codebooks (decode them first; scan takes them)"));
                }
                if format.codec.reference().is_integer()
                    && !s.keys.codec.is_channel_wise()
                    && !format.codec.is_channel_wise()
                    && format.group_of(dim) != dim
                {
                    return unsupported(
                        "attend",
                        format!(
                            "{what} with a scale for every {} values: one a row is (decode them first)",
                            format.group_of(dim)
                        ),
                    );
                }
            }
            if s.is_dense() {
                continue;
            }
            if s.keys.codec.dense().is_some() || s.values.codec.dense().is_some() {
                return unsupported("attend", format!("{:?} keys beside {:?} values", s.keys.codec, s.values.codec));
            }
            if s.values.hadamard {
                return unsupported("attend", "rotated values: keys may be (decode them first)");
            }
            self.check_channels(&s)?;
            if let Some(other) = quantized
                && (other.keys, other.values) != (s.keys, s.values)
            {
                return unsupported("attend", "segments of two quantized formats: one, beside rows of the type of q, is");
            }
            quantized = Some(s);
        }
        if self.int8_queries && self.segments().any(|s| s.is_dense()) {
            return unsupported("attend", "int8 queries beside rows of the type of q");
        }
        Ok(quantized)
    }

    /// Refuses channel-wise rows without a kernel.
    fn check_channels(&self, s: &SegmentShape) -> Result<()> {
        if s.values.codec.is_channel_wise() {
            return unsupported("attend", format!("{:?} values: keys may be channel-wise (decode them first)", s.values.codec));
        }
        if !s.keys.codec.is_channel_wise() {
            return Ok(());
        }
        let rows = s.keys.group_of(self.head_dim);
        if !rows.is_multiple_of(32) {
            return unsupported("attend", format!("channel-wise keys in groups of {rows} rows: multiples of 32 are"));
        }
        if !s.values.codec.reference().is_integer() {
            return unsupported("attend", format!("{:?} keys beside {:?} values", s.keys.codec, s.values.codec));
        }
        let (group, run) = (s.values.group_of(self.value_dim), self.tiling(Rows::ChannelWise { value_scales: 1 }).value_run());
        if group != self.value_dim && !group.is_multiple_of(run) {
            return unsupported("attend", format!("values with a scale for every {group} values: multiples of {run} are"));
        }
        Ok(())
    }

    fn tiling(&self, rows: Rows) -> Tiling {
        Tiling::of(self.head_dim.max(self.value_dim), self.group() * self.query_rows, rows)
    }

    /// Validates, and picks the kernel, its grid and how much scratch it needs.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a combination without a kernel; [`crate::Error::Invalid`] for a contradiction.
    pub fn plan(&self, device: &Device) -> Result<AttendPlan> {
        self.check()?;
        let quantized = self.check_formats(device)?;
        let packed = self.group() * self.query_rows;
        let tiling = self.tiling(match quantized {
            None => Rows::Dense,
            Some(s) if s.keys.codec.is_channel_wise() => {
                Rows::ChannelWise { value_scales: self.value_dim / s.values.group_of(self.value_dim) }
            }
            Some(_) => Rows::TokenWise,
        });
        let info = device.info();
        let stage_bytes = tiling.stage_bytes(self.segments());
        let shared = tiling.shared_bytes(stage_bytes, info);
        let Some(entry) = tiling.entry(self.dtype) else {
            return unsupported("attend", format!("{} with head dimension {}", self.dtype, self.head_dim));
        };
        if shared > info.shared_per_block as usize {
            return unsupported(
                "attend",
                format!("{entry} needs {shared} bytes of shared memory, {} has {}", info.name, info.shared_per_block),
            );
        }
        let query_tiles = packed.div_ceil(tiling.columns);
        let units = self.seqs * self.kv_heads * query_tiles;
        let max_tiles: usize = self.segments().map(|s| s.max_rows.div_ceil(tiling.tile_rows(&s))).sum();
        if units.saturating_mul(max_tiles.max(1)) > i32::MAX as usize {
            return invalid("segments", format!("{units} units of {max_tiles} tiles are more than 2^31"));
        }
        // A split is at least 16 tiles, and a unit has at most 64: functions of the capacity, never of the batch.
        let own_cell_tiles = match self.schedule {
            Schedule::Balanced => 0,
            Schedule::Own => max_tiles.div_ceil(64).max(16),
        };
        let ctas = info.sm_count as usize * ctas_per_sm(shared, info);
        let slots = match self.schedule {
            Schedule::Balanced => 2 * ctas,
            Schedule::Own => units * max_tiles.div_ceil(own_cell_tiles).max(1),
        };
        let grid = if units == 0 { 0 } else { ctas as u32 };
        Ok(AttendPlan {
            shape: *self,
            tiling,
            launch: Launch { entry, grid, block: 32 * tiling.warps() as u32, shared_bytes: shared as u32 },
            query_tiles,
            units,
            slots,
            own_cell_tiles,
            stages: tiling.stages(info),
            stage_bytes,
            quantized,
        })
    }
}
