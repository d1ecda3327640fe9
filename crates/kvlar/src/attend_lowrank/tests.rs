use super::tiling::Tiling;

#[test]
fn every_kernel_of_the_build_is_reachable_and_exists() {
    let built = kvlar_kernels::ENTRIES.iter().filter(|e| e.family == "attend_lowrank").map(|e| e.name);
    let mut built: Vec<_> = built.filter(|n| *n != "kvlar_attend_lowrank_schedule").collect();
    let mut known = Tiling::names();
    built.sort_unstable();
    known.sort_unstable();
    assert_eq!(built, known);
}
