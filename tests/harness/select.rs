//! Cases of topk.

use crate::Lab;
use kvlar::{Buffer, Ks, SCORE_BINS, TopkArgs, TopkShape, Workspace};
use kvlar_reference::testing::Rng;
use kvlar_reference::{ordered_key, ordered_row};

/// Sets of rows of scores, and how many are kept.
#[derive(Clone, Debug)]
pub struct TopkCase {
    pub shape: TopkShape,
    pub scores: Vec<f32>,
    /// Scores between rows.
    pub stride: usize,
    pub lengths: Option<Vec<i32>>,
    /// Neighbouring rows that share a length.
    pub length_rows: usize,
    /// Whether a histogram of the scores is given.
    pub histogram: bool,
    pub ks: Option<Vec<i32>>,
}

impl TopkCase {
    pub fn new(batch: usize, rows: usize, k: usize, scores: Vec<f32>) -> Self {
        let shape = TopkShape::new(batch, rows, k);
        Self { shape, scores, stride: rows, lengths: None, length_rows: 1, histogram: false, ks: None }
    }

    pub fn one(scores: &[f32], k: usize) -> Self {
        Self::new(1, scores.len(), k, scores.to_vec())
    }

    pub fn normal(seed: u64, batch: usize, rows: usize, k: usize) -> Self {
        Self::new(batch, rows, k, Rng::new(seed).normals(batch * rows, 2.0))
    }

    /// `batch` sets of `members` rows.
    pub fn sets(seed: u64, (batch, members): (usize, usize), rows: usize, k: usize) -> Self {
        let mut case = Self::normal(seed, batch * members, rows, k);
        case.shape = TopkShape { batch, members, ..case.shape };
        case
    }

    pub fn forced(mut self, sink_rows: usize, recent_rows: usize) -> Self {
        self.shape = TopkShape { sink_rows, recent_rows, ..self.shape };
        self
    }

    pub fn strict(mut self) -> Self {
        self.shape.strict = true;
        self
    }

    pub fn floor(mut self, floor: usize) -> Self {
        self.shape.floor = floor;
        self
    }

    fn length(&self, row: usize) -> usize {
        let length = |l: &Vec<i32>| l[row / self.length_rows].clamp(0, self.shape.rows as i32) as usize;
        self.lengths.as_ref().map_or(self.shape.rows, length)
    }

    /// How many scores of each row are in each bin.
    fn counted(&self) -> Vec<u32> {
        let mut bins = vec![0; self.shape.batch * self.shape.members * SCORE_BINS];
        for (row, bins) in bins.chunks_exact_mut(SCORE_BINS).enumerate() {
            (0..self.length(row)).for_each(|i| bins[ordered_key(self.score(row, i)) as usize >> 21] += 1);
        }
        bins
    }

    /// The `floor` best scores of a row that are not forced.
    fn floor_of(&self, row: usize) -> Vec<usize> {
        let mut free: Vec<usize> = (0..self.length(row)).filter(|&i| !self.is_forced(row, i)).collect();
        free.sort_by_key(|&i| std::cmp::Reverse(ordered_row(self.score(row, i), i as u32)));
        free.truncate(self.shape.floor);
        free
    }

    fn score(&self, row: usize, i: usize) -> f32 {
        self.scores[row * self.stride + i]
    }

    fn is_forced(&self, row: usize, i: usize) -> bool {
        i < self.shape.sink_rows || i >= self.length(row).saturating_sub(self.shape.recent_rows)
    }

    /// Scores kept of each row, by sorting those of a set.
    pub fn expected(&self) -> Vec<Vec<i32>> {
        let TopkShape { batch, members, rows, k, strict, .. } = self.shape;
        let mut kept = vec![Vec::new(); batch * members];
        for set in 0..batch {
            let all = (set * members..(set + 1) * members).flat_map(|row| (0..self.length(row)).map(move |i| (row, i)));
            let floors: Vec<Vec<usize>> = (0..members).map(|m| self.floor_of(set * members + m)).collect();
            let is_kept = |(row, i): (usize, usize)| self.is_forced(row, i) || floors[row % members].contains(&i);
            let (forced, free): (Vec<_>, Vec<_>) = all.partition(|&at| is_kept(at));
            forced.iter().for_each(|&(row, i)| kept[row].push(i as i32));
            let place = |(row, i)| (ordered_row(self.score(row, i), (row % members * rows + i) as u32), row, i);
            let mut free: Vec<(u64, usize, usize)> = free.into_iter().map(place).collect();
            free.sort_unstable_by(|a, b| b.cmp(a));
            let k = self.ks.as_ref().map_or(k, |ks| (ks[set % ks.len()].max(0) as usize).min(k));
            let mut count = k.saturating_sub(forced.len()).min(free.len());
            if strict && count > 0 {
                let least = free[count - 1].0 >> 32;
                count = free.iter().filter(|x| x.0 >> 32 > least).count();
            }
            free[..count].iter().for_each(|&(_, row, i)| kept[row].push(i as i32));
        }
        kept.iter_mut().for_each(|rows| rows.sort_unstable());
        kept
    }

    /// Checks every output, and gives the scores kept of each row.
    pub fn check(&self, lab: &Lab) -> Vec<Vec<i32>> {
        let TopkShape { batch, members, rows, k, .. } = self.shape;
        let (plan, all) = (self.shape.plan(&lab.device).unwrap(), batch * members);
        let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
        let upload = |x: &Option<Vec<i32>>| x.as_ref().map(|x| lab.upload(x));
        let (scores, lengths, ks) = (lab.upload(&self.scores), upload(&self.lengths), upload(&self.ks));
        let histogram = self.histogram.then(|| lab.upload(&self.counted()));
        let cut_count = if self.shape.floor > 0 { all } else { batch };
        let [cuts, counts, mask] = [8 * cut_count, 4 * all, all * rows].map(|bytes| lab.poisoned(bytes));
        let listed = vec![7i32; if members == 1 { batch * k } else { 0 }]; // poison is -1
        let mut outputs: [Buffer; 4] = [cuts, counts, lab.upload(&listed), mask];
        let [cuts, counts, selected, mask] = &mut outputs;
        let each = self.ks.as_ref().is_some_and(|ks| ks.len() > 1);
        let mut args = TopkArgs {
            scores: scores.view(),
            score_stride: Some(self.stride),
            lengths: lengths.as_ref().map(|x| x.view()),
            length_rows: self.length_rows,
            histogram: histogram.as_ref().map(|x| x.view()),
            ks: ks.as_ref().map(|x| if each { Ks::Each(x.view()) } else { Ks::One(x.view()) }),
            cuts: Some(cuts.view_mut()),
            counts: Some(counts.view_mut()),
            selected: (members == 1).then(|| selected.view_mut()),
            mask: Some(mask.view_mut()),
        };
        for _ in 0..2 {
            plan.launch(&lab.stream, &mut args, &mut workspace).unwrap();
        }
        let (cuts, counts): (Vec<u64>, Vec<i32>) = (lab.download(&outputs[0]), lab.download(&outputs[1]));
        let (selected, mask): (Vec<i32>, Vec<u8>) = (lab.download(&outputs[2]), lab.download(&outputs[3]));
        let expected = self.expected();
        for (row, kept) in expected.iter().enumerate() {
            let what = format!("row {row} of {:?}", self.shape);
            assert_eq!(counts[row], kept.len() as i32, "{what}");
            if members == 1 {
                let listed = &selected[row * k..(row + 1) * k];
                assert_eq!(&listed[..kept.len()], kept, "{what}");
                assert!(listed[kept.len()..].iter().all(|&i| i == -1), "{what}: {listed:?}");
            }
            let marked: Vec<i32> = (0..rows).filter(|&i| mask[row * rows + i] != 0).map(|i| i as i32).collect();
            assert_eq!(&marked, kept, "{what}: mask");
            assert!(mask.iter().all(|&x| x < 2), "{what}: mask");
            // The cut says the same to whoever has the scores.
            let cut = cuts[if self.shape.floor > 0 { row } else { row / members }];
            let place = |i: usize| ordered_row(self.score(row, i), (row % members * rows + i) as u32);
            let by_cut = (0..self.length(row)).filter(|&i| self.is_forced(row, i) || place(i) >= cut);
            assert_eq!(by_cut.map(|i| i as i32).collect::<Vec<_>>(), *kept, "{what}: cut {cut:x}");
        }
        assert!(lab.counters(&workspace, plan.workspace()).iter().all(|&x| x == 0), "counters of {:?}", self.shape);
        expected
    }
}
