//! What the attention ops have in common: their inputs, and a launch.

use super::case::{Case, expect, finite};
use super::lab::{Lab, reference_dtype};
use super::{Result, input};
use kvlar::{AttendArgs, AttendPlan, Buffer, Dtype, Segment, Workspace};
use kvlar_reference::{AttendInput, Attended};

/// What every attention op takes besides its rows.
#[derive(Clone)]
pub struct Common {
    pub lengths: Option<Vec<i32>>,
    pub positions: Option<Vec<i32>>,
    pub q_positions: Option<Vec<i32>>,
    pub sink_logits: Option<Vec<f32>>,
    pub dtype: Dtype,
    pub scale: f64,
    pub softcap: f64,
    pub window: u32,
}

impl Common {
    /// Of q `[b, hq, s, d]` over `t` rows of `hk` kv heads.
    pub fn read(case: &mut Case, (b, hq, hk, s, t, d): (usize, usize, usize, usize, usize, usize)) -> Result<Self> {
        let lengths = case.ints("lengths", &[&[b], &[b, hk]])?;
        if let Some(bad) = lengths.iter().flatten().find(|&&n| n < 0 || n as usize > t) {
            return input(format!("lengths: {bad} is outside 0..={t}"));
        }
        let positions = case.ints("positions", &[&[t], &[b, t]])?;
        let q_positions = case.ints("q_positions", &[&[b, s]])?;
        let sink_logits = case.floats_if_any("sink_logits")?;
        if let Some(sinks) = &sink_logits {
            expect("sink_logits", &sinks.shape, &[hq])?;
        }
        let dtype = case.dtype()?;
        let scale = finite("scale", case.scalar("scale", 1.0 / (d as f64).sqrt())?)?;
        let softcap = finite("softcap", case.scalar("softcap", 0.0)?)?;
        if softcap < 0.0 {
            return input(format!("softcap: {softcap} is negative"));
        }
        let window: u32 = case.scalar("window", 0)?;
        if window > i32::MAX as u32 {
            return input(format!("window: {window} is above 2^31 - 1"));
        }
        let sink_logits = sink_logits.map(|x| x.values);
        Ok(Self { lengths, positions, q_positions, sink_logits, dtype, scale, softcap, window })
    }
}

/// Shapes, as `OPS.md` names them.
#[derive(Clone, Copy)]
pub struct Dims {
    pub b: usize,
    pub hq: usize,
    pub hk: usize,
    pub s: usize,
    pub t: usize,
    pub d: usize,
    pub dv: usize,
}

/// Queries over keys and values, rounded and checked.
#[derive(Clone)]
pub struct Attention {
    pub dims: Dims,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub common: Common,
}

impl Attention {
    pub fn read(case: &mut Case) -> Result<Self> {
        let (q, k, v) = (case.floats("q", 4)?, case.floats("k", 4)?, case.floats("v", 4)?);
        let [b, hq, s, d] = q.shape[..] else { return input("q") };
        let (hk, t, dv) = (k.shape[1], k.shape[2], v.shape[3]);
        expect("k", &k.shape, &[b, hk, t, d])?;
        expect("v", &v.shape, &[b, hk, t, dv])?;
        if hk == 0 || !hq.is_multiple_of(hk) || d == 0 || dv == 0 {
            return input(format!("q has {hq} heads of {d} dimensions, k {hk} heads, v {dv} dimensions"));
        }
        let common = Common::read(case, (b, hq, hk, s, t, d))?;
        let round = |x: Vec<f32>| reference_dtype(common.dtype).round_all(&x);
        let (q, k, v) = (round(q.values), round(k.values), round(v.values));
        Ok(Self { dims: Dims { b, hq, hk, s, t, d, dv }, q, k, v, common })
    }

    /// For the reference.
    pub fn input(&self) -> AttendInput<'_> {
        let (Dims { b, hq, hk, s, t, d, dv }, c) = (self.dims, &self.common);
        AttendInput {
            seqs: b,
            q_heads: hq,
            kv_heads: hk,
            query_rows: s,
            rows: t,
            head_dim: d,
            value_dim: dv,
            q: &self.q,
            k: &self.k,
            v: &self.v,
            lengths: c.lengths.as_deref(),
            positions: c.positions.as_deref(),
            q_positions: c.q_positions.as_deref(),
            sink_logits: c.sink_logits.as_deref(),
            scale: Some(c.scale),
            softcap: c.softcap,
            window: i64::from(c.window),
        }
    }
}

/// What a launch reads beside rows, and what it writes, on the device.
pub struct Queries {
    q: Buffer,
    positions: Option<Buffer>,
    sinks: Option<Buffer>,
    out: Buffer,
    lse: Buffer,
}

impl Queries {
    /// Of `count` queries, whose results have `dv` dimensions.
    pub fn upload(lab: &Lab, q: &[f32], common: &Common, count: usize, dv: usize) -> Result<Self> {
        Ok(Self {
            q: lab.upload_as(q, common.dtype)?,
            positions: common.q_positions.as_ref().map(|p| lab.upload(p)).transpose()?,
            sinks: common.sink_logits.as_ref().map(|x| lab.upload(x)).transpose()?,
            out: lab.device.alloc(4 * count * dv)?,
            lse: lab.device.alloc(4 * count)?,
        })
    }

    pub fn args<'a>(&'a mut self, segments: &'a [Segment<'a>]) -> AttendArgs<'a> {
        AttendArgs {
            q: self.q.view(),
            q_strides: None,
            out: self.out.view_mut(),
            out_strides: None,
            lse: Some(self.lse.view_mut()),
            segments,
            q_positions: self.positions.as_ref().map(Buffer::view),
            sink_logits: self.sinks.as_ref().map(Buffer::view),
        }
    }

    /// What launches wrote.
    pub fn attended(&self, lab: &Lab) -> Result<Attended> {
        Ok(Attended { out: lab.download(&self.out)?, lse: lab.download(&self.lse)? })
    }
}

/// Attends over segments of encoded or plain rows.
pub fn attend(lab: &Lab, plan: &AttendPlan, i: &Attention, segments: &[Segment<'_>]) -> Result<Attended> {
    let Dims { b, hq, s, dv, .. } = i.dims;
    let mut queries = Queries::upload(lab, &i.q, &i.common, b * hq * s, dv)?;
    let mut work = plan.work_list(&lab.device)?;
    let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
    let mut args = queries.args(segments);
    plan.schedule(&lab.stream, &args, &mut work, &mut workspace)?;
    plan.launch(&lab.stream, &mut args, &work, &mut workspace)?;
    queries.attended(lab)
}
