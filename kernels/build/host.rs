//! The CPU build of the kernels.

use super::*;

/// Rust source of the lookup from entry name to descriptor.
pub fn table(tree: &Tree) -> String {
    let names = || tree.units.iter().flat_map(|u| &u.entries);
    let mut s = String::from("unsafe extern \"C\" {\n");
    for e in names() {
        let _ = writeln!(s, "    static kvlar_simt_kernel_{e}: Descriptor;");
    }
    s += "}\n\nfn descriptor(entry: &str) -> Option<*const Descriptor> {\n    Some(match entry {\n";
    for e in names() {
        let _ = writeln!(s, "        {e:?} => &raw const kvlar_simt_kernel_{e},");
    }
    s + "        _ => return None,\n    })\n}\n"
}

const RUNTIME: [&str; 3] = ["simt/runtime.cpp", "simt/collectives.cpp", "simt/mbarrier.cpp"];

pub fn build(tree: &Tree, out: &Path) {
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        println!("cargo:warning=kvlar: the kernel emulation needs an x86-64 CPU; built without it");
        return;
    }
    let sanitizer = env::var("KVLAR_SIMT_SAN").unwrap_or_default();
    if let Some(folder) = env::var_os("KVLAR_SIMT_DIR") {
        return link(tree, &PathBuf::from(folder), &sanitizer);
    }
    let mut base = cc::Build::new();
    base.cpp(true).std("c++17").warnings(true).include(&tree.root).opt_level(2);
    for flag in ["-ffp-contract=off", "-pthread", "-Wextra", "-Wno-unknown-pragmas"] {
        base.flag(flag);
    }
    if env::var_os("KVLAR_DENY_WARNINGS").is_some() {
        base.flag("-Werror"); // not for everyone: compilers differ in what they warn of
    }
    base.define("KVLAR_SIMT", None);
    if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") && std::is_x86_feature_detected!("f16c") {
        base.flag("-march=x86-64-v3");
    }
    match sanitizer.as_str() {
        "" => {}
        "address" => _ = base.define("KVLAR_SIMT_ASAN", None),
        "thread" => _ = base.define("KVLAR_SIMT_TSAN", None),
        other => panic!("KVLAR_SIMT_SAN is {other:?}; it can be `address` or `thread`"),
    }
    for define in env::var("KVLAR_SIMT_DEFINES").unwrap_or_default().split_whitespace() {
        let (name, value) = define.split_once('=').map_or((define, None), |(n, v)| (n, Some(v)));
        base.define(name, value);
    }
    let Ok(compiler) = base.try_get_compiler() else {
        println!("cargo:warning=kvlar: no C++ compiler; built without the kernel emulation");
        return;
    };
    let probe = out.join("probe.cpp");
    write_if_changed(&probe, "#include <optional>\nint main() { std::optional<int> x; return x ? 1 : 0; }\n");
    let mut check = compiler.to_command();
    if !check.arg("-fsyntax-only").arg(&probe).output().is_ok_and(|r| r.status.success()) {
        println!("cargo:warning=kvlar: {} does not compile C++17; built without the kernel emulation", compiler.path().display());
        return;
    }

    // The runtime is machinery, not code under test: it is never sanitized.
    let instrument: &[&str] = match sanitizer.as_str() {
        // Without the checks whose failures the address sanitizer sees too: they are a third of the compilation.
        // Without optimization, which would take twice as long to compile, and sees no more.
        "address" => &[
            "-O0",
            "-fno-omit-frame-pointer",
            "-fsanitize=address,undefined",
            "-fno-sanitize=null,vptr,object-size,pointer-overflow,nonnull-attribute,returns-nonnull-attribute",
            "-fno-sanitize-recover=undefined",
        ],
        "thread" => &["-O1", "-fsanitize=thread"],
        _ => &[],
    };
    let version = compiler.to_command().arg("--version").output().map(|r| r.stdout).unwrap_or_default();
    let objects = out.join("objects");
    fs::create_dir_all(&objects).expect("writable OUT_DIR");
    let (mut jobs, mut all) = (Vec::new(), Vec::new());
    let mut add = |path: &str, hash: &str, flags: &[&str]| {
        let mut command = compiler.to_command();
        command.args(flags).args(["-x", "c++", "-c"]).arg(tree.root.join(path));
        let key = short_digest(&format!("{hash} {command:?} {version:?}"));
        let object = objects.join(format!("{}-{key}.o", path.replace(['/', '.'], "_")));
        all.push(object.clone());
        jobs.push((command, object));
    };
    for path in RUNTIME {
        add(path, &Sources::of(&tree.root, path).host_digest(), &["-O3"]);
    }
    for u in &tree.units {
        add(&u.path, &u.sources.host_digest(), instrument);
    }
    if let Err(text) = run_all(jobs) {
        panic!("a kernel does not compile for the CPU:\n{text}");
    }
    for stale in sorted(&objects).into_iter().filter(|p| !all.contains(p)) {
        let _ = fs::remove_file(stale);
    }
    let mut archive = cc::Build::new();
    archive.cpp(true).objects(&all).compile("kvlar_simt");
    write_if_changed(&out.join(KEY), &key(tree, &sanitizer));
    linked(&sanitizer);
}

/// Beside the library: what it was made from.
const KEY: &str = "kvlar_simt.key";

fn key(tree: &Tree, sanitizer: &str) -> String {
    let runtime = RUNTIME.map(|path| Sources::of(&tree.root, path).host_digest());
    let units: Vec<_> = tree.units.iter().map(|u| u.sources.host_digest()).collect();
    short_digest(&format!("{runtime:?} {units:?} {sanitizer}"))
}

/// Links the library of another build of the same sources.
fn link(tree: &Tree, folder: &Path, sanitizer: &str) {
    let found = fs::read_to_string(folder.join(KEY)).unwrap_or_default();
    assert!(found == key(tree, sanitizer), "KVLAR_SIMT_DIR: {} holds no build of these sources", folder.display());
    println!(
        "cargo:rustc-link-search=native={}\ncargo:rustc-link-lib=static=kvlar_simt\ncargo:rustc-link-lib=stdc++",
        folder.display()
    );
    linked(sanitizer);
}

fn linked(sanitizer: &str) {
    println!("cargo:rustc-cfg=kvlar_simt");
    match sanitizer {
        "address" => println!("cargo:rustc-link-lib=dylib=asan\ncargo:rustc-link-lib=dylib=ubsan"),
        "thread" => println!("cargo:rustc-link-lib=dylib=tsan"),
        _ => {}
    }
}
