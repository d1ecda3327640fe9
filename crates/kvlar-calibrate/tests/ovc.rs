//! OVC: `recalkv.md` §0.2 and §7 invariant 4.

use crate::common::{close, mat, mixed, near, norm2, says};
use kvlar_calibrate::basis::{eigen, leading, trace};
use kvlar_calibrate::faer::Mat;
use kvlar_calibrate::ovc::{Factorization, factorize, floor, left_vectors, power};
use kvlar_reference::testing::Rng;

struct Case {
    w: Mat<f64>,
    x: Mat<f64>,
    c: Mat<f64>,
}

fn case(seed: u64, n: usize, d: usize, m: usize) -> Case {
    let mut rng = Rng::new(seed);
    let w = mat(&mixed(&mut rng, d, m, 6, 0.5), d, m);
    let x = mat(&mixed(&mut rng, n, m, 8, 0.3), n, m);
    let y = &x * w.transpose();
    Case { c: y.transpose() * &y, w, x }
}

fn loss(case: &Case, f: &Factorization) -> f64 {
    norm2((&case.x * case.w.transpose() - &case.x * f.right.transpose() * f.left.transpose()).as_ref())
}

#[test]
fn rounds_never_lose_more_and_converge_to_the_floor() {
    let mut gained = 0;
    for seed in 0..5 {
        let (d, m, rank) = (10, 14, 4);
        let case = case(seed, 60, d, m);
        let least = floor(case.w.as_ref(), case.x.as_ref(), rank).unwrap();
        let eigenvalues = eigen(case.c.as_ref()).unwrap().values;
        close(least, eigenvalues[rank..].iter().sum(), 1e-10);
        let mut last = f64::INFINITY;
        for rounds in 0..6 {
            let f = factorize(case.w.as_ref(), case.x.as_ref(), rank, rounds).unwrap();
            close(f.error, loss(&case, &f), 1e-9);
            assert!(f.error <= last * (1.0 + 1e-10), "round {rounds} loses more");
            assert!(f.error >= least * (1.0 - 1e-10), "below the floor");
            gained += usize::from(rounds == 1 && f.error < 0.99 * last);
            last = f.error;
        }
        let settled = factorize(case.w.as_ref(), case.x.as_ref(), rank, 400).unwrap();
        assert!(settled.error <= least * 1.0001, "{} after many rounds, the floor is {least}", settled.error);
    }
    assert!(gained >= 4, "OVC gained nothing over the plain SVD in these cases");
}

#[test]
fn the_start_is_the_plain_svd() {
    let case = case(7, 30, 9, 12);
    let f = factorize(case.w.as_ref(), case.x.as_ref(), 5, 0).unwrap();
    let svd = case.w.thin_svd().unwrap();
    let tail: f64 = svd.S().column_vector().iter().skip(5).map(|s| s * s).sum();
    close(norm2((&case.w - &f.left * &f.right).as_ref()), tail, 1e-10);
    // Balanced: both factors carry the root of each singular value.
    for i in 0..5 {
        let s = svd.S().column_vector()[i];
        close(norm2(f.left.subcols(i, 1)), s, 1e-10);
        close(norm2(f.right.subrows(i, 1)), s, 1e-10);
    }
}

#[test]
fn one_round_is_one_power_iteration() {
    for seed in 0..5 {
        let (d, m, rank) = (10, 14, 4);
        let case = case(seed + 20, 60, d, m);
        for rounds in 0..4 {
            let f = factorize(case.w.as_ref(), case.x.as_ref(), rank, rounds).unwrap();
            let u = power(case.c.as_ref(), left_vectors(case.w.as_ref(), rank).unwrap(), rounds).unwrap();
            near((u.transpose() * &u).as_ref(), Mat::<f64>::identity(rank, rank).as_ref(), 1e-12);
            near((&f.left * &f.right).as_ref(), (&u * (u.transpose() * &case.w)).as_ref(), 1e-8);
            let kept = u.transpose() * &case.c * &u;
            close(f.error, trace(case.c.as_ref()) - trace(kept.as_ref()), 1e-8);
        }
    }
}

#[test]
fn on_whitened_data_it_changes_nothing() {
    // Started from the leading eigenvectors of C, which whitened SVD gives, a round stays where it is.
    for seed in 0..4 {
        let case = case(seed + 40, 60, 10, 14);
        let u = leading(&eigen(case.c.as_ref()).unwrap(), 4);
        let after = power(case.c.as_ref(), u.clone(), 1).unwrap();
        near((&after * after.transpose()).as_ref(), (&u * u.transpose()).as_ref(), 1e-9);
    }
}

#[test]
fn data_that_spans_less_than_the_rank() {
    // Fewer rows than the rank: the outputs can be met exactly.
    let case = case(50, 3, 10, 14);
    let f = factorize(case.w.as_ref(), case.x.as_ref(), 6, 1).unwrap();
    assert!(f.error <= 1e-18 * norm2((&case.x * case.w.transpose()).as_ref()).max(1.0), "{}", f.error);
    let finite = |m: &Mat<f64>| m.col_iter().all(|c| c.iter().all(|x| x.is_finite()));
    assert!(finite(&f.left) && finite(&f.right));
    // Inputs of zeros: nothing to lose.
    let zeros = factorize(case.w.as_ref(), Mat::zeros(5, 14).as_ref(), 6, 2).unwrap();
    assert!(zeros.error == 0.0 && finite(&zeros.left) && finite(&zeros.right));
    let u = power(Mat::zeros(4, 4).as_ref(), Mat::identity(4, 2), 1).unwrap();
    assert_eq!(norm2(u.as_ref()), 0.0);
}

#[test]
fn ranks_and_inputs_that_do_not_fit() {
    let case = case(60, 5, 10, 14);
    says(factorize(case.w.as_ref(), case.x.as_ref(), 11, 1), &["rank", "1..=10"]);
    says(factorize(case.w.as_ref(), case.x.as_ref(), 0, 1), &["rank"]);
    says(factorize(case.w.as_ref(), Mat::zeros(0, 14).as_ref(), 2, 1), &["x", "no rows"]);
    says(factorize(case.w.as_ref(), Mat::zeros(5, 13).as_ref(), 2, 1), &["x", "13", "14"]);
}
