//! Rank budgets: `recalkv.md` §1.5 and the rounding and byte cases of §7.

use crate::common::{close, says};
use kvlar_calibrate::Latent;
use kvlar_calibrate::budget::{Candidate, Cost, budget, budget_ranks, proportional, round, spectral};
use kvlar_reference::testing::Rng;

#[test]
fn rounding_to_multiples() {
    // keep × (4 heads × 128)
    for (keep, rank) in [(0.5, 256), (0.3, 160), (0.2, 96), (0.01, 32), (1.0, 512)] {
        assert_eq!(round(keep * 512.0, 32, 512), rank, "{keep}");
    }
    assert_eq!(round(48.0, 32, 512), 64); // halves to the even multiple, as Python rounds
    assert_eq!(round(80.0, 32, 512), 64);
    assert_eq!(round(500.0, 32, 100), 100);
    assert_eq!(round(-3.0, 32, 512), 32);
}

#[test]
fn shares_are_floored_and_leftovers_go_by_remainder() {
    // Shares of 10: 4.5, 3.33…, 2.17: floors 4, 3, 2; the one left goes to 0.5.
    assert_eq!(proportional(&[27.0, 20.0, 13.0], &[9, 9, 9], 10.0).unwrap(), [5, 3, 2]);
    // The first is full at 3; its surplus is handed out in passes, largest remainder first.
    assert_eq!(proportional(&[8.0, 1.0, 1.0], &[3, 9, 9], 10.0).unwrap(), [3, 4, 3]);
    // Ties go to the lower index.
    assert_eq!(proportional(&[1.0, 1.0, 1.0, 1.0], &[9; 4], 6.0).unwrap(), [2, 2, 1, 1]);
    assert_eq!(proportional(&[0.0, 1.0], &[4, 4], 6.0).unwrap(), [2, 4]);
    assert_eq!(proportional(&[1.0, 2.0], &[4, 4], 100.0).unwrap(), [4, 4]);
    // Many passes take no longer than one.
    let most = (1 << 31) - 1;
    assert_eq!(proportional(&[1.0, 0.0, 0.0], &[9, most, most], 2.0 * most as f64).unwrap(), [9, most - 4, most - 5]);
    for seed in 0..20 {
        let mut rng = Rng::new(seed);
        let importance: Vec<f64> = (0..7).map(|_| rng.uniform()).collect();
        let full: Vec<usize> = (0..7).map(|_| 1 + rng.below(100)).collect();
        let all: usize = full.iter().sum();
        let total = rng.below(all + 1);
        let sum: f64 = importance.iter().sum();
        for total in [total as f64, total as f64 + 0.6] {
            let ranks = proportional(&importance, &full, total).unwrap();
            assert_eq!(ranks.iter().sum::<usize>(), (total as usize).min(all));
            for ((r, f), i) in ranks.iter().zip(&full).zip(&importance) {
                assert!(r <= f && *r >= ((total * i / sum) as usize).min(*f));
            }
        }
    }
    // Shares are of the whole budget, though only whole ranks are handed out: of 7.8 the first gets 3.9, not 3.5.
    assert_eq!(proportional(&[5.0, 2.6, 2.4], &[9; 3], 7.8).unwrap(), [4, 2, 1]);
    assert_eq!(proportional(&[1.0, 1.0], &[4, 4], 0.999).unwrap(), [0, 0]);
    assert_eq!(proportional(&[1.0, 1.0], &[4, 4], 1.0 - 1e-10).unwrap(), [1, 0]);
    says(proportional(&[1.0], &[4], f64::NAN), &["total", "NaN"]);
    says(proportional(&[1.0], &[4], -1.0), &["total", "-1"]);
}

#[test]
fn the_op_deals_out_then_rounds() {
    // 0.5 × 1536 = 768 in proportion 1 : 2 : 3 → 128, 256, 384.
    assert_eq!(budget_ranks(&[1.0, 2.0, 3.0], &[512; 3], 0.5, 32).unwrap(), [128, 256, 384]);
    // The greatest is full; what it cannot take goes to the rest.
    assert_eq!(budget_ranks(&[1.0, 1.0, 8.0], &[512; 3], 0.5, 32).unwrap(), [128, 128, 512]);
    assert_eq!(budget_ranks(&[1.0, 1.0], &[64, 64], 0.0, 32).unwrap(), [32, 32]);
    assert_eq!(budget_ranks(&[1.0, 1.0], &[64, 20], 1.0, 32).unwrap(), [64, 20]);
    assert_eq!(budget_ranks(&[5.0], &[10], 0.5, 1).unwrap(), [5]);
    // Budgets that are no whole numbers, 268.8 and 68.6: their shares are floored, not they.
    let importance = [3.1, 6.9, 6.2, 9.5, 3.7, 2.3];
    assert_eq!(budget_ranks(&importance, &[128; 6], 0.35, 32).unwrap(), [32, 64, 64, 96, 32, 32]);
    assert_eq!(budget_ranks(&[480.0, 109.0, 97.0], &[400, 200, 86], 0.1, 32).unwrap(), [64, 32, 32]);
    // 0.29 × 100 is a hair less than 29 in binary, 0.07 × 100 a hair more than 7: both count as whole.
    assert_eq!((budget(0.29, 100), budget(0.07, 100), budget(0.7, 10), budget(0.999, 1000)), (29.0, 7.0, 7.0, 999.0));
    assert_eq!((budget(0.25, 10), budget(0.35, 768), budget(0.1, 10)), (2.5, 0.35 * 768.0, 1.0));
    assert_eq!(budget_ranks(&[1.0], &[100], 0.29, 1).unwrap(), [29]);
    says(budget_ranks(&[1.0], &[64], 1.5, 32), &["keep", "1.5"]);
    says(budget_ranks(&[1.0], &[64], f64::NAN, 32), &["keep"]);
    says(budget_ranks(&[1.0], &[64], 0.5, 0), &["multiple"]);
    says(budget_ranks(&[1.0], &[0], 0.5, 32), &["full"]);
    says(budget_ranks(&[1.0, 2.0], &[64], 0.5, 32), &["importance", "2 values for 1"]);
    says(budget_ranks(&[-1.0], &[64], 0.5, 32), &["importance", "-1"]);
    says(budget_ranks(&[f64::NAN], &[64], 0.5, 32), &["importance", "NaN"]);
    says(budget_ranks(&[0.0, 0.0], &[64, 64], 0.5, 32), &["importance", "sum to 0"]);
}

#[test]
fn bytes_of_rows() {
    // Llama-3-8B, pairs of heads, 64 and 128: 4 groups × (64 + 128) × 2 of 4,096.
    let cost = |rank_of: usize, latent| Cost { groups: 4, full: 256, latent }.bytes(rank_of);
    assert_eq!(cost(64, Latent::Model) + cost(128, Latent::Model), 1536);
    assert_eq!(cost(64, Latent::Int8), 4 * (64 + 4));
    assert_eq!(cost(64, Latent::Int4), 4 * (32 + 4));
    assert_eq!(cost(256, Latent::Model), 4 * 512);
    let narrow = Cost { groups: 2, full: 48, latent: Latent::Model };
    // Padded to 64 it would take more than dense rows do.
    assert!(narrow.is_dense(64) && narrow.bytes(64) == 2 * 96 && !narrow.is_dense(32));
    assert_eq!(Cost { groups: 4, full: 256, latent: Latent::Int8 }.rank_for(4.0 * 132.0, 32), 128);
}

fn candidates(rng: &mut Rng, count: usize, latent: Latent) -> Vec<Candidate> {
    let cost = Cost { groups: 2, full: 16, latent };
    let spectrum = |rng: &mut Rng, decay: f64| {
        let mut s: Vec<f64> = (0..16).map(|i| (0.1 + rng.uniform()) * decay.powi(i)).collect();
        s.sort_by(|a, b| b.total_cmp(a));
        s
    };
    (0..count)
        .map(|_| {
            let decay = 0.3 + 0.7 * rng.uniform();
            Candidate { cost, spectra: vec![spectrum(rng, decay), spectrum(rng, decay)] }
        })
        .collect()
}

fn lost(c: &Candidate, rank: usize) -> f64 {
    let all: f64 = c.spectra.iter().flatten().sum();
    c.spectra.iter().map(|s| s.iter().skip(rank).sum::<f64>()).sum::<f64>() / all
}

#[test]
fn water_filling_finds_the_least_loss_of_its_bytes() {
    for seed in 0..6 {
        let mut rng = Rng::new(seed);
        let all = candidates(&mut rng, 3, Latent::Model);
        for budget in [96.0, 150.0, 193.0, 300.0] {
            let ranks = spectral(&all, budget, 4).unwrap();
            let bytes = |ranks: &[usize]| ranks.iter().zip(&all).map(|(r, c)| c.cost.bytes(*r)).sum::<usize>();
            let total = |ranks: &[usize]| ranks.iter().zip(&all).map(|(r, c)| lost(c, *r)).sum::<f64>();
            assert!(bytes(&ranks) as f64 <= budget, "{ranks:?}");
            // Every other choice that fits loses at least as much.
            for a in [4, 8, 12, 16] {
                for b in [4, 8, 12, 16] {
                    for c in [4, 8, 12, 16] {
                        if bytes(&[a, b, c]) as f64 <= budget {
                            assert!(total(&[a, b, c]) >= total(&ranks) - 1e-12, "{ranks:?} loses more than {a}, {b}, {c}");
                        }
                    }
                }
            }
        }
        assert_eq!(spectral(&all, 1.0, 4).unwrap(), [4, 4, 4]);
        assert_eq!(spectral(&all, 1e9, 4).unwrap(), [16, 16, 16]);
        let int8 = candidates(&mut rng, 3, Latent::Int8);
        let ranks = spectral(&int8, 90.0, 4).unwrap();
        assert!(ranks.iter().map(|r| 2 * (r + 4)).sum::<usize>() <= 90);
    }
    // A matrix whose energy lies in few directions gives way to one that needs many.
    let cost = Cost { groups: 1, full: 8, latent: Latent::Model };
    let steep = Candidate { cost, spectra: vec![vec![1.0, 0.1, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0]] };
    let flat = Candidate { cost, spectra: vec![vec![1e-3; 8]] };
    assert_eq!(spectral(&[steep, flat], 20.0, 2).unwrap(), [2, 8]);
    close(lost(&Candidate { cost, spectra: vec![vec![3.0, 1.0]] }, 1), 0.25, 1e-15);
    says(spectral(&[], 1.0, 0), &["multiple"]);
}
