//! Rows behind `KvlarRows` and `KvlarPool`, with the kernels' clamping and reporting.

use super::memory::{int, read, write};
use crate::{Codec, Error, Result, abi};
use kvlar_reference::{
    Codebooks, EncodedRow, decode_channels, decode_fp8, decode_pq, decode_row, encode_channels, encode_fp8, encode_pq,
    encode_row, hadamard,
};
use std::sync::atomic::{AtomicU32, Ordering};

/// Sets bits of the status word, if there is one.
///
/// # Safety
/// `address` is 0 or that of a u32.
pub unsafe fn report(address: u64, bits: u32) {
    if address != 0 {
        unsafe { AtomicU32::from_ptr(address as *mut u32) }.fetch_or(bits, Ordering::Relaxed);
    }
}

/// One (sequence, head)'s rows in one pool.
#[derive(Clone, Copy)]
pub struct HeadRows<'a> {
    pub rows: &'a abi::KvlarRows,
    pub pool: &'a abi::KvlarPool,
    pub seq: i64,
    pub head: i64,
    pub status: u64,
}

/// Where a row is.
#[derive(Clone, Copy)]
pub struct Place {
    pub page: i64,
    pub in_page: i64,
}

impl HeadRows<'_> {
    /// Rows held, clamped to the capacity; `default` without lengths.
    ///
    /// # Safety
    /// As for [`super::run`].
    pub unsafe fn length(&self, default: usize) -> usize {
        let r = self.rows;
        if r.lengths == 0 {
            return default;
        }
        let n = unsafe { int(r.lengths, self.seq * r.length_seq_stride + self.head * r.length_head_stride) };
        if n < 0 || n as u32 > r.max_rows {
            unsafe { report(self.status, abi::KVLAR_STATUS_BAD_LENGTH) };
        }
        n.clamp(0, r.max_rows as i32) as usize
    }

    /// Where `row` is; `None` (reported) if its page is none of the pool's.
    ///
    /// # Safety
    /// As for [`super::run`].
    pub unsafe fn place(&self, row: usize) -> Option<Place> {
        let r = self.rows;
        let mut page = (row >> r.page_rows_log2) as i64;
        if r.table != 0 {
            let at = self.seq * r.table_seq_stride + self.head * r.table_head_stride + page;
            page = i64::from(unsafe { int(r.table, at) });
        }
        if page < 0 || page >= i64::from(self.pool.page_count) {
            unsafe { report(self.status, abi::KVLAR_STATUS_BAD_PAGE) };
            return None;
        }
        Some(Place { page, in_page: (row & ((1 << r.page_rows_log2) - 1)) as i64 })
    }

    /// Element of the positions that belongs to a row.
    pub fn position_at(&self, place: Place) -> i64 {
        let r = self.rows;
        self.seq * r.position_seq_stride + self.head * r.position_head_stride + (place.page << r.page_rows_log2) + place.in_page
    }

    fn addresses(&self, place: Place, format: &abi::KvlarFormat) -> Result<(u64, u64)> {
        let p = self.pool;
        let page = p.data.wrapping_add_signed(self.seq * p.seq_stride + self.head * p.head_stride + place.page * p.page_stride);
        let row = place.in_page as u64;
        let group = if codec(format.codec)?.is_channel_wise() { u64::from(format.group) } else { 1 };
        Ok((page + row * u64::from(p.row_stride), page + u64::from(p.params_offset) + row / group * u64::from(p.params_stride)))
    }

    /// The decoded row.
    ///
    /// # Safety
    /// As for [`super::run`].
    pub unsafe fn load(&self, place: Place, format: &abi::KvlarFormat, dim: usize) -> Result<Vec<f32>> {
        let (codec, group) = (codec(format.codec)?, format.group as usize);
        let (codes, params) = self.addresses(place, format)?;
        let params_bytes = if codec.is_channel_wise() { 4 * dim } else { codec.params_bytes(dim, group) };
        let count = if codec == Codec::Pq { dim / group } else { dim };
        let (mut codes, params) = unsafe { (read::<u8>(codes, codec.row_bytes(count)), read::<u8>(params, params_bytes)) };
        let row = match codec {
            Codec::Fp8 => {
                let scale = unsafe { self.scale(format) };
                codes[..dim].iter().map(|&c| decode_fp8(c, scale)).collect()
            }
            Codec::Pq => {
                let values = unsafe { self.codebooks(format, dim) };
                // As the kernels: a code beyond the centroids reads the last one.
                codes.iter_mut().for_each(|c| *c = (*c).min((format.centroids - 1) as u8));
                decode_pq(&codes, dim, &borrowed(&values, format, dim))?
            }
            _ if codec.is_channel_wise() => decode_channels(&codes, &params, dim, codec.reference().bits())?,
            _ => decode_row(&codes, &params, dim, codec.reference(), group)?,
        };
        Ok(if format.hadamard == 1 { hadamard(&row)? } else { row })
    }

    /// What fp8 codes of the head are multiplied by.
    unsafe fn scale(&self, format: &abi::KvlarFormat) -> f32 {
        if format.tables == 0 { 1.0 } else { unsafe { read::<f32>(format.tables + 4 * self.head as u64, 1)[0] } }
    }

    /// The head's codebooks of rows of `dim` values.
    unsafe fn codebooks(&self, format: &abi::KvlarFormat, dim: usize) -> Vec<f32> {
        let count = format.centroids as usize * dim;
        unsafe { read::<f32>(format.tables + 4 * self.head as u64 * count as u64, count) }
    }

    /// Encodes and stores a row.
    ///
    /// # Safety
    /// As for [`super::run`].
    pub unsafe fn store(&self, place: Place, x: &[f32], format: &abi::KvlarFormat) -> Result<()> {
        let codec = codec(format.codec)?;
        let rotated = if format.hadamard == 1 { Some(hadamard(x)?) } else { None };
        let x = rotated.as_deref().unwrap_or(x);
        let row = match codec {
            Codec::Fp8 => {
                let scale = unsafe { self.scale(format) };
                padded(x.iter().map(|&x| encode_fp8(x, scale)).collect(), codec)
            }
            Codec::Pq => {
                let values = unsafe { self.codebooks(format, x.len()) };
                padded(encode_pq(x, &borrowed(&values, format, x.len()))?, codec)
            }
            _ => encode_row(x, codec.reference(), format.group as usize)?,
        };
        let (codes, params) = self.addresses(place, format)?;
        unsafe {
            write(codes, &row.codes);
            write(params, &row.params);
        }
        Ok(())
    }

    /// Encodes and stores a group of rows of `dim` values, channel-wise; `place` is the first's.
    ///
    /// # Safety
    /// As for [`super::run`].
    pub unsafe fn store_group(&self, place: Place, x: &[f32], format: &abi::KvlarFormat, dim: usize) -> Result<()> {
        let turned: Vec<Vec<f32>> = match format.hadamard {
            1 => x.chunks(dim).map(hadamard).collect::<std::result::Result<_, _>>()?,
            _ => vec![x.to_vec()],
        };
        let group = encode_channels(&turned.concat(), dim, codec(format.codec)?.reference().bits())?;
        let (codes, params) = self.addresses(place, format)?;
        let row_bytes = codec(format.codec)?.row_bytes(dim);
        for (row, codes_of_row) in group.codes.chunks(row_bytes).enumerate() {
            unsafe { write(codes + row as u64 * u64::from(self.pool.row_stride), codes_of_row) };
        }
        unsafe { write(params, &group.params) };
        Ok(())
    }
}

fn borrowed<'a>(values: &'a [f32], format: &abi::KvlarFormat, dim: usize) -> Codebooks<'a> {
    Codebooks { subvectors: dim / format.group as usize, centroids: format.centroids as usize, values }
}

/// Codes of a byte each, as a stored row without scales.
fn padded(mut codes: Vec<u8>, codec: Codec) -> EncodedRow {
    codes.resize(codec.row_bytes(codes.len()), 0);
    EncodedRow { codes, params: Vec::new() }
}

pub fn codec(id: u32) -> Result<Codec> {
    Codec::from_abi(id).ok_or_else(|| Error::Reference(format!("no codec {id}")))
}

pub fn dtype(id: u32) -> Result<crate::Dtype> {
    crate::Dtype::from_abi(id).ok_or_else(|| Error::Reference(format!("no dtype {id}")))
}
