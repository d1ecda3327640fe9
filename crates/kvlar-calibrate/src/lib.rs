//! Calibration: from what a model's layers produce on sample text to a plan file that a cache runs by.
//!
//! [`Moments`] collects second moments of a layer's keys and values while the exact model runs; [`fit`] makes a [`Plan`]
//! of them, with a [`Report`] of what each layer loses. The method is ReCalKV (arXiv 2505.24357): head groups share a
//! low-rank latent row for keys, values are decomposed on data. Its parts are modules of their own, one a concept.
//! [`fit_pq`] makes a plan of product-quantized keys from a [`KeySample`] of each layer. [`gate`] trains the gates of Fast
//! KVzip, which say from a token's hidden state which of its keys and values to keep.
//!
//! ```
//! use kvlar_calibrate::*;
//! let layer = LayerShape { q_heads: 4, kv_heads: 2, head_dim: 32, value_dim: 32 };
//! let model = ModelShape { layers: 1, layer, hidden: 64, rope: RopePairs { rotary_dim: 32, layout: PairLayout::Half } };
//! let mut moments = Moments::new(layer)?;
//! // One call a window: queries, keys before RoPE, values of n tokens.
//! let rows = |heads: usize| (0..8 * heads * 32).map(|i| (i as f32).sin()).collect::<Vec<_>>();
//! moments.add(&rows(4), &rows(2), &rows(2))?;
//! let config = RecalkvConfig { weighting_values: Weighting::None, ..RecalkvConfig::default() };
//! let (plan, report) = fit(&config, &model, "model 1", &[moments], None, Weights::default(), &mut |_done, _of| ())?;
//! assert_eq!(plan.bytes_per_token(), 128.0); // half of 2 heads x (32 + 32) numbers x 2 bytes
//! println!("{report}");
//! # Ok::<(), kvlar_calibrate::Error>(())
//! ```

#![forbid(unsafe_code)]

pub mod basis;
pub mod budget;
mod codebooks;
mod config;
mod error;
mod file;
mod fit;
pub mod fusion;
pub mod gate;
pub mod grouping;
pub mod hadamard;
mod moments;
pub mod ovc;
mod plan;
mod pq;
mod report;
mod sample;
mod shape;
pub mod similarity;

pub use codebooks::{CodebookConfig, Codebooks, fit_codebooks};
pub use config::{Budget, Grouping, KeyBasis, Latent, Preset, RecalkvConfig, ValueFit, Weighting};
pub use error::{Error, Result};
pub use faer;
pub use fit::{Weights, fit};
pub use moments::{Moments, SecondMoment};
pub use plan::{Factors, FitConfig, LayerPlan, PLAN_FORMAT, Plan, PlanSize, Quantized, QuantizedCodec, QuantizedFormat, Side};
pub use pq::{PqConfig, PqLayerReport, PqReport, fit_pq};
pub use report::{LayerReport, Report, SideReport};
pub use sample::KeySample;
pub use shape::{LayerShape, ModelShape, PairLayout, RopePairs};
