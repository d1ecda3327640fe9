//! On a device: fused where a kernel takes the pair of formats, else decoded first and attended densely.

use super::super::Result;
use super::super::attention::{self, Dims};
use super::super::lab::Lab;
use super::{Inputs, Outputs};
use crate::backend::Backend;
use kvlar::{
    AttendPlan, AttendShape, Buffer, Codec, Dtype, EncodeShape, Format, Pool, Rows, Segment, SegmentShape, Tables, View,
};
use kvlar_reference::Attended;

/// Rows of each (sequence, head) that are stored one way: `len` of them from row `first` on.
struct Part {
    /// `[B, Hk]`.
    first: Vec<usize>,
    len: Vec<i32>,
}

impl Inputs {
    fn length(&self, head: usize) -> usize {
        let Dims { b, hk, t, .. } = self.attention.dims;
        match &self.attention.common.lengths {
            None => t,
            Some(l) => l[if l.len() == b && hk != 1 { head / hk } else { head }] as usize,
        }
    }

    /// Rows of each (sequence, head), from what `of` its length says.
    fn part(&self, of: impl Fn(usize) -> (usize, usize)) -> Part {
        let all: Vec<_> = (0..self.attention.dims.b * self.attention.dims.hk).map(|h| of(self.length(h))).collect();
        Part { first: all.iter().map(|x| x.0).collect(), len: all.iter().map(|x| (x.1 - x.0) as i32).collect() }
    }

    /// Of `n` rows, those that are encoded on one side: behind the sinks, before the recent rows; channel-wise, whole groups.
    fn encoded(&self, side: &Side<'_>, n: usize) -> (usize, usize) {
        let start = self.sink_rows.min(n);
        let mut end = n.saturating_sub(self.recent_rows).max(start);
        if side.format.codec.is_channel_wise() {
            end -= (end - start) % side.format.group_of(side.dim);
        }
        (start, end)
    }

    /// A part's rows of `x [B, Hk, T, dim]`, moved to the start of each head's `rows`; zeros behind them.
    fn gathered(&self, part: &Part, x: &[f32], (rows, dim): (usize, usize)) -> Vec<f32> {
        let mut all = vec![0f32; part.len.len() * rows * dim];
        for (head, (&first, &len)) in part.first.iter().zip(&part.len).enumerate() {
            let from = &x[(head * self.attention.dims.t + first) * dim..][..len as usize * dim];
            all[head * rows * dim..][..from.len()].copy_from_slice(from);
        }
        all
    }

    /// Puts decoded rows of a part back to where they were in `to [B, Hk, T, dim]`.
    fn scatter(&self, part: &Part, decoded: &[f32], (rows, dim): (usize, usize), to: &mut [f32]) {
        for (head, (&first, &len)) in part.first.iter().zip(&part.len).enumerate() {
            let from = &decoded[head * rows * dim..][..len as usize * dim];
            to[(head * self.attention.dims.t + first) * dim..][..from.len()].copy_from_slice(from);
        }
    }

    /// Positions of a part's rows, `[B, Hk, T]`; `None` where rows are at their index.
    fn positions(&self, part: &Part) -> Option<Vec<i32>> {
        let Dims { b, hk, t, .. } = self.attention.dims;
        let given = self.attention.common.positions.as_ref()?;
        let at = |seq: usize, row: usize| given[if given.len() == t && b != 1 { row } else { seq * t + row }];
        let mut all = vec![0; b * hk * t.max(1)];
        for (head, (&first, &len)) in part.first.iter().zip(&part.len).enumerate() {
            for row in 0..len as usize {
                all[head * t.max(1) + row] = at(head / hk, first + row);
            }
        }
        Some(all)
    }
}

/// Keys, or values.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    pub format: Format,
    pub dim: usize,
    /// What rows of a head share.
    pub tables: Option<&'a Buffer>,
}

impl Side<'_> {
    /// Rows of a head of which up to `t` are held: whole groups.
    pub fn capacity(&self, t: usize) -> usize {
        let group = if self.format.codec.is_channel_wise() { self.format.group_of(self.dim) } else { 1 };
        t.max(1).next_multiple_of(group)
    }

    /// `[B, Hk]` rows next to each other, then their scales and zeros.
    pub fn pool<M: kvlar::Memory>(&self, data: M, heads: usize, t: usize) -> Pool<M> {
        let (rows, stored) = (self.capacity(t), self.format.stored(self.dim));
        let head_stride = stored.bytes(rows).next_multiple_of(16);
        Pool {
            seq_stride: heads * head_stride,
            head_stride,
            params_offset: rows * stored.row,
            params_stride: stored.params,
            ..Pool::contiguous(data, heads, rows, stored.row)
        }
    }

    pub fn bytes(&self, heads: usize, t: usize) -> usize {
        heads * self.format.stored(self.dim).bytes(self.capacity(t)).next_multiple_of(16)
    }
}

/// A segment on the device.
struct Uploaded<'a> {
    lengths: Buffer,
    positions: Option<Buffer>,
    sides: [Side<'a>; 2],
    stored: [Buffer; 2],
}

struct Session<'a> {
    i: &'a Inputs,
    lab: &'a Lab,
}

impl Session<'_> {
    fn rows<'b>(&self, lengths: View<'b>, positions: Option<View<'b>>) -> Rows<'b> {
        let Dims { hk, t, .. } = self.i.attention.dims;
        Rows {
            length_seq_stride: hk,
            length_head_stride: 1,
            positions,
            position_seq_stride: hk * t.max(1),
            position_head_stride: t.max(1),
            ..Rows::contiguous(Some(lengths), t.max(1))
        }
    }

    /// Encodes a part's rows of `x [B, Hk, T, dim]` at the start of each head; gives them, and puts what they decode to at
    /// their places in `decoded`.
    fn encode(&self, part: &Part, x: &[f32], side: &Side<'_>, decoded: &mut [f32]) -> Result<Buffer> {
        let (Dims { b, hk, t, .. }, lab) = (self.i.attention.dims, self.lab);
        let (shape, scales) = ((side.capacity(t), side.dim), side.tables.map(Buffer::view));
        let encode = EncodeShape { format: side.format, dtype: Dtype::F32, seqs: b, heads: hk, rows: shape.0, dim: side.dim };
        let plan = encode.plan(&lab.device)?;
        let mut stored = lab.device.alloc(b * side.bytes(hk, t))?;
        let mut out = lab.device.alloc(4 * b * hk * shape.0 * shape.1)?;
        let rows = Rows::contiguous(None, shape.0);
        let x = lab.upload(&self.i.gathered(part, x, shape))?;
        plan.encode(&lab.stream, x.view(), &rows, &side.pool(stored.view_mut(), hk, t), scales)?;
        plan.decode(&lab.stream, &rows, &side.pool(stored.view(), hk, t), scales, &mut out.view_mut())?;
        self.i.scatter(part, &lab.download(&out)?, shape, decoded);
        Ok(stored)
    }

    /// A segment of a part's rows; of `k` and `v` as they are encoded already.
    fn segment<'b>(&self, part: &Part, sides: [Side<'b>; 2], stored: [Buffer; 2]) -> Result<Uploaded<'b>> {
        let positions = self.i.positions(part).map(|p| self.lab.upload(&p)).transpose()?;
        Ok(Uploaded { lengths: self.lab.upload(&part.len)?, positions, sides, stored })
    }

    /// A segment of a part's rows that are stored as they are in `k` and `v`.
    fn exact<'b>(&self, part: &Part, sides: [Side<'b>; 2], [k, v]: [&[f32]; 2]) -> Result<Uploaded<'b>> {
        let mut unused = [vec![0f32; k.len()], vec![0f32; v.len()]];
        let stored = [self.encode(part, k, &sides[0], &mut unused[0])?, self.encode(part, v, &sides[1], &mut unused[1])?];
        self.segment(part, sides, stored)
    }

    fn plan(&self, parts: &[[Format; 2]], int8_queries: bool) -> kvlar::Result<AttendPlan> {
        let (Dims { b, hq, hk, s, t, d, dv }, c) = (self.i.attention.dims, &self.i.attention.common);
        let segment = |[keys, values]: [Format; 2]| SegmentShape { keys, values, max_rows: t.max(1) };
        let mut segments = [None; kvlar::MAX_SEGMENTS];
        for (to, part) in segments.iter_mut().zip(parts) {
            *to = Some(segment(*part));
        }
        let first = segments[0].unwrap_or(SegmentShape::new(Codec::Bf16, 1));
        AttendShape {
            value_dim: dv,
            scale: c.scale as f32,
            softcap: c.softcap as f32,
            window: c.window,
            int8_queries,
            segments,
            ..AttendShape::new(c.dtype, b, (hq, hk), s.max(1), d, first)
        }
        .plan(&self.lab.device)
    }

    /// Attends over the segments.
    fn attend(&self, plan: &AttendPlan, parts: &[Uploaded<'_>]) -> Result<Attended> {
        let Dims { hk, t, .. } = self.i.attention.dims;
        let segments: Vec<Segment<'_>> = parts
            .iter()
            .map(|p| Segment {
                rows: self.rows(p.lengths.view(), p.positions.as_ref().map(Buffer::view)),
                keys: p.sides[0].pool(p.stored[0].view(), hk, t),
                values: p.sides[1].pool(p.stored[1].view(), hk, t),
                tables: Tables { keys: p.sides[0].tables.map(Buffer::view), values: p.sides[1].tables.map(Buffer::view) },
            })
            .collect();
        attention::attend(self.lab, plan, &self.i.attention, &segments)
    }
}

/// Encodes what is not exact, decodes it for the report, and attends.
pub fn run(i: &Inputs, backend: Backend) -> Result<Outputs> {
    let (a, Dims { b, hq, s, t, d, dv, .. }) = (&i.attention, i.attention.dims);
    let formats = [i.keys.launched()?, i.values.launched()?];
    let lab = &Lab::open(backend, a.common.dtype)?;
    let native = Format::from(if a.common.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 });
    let scales = [i.keys.upload_tables(lab)?, i.values.upload_tables(lab)?];
    let side = |format, dim, scales| Side { format, dim, tables: scales };
    let sides = [side(formats[0], d, scales[0].as_ref()), side(formats[1], dv, scales[1].as_ref())];
    let plain = [side(native, d, None), side(native, dv, None)];
    let session = Session { i, lab };
    // Rows of whole groups leave some exact, beside those that are meant to be.
    let exact = i.sink_rows + i.recent_rows > 0 || formats.iter().any(|f| f.codec.is_channel_wise());
    let kinds: &[[Format; 2]] = if exact { &[[native; 2], formats, [native; 2]] } else { &[formats] };
    let fused = session.plan(kinds, i.int8_query);
    let (mut k_decoded, mut v_decoded) = (a.k.clone(), a.v.clone());
    for (x, dim) in [(&mut k_decoded, d), (&mut v_decoded, dv)] {
        for (head, rows) in x.chunks_mut((t * dim).max(1)).enumerate() {
            rows[i.length(head) * dim..].fill(0.0);
        }
    }
    if b * hq * s == 0 {
        return Ok(Outputs { out: Vec::new(), lse: Vec::new(), k_decoded, v_decoded });
    }
    let [k, v] = sides.each_ref().map(|side| i.part(|n| i.encoded(side, n)));
    let stored = [session.encode(&k, &a.k, &sides[0], &mut k_decoded)?, session.encode(&v, &a.v, &sides[1], &mut v_decoded)?];
    let Attended { out, lse } = match fused {
        Ok(plan) => {
            let end = |n: usize| i.encoded(&sides[0], n).1.min(i.encoded(&sides[1], n).1);
            let mut segments = vec![session.segment(&i.part(|n| (i.encoded(&sides[0], n).0, end(n))), sides, stored)?];
            if exact {
                // Behind the body one side may be encoded: what it decodes to is stored as it is.
                let rows = [&k_decoded[..], &v_decoded[..]];
                segments.insert(0, session.exact(&i.part(|n| (0, i.sink_rows.min(n))), plain, rows)?);
                segments.push(session.exact(&i.part(|n| (end(n), n)), plain, rows)?);
            }
            session.attend(&plan, &segments)?
        }
        Err(kvlar::Error::Unsupported { .. }) if !i.int8_query => {
            // Decoded rows, as they would be stored without a codec.
            let plan = session.plan(&[[native; 2]], false)?;
            session.attend(&plan, &[session.exact(&i.part(|n| (0, n)), plain, [&k_decoded, &v_decoded])?])?
        }
        Err(e) => return Err(e.into()),
    };
    Ok(Outputs { out, lse, k_decoded, v_decoded })
}
