//! One chart: what is kept against what is recalled, and perplexity.

use crate::table::Table;
use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::path::Path;

/// Kept, height, label.
type Point<'a> = (f64, f64, &'a str);

/// Draws the table's rows: kept (x) against the mean recall (left) and perplexity (right).
///
/// # Errors
/// If the file cannot be written.
pub fn draw(table: &Table, path: &Path) -> Result<()> {
    let area = SVGBackend::new(path, (900, 420)).into_drawing_area();
    let failed = |e: &dyn std::fmt::Display| anyhow!("{}: {e}", path.display());
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let recall = |r: &crate::table::Row| 100.0 * r.recall.iter().map(|t| t.share()).sum::<f64>() / r.recall.len().max(1) as f64;
    let halves = area.split_evenly((1, 2));
    let series: [(&str, Vec<Point<'_>>); 2] = [
        ("recall, %", table.rows.iter().map(|r| (100.0 * r.kept, recall(r), r.method.as_str())).collect()),
        ("perplexity", table.rows.iter().filter_map(|r| Some((100.0 * r.kept, r.perplexity?, r.method.as_str()))).collect()),
    ];
    for (half, (name, points)) in halves.iter().zip(&series) {
        let (low, high) = points.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), p| (l.min(p.1), h.max(p.1)));
        if points.is_empty() {
            continue;
        }
        let room = ((high - low) * 0.5).max(high.abs() * 0.02).max(0.5);
        let mut chart = ChartBuilder::on(half)
            .caption(format!("{name} ({})", table.model), ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(55)
            .build_cartesian_2d(0.0..110.0, low - room..high + room)
            .map_err(|e| failed(&e))?;
        chart.configure_mesh().x_desc("bytes kept, % of bf16").y_desc(*name).draw().map_err(|e| failed(&e))?;
        chart.draw_series(points.iter().map(|&(x, y, _)| Circle::new((x, y), 5, BLUE.filled()))).map_err(|e| failed(&e))?;
        chart
            .draw_series(
                points.iter().map(|&(x, y, label)| Text::new(label.to_string(), (x - 6.0, y + room * 0.12), ("sans-serif", 14))),
            )
            .map_err(|e| failed(&e))?;
    }
    area.present().map_err(|e| failed(&e))
}
