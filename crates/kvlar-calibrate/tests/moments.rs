//! Streaming second moments.

use crate::common::{close, mat, near, says};
use kvlar_calibrate::{LayerShape, Moments, SecondMoment};
use kvlar_reference::testing::Rng;

const SHAPE: LayerShape = LayerShape { q_heads: 6, kv_heads: 3, head_dim: 8, value_dim: 4 };

fn window(rng: &mut Rng, n: usize) -> [Vec<f32>; 3] {
    [rng.normals(n * 48, 1.0), rng.normals(n * 24, 2.0), rng.normals(n * 12, 0.5)]
}

#[test]
fn sums_are_those_of_all_rows_however_they_arrive() {
    for seed in 0..4 {
        let mut rng = Rng::new(seed);
        let (mut whole, mut parts, mut other) =
            (Moments::new(SHAPE).unwrap(), Moments::new(SHAPE).unwrap(), Moments::new(SHAPE).unwrap());
        let mut all: [Vec<f32>; 3] = Default::default();
        for (i, n) in [1, 300, 0, 257, 64].into_iter().enumerate() {
            let w = window(&mut rng, n);
            if i % 2 == 0 { &mut parts } else { &mut other }.add(&w[0], &w[1], &w[2]).unwrap();
            all.iter_mut().zip(w).for_each(|(a, w)| a.extend(w));
        }
        whole.add(&all[0], &all[1], &all[2]).unwrap();
        parts.merge(&other).unwrap();
        assert_eq!((whole.rows(), parts.rows()), (622, 622));
        let k = mat(&all[1], 622, 24);
        let expected = k.transpose() * &k;
        for m in [&whole, &parts] {
            near(m.keys().group(&[0, 1, 2]).as_ref(), expected.as_ref(), 1e-13);
            let picked = crate::common::columns(&k, &[2, 0], 8);
            near(m.keys().group(&[2, 0]).as_ref(), (picked.transpose() * &picked).as_ref(), 1e-13);
            for (d, mean) in m.keys().mean().iter().enumerate() {
                close(*mean, (0..622).map(|r| k[(r, d)]).sum::<f64>() / 622.0, 1e-13);
            }
            let centred = kvlar_calibrate::faer::Mat::from_fn(622, 24, |r, c| k[(r, c)] - m.keys().mean()[c]);
            near(m.keys().group_centred(&[0, 1, 2]).as_ref(), (centred.transpose() * &centred).as_ref(), 1e-11);
            close(m.keys().energy(), crate::common::norm2(k.as_ref()), 1e-13);
            for (i, p) in m.query_power().iter().enumerate() {
                let exact = (0..622).map(|r| f64::from(all[0][r * 48 + i]).powi(2)).sum::<f64>() / 622.0;
                close(*p, exact, 1e-13);
            }
            close(m.values().energy(), crate::common::norm2(mat(&all[2], 622, 12).as_ref()), 1e-13);
        }
    }
}

#[test]
fn sums_of_integers_are_exact() {
    let mut m = SecondMoment::new(2, 1);
    m.add("y", &[1.0, 2.0, -3.0, 4.0, 0.0, 5.0]).unwrap();
    assert_eq!(m.product((0, 0), (0, 0)), 10.0);
    assert_eq!(m.product((0, 0), (1, 0)), -10.0);
    assert_eq!(m.product((1, 0), (0, 0)), -10.0);
    assert_eq!(m.product((1, 0), (1, 0)), 45.0);
    assert_eq!((m.mean()[0] * 3.0).round(), -2.0);
}

#[test]
fn non_finite_numbers_are_named_and_nothing_is_added() {
    let mut rng = Rng::new(9);
    let mut m = Moments::new(SHAPE).unwrap();
    let w = window(&mut rng, 5);
    m.add(&w[0], &w[1], &w[2]).unwrap();
    let before = (m.rows(), m.keys().group(&[0, 1, 2]), m.query_power(), m.values().energy());
    for (tensor, width, name) in [(0, 48, "q"), (1, 24, "k"), (2, 12, "v")] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut broken = window(&mut rng, 5);
            broken[tensor][3 * width + 2] = bad;
            says(m.add(&broken[0], &broken[1], &broken[2]), &[&format!("{name}: row 3"), &f64::from(bad).to_string()]);
            let after = (m.rows(), m.keys().group(&[0, 1, 2]), m.query_power(), m.values().energy());
            assert!(before == after, "something was added");
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let mut m = Moments::new(SHAPE).unwrap();
    let w = window(&mut Rng::new(1), 4);
    says(m.add(&w[0], &w[1][1..], &w[2]), &["k:", "95 elements"]);
    says(m.add(&w[0][48..], &w[1], &w[2]), &["q:", "rows of k"]);
    says(m.add(&w[0], &w[1], &w[2][..12]), &["v:", "rows of k"]);
    assert_eq!(m.rows(), 0);
    says(m.merge(&Moments::new(LayerShape { head_dim: 4, ..SHAPE }).unwrap()), &["moments", "one layer"]);
    says(Moments::new(LayerShape { kv_heads: 4, ..SHAPE }), &["4 kv heads do not divide 6"]);
    says(Moments::new(LayerShape { kv_heads: 0, ..SHAPE }), &["zero size"]);
}
