//! Fusing value bases into the output projection: `recalkv.md` §0.4, the cost table of §2, §7 invariant 7.

use crate::common::{close, says};
use kvlar_calibrate::fusion::{fuse, pays};
use kvlar_calibrate::{Factors, Latent, LayerShape};
use kvlar_reference::testing::Rng;

#[test]
fn only_narrow_latents_pay() {
    let llama2 = LayerShape { q_heads: 32, kv_heads: 32, head_dim: 128, value_dim: 128 };
    let llama3 = LayerShape { kv_heads: 8, ..llama2 };
    for (layer, rank, expected) in [
        (llama2, 2048, false), // one group: 537 MB for 33.5 + 16.8
        (llama2, 256, false),
        (llama3, 512, false),
        (llama3, 160, false),
        (llama3, 64, true), // 16.8 MB for 33.5 + 0.13
        (llama3, 96, true),
        (llama3, 128, true), // as wide as W_o, and the decoder is gone
    ] {
        assert_eq!(pays(&layer, 4096, rank), expected, "rank {rank}");
    }
}

#[test]
fn the_fused_projection_gives_the_same_output() {
    for seed in 0..4 {
        let mut rng = Rng::new(seed);
        let layer = LayerShape { q_heads: 6, kv_heads: 3, head_dim: 4, value_dim: 5 };
        let (hidden, rank, rows) = (7, 3, 9);
        let out = rng.normals(hidden * 30, 1.0);
        let f = Factors {
            groups: vec![vec![2], vec![0], vec![1]],
            rank,
            basis: rng.normals(3 * 5 * rank, 1.0),
            encoder: rng.normals(3 * rank * 5, 1.0),
            mean: None,
            latent: Latent::Model,
        };
        let fused = fuse(&out, hidden, &layer, &f).unwrap();
        assert_eq!(fused.len(), hidden * 6 * rank);
        let z: Vec<f64> = (0..rows * 3 * rank).map(|_| f64::from(rng.normal())).collect();
        let decoded = f.decode(&z);
        let of = f.group_of();
        assert_eq!(of, [1, 2, 0]);
        for r in 0..hidden {
            let (mut plain, mut short) = (0.0, 0.0);
            for h in 0..6 {
                let p: Vec<f64> = (0..rows).map(|_| rng.uniform()).collect();
                let group = of[h / 2] as usize;
                for i in 0..5 {
                    let o: f64 = (0..rows).map(|t| p[t] * decoded[(t * 3 + h / 2) * 5 + i]).sum();
                    plain += f64::from(out[r * 30 + h * 5 + i]) * o;
                }
                for c in 0..rank {
                    let o: f64 = (0..rows).map(|t| p[t] * z[(t * 3 + group) * rank + c]).sum();
                    short += f64::from(fused[(r * 6 + h) * rank + c]) * o;
                }
            }
            close(plain, short, 1e-5);
        }
        says(fuse(&out[1..], hidden, &layer, &f), &["W_o"]);
        says(fuse(&out, hidden, &layer, &Factors { basis: vec![0.0; 3], ..f.clone() }), &["basis"]);
        says(fuse(&out, hidden, &layer, &Factors { mean: Some(vec![0.0; 15]), ..f }), &["mean"]);
    }
}
