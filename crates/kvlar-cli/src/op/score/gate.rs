//! score_gate.

use super::sizes;
use crate::backend::Backend;
use crate::op::case::{Case, Output, expect};
use crate::op::lab::{Lab, reference_dtype};
use crate::op::{OpError, Result, input};
use kvlar::{Dtype, GateWeights, ScoreGateArgs, Workspace};
use kvlar_reference::{Gate, score_gate};

/// Hidden states `[T, D]` of one sequence.
fn on_device(hidden: &[f32], gate: &Gate<'_>, dtype: Dtype, backend: Backend) -> Result<Vec<f32>> {
    if gate.gate_dim != 16 {
        return Err(OpError::Unsupported(format!("score_gate has no kernel for gate dimension {}, for 16", gate.gate_dim)));
    }
    let lab = Lab::open(backend, dtype)?;
    let weights = GateWeights::new(&lab.device, &lab.stream, gate, dtype)?;
    let rows = hidden.len() / gate.hidden_dim;
    let plan = weights.shape(1, rows, rows).plan(&lab.device)?;
    let hidden = lab.upload_as(hidden, dtype)?;
    let mut scores = lab.device.alloc(4 * gate.kv_heads * rows)?;
    let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
    let mut args = ScoreGateArgs {
        hidden: hidden.view(),
        hidden_strides: None,
        weights: &weights,
        scores: scores.view_mut(),
        score_strides: None,
        first_columns: None,
        counts: None,
    };
    plan.launch(&lab.stream, &mut args, &mut workspace)?;
    lab.download(&scores)
}

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let hidden = case.floats("hidden", 2)?;
    let (q_proj, q_bias) = (case.floats("q_proj.weight", 2)?, case.floats("q_proj.bias", 1)?);
    let k_proj = case.floats("k_proj.weight", 2)?;
    let (q_norm, k_norm) = (case.floats("q_norm.weight", 1)?, case.floats("k_norm.weight", 1)?);
    let (k_base, b) = (case.floats("k_base", 4)?, case.floats("b", 3)?);
    let activations = case.dtype()?;
    let dtype = reference_dtype(activations);
    case.finish()?;
    // Every size is in a tensor: D' in the norm, then H in the keys' rows, then G in the queries'.
    let [tokens, hidden_dim] = sizes(&hidden.shape);
    let ([q_rows, _], [k_rows, _], [gate_dim]) = (sizes(&q_proj.shape), sizes(&k_proj.shape), sizes(&q_norm.shape));
    if gate_dim == 0 || k_rows == 0 || !k_rows.is_multiple_of(gate_dim) {
        return input(format!("k_proj.weight has {k_rows} rows; q_norm.weight makes a head {gate_dim}"));
    }
    if q_rows == 0 || !q_rows.is_multiple_of(k_rows) {
        return input(format!("q_proj.weight has {q_rows} rows; they must be a multiple of k_proj.weight's {k_rows}"));
    }
    let (kv_heads, group, sinks) = (k_rows / gate_dim, q_rows / k_rows, k_base.shape[2]);
    expect("q_proj.weight", &q_proj.shape, &[q_rows, hidden_dim])?;
    expect("q_proj.bias", &q_bias.shape, &[q_rows])?;
    expect("k_proj.weight", &k_proj.shape, &[k_rows, hidden_dim])?;
    expect("k_norm.weight", &k_norm.shape, &[gate_dim])?;
    expect("k_base", &k_base.shape, &[kv_heads, 1, sinks, gate_dim])?;
    expect("b", &b.shape, &[kv_heads, 1, group])?;
    // What enters a projection is stored in dtype; the rest is f32.
    let round = |x: &[f32]| dtype.round_all(x);
    let gate = Gate {
        hidden_dim,
        kv_heads,
        group,
        gate_dim,
        sinks,
        q_proj: &round(&q_proj.values),
        q_bias: &round(&q_bias.values),
        k_proj: &round(&k_proj.values),
        q_norm: &q_norm.values,
        k_norm: &k_norm.values,
        k_base: &k_base.values,
        b: &b.values,
    };
    gate.check()?;
    let scores = match backend {
        Backend::Reference => score_gate(&round(&hidden.values), &gate, dtype)?,
        _ => on_device(&round(&hidden.values), &gate, activations, backend)?,
    };
    Ok(Output::default().floats("scores", &[kv_heads, tokens], &scores))
}
