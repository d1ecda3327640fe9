//! Steps, forks and rollback, where nothing is evicted.

use super::lab::{HEADS, LAYERS, Lab, PAGE, Q_HEADS, keep_all};
use crate::devices::on_every_device;
use kvlar::{Codec, Device};
use kvlar_cache::{BatchShape, CacheError};

on_every_device!(
    sequences_of_different_lengths_share_a_batch,
    forks_share_pages_until_they_differ,
    a_step_that_is_taken_back_leaves_no_trace,
    a_full_pool_is_an_error_that_changes_nothing,
    committed_tokens_stay,
);

fn lab(device: &Device, codec: Codec, pages: usize) -> Lab {
    Lab::new(device, codec, pages, keep_all())
}

fn sequences_of_different_lengths_share_a_batch(device: &Device) {
    for codec in [Codec::F16, Codec::Int8, Codec::Int4] {
        let mut lab = lab(device, codec, 200);
        let (a, b, c) = (lab.create().unwrap(), lab.create().unwrap(), lab.create().unwrap());
        lab.extend(&[(a, 33)]).unwrap();
        lab.extend(&[(b, 5), (c, 16), (a, 1)]).unwrap();
        lab.extend(&[(c, 0), (a, 2)]).unwrap();
        lab.check();
        let mut batch = lab.cache.batch(BatchShape::new(3, 1, Q_HEADS)).unwrap();
        for _ in 0..20 {
            lab.extend_in(&mut batch, &[(a, 1), (c, 1), (b, 1)]).unwrap();
        }
        // Another order: tables are those of the sequences, not of the places.
        lab.extend_in(&mut batch, &[(b, 1), (a, 1)]).unwrap();
        lab.check();
    }
}

fn forks_share_pages_until_they_differ(device: &Device) {
    let mut lab = lab(device, Codec::F16, 60);
    let a = lab.create().unwrap();
    lab.extend(&[(a, PAGE + 3)]).unwrap();
    let b = lab.fork(a).unwrap();
    let all = LAYERS * HEADS;
    assert_eq!(lab.cache.usage().shared, 2 * all);
    lab.extend(&[(a, 1), (b, 2)]).unwrap();
    // The last page of each head was copied once; the first is shared still.
    assert_eq!((lab.cache.usage().shared, lab.cache.usage().pages - lab.cache.usage().free), (all, 3 * all));
    lab.check();
    let c = lab.fork(b).unwrap();
    lab.truncate(c, 4).unwrap();
    lab.extend(&[(c, 1), (b, 1), (a, 1)]).unwrap();
    lab.check();
    for seq in [b, a, c] {
        lab.remove(seq).unwrap();
        lab.check();
    }
    assert_eq!(lab.cache.usage().free, lab.cache.usage().pages);
}

fn a_step_that_is_taken_back_leaves_no_trace(device: &Device) {
    let mut lab = lab(device, Codec::F16, 60);
    let a = lab.create().unwrap();
    lab.extend(&[(a, 30)]).unwrap();
    let before = lab.cache.usage();
    lab.extend(&[(a, 7)]).unwrap(); // the lab cancels steps of 7
    assert_eq!(lab.cache.usage(), before);
    let b = lab.fork(a).unwrap();
    lab.extend(&[(a, 7), (b, 1)]).unwrap();
    lab.check();
    lab.extend(&[(a, 1), (b, 1)]).unwrap();
    lab.check();
}

fn a_full_pool_is_an_error_that_changes_nothing(device: &Device) {
    let mut lab = lab(device, Codec::F16, 3 * LAYERS * HEADS);
    let a = lab.create().unwrap();
    lab.extend(&[(a, 2 * PAGE)]).unwrap();
    let b = lab.fork(a).unwrap();
    let before = lab.cache.usage();
    let error = lab.extend(&[(a, 1), (b, 1)]).unwrap_err();
    let (needed, free, capacity) = (2 * LAYERS * HEADS, LAYERS * HEADS, 3 * LAYERS * HEADS);
    assert_eq!(error, CacheError::OutOfPages { of: "pages", needed, free, capacity });
    assert_eq!(lab.cache.usage(), before);
    lab.extend(&[(b, 1)]).unwrap();
    lab.remove(b).unwrap();
    lab.extend(&[(a, 1)]).unwrap();
    lab.check();
    assert!(matches!(lab.extend(&[(a, 200)]), Err(CacheError::TooLong { rows: 233, max: 160, .. })));
    assert!(matches!(lab.extend(&[(b, 1)]), Err(CacheError::UnknownSequence(_))));
    assert!(matches!(lab.extend(&[(a, 1), (a, 1)]), Err(CacheError::Busy(_))));
    for _ in 0..3 {
        lab.create().unwrap();
    }
    assert!(matches!(lab.create(), Err(CacheError::OutOfPages { of: "sequences", .. })));
    assert!(matches!(lab.fork(a), Err(CacheError::OutOfPages { of: "sequences", .. })));
    lab.check();
}

fn committed_tokens_stay(device: &Device) {
    let mut lab = lab(device, Codec::F16, 60);
    let a = lab.create().unwrap();
    lab.extend(&[(a, 40)]).unwrap();
    lab.commit(a, 20).unwrap();
    assert!(matches!(lab.truncate(a, 19), Err(CacheError::Committed { rows: 19, committed: 20, .. })));
    assert!(matches!(lab.truncate(a, 41), Err(CacheError::Invalid { .. })));
    assert!(matches!(lab.commit(a, 41), Err(CacheError::Invalid { .. })));
    assert!(matches!(lab.commit(a, 19), Err(CacheError::Invalid { .. })));
    lab.truncate(a, 20).unwrap();
    lab.extend(&[(a, 13)]).unwrap();
    lab.check();
}
