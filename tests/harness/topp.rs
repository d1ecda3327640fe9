//! Cases of topp.

use crate::Lab;
use kvlar::{Resolve, SCORE_BINS, ToppArgs, ToppShape};
use kvlar_reference::testing::Rng;
use kvlar_reference::{Forced, ToppInput, ordered_key, ordered_row, topp};

/// Rows of logits, and what is asked of them.
#[derive(Clone, Debug)]
pub struct ToppCase {
    pub shape: ToppShape,
    pub logits: Vec<f32>,
    /// Logits between rows.
    pub stride: usize,
    pub lengths: Option<Vec<i32>>,
    /// Neighbouring rows that share a length.
    pub length_rows: usize,
    pub histogram: bool,
    /// Given in memory, as the shape has them.
    pub limits: bool,
}

/// How far a sum in fp32 may be off.
const SLACK: f64 = 1e-5;

impl ToppCase {
    pub fn new(batch: usize, rows: usize, top_p: f64, logits: Vec<f32>) -> Self {
        let shape = ToppShape { top_p, ..ToppShape::new(batch, rows) };
        Self { shape, logits, stride: rows, lengths: None, length_rows: 1, histogram: false, limits: false }
    }

    pub fn one(logits: &[f32], top_p: f64) -> Self {
        Self::new(1, logits.len(), top_p, logits.to_vec())
    }

    pub fn normal(seed: u64, batch: usize, rows: usize, top_p: f64) -> Self {
        Self::new(batch, rows, top_p, Rng::new(seed).normals(batch * rows, 3.0))
    }

    pub fn with(mut self, change: impl FnOnce(&mut ToppShape)) -> Self {
        change(&mut self.shape);
        self
    }

    pub fn bins(self) -> Self {
        self.with(|s| s.resolve = Resolve::Bin)
    }

    fn row(&self, row: usize) -> &[f32] {
        let length = |l: &Vec<i32>| l[row / self.length_rows].clamp(0, self.shape.rows as i32) as usize;
        &self.logits[row * self.stride..][..self.lengths.as_ref().map_or(self.shape.rows, length)]
    }

    fn forced(&self) -> Forced {
        Forced { sink_rows: self.shape.sink_rows, recent_rows: self.shape.recent_rows }
    }

    /// How many rows the reference keeps at another share.
    fn count(&self, row: usize, top_p: f64) -> usize {
        let (s, logits) = (&self.shape, self.row(row));
        let i = ToppInput {
            batch: 1,
            rows: logits.len(),
            logits,
            lengths: None,
            top_p,
            k_min: s.k_min,
            k_max: s.k_max,
            forced: self.forced(),
            resolve: s.resolve,
        };
        topp(&i).expect("a choice").counts[0] as usize
    }

    /// Softmax mass of rows.
    fn mass(&self, row: usize, kept: &[usize]) -> f64 {
        let logits = self.row(row);
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |x: f32| match x {
            x if x.is_nan() || x == f32::NEG_INFINITY => 0.0,
            x if x == top => 1.0,
            x => (f64::from(x) - f64::from(top)).exp(),
        };
        let whole: f64 = logits.iter().map(|&x| weight(x)).sum();
        if whole > 0.0 { kept.iter().map(|&i| weight(logits[i])).sum::<f64>() / whole } else { 0.0 }
    }

    /// Checks every output, and gives the rows kept of each.
    pub fn check(&self, lab: &Lab) -> Vec<Vec<usize>> {
        let ToppShape { batch, rows, top_p, k_min, k_max, .. } = self.shape;
        // Where limits are in memory, those of the shape are wrong.
        let shape = if self.limits { ToppShape { k_min: 3, k_max: 4, ..self.shape } } else { self.shape };
        let plan = shape.plan(&lab.device).unwrap();
        let logits = lab.upload(&self.logits);
        let lengths = self.lengths.as_ref().map(|l| lab.upload(l));
        let limits = self.limits.then(|| lab.upload(&[k_min as i32, k_max as i32]));
        let mut bins = vec![0u32; batch * SCORE_BINS];
        for (row, bins) in bins.chunks_exact_mut(SCORE_BINS).enumerate() {
            self.row(row).iter().for_each(|&x| bins[ordered_key(x) as usize >> 21] += 1);
        }
        let histogram = self.histogram.then(|| lab.upload(&bins));
        let mut outputs = [8 * batch, 4 * batch, 4 * batch, batch * rows].map(|bytes| lab.poisoned(bytes));
        let mut listed = lab.upload(&vec![7i32; batch * rows]); // poison is -1
        let [cuts, counts, mass, mask] = &mut outputs;
        let mut args = ToppArgs {
            logits: logits.view(),
            logit_stride: Some(self.stride),
            lengths: lengths.as_ref().map(|x| x.view()),
            length_rows: self.length_rows,
            histogram: histogram.as_ref().map(|x| x.view()),
            limits: limits.as_ref().map(|x| x.view()),
            cuts: Some(cuts.view_mut()),
            counts: Some(counts.view_mut()),
            mass: Some(mass.view_mut()),
            selected: Some(listed.view_mut()),
            mask: Some(mask.view_mut()),
        };
        plan.launch(&lab.stream, &mut args).unwrap();
        let (cuts, counts): (Vec<u64>, Vec<i32>) = (lab.download(&outputs[0]), lab.download(&outputs[1]));
        let (mass, mask): (Vec<f32>, Vec<u8>) = (lab.download(&outputs[2]), lab.download(&outputs[3]));
        let listed: Vec<i32> = lab.download(&listed);
        assert!(mask.iter().all(|&x| x < 2), "mask of {:?}", self.shape);
        let mut all = Vec::new();
        for row in 0..batch {
            let (what, x, forced) = (format!("row {row} of {:?}", self.shape), self.row(row), self.forced());
            let kept: Vec<usize> = (0..rows).filter(|&i| mask[row * rows + i] == 1).collect();
            let (least, most) = (self.count(row, (top_p - SLACK).max(0.0)), self.count(row, (top_p + SLACK).min(1.0)));
            assert!((least..=most).contains(&kept.len()), "{what}: {} rows, not {least}..={most}", kept.len());
            assert_eq!(counts[row] as usize, kept.len(), "{what}: count");
            // Forced rows and the best of the others.
            let mut best: Vec<usize> = (0..x.len()).collect();
            best.sort_by_key(|&i| std::cmp::Reverse((forced.keeps(i, x.len()), ordered_row(x[i], i as u32))));
            let mut expected = best[..kept.len()].to_vec();
            expected.sort_unstable();
            assert_eq!(kept, expected, "{what}");
            let by_cut = |&i: &usize| forced.keeps(i, x.len()) || ordered_row(x[i], i as u32) >= cuts[row];
            assert_eq!((0..x.len()).filter(by_cut).collect::<Vec<_>>(), kept, "{what}: cut {:x}", cuts[row]);
            let list = &listed[row * rows..(row + 1) * rows];
            assert!(kept.iter().zip(list).all(|(&i, &l)| i as i32 == l), "{what}: {list:?}");
            assert!(list[kept.len()..].iter().all(|&l| l == -1), "{what}: {list:?}");
            let is = self.mass(row, &kept);
            assert!((f64::from(mass[row]) - is).abs() < SLACK, "{what}: mass {} is {is}", mass[row]);
            all.push(kept);
        }
        all
    }
}
