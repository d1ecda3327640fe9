//! CKA and head grouping: `recalkv.md` §7 invariants 5, 6 and 10, and the exact cases of §1.2.

use crate::common::{close, columns, mat, mixed, norm2, rotation, says};
use kvlar_calibrate::basis::tail_energy;
use kvlar_calibrate::faer::Mat;
use kvlar_calibrate::grouping::{best, canonical, check_partition, greedy, group, natural, partition_count, partitions};
use kvlar_calibrate::{Grouping, SecondMoment, similarity::cka};
use kvlar_reference::testing::Rng;

/// CKA in its Gram form, without centring: Tr(XXᵀ YYᵀ) over the norms.
fn gram_cka(x: &Mat<f64>, y: &Mat<f64>) -> f64 {
    let (gx, gy) = (x * x.transpose(), y * y.transpose());
    let hsic = |a: &Mat<f64>, b: &Mat<f64>| {
        (0..a.nrows()).flat_map(|r| (0..a.ncols()).map(move |c| (r, c))).map(|at| a[at] * b[at]).sum::<f64>()
    };
    hsic(&gx, &gy) / (hsic(&gx, &gx) * hsic(&gy, &gy)).sqrt()
}

#[test]
fn cka_is_the_gram_form_and_has_its_invariances() {
    for seed in 0..4 {
        let (n, heads, d) = (40, 4, 6);
        let mut rng = Rng::new(seed);
        let rows = mixed(&mut rng, n, heads * d, 5, 0.1);
        let s = cka(&SecondMoment::of("k", &rows, heads, d).unwrap());
        let y = mat(&rows, n, heads * d);
        // The same heads, rotated and scaled one by one.
        let turned: Vec<Mat<f64>> = (0..heads)
            .map(|h| columns(&y, &[h], d) * rotation(&mut rng, d) * kvlar_calibrate::faer::Scale(0.1 + h as f64))
            .collect();
        let turned: Vec<f32> = (0..n * heads * d).map(|i| turned[i % (heads * d) / d][(i / (heads * d), i % d)] as f32).collect();
        let t = cka(&SecondMoment::of("k", &turned, heads, d).unwrap());
        for i in 0..heads {
            assert_eq!(s[i * heads + i], 1.0);
            for j in 0..heads {
                close(s[i * heads + j], gram_cka(&columns(&y, &[i], d), &columns(&y, &[j], d)), 1e-12);
                assert!((0.0..=1.0).contains(&s[i * heads + j]));
                assert_eq!(s[i * heads + j], s[j * heads + i]);
                close(s[i * heads + j], t[i * heads + j], 1e-5);
            }
        }
    }
}

#[test]
fn a_head_of_zeros_is_like_no_other() {
    let s = cka(&SecondMoment::of("k", &[1.0, 0.0, 2.0, 0.0], 2, 1).unwrap());
    assert_eq!(s, [1.0, 0.0, 0.0, 1.0]);
}

fn similarity(heads: usize, rest: f64, pairs: &[(usize, usize, f64)]) -> Vec<f64> {
    let mut s = vec![rest; heads * heads];
    for (i, j, x) in pairs {
        s[i * heads + j] = *x;
        s[j * heads + i] = *x;
    }
    (0..heads).for_each(|i| s[i * heads + i] = 1.0);
    s
}

#[test]
fn the_released_rule_packs_the_two_best_pairs_together() {
    let mut pairs = Vec::new();
    for c in [0, 4] {
        for i in c..c + 4 {
            pairs.extend((i + 1..c + 4).map(|j| (i, j, 0.8)));
        }
    }
    pairs.extend([(0, 1, 0.9), (4, 5, 0.89)]);
    let s = similarity(8, 0.1, &pairs);
    assert_eq!(canonical(greedy(&s, 8, 4).unwrap()), [vec![0, 1, 4, 5], vec![2, 3, 6, 7]]);
    // Searching for the least dissimilarity finds the clusters.
    let unlike = |i: usize, j: usize| 1.0 - s[i * 8 + j];
    let apart = |g: &[usize]| Ok(g.iter().flat_map(|i| g.iter().map(move |j| (*i, *j))).map(|(i, j)| unlike(i, j)).sum());
    let heads: Vec<usize> = (0..8).collect();
    assert_eq!(best(&heads, 4, &[], &apart).unwrap(), [vec![0, 1, 2, 3], vec![4, 5, 6, 7]]);
}

#[test]
fn the_released_rule_overfills_odd_groups_and_fixes_them_up() {
    let s = similarity(6, 0.1, &[(0, 1, 0.9), (2, 3, 0.8), (4, 5, 0.7)]);
    assert_eq!(greedy(&s, 6, 3).unwrap(), [vec![0, 1, 2], vec![4, 5, 3]]);
}

#[test]
fn the_released_rule_breaks_ties_in_order_and_places_the_head_left_over() {
    assert_eq!(greedy(&similarity(4, 0.5, &[]), 4, 2).unwrap(), [vec![0, 1], vec![2, 3]]);
    // A head joins the group of its partner while there is room.
    let s = similarity(6, 0.0, &[(0, 1, 0.9), (0, 2, 0.8), (4, 5, 0.7), (3, 0, 0.6)]);
    assert_eq!(greedy(&s, 6, 3).unwrap(), [vec![0, 1, 2], vec![4, 5, 3]]);
    // 3 finds its partner's group full and waits, so 6 still has room with 4 and 5.
    let s = similarity(9, 0.1, &[(0, 1, 0.9), (0, 2, 0.8), (0, 3, 0.7), (4, 5, 0.6), (5, 6, 0.5)]);
    assert_eq!(greedy(&s, 9, 3).unwrap(), [vec![0, 1, 2], vec![4, 5, 6], vec![3, 7, 8]]);
    // Two groups overfill, 8 is left over and opens the third, which then takes what is too much.
    let s = similarity(9, 0.1, &[(0, 1, 0.9), (2, 3, 0.8), (4, 5, 0.7), (6, 7, 0.6)]);
    assert_eq!(greedy(&s, 9, 3).unwrap(), [vec![0, 1, 2], vec![4, 5, 6], vec![8, 3, 7]]);
    // Even single heads overfill.
    assert_eq!(greedy(&similarity(3, 0.2, &[(1, 2, 0.9)]), 3, 1).unwrap(), [[1], [0], [2]]);
}

#[test]
fn partitions_are_all_there_once() {
    for (heads, size, count) in [(4, 2, 3), (6, 3, 10), (8, 4, 35), (8, 2, 105), (9, 3, 280), (5, 1, 1), (5, 5, 1)] {
        let all = partitions(&(0..heads).collect::<Vec<_>>(), size);
        assert_eq!((all.len(), partition_count(heads, size)), (count, count as f64));
        let unique: std::collections::BTreeSet<_> = all.iter().cloned().collect();
        assert_eq!(unique.len(), count);
        for groups in &all {
            check_partition(groups, heads).unwrap();
            assert_eq!(&canonical(groups.clone()), groups);
        }
    }
    assert_eq!(partition_count(16, 2), 2_027_025.0);
    assert!(partition_count(7, 2) == 0.0 && partitions(&[0, 1, 2], 2).is_empty());
}

#[test]
fn the_search_is_exact_and_never_worse_than_natural_or_greedy() {
    let mut greedy_was_worse_than_natural = 0;
    for seed in 0..30 {
        let (n, heads, d, size) = (60, [8, 6, 8][seed % 3], 4, [2, 3, 4][seed % 3]);
        let mut rng = Rng::new(seed as u64);
        let mut rows = mixed(&mut rng, n, heads * d, 9, 0.05);
        // Some heads repeat others in part.
        for r in rows.chunks_exact_mut(heads * d) {
            for i in 0..d {
                r[(heads - 1) * d + i] = 0.7 * r[d + i] + 0.3 * r[(heads - 1) * d + i];
            }
        }
        let moment = SecondMoment::of("k", &rows, heads, d).unwrap();
        let rank = size * d / 2;
        let cost = |g: &[usize]| tail_energy(&moment, g, None, false, rank);
        let total = |groups: &[Vec<usize>]| groups.iter().map(|g| cost(g).unwrap()).sum::<f64>();
        let all: Vec<usize> = (0..heads).collect();
        let rule = greedy(&cka(&moment), heads, size).unwrap();
        let found = best(&all, size, std::slice::from_ref(&rule), &cost).unwrap();
        check_partition(&found, heads).unwrap();
        let least = partitions(&all, size).iter().map(|g| total(g)).fold(f64::INFINITY, f64::min);
        close(total(&found), least, 1e-9);
        assert!(total(&found) <= total(&rule) * (1.0 + 1e-9));
        assert!(total(&found) <= total(&natural(&all, size)) * (1.0 + 1e-9));
        greedy_was_worse_than_natural += usize::from(total(&rule) > total(&natural(&all, size)) * (1.0 + 1e-6));
        let by_name = group(Grouping::Best, &cka(&moment), heads, size, 1, &cost).unwrap();
        close(total(&by_name), least, 1e-9);
    }
    assert!(greedy_was_worse_than_natural > 0, "these cases do not show why the released rule is not the default");
}

#[test]
fn beyond_the_limit_swaps_improve_on_both_starts() {
    for seed in 0..3 {
        let (n, heads, d, size) = (80, 18, 2, 3);
        assert!(partition_count(heads, size) > kvlar_calibrate::grouping::PARTITION_LIMIT);
        let mut rng = Rng::new(seed);
        // Six sources, three copies each, dealt out so that neither order nor neighbours show it.
        let order = rng.permutation(heads);
        let mut rows = vec![0.0f32; n * heads * d];
        for r in rows.chunks_exact_mut(heads * d) {
            let sources = rng.normals(6 * d, 1.0);
            for (slot, h) in order.iter().enumerate() {
                for i in 0..d {
                    r[h * d + i] = sources[slot / 3 * d + i] + 0.01 * rng.normal();
                }
            }
        }
        let moment = SecondMoment::of("k", &rows, heads, d).unwrap();
        let cost = |g: &[usize]| tail_energy(&moment, g, None, false, d);
        let all: Vec<usize> = (0..heads).collect();
        let found = best(&all, size, &[], &cost).unwrap();
        let planted = canonical(order.chunks(3).map(<[usize]>::to_vec).collect());
        assert_eq!(found, planted);
    }
}

#[test]
fn copies_of_heads_find_each_other_without_loss() {
    for seed in 0..4 {
        let (n, d) = (100, 5);
        let mut rng = Rng::new(seed);
        let rows: Vec<f32> = (0..n)
            .flat_map(|_| {
                let (a, b) = (rng.normals(d, 1.0), rng.normals(d, 1.0));
                [a.clone(), b.clone(), a, b].concat()
            })
            .collect();
        let moment = SecondMoment::of("k", &rows, 4, d).unwrap();
        let s = cka(&moment);
        close(s[2], 1.0, 1e-12);
        close(s[4 + 3], 1.0, 1e-12);
        let cost = |g: &[usize]| tail_energy(&moment, g, None, false, d);
        for rule in [Grouping::Greedy, Grouping::Best] {
            assert_eq!(group(rule, &s, 4, 2, 1, &cost).unwrap(), [[0, 2], [1, 3]]);
        }
        let total: f64 = moment.energy();
        assert!(cost(&[0, 2]).unwrap() + cost(&[1, 3]).unwrap() <= 1e-12 * total, "lossless at rank d");
        // In order, two groups of two sources each: at rank d they lose the d smallest of the 2d eigenvalues.
        let y = mat(&rows, n, 4 * d);
        let lost: f64 = [[0, 1], [2, 3]]
            .iter()
            .map(|g| {
                let c = columns(&y, g, d);
                let mut eigenvalues = (c.transpose() * &c).self_adjoint_eigenvalues(kvlar_calibrate::faer::Side::Lower).unwrap();
                eigenvalues.truncate(d);
                eigenvalues.iter().sum::<f64>()
            })
            .sum();
        close(cost(&[0, 1]).unwrap() + cost(&[2, 3]).unwrap(), lost, 1e-10);
        assert!(lost > 0.1 * norm2(y.as_ref()));
    }
}

#[test]
fn groups_stay_inside_shards() {
    // The copies are 0,2 | 1,3 across a border between 0,1 and 2,3: with two shards they cannot meet.
    let mut rng = Rng::new(3);
    let rows: Vec<f32> = (0..50)
        .flat_map(|_| {
            let (a, b) = (rng.normals(3, 1.0), rng.normals(3, 1.0));
            [a.clone(), b.clone(), a, b].concat()
        })
        .collect();
    let moment = SecondMoment::of("k", &rows, 4, 3).unwrap();
    let cost = |g: &[usize]| tail_energy(&moment, g, None, false, 3);
    for rule in [Grouping::Natural, Grouping::Greedy, Grouping::Best] {
        assert_eq!(group(rule, &cka(&moment), 4, 2, 2, &cost).unwrap(), [[0, 1], [2, 3]]);
    }
    says(group(Grouping::Best, &cka(&moment), 4, 2, 3, &cost), &["shards", "3 does not divide 4"]);
    says(group(Grouping::Best, &cka(&moment), 4, 4, 2, &cost), &["groups of 4 do not divide 2"]);
}

#[test]
fn sizes_and_partitions_that_are_none_are_refused() {
    says(greedy(&[1.0; 9], 3, 2), &["groups of 2 do not divide 3"]);
    says(greedy(&[1.0; 9], 3, 0), &["groups of 0"]);
    says(greedy(&[1.0; 8], 3, 3), &["similarity", "9"]);
    says(check_partition(&[vec![0, 1], vec![1, 2]], 4), &["kv head 1 is in two groups"]);
    says(check_partition(&[vec![0, 1]], 4), &["kv head 2 is in no group"]);
    says(check_partition(&[vec![0, 4]], 2), &["kv head 4 is not one of 2"]);
    says(check_partition(&[vec![0, 1], vec![2]], 3), &["one size"]);
}
