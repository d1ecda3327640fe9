//! On a device: fused where a kernel takes the pair of formats, else decoded first and attended densely.

use super::super::attend::Lab;
use super::super::formats::Stored;
use super::super::{OpError, Result};
use super::{Dims, Inputs, Outputs};
use crate::backend::Backend;
use kvlar::{
    AttendArgs, AttendPlan, AttendShape, Buffer, Codec, Dtype, EncodeShape, Format, Pool, Rows, Segment, SegmentShape, Tables,
    View, Workspace,
};

/// Rows of each (sequence, head) that are stored one way: `len` of them from row `first` on.
struct Part {
    /// `[B, Hk]`.
    first: Vec<usize>,
    len: Vec<i32>,
}

impl Inputs {
    fn length(&self, head: usize) -> usize {
        let Dims { b, hk, t, .. } = self.dims;
        match &self.common.lengths {
            None => t,
            Some(l) => l[if l.len() == b && hk != 1 { head / hk } else { head }] as usize,
        }
    }

    /// Sinks, body, recent rows of each (sequence, head).
    fn parts(&self) -> [Part; 3] {
        let heads = self.dims.b * self.dims.hk;
        let part = |of: &dyn Fn(usize) -> (usize, usize)| {
            let all: Vec<_> = (0..heads).map(|h| of(self.length(h))).collect();
            Part { first: all.iter().map(|x| x.0).collect(), len: all.iter().map(|x| (x.1 - x.0) as i32).collect() }
        };
        let sinks = |n: usize| self.sink_rows.min(n);
        let recent = |n: usize| n - self.recent_rows.min(n - sinks(n));
        [part(&|n| (0, sinks(n))), part(&|n| (sinks(n), recent(n))), part(&|n| (recent(n), n))]
    }

    /// A part's rows of `x [B, Hk, T, dim]`, moved to the start of each head; zeros behind them.
    fn gathered(&self, part: &Part, x: &[f32], dim: usize) -> Vec<f32> {
        let t = self.dims.t;
        let mut all = vec![0f32; part.len.len() * t.max(1) * dim];
        for (head, (&first, &len)) in part.first.iter().zip(&part.len).enumerate() {
            let from = &x[(head * t + first) * dim..][..len as usize * dim];
            all[head * t.max(1) * dim..][..from.len()].copy_from_slice(from);
        }
        all
    }

    /// Puts decoded rows of a part back to where they were in `to [B, Hk, T, dim]`.
    fn scatter(&self, part: &Part, decoded: &[f32], dim: usize, to: &mut [f32]) {
        let t = self.dims.t;
        for (head, (&first, &len)) in part.first.iter().zip(&part.len).enumerate() {
            let from = &decoded[head * t.max(1) * dim..][..len as usize * dim];
            to[(head * t + first) * dim..][..from.len()].copy_from_slice(from);
        }
    }

    /// Positions of a part's rows, `[B, Hk, T]`; `None` where rows are at their index.
    fn positions(&self, part: &Part) -> Option<Vec<i32>> {
        let Dims { b, hk, t, .. } = self.dims;
        let given = self.common.positions.as_ref()?;
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

/// Rows of one part on the device.
struct Uploaded {
    lengths: Buffer,
    positions: Option<Buffer>,
    formats: [Format; 2],
    keys: Buffer,
    values: Buffer,
}

/// Whether a head's rows share scales or codebooks.
fn has_tables(format: Format) -> bool {
    matches!(format.codec, Codec::Fp8 | Codec::Pq)
}

struct Session<'a> {
    i: &'a Inputs,
    lab: Lab,
    scales: [Option<Buffer>; 2],
}

/// Bytes of `[B, Hk]` rows as [`pool`] has them.
pub fn pool_bytes((seqs, heads, rows): (usize, usize, usize), format: Format, dim: usize) -> usize {
    seqs * heads * (rows * (format.row_bytes(dim) + format.params_bytes(dim))).next_multiple_of(16)
}

/// `[B, Hk]` rows next to each other, then their scales and zeros.
pub fn pool<M: kvlar::Memory>(data: M, (heads, rows): (usize, usize), format: Format, dim: usize) -> Pool<M> {
    let (row, params) = (format.row_bytes(dim), format.params_bytes(dim));
    let head_stride = (rows * (row + params)).next_multiple_of(16);
    Pool {
        seq_stride: heads * head_stride,
        head_stride,
        params_offset: rows * row,
        params_stride: params,
        ..Pool::contiguous(data, heads, rows, row)
    }
}

impl Session<'_> {
    fn rows<'b>(&self, lengths: View<'b>, positions: Option<View<'b>>) -> Rows<'b> {
        let Dims { hk, t, .. } = self.i.dims;
        Rows {
            length_seq_stride: hk,
            length_head_stride: 1,
            positions,
            position_seq_stride: hk * t.max(1),
            position_head_stride: t.max(1),
            ..Rows::contiguous(Some(lengths), t.max(1))
        }
    }

    /// Encodes dense rows `[B, Hk, T, dim]`; gives them and what they decode to.
    fn encode(
        &self,
        x: &[f32],
        lengths: View<'_>,
        format: Format,
        dim: usize,
        scales: Option<View<'_>>,
    ) -> Result<(Buffer, Vec<f32>)> {
        let Dims { b, hk, t, .. } = self.i.dims;
        let rows = t.max(1);
        let (mut stored, mut out) =
            (self.lab.device.alloc(pool_bytes((b, hk, rows), format, dim))?, self.lab.device.alloc(4 * b * hk * rows * dim)?);
        let plan = EncodeShape { format, dtype: Dtype::F32, seqs: b, heads: hk, rows, dim }.plan(&self.lab.device)?;
        let (x, shape) = (self.lab.upload(x)?, (hk, rows));
        plan.encode(&self.lab.stream, x.view(), &self.rows(lengths, None), &pool(stored.view_mut(), shape, format, dim), scales)?;
        let held = self.rows(lengths, None);
        plan.decode(&self.lab.stream, &held, &pool(stored.view(), shape, format, dim), scales, &mut out.view_mut())?;
        let decoded = self.lab.download(&out)?;
        Ok((stored, decoded))
    }

    fn upload(&self, part: &Part, formats: [Format; 2], decoded: [&mut [f32]; 2]) -> Result<Uploaded> {
        let (i, [d, dv]) = (self.i, [self.i.dims.d, self.i.dims.dv]);
        let lengths = self.lab.upload(&part.len)?;
        let mut sides = Vec::new();
        for (((format, dim), x), (scales, to)) in
            formats.into_iter().zip([d, dv]).zip([&i.k, &i.v]).zip(self.scales.iter().zip(decoded))
        {
            let scales = scales.as_ref().filter(|_| has_tables(format)).map(Buffer::view);
            let (stored, rows) = self.encode(&i.gathered(part, x, dim), lengths.view(), format, dim, scales)?;
            i.scatter(part, &rows, dim, to);
            sides.push(stored);
        }
        let [keys, values] = <[Buffer; 2]>::try_from(sides).map_err(|_| OpError::Other("two sides".into()))?;
        let positions = i.positions(part).map(|p| self.lab.upload(&p)).transpose()?;
        Ok(Uploaded { lengths, positions, formats, keys, values })
    }

    fn plan(&self, parts: &[[Format; 2]], int8_queries: bool) -> kvlar::Result<AttendPlan> {
        let (Dims { b, hq, hk, s, t, d, dv }, c) = (self.i.dims, &self.i.common);
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

    /// Attends over the parts, one segment each.
    fn attend(&self, plan: &AttendPlan, parts: &[Uploaded]) -> Result<(Vec<f32>, Vec<f32>)> {
        let (Dims { b, hq, hk, s, t, d, dv }, c, lab) = (self.i.dims, &self.i.common, &self.lab);
        let shape = (hk, t.max(1));
        let segments: Vec<Segment<'_>> = parts
            .iter()
            .map(|p| {
                let scales = |side: usize| self.scales[side].as_ref().filter(|_| has_tables(p.formats[side])).map(Buffer::view);
                Segment {
                    rows: self.rows(p.lengths.view(), p.positions.as_ref().map(Buffer::view)),
                    keys: pool(p.keys.view(), shape, p.formats[0], d),
                    values: pool(p.values.view(), shape, p.formats[1], dv),
                    tables: Tables { keys: scales(0), values: scales(1) },
                }
            })
            .collect();
        let q = lab.upload_as(&self.i.q, c.dtype)?;
        let q_positions = c.q_positions.as_ref().map(|p| lab.upload(p)).transpose()?;
        let sinks = c.sink_logits.as_ref().map(|x| lab.upload(x)).transpose()?;
        let (mut out, mut lse) = (lab.device.alloc(4 * b * hq * s * dv)?, lab.device.alloc(4 * b * hq * s)?);
        let mut work = plan.work_list(&lab.device)?;
        let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
        let mut args = AttendArgs {
            q: q.view(),
            q_strides: None,
            out: out.view_mut(),
            out_strides: None,
            lse: Some(lse.view_mut()),
            segments: &segments,
            q_positions: q_positions.as_ref().map(Buffer::view),
            sink_logits: sinks.as_ref().map(Buffer::view),
        };
        plan.schedule(&lab.stream, &args, &mut work, &mut workspace)?;
        plan.launch(&lab.stream, &mut args, &work, &mut workspace)?;
        Ok((lab.download(&out)?, lab.download(&lse)?))
    }
}

/// Encodes the body, decodes it for the report, and attends.
pub fn run(i: &Inputs, backend: Backend) -> Result<Outputs> {
    let Dims { b, hq, hk, s, t, d, dv } = i.dims;
    let formats = [i.keys.launched()?, i.values.launched()?];
    let lab = Lab::open(backend, i.common.dtype)?;
    let native = Format::from(if i.common.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 });
    let scale = |stored: &Stored| stored.upload_tables(&lab);
    let scales = [scale(&i.keys)?, scale(&i.values)?];
    let session = Session { i, lab, scales };
    let exact = i.sink_rows + i.recent_rows > 0;
    let kinds: &[[Format; 2]] = if exact { &[[native; 2], formats, [native; 2]] } else { &[formats] };
    let fused = session.plan(kinds, i.int8_query);
    let (mut k_decoded, mut v_decoded) = (vec![0f32; b * hk * t * d], vec![0f32; b * hk * t * dv]);
    if b * hq * s == 0 {
        return Ok(Outputs { out: Vec::new(), lse: Vec::new(), k_decoded, v_decoded });
    }
    let [sinks, body, recent] = i.parts();
    let parts = if exact { vec![sinks, body, recent] } else { vec![body] };
    let mut uploaded = Vec::new();
    for (part, kind) in parts.iter().zip(kinds) {
        uploaded.push(session.upload(part, *kind, [&mut k_decoded, &mut v_decoded])?);
    }
    let (out, lse) = match fused {
        Ok(plan) => session.attend(&plan, &uploaded)?,
        Err(kvlar::Error::Unsupported { .. }) if !i.int8_query => {
            // Decoded rows, as they would be stored without a codec.
            let all = Part { first: vec![0; b * hk], len: (0..b * hk).map(|h| i.length(h) as i32).collect() };
            let decoded = Inputs { k: k_decoded.clone(), v: v_decoded.clone(), ..i.clone() };
            let dense = Session { i: &decoded, lab: session.lab, scales: [None, None] };
            let plan = dense.plan(&[[native; 2]], false)?;
            let (mut k, mut v) = (vec![0f32; k_decoded.len()], vec![0f32; v_decoded.len()]);
            let rows = dense.upload(&all, [native; 2], [&mut k, &mut v])?;
            dense.attend(&plan, &[rows])?
        }
        Err(e) => return Err(e.into()),
    };
    Ok(Outputs { out, lse, k_decoded, v_decoded })
}
