//! From moments to a plan.

mod ranks;
mod side;

use crate::config::{Budget, RecalkvConfig, ValueFit, Weighting};
use crate::error::{Error, Result, config as refuse, finite, shape};
use crate::moments::Moments;
use crate::plan::{LayerPlan, Plan};
use crate::report::{LayerReport, Report};
use crate::shape::ModelShape;
use rayon::prelude::*;
use side::Problem;

/// Weights of the model that some settings need, per layer, row-major.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weights<'a> {
    /// W_o [hidden, q_heads · value_dim]: for [`Weighting::Output`].
    pub out: Option<&'a [Vec<f32>]>,
    /// W_v [kv_heads · value_dim, hidden]: for [`ValueFit::WeightSvd`] and [`ValueFit::Alternating`].
    pub values: Option<&'a [Vec<f32>]>,
}

/// Fits a ReCalKV plan (arXiv 2505.24357) to one [`Moments`] a layer.
///
/// Per layer: heads are grouped, ranks dealt out, and each group gets the basis that discards least of what the layer
/// produced in calibration, in the metric the settings name. `fingerprint` says which model it is. `importance` [keys,
/// values] of each layer is for [`Budget::Proportional`]. `progress` is told how many steps are done, and of how many: one a
/// layer; two with [`Budget::Spectral`], which needs the spectra of all layers before it fits any.
///
/// Heads are grouped for the rank that the budget gives; with [`Budget::Spectral`], where ranks follow from groups, for the
/// uniform one. The same input gives the same plan on one machine, whatever its number of threads.
///
/// # Errors
/// [`Error::Config`] for settings that the model cannot have or whose inputs are not given, [`Error::Shape`] and
/// [`Error::NotFinite`] for inputs, [`Error::Empty`] for a layer without rows, [`Error::Numerical`] for a decomposition
/// that does not converge.
pub fn fit(
    config: &RecalkvConfig,
    model: &ModelShape,
    fingerprint: &str,
    moments: &[Moments],
    importance: Option<&[[f64; 2]]>,
    weights: Weights<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(Plan, Report)> {
    config.check(model)?;
    check_inputs(config, model, moments, importance, weights)?;
    let problem = |layer: usize| -> Result<[Problem<'_>; 2]> {
        let out = weights.out.map(|w| w[layer].as_slice());
        let values = weights.values.map(|w| w[layer].as_slice());
        Ok([Problem::keys(config, model, &moments[layer])?, Problem::values(config, model, &moments[layer], out, values)?])
    };
    let spectral = config.budget == Budget::Spectral;
    let (mut done, steps) = (0, model.layers * if spectral { 2 } else { 1 });
    let mut step = || {
        done += 1;
        progress(done, steps);
    };
    let ranks = if spectral {
        let uniform = ranks::dealt(&RecalkvConfig { budget: Budget::Uniform, ..config.clone() }, model, None)?;
        let candidate = |l: usize| {
            let [k, v] = problem(l)?;
            Ok([k.candidate(uniform[l][0])?, v.candidate(uniform[l][1])?])
        };
        ranks::spectral(config, model, layer_by_layer(model.layers, candidate, &mut step)?)?
    } else {
        let dealt = ranks::dealt(config, model, importance)?;
        dealt.into_iter().map(|r| r.map(|rank| ranks::Dealt { rank, groups: None })).collect()
    };
    let fitted = |l: usize| {
        let [keys, values] = problem(l)?;
        Ok((keys.fit(&ranks[l][0])?, values.fit(&ranks[l][1])?))
    };
    let mut layers = Vec::with_capacity(model.layers);
    let mut reports = Vec::with_capacity(model.layers);
    for (l, (keys, values)) in layer_by_layer(model.layers, fitted, &mut step)?.into_iter().enumerate() {
        let (mut report, layer) =
            (LayerReport { layer: l, keys: keys.1, values: values.1 }, LayerPlan { keys: keys.0, values: values.0 });
        // What keys take depends on the values beside them.
        [report.keys.bytes, report.values.bytes] = layer.bytes_per_token(&model.layer);
        reports.push(report);
        layers.push(layer);
    }
    let plan = Plan::fitted(fingerprint, model, config.clone().into(), layers);
    let report = Report { layers: reports, rows: moments.iter().map(Moments::rows).min().unwrap_or(0), size: plan.size() };
    Ok((plan, report))
}

/// What `of` makes of each layer, as many at a time as there are threads; `step` after each.
fn layer_by_layer<T: Send>(layers: usize, of: impl Fn(usize) -> Result<T> + Sync, step: &mut dyn FnMut()) -> Result<Vec<T>> {
    let mut all = Vec::with_capacity(layers);
    let threads = rayon::current_num_threads().max(1);
    for first in (0..layers).step_by(threads) {
        let some: Vec<T> = (first..layers.min(first + threads)).into_par_iter().map(&of).collect::<Result<_>>()?;
        for made in some {
            all.push(made);
            step();
        }
    }
    Ok(all)
}

fn check_inputs(
    config: &RecalkvConfig,
    model: &ModelShape,
    moments: &[Moments],
    importance: Option<&[[f64; 2]]>,
    weights: Weights<'_>,
) -> Result<()> {
    let layer = model.layer;
    if moments.len() != model.layers {
        return refuse("moments", format!("{} layers; the model has {}", moments.len(), model.layers));
    }
    for (l, m) in moments.iter().enumerate() {
        if m.shape() != layer {
            return refuse("moments", format!("layer {l} is {:?}; the model's layers are {layer:?}", m.shape()));
        }
        if m.rows() == 0 {
            return Err(Error::Empty(format!("moments of layer {l}")));
        }
    }
    if config.budget == Budget::Proportional && importance.is_none_or(|i| i.len() != model.layers) {
        return refuse("importance", format!("a proportional budget needs [keys, values] for each of {} layers", model.layers));
    }
    let (heads, dim, hidden) = (layer.q_heads, layer.value_dim, model.hidden);
    let needs = [
        ("out_weight", weights.out, config.weighting_values == Weighting::Output, hidden * heads * dim, heads * dim),
        ("value_weight", weights.values, config.values != ValueFit::Closed, layer.kv_heads * dim * hidden, hidden),
    ];
    for (name, given, needed, expected, width) in needs {
        let Some(given) = given.filter(|_| needed) else {
            if needed {
                return refuse(name, "these settings need it; give the model's weights or choose others");
            }
            continue;
        };
        if given.len() != model.layers {
            return refuse(name, format!("{} layers; the model has {}", given.len(), model.layers));
        }
        for (l, w) in given.iter().enumerate() {
            let name = format!("{name} of layer {l}");
            shape(&name, "row-major, its inputs last", expected, w.len())?;
            finite(&name, w, width)?;
        }
    }
    Ok(())
}
