//! The command line of `kvlar calibrate`.

use super::gates::GateArguments;
use anyhow::{Result, bail};
use clap::ValueEnum;
use kvlar_calibrate as fit;
use kvlar_calibrate::{LayerShape, PqConfig, RecalkvConfig, ValueFit};
use std::path::{Path, PathBuf};

/// Methods that need calibration.
const METHODS: &[&str] = &["recalkv", "pq", "fast-kvzip"];

#[derive(clap::Args)]
pub struct Arguments {
    /// What for: recalkv (low-rank keys and values), pq (product-quantized keys) or fast-kvzip (gates that say what to keep).
    #[arg(long, default_value = "recalkv")]
    pub method: String,
    /// Folder of a Hugging Face checkpoint; the bundled model by default.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// A text to calibrate on, unlike those to evaluate on; the bundled one by default, for the bundled model.
    #[arg(long)]
    pub text: Option<PathBuf>,
    /// Where the plan goes; a report goes beside it (.report.json instead of .safetensors, or behind any other name)
    /// [default: plan.safetensors, or gates.safetensors with fast-kvzip].
    #[arg(long)]
    out: Option<PathBuf>,
    /// Windows of the text at most.
    #[arg(long, default_value_t = 256)]
    pub windows: usize,
    /// Tokens of a window [default: 1024; with fast-kvzip as many as the model has room to repeat, up to 8192].
    #[arg(long)]
    pub window: Option<usize>,
    /// Bytes kept of the bf16 cache's, above 0, up to 1 [default: 0.5].
    #[arg(long)]
    kept: Option<f64>,
    /// Settings by name, instead of choosing groups, budget and latents.
    #[arg(long, conflicts_with_all = ["kept", "group_keys", "group_values", "budget", "latent", "int8_basis"])]
    preset: Option<Preset>,
    /// Kv heads of a key group [default: 2, where that divides them].
    #[arg(long)]
    group_keys: Option<usize>,
    /// Kv heads of a value group [default: 2, where that divides them].
    #[arg(long)]
    group_values: Option<usize>,
    /// Which key heads share a group [default: best].
    #[arg(long)]
    grouping: Option<Grouping>,
    /// How ranks are dealt out [default: uniform].
    #[arg(long)]
    budget: Option<Budget>,
    /// What errors are weighted by; `query,output` for both [default: query,output].
    #[arg(long, value_delimiter = ',')]
    weighting: Vec<Weighting>,
    /// recalkv: where value bases come from: svd, alternating or closed [default: closed]. pq: what values are stored as:
    /// dense, fp8, int8, int4, int2, int4-channel or int2-channel, each of the others also with +hadamard [default: int4].
    #[arg(long)]
    values: Option<String>,
    /// recalkv: rounds of `--values alternating` [default: 1]. pq: rounds of k-means at most [default: 25].
    #[arg(long)]
    rounds: Option<usize>,
    /// pq: sub-vectors of a key, each of which is a byte [default: half of its dimensions].
    #[arg(long)]
    subvectors: Option<usize>,
    /// pq: centroids of a sub-vector, 1 to 256 [default: 256].
    #[arg(long)]
    centroids: Option<usize>,
    /// pq: of the sample of keys and of k-means; fast-kvzip: of first parameters and batches [default: 0].
    #[arg(long)]
    pub seed: Option<u64>,
    /// What latents are stored as [default: model].
    #[arg(long)]
    latent: Option<Latent>,
    /// Multiply key bases in 8 bits (with --latent int8): faster where tensor cores bound the rebuild, at 0.4 % of a key.
    #[arg(long)]
    int8_basis: bool,
    /// Ranks are multiples of it; kernels want 32.
    #[arg(long)]
    multiple: Option<usize>,
    /// Fit keys around their mean, which decoding adds.
    #[arg(long)]
    center: bool,
    /// Do not rotate quantized latents.
    #[arg(long)]
    no_hadamard: bool,
    /// Tensor-parallel shards; no group has heads of two.
    #[arg(long)]
    shards: Option<usize>,
    /// First rows of a sequence that stay exact [default: 4, or 0 with pq].
    #[arg(long)]
    sinks: Option<usize>,
    /// Last rows of a sequence that stay exact [default: 64, or 0 with pq].
    #[arg(long)]
    recent: Option<usize>,
    #[command(flatten)]
    pub gates: GateArguments,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Preset {
    /// Fastest decoding.
    Speed,
    /// Least error.
    Quality,
    /// Most tokens.
    Capacity,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Grouping {
    /// In order.
    Natural,
    /// The released rule: most similar pairs first.
    Greedy,
    /// Least discarded energy.
    Best,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Budget {
    /// All layers alike.
    Uniform,
    /// By how much the loss depends on each layer's keys and values.
    Fisher,
    /// Where a rank saves most discarded energy.
    Spectral,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Weighting {
    /// Nothing.
    None,
    /// Keys: the power of the queries.
    Query,
    /// Values: the output projection.
    Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Latent {
    /// The model's 16-bit type.
    Model,
    /// 8 bits.
    Int8,
    /// 4 bits.
    Int4,
}

impl Arguments {
    /// Refuses what is wrong whatever the model.
    pub fn check(&self) -> Result<()> {
        if !METHODS.contains(&self.method.as_str()) {
            bail!("no method {:?} to calibrate ({})", self.method, METHODS.join(", "));
        }
        let others = match self.method.as_str() {
            "recalkv" => self.given_of_pq().or(self.seed.map(|_| "--seed")).or(self.gates.given()),
            "pq" => self.given_of_recalkv().or(self.gates.given()),
            _ => self.given_of_recalkv().or(self.given_of_pq()).or(self.given_of_plans()),
        };
        if let Some(option) = others {
            bail!("{option} is no option of --method {}", self.method);
        }
        if self.windows == 0 {
            bail!("--windows 0: calibration needs at least one window");
        }
        let out = self.out();
        let folder = match out.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        if !folder.is_dir() {
            bail!("{}: no such folder; make it, or choose another --out", folder.display());
        }
        if out.is_dir() {
            bail!("{}: a folder; --out is a file", out.display());
        }
        Ok(())
    }

    /// Where the plan or the gates go.
    pub fn out(&self) -> PathBuf {
        let usual = if self.method == "fast-kvzip" { "gates.safetensors" } else { "plan.safetensors" };
        self.out.clone().unwrap_or_else(|| usual.into())
    }

    /// An option that was given although it is ReCalKV's alone.
    fn given_of_recalkv(&self) -> Option<&'static str> {
        let given = [
            ("--kept", self.kept.is_some()),
            ("--preset", self.preset.is_some()),
            ("--group-keys", self.group_keys.is_some()),
            ("--group-values", self.group_values.is_some()),
            ("--grouping", self.grouping.is_some()),
            ("--budget", self.budget.is_some()),
            ("--weighting", !self.weighting.is_empty()),
            ("--latent", self.latent.is_some()),
            ("--int8-basis", self.int8_basis),
            ("--multiple", self.multiple.is_some()),
            ("--center", self.center),
            ("--no-hadamard", self.no_hadamard),
            ("--shards", self.shards.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }

    /// Likewise, of product quantization.
    fn given_of_pq(&self) -> Option<&'static str> {
        let given = [("--subvectors", self.subvectors.is_some()), ("--centroids", self.centroids.is_some())];
        given.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }

    /// Likewise, of both.
    fn given_of_plans(&self) -> Option<&'static str> {
        let given = [
            ("--values", self.values.is_some()),
            ("--rounds", self.rounds.is_some()),
            ("--sinks", self.sinks.is_some()),
            ("--recent", self.recent.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }

    /// The settings of product quantization for a model of these heads.
    pub fn pq(&self, shape: &LayerShape) -> Result<PqConfig> {
        let c = PqConfig::new(self.subvectors.unwrap_or(shape.head_dim / 2), self.centroids.unwrap_or(256));
        let values = match self.values.as_deref() {
            None => c.values,
            Some("dense") => None,
            Some(format) => match format.parse() {
                Ok(format) => Some(format),
                Err(e) => bail!("--values: {e}, or dense"),
            },
        };
        Ok(PqConfig {
            rounds: self.rounds.unwrap_or(c.rounds),
            seed: self.seed.unwrap_or(c.seed),
            sink_rows: self.sinks.unwrap_or(c.sink_rows),
            recent_rows: self.recent.unwrap_or(c.recent_rows),
            values,
            ..c
        })
    }

    /// The settings of ReCalKV for a model of these heads.
    pub fn config(&self, shape: &LayerShape) -> Result<RecalkvConfig> {
        let preset = self.preset.map(|p| match p {
            Preset::Speed => fit::Preset::Speed,
            Preset::Quality => fit::Preset::Quality,
            Preset::Capacity => fit::Preset::Capacity,
        });
        let shards = self.shards.unwrap_or(1);
        let mut c = preset.map_or_else(RecalkvConfig::default, |p| p.config(shape, shards));
        c.shards = shards;
        if self.preset.is_none() {
            let heads = shape.kv_heads / c.shards.max(1);
            let usual = |size: usize| if heads.is_multiple_of(size) { size } else { 1 };
            c.key_group = self.group_keys.unwrap_or_else(|| usual(c.key_group));
            c.value_group = self.group_values.unwrap_or_else(|| usual(c.value_group));
        }
        c.kept = self.kept.unwrap_or(c.kept);
        c.multiple = self.multiple.unwrap_or(c.multiple);
        c.center |= self.center;
        c.hadamard &= !self.no_hadamard;
        c.sink_rows = self.sinks.unwrap_or(c.sink_rows);
        c.recent_rows = self.recent.unwrap_or(c.recent_rows);
        if let Some(g) = self.grouping {
            c.grouping = match g {
                Grouping::Natural => fit::Grouping::Natural,
                Grouping::Greedy => fit::Grouping::Greedy,
                Grouping::Best => fit::Grouping::Best,
            };
        }
        if let Some(b) = self.budget {
            c.budget = match b {
                Budget::Uniform => fit::Budget::Uniform,
                Budget::Fisher => fit::Budget::Proportional,
                Budget::Spectral => fit::Budget::Spectral,
            };
        }
        if !self.weighting.is_empty() {
            if self.weighting.contains(&Weighting::None) && self.weighting.len() > 1 {
                bail!("--weighting: none and something else; choose none, query, output, or query,output");
            }
            let has = |w: Weighting, side: fit::Weighting| if self.weighting.contains(&w) { side } else { fit::Weighting::None };
            c.weighting_keys = has(Weighting::Query, fit::Weighting::Query);
            c.weighting_values = has(Weighting::Output, fit::Weighting::Output);
        }
        if let Some(v) = &self.values {
            c.values = match v.as_str() {
                "svd" => ValueFit::WeightSvd,
                "alternating" => ValueFit::Alternating { rounds: self.rounds.unwrap_or(1) },
                "closed" => ValueFit::Closed,
                _ => bail!("--values {v:?}: choose svd, alternating or closed"),
            };
        }
        if let Some(l) = self.latent {
            let latent = match l {
                Latent::Model => fit::Latent::Model,
                Latent::Int8 => fit::Latent::Int8,
                Latent::Int4 => fit::Latent::Int4,
            };
            (c.latent_keys, c.latent_values) = (latent, latent);
        }
        if self.int8_basis {
            c.key_basis = fit::KeyBasis::Int8;
        }
        Ok(c)
    }
}
