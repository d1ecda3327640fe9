//! Scans that find cuts too.

use crate::scan::{ScanCase, ScanData, ScanRun, bin_of};
use crate::{Lab, once_a_case};
use kvlar::{Ks, SCORE_BINS, ScanSelectShape, SelectArgs, Workspace};
use kvlar_reference::ordered_row;

/// A scan, and how many of its rows are kept.
#[derive(Clone, Debug)]
pub struct ScanSelectCase {
    pub scan: ScanCase,
    pub k: usize,
    pub sink_rows: usize,
    pub recent_rows: usize,
    /// One for all, or one each.
    pub ks: Option<Vec<i32>>,
}

impl ScanSelectCase {
    /// Scores alone are outputs, beside the cuts.
    pub fn new(scan: ScanCase, k: usize) -> Self {
        let scan = scan.with(|c| (c.logits, c.lse, c.histogram) = (false, false, false));
        Self { scan, k, sink_rows: 0, recent_rows: 0, ks: None }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub fn shape(&self) -> ScanSelectShape {
        let Self { k, sink_rows, recent_rows, .. } = *self;
        ScanSelectShape { scan: self.scan.shape(), k, sink_rows, recent_rows }
    }

    /// Rows kept of a (sequence, kv head) with these scores.
    fn expected(&self, head: usize, scores: &[f32]) -> Vec<usize> {
        let forced = |i: usize| i < self.sink_rows || i >= scores.len().saturating_sub(self.recent_rows);
        let k = self.ks.as_ref().map_or(self.k, |ks| (ks[head % ks.len()].max(0) as usize).min(self.k));
        let (mut kept, mut free): (Vec<usize>, Vec<usize>) = (0..scores.len()).partition(|&i| forced(i));
        free.sort_by_key(|&i| std::cmp::Reverse(ordered_row(scores[i], i as u32)));
        free.truncate(k.saturating_sub(kept.len()));
        kept.extend(free);
        kept.sort_unstable();
        kept
    }

    /// Checks the cuts against the scores that the same launches wrote (whose own suite is that of scan), twice.
    pub fn check(&self, lab: &Lab) {
        let (c, data) = (&self.scan, once_a_case(&self.scan, || ScanData::new(&self.scan)));
        let heads = c.seqs * c.kv_heads;
        let mut run = ScanRun::new(lab, &data);
        let plan = self.shape().plan(&lab.device).unwrap();
        let mut work = plan.scan().work_list(&lab.device).unwrap();
        let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
        let mut cuts = lab.poisoned(8 * heads);
        let ks = self.ks.as_ref().map(|ks| lab.upload(ks));
        let each = self.ks.as_ref().is_some_and(|ks| ks.len() > 1);
        run.with_args(|_, args, _, _| {
            plan.scan().schedule(&lab.stream, args, &mut work, &mut workspace).unwrap();
            for _ in 0..2 {
                let ks = ks.as_ref().map(|x| if each { Ks::Each(x.view()) } else { Ks::One(x.view()) });
                let mut select = SelectArgs { ks, cuts: cuts.view_mut() };
                plan.launch(&lab.stream, args, &mut select, &work, &mut workspace).unwrap();
            }
        });
        let (scanned, cuts) = (run.result(), lab.download::<u64>(&cuts));
        for (head, &cut) in cuts.iter().enumerate() {
            let scores = &scanned.scores[head * c.capacity..][..data.length(head)];
            let forced = |i: usize| i < self.sink_rows || i >= scores.len().saturating_sub(self.recent_rows);
            let kept = |&i: &usize| forced(i) || ordered_row(scores[i], i as u32) >= cut;
            let kept: Vec<usize> = (0..scores.len()).filter(kept).collect();
            assert_eq!(kept, self.expected(head, scores), "head {head}, cut {cut:x} of {self:?}");
            if c.histogram {
                let mut bins = vec![0u32; SCORE_BINS];
                scores.iter().for_each(|&x| bins[bin_of(x)] += 1);
                assert_eq!(scanned.histogram[head * SCORE_BINS..][..SCORE_BINS], bins, "head {head} of {self:?}");
            }
        }
        assert!(lab.counters(&workspace, plan.workspace()).iter().all(|&x| x == 0), "counters of {self:?}");
    }
}
