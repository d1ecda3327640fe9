//! Sums of errors.

use super::*;

fn layer(squares: [f64; 2], noise: Option<(f64, usize)>) -> LayerError {
    LayerError { squares, noise }
}

#[test]
fn variances_ignore_shifts() {
    assert_eq!(variance(&[]), 0.0);
    assert_eq!(variance(&[7.0]), 0.0);
    assert_eq!(variance(&[3.0; 9]), 0.0);
    assert_eq!(variance(&[1.0, 3.0]), 1.0);
    assert_eq!(variance(&[1001.0, 1003.0]), 1.0);
    assert!(variance(&[1.0, f32::NAN]).is_nan() && variance(&[1.0, f32::INFINITY]).is_nan());
}

#[test]
fn texts_add_up() {
    let mut sum = AttentionError::default();
    assert_eq!((sum.relative(), sum.largest_noise()), (0.0, None));
    sum.add(&AttentionError { layers: vec![layer([1.0, 4.0], Some((2.0, 4))), layer([0.0, 1.0], Some((0.0, 4)))] });
    assert_eq!((sum.relative(), sum.largest_noise()), ((1.0f64 / 5.0).sqrt(), Some(0.5f64.sqrt())));
    sum.add(&AttentionError { layers: vec![layer([3.0, 12.0], Some((0.0, 4))), layer([0.0, 1.0], Some((36.0, 8)))] });
    assert_eq!(sum.layers[0].attention(), 0.5);
    assert_eq!(sum.layers.iter().map(LayerError::logit_noise).collect::<Vec<_>>(), [Some(0.5), Some(3f64.sqrt())]);
    assert_eq!(sum.largest_noise(), Some(3f64.sqrt()));
}

#[test]
fn what_is_not_finite_or_not_measured_is_not_hidden() {
    let nan = layer([0.0, 1.0], Some((f64::NAN, 4)));
    let fine = layer([0.0, 1.0], Some((4.0, 4)));
    for layers in [vec![nan, fine], vec![fine, nan], vec![fine, nan, fine]] {
        assert!(AttentionError { layers }.largest_noise().is_some_and(f64::is_nan));
    }
    let mut none = AttentionError { layers: vec![fine, layer([1.0, 1.0], None)] };
    assert_eq!((none.layers[1].logit_noise(), none.largest_noise()), (None, None));
    let other = AttentionError { layers: vec![fine; 2] };
    none.add(&other);
    assert_eq!(none.largest_noise(), None);
}
