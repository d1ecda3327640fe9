//! Codebooks of product-quantized keys: k-means in each sub-vector of each kv head (Jégou et al. 2011; HCAttention,
//! arXiv 2507.19823 §3), started by k-means++ (Arthur and Vassilvitskii 2007).

use crate::error::{Error, Result, config, finite, shape};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;

/// Centroids that a code of one byte can name.
const MOST_CENTROIDS: usize = 256;

/// Settings of [`fit_codebooks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodebookConfig {
    /// m: sub-vectors of a row; divides d.
    pub subvectors: usize,
    /// c: centroids of a sub-vector, 1 to 256.
    pub centroids: usize,
    /// Lloyd iterations at most; 0 = the start.
    pub rounds: usize,
    /// The same seed and rows give the same codebooks (of one build of this crate), whatever the number of threads.
    pub seed: u64,
    /// Fit each head to at most so many of its rows, drawn without replacement; all if there are no more. Time grows with
    /// rows, and beyond some 64 a centroid they add little. The error is that of all rows.
    pub max_rows: Option<usize>,
    /// Let codes take two bytes, and c go up to 65536. No cache stores such codes: this is for comparison with HCAttention's own
    /// 2048 (arXiv 2507.19823 §4).
    pub two_bytes: bool,
}

impl CodebookConfig {
    /// 256 centroids, 25 rounds, seed 0, all rows.
    pub fn new(subvectors: usize) -> Self {
        Self { subvectors, centroids: MOST_CENTROIDS, rounds: 25, seed: 0, max_rows: None, two_bytes: false }
    }

    /// Refuses settings that rows of `dim` values cannot have.
    pub(crate) fn check(&self, dim: usize) -> Result<()> {
        if self.subvectors == 0 || !dim.is_multiple_of(self.subvectors) {
            return config("m", format!("{} sub-vectors do not divide {dim} dimensions", self.subvectors));
        }
        let most = if self.two_bytes { MOST_CENTROIDS * MOST_CENTROIDS } else { MOST_CENTROIDS };
        if !(1..=most).contains(&self.centroids) {
            return config("c", format!("{} centroids; 1 to {most} fit a code", self.centroids));
        }
        if self.max_rows == Some(0) {
            return config("max_rows", "0 rows are nothing to fit to; leave it out to take all");
        }
        Ok(())
    }
}

/// Fitted codebooks.
#[derive(Clone, Debug, PartialEq)]
pub struct Codebooks {
    /// `[heads, m, c, d/m]`.
    pub values: Vec<f32>,
    /// `[heads]`: mean over rows of the squared distance between a row and what it decodes to, summed over d.
    pub error: Vec<f64>,
}

/// Codebooks for keys `k` [n, heads, dim] as they are cached (after RoPE).
///
/// Distances are f32 and ties go to the lower centroid, as in encoding; means are accumulated in f64. Rounds end early once
/// no row changes its centroid. A centroid that no row is nearest to moves to the row that is farthest from its own, of
/// equally far ones the first; with fewer distinct rows than centroids, each is a centroid and those left over repeat one
/// that is used.
///
/// # Errors
/// [`Error::Config`] for sub-vectors that do not divide a row, centroids outside 1..=256, a cap of 0 rows; [`Error::Empty`]
/// for no rows, [`Error::Shape`] for a part of one, [`Error::NotFinite`] for NaN and infinities.
pub fn fit_codebooks(k: &[f32], heads: usize, dim: usize, config: &CodebookConfig) -> Result<Codebooks> {
    check(k, heads, dim, config)?;
    let (n, width) = (k.len() / (heads * dim), dim / config.subvectors);
    let fit = |part: usize| {
        let (head, subvector) = (part / config.subvectors, part % config.subvectors);
        let points: Vec<f32> =
            (0..n).flat_map(|row| &k[(row * heads + head) * dim + subvector * width..][..width]).copied().collect();
        let sample = sample(&points, width, head, config);
        let centroids =
            k_means(sample.as_deref().unwrap_or(&points), width, config, &mut stream(config.seed, head, Some(subvector)));
        let mut search = Search::new(&centroids, width);
        let error = points.chunks_exact(width).map(|x| exact_distance(x, &centroids, search.nearest(x).0)).sum::<f64>();
        (centroids, error / n as f64)
    };
    let fitted: Vec<(Vec<f32>, f64)> = (0..heads * config.subvectors).into_par_iter().map(fit).collect();
    let error = fitted.chunks(config.subvectors).map(|head| head.iter().map(|(_, e)| e).sum()).collect();
    Ok(Codebooks { values: fitted.into_iter().flat_map(|(centroids, _)| centroids).collect(), error })
}

fn check(k: &[f32], heads: usize, dim: usize, c: &CodebookConfig) -> Result<()> {
    if heads == 0 || dim == 0 {
        return config("k", format!("{heads} heads of {dim} dimensions: there is nothing to fit to"));
    }
    c.check(dim)?;
    if k.is_empty() {
        return Err(Error::Empty("k".into()));
    }
    shape("k", "[n, heads, dim]", k.len().next_multiple_of(heads * dim), k.len())?;
    finite("k", k, heads * dim)
}

/// A stream of random numbers of its own for each head, or head and sub-vector: what one uses up does not move another's.
fn stream(seed: u64, head: usize, subvector: Option<usize>) -> StdRng {
    let mut key = [0u8; 32];
    let parts = [seed, head as u64, subvector.map_or(0, |s| s as u64 + 1)];
    parts.iter().zip(key.chunks_exact_mut(8)).for_each(|(part, bytes)| bytes.copy_from_slice(&part.to_le_bytes()));
    StdRng::from_seed(key)
}

/// The rows to fit to, in their order: the same of every sub-vector of a head. `None`: all.
fn sample(points: &[f32], width: usize, head: usize, c: &CodebookConfig) -> Option<Vec<f32>> {
    let (n, most) = (points.len() / width, c.max_rows?);
    if n <= most {
        return None;
    }
    let mut rows = rand::seq::index::sample(&mut stream(c.seed, head, None), n, most).into_vec();
    rows.sort_unstable();
    Some(rows.into_iter().flat_map(|row| &points[row * width..][..width]).copied().collect())
}

/// Squared distance in f32, in the order of dimensions: what encoding compares.
fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = 0f32;
    for (x, y) in a.iter().zip(b) {
        let difference = x - y;
        sum += difference * difference;
    }
    sum
}

/// Finds nearest centroids. They lie by dimension, [width, c], so that a point's distances to all of them are sums of lines,
/// which vector units add up; each distance is what [`squared_distance`] makes of it, bit for bit.
struct Search {
    lines: Vec<f32>,
    distances: Vec<f32>,
}

impl Search {
    /// Among centroids [c, width].
    fn new(centroids: &[f32], width: usize) -> Self {
        let lines = (0..width).flat_map(|i| centroids.iter().skip(i).step_by(width)).copied().collect();
        Self { lines, distances: vec![0.0; centroids.len() / width] }
    }

    /// The nearest one, of equally near ones the first, and how far it is; the first if none is at a finite distance.
    fn nearest(&mut self, x: &[f32]) -> (usize, f32) {
        self.distances.fill(0.0);
        for (x, line) in x.iter().zip(self.lines.chunks_exact(self.distances.len())) {
            for (sum, centroid) in self.distances.iter_mut().zip(line) {
                let difference = x - centroid;
                *sum += difference * difference;
            }
        }
        // Eight at a time, so that this is vector arithmetic too; then where the least is.
        let mut least = [f32::INFINITY; 8];
        for some in self.distances.chunks(8) {
            least.iter_mut().zip(some).for_each(|(least, d)| *least = if d < least { *d } else { *least });
        }
        let least = least.into_iter().fold(f32::INFINITY, |a, b| if b < a { b } else { a });
        (self.distances.iter().position(|d| *d == least).unwrap_or(0), least)
    }
}

fn exact_distance(x: &[f32], centroids: &[f32], code: usize) -> f64 {
    x.iter().zip(&centroids[code * x.len()..]).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

/// Centroids [c, width] of points [n, width].
fn k_means(points: &[f32], width: usize, c: &CodebookConfig, rng: &mut StdRng) -> Vec<f32> {
    let mut centroids = plus_plus(points, width, c.centroids, rng);
    let mut codes = vec![usize::MAX; points.len() / width];
    let mut distances = vec![0f32; codes.len()];
    for _ in 0..c.rounds {
        let mut changed = false;
        let mut search = Search::new(&centroids, width);
        for ((x, code), distance) in points.chunks_exact(width).zip(&mut codes).zip(&mut distances) {
            let found = search.nearest(x);
            changed |= *code != found.0;
            (*code, *distance) = found;
        }
        if !changed {
            break;
        }
        update(points, width, &codes, &mut distances, &mut centroids);
    }
    centroids
}

/// c points as centroids: the first at random, each next with a probability that grows with its squared distance from those
/// taken. Once every point is one of them, the last is repeated: it never wins a tie against its first copy.
fn plus_plus(points: &[f32], width: usize, c: usize, rng: &mut StdRng) -> Vec<f32> {
    let n = points.len() / width;
    let mut centroids = Vec::with_capacity(c * width);
    let mut away = vec![f64::INFINITY; n];
    let mut taken = rng.random_range(0..n);
    for _ in 0..c {
        let centroid = &points[taken * width..][..width];
        centroids.extend_from_slice(centroid);
        for (x, away) in points.chunks_exact(width).zip(&mut away) {
            *away = away.min(f64::from(squared_distance(x, centroid)));
        }
        let aim = rng.random::<f64>() * away.iter().sum::<f64>();
        let mut passed = 0.0;
        let drawn = away.iter().position(|away| {
            passed += away;
            *away > 0.0 && passed > aim
        });
        // Rounding, or an overflow, may leave the aim beyond the sum: then the last point that is not taken.
        taken = drawn.or_else(|| away.iter().rposition(|away| *away > 0.0)).unwrap_or(taken);
    }
    centroids
}

/// Moves each centroid to the mean of its points, or, without any, to the point that is farthest from its own centroid.
fn update(points: &[f32], width: usize, codes: &[usize], distances: &mut [f32], centroids: &mut [f32]) {
    let c = centroids.len() / width;
    let (mut sums, mut counts) = (vec![0f64; centroids.len()], vec![0usize; c]);
    for (x, &code) in points.chunks_exact(width).zip(codes) {
        counts[code] += 1;
        sums[code * width..][..width].iter_mut().zip(x).for_each(|(s, x)| *s += f64::from(*x));
    }
    for (code, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let mean = sums[code * width..][..width].iter().map(|s| (s / *count as f64) as f32);
        centroids[code * width..][..width].iter_mut().zip(mean).for_each(|(x, mean)| *x = mean);
    }
    for code in (0..c).filter(|code| counts[*code] == 0) {
        let farthest = (0..distances.len()).fold(0, |best, i| if distances[i] > distances[best] { i } else { best });
        if distances[farthest] <= 0.0 {
            break;
        }
        let point = &points[farthest * width..][..width];
        centroids[code * width..][..width].copy_from_slice(point);
        // The next empty one is to go elsewhere.
        for (x, distance) in points.chunks_exact(width).zip(&mut *distances) {
            *distance = distance.min(squared_distance(x, point));
        }
    }
}
