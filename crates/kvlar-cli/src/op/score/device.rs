//! Scores by attention on a device.

use crate::backend::Backend;
use crate::op::Result;
use crate::op::lab::Lab;
use kvlar::{Buffer, Pool, Rows, ScoreArgs, ScoreShape, Workspace};

/// What scores are made of, rounded to the type of the shape.
pub struct Tensors<'a> {
    /// `[B, Hq, W, d]`.
    pub q: &'a [f32],
    /// `[B, Hk, T, d]`.
    pub k: &'a [f32],
    /// `[B, Hq, W]`, if it is known.
    pub lse: Option<&'a [f32]>,
    /// Sinks, start and length of a chunk, in every sequence.
    pub span: Option<[usize; 3]>,
}

/// Scores `[B, Hk, columns]` of T = `shape.rows` rows a head.
pub fn scores(shape: ScoreShape, tensors: &Tensors<'_>, backend: Backend) -> Result<Vec<f32>> {
    let lab = Lab::open(backend, shape.dtype)?;
    let shape = ScoreShape { given_lse: tensors.lse.is_some(), ..shape };
    let plan = shape.plan(&lab.device)?;
    let (heads, rows) = (shape.seqs * shape.kv_heads, shape.rows);
    let (q, k) = (lab.upload_as(tensors.q, shape.dtype)?, lab.upload_as(tensors.k, shape.dtype)?);
    let lengths = lab.upload(&vec![rows as i32; shape.seqs])?;
    let lse = tensors.lse.map(|lse| lab.upload(lse)).transpose()?;
    let spans = tensors.span.map(|span| lab.upload(&span.map(|x| x as i32).repeat(shape.seqs))).transpose()?;
    let mut scores = lab.device.alloc(4 * heads * shape.columns())?;
    let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
    let keys = Pool::contiguous(k.view(), shape.kv_heads, rows, shape.dtype.bytes() * shape.head_dim);
    let mut args = ScoreArgs {
        spans: spans.as_ref().map(Buffer::view),
        given_lse: lse.as_ref().map(Buffer::view),
        ..ScoreArgs::new(q.view(), Rows::contiguous(Some(lengths.view()), rows), keys, scores.view_mut())
    };
    plan.launch(&lab.stream, &mut args, &mut workspace)?;
    lab.download(&scores)
}
