//! Merging attention results over disjoint sets of rows.

use crate::device::Launch;
use crate::error::invalid;
use crate::paged::within;
use crate::{Device, Memory, Result, Stream, View, ViewMut, abi};

/// What [`MergePlan`] is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeShape {
    /// Results to merge.
    pub parts: usize,
    /// Rows of each: sequences × query heads × query rows.
    pub rows: usize,
    /// Value dimension.
    pub dim: usize,
}

/// A validated merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergePlan(MergeShape);

impl MergeShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for no parts or too many rows.
    pub fn plan(&self, _device: &Device) -> Result<MergePlan> {
        if self.parts == 0 || self.rows > i32::MAX as usize || self.parts > u32::MAX as usize || self.dim > u32::MAX as usize {
            return invalid("parts", format!("{} parts of {} rows", self.parts, self.rows));
        }
        Ok(MergePlan(*self))
    }
}

impl MergePlan {
    /// `parts [n, rows, dim]` and `part_lse [n, rows]`, f32, into `out [rows, dim]` and `lse [rows]`. A part with lse −∞
    /// vanishes; all of them: 0 and −∞.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`].
    pub fn launch(
        &self,
        stream: &Stream,
        parts: View<'_>,
        part_lse: View<'_>,
        out: &mut ViewMut<'_>,
        lse: &mut ViewMut<'_>,
    ) -> Result<()> {
        let MergeShape { parts: n, rows, dim } = self.0;
        within("parts", &parts, 4 * n * rows * dim, 4)?;
        within("part_lse", &part_lse, 4 * n * rows, 4)?;
        within("out", out, 4 * rows * dim, 4)?;
        within("lse", lse, 4 * rows, 4)?;
        let params = abi::KvlarMerge {
            parts: parts.address(),
            part_lse: part_lse.address(),
            out: out.address(),
            lse: lse.address(),
            part_count: n as u32,
            row_count: rows as u32,
            dim: dim as u32,
            reserved: 0,
        };
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// Enqueues with the caller's own parameter struct.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan's shape, and its addresses are valid on the stream's device until the launch has run.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarMerge) -> Result<()> {
        if self.0.rows == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(Launch { entry: "kvlar_merge", grid: self.0.rows as u32, block: 128, shared_bytes: 0 }, params) }
    }
}
