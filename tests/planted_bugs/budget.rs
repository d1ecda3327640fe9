//! Bugs of budgets.

use super::{Bug, Compiler, Suite, bug};
use kvlar::LayerBudget::{DynamicKv, Pyramid, Uniform};
use kvlar_tests::Lab;
use kvlar_tests::budget::{HeadsCase, LayersCase, Scores};

pub const SUITE: Suite = Suite { name: "budget", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const BUGS: &[Bug] = &[
    bug("lengths of other sequences", "budget/budget.cu", "p.lengths + set / int(p.length_sets)", "p.lengths"),
    bug("lengths beyond the capacity", "budget/budget.cu", "min(rows, int(__ldg(", "max(0, int(__ldg("),
    bug("the smallest rests first", "budget/budget.cu", "rank += x > rest", "rank += x < rest"),
    bug("ties to the higher layer", "budget/budget.cu", "other < own", "other > own"),
    bug("one row too many", "budget/budget.cu", "rank < left", "rank <= left"),
    bug("floors alone", "budget/budget.cu", "return whole + (active && rank < left);", "return whole;"),
    bug("counts of the first head", "budget/budget.cu", "count += __ldg(", "count = __ldg("),
    bug(
        "counts as far apart as all layers",
        "budget/budget.cu",
        "(int64_t(set) * seen + layer) * p.heads",
        "(int64_t(set) * p.layers + layer) * p.heads",
    ),
    bug(
        "the layers seen share their own rows",
        "budget/budget.cu",
        "min(int(p.base), rows) * int(p.layers)",
        "min(int(p.base), rows) * seen",
    ),
    bug(
        "budgets grow again",
        "budget/budget.cu",
        "layer < int(p.known) ? p.budgets[int64_t(set) * p.layers + layer] : most",
        "most",
    ),
    bug(
        "another sequence's budgets",
        "budget/budget.cu",
        "p.budgets[int64_t(set) * p.layers + layer] : most",
        "p.budgets[layer] : most",
    ),
    bug("layers not seen have none", "budget/budget.cu", "if (layer >= seen) return most;", "if (layer >= seen) return 0;"),
    bug("more than a layer has", "budget/budget.cu", "most = min(int(p.most), rows)", "most = int(p.most)"),
    bug(
        "a line upside down",
        "budget/budget.cu",
        "max_beta * (steps - layer) + min_beta * layer",
        "max_beta * layer + min_beta * (steps - layer)",
    ),
    bug(
        "a line beyond the rows",
        "budget/budget.cu",
        "min((2 * p.beta - 1) * base, uint64_t(rows) * p.beta)",
        "(2 * p.beta - 1) * base",
    ),
    bug("a line of all that fits", "budget/budget.cu", "int(p.base) < rows && p.layers > 1", "p.layers > 1"),
    bug(
        "budgets of the first sequence",
        "budget/budget.cu",
        "const int64_t at = int64_t(set) * p.layers + layer;",
        "const int64_t at = layer;",
    ),
    bug("rows that are always kept are left out", "budget/budget.cu", "budget + int(p.forced);", "budget;"),
    bug("halves away from zero", "budget/budget.cu", "rint(", "round("),
    bug("alpha for its rest", "budget/budget.cu", "__dmul_rn(count, p.head_share)", "__dmul_rn(count, 1. - p.head_share)"),
    bug("the floor left out", "budget/budget.cu", "p.head_share), floor));", "p.head_share), 0 * floor));"),
    bug(
        "heads of more rows than there are",
        "budget/budget.cu",
        "int(budget < double(rows) ? budget : double(rows))",
        "int(budget)",
    ),
    bug("rows of a set laid close", "select/order.cuh", "/ p.members * p.set_rows + member", "/ p.members * p.members + member"),
];

const SOURCE: &str = r#"
#include "select/topk.cu"
#include "select/set.cu"
#include "budget/budget.cu"
"#;

/// A short form of the suites.
fn short_suites(lab: &Lab) {
    let mut case = LayersCase::new(DynamicKv, Scores::random(3, [2, 3, 2], 30), 7);
    case.shape.interval = 2;
    case.shape.forced_rows = 4;
    case.scores.lengths = Some(vec![40, 9]);
    case.check(lab);
    // A layer that dominates the first round, and one that the second.
    let mut late = Scores::random(4, [2, 3, 1], 30);
    late.values[..30].iter_mut().for_each(|x| *x += 100.0);
    late.values[60..90].iter_mut().for_each(|x| *x += 200.0);
    let mut late = LayersCase::new(DynamicKv, late, 5);
    (late.shape.interval, late.shape.r_max) = (2, 2.0);
    late.check(lab);
    // A layer that has none of the best at first would have some in the end: its rows are gone by then.
    let mut gone: Vec<f32> = (0..90).map(|i| (i * 7 % 30) as f32 - if i < 60 { 0.0 } else { 500.0 }).collect();
    gone[..30].fill(-1000.0);
    gone[..10].fill(1000.0);
    let mut gone = LayersCase::new(DynamicKv, Scores::new([1, 3, 1], 30, gone), 5);
    gone.shape.interval = 2;
    assert_eq!(gone.check(lab), [[10, 0, 0]]);
    for (method, base) in [(Pyramid, 9), (Pyramid, 14), (Uniform, 9)] {
        let mut case = LayersCase::new(method, Scores::random(1, [3, 5, 1], 20), base);
        case.scores.lengths = Some(vec![20, 9, 99]);
        case.check(lab);
    }
    for alpha in [0.1, 0.5] {
        let mut heads = HeadsCase::new(Scores::random(6, [2, 2, 2], 40), 7, alpha);
        heads.shape.forced_rows = 2;
        heads.scores.lengths = Some(vec![40, 3]);
        heads.check(lab);
    }
    // Counts of all sizes: every other budget is a half.
    for own in [1, 3, 5] {
        let best = |i: usize| if i < own { 9.0 } else { 0.0 };
        let others = |i: usize| if i < 6 - own { 8.0 } else { -1.0 };
        let scores = (0..10).map(best).chain((0..10).map(others)).collect();
        HeadsCase::new(Scores::new([1, 1, 2], 10, scores), 3, 0.5).check(lab);
    }
    HeadsCase::new(Scores::random(7, [1, 1, 2], 500), 300, 0.45).check(lab);
}
