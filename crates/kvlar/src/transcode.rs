//! encode: dense rows into stored rows. decode: stored rows into dense f32.

use crate::append::check_dim;
use crate::device::Launch;
use crate::error::invalid;
use crate::paged::within;
use crate::{Codec, Device, Dtype, Format, Memory, Pool, Result, Rows, Stream, Tables, View, ViewMut, abi};

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
}

/// Rows a CTA of `kernels/encode/pq.cu`.
const PQ_ROWS: usize = 32;
/// Its staged centroids, in floats, and what its warps have found (as many rows of a distance and a code each).
const PQ_STAGE: usize = 2048 + 4 * PQ_ROWS * 2;

impl EncodeShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a row length without a kernel, [`crate::Error::Invalid`] for a group that does not
    /// divide.
    pub fn plan(&self, _: &Device) -> Result<TranscodePlan> {
        check_dim("encode", "dim", self.dim)?;
        self.format.check("group", self.dim)?;
        let heads = self.seqs * self.heads;
        let grid = (heads * self.rows).div_ceil(4).max(heads * self.rows.div_ceil(PQ_ROWS));
        if grid > i32::MAX as usize {
            return invalid("rows", format!("{} rows are too many for one launch", self.rows));
        }
        Ok(TranscodePlan { shape: *self })
    }
}

/// Dense rows that are encoded, or decoded into.
#[derive(Clone, Copy)]
struct Outer {
    address: u64,
    dtype: Dtype,
    /// Whether rows beyond a length are left alone.
    held_only: bool,
}

impl Outer {
    fn of(address: u64, dtype: Dtype) -> Self {
        Self { address, dtype, held_only: false }
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
        self.launch(stream, self.encoder()?, Outer::of(x.address(), self.shape.dtype), rows, pool, scales)
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
        self.decode_as(stream, rows, pool, scales, Dtype::F32, out)
    }

    /// Likewise into `out` of another type.
    ///
    /// # Errors
    /// As for [`TranscodePlan::decode`].
    pub fn decode_as(
        &self,
        stream: &Stream,
        rows: &Rows<'_>,
        pool: &Pool<View<'_>>,
        scales: Option<View<'_>>,
        dtype: Dtype,
        out: &mut ViewMut<'_>,
    ) -> Result<()> {
        within("out", out, self.elements() * dtype.bytes(), 16)?;
        self.launch(stream, self.a_row_a_warp("kvlar_decode"), Outer::of(out.address(), dtype), rows, pool, scales)
    }

    /// Likewise, but leaves rows of `out` beyond a length as they are: what a capacity of many rows costs is not written
    /// where few are held.
    ///
    /// # Errors
    /// As for [`TranscodePlan::decode`].
    pub fn decode_held(
        &self,
        stream: &Stream,
        rows: &Rows<'_>,
        pool: &Pool<View<'_>>,
        scales: Option<View<'_>>,
        dtype: Dtype,
        out: &mut ViewMut<'_>,
    ) -> Result<()> {
        within("out", out, self.elements() * dtype.bytes(), 16)?;
        let out = Outer { held_only: true, ..Outer::of(out.address(), dtype) };
        self.launch(stream, self.a_row_a_warp("kvlar_decode"), out, rows, pool, scales)
    }

    fn a_row_a_warp(&self, entry: &'static str) -> Launch {
        let rows = self.shape.seqs * self.shape.heads * self.shape.rows;
        Launch { entry, grid: rows.div_ceil(4) as u32, block: 128, shared_bytes: 0 }
    }

    fn encoder(&self) -> Result<Launch> {
        let EncodeShape { format, seqs, heads, rows, dim, .. } = self.shape;
        if format.codec.is_channel_wise() {
            let group = format.group_of(dim);
            if !rows.is_multiple_of(group) {
                return invalid("rows", format!("{rows} rows are no whole groups of {group}"));
            }
            let grid = seqs * heads * (rows / group);
            return Ok(Launch { entry: "kvlar_encode_channels", grid: grid as u32, block: 128, shared_bytes: 0 });
        }
        if format.codec != Codec::Pq {
            return Ok(self.a_row_a_warp("kvlar_encode"));
        }
        let shared = 4 * (PQ_STAGE + PQ_ROWS * (dim + 1));
        let grid = seqs * heads * rows.div_ceil(PQ_ROWS);
        Ok(Launch { entry: "kvlar_encode_pq", grid: grid as u32, block: 128, shared_bytes: shared as u32 })
    }

    fn elements(&self) -> usize {
        self.shape.seqs * self.shape.heads * self.shape.rows * self.shape.dim
    }

    fn launch<M: Memory>(
        &self,
        stream: &Stream,
        launch: Launch,
        x: Outer,
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
        let [scales, _] = Tables { keys: scales, values: scales }.addresses(s.heads, [(s.format, s.dim); 2])?;
        let (n, d) = (s.rows as i64, s.dim as i64);
        let params = abi::KvlarTranscode {
            rows: rows.abi(),
            pool: pool.abi(),
            x: x.address,
            x_seq_stride: s.heads as i64 * n * d,
            x_head_stride: n * d,
            x_row_stride: d,
            status: 0,
            format: s.format.abi(s.dim, scales),
            seqs: s.seqs as u32,
            heads: s.heads as u32,
            row_count: s.rows as u32,
            dim: s.dim as u32,
            dtype: x.dtype.abi(),
            held_only: x.held_only.into(),
        };
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, launch, &params) }
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

    /// Enqueues a decode likewise; `params.dtype` is the type of the output.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// As for [`TranscodePlan::encode_raw`].
    pub unsafe fn decode_raw(&self, stream: &Stream, params: &abi::KvlarTranscode) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_raw(stream, self.a_row_a_warp("kvlar_decode"), params) }
    }

    /// # Safety
    /// As for [`TranscodePlan::encode_raw`].
    unsafe fn launch_raw(&self, stream: &Stream, launch: Launch, params: &abi::KvlarTranscode) -> Result<()> {
        if launch.grid == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(launch, params) }
    }
}
