//! How alike heads are: CKA (arXiv 2505.24357 §3.1), from second moments alone.

use crate::moments::SecondMoment;

/// Uncentred linear CKA of every pair of heads, [heads, heads]: ‖C_ij‖² / (‖C_ii‖ ‖C_jj‖), C_ij = Σ y_i y_jᵀ, Frobenius
/// norms.
///
/// In [0, 1], symmetric, 1 on the diagonal, unchanged by a rotation or a scaling of a head. The paper centres over input
/// coordinates of whitened weights, which depends on the square root that whitens; this form does not. A head of zeros has
/// similarity 0 to all others.
pub fn cka(moment: &SecondMoment) -> Vec<f64> {
    let (heads, d) = (moment.heads(), moment.dim());
    let norm2 = |i: usize, j: usize| {
        let products = (0..d).flat_map(|a| (0..d).map(move |b| (a, b)));
        products.map(|(a, b)| moment.product((i, a), (j, b)).powi(2)).sum::<f64>()
    };
    let own: Vec<f64> = (0..heads).map(|i| norm2(i, i).sqrt()).collect();
    let mut similarity = vec![1.0; heads * heads];
    for i in 0..heads {
        for j in 0..i {
            let both = own[i] * own[j];
            let s = if both > 0.0 { (norm2(i, j) / both).min(1.0) } else { 0.0 };
            similarity[i * heads + j] = s;
            similarity[j * heads + i] = s;
        }
    }
    similarity
}

/// Least, mean and greatest similarity of two different heads; `None` with fewer than two.
pub fn summary(similarity: &[f64], heads: usize) -> Option<[f64; 3]> {
    let pairs = (0..heads).flat_map(|i| (0..i).map(move |j| similarity[i * heads + j]));
    let (mut low, mut high, mut sum, mut n) = (f64::INFINITY, f64::NEG_INFINITY, 0.0, 0);
    for s in pairs {
        (low, high, sum, n) = (low.min(s), high.max(s), sum + s, n + 1);
    }
    (n > 0).then(|| [low, sum / f64::from(n), high])
}
