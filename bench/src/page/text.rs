//! The page in Markdown.

use super::compare::{OpPage, Page, Row};
use std::fmt::Write as _;

const REPEAT: &str =
    "To repeat it: `tools/gpu-bundle`; its archive, unpacked on a machine with such a GPU: `./run check`, `./run bench`;
back here `cargo run -p kvlar-bench --bin results_page -- results.json`. Or on that machine, with Rust and nvcc:
`cargo bench -p kvlar-bench --features cuda`, `python3 bench/peers/peers.py`, and `results_page` without arguments.
";

/// All of it.
pub fn markdown(page: &Page) -> String {
    let mut s = String::from("# Results\n\n<!-- Written by `results_page`. -->\n\n");
    match &page.gpu {
        Some(gpu) if !page.ops.is_empty() => {
            _ = writeln!(s, "Times of a launch on one {gpu}, data in memory unless marked.\n\n{REPEAT}");
            s += "The floor of a case is its bytes (inputs once, outputs once) at the ceiling that was measured in the same run.\n";
        }
        _ => _ = write!(s, "Nothing is drawn: there are no times of a GPU in what was read.\n\n{REPEAT}"),
    }
    if !page.ceilings.is_empty() {
        s += "\n| ceiling | |\n|---|---|\n";
        page.ceilings.iter().for_each(|(name, rate)| _ = writeln!(s, "| {name} | {rate} |"));
    }
    page.ops.iter().for_each(|op| of_op(&mut s, op));
    list(&mut s, "Not drawn", page.without.iter().map(|(op, why)| format!("`{op}`: {why}")));
    list(&mut s, "Peers beside none of these cases", page.strays.iter().cloned());
    s
}

fn list(s: &mut String, title: &str, lines: impl Iterator<Item = String>) {
    let lines: Vec<String> = lines.collect();
    if !lines.is_empty() {
        _ = writeln!(s, "\n## {title}\n");
        lines.iter().for_each(|line| _ = writeln!(s, "- {line}"));
    }
}

fn of_op(s: &mut String, op: &OpPage) {
    let OpPage { name, date, .. } = op;
    _ = write!(s, "\n## {name}\n\n");
    if op.ceiling.is_some() {
        _ = write!(s, "![{name}: time over the floor]({name}.svg)\n\n");
    }
    _ = write!(s, "{date}, driver {}", op.driver.as_deref().unwrap_or("unknown"));
    match op.ceiling {
        Some((kind, rate)) => _ = writeln!(s, ", {kind} ceiling {:.3} TB/s.", rate / 1e12),
        None => _ = writeln!(s, ". No ceiling was measured: there is no floor."),
    }
    if !op.complete {
        _ = writeln!(s, "Not all cases were reached.");
    }
    _ = writeln!(s, "Alone: `cargo bench -p kvlar-bench --features cuda -- {name}/`.\n");
    s.push_str("| case | floor, µs | kvlar, µs (p10–p90) | × floor | fastest peer | µs | its time over kvlar's |\n");
    s.push_str("|---|---|---|---|---|---|---|\n");
    op.cases.iter().for_each(|row| of_case(s, row));
}

fn of_case(s: &mut String, row: &Row) {
    let number = |x: Option<f64>| x.map_or(String::new(), |x| format!("{x:.2}"));
    let floor = number(row.floor);
    let (ours, over) = match &row.ours {
        Ok(us) => {
            let warm = if row.warm { ", in part from L2" } else { "" };
            (format!("{:.2} ({:.2}–{:.2}){warm}", us.p50, us.p10, us.p90), number(row.over_floor(us.p50)))
        }
        Err(why) => (format!("not timed: {}", why.replace('|', "/")), String::new()),
    };
    let (peer, theirs, gain) = match row.peers.first() {
        Some((name, us)) => (name.as_str(), number(Some(*us)), number(row.ours.as_ref().ok().map(|ours| us / ours.p50)) + "×"),
        None => ("", String::new(), String::new()),
    };
    let gain = if gain == "×" { String::new() } else { gain };
    _ = writeln!(s, "| `{}` | {floor} | {ours} | {over} | {peer} | {theirs} | {gain} |", row.name);
}
