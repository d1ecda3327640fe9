//! Keys or values of one layer.

use super::ranks::{Dealt, costs};
use crate::basis::{GroupBasis, Metric, covariance, eigen, eigenvalues, leading, tail_energy, trace};
use crate::budget::{Candidate, Cost};
use crate::config::{Grouping, RecalkvConfig, ValueFit, Weighting};
use crate::error::{Result, config as refuse};
use crate::grouping::{self, Groups, natural};
use crate::hadamard;
use crate::moments::{Moments, SecondMoment};
use crate::ovc::{left_vectors, power};
use crate::plan::{Factors, Side};
use crate::report::SideReport;
use crate::shape::ModelShape;
use crate::similarity::{cka, summary};
use faer::Mat;

/// What a side is fitted to, and how.
pub(super) struct Problem<'a> {
    moment: &'a SecondMoment,
    metric: Option<Metric>,
    centred: bool,
    grouping: Grouping,
    size: usize,
    shards: usize,
    cost: Cost,
    hadamard: bool,
    /// Weights [heads · dim, hidden], their width and the rounds of OVC after their SVD; else PCA.
    start: Option<(&'a [f32], usize, usize)>,
    similarity: Vec<f64>,
}

/// A fitted basis of every group, and what it discards: plain and weighted, not relative.
struct Fitted {
    bases: Vec<GroupBasis>,
    discarded: f64,
    weighted: f64,
}

impl<'a> Problem<'a> {
    pub(super) fn keys(config: &RecalkvConfig, model: &ModelShape, moments: &'a Moments) -> Result<Self> {
        let layer = model.layer;
        let metric = match config.weighting_keys {
            Weighting::Query => {
                let power = moments.query_power();
                Some(Metric::query(&power, layer.q_heads, layer.kv_heads, layer.head_dim, model.rope)?)
            }
            _ => None,
        };
        Ok(Self {
            moment: moments.keys(),
            metric,
            centred: config.center,
            grouping: config.grouping,
            size: config.key_group,
            shards: config.shards,
            cost: costs(config, model)[0],
            hadamard: config.hadamard,
            start: None,
            similarity: cka(moments.keys()),
        })
    }

    pub(super) fn values(
        config: &RecalkvConfig,
        model: &ModelShape,
        moments: &'a Moments,
        out: Option<&[f32]>,
        weights: Option<&'a [f32]>,
    ) -> Result<Self> {
        let layer = model.layer;
        let metric = match (config.weighting_values, out) {
            (Weighting::Output, Some(out)) => {
                Some(Metric::output(out, model.hidden, layer.q_heads, layer.kv_heads, layer.value_dim)?)
            }
            (Weighting::Output, None) => return refuse("out_weight", "output weighting needs it"),
            _ => None,
        };
        let rounds = match config.values {
            ValueFit::Closed => None,
            ValueFit::WeightSvd => Some(0),
            ValueFit::Alternating { rounds } => Some(rounds),
        };
        let start = match (rounds, weights) {
            (None, _) => None,
            (Some(rounds), Some(w)) => Some((w, model.hidden, rounds)),
            (Some(_), None) => return refuse("value_weight", "a fit that starts from W_v needs it"),
        };
        Ok(Self {
            moment: moments.values(),
            metric,
            centred: false,
            grouping: config.value_grouping,
            size: config.value_group,
            shards: config.shards,
            cost: costs(config, model)[1],
            hadamard: config.hadamard,
            start,
            similarity: cka(moments.values()),
        })
    }

    /// Groups for `rank`; in order where rows stay dense.
    fn groups(&self, rank: Option<usize>) -> Result<Groups> {
        let heads = self.moment.heads();
        let Some(rank) = rank else { return Ok(natural(&(0..heads).collect::<Vec<_>>(), self.size)) };
        let cost = |group: &[usize]| tail_energy(self.moment, group, self.metric.as_ref(), self.centred, rank);
        grouping::group(self.grouping, &self.similarity, heads, self.size, self.shards, &cost)
    }

    /// Groups, and the spectra of what they are fitted to.
    pub(super) fn candidate(&self, rank: Option<usize>) -> Result<(Candidate, Groups)> {
        let groups = self.groups(rank)?;
        let spectrum = |g: &Vec<usize>| eigenvalues(covariance(self.moment, g, self.metric.as_ref(), self.centred).as_ref());
        let spectra = groups.iter().map(spectrum).collect::<Result<_>>()?;
        Ok((Candidate { cost: self.cost, spectra }, groups))
    }

    pub(super) fn fit(&self, dealt: &Dealt) -> Result<(Side, SideReport)> {
        let heads = self.moment.heads();
        let mut report = SideReport {
            rank: dealt.rank,
            groups: Vec::new(),
            discarded: 0.0,
            discarded_weighted: 0.0,
            discarded_natural: 0.0,
            similarity: summary(&self.similarity, heads),
            bytes: self.cost.dense(),
        };
        let Some(rank) = dealt.rank else { return Ok((Side::Dense, report)) };
        let groups = match &dealt.groups {
            Some(groups) => groups.clone(),
            None => self.groups(Some(rank))?,
        };
        let fitted = self.bases(&groups, rank)?;
        let in_order = natural(&(0..heads).collect::<Vec<_>>(), self.size);
        let plain = if in_order == groups { fitted.weighted } else { self.bases(&in_order, rank)?.weighted };
        let relative = |x: f64, all: f64| if all > 0.0 { x / all } else { 0.0 };
        let weighted_energy = self.energy(&groups);
        report.groups.clone_from(&groups);
        report.discarded = relative(fitted.discarded, self.moment.energy());
        report.discarded_weighted = relative(fitted.weighted, weighted_energy);
        report.discarded_natural = relative(plain, weighted_energy);
        report.bytes = self.cost.bytes(rank);
        Ok((Side::LowRank(self.factors(groups, rank, &fitted)), report))
    }

    /// Σ ‖G y‖² over all heads, uncentred.
    fn energy(&self, groups: &[Vec<usize>]) -> f64 {
        groups.iter().map(|g| trace(covariance(self.moment, g, self.metric.as_ref(), false).as_ref())).sum()
    }

    fn bases(&self, groups: &[Vec<usize>], rank: usize) -> Result<Fitted> {
        let metric = self.metric.as_ref();
        let mut fitted = Fitted { bases: Vec::with_capacity(groups.len()), discarded: 0.0, weighted: 0.0 };
        for group in groups {
            let c = covariance(self.moment, group, metric, self.centred);
            let u = match self.start {
                None => leading(&eigen(c.as_ref())?, rank),
                Some((w, hidden, rounds)) => {
                    let dim = self.moment.dim();
                    let rows = Mat::from_fn(group.len() * dim, hidden, |r, col| {
                        f64::from(w[(group[r / dim] * dim + r % dim) * hidden + col])
                    });
                    let rows = metric.map_or_else(|| rows.clone(), |m| m.forward(group, rows.as_ref()));
                    power(c.as_ref(), left_vectors(rows.as_ref(), rank)?, rounds)?
                }
            };
            fitted.weighted += GroupBasis::new(u.clone(), group, None).discarded(c.as_ref());
            let basis = GroupBasis::new(u, group, metric);
            fitted.discarded += basis.discarded(covariance(self.moment, group, None, self.centred).as_ref());
            fitted.bases.push(basis);
        }
        Ok(fitted)
    }

    fn factors(&self, groups: Groups, rank: usize, fitted: &Fitted) -> Factors {
        let (heads, dim) = (self.moment.heads(), self.moment.dim());
        let mut basis = vec![0.0f32; heads * dim * rank];
        let mut encoder = Vec::with_capacity(basis.len());
        let mut mean = self.centred.then(|| vec![0.0f32; heads * dim]);
        let means = self.moment.mean();
        for (group, plain) in groups.iter().zip(&fitted.bases) {
            let folded = (self.hadamard && self.cost.latent.is_quantized()).then(|| hadamard::fold(plain));
            let b = folded.as_ref().unwrap_or(plain);
            for (slot, h) in group.iter().enumerate() {
                for i in 0..dim {
                    let line = &mut basis[(h * dim + i) * rank..][..rank];
                    line.iter_mut().enumerate().for_each(|(c, x)| *x = b.decode[(slot * dim + i, c)] as f32);
                }
            }
            for r in 0..rank {
                encoder.extend((0..group.len() * dim).map(|c| b.encode[(r, c)] as f32));
            }
            if let Some(mean) = &mut mean {
                let of_group: Vec<f64> = group.iter().flat_map(|h| means[h * dim..(h + 1) * dim].iter().copied()).collect();
                for (at, rest) in plain.unreached(&of_group).iter().enumerate() {
                    mean[group[at / dim] * dim + at % dim] = *rest as f32;
                }
            }
        }
        Factors { groups, rank, basis, encoder, mean, latent: self.cost.latent }
    }
}
