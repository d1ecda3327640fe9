//! Attention over rows that a cut selects.

use crate::attend::{AttendCase, AttendData, AttendRun};
use crate::{Lab, heads, once_a_case};
use kvlar::{AttendCutPlan, AttendCutShape, Buffer, CutArgs};
use kvlar_reference::testing::Rng;
use kvlar_reference::{Attended, ordered_row};

/// What scores a case has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scores {
    /// Normal ones.
    Random,
    /// Of four values, of both signs of zero among them.
    Ties,
    /// NaN, infinities and normal ones.
    Broken,
    /// The higher, the later the row: those selected are neighbours.
    Rising,
}

/// How many rows of each (sequence, kv head) its cut selects, beside those that are always visible.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cut {
    All,
    None,
    /// So many of the best (and all, where there are fewer).
    Best(usize),
    /// A whole number of score bits, as a selection leaves it that ends at a digit.
    Digit,
}

/// A case: all that decides the input is here.
#[derive(Clone, Debug)]
pub struct AttendCutCase {
    pub attend: AttendCase,
    pub segment: usize,
    pub scores: Scores,
    pub cut: Cut,
    pub sink_rows: usize,
    pub recent_rows: usize,
    /// Columns of scores beyond the capacity.
    pub padding: usize,
}

impl AttendCutCase {
    pub fn new(attend: AttendCase, cut: Cut) -> Self {
        Self { attend, segment: 0, scores: Scores::Random, cut, sink_rows: 0, recent_rows: 0, padding: 3 }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub fn shape(&self) -> AttendCutShape {
        let Self { segment, sink_rows, recent_rows, .. } = *self;
        AttendCutShape { segment, sink_rows, recent_rows, ..AttendCutShape::new(self.attend.shape()) }
    }

    pub fn stride(&self) -> usize {
        self.attend.segments[self.segment].capacity + self.padding
    }
}

/// Everything of a case, on the host.
#[derive(Clone, Debug)]
pub struct AttendCutData {
    pub case: AttendCutCase,
    pub attend: AttendData,
    /// `[B, Hk, stride]`, NaN beyond the lengths.
    pub scores: Vec<f32>,
    pub cuts: Vec<u64>,
    expected: Attended,
}

impl AttendCutData {
    pub fn new(case: &AttendCutCase) -> Self {
        let c = &case.attend;
        let mut attend = AttendData::new(c);
        let mut rng = Rng::new(c.seed ^ 0x5ca1e);
        let stride = case.stride();
        let mut scores = vec![f32::NAN; c.seqs * c.kv_heads * stride];
        let mut cuts = Vec::new();
        for (i, row) in scores.chunks_mut(stride).enumerate() {
            let length = attend.length(case.segment, i / c.kv_heads, i % c.kv_heads);
            for (t, score) in row[..length].iter_mut().enumerate() {
                let normal = rng.normals(1, 2.0)[0];
                *score = match case.scores {
                    Scores::Random => normal,
                    Scores::Ties => [-1.0, -0.0, 0.0, 2.5][rng.below(4)],
                    Scores::Broken => [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, normal][rng.below(4)],
                    Scores::Rising => t as f32 - 20.0,
                };
            }
            let mut ranks: Vec<u64> = row[..length].iter().enumerate().map(|(t, &x)| ordered_row(x, t as u32)).collect();
            ranks.sort_unstable_by(|a, b| b.cmp(a));
            cuts.push(match case.cut {
                Cut::All => 0,
                Cut::None | Cut::Best(0) => u64::MAX,
                Cut::Best(n) => ranks.get(n - 1).copied().unwrap_or(0),
                Cut::Digit => ranks.get(length / 3).map_or(0, |rank| rank >> 53 << 53),
            });
        }
        let lengths: Vec<usize> = (0..cuts.len()).map(|i| attend.length(case.segment, i / c.kv_heads, i % c.kv_heads)).collect();
        let (own, own_cuts) = (scores.clone(), cuts.clone());
        let seen = move |seq: usize, head: usize, row: usize| {
            let i = seq * c.kv_heads + head;
            row < case.sink_rows
                || row + case.recent_rows >= lengths[i]
                || ordered_row(own[i * stride + row], row as u32) >= own_cuts[i]
        };
        let expected = attend.expected_over(case.segment, &seen);
        attend.poison_rows(case.segment, |seq, head, row| !seen(seq, head, row));
        Self { case: case.clone(), attend, scores, cuts, expected }
    }

    pub fn compare(&self, actual: &Attended) -> Result<(), String> {
        heads::compare_attended(actual, &self.expected, self.attend.tolerances(), &self.case)
    }
}

/// A case on a device, ready to launch any number of times.
#[derive(Debug)]
pub struct AttendCutRun<'a> {
    lab: &'a Lab,
    pub run: AttendRun<'a>,
    pub plan: AttendCutPlan,
    pub scores: Buffer,
    pub cuts: Buffer,
    stride: usize,
}

impl<'a> AttendCutRun<'a> {
    pub fn new(lab: &'a Lab, data: &AttendCutData) -> Self {
        Self {
            lab,
            run: AttendRun::new(lab, &data.attend),
            plan: data.case.shape().plan(&lab.device).expect("a plan"),
            // To the last row of the last head, and no further.
            scores: lab.upload(&data.scores[..data.scores.len() - data.case.padding]),
            cuts: lab.upload(&data.cuts),
            stride: data.case.stride(),
        }
    }

    /// Enqueues the schedule and the launch.
    pub fn enqueue(&mut self) {
        let Self { lab, run, plan, scores, cuts, stride } = self;
        let cut = CutArgs { scores: scores.view(), score_stride: *stride, cuts: cuts.view() };
        run.with_args(|_, args, work, workspace| {
            plan.attend().schedule(&lab.stream, args, work, workspace).expect("a schedule");
            plan.launch(&lab.stream, args, &cut, work, workspace).expect("a launch");
        });
    }
}

/// Runs a case, and compares with the reference over the selected rows; the others hold NaN.
pub fn check(lab: &Lab, case: &AttendCutCase) {
    let data = once_a_case(case, || AttendCutData::new(case));
    let mut run = AttendCutRun::new(lab, &data);
    run.enqueue();
    data.compare(&run.run.result()).unwrap_or_else(|e| panic!("{e}"));
    assert!(run.run.status().is_clean(), "{:?} of {case:?}", run.run.status());
    assert!(run.run.counters().iter().all(|&x| x == 0), "counters of {case:?}");
}
