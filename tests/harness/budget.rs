//! Cases of budgets.

use crate::Lab;
use kvlar::{
    BudgetHeadsArgs, BudgetHeadsShape, BudgetLayersArgs, BudgetLayersShape, Buffer, LayerBudget, SCORE_BINS, View, Workspace,
};
use kvlar_reference::testing::Rng;
use kvlar_reference::{HeadsInput, LayersInput, budget_heads, budget_layers, dynamickv_rounds, ordered_key};

/// Scores of sequences, layers and heads.
#[derive(Clone, Debug)]
pub struct Scores {
    /// B, L, H.
    pub dims: [usize; 3],
    /// P.
    pub rows: usize,
    /// Scores between rows.
    pub stride: usize,
    pub values: Vec<f32>,
    pub lengths: Option<Vec<i32>>,
    /// Whether a histogram of the scores is given.
    pub histogram: bool,
}

impl Scores {
    pub fn new(dims: [usize; 3], rows: usize, values: Vec<f32>) -> Self {
        Self { dims, rows, stride: rows, values, lengths: None, histogram: false }
    }

    /// Of few values, so that ties are common, and layers that differ.
    pub fn random(seed: u64, dims: [usize; 3], rows: usize) -> Self {
        let (mut rng, all) = (Rng::new(seed), dims[0] * dims[1] * dims[2] * rows);
        let layer = |at: usize| (at / rows.max(1) / dims[2].max(1) % dims[1].max(1)) as f32;
        let values = (0..all).map(|at| (rng.below(40) as f32 + 3.0 * (layer(at) * 1.7).sin()).round()).collect();
        Self::new(dims, rows, values)
    }

    /// Rows with something between them.
    pub fn apart(mut self) -> Self {
        self.stride = self.rows + 3;
        let (all, mut rng) = (self.dims.iter().product::<usize>(), Rng::new(99));
        let row = |r: usize, i: usize, rng: &mut Rng| {
            if i < self.rows { self.values[r * self.rows + i] } else { 1e6 + rng.below(9) as f32 }
        };
        let mut values: Vec<f32> =
            (0..all).flat_map(|r| (0..self.stride).map(move |i| (r, i))).map(|(r, i)| row(r, i, &mut rng)).collect();
        values.truncate((all - 1) * self.stride + self.rows);
        self.values = values;
        self
    }

    fn length(&self, seq: usize) -> usize {
        self.lengths.as_ref().map_or(self.rows, |l| l[seq].clamp(0, self.rows as i32) as usize)
    }

    /// Those of some of a sequence's rows, as long as it is.
    fn of(&self, seq: usize, rows: std::ops::Range<usize>) -> Vec<f32> {
        let first = seq * self.dims[1] * self.dims[2];
        rows.flat_map(|row| self.values[(first + row) * self.stride..][..self.length(seq)].to_vec()).collect()
    }

    fn counted(&self) -> Vec<u32> {
        let each = self.dims[1] * self.dims[2];
        let mut bins = vec![0; self.dims[0] * each * SCORE_BINS];
        for (row, bins) in bins.chunks_exact_mut(SCORE_BINS).enumerate() {
            let scores = self.of(row / each, row % each..row % each + 1);
            scores.iter().for_each(|&x| bins[ordered_key(x) as usize >> 21] += 1);
        }
        bins
    }
}

/// What both kinds of budgets are given.
struct Uploaded {
    scores: Buffer,
    lengths: Option<Buffer>,
    histogram: Option<Buffer>,
}

impl Uploaded {
    fn new(lab: &Lab, s: &Scores) -> Self {
        let lengths = s.lengths.as_ref().map(|l| lab.upload(l));
        Self { scores: lab.upload(&s.values), lengths, histogram: s.histogram.then(|| lab.upload(&s.counted())) }
    }

    fn lengths(&self) -> Option<View<'_>> {
        self.lengths.as_ref().map(|x| x.view())
    }

    fn histogram(&self) -> Option<View<'_>> {
        self.histogram.as_ref().map(|x| x.view())
    }
}

/// Budgets of layers.
#[derive(Clone, Debug)]
pub struct LayersCase {
    pub scores: Scores,
    pub shape: BudgetLayersShape,
}

impl LayersCase {
    pub fn new(method: LayerBudget, scores: Scores, base: usize) -> Self {
        let shape = BudgetLayersShape::new(method, scores.dims, scores.rows, base);
        Self { scores, shape }
    }

    /// Budgets `[round][layer]` of a sequence.
    pub fn expected(&self, seq: usize) -> Vec<Vec<i32>> {
        let BudgetLayersShape { method, layers, heads, base, r_max, interval, beta, .. } = self.shape;
        let (scores, rows) = (self.scores.of(seq, 0..layers * heads), self.scores.length(seq));
        let i = LayersInput { layers, heads, rows, scores: &scores, base, method, r_max, interval, beta };
        if method != LayerBudget::DynamicKv {
            return if layers == 0 { Vec::new() } else { vec![budget_layers(&i).expect("budgets")] };
        }
        let most = ((r_max * base as f64) as usize).min(rows) as i32;
        let whole = |round: Vec<usize>| {
            let mut budgets: Vec<i32> = round.into_iter().map(|x| x as i32).collect();
            budgets.resize(layers, most);
            budgets
        };
        dynamickv_rounds(&i).expect("budgets").into_iter().map(whole).collect()
    }

    /// Checks every round, and all of them in one; gives the budgets `[seq][layer]`.
    pub fn check(&self, lab: &Lab) -> Vec<Vec<i32>> {
        let [seqs, layers, heads] = self.scores.dims;
        let plan = self.shape.plan(&lab.device).unwrap();
        let given = Uploaded::new(lab, &self.scores);
        let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
        let (mut budgets, mut ks) = (lab.poisoned(4 * seqs * layers), lab.poisoned(4 * seqs * layers * heads));
        let rounds: Vec<usize> = plan.rounds().collect();
        // A round each, then all of them over what those have left.
        for round in 0..=rounds.len() {
            let mut args = BudgetLayersArgs {
                scores: (self.shape.method == LayerBudget::DynamicKv).then(|| given.scores.view()),
                score_stride: Some(self.scores.stride),
                lengths: given.lengths(),
                histogram: given.histogram(),
                budgets: budgets.view_mut(),
                ks: Some(ks.view_mut()),
            };
            match rounds.get(round) {
                Some(&seen) => plan.round(&lab.stream, &mut args, &mut workspace, seen).unwrap(),
                None => plan.launch(&lab.stream, &mut args, &mut workspace).unwrap(),
            }
            if rounds.is_empty() {
                continue;
            }
            let at = round.min(rounds.len() - 1);
            let expected: Vec<i32> = (0..seqs).flat_map(|seq| self.expected(seq).swap_remove(at)).collect();
            let what = format!("round {round} of {:?}, lengths {:?}", self.shape, self.scores.lengths);
            assert_eq!(lab.download::<i32>(&budgets), expected, "{what}");
            let forced = self.shape.forced_rows as i32;
            let each: Vec<i32> = expected.iter().flat_map(|b| vec![b + forced; heads]).collect();
            assert_eq!(lab.download::<i32>(&ks), each, "{what}: ks");
            assert!(lab.counters(&workspace, plan.workspace()).iter().all(|&x| x == 0), "counters of {what}");
        }
        (0..seqs).map(|seq| self.expected(seq).pop().unwrap_or_default()).collect()
    }
}

/// Budgets of heads.
#[derive(Clone, Debug)]
pub struct HeadsCase {
    pub scores: Scores,
    pub shape: BudgetHeadsShape,
}

impl HeadsCase {
    pub fn new(scores: Scores, base: usize, alpha: f64) -> Self {
        let shape = BudgetHeadsShape { alpha, ..BudgetHeadsShape::new(scores.dims, scores.rows, base) };
        Self { scores, shape }
    }

    pub fn expected(&self) -> Vec<i32> {
        let BudgetHeadsShape { seqs, layers, heads, base, alpha, .. } = self.shape;
        let of_layer = |at: usize| {
            let (seq, layer) = (at / layers, at % layers);
            let scores = self.scores.of(seq, layer * heads..(layer + 1) * heads);
            budget_heads(&HeadsInput { heads, rows: self.scores.length(seq), scores: &scores, base, alpha }).expect("budgets")
        };
        (0..seqs * layers).flat_map(of_layer).collect()
    }

    /// Checks both outputs, and gives the budgets.
    pub fn check(&self, lab: &Lab) -> Vec<i32> {
        let all = self.scores.dims.iter().product::<usize>();
        let plan = self.shape.plan(&lab.device).unwrap();
        let given = Uploaded::new(lab, &self.scores);
        let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
        let (mut budgets, mut ks) = (lab.poisoned(4 * all), lab.poisoned(4 * all));
        let mut args = BudgetHeadsArgs {
            scores: given.scores.view(),
            score_stride: Some(self.scores.stride),
            lengths: given.lengths(),
            histogram: given.histogram(),
            budgets: budgets.view_mut(),
            ks: Some(ks.view_mut()),
        };
        for _ in 0..2 {
            plan.launch(&lab.stream, &mut args, &mut workspace).unwrap();
        }
        let expected = self.expected();
        let what = format!("{:?}, lengths {:?}", self.shape, self.scores.lengths);
        assert_eq!(lab.download::<i32>(&budgets), expected, "{what}");
        let forced = self.shape.forced_rows as i32;
        assert_eq!(lab.download::<i32>(&ks), expected.iter().map(|b| b + forced).collect::<Vec<_>>(), "{what}: ks");
        assert!(lab.counters(&workspace, plan.workspace()).iter().all(|&x| x == 0), "counters of {what}");
        expected
    }
}
