//! What must hold whatever the numbers are, on random shapes that shrink to the least that fails.

use kvlar::{Codec, Dtype, MergeShape, Schedule};
use kvlar_reference::compare::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_tests::Lab;
use kvlar_tests::attend::{AttendCase, AttendData, AttendRun};
use kvlar_tests::pages::Layout;
use proptest::prelude::*;

/// The emulation in lane order; the reference in a build without it.
fn lab() -> Lab {
    Lab::emulated().into_iter().next().unwrap_or_else(Lab::reference)
}

fn case() -> impl Strategy<Value = AttendCase> {
    let dims = prop_oneof![Just(8usize), Just(64), Just(80), Just(128), Just(256)];
    let shape = (dims, 1..4usize, 1..5usize, 1..4usize, proptest::collection::vec(0..90usize, 1..4));
    (shape, any::<bool>(), any::<bool>(), 0..60u32, 1..1_000_000u64).prop_map(
        |((d, kv_heads, group, rows, lengths), int8, own, window, seed)| {
            AttendCase::new(Dtype::Bf16, (kv_heads * group, kv_heads), d, &lengths).with(|c| {
                (c.query_rows, c.window, c.seed) = (rows, window, seed);
                let codec = if int8 { Codec::Int8 } else { Codec::Bf16 };
                c.segments[0].set_formats(codec, codec);
                c.schedule = if own { Schedule::Own } else { Schedule::Balanced };
            })
        },
    )
}

fn run(lab: &Lab, case: &AttendCase) -> (Vec<u32>, Vec<f32>) {
    let mut run = AttendRun::new(lab, &AttendData::new(case));
    run.enqueue();
    let r = run.result();
    (r.out.iter().chain(&r.lse).map(|x| x.to_bits()).collect(), r.out)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Where rows lie does not change a bit of the result.
    #[test]
    fn layouts_give_equal_bits(case in case()) {
        let lab = lab();
        let with = |layout| run(&lab, &case.clone().with(|c| c.segments[0].layout = layout)).0;
        let contiguous = with(Layout::Contiguous);
        prop_assert_eq!(&contiguous, &with(Layout::Hnd(16)));
        prop_assert_eq!(&contiguous, &with(Layout::Hnd(64)));
        if case.segments[0].keys.format.codec != Codec::Int8 {
            prop_assert_eq!(&contiguous, &with(Layout::Nhd(32)));
        }
    }

    /// An output is a weighted mean of values: it lies between the least and the largest of each dimension.
    #[test]
    fn outputs_are_means_of_values(case in case()) {
        let lab = lab();
        let data = AttendData::new(&case);
        let (out, dv) = (run(&lab, &case).1, case.value_dim);
        for (i, row) in out.chunks(dv).enumerate() {
            let (seq, head) = (i / case.query_rows / case.q_heads, i / case.query_rows % case.q_heads);
            let values = data.dense_head(seq, head * case.kv_heads / case.q_heads).values;
            for (j, x) in row.iter().enumerate() {
                let column = values.iter().skip(j).step_by(dv);
                let (low, high) = column.fold((0f32, 0f32), |(l, h), &v| (l.min(v), h.max(v))); // 0: no visible row
                prop_assert!((low - 0.02..=high + 0.02).contains(x), "row {} dimension {}: {} outside {}..{}", i, j, x, low, high);
            }
        }
    }

    /// The order and the grouping of parts do not matter to a merge.
    #[test]
    fn merging_is_commutative_and_associative(n in 2..7usize, rows in 1..4usize, dim in 1..70usize, seed in any::<u64>()) {
        let lab = lab();
        let mut rng = Rng::new(seed);
        let (parts, lse) = (rng.normals(n * rows * dim, 1.0), rng.normals(n * rows, 4.0));
        let merge = |parts: &[f32], lse: &[f32]| {
            let n = lse.len() / rows;
            let (p, l) = (lab.upload(parts), lab.upload(lse));
            let (mut out, mut merged) = (lab.poisoned(4 * rows * dim), lab.poisoned(4 * rows));
            let plan = MergeShape { parts: n, rows, dim }.plan(&lab.device).unwrap();
            plan.launch(&lab.stream, p.view(), l.view(), &mut out.view_mut(), &mut merged.view_mut()).unwrap();
            (lab.download::<f32>(&out), lab.download::<f32>(&merged))
        };
        let whole = merge(&parts, &lse);
        let order = rng.permutation(n);
        let permute = |x: &[f32], len: usize| order.iter().flat_map(|&p| x[p * len..(p + 1) * len].to_vec()).collect::<Vec<_>>();
        let permuted = merge(&permute(&parts, rows * dim), &permute(&lse, rows));
        let cut = 1 + rng.below(n - 1);
        let (a, b) = (merge(&parts[..cut * rows * dim], &lse[..cut * rows]), merge(&parts[cut * rows * dim..], &lse[cut * rows..]));
        let grouped = merge(&[a.0, b.0].concat(), &[a.1, b.1].concat());
        for other in [permuted, grouped] {
            prop_assert_eq!(compare(&other.0, &whole.0, Tolerance::merge()), Ok(()));
            prop_assert_eq!(compare(&other.1, &whole.1, Tolerance::merge()), Ok(()));
        }
    }
}
