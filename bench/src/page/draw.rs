//! A figure an op: a line a case, and along it times over the floor.

use super::compare::{OpPage, Row};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const WIDTH: u32 = 1100;
const NAMES: u32 = 320;
const LEGEND: u32 = 190;
const LINE: u32 = 18;
const FONT: (&str, u32) = ("sans-serif", 12);

/// SVG of the cases that have a time and a floor.
pub fn figure(op: &OpPage, gpu: &str) -> Result<String, String> {
    let rows: Vec<&Row> = op.cases.iter().filter(|row| row.ours.is_ok() && row.floor.is_some()).collect();
    let mut svg = String::new();
    draw(op, gpu, &rows, &mut svg).map_err(|e| e.to_string())?;
    Ok(svg)
}

/// Kernels of a peer that differ in pages or layouts have one colour.
fn family(peer: &str) -> &str {
    peer.split('/').next().unwrap_or(peer)
}

fn families<'a>(rows: &[&'a Row]) -> Vec<&'a str> {
    let mut all: Vec<&str> = rows.iter().flat_map(|row| row.peers.iter().map(|(name, _)| family(name))).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The least and the largest ratio; 1 is among them.
fn range(rows: &[&Row]) -> (f64, f64) {
    let times = |row: &&Row| row.ours.iter().map(|us| us.p50).chain(row.peers.iter().map(|p| p.1)).collect::<Vec<_>>();
    let ratios = rows.iter().flat_map(|row| times(row).into_iter().filter_map(|us| row.over_floor(us)));
    ratios.fold((1.0, 1.0), |(low, high), x| (x.min(low), x.max(high)))
}

fn draw(op: &OpPage, gpu: &str, rows: &[&Row], svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let families = families(rows);
    let height = 110 + LINE * rows.len().max(families.len() + 1) as u32;
    let root = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let (low, high) = range(rows);
    let end = rows.len() as f64 - 0.3;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{} on {gpu}: time over the floor", op.name), ("sans-serif", 18))
        .margin(12)
        .margin_right(LEGEND)
        .y_label_area_size(NAMES)
        .x_label_area_size(40)
        .build_cartesian_2d((low / 1.1..(high * 1.1).max(2.0)).log_scale(), -0.7..end)?;
    let mut mesh = chart.configure_mesh();
    mesh.disable_y_mesh().disable_y_axis().y_labels(0).x_label_formatter(&|x| format!("{x:.1}")).x_desc("times the floor");
    mesh.draw()?;
    chart.draw_series([PathElement::new([(1.0, -0.7), (1.0, end)], BLACK)])?;
    let at = |i: usize| (rows.len() - 1 - i) as f64;
    let left = Pos::new(HPos::Left, VPos::Center);
    let text = |x: i32, y: i32, pos: Pos, text: &str| Text::new(text.to_string(), (x, y), FONT.into_text_style(&root).pos(pos));
    let legend = |k: usize| ((WIDTH - LEGEND) as i32 + 14, 54 + (LINE as usize * k) as i32);
    for (k, of) in families.iter().enumerate() {
        let colour = Palette99::pick(k).stroke_width(2);
        for (i, row) in rows.iter().enumerate() {
            let times = row.peers.iter().filter(|(name, _)| family(name) == *of);
            chart.draw_series(times.filter_map(|(_, us)| Some(Cross::new((row.over_floor(*us)?, at(i)), 4, colour))))?;
        }
        let (x, y) = legend(k + 1);
        root.draw(&Cross::new((x, y), 4, colour))?;
        root.draw(&text(x + 12, y, left, of))?;
    }
    for (i, row) in rows.iter().enumerate() {
        let (Ok(us), Some(floor)) = (&row.ours, row.floor) else { continue };
        chart.draw_series([PathElement::new([(us.p10 / floor, at(i)), (us.p90 / floor, at(i))], BLUE)])?;
        chart.draw_series([Circle::new((us.p50 / floor, at(i)), 4, BLUE.filled())])?;
        let (_, y) = chart.plotting_area().map_coordinate(&(1.0, at(i)));
        root.draw(&text(NAMES as i32 + 4, y, Pos::new(HPos::Right, VPos::Center), &row.name))?;
    }
    let (x, y) = legend(0);
    root.draw(&Circle::new((x, y), 4, BLUE.filled()))?;
    root.draw(&text(x + 12, y, left, "kvlar, and from p10 to p90"))?;
    root.present()?;
    Ok(())
}
