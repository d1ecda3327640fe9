//! Several plans of one run, against the activations themselves.

use super::*;
use kvlar_calibrate::Side;

fn model() -> Llama {
    Llama::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny-llama")).unwrap()
}

fn windows(model: &Llama) -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/calibration.txt")).unwrap();
    crate::eval::windows(model, &text, 96, 3).unwrap()
}

/// Σ ‖y − ŷ‖² and Σ ‖y‖² of a side over rows y.
fn energies(side: &Side, y: &[f32]) -> [f64; 2] {
    let Side::LowRank(f) = side else { panic!("dense") };
    let decoded = f.decode(&f.encode(y));
    let lost = y.iter().zip(decoded).map(|(y, d)| (f64::from(*y) - d).powi(2)).sum();
    [lost, y.iter().map(|y| f64::from(*y).powi(2)).sum()]
}

#[test]
fn a_plan_loses_what_its_report_says() {
    let model = model();
    let windows = windows(&model);
    let calibration = calibrate(&model, &windows).unwrap();
    let settings = [
        RecalkvConfig { kept: 0.5, ..RecalkvConfig::default() },
        RecalkvConfig { kept: 0.375, budget: Budget::Spectral, weighting_keys: Weighting::None, ..RecalkvConfig::default() },
        RecalkvConfig { kept: 0.5, values: ValueFit::WeightSvd, key_group: 4, value_group: 1, ..RecalkvConfig::default() },
    ];
    for config in settings {
        let (plan, report) = plan(&calibration, &config).unwrap();
        assert_eq!(report.rows, windows.iter().map(|w| w.len() as u64).sum::<u64>());
        let mut sums = vec![[[0.0; 2]; 2]; plan.layers.len()];
        for w in &windows {
            let observe = |layer: usize, _: &[f32], k: &[f32], v: &[f32]| {
                for (sum, (side, y)) in
                    sums[layer].iter_mut().zip([(&plan.layers[layer].keys, k), (&plan.layers[layer].values, v)])
                {
                    sum.iter_mut().zip(energies(side, y)).for_each(|(s, e)| *s += e);
                }
                Ok(())
            };
            model.capture(w, observe).unwrap();
        }
        for (l, (pair, report)) in sums.iter().zip(&report.layers).enumerate() {
            for ([lost, all], said) in pair.iter().zip([report.keys.discarded, report.values.discarded]) {
                assert!(said > 0.0 && said < 1.0);
                assert!((lost / all - said).abs() < 1e-3 * said, "layer {l}: {} lost, the report says {said}", lost / all);
            }
        }
    }
}

#[test]
fn importances_and_weights_are_taken_once_and_only_where_needed() {
    let model = model();
    let windows = windows(&model);
    let calibration = calibrate(&model, &windows[..1]).unwrap();
    let plain = RecalkvConfig { weighting_values: Weighting::None, ..RecalkvConfig::default() };
    let (first, _) = plan(&calibration, &plain).unwrap();
    assert!(calibration.importance.get().is_none() && calibration.out.get().is_none() && calibration.values.get().is_none());
    plan(&calibration, &RecalkvConfig { values: ValueFit::Alternating { rounds: 1 }, ..RecalkvConfig::default() }).unwrap();
    assert_eq!(calibration.out.get().map(Vec::len), Some(6));
    assert_eq!(calibration.values.get().map(Vec::len), Some(6));
    assert!(calibration.importance.get().is_none());
    plan(&calibration, &RecalkvConfig { budget: Budget::Proportional, ..plain.clone() }).unwrap();
    let at = calibration.importance.get().unwrap().as_ptr();
    let mut expected = Fisher::new();
    expected.add(&model, &windows[0]).unwrap();
    assert_eq!(calibration.importance.get().unwrap(), &expected.importance().unwrap());
    plan(&calibration, &RecalkvConfig { budget: Budget::Proportional, ..plain.clone() }).unwrap();
    assert_eq!(at, calibration.importance.get().unwrap().as_ptr());
    // Earlier plans do not change later ones.
    assert_eq!(first, plan(&calibration, &plain).unwrap().0);
}

#[test]
fn no_windows_is_an_error() {
    let model = model();
    let Err(e) = calibrate(&model, &[]) else { panic!("it ran") };
    assert!(e.to_string().contains("at least one window"));
}

#[test]
fn reports_are_named_after_their_plans() {
    for (plan, report) in [
        ("plan.safetensors", "plan.report.json"),
        ("a/b.c/plan.v2.safetensors", "a/b.c/plan.v2.report.json"),
        ("plan", "plan.report.json"),
        ("plan.v2", "plan.v2.report.json"),
        ("plan.v1", "plan.v1.report.json"),
        (".safetensors", ".safetensors.report.json"),
    ] {
        assert_eq!(report_path(Path::new(plan)), Path::new(report));
    }
}

/// A file that is open, or has another name, stays as it was: the new one takes its place whole.
#[test]
fn a_report_replaces_an_older_one_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("report.json"), dir.path().join("other"));
    std::fs::write(&path, "old").unwrap();
    std::fs::hard_link(&path, &other).unwrap();
    write_whole(&path, b"new").unwrap();
    assert_eq!((std::fs::read(&path).unwrap(), std::fs::read(&other).unwrap()), (b"new".to_vec(), b"old".to_vec()));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    assert!(write_whole(&dir.path().join("none/report.json"), b"new").is_err());
    assert!(write_whole(dir.path(), b"new").is_err());
}
