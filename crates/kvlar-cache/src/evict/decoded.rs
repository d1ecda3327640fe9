//! Rows that are kept as codes, decoded for the kernels that score: those take rows of the cache's type.

use super::cache::EvictingCache;
use crate::Result;
use crate::layer::native;
use kvlar::{Buffer, Dtype, EncodeShape, Format, Pool, Rows, Stream, View};

/// Room for the keys, or values, of one layer of one sequence.
#[derive(Debug)]
pub(super) struct DecodedRows {
    dtype: Dtype,
    heads: usize,
    dim: usize,
    data: Buffer,
}

impl DecodedRows {
    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The first `most` rows of each head, as far as it holds them: one launch. They lie next to each other, `most` rows a head.
    pub fn decode<'a>(
        &'a mut self,
        stream: &Stream,
        rows: Rows<'a>,
        most: usize,
        pool: &Pool<View<'_>>,
        (format, tables): (Format, Option<View<'_>>),
    ) -> Result<(Rows<'a>, Pool<View<'a>>)> {
        let Self { dtype, heads, dim, .. } = *self;
        let shape = EncodeShape { format, dtype, seqs: 1, heads, rows: most, dim };
        let held = Rows { max_rows: most, ..rows };
        shape.plan(stream.device())?.decode_held(stream, &held, pool, tables, dtype, &mut self.data.view_mut())?;
        let rows = Rows {
            length_seq_stride: rows.length_seq_stride,
            length_head_stride: rows.length_head_stride,
            ..Rows::contiguous(rows.lengths, most)
        };
        Ok((rows, Pool::contiguous(self.data.view(), heads, most, dim * dtype.bytes())))
    }
}

/// Format and tables of keys and of values.
pub(super) type Encoded<'a> = [(Format, Option<View<'a>>); 2];

impl EvictingCache {
    /// How a layer's rows are kept, where they must be decoded to be scored: keys, and values where these count too.
    pub(super) fn encoded(&self, layer: usize) -> Option<Encoded<'_>> {
        let (quantized, c) = (&self.layers[layer].quantized, &self.config);
        let tables = quantized.as_ref().map(|q| q.tables()).unwrap_or_default();
        let [keys, values] = quantized.as_ref().map_or([c.keys, c.values], |q| q.formats);
        let is_native = |format: Format| format.codec == native(c.dtype) && !format.hadamard;
        let native = is_native(keys) && (!self.policy.reads_values() || is_native(values));
        (!native).then_some([(keys, tables.keys), (values, tables.values)])
    }

    /// Room for the keys, and values where these count too, that scores are made of.
    pub(super) fn decoded_rows(&self) -> Result<[Option<DecodedRows>; 2]> {
        let (c, some) = (&self.config, (0..self.layers.len()).any(|layer| self.encoded(layer).is_some()));
        let side = |needed: bool, dim: usize| {
            if !(needed && some) {
                return Ok(None);
            }
            let data = self.device.alloc(c.kv_heads * c.max_rows * dim * c.dtype.bytes())?;
            Ok::<_, crate::CacheError>(Some(DecodedRows { dtype: c.dtype, heads: c.kv_heads, dim, data }))
        };
        Ok([side(self.policy.reads_rows(), c.head_dim)?, side(self.policy.reads_values(), c.value_dim)?])
    }
}
