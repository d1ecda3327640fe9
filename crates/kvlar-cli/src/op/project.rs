//! project.

use super::case::{Case, Output, expect};
use super::lab::{Lab, reference_dtype};
use super::{OpError, Result, input};
use crate::backend::Backend;
use kvlar::{Dtype, HeadGroups, ProjectShape, Projection};
use kvlar_reference::ProjectInput;

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let (k, encoder) = (case.floats("k", 4)?, case.floats("encoder", 3)?);
    let (shape, members) = case.ints_of("groups", 2)?;
    let dtype = case.dtype()?;
    case.finish()?;
    let ([b, hk, t, d], [n, size]) = (k.shape[..].try_into().unwrap_or_default(), shape[..].try_into().unwrap_or_default());
    let rank = encoder.shape[1];
    let Some(width) = size.checked_mul(d) else { return input(format!("groups: {size} heads of {d} dimensions")) };
    expect("encoder", &encoder.shape, &[n, rank, width])?;
    for (i, group) in members.chunks(size.max(1)).enumerate() {
        for (j, &head) in group.iter().enumerate() {
            if usize::try_from(head).map_or(true, |h| h >= hk) {
                return input(format!("groups: group {i} has kv head {head}, k has 0..{hk}"));
            }
            if group[..j].contains(&head) {
                return input(format!("groups: group {i} has kv head {head} twice"));
            }
        }
    }
    if n == 0 || size == 0 || rank == 0 || d == 0 {
        return input(format!("groups are {shape:?}, encoder {:?}: there is nothing to project with", encoder.shape));
    }
    let round = |x: &[f32]| reference_dtype(dtype).round_all(x);
    let (k, encoder) = (round(&k.values), round(&encoder.values));
    let latents = if backend == Backend::Reference {
        kvlar_reference::project(&ProjectInput {
            seqs: b,
            kv_heads: hk,
            rows: t,
            head_dim: d,
            groups: n,
            size,
            rank,
            k: &k,
            encoder: &encoder,
            members: &members,
            mean: None,
        })?
    } else {
        let shape =
            ProjectShape { dtype, out_dtype: Dtype::F32, seqs: b, kv_heads: hk, rows: t, head_dim: d, groups: n, size, rank };
        on_device(&shape, backend, &k, &encoder, &members)?
    };
    Ok(Output::default().floats("latents", &[b, n, t, rank], &latents))
}

fn on_device(s: &ProjectShape, backend: Backend, k: &[f32], encoder: &[f32], members: &[i32]) -> Result<Vec<f32>> {
    let lab = Lab::open(backend, s.dtype)?;
    let plan = s.plan(&lab.device)?;
    let values = s.seqs * s.groups * s.rows * s.rank;
    if values == 0 {
        return Ok(Vec::new());
    }
    let (x, encoder) = (lab.upload_as(k, s.dtype)?, lab.upload_as(encoder, s.dtype)?);
    let groups = HeadGroups::new(&lab.device, &lab.stream, s.kv_heads, s.size, members).map_err(OpError::from)?;
    let mut out = lab.device.alloc(4 * values)?;
    let from = Projection { x: x.view(), x_strides: None, encoder: encoder.view(), groups: &groups, offset: None };
    plan.launch(&lab.stream, &from, &mut out.view_mut())?;
    lab.download(&out)
}
