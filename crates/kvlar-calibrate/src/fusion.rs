//! Fusing value bases into the output projection: Σ_t p_t U z_t = U Σ_t p_t z_t, and W_o U can be computed before.
//!
//! Caches do not use it: their attention op expands the summed latents itself and returns heads as the model has them. An
//! engine that sums latents with attention of its own applies [`fuse`] to its weights, where it [`pays`].

use crate::error::{Result, config, shape};
use crate::plan::Factors;
use crate::shape::LayerShape;

/// Whether the fused projection, [hidden, q_heads · rank], is smaller than what it replaces: W_o and the decoder.
///
/// A latent as wide as several heads makes it larger: each query head reads all of it. The paper's one group over all
/// heads of LLaMA-2-7B would take 537 MB a layer for 33.5 + 16.8.
pub fn pays(layer: &LayerShape, hidden: usize, rank: usize) -> bool {
    hidden * layer.q_heads * rank < unfused(layer, hidden, rank)
}

fn unfused(layer: &LayerShape, hidden: usize, rank: usize) -> usize {
    layer.value_dim * (hidden * layer.q_heads + layer.kv_heads * rank)
}

/// W_o U [hidden, q_heads · rank]: for query head h, W_o's columns of h times the decoder of its kv head.
/// `out` is W_o [hidden, q_heads · value_dim], row-major. Applied to the attention output in latents [q_heads · rank].
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) or [`Error::Config`](crate::Error::Config) if sizes do not match.
pub fn fuse(out: &[f32], hidden: usize, layer: &LayerShape, values: &Factors) -> Result<Vec<f32>> {
    let (heads, dim, rank) = (layer.q_heads, layer.value_dim, values.rank);
    shape("W_o", "[hidden, q_heads * value_dim]", hidden * heads * dim, out.len())?;
    shape("basis", "[kv_heads, value_dim, rank]", layer.kv_heads * dim * rank, values.basis.len())?;
    if values.mean.is_some() {
        return config("mean", "values with a mean cannot be fused");
    }
    let mut fused = Vec::with_capacity(hidden * heads * rank);
    let mut sums = vec![0.0f64; rank];
    for row in out.chunks_exact(heads * dim) {
        for (h, weights) in row.chunks_exact(dim).enumerate() {
            sums.fill(0.0);
            let kv = h / layer.heads_per_kv();
            for (i, w) in weights.iter().enumerate() {
                let line = &values.basis[(kv * dim + i) * rank..][..rank];
                sums.iter_mut().zip(line).for_each(|(s, u)| *s += f64::from(*w) * f64::from(*u));
            }
            fused.extend(sums.iter().map(|s| *s as f32));
        }
    }
    Ok(fused)
}
