//! The committed parameter structs are those of the header.

use sha2::{Digest, Sha256};

#[test]
fn the_parameter_structs_have_not_drifted_from_the_header() {
    let header = include_bytes!("../kernels/abi.h");
    let hash: String = Sha256::digest(header).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(kvlar::abi::ABI_HASH, hash, "kernels/abi.h changed: run `cargo run -p kvlar-abi`");
}

#[test]
fn sizes_are_those_that_the_kernels_check() {
    let header = include_str!("../kernels/abi.h");
    let checked = |name: &str| {
        let line = header.lines().find(|l| l.starts_with(&format!("KVLAR_CHECK_SIZE({name},"))).expect(name);
        line.split([',', ')']).nth(1).and_then(|n| n.trim().parse::<usize>().ok()).expect(name)
    };
    use kvlar::abi::*;
    assert_eq!(size_of::<KvlarRows>(), checked("KvlarRows"));
    assert_eq!(size_of::<KvlarPool>(), checked("KvlarPool"));
    assert_eq!(size_of::<KvlarRope>(), checked("KvlarRope"));
    assert_eq!(size_of::<KvlarSegment>(), checked("KvlarSegment"));
    assert_eq!(size_of::<KvlarAttend>(), checked("KvlarAttend"));
    assert_eq!(size_of::<KvlarAppend>(), checked("KvlarAppend"));
    assert_eq!(size_of::<KvlarTranscode>(), checked("KvlarTranscode"));
    assert_eq!(size_of::<KvlarMerge>(), checked("KvlarMerge"));
}
