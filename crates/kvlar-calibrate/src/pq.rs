//! Plans of product-quantized keys: a codebook for each layer, kv head and sub-vector (HCAttention, arXiv 2507.19823 §3).

use crate::codebooks::{CodebookConfig, fit_codebooks};
use crate::error::{Result, config as refuse};
use crate::plan::{LayerPlan, Plan, PlanSize, Quantized, QuantizedCodec, QuantizedFormat, Side};
use crate::sample::KeySample;
use crate::shape::ModelShape;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Rows a centroid that a sample holds: more add little.
const ROWS_A_CENTROID: usize = 64;

/// Settings of [`fit_pq`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PqConfig {
    /// m: sub-vectors of a key; divides d.
    pub subvectors: usize,
    /// c: centroids of a sub-vector, 1 to 256.
    pub centroids: usize,
    /// Rounds of k-means at most.
    pub rounds: usize,
    /// Of the sample and of k-means: the same seed and text give the same plan.
    pub seed: u64,
    /// Rows of each layer that codebooks are fitted to, drawn from all; at least `centroids`.
    pub rows: usize,
    /// What values are stored as; `None` = the model's 16-bit rows.
    pub values: Option<QuantizedFormat>,
    /// First rows of a sequence that stay exact.
    pub sink_rows: usize,
    /// Last rows of a sequence that stay exact.
    pub recent_rows: usize,
}

impl PqConfig {
    /// 25 rounds, seed 0, 64 rows a centroid, values in int4, no exact rows.
    pub fn new(subvectors: usize, centroids: usize) -> Self {
        Self {
            subvectors,
            centroids,
            rounds: 25,
            seed: 0,
            rows: ROWS_A_CENTROID * centroids,
            values: Some(QuantizedCodec::Int4.into()),
            sink_rows: 0,
            recent_rows: 0,
        }
    }

    /// Refuses settings that `model` cannot have.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming the setting.
    pub fn check(&self, model: &ModelShape) -> Result<()> {
        let layer = model.checked()?.layer;
        self.codebooks().check(layer.head_dim)?;
        if self.rows < self.centroids {
            return refuse("rows", format!("{} rows for {} centroids; fit to at least as many", self.rows, self.centroids));
        }
        match self.values {
            Some(QuantizedFormat { codec: QuantizedCodec::Pq { .. }, .. }) => {
                refuse("values", "codebooks are fitted for keys alone; choose another format")
            }
            Some(format) => format.problem(layer.value_dim).map_or(Ok(()), |p| refuse("values", p)),
            None => Ok(()),
        }
    }

    fn codebooks(&self) -> CodebookConfig {
        let Self { subvectors, centroids, rounds, seed, .. } = *self;
        CodebookConfig { centroids, rounds, seed, ..CodebookConfig::new(subvectors) }
    }
}

/// What one layer's codebooks lose of the rows they were fitted to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PqLayerReport {
    /// Which.
    pub layer: usize,
    /// Of all heads: Σ ‖k − k̂‖² / Σ ‖k − mean‖², the mean of each head its own. 0 where keys do not vary.
    pub error: f64,
    /// Of each kv head.
    pub heads: Vec<f64>,
    /// Stored bytes of one token's keys.
    pub key_bytes: usize,
    /// Stored bytes of one token's values.
    pub value_bytes: usize,
}

/// All layers, and what the plan costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PqReport {
    /// Layer by layer.
    pub layers: Vec<PqLayerReport>,
    /// Calibration tokens.
    pub rows: u64,
    /// Of them, fitted to.
    pub fitted_rows: usize,
    /// What the plan's rows take.
    #[serde(flatten)]
    pub size: PlanSize,
}

/// Fits codebooks to one [`KeySample`] a layer, of keys after RoPE. `progress` is told how many layers are done, and of how
/// many. The same samples give the same plan on one machine, whatever its number of threads.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for settings or samples that the model cannot have, or a sample of fewer rows than
/// there are centroids.
pub fn fit_pq(
    config: &PqConfig,
    model: &ModelShape,
    fingerprint: &str,
    samples: &[KeySample],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(Plan, PqReport)> {
    config.check(model)?;
    let shape = model.layer;
    if samples.len() != model.layers {
        return refuse("samples", format!("{} layers; the model has {}", samples.len(), model.layers));
    }
    for (l, sample) in samples.iter().enumerate() {
        if sample.shape() != (shape.kv_heads, shape.head_dim) {
            return refuse("samples", format!("layer {l} is of {:?} heads and dimensions; the model's differ", sample.shape()));
        }
        let (n, c) = (sample.len(), config.centroids);
        if n < c {
            return refuse("rows", format!("{n} rows of layer {l} for {c} centroids; calibrate on more text, or take fewer"));
        }
    }
    let codec = QuantizedCodec::Pq { subvectors: config.subvectors, centroids: config.centroids };
    let values = config.values.map_or(Side::Dense, |format| Side::Quantized(format.into()));
    let (mut layers, mut reports) = (Vec::with_capacity(model.layers), Vec::with_capacity(model.layers));
    for (l, sample) in samples.iter().enumerate() {
        let fitted = fit_codebooks(sample.rows(), shape.kv_heads, shape.head_dim, &config.codebooks())?;
        let variances = variances(sample);
        let relative = |lost: f64, all: f64| if all > 0.0 { lost / all } else { 0.0 };
        let keys = Side::Quantized(Quantized { format: codec.into(), codebooks: Some(fitted.values) });
        let layer = LayerPlan { keys, values: values.clone() };
        let [key_bytes, value_bytes] = layer.bytes_per_token(&shape);
        reports.push(PqLayerReport {
            layer: l,
            error: relative(fitted.error.iter().sum(), variances.iter().sum()),
            heads: fitted.error.iter().zip(&variances).map(|(lost, all)| relative(*lost, *all)).collect(),
            key_bytes,
            value_bytes,
        });
        layers.push(layer);
        progress(l + 1, model.layers);
    }
    let plan = Plan::fitted(fingerprint, model, config.clone().into(), layers);
    let report = PqReport {
        layers: reports,
        rows: samples.iter().map(KeySample::seen).min().unwrap_or(0),
        fitted_rows: samples.iter().map(KeySample::len).min().unwrap_or(0),
        size: plan.size(),
    };
    Ok((plan, report))
}

/// Of each head, the mean of ‖k − mean‖² over rows.
fn variances(sample: &KeySample) -> Vec<f64> {
    let (heads, dim) = sample.shape();
    let n = sample.len().max(1) as f64;
    let mut means = vec![0f64; heads * dim];
    for row in sample.rows().chunks_exact(heads * dim) {
        means.iter_mut().zip(row).for_each(|(mean, x)| *mean += f64::from(*x) / n);
    }
    let mut all = vec![0f64; heads];
    for row in sample.rows().chunks_exact(heads * dim) {
        for (i, (x, mean)) in row.iter().zip(&means).enumerate() {
            all[i / dim] += (f64::from(*x) - mean).powi(2) / n;
        }
    }
    all
}

impl fmt::Display for PqReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>5} {:>9} {:>9} {:>9} {:>8}", "layer", "lost", "best head", "worst", "bytes")?;
        for l in &self.layers {
            let least = l.heads.iter().copied().fold(f64::INFINITY, f64::min);
            let most = l.heads.iter().copied().fold(0.0, f64::max);
            let percent = |x: f64| format!("{:.3}%", 100.0 * x);
            let bytes = l.key_bytes + l.value_bytes;
            writeln!(f, "{:>5} {:>9} {:>9} {:>9} {bytes:>8}", l.layer, percent(l.error), percent(least), percent(most))?;
        }
        write!(
            f,
            "{} calibration tokens, {} fitted to; {} of {} bytes a token ({:.2} %), codebooks {:.2} MB",
            self.rows,
            self.fitted_rows,
            self.size.bytes_per_token,
            self.size.dense_bytes_per_token,
            100.0 * self.size.kept,
            self.size.fixed_bytes as f64 / 1e6
        )
    }
}
