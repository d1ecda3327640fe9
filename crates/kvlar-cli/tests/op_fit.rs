//! The fitting ops from outside: group_heads, fit_lowrank, fit_values, budget_ranks.

use crate::case::{Case, Run, run};
use kvlar_reference::testing::Rng;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

/// A run that is read back.
struct Fit(Run);

/// Runs on the reference: fitting has no device part.
fn fit(op: &str, case: &Case) -> Fit {
    Fit(run(op, "reference", case, &[]))
}

fn with(case: &Case, name: &str, shape: &[usize], values: &[f32]) -> Case {
    case.clone().without(name).floats(name, shape, values)
}

fn with_ints(case: &Case, name: &str, shape: &[usize], values: &[i32]) -> Case {
    case.clone().without(name).ints(name, shape, values)
}

impl Fit {
    #[track_caller]
    fn floats(&self, name: &str, shape: &[usize]) -> Vec<f64> {
        let (found, values) = self.0.tensor(name);
        assert_eq!(found, shape);
        values.into_iter().map(f64::from).collect()
    }

    #[track_caller]
    fn ints(&self, name: &str, shape: &[usize]) -> Vec<i32> {
        assert!(self.0.output.status.success(), "{}", String::from_utf8_lossy(&self.0.output.stderr));
        let bytes = std::fs::read(self.0.dir.path().join("out.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let t = file.tensor(name).unwrap();
        assert_eq!((t.dtype(), t.shape()), (Dtype::I32, shape));
        t.data().chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    #[track_caller]
    fn fails(&self, words: &[&str]) {
        words.iter().for_each(|word| self.0.fails(2, word));
    }
}

/// Keys [n, 4, d] of two sources: heads 0, 2 are copies and 1, 3 are.
fn copies(n: usize, d: usize) -> Vec<f32> {
    let mut rng = Rng::new(1);
    (0..n)
        .flat_map(|_| {
            let (a, b) = (rng.normals(d, 1.0), rng.normals(d, 1.0));
            [a.clone(), b.clone(), a, b].concat()
        })
        .collect()
}

#[test]
fn group_heads_finds_copies() {
    let case = Case::default().floats("k", &[50, 4, 6], &copies(50, 6)).key("size", "2");
    // Without a rank it is size · d/2.
    let shorter = case.clone().key("format", "pt").key("dtype", "f16");
    assert_eq!(fit("group_heads", &shorter).ints("groups", &[2, 2]), [0, 2, 1, 3]);
    let case = case.key("rank", "6");
    for method in ["greedy", "best"] {
        for backend in ["reference", "simt", "cuda"] {
            // Fitting has no device part: every backend gives the same.
            let r = Fit(run("group_heads", backend, &case.clone().key("method", method), &[]));
            assert_eq!(r.ints("groups", &[2, 2]), [0, 2, 1, 3]);
            let s = r.floats("similarity", &[4, 4]);
            assert!(s[2] > 0.999_999 && s[7] > 0.999_999 && s[0] == 1.0 && s[1] < 0.5 && s[1] == s[4]);
        }
    }
    assert_eq!(fit("group_heads", &case.clone().key("size", "4").key("rank", "12")).ints("groups", &[1, 4]), [0, 1, 2, 3]);
}

#[test]
fn group_heads_refuses() {
    let k = copies(5, 6);
    let bare = Case::default().floats("k", &[5, 4, 6], &k);
    let case = bare.clone().key("size", "2");
    fit("group_heads", &case.clone().key("size", "3")).fails(&["groups of 3 do not divide 4"]);
    fit("group_heads", &case.clone().key("size", "0")).fails(&["groups of 0"]);
    fit("group_heads", &case.clone().key("size", "-1")).fails(&["size", "-1"]);
    fit("group_heads", &bare).fails(&["no key size"]);
    fit("group_heads", &case.clone().key("rank", "13")).fails(&["rank", "13", "1..=12"]);
    fit("group_heads", &case.clone().key("method", "worst")).fails(&["method", "worst"]);
    fit("group_heads", &case.clone().key("sise", "2")).fails(&["unknown key", "sise"]);
    fit("group_heads", &with(&case, "q", &[1], &[0.0])).fails(&["unknown tensor", "q"]);
    fit("group_heads", &case.clone().without("k")).fails(&["no tensor k"]);
    fit("group_heads", &with(&case, "k", &[20, 6], &k)).fails(&["k is [20, 6]", "3 dimensions"]);
    fit("group_heads", &with(&case, "k", &[0, 4, 6], &[])).fails(&["k is [0, 4, 6]", "nothing to fit"]);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut k = k.clone();
        k[2 * 24 + 3] = bad;
        fit("group_heads", &with(&case, "k", &[5, 4, 6], &k)).fails(&["k: row 2", &bad.to_string()]);
    }
}

/// uk · encoder of one group, [size·d, size·d], heads in the order of the group.
fn projector(uk: &[f64], encoder: &[f64], group: &[usize], d: usize, rank: usize) -> Vec<Vec<f64>> {
    let width = group.len() * d;
    let row = |r: usize| &uk[(group[r / d] * d + r % d) * rank..][..rank];
    (0..width).map(|r| (0..width).map(|c| (0..rank).map(|z| row(r)[z] * encoder[z * width + c]).sum()).collect()).collect()
}

#[test]
fn fit_lowrank_is_lossless_on_copies_and_pca_otherwise() {
    let case = Case::default().floats("k", &[50, 4, 6], &copies(50, 6)).ints("groups", &[2, 2], &[0, 2, 1, 3]).key("rank", "6");
    let r = fit("fit_lowrank", &case);
    assert!(r.floats("error", &[2]).iter().all(|e| *e < 1e-6));
    let (uk, encoder) = (r.floats("uk", &[4, 6, 6]), r.floats("encoder", &[2, 6, 12]));
    let k = copies(50, 6);
    for (g, group) in [[0, 2], [1, 3]].iter().enumerate() {
        let p = projector(&uk, &encoder[g * 72..], group, 6, 6);
        for row in k.chunks(24) {
            let y: Vec<f64> = group.iter().flat_map(|h| row[h * 6..h * 6 + 6].iter().map(|x| f64::from(*x))).collect();
            for (line, exact) in p.iter().zip(&y) {
                let back: f64 = line.iter().zip(&y).map(|(a, b)| a * b).sum();
                assert!((back - exact).abs() < 1e-5);
            }
        }
    }
    // Groups in an order of their own, rows of general position: the error is what the factors lose.
    let (n, heads, d, rank) = (40, 4, 5, 3);
    let mut rng = Rng::new(3);
    let k = rng.normals(n * heads * d, 1.0);
    let case = Case::default().floats("k", &[n, heads, d], &k).ints("groups", &[2, 2], &[3, 1, 0, 2]).key("rank", "3");
    let r = fit("fit_lowrank", &case);
    let (uk, encoder, error) = (r.floats("uk", &[4, 5, 3]), r.floats("encoder", &[2, 3, 10]), r.floats("error", &[2]));
    for (g, group) in [[3, 1], [0, 2]].iter().enumerate() {
        let p = projector(&uk, &encoder[g * 30..], group, d, rank);
        let mut lost = 0.0;
        for row in k.chunks(heads * d) {
            let y: Vec<f64> = group.iter().flat_map(|h| row[h * d..(h + 1) * d].iter().map(|x| f64::from(*x))).collect();
            lost += p.iter().zip(&y).map(|(l, e)| (e - l.iter().zip(&y).map(|(a, b)| a * b).sum::<f64>()).powi(2)).sum::<f64>();
        }
        assert!((lost - error[g]).abs() < 1e-4 * lost, "{lost} lost, {} said", error[g]);
    }
}

#[test]
fn weightings_choose_what_they_weigh() {
    // One head of four dimensions, two sources: one in dims 0, 2 (a rotary pair), a larger one in dims 1, 3.
    let mut rng = Rng::new(4);
    let k: Vec<f32> = (0..60)
        .flat_map(|_| {
            let (a, b) = (rng.normal(), 3.0 * rng.normal());
            [a, b, a, b]
        })
        .collect();
    let case = Case::default().floats("k", &[60, 1, 4], &k).ints("groups", &[1, 1], &[0]).key("rank", "1");
    let kept = |r: &Fit| -> Vec<f64> {
        let (uk, e) = (r.floats("uk", &[1, 4, 1]), r.floats("encoder", &[1, 1, 4]));
        (0..4).map(|i| uk[i] * e[i]).collect()
    };
    let near = |a: &[f64], b: [f64; 4]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 0.05);
    let plain = kept(&fit("fit_lowrank", &case));
    assert!(near(&plain, [0.0, 0.5, 0.0, 0.5]), "{plain:?}");
    // Queries that only look at the pair (0, 2), of two query heads.
    let q: Vec<f32> = (0..60).flat_map(|_| [rng.normal(), 0.01, rng.normal(), 0.01, 0.01, 0.01, rng.normal(), 0.01]).collect();
    let query = fit("fit_lowrank", &case.clone().key("weighting", "query").floats("q", &[60, 2, 4], &q));
    assert!(near(&kept(&query), [0.5, 0.0, 0.5, 0.0]), "{:?}", kept(&query));
    // The error is the weighted one: about Σ p b² over both dims of the pair 1, 3, p = the mean of q² there.
    let b2: f64 = k.chunks(4).map(|r| 2.0 * f64::from(r[1]).powi(2)).sum();
    let error = query.floats("error", &[1])[0];
    assert!((error / (1e-4 * b2) - 1.0).abs() < 0.05, "{error} of {b2}");
    // An output projection that only reads dims 0 and 2.
    let wo = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0];
    let output = fit("fit_lowrank", &case.clone().key("weighting", "output").floats("wo", &[2, 4], &wo));
    assert!(near(&kept(&output), [0.5, 0.0, 0.5, 0.0]), "{:?}", kept(&output));
}

#[test]
fn fit_lowrank_refuses() {
    let k = copies(5, 6);
    let bare = Case::default().floats("k", &[5, 4, 6], &k).ints("groups", &[2, 2], &[0, 1, 2, 3]);
    let case = bare.clone().key("rank", "4");
    fit("fit_lowrank", &case).floats("uk", &[4, 6, 4]);
    fit("fit_lowrank", &case.clone().key("rank", "13")).fails(&["rank", "13", "1..=12"]);
    fit("fit_lowrank", &case.clone().key("rank", "0")).fails(&["rank", "1..=12"]);
    fit("fit_lowrank", &bare).fails(&["no key rank"]);
    fit("fit_lowrank", &with_ints(&case, "groups", &[2, 2], &[0, 1, 1, 3])).fails(&["groups", "kv head 1 is in two"]);
    fit("fit_lowrank", &with_ints(&case, "groups", &[1, 2], &[0, 1])).fails(&["groups", "kv head 2 is in no group"]);
    fit("fit_lowrank", &with_ints(&case, "groups", &[2, 2], &[0, 1, 2, 4])).fails(&["groups", "kv head 4"]);
    fit("fit_lowrank", &with_ints(&case, "groups", &[2, 2], &[0, 1, 2, -1])).fails(&["groups", "-1"]);
    fit("fit_lowrank", &with_ints(&case, "groups", &[4], &[0, 1, 2, 3])).fails(&["groups is [4]"]);
    fit("fit_lowrank", &with_ints(&case, "groups", &[0, 2], &[])).fails(&["groups"]);
    fit("fit_lowrank", &with(&case, "groups", &[2, 2], &[0.0; 4])).fails(&["groups", "I32"]);
    fit("fit_lowrank", &case.clone().without("groups")).fails(&["no tensor groups"]);
    fit("fit_lowrank", &with(&case, "k", &[0, 4, 6], &[])).fails(&["nothing to fit"]);
    let mut bad = k.clone();
    bad[25] = f32::NAN;
    fit("fit_lowrank", &with(&case, "k", &[5, 4, 6], &bad)).fails(&["k: row 1", "NaN"]);
    let query = case.clone().key("weighting", "query");
    fit("fit_lowrank", &query).fails(&["no tensor q"]);
    fit("fit_lowrank", &with(&query, "q", &[4, 4, 6], &k[..96])).fails(&["q is [4, 4, 6]"]);
    fit("fit_lowrank", &with(&query, "q", &[5, 2, 6], &k[..60])).fails(&["Hq must be a multiple of 4"]);
    fit("fit_lowrank", &with(&query, "q", &[5, 4, 6], &bad)).fails(&["q: row 1", "NaN"]);
    let output = case.clone().key("weighting", "output");
    fit("fit_lowrank", &output).fails(&["no tensor wo"]);
    fit("fit_lowrank", &with(&output, "wo", &[3, 12], &k[..36])).fails(&["wo is [3, 12]"]);
    fit("fit_lowrank", &with(&case, "q", &[5, 4, 6], &k)).fails(&["unknown tensor", "q"]);
}

#[test]
fn fit_values_updates_the_plain_svd() {
    let (d, m, n, rank) = (6, 8, 30, 3);
    let mut rng = Rng::new(6);
    let w = rng.normals(d * m, 1.0);
    let x: Vec<f32> = (0..n * m).map(|i| rng.normal() * [4.0, 2.0, 1.0, 0.5][i % m % 4]).collect();
    let bare = Case::default().floats("w", &[d, m], &w).floats("x", &[n, m], &x);
    let case = bare.clone().key("rank", "3");
    let mut errors = Vec::new();
    for rounds in ["0", "1", "2", "50"] {
        let r = fit("fit_values", &case.clone().key("rounds", rounds));
        let (left, right) = (r.floats("left", &[d, rank]), r.floats("right", &[rank, m]));
        let mut lost = 0.0;
        for x in x.chunks(m) {
            for i in 0..d {
                let product = |j: usize| (0..rank).map(|z| left[i * rank + z] * right[z * m + j]).sum::<f64>();
                lost += (0..m).map(|j| (f64::from(w[i * m + j]) - product(j)) * f64::from(x[j])).sum::<f64>().powi(2);
            }
        }
        let error = r.floats("error", &[])[0];
        assert!((lost - error).abs() < 1e-4 * lost, "{lost} lost, {error} said");
        errors.push(error);
    }
    assert!(errors[1] < 0.99 * errors[0] && errors[2] <= errors[1] && errors[3] <= errors[2], "{errors:?}");
    assert_eq!(fit("fit_values", &case).floats("error", &[])[0], errors[1], "one round is the default");
    fit("fit_values", &case.clone().key("rank", "7")).fails(&["rank", "1..=6"]);
    fit("fit_values", &bare).fails(&["no key rank"]);
    fit("fit_values", &with(&case, "x", &[0, m], &[])).fails(&["x is [0, 8]", "nothing to fit"]);
    fit("fit_values", &with(&case, "x", &[2, 4], &x[..8])).fails(&["x is [2, 4]"]);
    let mut bad = w.clone();
    bad[9] = f32::INFINITY;
    fit("fit_values", &with(&case, "w", &[d, m], &bad)).fails(&["w: row 1", "inf"]);
    bad[9] = f32::NAN;
    fit("fit_values", &with(&case, "w", &[d, m], &bad)).fails(&["w: row 1", "NaN"]);
    fit("fit_values", &case.clone().key("rounds", "many")).fails(&["rounds", "many"]);
}

#[test]
fn budget_ranks_deals_out() {
    let bare = Case::default().floats("importance", &[3], &[1.0, 2.0, 3.0]).ints("full", &[3], &[512, 512, 512]);
    let case = bare.clone().key("keep", "0.5");
    assert_eq!(fit("budget_ranks", &case).ints("ranks", &[3]), [128, 256, 384]);
    assert_eq!(fit("budget_ranks", &case.clone().key("multiple", "100")).ints("ranks", &[3]), [100, 300, 400]);
    assert_eq!(fit("budget_ranks", &case.clone().key("keep", "0")).ints("ranks", &[3]), [32, 32, 32]);
    assert_eq!(fit("budget_ranks", &case.clone().key("keep", "1")).ints("ranks", &[3]), [512, 512, 512]);
    // Budgets of 268.8 and 68.6 ranks: their shares are floored, not they.
    let six = [3.1, 6.9, 6.2, 9.5, 3.7, 2.3];
    let six = Case::default().floats("importance", &[6], &six).ints("full", &[6], &[128; 6]).key("keep", "0.35");
    assert_eq!(fit("budget_ranks", &six).ints("ranks", &[6]), [32, 64, 64, 96, 32, 32]);
    let three = Case::default().floats("importance", &[3], &[480.0, 109.0, 97.0]).ints("full", &[3], &[400, 200, 86]);
    assert_eq!(fit("budget_ranks", &three.key("keep", "0.1")).ints("ranks", &[3]), [64, 32, 32]);
    fit("budget_ranks", &case.clone().key("keep", "1.01")).fails(&["keep", "1.01"]);
    fit("budget_ranks", &case.clone().key("keep", "half")).fails(&["keep", "half"]);
    fit("budget_ranks", &bare).fails(&["no key keep"]);
    fit("budget_ranks", &case.clone().key("multiple", "0")).fails(&["multiple"]);
    fit("budget_ranks", &with_ints(&case, "full", &[2], &[512, 512])).fails(&["full is [2]"]);
    fit("budget_ranks", &with_ints(&case, "full", &[3], &[512, 0, 512])).fails(&["full"]);
    fit("budget_ranks", &with_ints(&case, "full", &[3], &[512, -5, 512])).fails(&["full", "-5"]);
    fit("budget_ranks", &with(&case, "importance", &[3], &[1.0, f32::NAN, 1.0])).fails(&["importance", "NaN"]);
    fit("budget_ranks", &with(&case, "importance", &[3], &[1.0, -2.0, 1.0])).fails(&["importance", "-2"]);
    fit("budget_ranks", &with(&case, "importance", &[3], &[0.0; 3])).fails(&["importance", "sum to 0"]);
    let none = Case::default().floats("importance", &[0], &[]).ints("full", &[0], &[]).key("keep", "0.5");
    fit("budget_ranks", &none).fails(&["nothing to deal out"]);
}
