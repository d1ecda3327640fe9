//! Keys as they are stored, read back: what a method's error is measured on.

use super::{Layer, LowrankLayer, Store};
use crate::sequence::{Kind, Sequence};
use crate::{Cache, Result, SeqId};
use half::{bf16, f16};
use kvlar::{Buffer, Dtype, EncodeShape, Latents, Rows, Stream, View};
use kvlar_reference::{Int8Basis, Rope, RopeLayout, RotaryPairs};

/// Products that are summed apart, so that they are vector arithmetic.
const LANES: usize = 16;

impl Cache {
    /// A layer's keys as attention sees them: decoded from what the cache holds, low-rank ones rebuilt and rotated by
    /// `rope`, sinks and recent rows of them as they were. During a step its tokens are among them; they must have been
    /// appended to the layer. f32 `[tokens, Hk, d]`.
    ///
    /// For measurements: it allocates, waits for the stream, and rebuilds low-rank keys on the host.
    ///
    /// # Errors
    /// [`crate::CacheError::UnknownSequence`]; [`crate::CacheError::Invalid`] for a layer that does not exist;
    /// [`crate::CacheError::Device`], also where rows cannot be decoded (latents of more than 256 numbers).
    pub fn decoded_keys(&self, stream: &Stream, seq: SeqId, layer: usize, rope: &Rope) -> Result<Vec<f32>> {
        let s = self.sequences.get(&seq).ok_or(crate::CacheError::UnknownSequence(seq))?;
        let Some(of) = self.layers.get(layer) else {
            return crate::error::invalid("layer", format!("{layer} of {}", self.layers.len()));
        };
        let n = s.total();
        let heads = self.config.kv_heads;
        let tables = of.quantized.as_ref().and_then(|q| q.tables().keys);
        if of.lowrank.is_none() && of.exact.is_none() {
            return Ok(rows_first(&of.rows.decode_keys(stream, s, (Kind::All, n), tables)?, heads, n));
        }
        // Without exact rows these are 0 and n.
        let (sinks, from) = (n.min(self.exact.sinks), s.held.exact_from(&self.exact, n));
        let mut keys = self.exact_keys(stream, s, of, (Kind::Sinks, 0..sinks))?;
        let first = s.held.list(Kind::Recent).first;
        let recent = (Kind::Recent, from.saturating_sub(first)..n.saturating_sub(first));
        let Some(lowrank) = &of.lowrank else {
            let encoded = from - sinks;
            keys.extend(rows_first(&of.rows.decode_keys(stream, s, (Kind::All, encoded), tables)?, heads, encoded));
            keys.extend(self.exact_keys(stream, s, of, recent)?);
            return Ok(keys);
        };
        let latents = of.rows.decode_keys(stream, s, (Kind::All, n - sinks), None)?;
        let rebuilt = lowrank.rebuild(stream, self.config.dtype, &latents, n - sinks, (heads, self.config.head_dim), rope)?;
        for (i, row) in rebuilt.chunks_exact(self.config.head_dim).take((from - sinks) * heads).enumerate() {
            keys.extend(rope.rotate(row, (sinks + i / heads) as i64));
        }
        keys.extend(self.exact_keys(stream, s, of, recent)?);
        Ok(keys)
    }

    /// Some rows of a list of exact rows, counted from its first: `[rows, Hk, d]`.
    fn exact_keys(
        &self,
        stream: &Stream,
        s: &Sequence,
        of: &Layer,
        (kind, rows): (Kind, std::ops::Range<usize>),
    ) -> Result<Vec<f32>> {
        let Some(exact) = of.exact.as_ref().filter(|_| !rows.is_empty()) else { return Ok(Vec::new()) };
        let all = exact.decode_keys(stream, s, (kind, rows.end), None)?;
        let width = self.config.kv_heads * self.config.head_dim;
        Ok(rows_first(&all, self.config.kv_heads, rows.end)[rows.start * width..].to_vec())
    }
}

/// `[heads, n, d]` as `[n, heads, d]`.
fn rows_first(x: &[f32], heads: usize, n: usize) -> Vec<f32> {
    let dim = x.len() / (heads * n).max(1);
    let row = |i: usize| &x[(i % heads * n + i / heads) * dim..][..dim];
    (0..heads * n).flat_map(row).copied().collect()
}

impl Store {
    /// The first `rows` of one of a sequence's lists, decoded: `[heads, rows, dim]`.
    fn decode_keys(
        &self,
        stream: &Stream,
        s: &Sequence,
        (kind, rows): (Kind, usize),
        tables: Option<View<'_>>,
    ) -> Result<Vec<f32>> {
        if rows == 0 {
            return Ok(Vec::new());
        }
        let (format, device) = (self.keys.0, stream.device());
        let pages: Vec<i32> = s.held.list(kind).pages.iter().map(|&p| p as i32).collect();
        let words = |words: &[i32]| super::upload(device, stream, bytemuck::cast_slice(words));
        let (table, length) = (words(&pages)?, words(&[rows as i32])?);
        let list = Rows::block_table(table.view(), pages.len(), length.view(), self.page_rows)?;
        let shape = EncodeShape { format: format.format, dtype: Dtype::F32, seqs: 1, heads: format.heads, rows, dim: format.dim };
        let mut decoded = vec![0f32; format.heads * rows * format.dim];
        let mut out = device.alloc(4 * decoded.len())?;
        shape.plan(device)?.decode(stream, &list, &self.pools().0, tables, &mut out.view_mut())?;
        stream.download(&out, 0, bytemuck::cast_slice_mut(&mut decoded))?;
        Ok(decoded)
    }
}

impl LowrankLayer {
    /// Keys of n rows before RoPE, `[n, Hk, d]`, of latents `[groups, n, rank]`: basis · z (+ mean).
    fn rebuild(
        &self,
        stream: &Stream,
        dtype: Dtype,
        latents: &[f32],
        n: usize,
        (heads, dim): (usize, usize),
        rope: &Rope,
    ) -> Result<Vec<f32>> {
        let rank = self.keys.rank;
        let basis = self.key_basis(stream, dtype, dim, rope)?;
        let mean = match &self.mean {
            Some(mean) => download(stream, mean)?,
            None => vec![0f32; heads * dim],
        };
        let mut keys = Vec::with_capacity(n * heads * dim);
        for row in 0..n {
            for (h, group) in self.group_of.iter().enumerate() {
                let z = &latents[(*group as usize * n + row) * rank..][..rank];
                let lines = basis[h * dim * rank..][..dim * rank].chunks_exact(rank);
                keys.extend(lines.zip(&mean[h * dim..]).map(|(line, mean)| mean + dot(line, z)));
            }
        }
        Ok(keys)
    }

    /// The basis of the keys as the device has it, `[Hk, d, rank]`.
    fn key_basis(&self, stream: &Stream, dtype: Dtype, dim: usize, rope: &Rope) -> Result<Vec<f32>> {
        let basis = &self.keys.basis;
        Ok(match (self.latents, &self.key_scales, dtype) {
            (Latents::Int8Basis, Some(scales), _) => {
                let pairs = RotaryPairs { rotary_dim: rope.rotary_dim(), half: rope.layout == RopeLayout::Half };
                let int8 = Int8Basis { codes: download(stream, basis)?, scales: download(stream, scales)? };
                int8.dequantize(dim, self.keys.rank, pairs)
            }
            (Latents::Dtype, _, Dtype::Bf16) => download::<bf16>(stream, basis)?.into_iter().map(bf16::to_f32).collect(),
            _ => download::<f16>(stream, basis)?.into_iter().map(f16::to_f32).collect(),
        })
    }
}

fn download<T: bytemuck::Pod>(stream: &Stream, buffer: &Buffer) -> Result<Vec<T>> {
    let mut values = vec![T::zeroed(); buffer.len() / size_of::<T>()];
    stream.download(buffer, 0, bytemuck::cast_slice_mut(&mut values))?;
    Ok(values)
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum()
}
