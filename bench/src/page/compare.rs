//! Times over floors, ours beside those of peers.

use super::read::{CaseResult, OpFile, Percentiles};

/// The op whose results are ceilings.
const CEILING: &str = "ceiling";

/// What is said and drawn.
#[derive(Debug, Default)]
pub struct Page {
    pub gpu: Option<String>,
    /// Those with a time.
    pub ops: Vec<OpPage>,
    /// Those without, and why.
    pub without: Vec<(String, String)>,
    /// Rates that the op of ceilings measured, with their units.
    pub ceilings: Vec<(String, String)>,
    /// Times of peers at shapes of which there is no case, and peers that were skipped.
    pub strays: Vec<String>,
}

/// An op.
#[derive(Debug)]
pub struct OpPage {
    pub name: String,
    pub driver: Option<String>,
    pub date: String,
    pub complete: bool,
    /// Which it is, and bytes a second.
    pub ceiling: Option<(&'static str, f64)>,
    pub cases: Vec<Row>,
}

/// A case.
#[derive(Debug)]
pub struct Row {
    pub name: String,
    /// Microseconds for its bytes at the ceiling, if there are both.
    pub floor: Option<f64>,
    /// Or why there is no time.
    pub ours: Result<Percentiles, String>,
    /// Whether some of the bytes came from a cache, which is no floor's.
    pub warm: bool,
    /// Name without the shape, and median in microseconds; the fastest first.
    pub peers: Vec<(String, f64)>,
}

impl Row {
    /// A time over the floor.
    pub fn over_floor(&self, microseconds: f64) -> Option<f64> {
        self.floor.map(|floor| microseconds / floor)
    }
}

impl Page {
    /// Of files that are of one GPU.
    pub fn of(files: Vec<OpFile>) -> Result<Self, String> {
        let mut page = Self::default();
        let (timed, not): (Vec<_>, Vec<_>) = files.into_iter().partition(|f| f.gpu.is_some() && f.emulated.is_none());
        page.without.extend(not.into_iter().map(|f| (f.op, f.emulated.unwrap_or("no GPU is named".into()))));
        for file in &timed {
            let gpu = page.gpu.get_or_insert_with(|| file.gpu.clone().unwrap_or_default());
            if file.gpu.as_ref() != Some(gpu) {
                let other = file.gpu.as_deref().unwrap_or_default();
                return Err(format!("{}: results of {other:?} beside those of {gpu:?}: a page is of one GPU", file.op));
            }
        }
        let read = timed.iter().find(|f| f.op == CEILING).and_then(read_ceiling);
        let (peers, ours): (Vec<&OpFile>, Vec<&OpFile>) = timed.iter().partition(|f| f.op.starts_with("peers"));
        let peers: Vec<&CaseResult> = peers.iter().flat_map(|f| &f.results).collect();
        let mut met = vec![false; peers.len()];
        for file in ours {
            if file.op == CEILING {
                page.ceilings.extend(file.results.iter().filter_map(|r| Some((r.name.clone(), rate(r)?))));
                continue;
            }
            let op = OpPage::of(file, read, &peers, &mut met);
            if op.cases.iter().any(|row| row.ours.is_ok()) {
                page.ops.push(op);
            } else {
                let why = op.cases.first().and_then(|row| row.ours.clone().err()).unwrap_or("there is no case".into());
                page.without.push((op.name, why));
            }
        }
        let stray = |(peer, met): (&&CaseResult, &bool)| match (&peer.skipped, peer.microseconds) {
            (Some(why), _) => Some(format!("{}: {why}", peer.name)),
            (None, Some(us)) if !met => Some(format!("{}: {:.2} µs", peer.name, us.p50)),
            _ => None,
        };
        page.strays = peers.iter().zip(&met).filter_map(stray).collect();
        Ok(page)
    }
}

/// What a case of ceilings reached.
fn rate(of: &CaseResult) -> Option<String> {
    let operations = of.operations_per_second.map(|x| format!("{:.1} T operations/s", x / 1e12));
    operations.or(of.bytes_per_second.map(|x| format!("{:.3} TB/s", x / 1e12)))
}

/// What reading reached: said of the file, else its fastest result named `read…`.
fn read_ceiling(file: &OpFile) -> Option<f64> {
    let named = file.results.iter().filter(|r| r.name.split('/').next() == Some("read"));
    let fastest = named.filter_map(|r| r.bytes_per_second).max_by(f64::total_cmp);
    file.read_ceiling.map(|c| c.bytes_per_second).or(fastest)
}

impl OpPage {
    fn of(file: &OpFile, read: Option<f64>, peers: &[&CaseResult], met: &mut [bool]) -> Self {
        let read = file.read_ceiling.map(|c| c.bytes_per_second).or(read).map(|rate| ("read", rate));
        let ceiling = read.or(file.copy_ceiling.map(|c| ("copy", c.bytes_per_second)));
        let cases = file.results.iter().map(|case| {
            let mut beside = Vec::new();
            for (peer, met) in peers.iter().zip(&mut *met) {
                if let (Some(name), Some(us)) = (counterpart(&file.op, case, peer), peer.microseconds) {
                    *met = true;
                    beside.push((name, us.p50));
                }
            }
            beside.sort_by(|a, b| a.1.total_cmp(&b.1));
            Row {
                name: case.name.clone(),
                floor: ceiling.and_then(|(_, rate)| Some(case.bytes.filter(|&n| n > 0)? as f64 / rate * 1e6)),
                ours: case.microseconds.ok_or_else(|| case.skipped.clone().unwrap_or("it ran without being timed".into())),
                warm: case.cold_l2 == Some(false),
                peers: beside,
            }
        });
        let (name, cases) = (file.op.clone(), cases.collect());
        Self { name, driver: file.driver.clone(), date: file.date.clone(), complete: file.complete, ceiling, cases }
    }
}

/// The name of a peer without the shape, if that is a case's.
fn counterpart(op: &str, case: &CaseResult, peer: &CaseResult) -> Option<String> {
    let (ours, theirs) = (&case.parameters, &peer.parameters);
    let same = |a: &str, b: &str| !ours[a].is_null() && ours[a] == theirs[b];
    let (name, fits) = match (op, theirs["op"].as_str()) {
        // Rows of scores are heads to the peers.
        ("select", Some("topk")) => {
            let fits = ours["members"] == 1 && same("batch", "kv_heads") && same("rows", "longest") && same("k", "k");
            (peer.name.split_once("/topk/")?.0, fits)
        }
        ("compact", Some("compact")) => {
            let alike = ["layers", "kv_heads", "kept", "codec"].iter().all(|x| same(x, x));
            (peer.name.split_once("/compact/")?.0, alike && ours["step"] == false && same("rows", "longest"))
        }
        ("scan", Some("scan")) | ("attend" | "attend_quantized" | "attend_lowrank" | "attend_cut", None) => {
            let shape = case.name.strip_prefix("dense/").unwrap_or(&case.name);
            let name = peer.name.strip_suffix(shape)?.strip_suffix('/')?;
            // Names of low-rank peers end as those of dense ones do.
            let alike = ["latents", "key_rank", "value_rank", "q_heads", "kv_heads", "head_dim"];
            (name, alike.into_iter().all(|x| ours[x] == theirs[x]))
        }
        _ => return None,
    };
    fits.then(|| name.to_string())
}
