//! `kvlar info`.

mod ops;
#[cfg(test)]
mod tests;

use anyhow::Result;
use kvlar::{Device, SimtOptions};
use kvlar_kernels::{ENTRIES, GPU_LEDGER, MODULES};
use serde_json::Value;

#[derive(clap::Args)]
pub struct Arguments {
    /// List every entry point.
    #[arg(long)]
    entries: bool,
}

/// Runs of the ledger without a failure, whose source hashes are those of this build's modules.
fn verified() -> Result<Vec<String>> {
    let ledger: Value = serde_json::from_str(GPU_LEDGER)?;
    let runs = ledger.get("runs").and_then(Value::as_array).cloned().unwrap_or_default();
    let passed = |run: &Value| run["suite"]["failed"].as_u64() == Some(0);
    let same = |run: &Value| passed(run) && MODULES.iter().all(|m| run["modules"][m.name].as_str() == Some(m.source_hash));
    let text = |run: &Value, key: &str| run[key].as_str().unwrap_or("?").to_string();
    Ok(runs
        .iter()
        .filter(|r| !MODULES.is_empty() && same(r))
        .map(|r| format!("{} on {}", text(r, "gpu"), text(r, "date")))
        .collect())
}

pub fn run(a: &Arguments) -> Result<()> {
    println!("kvlar {}, ABI {}", env!("CARGO_PKG_VERSION"), kvlar::abi::KVLAR_ABI_VERSION);
    let features = [("cuda", cfg!(feature = "cuda")), ("simt", kvlar_kernels::simt::available())];
    println!("built with: {}", features.iter().filter(|f| f.1).map(|f| f.0).collect::<Vec<_>>().join(", "));
    let gpu = Device::cuda(0);
    match &gpu {
        Ok(d) => {
            let i = d.info();
            let (major, minor) = i.compute_capability.unwrap_or_default();
            println!(
                "gpu: {}, sm_{major}{minor}, {} SMs, {} KiB of shared memory a block",
                i.name,
                i.sm_count,
                i.shared_per_block >> 10
            );
        }
        Err(e) => println!("gpu: none ({e})"),
    }
    let emulation = Device::simt(SimtOptions::default());
    match &emulation {
        Ok(_) => println!("emulation: available"),
        Err(e) => println!("emulation: {e}"),
    }
    match MODULES.first() {
        Some(m) => {
            println!("kernels: {} modules for sm_{} and compute_80 PTX, by {}", MODULES.len(), m.archs.join(", sm_"), m.compiler)
        }
        None => println!("kernels: no GPU code in this build (feature `cuda`)"),
    }
    let mut families: Vec<&str> = ENTRIES.iter().map(|e| e.family).collect();
    families.dedup();
    let count = |f: &str| ENTRIES.iter().filter(|e| e.family == f).count();
    println!(
        "entry points: {} ({})",
        ENTRIES.len(),
        families.iter().map(|f| format!("{f} {}", count(f))).collect::<Vec<_>>().join(", ")
    );
    if a.entries {
        ENTRIES.iter().for_each(|e| println!("  {}", e.name));
    }
    let device = gpu.or(emulation).unwrap_or_else(|_| Device::reference());
    println!("ops, types and stored rows, on {}:", crate::eval::describe(&device));
    for op in ops::ops(&device) {
        println!("  {:<15} {:<15} {:<31} {}", op.name, op.types, op.stored, op.limits);
    }
    match verified()? {
        runs if MODULES.is_empty() && runs.is_empty() => println!("ledger: speaks of GPU code, of which this build has none"),
        runs if runs.is_empty() => println!("ledger: these kernels have not been run on any GPU"),
        runs => println!("ledger: verified on {}", runs.join("; ")),
    }
    Ok(())
}
