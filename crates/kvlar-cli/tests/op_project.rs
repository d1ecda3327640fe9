//! `kvlar op project` from outside.

use crate::case::{Case, backends, kernels, run, values};
use kvlar_reference::compare::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{Dtype as Type, ProjectInput};

const B: usize = 2;
const HK: usize = 4;
const T: usize = 21;
const D: usize = 24;
const N: usize = 3;
const SIZE: usize = 2;
const R: usize = 37;
/// Permuted, and one head in two groups.
const GROUPS: [i32; N * SIZE] = [2, 0, 3, 1, 1, 2];

fn good_case() -> Case {
    let mut rng = Rng::new(1);
    Case::default()
        .floats("k", &[B, HK, T, D], &rng.normals(B * HK * T * D, 1.0))
        .floats("encoder", &[N, R, SIZE * D], &rng.normals(N * R * SIZE * D, 0.15))
        .ints("groups", &[N, SIZE], &GROUPS)
}

/// z[b, n, t, r] = Σ encoder[n, r, j d + c] k[b, groups[n, j], t, c], written out.
fn by_hand(k: &[f32], encoder: &[f32]) -> Vec<f32> {
    let mut z = Vec::new();
    for (b, n, t, r) in (0..B).flat_map(|b| (0..N).flat_map(move |n| (0..T).flat_map(move |t| (0..R).map(move |r| (b, n, t, r)))))
    {
        let mut sum = 0f64;
        for (j, c) in (0..SIZE).flat_map(|j| (0..D).map(move |c| (j, c))) {
            let head = GROUPS[n * SIZE + j] as usize;
            sum += f64::from(encoder[(n * R + r) * SIZE * D + j * D + c]) * f64::from(k[((b * HK + head) * T + t) * D + c]);
        }
        z.push(sum as f32);
    }
    z
}

#[test]
fn latents_are_encoder_times_the_groups_rows() {
    let case = good_case();
    for (dtype, round) in [("bf16", Type::Bf16), ("f16", Type::F16), ("f32", Type::F32)] {
        let (k, encoder) = (values(&case, "k", round), values(&case, "encoder", round));
        let expected = by_hand(&k, &encoder);
        let input = ProjectInput {
            seqs: B,
            kv_heads: HK,
            rows: T,
            head_dim: D,
            groups: N,
            size: SIZE,
            rank: R,
            k: &k,
            encoder: &encoder,
            members: &GROUPS,
            mean: None,
        };
        assert_eq!(kvlar_reference::project(&input).unwrap(), expected);
        for backend in backends().into_iter().filter(|b| dtype != "f32" || *b == "reference") {
            let r = run("project", backend, &case, &["--set", &format!("dtype={dtype}")]);
            let (shape, latents) = r.tensor("latents");
            assert_eq!(shape, [B, N, T, R]);
            compare(&latents, &expected, Tolerance::project(Type::F32, SIZE * D, 5.0)).unwrap();
        }
    }
}

#[test]
fn bf16_is_the_default() {
    let case = good_case();
    let expected = by_hand(&values(&case, "k", Type::Bf16), &values(&case, "encoder", Type::Bf16));
    assert_eq!(run("project", "reference", &case, &[]).tensor("latents").1, expected);
}

#[test]
fn odd_values_stay_in_their_rows() {
    let mut k = Rng::new(2).normals(B * HK * T * D, 1.0);
    k[5 * D + 3] = f32::NAN; // sequence 0, head 0, row 5
    k[(HK + 3) * T * D] = f32::INFINITY; // sequence 1, head 3, row 0
    let case = good_case().without("k").floats("k", &[B, HK, T, D], &k);
    for backend in backends() {
        let (_, latents) = run("project", backend, &case, &[]).tensor("latents");
        for (i, z) in latents.iter().enumerate() {
            let (b, n, t) = (i / R / T / N, i / R / T % N, i / R % T);
            let odd = match (b, t) {
                (0, 5) => n == 0,
                (1, 0) => n == 1,
                _ => false,
            };
            assert_eq!(!z.is_finite(), odd, "{backend}: sequence {b} group {n} row {t}: {z}");
        }
    }
}

#[test]
fn no_rows_give_no_latents() {
    for (b, t) in [(2, 0), (0, 5)] {
        let case = good_case().without("k").floats("k", &[b, HK, t, D], &[]);
        for backend in backends() {
            let (shape, latents) = run("project", backend, &case, &[]).tensor("latents");
            assert_eq!((shape, latents.len()), (vec![b, N, t, R], 0));
        }
    }
}

#[test]
fn more_latents_than_values_are_a_projection_too() {
    let mut rng = Rng::new(4);
    let case = Case::default()
        .floats("k", &[1, 1, 3, 8], &rng.normals(24, 1.0))
        .floats("encoder", &[1, 11, 8], &rng.normals(88, 0.3))
        .ints("groups", &[1, 1], &[0]);
    let expected = run("project", "reference", &case, &[]).tensor("latents").1;
    for backend in backends() {
        let (shape, latents) = run("project", backend, &case, &[]).tensor("latents");
        assert_eq!(shape, [1, 1, 3, 11]);
        compare(&latents, &expected, Tolerance::project(Type::F32, 8, 5.0)).unwrap();
    }
}

#[test]
fn bad_input_is_named() {
    let groups = |shape: &[usize], g: &[i32]| good_case().without("groups").ints("groups", shape, g);
    let encoder = |shape: &[usize]| good_case().without("encoder").floats("encoder", shape, &vec![0.5; shape.iter().product()]);
    for backend in backends() {
        for (case, word) in [
            (good_case().without("k"), "no tensor k"),
            (good_case().without("encoder"), "no tensor encoder"),
            (good_case().without("groups"), "no tensor groups"),
            (good_case().without("groups").floats("groups", &[3, 2], &[0.0; 6]), "I32"),
            (groups(&[6], &GROUPS), "2 dimensions"),
            (groups(&[3, 2], &[2, 0, 3, 4, 1, 2]), "kv head 4"),
            (groups(&[3, 2], &[2, 0, 3, -1, 1, 2]), "kv head -1"),
            (groups(&[3, 2], &[2, 0, 3, 3, 1, 2]), "twice"),
            (groups(&[2, 2], &[2, 0, 3, 1]), "encoder"),
            (groups(&[2, 3], &GROUPS), "encoder"),
            (groups(&[3, 0], &[]), "encoder"),
            (encoder(&[N, R, SIZE * D - 1]), "encoder"),
            (encoder(&[N, 0, SIZE * D]), "nothing"),
            (encoder(&[R, SIZE * D]), "3 dimensions"),
            (good_case().key("rank", "37"), "unknown key"),
            (good_case().key("dtype", "f64"), "dtype"),
            (good_case().floats("mean", &[HK, D], &[0.0; HK * D]), "unknown tensor"),
        ] {
            run("project", backend, &case, &[]).fails(2, word);
        }
    }
}

#[test]
fn what_no_kernel_does_is_unsupported() {
    let Some(kernels) = kernels() else { return };
    run("project", kernels, &good_case(), &["--set", "dtype=f32"]).fails(3, "unsupported");
    let case = Case::default().floats("k", &[1, 1, 2, 12], &[0.5; 24]).floats("encoder", &[1, 3, 12], &[0.25; 36]).ints(
        "groups",
        &[1, 1],
        &[0],
    );
    run("project", kernels, &case, &[]).fails(3, "unsupported");
    let (_, latents) = run("project", "reference", &case, &[]).tensor("latents");
    assert_eq!(latents, [1.5; 6]);
}
