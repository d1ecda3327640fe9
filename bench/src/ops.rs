//! The program of all ops: which of them a process runs.

use crate::{Case, Rig, runner};
use std::process::ExitCode;
use std::time::Duration;

/// What a module of the bench program gives: a name, and cases for a device.
#[derive(Clone, Copy)]
pub struct Op {
    /// First part of its cases' names, and name of its results file.
    pub name: &'static str,
    /// All cases, of which a filter may leave some out.
    pub cases: fn(&Rig) -> Vec<Box<dyn Case>>,
}

/// A bench program's `main`: runs ops, or prints their names (`--ops`).
///
/// # Panics
/// If a case fails.
pub fn run(ops: &[Op]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|a| a == "--ops") {
        ops.iter().for_each(|op| println!("{}", op.name));
        return ExitCode::SUCCESS;
    }
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let chosen = selected(ops, &arguments, &variable("KVLAR_BENCH_OPS"));
    match chosen.and_then(|ops| Ok((ops, limit(&variable("KVLAR_BENCH_SECONDS"))?))) {
        Ok((ops, limit)) => {
            runner::run_ops(&ops, limit);
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(2)
        }
    }
}

/// Those that are named, or all. A filter that begins with an op's name and a slash is of no other op, whose cases need not
/// be made for it.
fn selected<'a>(ops: &'a [Op], arguments: &[String], named: &str) -> Result<Vec<&'a Op>, String> {
    let names: Vec<&str> = named.split([',', ' ']).filter(|n| !n.is_empty()).collect();
    if let Some(unknown) = names.iter().find(|n| ops.iter().all(|op| op.name != **n)) {
        let known: Vec<&str> = ops.iter().map(|op| op.name).collect();
        return Err(format!("KVLAR_BENCH_OPS: {unknown:?} is no op: {}", known.join(", ")));
    }
    let filtered = |op: &Op| arguments.iter().any(|a| a.split_once('/').is_some_and(|(first, _)| first == op.name));
    let any = ops.iter().any(filtered);
    Ok(ops.iter().filter(|op| (names.is_empty() || names.contains(&op.name)) && (!any || filtered(op))).collect())
}

fn limit(seconds: &str) -> Result<Option<Duration>, String> {
    if seconds.is_empty() {
        return Ok(None);
    }
    let limit = seconds.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
    limit.map(Some).ok_or(format!("KVLAR_BENCH_SECONDS: {seconds:?} is no number of seconds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPS: [Op; 3] = [op("attend"), op("attend_cut"), op("scan")];

    const fn op(name: &'static str) -> Op {
        Op { name, cases: |_| Vec::new() }
    }

    fn names(arguments: &[&str], named: &str) -> Result<Vec<&'static str>, String> {
        let arguments: Vec<String> = arguments.iter().map(|a| a.to_string()).collect();
        Ok(selected(&OPS, &arguments, named)?.into_iter().map(|op| op.name).collect())
    }

    #[test]
    fn ops_are_named_or_filtered() {
        assert_eq!(names(&["--bench"], ""), Ok(vec!["attend", "attend_cut", "scan"]));
        assert_eq!(names(&["--bench", "attend/"], ""), Ok(vec!["attend"]));
        assert_eq!(names(&["attend_cut/bf16/b1", "--exact"], ""), Ok(vec!["attend_cut"]));
        // Criterion decides about what is no op's name: it may be part of any case's.
        assert_eq!(names(&["int4/b1"], ""), Ok(vec!["attend", "attend_cut", "scan"]));
        assert_eq!(names(&[], "scan, attend"), Ok(vec!["attend", "scan"]));
        assert_eq!(names(&["scan/int4"], "attend"), Ok(vec![]));
        let e = names(&[], "scan,sacn").expect_err("a name that is none");
        assert!(e.contains("\"sacn\"") && e.contains("attend, attend_cut, scan"), "{e}");
    }

    #[test]
    fn limits_are_seconds() {
        assert_eq!((limit(""), limit("1.5")), (Ok(None), Ok(Some(Duration::from_millis(1500)))));
        for bad in ["-1", "x", "inf"] {
            assert!(limit(bad).expect_err(bad).contains(bad));
        }
    }
}
