//! reduce against the reference: means, maxima, and what NaN and infinities make of them.

use kvlar::{ReduceArgs, ReduceShape, Reduction, SCORE_BINS, Workspace};
use kvlar_reference::compare::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{ReduceInput, reduce};
use kvlar_tests::scan::bin_of;
use kvlar_tests::{Lab, on_every_device};

on_every_device!(groups_and_sizes, odd_values, heads_without_rows, lengths, an_empty_op_does_nothing);

const METHODS: [Reduction; 3] = [Reduction::MeanLogit, Reduction::MaxLogit, Reduction::MaxProb];

struct Case {
    shape: ReduceShape,
    logits: Vec<f32>,
    lse: Vec<f32>,
    lengths: Option<Vec<i32>>,
}

impl Case {
    fn new(seqs: usize, (q_heads, kv_heads): (usize, usize), rows: usize, method: Reduction) -> Self {
        let mut rng = Rng::new((rows + q_heads) as u64);
        Self {
            shape: ReduceShape { seqs, q_heads, kv_heads, rows, method, histogram: true, fill: true },
            logits: rng.normals(seqs * q_heads * rows, 3.0),
            lse: rng.normals(seqs * q_heads, 3.0),
            lengths: None,
        }
    }

    fn length(&self, head: usize) -> usize {
        let ReduceShape { seqs, kv_heads, rows, .. } = self.shape;
        self.lengths
            .as_ref()
            .map_or(rows, |l| l[if l.len() == seqs { head / kv_heads } else { head }].clamp(0, rows as i32) as usize)
    }

    fn check(&self, lab: &Lab) {
        let ReduceShape { seqs, q_heads, kv_heads, rows, method, fill, .. } = self.shape;
        let plan = self.shape.plan(&lab.device).unwrap();
        let (logits, lse) = (lab.upload(&self.logits), lab.upload(&self.lse));
        let lengths = self.lengths.as_ref().map(|l| lab.upload(l));
        let mut scores = lab.poisoned(4 * seqs * kv_heads * rows);
        let mut histogram = lab.poisoned(4 * seqs * kv_heads * SCORE_BINS);
        let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
        let mut args = ReduceArgs {
            logits: logits.view(),
            lse: (method == Reduction::MaxProb).then(|| lse.view()),
            lengths: lengths.as_ref().map(|l| l.view()),
            lengths_per_head: self.lengths.as_ref().is_some_and(|l| l.len() != seqs),
            scores: scores.view_mut(),
            histogram: Some(histogram.view_mut()),
        };
        for _ in 0..2 {
            plan.launch(&lab.stream, &mut args, &mut workspace).unwrap();
        }
        let (scores, histogram): (Vec<f32>, Vec<u32>) = (lab.download(&scores), lab.download(&histogram));
        let input = ReduceInput { seqs, q_heads, kv_heads, rows, logits: &self.logits, lse: &self.lse, method };
        let mut expected = reduce(&input).unwrap();
        let mut counts = vec![0u32; histogram.len()];
        for head in 0..seqs * kv_heads {
            let row = head * rows..(head + 1) * rows;
            expected[row.clone()][self.length(head)..].fill(if fill { f32::NEG_INFINITY } else { f32::NAN });
            scores[row][..self.length(head)].iter().for_each(|&x| counts[head * SCORE_BINS + bin_of(x)] += 1);
        }
        compare(&scores, &expected, Tolerance { absolute: 2e-6, relative: 1e-6, cosine: 1e-9 })
            .unwrap_or_else(|e| panic!("{:?}: {e}", self.shape));
        assert!(counts == histogram, "{:?}: a histogram that does not count", self.shape);
        assert!(lab.counters(&workspace, plan.workspace()).iter().all(|&x| x == 0));
    }
}

fn groups_and_sizes(lab: &Lab) {
    for method in METHODS {
        for (heads, rows) in
            [((1, 1), 1), ((2, 2), 31), ((6, 2), 33), ((8, 1), 1023), ((5, 1), 1025), ((7, 1), 2049), ((48, 3), 64)]
        {
            Case::new(2, heads, rows, method).check(lab);
        }
    }
}

/// Everything that a logit or an lse can be, in every order.
fn odd_values(lab: &Lab) {
    let odd = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, 0.0, -0.0, 1.5, -2e30, f32::MIN];
    for method in METHODS {
        for swapped in [false, true] {
            let mut case = Case::new(8, (2, 1), 64, method);
            for (i, x) in case.logits.iter_mut().enumerate() {
                let (seq, head, row) = (i / 128, i / 64 % 2, i % 64);
                *x = odd[(if (head == 0) == swapped { row / 8 } else { row + seq }) % 8];
            }
            case.lse = [f32::NEG_INFINITY, 0.0, f32::NAN, 3.0, f32::INFINITY, -1.0, 7.0, f32::NEG_INFINITY].repeat(2);
            case.check(lab);
        }
    }
}

/// lse = -inf and logits of -inf: scores are -inf, not NaN.
fn heads_without_rows(lab: &Lab) {
    let mut case = Case::new(1, (4, 2), 40, Reduction::MaxProb);
    case.logits.fill(f32::NEG_INFINITY);
    case.lse.fill(f32::NEG_INFINITY);
    case.check(lab);
}

fn lengths(lab: &Lab) {
    for (lengths, fill) in
        [(vec![40, 1100], true), (vec![0, 33], false), (vec![5, 1100, 0, 1024], true), (vec![-4, 9999, 1, 2], false)]
    {
        for method in METHODS {
            let mut case = Case::new(2, (6, 2), 1100, method);
            case.lengths = Some(lengths.clone());
            case.shape.fill = fill;
            case.check(lab);
        }
    }
}

fn an_empty_op_does_nothing(lab: &Lab) {
    let mut case = Case::new(1, (2, 1), 0, Reduction::MaxLogit);
    case.shape.histogram = false;
    let plan = case.shape.plan(&lab.device).unwrap();
    let empty = lab.device.alloc(0).unwrap();
    let mut scores = lab.device.alloc(0).unwrap();
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    let mut args = ReduceArgs {
        logits: empty.view(),
        lse: None,
        lengths: None,
        lengths_per_head: false,
        scores: scores.view_mut(),
        histogram: None,
    };
    plan.launch(&lab.stream, &mut args, &mut workspace).unwrap();
}
