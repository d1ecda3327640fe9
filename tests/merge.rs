//! merge against the reference, and as what it means: attention over a union of rows.

use kvlar::MergeShape;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{AttendInput, compare};
use kvlar_tests::{Lab, on_every_device};

on_every_device!(random_parts, parts_without_rows, parts_of_attention_give_the_whole);

fn merge(lab: &Lab, parts: &[f32], lse: &[f32], n: usize, rows: usize, dim: usize) -> (Vec<f32>, Vec<f32>) {
    let (p, l) = (lab.upload(parts), lab.upload(lse));
    let (mut out, mut merged) = (lab.poisoned(4 * rows * dim), lab.poisoned(4 * rows));
    let plan = MergeShape { parts: n, rows, dim }.plan(&lab.device).expect("a plan");
    plan.launch(&lab.stream, p.view(), l.view(), &mut out.view_mut(), &mut merged.view_mut()).expect("merge");
    (lab.download(&out), lab.download(&merged))
}

fn check(lab: &Lab, parts: &[f32], lse: &[f32], n: usize, rows: usize, dim: usize) {
    let (out, merged) = merge(lab, parts, lse, n, rows, dim);
    let expected = kvlar_reference::merge(parts, lse, n, rows, dim).expect("a valid case");
    compare::compare(&merged, &expected.1, Tolerance::merge()).unwrap_or_else(|e| panic!("lse: {e}"));
    compare::compare(&out, &expected.0, Tolerance::merge()).unwrap_or_else(|e| panic!("out: {e}"));
}

fn random_parts(lab: &Lab) {
    for (seed, (n, rows, dim)) in
        [(1, 1, 8), (2, 3, 64), (5, 17, 80), (9, 4, 256), (33, 2, 1), (3, 5, 300)].into_iter().enumerate()
    {
        let mut rng = Rng::new(seed as u64);
        let (parts, lse) = (rng.normals(n * rows * dim, 1.0), rng.normals(n * rows, 8.0));
        check(lab, &parts, &lse, n, rows, dim);
    }
}

fn parts_without_rows(lab: &Lab) {
    let mut rng = Rng::new(4);
    let (n, rows, dim) = (4, 3, 32);
    let mut parts = rng.normals(n * rows * dim, 1.0);
    let mut lse = rng.normals(n * rows, 2.0);
    // Row 1: nothing at all. Row 2: one part only. What a vanished part holds does not matter.
    for p in 0..n {
        lse[p * rows + 1] = f32::NEG_INFINITY;
        if p != 2 {
            lse[p * rows + 2] = f32::NEG_INFINITY;
            parts[(p * rows + 2) * dim..][..dim].fill(f32::NAN);
        }
    }
    let (out, merged) = merge(lab, &parts, &lse, n, rows, dim);
    assert!(out[dim..2 * dim].iter().all(|&x| x == 0.0) && merged[1] == f32::NEG_INFINITY);
    check(lab, &parts, &lse, n, rows, dim);
}

fn parts_of_attention_give_the_whole(lab: &Lab) {
    let (d, t) = (16, 50);
    let mut rng = Rng::new(8);
    let (q, k, v) = (rng.normals(d, 1.0), rng.normals(t * d, 1.0), rng.normals(t * d, 1.0));
    let attend = |rows: std::ops::Range<usize>| {
        let input = AttendInput {
            seqs: 1,
            q_heads: 1,
            kv_heads: 1,
            query_rows: 1,
            rows: rows.len(),
            head_dim: d,
            value_dim: d,
            q: &q,
            k: &k[rows.start * d..rows.end * d],
            v: &v[rows.start * d..rows.end * d],
            ..Default::default()
        };
        kvlar_reference::attend(&input).expect("a valid case")
    };
    let (whole, parts) = (attend(0..t), [attend(0..13), attend(13..14), attend(14..t)]);
    let outs: Vec<f32> = parts.iter().flat_map(|p| p.out.clone()).collect();
    let lse: Vec<f32> = parts.iter().flat_map(|p| p.lse.clone()).collect();
    let (out, merged) = merge(lab, &outs, &lse, 3, 1, d);
    compare::compare(&out, &whole.out, Tolerance::merge()).unwrap_or_else(|e| panic!("{e}"));
    compare::compare(&merged, &whole.lse, Tolerance::merge()).unwrap_or_else(|e| panic!("{e}"));
}
