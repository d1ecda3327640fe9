use super::*;
use crate::write_json;
use serde_json::{Value, json};
use std::fs;

/// Not a GPU: times in these tests are made up.
const GPU: &str = "Made-up GPU";

fn op(name: &str, extra: Value, results: Value) -> Value {
    let mut json = json!({ "op": name, "gpu": GPU, "driver": "0.0", "date": "2000-01-01", "results": results });
    json.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    json
}

fn copy(rate: f64) -> Value {
    json!({ "copy_ceiling": { "bytes_per_second": rate } })
}

fn timed(name: &str, bytes: u64, p50: f64, parameters: Value) -> Value {
    let us = json!({ "p10": p50 * 0.9, "p50": p50, "p90": p50 * 1.2 });
    json!({ "name": name, "bytes": bytes, "microseconds": us, "cold_l2": true, "parameters": parameters })
}

fn heads() -> Value {
    json!({ "q_heads": 32, "kv_heads": 8, "head_dim": 128 })
}

fn with(mut to: Value, more: Value) -> Value {
    to.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    to
}

/// Writes files, makes the page of them; the page's text, and the folder.
fn page(files: &[(&str, Value)]) -> Result<(String, tempfile::TempDir), String> {
    let folder = tempfile::tempdir().expect("a folder");
    let paths: Vec<PathBuf> = files.iter().map(|(name, _)| folder.path().join(name)).collect();
    files.iter().zip(&paths).for_each(|((_, json), path)| write_json(path, json).expect("written"));
    let out = folder.path().join("page");
    results_page(&paths, &out)?;
    Ok((fs::read_to_string(out.join("README.md")).expect("a page"), folder))
}

fn line(text: &str, case: &str) -> String {
    text.lines().find(|l| l.starts_with(&format!("| `{case}` |"))).unwrap_or_else(|| panic!("no {case}: {text}")).to_string()
}

#[test]
fn floors_and_peers_of_the_same_shape() {
    let lowrank = json!({ "latents": "bf16", "key_rank": 64, "value_rank": 64 });
    let attend = op("attend", copy(1e12), json!([timed("bf16/b1/t4096", 5_000_000, 8.0, heads())]));
    let low = op(
        "attend_lowrank",
        copy(1e12),
        json!([
            timed("dense/bf16/b1/t4096", 5_000_000, 9.0, heads()),
            timed("g1-r64/bf16/b1/t4096", 2_000_000, 4.0, with(heads(), lowrank.clone())),
        ]),
    );
    let peers = op(
        "peers",
        copy(2e12),
        json!([
            timed("slow/page16/bf16/b1/t4096", 5_000_000, 40.0, heads()),
            timed("fast/bf16/b1/t4096", 5_000_000, 12.0, heads()),
            timed("rebuild/g1-r64/bf16/b1/t4096", 2_000_000, 100.0, with(heads(), lowrank)),
            timed("fast/bf16/b7/t4096", 5_000_000, 77.0, heads()),
            { "name": "absent", "skipped": "not installed" },
        ]),
    );
    let collected = json!({ "runs": [], "benches": [attend, low, peers] });
    let (text, folder) = page(&[("results.json", collected)]).expect("a page");
    // 5 MB at 1 TB/s are 5 µs: 8 µs are 1.6 floors; the fastest peer takes 12.
    assert_eq!(line(&text, "bf16/b1/t4096"), "| `bf16/b1/t4096` | 5.00 | 8.00 (7.20–9.60) | 1.60 | fast | 12.00 | 1.50× |");
    assert!(line(&text, "dense/bf16/b1/t4096").ends_with("| 1.80 | fast | 12.00 | 1.33× |"));
    // Low-rank peers are beside low-rank cases alone, though names end alike.
    assert!(line(&text, "g1-r64/bf16/b1/t4096").ends_with("| 2.00 | rebuild | 100.00 | 25.00× |"));
    for said in
        [GPU, "driver 0.0", "2000-01-01", "copy ceiling 1.000 TB/s", "fast/bf16/b7/t4096: 77.00 µs", "absent: not installed"]
    {
        assert!(text.contains(said), "{said}: {text}");
    }
    let svg = fs::read_to_string(folder.path().join("page/attend.svg")).expect("a figure");
    for said in ["bf16/b1/t4096", "slow", "fast", "kvlar", "</svg>"] {
        assert!(svg.contains(said), "{said}: {svg}");
    }
    assert!(!svg.contains("rebuild"));
}

#[test]
fn a_read_ceiling_comes_before_that_of_copies() {
    let both = with(copy(1e12), json!({ "read_ceiling": { "bytes_per_second": 4e12 } }));
    let case = || json!([timed("n2/rows8", 4_000_000, 3.0, json!({}))]);
    let own = page(&[("merge.json", op("merge", both, case()))]).expect("a page").0;
    assert!(line(&own, "n2/rows8").starts_with("| `n2/rows8` | 1.00 | 3.00") && own.contains("read ceiling 4.000 TB/s"));
    let rate = |name: &str, rate: f64| json!({ "name": name, "bytes_per_second": rate });
    let products = json!({ "name": "mma/bf16", "bytes": 0, "operations_per_second": 5e14 });
    let ceiling = op("ceiling", json!({}), json!([rate("copy", 1e12), rate("read/a", 1e12), rate("read/b", 2e12), products]));
    let shared = page(&[("ceiling.json", ceiling), ("merge.json", op("merge", copy(1e12), case()))]).expect("a page").0;
    assert!(line(&shared, "n2/rows8").starts_with("| `n2/rows8` | 2.00 | 3.00") && shared.contains("| read/b | 2.000 TB/s |"));
    assert!(shared.contains("| mma/bf16 | 500.0 T operations/s |"));
}

#[test]
fn selection_and_compaction_match_by_parameters() {
    let select = timed("b8/t4096/k64", 100, 2.0, json!({ "batch": 8, "members": 1, "rows": 4096, "k": 64 }));
    let topk = json!({ "op": "topk", "batch": 1, "longest": 4096, "kv_heads": 8, "k": 64 });
    let moved = json!({ "layers": 2, "kv_heads": 8, "rows": 100, "kept": 50, "codec": "bf16", "step": false });
    let compact = timed("bf16/l2h8/t100/k50/any", 100, 4.0, moved.clone());
    let step = timed("bf16/l2h8/t100/k50/step", 100, 4.0, with(moved, json!({ "step": true })));
    let copies = json!({ "op": "compact", "layers": 2, "kv_heads": 8, "longest": 100, "kept": 50, "codec": "bf16" });
    let peers =
        json!([timed("sorter/topk/h8/t4096/k64", 100, 6.0, topk), timed("gather/compact/l2h8/t100/k50", 100, 8.0, copies)]);
    let files = [
        ("a.json", op("select", copy(1e12), json!([select]))),
        ("b.json", op("compact", copy(1e12), json!([compact, step]))),
        ("c.json", op("peers-eviction", copy(1e12), peers)),
    ];
    let (text, _folder) = page(&files).expect("a page");
    assert!(line(&text, "b8/t4096/k64").ends_with("| sorter | 6.00 | 3.00× |"), "{text}");
    assert!(line(&text, "bf16/l2h8/t100/k50/any").ends_with("| gather | 8.00 | 2.00× |"), "{text}");
    assert!(line(&text, "bf16/l2h8/t100/k50/step").ends_with("|  |  |  |"), "{text}");
}

#[test]
fn what_has_no_time_is_listed_and_not_drawn() {
    let skipped = json!({ "name": "n8/rows9", "skipped": "needs 5 GB, may take 1 GB" });
    let merge = op("merge", json!({ "complete": false }), json!([timed("n2/rows8", 100, 1.0, json!({})), skipped]));
    let mut emulated = op("scan", json!({ "emulated": "not a speed" }), json!([{ "name": "int4/b1/t192", "bytes": 1 }]));
    emulated["gpu"] = Value::Null;
    let (text, folder) = page(&[("merge.json", merge), ("scan.json", emulated.clone())]).expect("a page");
    assert!(line(&text, "n8/rows9").contains("not timed: needs 5 GB"), "{text}");
    assert_eq!(line(&text, "n2/rows8"), "| `n2/rows8` |  | 1.00 (0.90–1.20) |  |  |  |  |");
    assert!(text.contains("`scan`: not a speed") && text.contains("Not all cases were reached"), "{text}");
    assert!(!text.contains("scan.svg") && !folder.path().join("page/scan.svg").exists());
    for files in [vec![], vec![("scan.json", emulated)], vec![("results.json", json!({ "runs": [] }))]] {
        let (text, folder) = page(&files).expect("a page");
        assert!(text.contains("Nothing is drawn"), "{text}");
        assert_eq!(fs::read_dir(folder.path().join("page")).expect("a folder").count(), 1);
    }
}

#[test]
fn errors_name_the_file() {
    let fails = |files: &[(&str, Value)], words: &[&str]| {
        let e = page(files).expect_err("a bad file");
        assert!(words.iter().all(|w| e.contains(w)), "{e}");
    };
    let good = || op("merge", copy(1e12), json!([]));
    fails(&[("bad.json", json!([]))], &["bad.json"]);
    fails(&[("bad.json", json!({ "benches": [good(), { "op": "x" }] }))], &["bad.json", "benches[1]", "date"]);
    fails(&[("bad.json", op("merge", copy(0.0), json!([])))], &["bad.json", "merge", "copy_ceiling"]);
    fails(&[("bad.json", op("merge", copy(1.0), json!([timed("n2", 1, 0.0, json!({}))])))], &["bad.json", "merge/n2"]);
    fails(&[("bad.json", op("merge", copy(1.0), json!([{ "bytes": 1 }])))], &["bad.json", "name"]);
    fails(&[("one.json", good()), ("two.json", good())], &["one.json", "two.json", "merge"]);
    let mut other = op("scan", copy(1e12), json!([]));
    other["gpu"] = json!("Another made-up GPU");
    fails(&[("one.json", good()), ("two.json", other)], &["scan", "Another made-up GPU", GPU]);
    let folder = tempfile::tempdir().expect("a folder");
    let torn = folder.path().join("torn.json");
    fs::write(&torn, "{ \"op\": \"merge\", ").expect("written");
    assert!(results_page(&[torn], folder.path()).expect_err("half a file").contains("torn.json"));
}
