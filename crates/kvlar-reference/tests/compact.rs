//! Compaction by hand, and what holds for any mask.

use kvlar_reference::testing::Rng;
use kvlar_reference::{AttendInput, CompactInput, CompactOrder, Compacted, attend, compact};
use proptest::prelude::*;

/// Rows whose numbers say where they were: 1000 head + 10 row + dimension.
fn numbered(heads: usize, rows: usize, dim: usize) -> Vec<f32> {
    let all = (0..heads).flat_map(|h| (0..rows).flat_map(move |t| (0..dim).map(move |i| 1000 * h + 10 * t + i)));
    all.map(|x| x as f32).collect()
}

fn run(k: &[f32], v: &[f32], keep: &[u8], positions: &[i32], order: CompactOrder) -> Compacted {
    let rows = positions.len();
    let heads = keep.len() / rows.max(1);
    let (head_dim, value_dim) = (k.len() / keep.len().max(1), v.len() / keep.len().max(1));
    compact(&CompactInput { heads, rows, head_dim, value_dim, k, v, keep, positions, order }).unwrap()
}

#[test]
fn kept_rows_move_together_in_order() {
    // Rows 0, 2, 5, 9 of ten; none; all.
    let mut keep = [0u8; 30];
    [0, 2, 5, 9].into_iter().for_each(|row| keep[row] = 1);
    keep[20..].fill(1);
    let positions: Vec<i32> = (0..10).map(|t| 100 + 3 * t).collect();
    let (k, v) = (numbered(3, 10, 2), numbered(3, 10, 1));
    let r = run(&k, &v, &keep, &positions, CompactOrder::Keep);
    assert_eq!(r.lengths, [4, 0, 10]);
    assert_eq!(r.source, [0, 2, 5, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(r.positions[..5], [100, 106, 115, 127, 100]);
    assert_eq!(r.k[..10], [0.0, 1.0, 20.0, 21.0, 50.0, 51.0, 90.0, 91.0, 2000.0, 2001.0]);
    assert_eq!(r.v[..5], [0.0, 20.0, 50.0, 90.0, 2000.0]);
    // Holes 1 and 3 are filled from the tail.
    let r = run(&k, &v, &keep, &positions, CompactOrder::Any);
    assert_eq!((&r.lengths[..], &r.source[..4]), (&[4, 0, 10][..], &[0, 9, 2, 5][..]));
    assert_eq!((&r.positions[..4], &r.v[..4]), (&[100, 127, 106, 115][..], &[0.0, 90.0, 20.0, 50.0][..]));
}

#[test]
fn any_bits_stay_and_sizes_may_be_none() {
    let odd = [f32::NAN, f32::INFINITY, -0.0, 1e-40];
    let r = run(&odd, &odd, &[1; 4], &[3, -7, i32::MAX, i32::MIN], CompactOrder::Keep);
    assert!(r.k.iter().zip(odd).all(|(a, b)| a.to_bits() == b.to_bits()));
    assert_eq!(r.positions, [3, -7, i32::MAX, i32::MIN]);
    assert_eq!(run(&[], &[], &[], &[], CompactOrder::Keep), Compacted::default());
    let none = CompactInput {
        heads: 2,
        rows: 0,
        head_dim: 3,
        value_dim: 3,
        k: &[],
        v: &[],
        keep: &[],
        positions: &[],
        order: CompactOrder::Any,
    };
    assert_eq!(compact(&none).unwrap().lengths, [0, 0]);
    let says = |i: CompactInput<'_>, word: &str| {
        let e = compact(&i).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    };
    says(CompactInput { k: &[1.0], ..none }, "k: expected");
    says(CompactInput { v: &[1.0], ..none }, "v: expected");
    says(CompactInput { keep: &[1], ..none }, "keep: expected");
    says(CompactInput { positions: &[1], ..none }, "positions: expected");
    let one = CompactInput { heads: 1, rows: 1, head_dim: 0, value_dim: 0, keep: &[1], positions: &[0], ..none };
    assert_eq!(compact(&one).unwrap().source, [0]);
    says(CompactInput { keep: &[2], ..one }, "keep: 2");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_kept_row_comes_through_once(heads in 1..4usize, rows in 1..20usize, bits in prop::collection::vec(0..2u8, 60)) {
        let keep = &bits[..heads * rows];
        let (k, v) = (numbered(heads, rows, 3), numbered(heads, rows, 2));
        let positions: Vec<i32> = (0..rows as i32).map(|t| t * t - 5).collect();
        for order in [CompactOrder::Keep, CompactOrder::Any] {
            let r = run(&k, &v, keep, &positions, order);
            let mut at = 0;
            for head in 0..heads {
                let kept: Vec<i32> = (0..rows).filter(|row| keep[head * rows + row] == 1).map(|row| row as i32).collect();
                let n = kept.len();
                prop_assert_eq!(r.lengths[head] as usize, n);
                let source = &r.source[at..][..n];
                let mut ascending = source.to_vec();
                ascending.sort_unstable();
                prop_assert_eq!(&ascending, &kept);
                if order == CompactOrder::Keep {
                    prop_assert_eq!(source, &kept);
                } else {
                    // Whatever need not move does not.
                    prop_assert!((0..n).all(|i| keep[head * rows + i] == 0 || source[i] as usize == i));
                }
                for (i, &row) in source.iter().enumerate() {
                    let (place, was) = (at + i, head * rows + row as usize);
                    prop_assert_eq!(r.positions[place], positions[row as usize]);
                    prop_assert_eq!(&r.k[place * 3..][..3], &k[was * 3..][..3]);
                    prop_assert_eq!(&r.v[place * 2..][..2], &v[was * 2..][..2]);
                }
                at += n;
            }
            prop_assert_eq!(at, r.source.len());
        }
    }

    /// Attention over what is left, in any order, is attention in which the others are not seen.
    #[test]
    fn attention_sees_the_same(rows in 1..20usize, bits in prop::collection::vec(0..2u8, 20), seed in any::<u64>()) {
        let (keep, d) = (&bits[..rows], 4);
        let mut rng = Rng::new(seed);
        let (q, k, v) = (rng.normals(d, 1.0), rng.normals(rows * d, 1.0), rng.normals(rows * d, 1.0));
        let positions: Vec<i32> = (0..rows as i32).collect();
        let hidden: Vec<i32> = positions.iter().zip(keep).map(|(&p, &m)| if m == 1 { p } else { 1000 }).collect();
        let over = |k: &[f32], v: &[f32], rows: usize, positions: &[i32]| {
            let sizes = AttendInput { seqs: 1, q_heads: 1, kv_heads: 1, query_rows: 1, rows, head_dim: d, value_dim: d, ..Default::default() };
            let i = AttendInput { q: &q, k, v, positions: Some(positions), q_positions: Some(&[rows as i32 + 50]), ..sizes };
            attend(&i).unwrap()
        };
        let whole = over(&k, &v, rows, &hidden);
        for order in [CompactOrder::Keep, CompactOrder::Any] {
            let r = run(&k, &v, keep, &positions, order);
            let left = over(&r.k, &r.v, r.source.len(), &r.positions);
            prop_assert!(left.out.iter().zip(&whole.out).all(|(a, b)| (a - b).abs() < 1e-5), "{:?} {:?}", left.out, whole.out);
            prop_assert!(left.lse == whole.lse || (left.lse[0] - whole.lse[0]).abs() < 1e-5);
        }
    }
}
