//! encode: dense rows into stored rows. decode: stored rows into dense f32.

use crate::append::check_dim;
use crate::device::Launch;
use crate::error::invalid;
use crate::paged::within;
use crate::{Device, Dtype, Format, Memory, Pool, Result, Rows, Stream, Tables, View, ViewMut, abi};

/// What [`TranscodePlan`] is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeShape {
    /// Of the stored rows.
    pub format: Format,
    /// Type of the dense rows to encode; decoding gives f32.
    pub dtype: Dtype,
    /// B.
    pub seqs: usize,
    /// H.
    pub heads: usize,
    /// Rows a (sequence, head).
    pub rows: usize,
    /// Values a row; a multiple of 8 up to 256.
    pub dim: usize,
}

/// A validated encode or decode.
///
/// Channel-wise rows are encoded in whole groups: a launch of rows that end within one is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TranscodePlan {
    shape: EncodeShape,
    grid: u32,
}

impl EncodeShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a row length without a kernel, [`crate::Error::Invalid`] for a group that does not
    /// divide.
    pub fn plan(&self, _: &Device) -> Result<TranscodePlan> {
        check_dim("encode", "dim", self.dim)?;
        self.format.check("group", self.dim)?;
        let grid = (self.seqs * self.heads * self.rows).div_ceil(4);
        if grid > i32::MAX as usize {
            return invalid("rows", format!("{} rows are too many for one launch", self.rows));
        }
        Ok(TranscodePlan { shape: *self, grid: grid as u32 })
    }
}

impl TranscodePlan {
    /// Encodes `x [B, H, rows, dim]` as rows 0.. of each (sequence, head). `scales`: as [`Tables`] says.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`].
    pub fn encode(
        &self,
        stream: &Stream,
        x: View<'_>,
        rows: &Rows<'_>,
        pool: &Pool<ViewMut<'_>>,
        scales: Option<View<'_>>,
    ) -> Result<()> {
        within("x", &x, self.elements() * self.shape.dtype.bytes(), 16)?;
        let entry = self.encoder()?;
        self.launch(stream, entry, (x.address(), self.shape.dtype), rows, pool, scales)
    }

    /// Decodes rows 0.. of each (sequence, head) into `out [B, H, rows, dim]` f32; 0 beyond a length.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`].
    pub fn decode(
        &self,
        stream: &Stream,
        rows: &Rows<'_>,
        pool: &Pool<View<'_>>,
        scales: Option<View<'_>>,
        out: &mut ViewMut<'_>,
    ) -> Result<()> {
        within("out", out, self.elements() * 4, 16)?;
        self.launch(stream, "kvlar_decode", (out.address(), Dtype::F32), rows, pool, scales)
    }

    /// The entry point that encodes.
    fn encoder(&self) -> Result<&'static str> {
        let (s, group) = (&self.shape, self.shape.format.group_of(self.shape.dim));
        if !s.format.codec.is_channel_wise() {
            return Ok("kvlar_encode");
        }
        if !s.rows.is_multiple_of(group) {
            return invalid("rows", format!("{} rows are no whole groups of {group}", s.rows));
        }
        Ok("kvlar_encode_channels")
    }

    fn elements(&self) -> usize {
        self.shape.seqs * self.shape.heads * self.shape.rows * self.shape.dim
    }

    fn launch<M: Memory>(
        &self,
        stream: &Stream,
        entry: &'static str,
        (x, dtype): (u64, Dtype),
        rows: &Rows<'_>,
        pool: &Pool<M>,
        scales: Option<View<'_>>,
    ) -> Result<()> {
        let s = &self.shape;
        if rows.max_rows < s.rows {
            return invalid("rows", format!("{} rows in a cache of {}", s.rows, rows.max_rows));
        }
        rows.check("rows", s.seqs, (s.heads, s.heads), pool.page_count)?;
        pool.check("pool", rows, s.seqs, s.heads, s.format.stored(s.dim))?;
        let [scales, _] = Tables { keys: scales, values: None }.addresses(s.heads, [s.format; 2])?;
        let (n, d) = (s.rows as i64, s.dim as i64);
        let params = abi::KvlarTranscode {
            rows: rows.abi(),
            pool: pool.abi(),
            x,
            x_seq_stride: s.heads as i64 * n * d,
            x_head_stride: n * d,
            x_row_stride: d,
            status: 0,
            format: s.format.abi(s.dim, scales),
            seqs: s.seqs as u32,
            heads: s.heads as u32,
            row_count: s.rows as u32,
            dim: s.dim as u32,
            dtype: dtype.abi(),
            reserved: 0,
        };
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, entry, &params) }
    }

    /// Enqueues an encode with the caller's own parameter struct, for engines with their own tensors and strides.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan's shape, and its addresses and strides are valid on the stream's device until the
    /// launch has run.
    pub unsafe fn encode_raw(&self, stream: &Stream, params: &abi::KvlarTranscode) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_raw(stream, self.encoder()?, params) }
    }

    /// Enqueues a decode likewise; `params.dtype` is not read, the output is f32.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// As for [`TranscodePlan::encode_raw`].
    pub unsafe fn decode_raw(&self, stream: &Stream, params: &abi::KvlarTranscode) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_raw(stream, "kvlar_decode", params) }
    }

    /// # Safety
    /// As for [`TranscodePlan::encode_raw`].
    unsafe fn launch_raw(&self, stream: &Stream, entry: &'static str, params: &abi::KvlarTranscode) -> Result<()> {
        if self.grid == 0 {
            return Ok(());
        }
        let s = &self.shape;
        let grid = match entry {
            "kvlar_encode_channels" => (s.seqs * s.heads * (s.rows / s.format.group_of(s.dim))) as u32,
            _ => self.grid,
        };
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(Launch { entry, grid, block: 128, shared_bytes: 0 }, params) }
    }
}
