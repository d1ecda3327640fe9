//! Bases: `recalkv.md` §7 invariants 2, 3 and 8, the exact rank-1 case, metrics, and rank deficiency.

use crate::common::{close, columns, mat, mixed, near, norm2, says};
use kvlar_calibrate::basis::{GroupBasis, Metric, covariance, eigen, leading, tail, tail_energy, trace};
use kvlar_calibrate::faer::{Mat, MatRef, Side};
use kvlar_calibrate::hadamard::{fold, orthogonal};
use kvlar_calibrate::{PairLayout, RopePairs, SecondMoment};
use kvlar_reference::testing::Rng;

fn projector(b: &GroupBasis) -> Mat<f64> {
    &b.decode * &b.encode
}

#[test]
fn the_discarded_energy_is_the_tail_and_bases_are_nested() {
    for seed in 0..4 {
        let (n, heads, d) = (120, 3, 8);
        let rows = mixed(&mut Rng::new(seed), n, heads * d, 12, 0.1);
        let moment = SecondMoment::of("k", &rows, heads, d).unwrap();
        let group = [2, 0];
        let y = columns(&mat(&rows, n, heads * d), &group, d);
        let spectrum = eigen(covariance(&moment, &group, None, false).as_ref()).unwrap();
        let mut last = f64::INFINITY;
        for rank in 1..=2 * d {
            let b = GroupBasis::new(leading(&spectrum, rank), &group, None);
            let lost = norm2((&y - &y * projector(&b).transpose()).as_ref());
            let scale = trace((y.transpose() * &y).as_ref());
            assert!((lost - tail(&spectrum.values, rank)).abs() <= 1e-12 * scale);
            assert!((b.discarded((y.transpose() * &y).as_ref()) - lost).abs() <= 1e-12 * scale);
            assert!((tail_energy(&moment, &group, None, false, rank).unwrap() - lost).abs() <= 1e-12 * scale);
            assert!(lost <= last + 1e-12 * scale, "a higher rank loses more");
            last = lost;
            let shorter = leading(&spectrum, rank - 1);
            assert!(b.decode.subcols(0, rank - 1) == shorter, "a prefix is not the basis of the lower rank");
            near((b.decode.transpose() * &b.decode).as_ref(), Mat::<f64>::identity(rank, rank).as_ref(), 1e-12);
        }
        assert!(last <= 1e-12 * norm2(y.as_ref()), "full rank is lossless");
    }
}

#[test]
fn whitened_svd_of_weights_is_pca_of_outputs() {
    for seed in 0..4 {
        let (n, m, d, rank) = (90, 20, 12, 5);
        let mut rng = Rng::new(seed);
        let x = mat(&mixed(&mut rng, n, m, 15, 0.2), n, m);
        let w = mat(&rng.normals(d * m, 0.3), d, m);
        let cx = x.transpose() * &x;
        let e = cx.self_adjoint_eigen(Side::Lower).unwrap();
        let by_eigen = Mat::from_fn(m, m, |r, c| e.U()[(r, c)] * e.S().column_vector()[c].sqrt());
        let cholesky = cx.llt(Side::Lower).unwrap().L().to_owned();
        let y = &x * w.transpose();
        let outputs = eigen((y.transpose() * &y).as_ref()).unwrap();
        let u = leading(&outputs, rank);
        for s in [by_eigen, cholesky] {
            let svd = (&w * &s).thin_svd().unwrap();
            let v = svd.U().subcols(0, rank);
            near((v * v.transpose()).as_ref(), (&u * u.transpose()).as_ref(), 1e-9);
            for i in 0..d {
                close(svd.S().column_vector()[i].powi(2), outputs.values[i], 1e-10);
            }
        }
    }
}

#[test]
fn two_constant_keys_are_one_latent() {
    // k₁ = (1, 0), k₂ = (0, 1) in every row: rank 1, z = √2, keys exact.
    let rows: Vec<f32> = [1.0, 0.0, 0.0, 1.0].repeat(7);
    let moment = SecondMoment::of("k", &rows, 2, 2).unwrap();
    let spectrum = eigen(covariance(&moment, &[0, 1], None, false).as_ref()).unwrap();
    close(spectrum.values[0], 14.0, 1e-14);
    assert!(tail(&spectrum.values, 1) <= 1e-13);
    let b = GroupBasis::new(leading(&spectrum, 1), &[0, 1], None);
    let k = Mat::from_fn(4, 1, |r, _| f64::from(rows[r]));
    let z = &b.encode * &k;
    close(z[(0, 0)].abs(), 2f64.sqrt(), 1e-14);
    let back = &b.decode * &z;
    near(back.as_ref(), k.as_ref(), 1e-14);
    // One frequency of π/2: at distance t the key has turned by t quarter turns and q = (1, 0) sees 1, 0, −1, 0.
    let seen: Vec<f64> = (0..4)
        .map(|t| {
            let angle = f64::from(t) * std::f64::consts::FRAC_PI_2;
            angle.cos() * back[(0, 0)] - angle.sin() * back[(1, 0)]
        })
        .collect();
    for (s, expected) in seen.iter().zip([1.0, 0.0, -1.0, 0.0]) {
        close(*s, expected, 1e-14);
    }
}

#[test]
fn missing_directions_are_zero_columns() {
    for seed in 0..4 {
        let rows = mixed(&mut Rng::new(seed), 50, 12, 3, 0.0);
        let moment = SecondMoment::of("k", &rows, 2, 6).unwrap();
        let spectrum = eigen(covariance(&moment, &[0, 1], None, false).as_ref()).unwrap();
        // Rounded to f32, rank-3 rows have more directions than 3, of about 1e-15 of the energy: below what is kept.
        let u = leading(&spectrum, 16);
        assert_eq!((u.nrows(), u.ncols()), (12, 16));
        let gram = u.transpose() * &u;
        for r in 0..16 {
            for c in 0..16 {
                let expected = if r == c && r < 3 { 1.0 } else { 0.0 };
                assert!((gram[(r, c)] - expected).abs() < 1e-12, "column {r} times column {c} is {}", gram[(r, c)]);
            }
        }
    }
    let zeros = SecondMoment::of("k", &[0.0; 8], 2, 2).unwrap();
    let u = leading(&eigen(zeros.group(&[0, 1]).as_ref()).unwrap(), 2);
    assert_eq!(norm2(u.as_ref()), 0.0);
}

/// Least Σ ‖G(y − ŷ)‖² of any projector, by SVD of the weighted rows.
fn floor(y: &Mat<f64>, g: MatRef<'_, f64>, rank: usize) -> f64 {
    let singular = (y * g.transpose()).singular_values().unwrap();
    singular.iter().skip(rank).map(|s| s * s).sum()
}

#[test]
fn a_metric_minimizes_its_own_error_and_is_exact_at_full_rank() {
    for seed in 0..4 {
        let (n, heads, d, rank) = (100, 2, 6, 4);
        let mut rng = Rng::new(seed);
        let rows = mixed(&mut rng, n, heads * d, 10, 0.2);
        let moment = SecondMoment::of("k", &rows, heads, d).unwrap();
        let group = [1, 0];
        let y = columns(&mat(&rows, n, heads * d), &group, d);
        let power: Vec<f64> = (0..2 * heads * d).map(|_| rng.uniform() * 4.0).collect();
        let rope = RopePairs { rotary_dim: d, layout: PairLayout::Half };
        let out = rng.normals(10 * 2 * heads * d, 1.0);
        let metrics =
            [Metric::query(&power, 2 * heads, heads, d, rope).unwrap(), Metric::output(&out, 10, 2 * heads, heads, d).unwrap()];
        for (which, metric) in metrics.iter().enumerate() {
            let g = metric.forward(&group, Mat::<f64>::identity(2 * d, 2 * d).as_ref());
            // The metric is what it says it is.
            let gg = g.transpose() * &g;
            for (slot, h) in group.iter().enumerate() {
                for (a, b) in (0..d).flat_map(|a| (0..d).map(move |b| (a, b))) {
                    let expected: f64 = if which == 0 {
                        let pair = |q: usize| power[q * d + a] + power[q * d + (a + d / 2) % d];
                        if a == b { (pair(2 * h) + pair(2 * h + 1)) / 4.0 } else { 0.0 }
                    } else {
                        let w = |r: usize, q: usize, i: usize| f64::from(out[(r * 2 * heads + q) * d + i]);
                        (0..10).flat_map(|r| [2 * h, 2 * h + 1].map(|q| w(r, q, a) * w(r, q, b))).sum()
                    };
                    close(gg[(slot * d + a, slot * d + b)], expected, 1e-10);
                }
            }
            let spectrum = eigen(covariance(&moment, &group, Some(metric), false).as_ref()).unwrap();
            let error = |b: &GroupBasis| norm2(((&y - &y * projector(b).transpose()) * g.transpose()).as_ref());
            let b = GroupBasis::new(leading(&spectrum, rank), &group, Some(metric));
            close(error(&b), floor(&y, g.as_ref(), rank), 1e-9);
            close(tail(&spectrum.values, rank), floor(&y, g.as_ref(), rank), 1e-9);
            let plain = GroupBasis::new(leading(&eigen(moment.group(&group).as_ref()).unwrap(), rank), &group, None);
            assert!(error(&plain) > error(&b) * 1.001, "the metric changed nothing");
            near((&b.encode * &b.decode).as_ref(), Mat::<f64>::identity(rank, rank).as_ref(), 1e-9);
            let full = GroupBasis::new(leading(&spectrum, 2 * d), &group, Some(metric));
            near(projector(&full).as_ref(), Mat::<f64>::identity(2 * d, 2 * d).as_ref(), 1e-9);
        }
    }
}

#[test]
fn weightless_dimensions_leave_the_metric_invertible() {
    let mut power = vec![1.0; 8];
    power[1] = 0.0;
    power[5] = 0.0; // the pair of 1, in a head of 8
    let rope = RopePairs { rotary_dim: 8, layout: PairLayout::Half };
    for power in [power, vec![0.0; 8]] {
        let metric = Metric::query(&power, 1, 1, 8, rope).unwrap();
        let eye = Mat::<f64>::identity(8, 8);
        near(metric.inverse(&[0], metric.forward(&[0], eye.as_ref()).as_ref()).as_ref(), eye.as_ref(), 1e-12);
    }
    let metric = Metric::output(&[0.0; 16], 2, 1, 1, 8).unwrap();
    near(metric.forward(&[0], Mat::<f64>::identity(8, 8).as_ref()).as_ref(), Mat::<f64>::identity(8, 8).as_ref(), 1e-12);
    says(Metric::query(&[0.0; 7], 1, 1, 8, rope), &["query power", "8"]);
    says(Metric::output(&[0.0; 15], 2, 1, 1, 8), &["W_o", "16"]);
}

#[test]
fn rotary_partners() {
    let half = RopePairs { rotary_dim: 6, layout: PairLayout::Half };
    assert_eq!((0..8).map(|i| half.partner(i)).collect::<Vec<_>>(), [3, 4, 5, 0, 1, 2, 6, 7]);
    let interleaved = RopePairs { rotary_dim: 4, layout: PairLayout::Interleaved };
    assert_eq!((0..6).map(|i| interleaved.partner(i)).collect::<Vec<_>>(), [1, 0, 3, 2, 4, 5]);
    let none = RopePairs { rotary_dim: 0, layout: PairLayout::Half };
    assert_eq!((0..3).map(|i| none.partner(i)).collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn rotations_are_orthogonal_even_and_fold_away() {
    for n in [1, 2, 32, 64, 96, 128, 160, 224, 352] {
        let q = orthogonal(n);
        near((&q * q.transpose()).as_ref(), Mat::<f64>::identity(n, n).as_ref(), 1e-12);
        let odd = n >> n.trailing_zeros();
        let largest = q.col_iter().flat_map(|c| c.iter().map(|x| x.abs()).collect::<Vec<_>>()).fold(0.0, f64::max);
        let even = if odd == 1 { 1.0 } else { 2.0 } / n as f64;
        assert!(largest <= even.sqrt() * (1.0 + 1e-12), "{n}: an entry of {largest}");
    }
    let mut rng = Rng::new(5);
    let rows = mixed(&mut rng, 300, 128, 80, 0.1);
    let moment = SecondMoment::of("k", &rows, 1, 128).unwrap();
    let c = moment.group(&[0]);
    let b = GroupBasis::new(leading(&eigen(c.as_ref()).unwrap(), 96), &[0], None);
    let folded = fold(&b);
    near(projector(&folded).as_ref(), projector(&b).as_ref(), 1e-12);
    // What it is for: latents quantized to few bits lose less after it, and more bits lose less.
    let y = mat(&rows, 300, 128);
    let loss = |b: &GroupBasis, bits: i32| {
        let mut z = &y * b.encode.transpose();
        for r in 0..z.nrows() {
            let (low, high) = z.row(r).iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(*x), h.max(*x)));
            let scale = (high - low) / (2f64.powi(bits) - 1.0);
            z.row_mut(r).iter_mut().for_each(|x| *x = low + scale * ((*x - low) / scale).round());
        }
        norm2((&y * projector(b).transpose() - z * b.decode.transpose()).as_ref())
    };
    for bits in [3, 4, 8] {
        assert!(loss(&folded, bits) < loss(&b, bits), "{bits} bits: the rotation does not pay");
    }
    assert!(loss(&folded, 8) < loss(&folded, 4) && loss(&folded, 4) < loss(&folded, 3));
    // A rank that is padded beyond the rows' length: the padding stays zero, in encoder and decoder.
    let padded = fold(&GroupBasis::new(leading(&eigen(c.as_ref()).unwrap(), 160), &[0], None));
    near(projector(&padded).as_ref(), Mat::<f64>::identity(128, 128).as_ref(), 1e-9);
    assert_eq!(norm2(padded.decode.subcols(128, 32)) + norm2(padded.encode.subrows(128, 32)), 0.0);
    assert!(norm2(padded.decode.subcols(127, 1)) > 0.1);
}
