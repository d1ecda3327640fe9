//! Codebooks of product quantization against data whose best centroids are known.

use kvlar_calibrate::{CodebookConfig, Codebooks, Error, fit_codebooks};
use kvlar_reference::testing::Rng;
use kvlar_reference::{decode_pq, decode_pq16, encode_pq, encode_pq16};

fn config(subvectors: usize, centroids: usize) -> CodebookConfig {
    CodebookConfig { centroids, ..CodebookConfig::new(subvectors) }
}

/// Centroids of one head and sub-vector, in order of their first number.
fn sorted(books: &Codebooks, at: usize, c: usize, width: usize) -> Vec<Vec<f32>> {
    let mut all: Vec<Vec<f32>> = books.values[at * c * width..][..c * width].chunks(width).map(<[f32]>::to_vec).collect();
    all.sort_by(|a, b| a.partial_cmp(b).unwrap());
    all
}

/// What the codebooks lose, as the reference encodes with them: mean over rows of the squared distance.
fn lost(k: &[f32], heads: usize, dim: usize, c: &CodebookConfig, books: &Codebooks, head: usize) -> f64 {
    let size = c.centroids * dim;
    let own = kvlar_reference::Codebooks {
        subvectors: c.subvectors,
        centroids: c.centroids,
        values: &books.values[head * size..][..size],
    };
    let rows = k.chunks(dim).skip(head).step_by(heads);
    let distance = |x: &[f32]| {
        let decoded = decode_pq(&encode_pq(x, &own).unwrap(), dim, &own).unwrap();
        x.iter().zip(decoded).map(|(a, b)| (f64::from(*a) - f64::from(b)).powi(2)).sum::<f64>()
    };
    let all: Vec<f64> = rows.map(distance).collect();
    all.iter().sum::<f64>() / all.len() as f64
}

#[test]
fn well_separated_clusters_are_found_exactly() {
    // Two heads, two sub-vectors each; every sub-vector has four clusters a hundred apart, their points within 1 of the
    // centre and symmetric about it.
    let (heads, dim, c) = (2, 4, 4);
    let centre = |head: usize, sub: usize, i: usize| [100.0 * i as f32, -50.0 * (head + 2 * sub) as f32 + 100.0 * (i / 2) as f32];
    let mut k = Vec::new();
    for row in 0..80 {
        for head in 0..heads {
            for sub in 0..2 {
                // Sub-vectors change clusters at different rows.
                let i = if sub == 0 { row % 4 } else { row / 4 % 4 };
                let side = if row / 16 % 2 == 0 { 1.0 } else { -1.0 };
                let [x, y] = centre(head, sub, i);
                k.extend(if row < 64 { [x + side, y - 0.5 * side] } else { [x, y] });
            }
        }
    }
    for seed in 0..10 {
        let settings = CodebookConfig { seed, ..config(2, c) };
        let books = fit_codebooks(&k, heads, dim, &settings).unwrap();
        assert_eq!((books.values.len(), books.error.len()), (heads * 2 * c * 2, heads));
        for head in 0..heads {
            for sub in 0..2 {
                let mut expected: Vec<Vec<f32>> = (0..4).map(|i| centre(head, sub, i).to_vec()).collect();
                expected.sort_by(|a, b| a.partial_cmp(b).unwrap());
                assert_eq!(sorted(&books, head * 2 + sub, c, 2), expected, "seed {seed}");
            }
            // 64 of 80 rows lie (1, 0.5) off in both sub-vectors.
            assert!((books.error[head] - 2.0 * 1.25 * 0.8).abs() < 1e-9, "{}", books.error[head]);
        }
    }
}

#[test]
fn the_error_is_what_encoding_loses() {
    let (heads, dim) = (3, 12);
    let k = Rng::new(1).normals(500 * heads * dim, 1.0);
    for settings in [config(4, 16), config(1, 7), config(12, 3), CodebookConfig { max_rows: Some(100), ..config(3, 16) }] {
        let books = fit_codebooks(&k, heads, dim, &settings).unwrap();
        for (head, error) in books.error.iter().enumerate() {
            let expected = lost(&k, heads, dim, &settings, &books, head);
            assert!((error - expected).abs() < 1e-9 * (1.0 + expected), "{error} and {expected}");
        }
    }
}

#[test]
fn rounds_never_lose_more_and_end_early() {
    let k = Rng::new(2).normals(600 * 4, 1.0);
    for seed in 0..4 {
        let mut last = f64::INFINITY;
        let fit = |rounds| fit_codebooks(&k, 1, 4, &CodebookConfig { rounds, seed, ..config(2, 24) }).unwrap();
        for rounds in 0..12 {
            let error = fit(rounds).error[0];
            assert!(error <= last * (1.0 + 1e-6), "round {rounds}: {error} after {last}");
            last = error;
        }
        assert!(last < 0.9 * fit(0).error[0], "rounds gain something");
        // Done is done: more rounds change nothing once no row changes its centroid.
        assert_eq!(fit(500), fit(100_000));
    }
    // The start is made of rows.
    let books = fit_codebooks(&k, 1, 4, &CodebookConfig { rounds: 0, ..config(2, 24) }).unwrap();
    let rows: Vec<&[f32]> = k.chunks(4).map(|r| &r[..2]).collect();
    assert!(books.values[..48].chunks(2).all(|c| rows.contains(&c)));
}

#[test]
fn threads_do_not_matter_and_seeds_do() {
    let k = Rng::new(3).normals(400 * 2 * 16, 1.0);
    let settings = CodebookConfig { seed: 7, max_rows: Some(300), ..config(8, 32) };
    let with = |threads: usize, settings: &CodebookConfig| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| fit_codebooks(&k, 2, 16, settings)).unwrap()
    };
    let one = with(1, &settings);
    for threads in [2, 3, 8] {
        assert_eq!(with(threads, &settings), one);
    }
    assert_ne!(with(2, &CodebookConfig { seed: 8, ..settings }), one);
    assert_ne!(with(2, &CodebookConfig { max_rows: None, ..settings }), one);
    assert_eq!(
        with(2, &CodebookConfig { max_rows: Some(400), ..settings }),
        with(2, &CodebookConfig { max_rows: None, ..settings })
    );
    // Sub-vectors with the same data draw from streams of their own, and heads do.
    let same: Vec<f32> = Rng::new(4).normals(200, 1.0).iter().flat_map(|x| [*x; 4]).collect();
    let books = fit_codebooks(&same, 2, 2, &CodebookConfig { rounds: 0, ..config(2, 8) }).unwrap();
    let parts: Vec<&[f32]> = books.values.chunks(8).collect();
    assert!((0..4).all(|i| (0..i).all(|j| parts[i] != parts[j])));
    // What the first head gets does not depend on the others.
    let first: Vec<f32> = k.chunks(32).flat_map(|row| row[..16].to_vec()).collect();
    assert_eq!(fit_codebooks(&first, 1, 16, &settings).unwrap().values, one.values[..32 * 16]);
}

#[test]
fn duplicates_and_few_rows_repeat_centroids() {
    // Three distinct rows, many times over, for eight centroids.
    let distinct = [[1.0f32, 2.0], [-3.0, 0.5], [0.1, 7.0]];
    let k: Vec<f32> = (0..90).flat_map(|i| distinct[i * i % 3 + i % 2 % 3]).collect();
    for (k, n) in [(k.as_slice(), 3), (&distinct.concat()[..], 3), (&distinct.concat()[..2], 1)] {
        for seed in 0..5 {
            let books = fit_codebooks(k, 1, 2, &CodebookConfig { seed, ..config(1, 8) }).unwrap();
            assert_eq!(books.error, [0.0]);
            let centroids: Vec<&[f32]> = books.values.chunks(2).collect();
            let used = &centroids[..n];
            assert!(k.chunks(2).all(|row| used.contains(&row)), "the first are all that there are");
            assert!(centroids[n..].iter().all(|c| *c == used[n - 1]), "the others repeat the last of them");
        }
    }
    // All rows are the same.
    let books = fit_codebooks(&[0.3; 40], 2, 4, &config(2, 256)).unwrap();
    assert!(books.values.iter().all(|x| *x == 0.3) && books.error == [0.0, 0.0]);
}

#[test]
fn centroids_that_lose_all_rows_go_where_they_help() {
    // (point, times) of which plain k-means leaves a centroid without rows for many starts: its rows lie at both ends of its
    // cell, and the means beside it come closer to them than their own.
    let plane = [([2.0, 17.0], 1), ([10.0, 11.0], 8), ([27.0, 23.0], 1), ([23.0, 11.0], 1), ([29.0, 1.0], 1), ([9.0, 10.0], 8)];
    let line = [(19.0, 1), (27.0, 6), (6.0, 4), (16.0, 1), (10.0, 4), (28.0, 8), (15.0, 2)].map(|(x, n)| ([x, 0.0], n));
    for (points, c) in [(&plane[..], 3), (&line[..], 4)] {
        let k: Vec<f32> = points.iter().flat_map(|(point, times)| point.repeat(*times)).collect();
        for seed in 0..300 {
            let books = fit_codebooks(&k, 1, 2, &CodebookConfig { seed, ..config(1, c) }).unwrap();
            let own = kvlar_reference::Codebooks { subvectors: 1, centroids: c, values: &books.values };
            let mut used: Vec<u8> = k.chunks(2).flat_map(|x| encode_pq(x, &own).unwrap()).collect();
            used.sort_unstable();
            used.dedup();
            assert_eq!(used.len(), c, "seed {seed}: there are more points than centroids");
        }
    }
}

#[test]
fn rows_in_the_middle_go_to_the_lower_centroid() {
    let k = [0.0, 1.0, 2.0];
    let (mut seen, fit) = (0, |seed, rounds| fit_codebooks(&k, 1, 1, &CodebookConfig { seed, rounds, ..config(1, 2) }).unwrap());
    for seed in 0..40 {
        let (start, end) = (fit(seed, 0).values, fit(seed, 25).values);
        if !start.contains(&1.0) {
            assert_eq!(end, [(start[0] + 1.0) / 2.0, start[1]]);
            seen += 1;
        }
    }
    assert!(seen > 5, "starts of both ends are common");
}

#[test]
fn normal_pairs_lose_what_is_published() {
    // hcattention.md 2.3: 2 dimensions, 256 centroids: 0.0088 a value, of rows that nothing was fitted to. Of those that were
    // it is less.
    let n = 16_384;
    let (k, other) = (Rng::new(6).normals(n * 2, 1.0), Rng::new(7).normals(n * 2, 1.0));
    let books = fit_codebooks(&k, 1, 2, &config(1, 256)).unwrap();
    let (fitted, held_out) = (books.error[0] / 2.0, lost(&other, 1, 2, &config(1, 256), &books, 0) / 2.0);
    assert!((held_out / 0.0088 - 1.0).abs() < 0.1, "{held_out}");
    assert!((0.006..held_out).contains(&fitted), "{fitted} of rows fitted to");
}

#[test]
fn large_numbers_neither_overflow_nor_panic() {
    let k = [1e30, -1e30, 1e30, 3e38, -3e38, 0.0];
    let books = fit_codebooks(&k, 1, 1, &config(1, 2)).unwrap();
    assert!(books.values.iter().all(|x| x.is_finite()) && books.error[0].is_finite());
}

#[test]
fn wrong_input_is_named() {
    let k = [0.5; 24];
    let fit = |k: &[f32], heads, dim, settings: CodebookConfig| fit_codebooks(k, heads, dim, &settings).unwrap_err();
    let says = |e: Error, words: &[&str]| {
        let text = e.to_string();
        words.iter().for_each(|w| assert!(text.contains(w), "{text:?} does not say {w:?}"));
    };
    says(fit(&k, 2, 6, config(4, 8)), &["m: 4", "6"]);
    says(fit(&k, 2, 6, config(0, 8)), &["m: 0"]);
    says(fit(&k, 2, 6, config(3, 0)), &["c: 0", "1 to 256"]);
    says(fit(&k, 2, 6, config(3, 257)), &["c: 257"]);
    says(fit(&k, 2, 6, CodebookConfig { max_rows: Some(0), ..config(3, 8) }), &["max_rows"]);
    says(fit(&[], 2, 6, config(3, 8)), &["k: no rows"]);
    says(fit(&k, 5, 3, config(3, 8)), &["k: 24 elements", "[n, heads, dim]"]);
    says(fit(&k, 0, 6, config(3, 8)), &["0 heads"]);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut k = k;
        k[13] = bad;
        says(fit(&k, 2, 6, config(3, 8)), &["k: row 1", &bad.to_string()]);
    }
}

/// The paper's 2048 centroids take 16 bits a code and say 11: in as many bytes, twice as many sub-vectors of 256 lose far less.
#[test]
fn codes_of_two_bytes_are_fitted_for_comparison() {
    let (n, dim) = (6000, 4);
    let mut rng = Rng::new(3);
    // Neighbouring dimensions go together, which is what longer sub-vectors are for.
    let k: Vec<f32> = (0..n)
        .flat_map(|_| {
            let x = rng.normals(4, 1.0);
            [x[0], 0.8 * x[0] + 0.6 * x[1], x[2], 0.8 * x[2] + 0.6 * x[3]]
        })
        .collect();
    let paper = CodebookConfig { two_bytes: true, rounds: 6, ..config(2, 2048) };
    let books = fit_codebooks(&k, 1, dim, &paper).unwrap();
    let own = kvlar_reference::Codebooks { subvectors: 2, centroids: 2048, values: &books.values };
    let mut most = 0;
    let lost_of = |x: &[f32]| {
        let codes = encode_pq16(x, &own).unwrap();
        most = most.max(codes.iter().copied().max().unwrap());
        let decoded = decode_pq16(&codes, dim, &own).unwrap();
        x.iter().zip(decoded).map(|(a, b)| (f64::from(*a) - f64::from(b)).powi(2)).sum::<f64>()
    };
    let lost = k.chunks(dim).map(lost_of).sum::<f64>() / n as f64;
    assert!((lost / books.error[0] - 1.0).abs() < 1e-9 && most > 255);
    let bytes = fit_codebooks(&k, 1, dim, &CodebookConfig { rounds: 6, ..config(4, 256) }).unwrap();
    assert!(bytes.error[0] < 0.2 * books.error[0], "{} against {}", bytes.error[0], books.error[0]);
    // One byte names 256 of them.
    assert!(encode_pq(&k[..dim], &own).is_err() && decode_pq(&[0, 0], dim, &own).is_err());
    let e = fit_codebooks(&k, 1, dim, &CodebookConfig { two_bytes: false, ..paper }).unwrap_err().to_string();
    assert!(e.contains("c: 2048") && e.contains("1 to 256"), "{e}");
}
